"""Channels: which elements of the last dimension of a site are stored, taken out before anything is copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from strapfmt.errors import ArgumentError, CaptureError
from strapfmt_capture.arguments import as_index, index_facts
from strapfmt_capture.hookpoints import HookPoint
from strapfmt_capture.listing import SiteInfo
from strapfmt_capture.sites import matching

__all__ = ["Channels", "channels_of", "facts_of"]


class Channels:
    """Some elements of the last dimension, which stays the last; numbers keep the order in which they were given.

    Parameters
    ----------
    index : slice or tuple of int
        As `as_index` gives it.
    """

    def __init__(self, index: slice | tuple[int, ...]) -> None:
        self._index = index
        self._width, self._where = 0, ""
        self._on: dict[torch.device, torch.Tensor] = {}

    @property
    def facts(self) -> dict[str, int | None] | list[int]:
        """What was asked for, JSON-ready."""
        return index_facts(self._index)

    def shape(self, shape: tuple[int, ...], where: str) -> tuple[int, ...]:
        """Return the shape that is left of that of a row, whose last dimension is from now on expected.

        Raises
        ------
        CaptureError
            If it does not have the channels, or one is meant twice.
        """
        self._width, self._where = shape[-1] if shape else 0, where
        if (problem := self.problem(shape)) is not None:
            raise CaptureError(f"{where}: channels: {problem}")
        return (*shape[:-1], len(self._numbers(self._width)))

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """Say why rows of a shape do not have the channels; None if they do."""
        width = shape[-1] if shape else 0
        numbers = self._numbers(width)
        if numbers and min(numbers) >= 0 and max(numbers) < width and len(set(numbers)) == len(numbers):
            return None
        return (
            f"expected some of the {width} elements of the last dimension of a row, {list(shape)}, each once; got "
            f"{self._index if isinstance(self._index, slice) else list(self._index)}"
        )

    def listed(self, info: SiteInfo) -> SiteInfo:
        """Return what a listing says of a site, for these channels; unchanged where its shape is not known."""
        if not info.shape or info.bytes_per_token is None:
            return info
        shape = (*info.shape[:-1], len(self._numbers(info.shape[-1])))
        n_bytes = info.bytes_per_token // info.shape[-1] * shape[-1]
        return replace(info, shape=shape, bytes_per_token=n_bytes)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the channels of `x`: a view for a slice, else a copy.

        Raises
        ------
        CaptureError
            If the last dimension is not the one that `shape` was told.
        """
        if not x.ndim or x.shape[-1] != self._width:
            raise CaptureError(
                f"{self._where}: expected {self._width} elements in the last dimension, of which channels= takes some, "
                f"as at its first call; found {list(x.shape)}; leave the site out"
            )
        if isinstance(self._index, slice):
            return x[..., self._index]
        if x.device not in self._on:
            self._on[x.device] = torch.tensor(self._numbers(self._width), device=x.device)
        return x.index_select(-1, self._on[x.device])

    def _numbers(self, width: int) -> list[int]:
        if isinstance(self._index, slice):
            return list(range(width))[self._index]
        return [each + width if each < 0 else each for each in self._index]


def facts_of(channels: Mapping[str, Channels]) -> dict[str, Any]:
    """Return what was asked for at each site, JSON-ready."""
    return {site: each.facts for site, each in channels.items()}


def channels_of(value: Any, points: Iterable[HookPoint]) -> dict[str, Channels]:
    """Return the channels of each site of which not all are stored.

    Parameters
    ----------
    value : slice, ints, mapping of str to either, or None
        What `capture` was given: for every site, or by names with wildcards, the first that matches.
    points : iterable of HookPoint
        The sites.

    Raises
    ------
    ArgumentError
        If a name matches no site, or a site's last dimension grows with the context.
    """
    if value is None:
        return {}
    named = {point.site: point for point in points}
    found: dict[str, Channels] = {}
    for pattern, chosen in value.items() if isinstance(value, Mapping) else [("**", value)]:
        index = as_index("channels", chosen)
        if isinstance(index, tuple) and len(set(index)) < len(index):
            raise ArgumentError(f"channels: expected each once, got {list(index)}")
        sites = matching(pattern, named) if isinstance(pattern, str) else []
        if not sites:
            raise ArgumentError(
                f"channels: expected names of sites of this capture ({', '.join(list(named)[:8])}), got {pattern!r}"
            )
        for site in sites:
            if named[site].heads_first:
                raise ArgumentError(
                    f"channels: site {site!r} has as many elements as there are keys, of which none can be chosen; "
                    "name the sites that are meant: channels={'blocks.*.resid_post': ...}"
                )
            found.setdefault(site, Channels(index))
    return found
