"""Storing what sites give: which rows of it are wanted, under which layout, and into which ring they go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.errors import CaptureError
from strapfmt.schema import SiteSpec
from strapfmt_capture.calls import OpenStep
from strapfmt_capture.cuts import Cut, cuts_of, sent
from strapfmt_capture.eager import has_values
from strapfmt_capture.gradients import Awaited
from strapfmt_capture.pass_sizes import PassSizes
from strapfmt_capture.placement import Layout, Placement, check_known, declare
from strapfmt_capture.ring import Ring, Slot
from strapfmt_capture.rings import Rings
from strapfmt_capture.selection import Selector
from strapfmt_capture.taps import Tap
from strapfmt_capture.turn import Values

__all__ = ["Store"]

# A tensor is copied in pieces of this share of the ring, so that a long prefill needs no more memory than the ring.
_PIECE_SHARE = 8
_NOTHING = Placement(n_rows=0, index=None)


class Store:
    """Copies values into the rings, in pieces where they are large, and counts rows on their taps.

    Parameters
    ----------
    rings : Rings
    selector : Selector or None
        Chooses what is stored of each step; None: all.
    codec, statistics
        Of every site.
    known : mapping of str to SiteSpec
        Sites that the dataset holds already.

    Attributes
    ----------
    devices : set of torch.device
        Where values have been found.
    sizes : PassSizes
        Of the sites that have fired.
    """

    def __init__(
        self,
        rings: Rings,
        *,
        selector: Selector | None,
        codec: str,
        statistics: tuple[str, ...],
        known: Mapping[str, SiteSpec],
    ) -> None:
        self.devices: set[torch.device] = set()
        self.sizes = PassSizes()
        self._rings, self._selector = rings, selector
        self._codec, self._statistics, self._known = codec, statistics, known

    def take(self, tap: Tap, x: torch.Tensor, open_step: OpenStep) -> Awaited | None:
        """Store `x`, what the site gave in a step, however it came here.

        Returns
        -------
        Awaited or None
            Where a gradient of it belongs; None if nothing of it is stored, in this step or at all.
        """
        if tap.point.is_flat:
            x = _unflattened(x, open_step)
        chosen = _last(open_step) if tap.point.is_last else open_step.chosen
        layout = tap.layout or self._declare(tap, x, chosen, open_step)
        x = layout.shaped(x)
        is_whole = x.dtype is layout.dtype and x.shape == open_step.batch + layout.shape
        if is_whole and layout.ndim is None and (chosen is None or not layout.is_head):
            placed = open_step.whole
        else:
            placed = layout.place(x, open_step.step, chosen)
        if self._selector is not None:
            placed = self._wanted(self._selector, tap, placed, open_step)
        call, cuts = self._store(tap, layout, x, placed, open_step)
        if not placed.n_rows or tap.gradient is None:
            return None
        return Awaited(layout=layout, placed=placed, cuts=cuts, call=call, step=open_step)

    def _wanted(self, selector: Selector, tap: Tap, placed: Placement, open_step: OpenStep) -> Placement:
        """Return what is to be stored of a firing, and count the rest."""
        stored = open_step.stored
        if stored is None:
            wanted = _NOTHING
        elif placed.rows is None:
            wanted = selector.own(placed, tap.expected - tap.dropped)
        else:
            is_whole = placed.rows is open_step.whole.rows
            wanted = stored if is_whole else placed.among(stored.rows)
        for each in (tap, tap.gradient):
            if each is not None:
                each.filtered += placed.n_rows - wanted.n_rows
        return wanted

    def _store(
        self, tap: Tap, layout: Layout, x: torch.Tensor, placed: Placement, open_step: OpenStep
    ) -> tuple[int, Sequence[Cut] | None]:
        """Store rows, and return the number of the call and how its value was cut."""
        cuts: Sequence[Cut] | None = None
        if layout.ndim is None and tap.last_step == open_step.step.step:
            raise CaptureError(
                f"site {tap.point.site!r} at {tap.point.hook_point} fired twice in one forward pass, which would "
                "give its rows two values; capture a module that runs once, such as the ones around it"
            )
        call, tap.last_step = tap.n_calls, open_step.step.step
        tap.n_calls += 1
        tap.expected += placed.n_rows
        if open_step.is_dropped:
            _drop(tap, layout.spec.name, placed.n_rows, open_step.dropped)
        elif placed.n_rows:
            values = x.detach() if x.requires_grad else x
            cuts = cuts_of(values, placed, open_step.step, open_step.cuts) if layout.spec.is_ragged else None
            self._copy_cut(layout, values, placed, cuts, call, open_step)
        return call, cuts

    def _copy_cut(
        self,
        layout: Layout,
        x: torch.Tensor,
        placed: Placement,
        cuts: Sequence[Cut] | None,
        call: int,
        open_step: OpenStep,
    ) -> None:
        if cuts is None:
            self._copy(layout, x, placed, call, open_step)
            return
        for cut in cuts:
            self._copy(layout, cut.of(x), cut.placed, call, open_step)

    def store_gradient(self, tap: Tap, awaited: Awaited, gradient: torch.Tensor) -> None:
        """Store the gradient of a value, at the value's rows."""
        layout, placed = tap.layout or self._declare_gradient(tap, awaited.layout), awaited.placed
        if not has_values(gradient) or gradient.dtype is not layout.dtype:
            raise CaptureError(
                f"site {tap.point.site!r} at {tap.point.hook_point}: expected a plain dense gradient of "
                f"{layout.dtype}, as the value is, found a {type(gradient).__name__} ({gradient.layout}, "
                f"{gradient.dtype}); leave the site out"
            )
        x = tap.point.shaped(gradient.detach())
        x = layout.shaped(_unflattened(x, awaited.step) if tap.point.is_flat else x)
        tap.n_calls += 1
        tap.expected += placed.n_rows
        self._copy_cut(layout, x, placed, awaited.cuts, awaited.call, awaited.step)

    def drop_gradient(self, tap: Tap, awaited: Awaited) -> None:
        """Count a gradient that is not stored, as its value was not."""
        layout = tap.layout or self._declare_gradient(tap, awaited.layout)
        tap.n_calls += 1
        tap.expected += awaited.placed.n_rows
        _drop(tap, layout.spec.name, awaited.placed.n_rows, awaited.step.dropped)

    def _declare_gradient(self, tap: Tap, value: Layout) -> Layout:
        point = tap.point
        spec = replace(value.spec, name=point.site, hook_point=point.hook_point)
        check_known(self._known.get(point.site), spec)
        tap.layout = replace(value, spec=spec, where=point.hook_point)
        self._rings.publish(spec)
        self.sizes.add(spec, is_head=tap.is_head, is_last=point.is_last, in_encoder=tap.in_encoder)
        return tap.layout

    def _declare(
        self, tap: Tap, x: torch.Tensor, chosen: npt.NDArray[np.int64] | None, open_step: OpenStep
    ) -> Layout:
        layout = declare(
            tap.point,
            x,
            open_step.step,
            is_head=tap.is_head,
            codec=self._codec,
            statistics=self._statistics,
            known=self._known.get(tap.point.site),
            chosen=chosen,
            channels=tap.channels,
        )
        if self._selector is not None and layout.ndim is not None:
            self._selector.selection.check_own(tap.point.site, tap.point.hook_point)
        self._rings.publish(layout.spec)  # first: an interrupt between the two only makes it known twice
        tap.layout = layout
        self.sizes.add(layout.spec, is_head=tap.is_head, is_last=tap.point.is_last, in_encoder=tap.in_encoder)
        self.devices.add(x.device)
        return layout

    def _copy(
        self, layout: Layout, x: torch.Tensor, placed: Placement, call: int, open_step: OpenStep
    ) -> None:
        shape = tuple(x.shape[x.ndim - len(layout.shape) :])
        row_bytes = math.prod(shape) * x.dtype.itemsize
        ring, most = self._rings.of(x.device), self._rings.most_bytes
        if row_bytes > most:
            raise CaptureError(
                f"site {layout.spec.name!r} at {layout.where}: one row has {row_bytes} bytes, more than the whole ring "
                f"of {most}; raise host_ring_bytes, and gpu_ring_bytes if the model is on a GPU"
            )
        n_rows = max(most // _PIECE_SHARE // row_bytes, 1)
        if placed.index is None and placed.n_rows <= n_rows:
            slot = ring.reserve(placed.n_rows * row_bytes)
            if slot is not None:
                ring.copy_in(slot.start, x)
                self._publish(layout, x, shape, placed, call, ring, slot, slice(None))
            return
        index = None if placed.index is None else _index(placed.index, x.device, open_step)
        flat = x.reshape(-1, *shape)
        for start in range(0, placed.n_rows, n_rows):
            part = slice(start, min(start + n_rows, placed.n_rows))
            slot = ring.reserve((part.stop - start) * row_bytes)
            if slot is None:
                return
            _gather(flat, index, part, ring.view(slot.start, x.dtype, (part.stop - start, *shape)))
            self._publish(layout, x, shape, placed, call, ring, slot, part)

    def _publish(
        self,
        layout: Layout,
        x: torch.Tensor,
        shape: tuple[int, ...],
        placed: Placement,
        call: int,
        ring: Ring[Any],
        slot: Slot,
        part: slice,
    ) -> None:
        start, stop, _ = part.indices(placed.n_rows)
        values = Values(
            spec=layout.spec,
            dtype=x.dtype,
            shape=shape,
            n_rows=stop - start,
            memory=ring.memory,
            start=slot.start,
            rows=None if placed.rows is None else placed.rows[part],
            token_row=None if placed.token_row is None else placed.token_row[part],
            call=call,
        )
        self._rings.put(ring, values, slot)


def _drop(tap: Tap, site: str, n_rows: int, dropped: dict[str, int]) -> None:
    """Count rows as dropped, on the tap and in the step: without a call in between, where an interrupt might come."""
    n_in_step = dropped.get(site, 0) + n_rows
    tap.dropped, dropped[site] = tap.dropped + n_rows, n_in_step


def _unflattened(x: torch.Tensor, open_step: OpenStep) -> torch.Tensor:
    """Return `[n_sequences * n_query, *]` as `[n_sequences, n_query, *]`; what is not that stays as it is."""
    is_of_tokens = open_step.step.is_language and x.shape[:1] == (math.prod(open_step.batch),)
    return x.reshape(*open_step.batch, *x.shape[1:]) if is_of_tokens else x


def _last(open_step: OpenStep) -> npt.NDArray[np.int64] | None:
    """Return the last position of the pass; None if it has no other."""
    step = open_step.step
    return np.array([step.n_query - 1]) if step.is_language and step.n_query > 1 else None


def _gather(flat: torch.Tensor, index: torch.Tensor | None, part: slice, out: torch.Tensor) -> None:
    """Copy rows `part`, or those that the index names for it, into ring memory."""
    if index is None:
        out.copy_(flat[part])
    elif flat.device == out.device:
        torch.index_select(flat, 0, index[part], out=out)
    else:
        out.copy_(flat.index_select(0, index[part]))


def _index(index: npt.NDArray[np.int64], device: torch.device, open_step: OpenStep) -> torch.Tensor:
    """Return places as a tensor on `device`; those of the step's wanted tokens are moved there once."""
    if open_step.stored is None or index is not open_step.stored.index:
        return sent(index, device)
    if device not in open_step.index:
        open_step.index[device] = sent(index, device)
    return open_step.index[device]
