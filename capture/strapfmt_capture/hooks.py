"""Hooks: what happens inside the model's own thread, from the start of a forward pass to its end.

Every value is copied into the ring before the hook returns, in its own dtype, so that later in-place changes do not
reach it. A step begins when one of the row modules is entered and ends when that call is over, by a return or by an
exception.

- A site in the tokens' row space that fires twice in a step would give a row two values: a CaptureError. In a row space
  of its own every firing adds rows.
- A firing outside any step (a part of the model is called directly) is a CaptureError, but for the second forward pass
  that gradient checkpointing makes inside backward: the values of the first are kept, the repetition is ignored.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.errors import CaptureError, RingFullError
from strapfmt.schema import SiteSpec
from strapfmt_capture.drain import Drain, Events, Item, StepEnd, StepStart
from strapfmt_capture.eager import check_runs_eagerly, in_backward
from strapfmt_capture.hookpoints import HookPoint
from strapfmt_capture.inputs import named_arguments
from strapfmt_capture.placement import Layout, Placement, declare
from strapfmt_capture.ring import Ring, Slot
from strapfmt_capture.rows import RowTracker, Step
from strapfmt_capture.turn import Values

__all__ = ["Hooks", "OnFull", "Tap"]

OnFull = Literal["block", "drop", "raise"]

# A tensor is copied in pieces of this share of the ring, so that a long prefill needs no more memory than the ring.
_PIECE_SHARE = 8
# When a step begins and more than this share is in use, the ring counts as full: the rest is for the step itself.
_FULL_SHARE = 1 / 2
_REASON_CHARS = 500
_NO_KWARGS: dict[str, Any] = {}


@dataclass(slots=True, kw_only=True)
class Tap:
    """One site: where it is taken, what it holds, and what became of its rows.

    Attributes
    ----------
    point : HookPoint
    is_head : bool
        Whether it may leave out all but the last positions.
    layout : Layout or None
        None until it has fired.
    n_calls : int
        How often it has fired.
    expected, dropped : int
        Rows it has produced, and those not stored because the ring was full.
    """

    point: HookPoint
    is_head: bool
    layout: Layout | None = None
    n_calls: int = 0
    expected: int = 0
    dropped: int = 0
    last_step: int = -1


@dataclass(slots=True, kw_only=True)
class _OpenStep:
    """A forward pass under way; `whole` are the rows of a tensor that begins with the sizes of the `batch`."""

    step: Step
    batch: tuple[int, ...]
    whole: Placement
    frame: FrameType
    exception: BaseException | None
    is_dropped: bool
    chosen: npt.NDArray[np.int64] | None
    started_ns: int
    started_s: float
    dropped: dict[str, int] = field(default_factory=dict)
    index: dict[torch.device, torch.Tensor] = field(default_factory=dict)


class Hooks:
    """Copies what sites produce into a ring, step by step.

    Parameters
    ----------
    points : iterable of HookPoint
    heads : collection of str
        Paths of modules that may leave out all but the last positions.
    ring : Ring
    drain : Drain
        Asked at every step whether it has failed.
    tracker : RowTracker
    on_full : {"block", "drop", "raise"}
        What happens when the ring is full as a step begins. A step that has begun waits for space.
    codec, statistics
        Of every site.
    known : mapping of str to SiteSpec
        Sites that the dataset holds already.
    """

    def __init__(
        self,
        points: Iterable[HookPoint],
        *,
        heads: Iterable[str],
        ring: Ring[Item],
        drain: Drain,
        tracker: RowTracker,
        on_full: OnFull,
        codec: str,
        statistics: tuple[str, ...],
        known: Mapping[str, SiteSpec],
    ) -> None:
        at_head = set(heads)
        self.taps = [Tap(point=point, is_head=point.module_path in at_head) for point in points]
        self.devices: set[torch.device] = set()
        self.n_steps, self.n_dropped_steps, self.n_abandoned_steps, self.n_tokens = 0, 0, 0, 0
        self._ring, self._drain, self._tracker = ring, drain, tracker
        self._on_full, self._codec, self._statistics, self._known = on_full, codec, statistics, known
        self.process = os.getpid()
        self._open: _OpenStep | None = None
        self._thread = 0
        # A model that runs parts of itself in several threads fires sites in all of them.
        self._producing = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        # A copy of a hooked model takes its hooks along; they are these.
        return self

    @contextmanager
    def attached(self, model: torch.nn.Module, row_modules: Iterable[torch.nn.Module]) -> Iterator[None]:
        """Attach all hooks; they are gone on exit, whatever happened."""
        modules = list(row_modules)
        with ExitStack() as handles:
            for module in modules:
                handle = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                handles.callback(handle.remove)
            for tap in self.taps:
                module = model.get_submodule(tap.point.module_path)
                if tap.point.where == "in":
                    handle = module.register_forward_pre_hook(self._on_input(tap), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(self._on_output(tap))
                handles.callback(handle.remove)
            for module in modules:
                handle = module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
                handles.callback(handle.remove)
            yield

    def finish(self, error: BaseException | None) -> None:
        """End what is still open: a step that an interrupt has cut off, and what is known of rows since."""
        if self._open is not None:
            self._end(self._open, "abandoned", _reason(error))
        events = self._tracker.take_events()
        if events is not None:
            self._ring.publish(Events(columns=events))

    # Steps.

    def _enter(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_runs_eagerly()
        if in_backward():
            return
        if os.getpid() != self.process:
            raise CaptureError(
                "a process that was forked inside the capture runs the captured model, and nothing drains it there; "
                "run the model in the process that captures, or start the other one before"
            )
        # The frame of the call itself: as long as it is on the stack, that call is not over.
        frame = sys._getframe(1)
        if self._open is not None:
            if self._is_inside(frame):
                if self._open.chosen is None:
                    self._open.chosen = _chosen_positions(self._open.step, module, args, kwargs)
                return
            self._end(self._open, "abandoned", "interrupted")
        self._drain.check()
        is_full = self._on_full != "block" and self._ring.n_used > self._ring.n_bytes * _FULL_SHARE
        if is_full and self._on_full == "raise":
            raise RingFullError(
                f"the ring is full ({self._ring.n_used} of {self._ring.n_bytes} bytes wait to be written) and "
                'on_full="raise"; use "block" or "drop", a larger ring_bytes, fewer sites or a faster disk'
            )
        step = self._tracker.begin(module, args, kwargs)
        self._begin(step, frame, is_full, _chosen_positions(step, module, args, kwargs))

    def _is_inside(self, frame: FrameType | None) -> bool:
        """Whether a call lies inside that of the open step; raise if it comes from another thread."""
        assert self._open is not None
        if threading.get_ident() != self._thread:
            raise CaptureError(
                "two threads run the captured model at once, and rows cannot be told apart; give each thread its "
                "own copy of the model and its own capture with a rank of its own"
            )
        while frame is not None and frame is not self._open.frame:
            frame = frame.f_back
        return frame is not None

    def _begin(
        self, step: Step, frame: FrameType, is_dropped: bool, chosen: npt.NDArray[np.int64] | None
    ) -> None:
        if is_dropped:
            self.n_dropped_steps += 1
            if len(step.rows):
                step.tokens["dropped"] = np.ones(len(step.rows), bool)
        self.n_steps += 1
        self.n_tokens += len(step.rows)
        self._ring.publish(StepStart(step=step))
        self._thread = threading.get_ident()
        self._open = _OpenStep(
            step=step,
            batch=(step.n_sequences, step.n_query),
            whole=Placement(n_rows=len(step.rows), index=step.selected, rows=step.rows),
            frame=frame,
            exception=sys.exception(),
            is_dropped=is_dropped,
            chosen=chosen,
            started_ns=time.time_ns(),
            started_s=time.perf_counter(),
        )

    def _leave(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        open_step, caller = self._open, sys._getframe(1)
        # After an exception the hook is called one frame further out.
        if open_step is None or caller not in (open_step.frame, open_step.frame.f_back):
            return
        error = sys.exception()
        if error is not None and error is not open_step.exception:
            self._end(open_step, "abandoned", _reason(error))
        elif open_step.is_dropped:
            self._end(open_step, "dropped", "the ring was full")
        else:
            self._end(open_step, "complete", None)

    def _end(self, open_step: _OpenStep, status: str, reason: str | None) -> None:
        self.n_abandoned_steps += status == "abandoned"
        self._ring.publish(
            StepEnd(
                step=open_step.step,
                started_ns=open_step.started_ns,
                duration_s=time.perf_counter() - open_step.started_s,
                status=status,
                reason=reason,
                dropped=open_step.dropped,
            )
        )
        self._open = None

    # Sites.

    def _on_input(self, tap: Tap) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._fire(tap, args, kwargs, None)

        return hook

    def _on_output(self, tap: Tap) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._fire(tap, args, _NO_KWARGS, output)

        return hook

    def _fire(self, tap: Tap, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        check_runs_eagerly()
        open_step = self._open
        if open_step is None:
            if in_backward():
                return
            raise CaptureError(
                f"site {tap.point.site!r} at {tap.point.hook_point} fired outside a forward pass of the captured "
                "model; call that model itself (not its forward method, and not a part of it), or capture the part"
            )
        x = tap.point.read(args, kwargs, output)
        with self._producing:
            layout = tap.layout or self._declare(tap, x, open_step)
            is_whole = x.dtype is layout.dtype and x.shape == open_step.batch + layout.shape
            if is_whole and layout.ndim is None and (open_step.chosen is None or not layout.is_head):
                placed = open_step.whole
            else:
                placed = layout.place(x, open_step.step, open_step.chosen)
            if layout.ndim is None and tap.last_step == open_step.step.step:
                raise CaptureError(
                    f"site {tap.point.site!r} at {tap.point.hook_point} fired twice in one forward pass, which would "
                    "give its rows two values; capture a module that runs once, such as the ones around it"
                )
            call, tap.last_step = tap.n_calls, open_step.step.step
            tap.n_calls += 1
            tap.expected += placed.n_rows
            if open_step.is_dropped:
                tap.dropped += placed.n_rows
                name = layout.spec.name
                open_step.dropped[name] = open_step.dropped.get(name, 0) + placed.n_rows
            elif placed.n_rows:
                values = x.detach() if x.requires_grad else x
                parts = (
                    layout.parts(values, placed, open_step.step)
                    if layout.spec.is_ragged
                    else [(values, placed)]
                )
                for part, place in parts:
                    self._copy(layout, part, place, call, open_step)

    def _declare(self, tap: Tap, x: torch.Tensor, open_step: _OpenStep) -> Layout:
        tap.layout = declare(
            tap.point,
            x,
            open_step.step,
            is_head=tap.is_head,
            codec=self._codec,
            statistics=self._statistics,
            known=self._known.get(tap.point.site),
            chosen=open_step.chosen,
        )
        self.devices.add(x.device)
        self._ring.publish(tap.layout.spec)
        return tap.layout

    def _copy(
        self, layout: Layout, x: torch.Tensor, placed: Placement, call: int, open_step: _OpenStep
    ) -> None:
        shape = tuple(x.shape[x.ndim - len(layout.shape) :])
        row_bytes = math.prod(shape) * x.dtype.itemsize
        if row_bytes > self._ring.n_bytes:
            raise CaptureError(
                f"site {layout.spec.name!r} at {layout.where}: one row has {row_bytes} bytes, more than the whole ring "
                f"of {self._ring.n_bytes}; raise ring_bytes"
            )
        n_rows = max(self._ring.n_bytes // _PIECE_SHARE // row_bytes, 1)
        if placed.index is None and placed.n_rows <= n_rows:
            slot = self._ring.reserve(placed.n_rows * row_bytes)
            if slot is not None:
                self._ring.copy_in(slot.start, x)
                self._publish(layout, x, shape, placed, call, slot, slice(None))
            return
        index = None if placed.index is None else _index(placed.index, x.device, open_step)
        flat = x.reshape(-1, *shape)
        for start in range(0, placed.n_rows, n_rows):
            part = slice(start, min(start + n_rows, placed.n_rows))
            slot = self._ring.reserve((part.stop - start) * row_bytes)
            if slot is None:
                return
            _gather(flat, index, part, self._ring.view(slot.start, x.dtype, (part.stop - start, *shape)))
            self._publish(layout, x, shape, placed, call, slot, part)

    def _publish(
        self,
        layout: Layout,
        x: torch.Tensor,
        shape: tuple[int, ...],
        placed: Placement,
        call: int,
        slot: Slot,
        part: slice,
    ) -> None:
        start, stop, _ = part.indices(placed.n_rows)
        values = Values(
            spec=layout.spec,
            dtype=x.dtype,
            shape=shape,
            n_rows=stop - start,
            start=slot.start,
            rows=None if placed.rows is None else placed.rows[part],
            token_row=None if placed.token_row is None else placed.token_row[part],
            call=call,
        )
        self._ring.publish(values, slot)


def _gather(flat: torch.Tensor, index: torch.Tensor | None, part: slice, out: torch.Tensor) -> None:
    """Copy rows `part`, or those that the index names for it, into ring memory."""
    if index is None:
        out.copy_(flat[part])
    elif flat.device.type == "cpu":
        torch.index_select(flat, 0, index[part], out=out)
    else:
        out.copy_(flat.index_select(0, index[part]))


def _index(index: npt.NDArray[np.int64], device: torch.device, open_step: _OpenStep) -> torch.Tensor:
    """Return places as a tensor on `device`; those of the step's stored tokens are moved there once."""
    if index is not open_step.step.selected:
        return torch.from_numpy(index).to(device)
    if device not in open_step.index:
        open_step.index[device] = torch.from_numpy(index).to(device)
    return open_step.index[device]


def _chosen_positions(
    step: Step, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> npt.NDArray[np.int64] | None:
    """Return the positions at which the head is told to compute, None if it computes all or the last ones."""
    chosen = named_arguments(module, args, kwargs).get("logits_to_keep")
    if not isinstance(chosen, torch.Tensor) or not step.is_language:
        return None
    try:
        positions: npt.NDArray[np.int64] = np.arange(step.n_query)[chosen.cpu().numpy()].reshape(-1)
    except IndexError:  # the model is about to say so itself
        return None
    return positions


def _reason(error: BaseException | None) -> str:
    return "interrupted" if error is None else f"{type(error).__name__}: {error}"[:_REASON_CHARS]
