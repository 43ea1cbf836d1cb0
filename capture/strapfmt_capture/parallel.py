"""Values of a model that is split over processes: made whole in every process, written by the first.

A value of a tensor-parallel model is in each process whole (the residual stream), a part of it (the inside of attention
and MLP), or a summand of it (before a reduction). Which it is, is known

- of a DTensor, which says so itself;
- of what goes into or comes out of a linear layer or an embedding whose weight is split, by its width;
- of heads (attention patterns, normed queries and keys), by their number;
- of anything else by comparing the processes' values, the first time that they are not all one number.

Parts are put together with a collective operation, in which every process of the group takes part; so the hooks of
those that write nothing run as well. What differs between processes and is none of these is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from strapfmt.errors import CaptureError
from strapfmt_capture.computed import Computation, TopK
from strapfmt_capture.groups import Group, find_group, is_distributed, shard_dimension
from strapfmt_capture.hookpoints import HookPoint

__all__ = ["Whole", "placements_of", "whole_points"]

# Copies that differ by rounding are the same value; parts and summands differ by far more.
_TOLERANCE = 2.0**-5
_LAYERS = (torch.nn.Linear, torch.nn.Embedding)


class Whole:
    """Makes one tensor of what the processes of a group have of a site; the same number of calls in each of them.

    Parameters
    ----------
    point : HookPoint
    module : torch.nn.Module
        That at the hook point.
    group : Group or None
        None: no group is known, and only a DTensor is put together, over its own mesh.
    heads : (int, int) or None
        Of a value with four dimensions: which one counts heads, and how many the whole model has.
    check : callable
        Called before the first value is taken.

    Attributes
    ----------
    placement : str or None
        How the value was spread over processes, `"Shard(2)"` for example; None if each had all of it.
    """

    def __init__(
        self,
        point: HookPoint,
        module: torch.nn.Module,
        group: Group | None,
        heads: tuple[int, int] | None,
        check: Callable[[], None],
    ) -> None:
        self.placement: str | None = None
        self._point, self._module, self._group, self._heads = point, module, group, heads
        self._check: Callable[[], None] | None = check
        self._is_replicated = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the whole value: `x` itself where that is whole already, else a new tensor without a gradient.

        Raises
        ------
        CaptureError
            In all processes, if their values differ and it is not known how they are parts of one.
        """
        if self._group is None and torch.compiler.is_compiling():
            return x
        if self._check is not None:
            check, self._check = self._check, None
            check()
        x = x.wait() if isinstance(x, dist._functional_collectives.AsyncCollectiveTensor) else x
        if hasattr(x, "full_tensor"):
            return self._put_together(x.detach())
        if self._group is None or self._is_replicated:
            return x
        split = self._split(x)
        if split is not None:
            return self._put_together(self._as_dtensor(self._group, x.detach().contiguous(), *split))
        self._is_replicated = self._compared(self._group, x.detach())
        return x

    def __deepcopy__(self, memo: dict[int, Any]) -> Whole:
        # A copy of a hooked model takes its hooks along, with their arguments, but they do nothing.
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (_as_it_is,)

    def _put_together(self, x: Any) -> torch.Tensor:
        placements = [str(placement) for placement in x.placements if not placement.is_replicate()]
        if placements:
            self.placement = ", ".join(placements)
        whole: torch.Tensor = x.full_tensor()
        return whole

    def _split(self, x: torch.Tensor) -> tuple[int, int] | None:
        """Return the dimension in which `x` is a part, and the size of the whole in it; None if that is not known."""
        if self._heads is not None and x.ndim == 4 and x.shape[self._heads[0]] != self._heads[1]:
            return self._heads
        weight = getattr(self._module, "weight", None)
        if not isinstance(self._module, _LAYERS) or not isinstance(weight, torch.Tensor) or not x.ndim:
            return None
        is_linear, is_input = isinstance(self._module, torch.nn.Linear), self._point.where == "in"
        if not is_linear and is_input:
            return None
        # [d_out, d_in] of a linear layer, [n, d_out] of an embedding
        dimension = int(is_linear == is_input)
        if shard_dimension(weight) != dimension or x.shape[-1] == weight.shape[dimension]:
            return None
        return x.ndim - 1, weight.shape[dimension]

    def _as_dtensor(self, group: Group, x: torch.Tensor, dimension: int, size: int) -> Any:
        from torch.distributed.tensor import DTensor, Shard

        mesh = dist.device_mesh.DeviceMesh.from_group(group.process_group, x.device.type)
        shape = torch.Size((*x.shape[:dimension], size, *x.shape[dimension + 1 :]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(x, mesh, [Shard(dimension)], run_check=False, shape=shape, stride=stride)

    def _compared(self, group: Group, x: torch.Tensor) -> bool:
        """Return True if the processes have the same value, False if it is all one number, which proves nothing."""
        found = group.exchange((tuple(x.shape), str(x.dtype)))
        if len(set(found)) > 1:
            raise CaptureError(
                self._complaint(group, " and ".join(f"{dtype} {[*shape]}" for shape, dtype in found))
            )
        mine = x.to(torch.float32 if x.is_floating_point() else torch.float64).nan_to_num().contiguous()
        first = mine.clone()
        dist.broadcast(first, src=group.ranks[0], group=group.process_group)
        differs = (mine - first).norm() > _TOLERANCE * first.norm()
        varies = mine.numel() > 0 and bool((mine != mine.flatten()[:1]).any())
        verdict = torch.stack(
            [differs.to(torch.float32), torch.full_like(differs, varies, dtype=torch.float32)]
        )
        dist.all_reduce(verdict, op=dist.ReduceOp.MAX, group=group.process_group)
        if verdict[0]:
            shape = [*x.shape]
            raise CaptureError(self._complaint(group, f"different values of the same shape {shape}"))
        return bool(verdict[1])

    def _complaint(self, group: Group, found: str) -> str:
        return (
            f"site {self._point.site!r} at {self._point.hook_point}: expected the same value in every process of the "
            f"tensor-parallel group ({group.text}), found {found}: parts or summands of a value, and how they make it "
            "is not known here; take the input or the output of a linear layer next to it, or leave this site out"
        )


def whole_points(model: torch.nn.Module, points: Sequence[HookPoint], group: Group | None) -> list[HookPoint]:
    """Return hook points whose values are whole; `points` as they are where PyTorch knows of one process only."""
    if not is_distributed():
        return list(points)

    def check() -> None:
        if group is None and find_group(model) is not None:
            raise CaptureError(
                f"{type(model).__name__} is split over processes, but was whole when its capture began, so that every "
                "process would write the same rows; split it first (parallelize_module, from_pretrained), then capture"
            )

    def whole(point: HookPoint) -> HookPoint:
        module = model.get_submodule(point.module_path)
        whole = Whole(point, module, group, _heads_of(point, module), check)
        if point.compute is None or isinstance(point.compute, TopK) or group is None:
            return replace(point, whole=whole)
        # What is computed inside a split module, its state for example, may be a part as well.
        result = Whole(point, torch.nn.Identity(), group, None, check)
        return replace(point, whole=whole, compute=partial(_computed, point.compute, result))

    return [whole(point) for point in points]


def placements_of(points: Iterable[HookPoint]) -> Mapping[str, str]:
    """Return, by site, how the values were spread over processes, of those that were."""
    spread = {point.site: point.whole.placement for point in points if isinstance(point.whole, Whole)}
    return {site: placement for site, placement in spread.items() if placement is not None}


def _heads_of(point: HookPoint, module: torch.nn.Module) -> tuple[int, int] | None:
    """Return which dimension of what the module gives counts heads, and how many there are."""
    if point.split is not None:
        return (1 if point.split.is_turned else 2), point.split.shape[0]
    n_heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    return (1, n_heads) if point.heads_first and isinstance(n_heads, int) else None


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


def _computed(compute: Computation, whole: Whole, *call: Any) -> Any:
    value = compute(*call)
    return whole(value) if isinstance(value, torch.Tensor) else value
