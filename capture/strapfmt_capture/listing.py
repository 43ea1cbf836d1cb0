"""What each site of a model holds, read off its config and weights: shape, element type, bytes per token."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import overload

import torch

from strapfmt_capture.computed import TopK
from strapfmt_capture.decoders import Decoder, named_decoders, output_head
from strapfmt_capture.hookpoints import HookPoint, hook_points

__all__ = ["SiteInfo", "SiteListing", "describe"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteInfo:
    """One line of a listing.

    Attributes
    ----------
    site : str
        What to ask for.
    module_path, hook_point : str
        Where it is taken: `"model.layers.3"`, `"model.layers.3:out"`.
    shape : tuple of int or None
        Of one token; -1 marks a dimension that varies; None if the weights do not tell.
    dtype : str or None
        Element type of the weights that make it: that of the values too, unless the model runs under autocast.
    bytes_per_token : int or None
        None where the shape is unknown or varies.
    """

    site: str
    module_path: str
    hook_point: str
    shape: tuple[int, ...] | None
    dtype: str | None
    bytes_per_token: int | None


class SiteListing(Sequence[SiteInfo]):
    """The sites of a model; a sequence that prints as a table.

    Parameters
    ----------
    model : str
        What the model is called in the heading.
    uniform, modules : list of SiteInfo
        Sites that have the same name in every architecture, and modules under their own paths.
    """

    def __init__(self, model: str, uniform: list[SiteInfo], modules: list[SiteInfo]) -> None:
        self.model, self.uniform, self.modules = model, uniform, modules

    @property
    def names(self) -> list[str]:
        """Every name that can be asked for."""
        return [info.site for info in self]

    def __len__(self) -> int:
        return len(self.uniform) + len(self.modules)

    @overload
    def __getitem__(self, index: int) -> SiteInfo: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SiteInfo]: ...
    def __getitem__(self, index: int | slice) -> SiteInfo | Sequence[SiteInfo]:
        return [*self.uniform, *self.modules][index]

    def __repr__(self) -> str:
        lines = [f"{self.model}: {len(self.uniform)} sites, {len(self.modules)} modules by path"]
        header = ("shape", "dtype", "bytes/token", "count")
        if self.uniform:
            lines += ["", *_table([("site", "taken at", *header), *_folded(self.uniform)])]
        if self.modules:  # taken where their names say
            folded = [(row[0], *row[2:]) for row in _folded(self.modules)]
            lines += ["", *_table([("module", *header), *folded])]
        advice = "Any module is a site: its path stands for its output, path:in for its input."
        return "\n".join([*lines, "", advice])


def describe(model: torch.nn.Module, points: Iterable[HookPoint]) -> list[SiteInfo]:
    """Say what each hook point holds for one token, without running the model.

    Parameters
    ----------
    model : torch.nn.Module
        The model that the hook points belong to.
    points : iterable of HookPoint
        As from `resolve`.

    Returns
    -------
    list of SiteInfo
        One per hook point, in their order.
    """
    decoders = named_decoders(model)
    uniform = {point.hook_point: point for point in hook_points(model).values() if _is_first_output(point)}
    infos = []
    for point in points:
        info = _info(point.of_value, model, decoders, uniform)
        infos.append(replace(info, site=point.site, hook_point=point.hook_point))
    return infos


def _is_first_output(point: HookPoint) -> bool:
    """Whether a site holds what its module's path stands for as well."""
    is_reshaped = point.is_pattern or point.split is not None
    return not is_reshaped and point.compute is None and point.index in (None, 0)


def _info(
    point: HookPoint, model: torch.nn.Module, decoders: Sequence[Decoder], uniform: dict[str, HookPoint]
) -> SiteInfo:
    module = model.get_submodule(point.module_path)
    known = point if point.is_uniform else uniform.get(point.hook_point)
    # The last one, but for what is inside another: an encoder.
    inside = [each for each in decoders if f"{point.module_path}.".startswith(f"{each.path}.")]
    decoder = next(iter([*inside, *reversed(decoders)]), None)
    if decoder is not None and known is not None:
        is_logits = known.site.rpartition(".")[2] == "logits"
        shape = _logits_shape(model, decoder) if is_logits else _uniform_shape(known, module, decoder)
        dtype = _uniform_dtype(known, decoder)
    elif decoder is not None and point.module_path.endswith("." + decoder.architecture.attn):
        shape, dtype = (decoder.config.hidden_size,), _dtype(decoder.module)
    else:
        shape, dtype = _module_shape(module, point.where), _dtype(module)
    is_fixed = shape is not None and dtype is not None and -1 not in shape
    return SiteInfo(
        site=point.site,
        module_path=point.module_path,
        hook_point=point.hook_point,
        shape=shape,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        bytes_per_token=math.prod(shape) * dtype.itemsize if is_fixed and shape and dtype else None,
    )


def _uniform_shape(point: HookPoint, module: torch.nn.Module, decoder: Decoder) -> tuple[int, ...] | None:
    """Shape of one token at a uniform site."""
    if isinstance(point.compute, TopK):
        return (point.compute.k,)
    if point.split is not None:
        return point.split.shape
    config = decoder.config
    match point.site.rpartition(".")[2]:
        case "attn_pattern":
            n_heads = getattr(config, f"{decoder.stack}_attention_heads", config.num_attention_heads)
            return (n_heads, -1)
        case "mlp_inner":
            return _module_shape(module, "in")
        case "router_logits":
            return tuple(module.get_parameter("weight").shape[:1])
        case "expert_weights" | "expert_ids":
            return (config.num_experts_per_tok,)
        case "expert_out":
            return (config.num_experts_per_tok, config.hidden_size)
        case "ssm_state":
            heads = (module.num_heads, module.head_dim) if hasattr(module, "num_heads") else None
            return (*(heads or (module.intermediate_size,)), module.ssm_state_size)
        case "embed":
            weight = getattr(decoder.module.get_submodule(decoder.architecture.embed), "weight", None)
            return (weight.shape[1],) if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None
    return (config.hidden_size,)


def _logits_shape(model: torch.nn.Module, decoder: Decoder) -> tuple[int, ...] | None:
    """Shape of one token's logits: what the head gives, which may be wider than the vocabulary."""
    if decoder.head is None or decoder.language_model is None:
        return None
    said = output_head(model.get_submodule(decoder.language_model))
    head = model.get_submodule(decoder.head) if said is None else said
    width = getattr(head, "out_features", None)  # a linear layer's, quantised or with an adapter as well
    return (width,) if isinstance(width, int) and width else None


def _uniform_dtype(point: HookPoint, decoder: Decoder) -> torch.dtype | None:
    """Element type at a uniform site."""
    kind = point.site.rpartition(".")[2]
    if kind in ("expert_ids", "top_ids"):
        return torch.int64
    kind = "logits" if kind == "top_values" else kind
    is_float32 = (
        kind in decoder.architecture.in_float32(decoder.config) and point.site != "blocks.0.resid_pre"
    )
    return torch.float32 if is_float32 else _dtype(decoder.module)


def _module_shape(module: torch.nn.Module, where: str) -> tuple[int, ...] | None:
    """Shape of one token at a module that says how wide it is."""
    if isinstance(module, torch.nn.Linear):
        width = module.in_features if where == "in" else module.out_features
        return (width,) if width else None  # a lazy layer learns its width in its first pass
    if isinstance(module, torch.nn.Embedding):
        return (module.embedding_dim,) if where == "out" else ()
    if isinstance(module, torch.nn.LayerNorm):
        return tuple(module.normalized_shape)
    if type(module).__name__ == "Conv1D" and isinstance(module.weight, torch.Tensor):
        # GPT-2's linear layer, which keeps its weight transposed.
        return (module.weight.shape[0 if where == "in" else 1],)
    return None


def _dtype(module: torch.nn.Module) -> torch.dtype | None:
    """The floating-point type of the first such weight (quantised weights are packed integers)."""
    return next((weight.dtype for weight in module.parameters() if weight.dtype.is_floating_point), None)


def _folded(infos: Sequence[SiteInfo]) -> list[tuple[str, ...]]:
    """Table rows, one for all layers that differ in nothing but their number."""
    rows = Counter(
        (
            re.sub(r"(?<=\.)\d+(?=\.|$)", "*", info.site),
            re.sub(r"(?<=\.)\d+(?=[.:]|$)", "*", info.hook_point),
            _shape_text(info.shape),
            info.dtype or "?",
            "?" if info.bytes_per_token is None else f"{info.bytes_per_token:,}",
        )
        for info in infos
    )
    return [(*row, str(count)) for row, count in rows.items()]


def _shape_text(shape: tuple[int, ...] | None) -> str:
    return "?" if shape is None else str(shape).replace("-1", "*")


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    n_left = len(widths) - 2  # the two numbers at the end stand to the right
    return [
        "  ".join(
            cell.ljust(width) if place < n_left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
