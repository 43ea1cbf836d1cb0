"""Sites of a model: the names a person asks for, the hook points they stand for, and what each of them holds.

A pattern is a site name (`blocks.3.resid_post`) or a module path (`model.layers.3.mlp`, its output, or
`model.layers.3.mlp:in`, its input), and may hold wildcards: `*`, `?` and `[012]` stay within one dotted segment,
so that `blocks.*.resid_post` and `model.layers.*` are exactly the layers; `**` stands for any number of segments.
A pattern that matches a site name is not tried as a module path. One that ends in nothing but a wildcard (`blocks.0.*`)
leaves out the sites for which a part of the model is computed once more, `blocks.*.expert_out` names them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from strapfmt.errors import ArgumentError, CaptureError, SiteNotFoundError
from strapfmt_capture.arguments import check_model
from strapfmt_capture.attention import check_watchable
from strapfmt_capture.compiled import named_originals, original
from strapfmt_capture.decoders import find_decoder, find_decoders, named_decoders
from strapfmt_capture.encoders import stacks_of
from strapfmt_capture.hookpoints import (
    EAGER_ADVICE,
    TOP_SITES,
    HookPoint,
    hook_points,
)
from strapfmt_capture.listing import SiteInfo, SiteListing, describe
from strapfmt_capture.wrappers import hidden_models, lens_paths, unwrapped

__all__ = [
    "HookPoint",
    "SiteInfo",
    "SiteListing",
    "as_patterns",
    "describe",
    "hook_points",
    "list_sites",
    "matching",
    "remarks",
    "resolve",
    "row_modules",
]


def resolve(
    model: torch.nn.Module,
    patterns: str | Iterable[str],
    *,
    top_k_logits: int | None = None,
    recompute_patterns: bool = False,
) -> list[HookPoint]:
    """Find the hook points that `patterns` ask for; nothing is attached to the model.

    Parameters
    ----------
    model : torch.nn.Module
        Any module.
    patterns : str or iterable of str
        Site names and module paths, see the module's documentation.
    top_k_logits : int, optional
        `logits` then stands for `logits.top_values` and `logits.top_ids`, of so many tokens.
    recompute_patterns : bool
        Recompute attention patterns that the model does not compute.

    Returns
    -------
    list of HookPoint
        Without duplicates: uniform sites in the order a forward pass reaches them, then module paths in the
        model's own order.

    Raises
    ------
    SiteNotFoundError
        If a pattern matches nothing; it names near misses.
    CaptureError
        If only attention patterns are asked for and the model does not compute any; a wider pattern
        (`blocks.0.*`) leaves them out instead. Also if patterns are to be recomputed, are asked for, and cannot be.
    ArgumentError
        If there are no patterns, or `top_k_logits` does not go with them.
    """
    wanted = as_patterns(patterns)
    uniform = hook_points(model, top_k_logits=top_k_logits, recompute_patterns=recompute_patterns)
    paths = [path for path in named_originals(model) if path]
    paths += lens_paths(model, (pattern.partition(":")[0] for pattern in wanted))
    found: dict[str, HookPoint] = {}
    for pattern in wanted:
        for point in _match(model, pattern, uniform, paths):
            found[point.site] = point
    if top_k_logits is not None:
        found = _largest_only(found, uniform)
    for point in found.values():
        if point.where == "attention":
            check_watchable(model.get_submodule(point.module_path))
    order = {site: number for number, site in enumerate(uniform)}
    place = {path: number for number, path in enumerate(paths, len(order))}
    return sorted(found.values(), key=lambda point: order.get(point.site, place.get(point.module_path, -1)))


def as_patterns(patterns: str | Iterable[str]) -> list[str]:
    """Return what a person asks for as a list.

    Raises
    ------
    ArgumentError
        If it is no text, or nothing.
    """
    if not isinstance(patterns, Iterable):
        raise ArgumentError(f'sites: expected names such as "blocks.*.resid_post", got {patterns!r}')
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    if strange := [each for each in wanted if not isinstance(each, str)]:
        raise ArgumentError(f'sites: expected names such as "blocks.*.resid_post", got {strange[0]!r}')
    if not wanted:
        raise ArgumentError('sites: expected at least one name, for example "blocks.*.resid_post"; got none')
    return wanted


def remarks(
    model: torch.nn.Module, patterns: str | Iterable[str], *, recompute_patterns: bool = False
) -> list[str]:
    """Say what `patterns`, as `resolve` reads them, leave out that a person may expect, or add."""
    uniform = hook_points(model, recompute_patterns=recompute_patterns)
    matches = [(pattern, site) for pattern in as_patterns(patterns) for site in matching(pattern, uniform)]
    asked = {site for pattern, site in matches if not _is_passed_over(pattern, uniform[site])}
    decoders = list(find_decoders(model))
    said = []
    left_out = [site for _, site in matches if site not in asked]
    if kinds := sorted({site.rpartition(".")[2] for site in left_out}):
        first = next(site for site in left_out if site.endswith(f".{kinds[0]}"))
        stack = first.partition("blocks.")[0]
        said.append(
            f"{', '.join(kinds)} left out, which cost{'s' if len(kinds) == 1 else ''} a part of the model once more: "
            f'ask for "{stack}blocks.*.{kinds[0]}" as well'
        )
    if asked and decoders and not decoders[0].is_eager and any(uniform[site].is_pattern for site in asked):
        if recompute_patterns:
            said.append(
                f"attention patterns were computed from queries, keys and masks, as {decoders[0].attention!r} "
                "makes none"
            )
        else:
            said.append(f"attention patterns were left out: {EAGER_ADVICE}; found {decoders[0].attention!r}")
    named = [decoder.path for decoder in named_decoders(model)]
    others = [decoder.path for decoder in decoders if decoder.path not in named]
    if asked and others:
        said.append(
            f"the model holds {len(decoders)} decoders, and names such as blocks.N mean the first, at "
            f"{decoders[0].path!r}; ask for modules of {', '.join(map(repr, others))} by their paths"
        )
    return said


def list_sites(model: Any) -> SiteListing:
    """List what can be captured from `model`, a module or an nnsight model, with shapes and sizes, without running it.

    Returns
    -------
    SiteListing
        A sequence of `SiteInfo`: the uniform sites, then the output of every module under its own path. It
        prints as a table with the layers folded into one line.

    Raises
    ------
    ArgumentError
        If `model` is no module.
    """
    model = unwrapped(model)
    check_model(model)
    model = original(model)
    decoder = find_decoder(model)
    uniform = list(hook_points(model).values())
    if decoder is not None and not decoder.is_eager:
        uniform = [point for point in uniform if not point.is_pattern]
    modules = [
        HookPoint(site=path, module_path=path, where="out")
        for path, module in named_originals(model).items()
        if path and not isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict))
    ]
    return SiteListing(type(model).__name__, describe(model, uniform), describe(model, modules))


def row_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules whose call may begin a step: `model`, and every language model inside it.

    A person may call the base model directly, and `generate` of a wrapper (PEFT) enters the model it wraps.
    Whichever is entered first begins the step; those inside it do not. In an encoder-decoder model, encoder and decoder
    are such modules whatever they are given.

    Raises
    ------
    CaptureError
        For an encoder-decoder model that does not tell which of its modules is the encoder.
    """
    stacks, hidden = stacks_of(model), hidden_models(model)
    for each in hidden:
        if stacks_of(each).encoders:
            raise CaptureError(
                f"{type(model).__name__} calls an encoder-decoder model, whose two streams of tokens cannot be told "
                "apart from outside; capture that model itself: its original_model"
            )
    whole = [model, *hidden]
    inside = [m for each in whole for m in each.modules() if m is not model and _is_language_model(m)]
    return list(dict.fromkeys([*whole, *stacks.encoders, *stacks.decoders, *inside]))


def _match(
    model: torch.nn.Module, pattern: str, uniform: Mapping[str, HookPoint], paths: Sequence[str]
) -> list[HookPoint]:
    """Hook points of one pattern."""
    sites = matching(pattern, uniform)
    if sites:
        sites = [site for site in sites if not _is_passed_over(pattern, uniform[site])]
        return [uniform[site] for site in _without_patterns(model, pattern, sites, uniform)]
    path_pattern, _, where = pattern.partition(":")
    matches = matching(path_pattern, paths) if where in ("", "in", "out") else []
    if not matches and pattern in TOP_SITES:
        raise ArgumentError(
            f"sites: {pattern!r} exists only with top_k_logits, which says how many; got none"
        )
    if not matches:
        raise _not_found(model, pattern, uniform, paths)
    suffix = ":in" if where == "in" else ""
    kwarg = "hidden_states" if where == "in" else None
    return [
        HookPoint(site=path + suffix, module_path=path, where=where or "out", kwarg=kwarg) for path in matches
    ]


def _is_passed_over(pattern: str, point: HookPoint) -> bool:
    """Whether a site is too costly to be meant by a pattern that does not name its kind."""
    return point.is_costly and not pattern.rpartition(".")[2].strip("*?")


def _largest_only(found: dict[str, HookPoint], uniform: Mapping[str, HookPoint]) -> dict[str, HookPoint]:
    """Take the largest logits where logits are asked for."""
    if found.pop("logits", None) is not None:
        found |= {site: uniform[site] for site in TOP_SITES}
    if not any(site in found for site in TOP_SITES):
        raise ArgumentError(
            "top_k_logits: expected 'logits' among the sites, whose largest it keeps; got none"
        )
    return found


def _without_patterns(
    model: torch.nn.Module, pattern: str, sites: list[str], uniform: Mapping[str, HookPoint]
) -> list[str]:
    """Leave out attention patterns that the model does not compute; complain if there is nothing else."""
    decoder = find_decoder(model)
    if decoder is None or decoder.is_eager:
        return sites
    kept = [site for site in sites if not uniform[site].is_pattern or uniform[site].where == "attention"]
    if not kept:
        raise CaptureError(
            f"site {pattern!r}: {EAGER_ADVICE}, or call model.set_attn_implementation('eager'); "
            f"found {decoder.attention!r}"
        )
    return kept


def _not_found(
    model: torch.nn.Module, pattern: str, uniform: Mapping[str, HookPoint], paths: Sequence[str]
) -> SiteNotFoundError:
    if inside := matching(f"{pattern}.*", uniform):  # a block, which holds sites and is none
        places = dict.fromkeys(site.rpartition(".")[2] for site in inside)
        wider = [f"{pattern}.{place}" for place in ("*", *places)]
        near = [name for name in wider if name.endswith((".*", ".resid_post", ".mlp_out"))]
        return SiteNotFoundError(pattern, wider, where=type(model).__name__, near=near)
    if uniform:
        return SiteNotFoundError(pattern, [*uniform, *paths], where=type(model).__name__)
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    why = f"architecture {model_type!r} is unknown: " if model_type else ""
    return SiteNotFoundError(
        pattern, paths, where=f"{type(model).__name__} ({why}its sites are its module paths)"
    )


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a pattern, as the module's documentation says, stands for."""
    if not any(character in pattern for character in "*?["):
        return [pattern] if pattern in names else []
    segments = pattern.split(".")
    return [name for name in names if _match_segments(segments, name.split("."))]


def _match_segments(pattern: list[str], name: list[str]) -> bool:
    if not pattern or not name:
        return all(segment == "**" for segment in pattern) and not name
    if pattern[0] == "**":
        return _match_segments(pattern[1:], name) or _match_segments(pattern, name[1:])
    return fnmatchcase(name[0], pattern[0]) and _match_segments(pattern[1:], name[1:])


def _is_language_model(module: torch.nn.Module) -> bool:
    """Whether this looks like a Hugging Face model that takes token ids."""
    if not hasattr(module, "config") or not callable(getattr(module, "get_input_embeddings", None)):
        return False
    return "input_ids" in inspect.signature(module.forward).parameters
