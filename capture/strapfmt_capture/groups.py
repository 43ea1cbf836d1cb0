"""Tensor-parallel groups: which processes run the same passes on parts of one model, and how they agree."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from strapfmt.claim import rank_from_environment
from strapfmt.errors import ArgumentError, CaptureError

__all__ = ["Group", "find_group", "first_does", "is_distributed", "own_rank", "shard_dimension"]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The processes that run the same passes on parts of one model. The first of them writes for all.

    Attributes
    ----------
    process_group : ProcessGroup
    ranks : tuple of int
        Their numbers in the whole job, in the order of the group.
    """

    process_group: Any
    ranks: tuple[int, ...]

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return dist.get_rank() == self.ranks[0]

    def check_alike(self, sites: list[str]) -> None:
        """Raise in all processes if they were asked for different sites, at which some would wait for ever."""
        found = self.exchange(sites)
        for rank, theirs in zip(self.ranks, found, strict=True):
            if theirs != found[0]:
                differing = sorted(set(theirs) ^ set(found[0])) or theirs
                raise ArgumentError(
                    f"sites: expected the same in all processes of a tensor-parallel group ({self.text}), found "
                    f"{differing[0]!r} not in both of ranks {self.ranks[0]} and {rank}"
                )

    def exchange(self, value: _T) -> list[_T]:
        """Return what each process of the group has called this with."""
        found: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(found, value, group=self.process_group)
        return found

    @property
    def text(self) -> str:
        """The ranks in words."""
        return f"ranks {', '.join(map(str, self.ranks))}"


def first_does(group: Group | None, action: Callable[[], _T]) -> _T:
    """Let the process that writes do something, and tell the others what came of it; without a group, just do it.

    All processes of the group have to call this.

    Returns
    -------
    object
        What the action has returned there, pickled on the way.

    Raises
    ------
    CaptureError
        In the other processes, if the action has failed.
    """
    if group is None:
        return action()
    result: _T | None = None
    problem: BaseException | None = None
    if group.is_first:
        try:
            result = action()
        except BaseException as error:  # noqa: BLE001 - raised below, when the others know
            problem = error
    told: list[Any] = [result, None if problem is None else f"{type(problem).__name__}: {problem}"]
    dist.broadcast_object_list(told, src=group.ranks[0], group=group.process_group)
    if problem is not None:
        raise problem
    if told[1] is not None:
        raise CaptureError(f"rank {group.ranks[0]}, which writes for this process, failed: {told[1]}")
    answer: _T = told[0]
    return answer


def is_distributed() -> bool:
    """Whether this process is one of several that PyTorch knows of."""
    return dist.is_available() and dist.is_initialized()


def own_rank() -> int | None:
    """Return the number of this process: of `RANK`, else of `torch.distributed`; None if it runs alone."""
    rank = rank_from_environment()
    if rank is None and is_distributed() and dist.get_world_size() > 1:
        return dist.get_rank()
    return rank


def find_group(model: torch.nn.Module, given: Any = None) -> Group | None:
    """Return the tensor-parallel group of this process, None if the model is whole.

    Parameters
    ----------
    model : torch.nn.Module
    given : DeviceMesh or ProcessGroup, optional
        None: that over which parameters of the model are split, leaving aside what FSDP splits.

    Raises
    ------
    ArgumentError
        If `given` is something else, or the model is split over several groups.
    """
    if not is_distributed():
        if given is not None:
            raise ArgumentError("tp_group: expected torch.distributed to be initialized first")
        return None
    given = None if given is None else _as_process_group(given)
    groups = _groups_of(model) if given is None else {_ranks(given): given}
    if len(groups) > 1:
        raise ArgumentError(
            f"tp_group: the model is split over several groups of processes ({', '.join(map(str, groups))}); "
            "name the one whose processes run the same passes"
        )
    for ranks, group in groups.items():
        if len(ranks) > 1:
            return Group(process_group=group, ranks=ranks)
    return None


def shard_dimension(parameter: Any) -> int | None:
    """Return the dimension in which a parameter is split over a tensor-parallel group, None if it is whole."""
    placements: Sequence[Any] = getattr(parameter, "placements", ())
    if len(placements) != 1 or not placements[0].is_shard():
        return None
    dimension: int = placements[0].dim % parameter.ndim
    return dimension


def _groups_of(model: torch.nn.Module) -> dict[tuple[int, ...], Any]:
    by_fsdp = _modules_of_fsdp(model)
    found = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            mesh = getattr(parameter, "device_mesh", None)
            if mesh is not None and _is_tensor_parallel(parameter, is_of_fsdp=module in by_fsdp):
                group = mesh.get_group(mesh.ndim - 1)
                found[_ranks(group)] = group
    return found


def _modules_of_fsdp(model: torch.nn.Module) -> set[torch.nn.Module]:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # it need not be loaded to know that it was not used
    kind = getattr(fsdp, "FSDPModule", ())
    return {inner for module in model.modules() if isinstance(module, kind) for inner in module.modules()}


def _is_tensor_parallel(parameter: Any, *, is_of_fsdp: bool) -> bool:
    """Whether the last dimension of a parameter's mesh is one of tensor parallelism.

    FSDP alone has one dimension (sharded) or two (replicated, sharded); another one is behind these.
    """
    placements = parameter.placements
    if not placements[-1].is_shard():
        return False
    if not is_of_fsdp:
        return True
    return len(placements) > 2 or (len(placements) == 2 and placements[0].is_shard())


def _as_process_group(given: Any) -> Any:
    if isinstance(given, dist.ProcessGroup):
        return given
    if isinstance(given, dist.device_mesh.DeviceMesh):
        if given.ndim == 1:
            return given.get_group()
        names = ", ".join(map(repr, given.mesh_dim_names or ()))
        raise ArgumentError(
            f"tp_group: expected a mesh of one dimension, got one of {given.ndim}; name the dimension in "
            f"which a model is split: mesh[...]{f', one of {names}' if names else ''}"
        )
    raise ArgumentError(f"tp_group: expected a DeviceMesh or a ProcessGroup, got a {type(given).__name__}")


def _ranks(group: Any) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))
