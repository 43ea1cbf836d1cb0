"""Steps: when a forward pass begins and ends, and which tokens it is about.

A pass is the outermost call of a row module (the model, or a language model in it that holds a site). Its tokens are
those of the innermost such language model entered before the first site fires, as that is what computes: a wrapper may
take others (it shifts them, or puts soft prompts before them), or take them under a name of its own. A wrapper that
calls its model again after that has returned makes another step; so does an encoder-decoder model, whose decoder
follows its encoder.

A step begins with the first site that fires, or when the call is over, by a return or by an exception.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch

from strapfmt.errors import CaptureError, CompiledModelError, DiskSpaceError, RingFullError
from strapfmt_capture.calls import Call, Counts, OpenStep, call_of, is_on_stack, kept_of
from strapfmt_capture.compiled import resumed
from strapfmt_capture.drain_home import DrainHome
from strapfmt_capture.dropped import INTERRUPTED, RING_FULL
from strapfmt_capture.eager import is_repetition
from strapfmt_capture.inputs import named_arguments, read_inputs
from strapfmt_capture.items import Boundary, Events, StepEnd, StepStart
from strapfmt_capture.pass_sizes import PassSizes
from strapfmt_capture.passes import Step
from strapfmt_capture.placement import Placement
from strapfmt_capture.rings import FULL_SHARE, Rings
from strapfmt_capture.rows import RowTracker
from strapfmt_capture.selection import Selector

__all__ = ["OnFull", "Steps"]

OnFull = Literal["block", "drop", "raise", "spill"]

_REASON_CHARS = 500


class Steps:
    """Follows the calls of row modules, and begins and ends a step for each pass.

    Parameters
    ----------
    rings : Rings
    drain : DrainHome
        Asked at every step whether it has failed.
    tracker : RowTracker
    sizes : PassSizes
        Tells what a pass will store.
    on_full : {"block", "drop", "raise", "spill"}
        What happens when the ring is full as a step begins. A step that has begun waits for space.
    on_complete : callable
        Called with each step that has ended well.
    selector : Selector, optional
        Chooses what is stored of each step; None: all.

    Attributes
    ----------
    process : int
        The one in which passes are recorded.
    counts : Counts
        Of the steps that have begun.
    n_paused_passes : int
    is_paused : bool
        Whether passes are counted only.
    under_way : OpenStep or None
        The step that is open, if one is.
    """

    def __init__(
        self,
        *,
        rings: Rings,
        drain: DrainHome,
        tracker: RowTracker,
        sizes: PassSizes,
        on_full: OnFull,
        on_complete: Callable[[OpenStep], None],
        selector: Selector | None = None,
    ) -> None:
        self.process = os.getpid()
        self.counts, self.n_paused_passes, self.is_paused = Counts(), 0, False
        self._rings, self._drain, self._tracker, self._sizes = rings, drain, tracker, sizes
        self._on_full, self._on_complete, self._selector = on_full, on_complete, selector
        self._call: Call | None = None
        self.under_way: OpenStep | None = None
        #: The outermost call under way while paused.
        self._passed_by: FrameType | None = None
        #: Whether the open step began where a graph was cut for it, and so ends in the same way.
        self.ends_in_graph = False
        self._thread = 0

    @property
    def has_begun(self) -> bool:
        """Whether a step is open, so that rows are known."""
        return self.under_way is not None

    def enter(
        self,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType,
        *,
        cuts_graph: bool = False,
    ) -> None:
        """Take note that a row module is called: as long as `frame` is on the stack, that call is not over.

        `cuts_graph` says that this runs in the middle of compiled code, which is cut for it.
        """
        if is_repetition():
            return
        if os.getpid() != self.process:
            raise CaptureError(
                "a process that was forked inside the capture runs the captured model, and nothing drains it there; "
                "run the model in the process that captures, or start the other one before"
            )
        if self.is_paused:
            self._pass_by(frame)
            return
        call = self._call
        if call is not None:
            if self._is_inside(call, frame):
                self._enter_inside(call, module, args, kwargs, frame)
                return
            self._end(call, "abandoned", INTERRUPTED)
        self._thread = threading.get_ident()
        self._call = call_of(module, args, kwargs, frame, frame, sys.exception())
        self.ends_in_graph = cuts_graph

    def leave(self, output: Any, frame: FrameType) -> None:
        """Take note that a call of a row module is over: the one whose frame this is, or the rest of it."""
        call, frame = self._call, resumed(frame)
        if self._passed_by is not None and frame in (self._passed_by, self._passed_by.f_back):
            self._passed_by = None
        if call is None:
            return
        if frame is call.model_frame and output is not None:
            call.output = output
            if self.under_way is not None:
                self._tracker.returned(output)
        # After an exception the hook is called one frame further out.
        if frame not in (call.frame, call.frame.f_back):
            return
        error = sys.exception()
        if error is None or error is call.exception:
            self._end_well(call)
            return
        if self.under_way is None:
            with suppress(CaptureError):  # the model's own error is on its way
                self._begin(call)
        self._end(call, "abandoned", _reason(error))

    def current(self) -> OpenStep | None:
        """Return the step under way, which begins now if it has not; None outside of any pass."""
        call = self._call
        return None if call is None else self.under_way or self._begin(call)

    @property
    def number(self) -> int:
        """The step under way, else the next one."""
        open_step = self.under_way
        return self._tracker.next_step if open_step is None else open_step.step.step

    def settle(self, what: str) -> None:
        """Make sure that no pass is under way; end one that an interrupt has cut off.

        Raises
        ------
        CaptureError
            If `what` was called inside a pass.
        """
        frame, call = sys._getframe(1), self._call
        if call is not None and (threading.get_ident() != self._thread or is_on_stack(call.frame, frame)):
            raise CaptureError(f"{what} was called inside a forward pass; call it between passes")
        if self._passed_by is not None and is_on_stack(self._passed_by, frame):
            raise CaptureError(f"{what} was called inside a forward pass; call it between passes")
        self._passed_by = None
        if call is not None:
            self._end(call, "abandoned", INTERRUPTED)

    def pause(self) -> None:
        """Count passes from here on, and do nothing else with them."""
        self.settle("pause()")
        self._tracker.pass_by()
        self.is_paused = True

    def resume(self) -> None:
        """Record passes again."""
        self.settle("resume()")
        self.is_paused = False

    def end_block(self, error: BaseException | None) -> None:
        """End a block of passes that are committed together."""
        if self._call is not None:
            self._end(self._call, "abandoned", _reason(error))
        events = self._tracker.end_block(None if error is None else _reason(error))
        if events is not None:
            self._rings.publish(Events(columns=events))
        self._tracker.keys.leave_block()
        self._rings.publish(Boundary(is_urgent=self._drain.space.is_short))

    def check_inside(self, tokens: torch.Tensor) -> None:
        """Compare what compiled code gave to a language model in it with what the call around it was given.

        Parameters
        ----------
        tokens : torch.Tensor [n_sequences, n_query]
            Token ids; floating-point numbers in the place of embeddings.

        Raises
        ------
        CompiledModelError
            If these are not the tokens of the step.
        """
        inputs = None if self._call is None else self._call.inputs
        if inputs is not None and tokens is inputs.given.get("input_ids"):
            return
        tokens = tokens.reshape(-1, tokens.shape[-1])
        is_same = inputs is not None and tokens.shape == (inputs.n_sequences, inputs.n_query)
        if is_same and inputs is not None and inputs.token_ids is not None and not tokens.is_floating_point():
            is_same = np.array_equal(tokens.cpu().numpy(), inputs.token_ids)
        if not is_same:
            raise CompiledModelError(
                "a language model inside compiled code is given other tokens than the call around it, so rows cannot "
                "be told apart; compile and capture that model itself, not the one around it"
            )

    def finish(self, error: BaseException | None) -> None:
        """End what is still open: a step that an interrupt has cut off, and what is known of rows since."""
        if self._call is not None:
            self._end(self._call, "abandoned", _reason(error))
        if self._tracker.keys.is_in_block:
            self.end_block(error or CaptureError("the capture ended inside tagged()"))
        events = self._tracker.take_events()
        if events is not None:
            self._rings.publish(Events(columns=events))

    # Inside.

    def _is_inside(self, call: Call, frame: FrameType) -> bool:
        """Whether a call lies inside that of the open step; raise if it comes from another thread."""
        if threading.get_ident() != self._thread:
            raise CaptureError(
                "two threads run the captured model at once, and rows cannot be told apart; give each thread its "
                "own copy of the model and its own capture with a rank of its own"
            )
        return is_on_stack(call.frame, frame)

    def _enter_inside(
        self,
        call: Call,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        frame: FrameType,
    ) -> None:
        """A language model is called inside a call: its tokens are those of the step."""
        if not is_on_stack(call.model_frame, frame):
            self._end_well(call)
            self._call = call_of(module, args, kwargs, call.frame, frame, call.exception)
            self._call.whole_kept = call.whole_kept
            if self._call.kept is None:
                self._call.kept = call.whole_kept
            return
        call.model_frame = frame
        given = named_arguments(module, args, kwargs)
        if self.under_way is None:
            kept = kept_of(given)
            call.kept = call.kept if kept is None else kept
        if call.inputs is not None and call.inputs.is_read_from(given):
            return
        inputs = read_inputs(module, given)
        if inputs is None:
            return
        is_same = call.inputs is not None and inputs.agrees_with(call.inputs)
        if self.under_way is None:
            if is_same and call.inputs is not None and inputs.token_ids is None:
                inputs = replace(inputs, token_ids=call.inputs.token_ids)
            call.module, call.inputs = module, inputs
        elif not is_same:
            raise CaptureError(
                f"{type(module).__name__} inside the captured model is given other tokens than the call around it, in "
                "which a site has fired already, so rows cannot be told apart; capture that model itself, or only "
                "sites that fire inside it"
            )

    def _pass_by(self, frame: FrameType) -> None:
        """Count a pass that is not recorded; calls inside it are part of it."""
        if self._passed_by is None or not is_on_stack(self._passed_by, frame):
            self.n_paused_passes += 1
            self._passed_by = frame

    def _check_space(self, call: Call, n_rows: int | None) -> None:
        """Stop while what was captured still fits on the disk, and the pass as well; it is committed at once.

        Of the pass, values of `n_rows` of its tokens are stored; None: of all of them.
        """
        space = self._drain.space
        if not space.is_watched:
            return
        was_short = space.is_short
        try:
            n_waiting_bytes = self._rings.n_used + self._drain.n_spill_pending_bytes
            in_encoder = self._tracker.is_encoder(call.module)
            space.check(n_waiting_bytes, self._sizes.of(call, n_rows, in_encoder=in_encoder))
        except DiskSpaceError:
            if not was_short and not self._tracker.keys.is_in_block:  # else its end is what can be committed
                self._rings.publish(Boundary(is_urgent=True))
            raise

    def _begin(self, call: Call) -> OpenStep:
        self._drain.check()
        # What a selector chooses is known when the step has begun.
        self._check_space(call, 0 if self._selector else None)
        self._rings.check()
        is_full = self._on_full != "block" and self._rings.fill > FULL_SHARE
        if is_full and self._on_full == "raise":
            raise RingFullError(
                f"the ring is full ({self._rings.fill:.0%} of {self._rings.most_bytes} bytes wait to be written) and "
                'on_full="raise"; use "block", "drop" or "spill", a larger host_ring_bytes, fewer sites, a faster disk'
            )
        self._rings.divert(is_full)
        call.is_full = is_full and self._on_full == "drop"
        # One that an interrupt has cut off here before is described already.
        step = self._tracker.under_way or self._tracker.begin(call.module, call.inputs)
        if call.output is not None:
            self._tracker.returned(call.output)
        open_step = self.under_way = _opened(call, step)
        try:
            selector = self._selector
            open_step.stored = self._chosen(selector, call, open_step) if selector else open_step.whole
        finally:  # what is asked may fail, and then there is a step that does
            self._start(call, open_step)
        return open_step

    def _chosen(self, selector: Selector, call: Call, open_step: OpenStep) -> Placement | None:
        """What is stored of a step that is not stored as a whole, if the disk has space for that."""
        step, is_full = open_step.step, call.is_full
        stored = selector.choose(step, open_step.whole, chosen=open_step.chosen, is_full=is_full)
        self._check_space(call, stored.n_rows if stored and not is_full else 0)
        return stored

    def _start(self, call: Call, open_step: OpenStep) -> None:
        """Say that a step has begun; where an interrupt cuts this off, its end says so."""
        step, stored, counts = open_step.step, open_step.stored, self.counts
        if call.counts is None:
            if call.is_full and stored is not None:
                open_step.is_dropped = True
                if stored.rows is not None and step.tokens is not None:
                    step.tokens.dropped = np.isin(step.rows, stored.rows)
            whole = open_step.whole
            is_all = stored is whole and whole.index is None and whole.n_rows > 0
            open_step.takes_all = is_all and not open_step.is_dropped
            call.counts = Counts(
                n_steps=counts.n_steps + 1,
                n_tokens=counts.n_tokens + len(step.rows),
                n_dropped_steps=counts.n_dropped_steps + open_step.is_dropped,
                n_abandoned_steps=counts.n_abandoned_steps,
            )
        self.counts = call.counts
        self._rings.publish(StepStart(step=step))
        call.is_started = True

    def _end_well(self, call: Call) -> None:
        open_step = self.under_way or self._begin(call)
        if open_step.is_dropped:
            self._end(call, "dropped", RING_FULL)
        else:
            self._on_complete(open_step)
            self._end(call, "complete", None)

    def _end(self, call: Call, status: str, reason: str | None) -> None:
        """End the step of a call, if it has begun; said again behind an interrupt, it is the same end."""
        if self.under_way is None and self._tracker.under_way is not None:
            self.under_way = _opened(call, self._tracker.under_way)
        if self.under_way is not None:  # else it was cut off before anything happened
            if not call.is_started:
                self._start(call, self.under_way)
            if call.end is None:
                self._rings.flush()  # an interrupt in here loses values, and then the step is none that is complete
                if status == "abandoned":
                    n_abandoned = self.counts.n_abandoned_steps + 1
                    call.counts = self.counts._replace(n_abandoned_steps=n_abandoned)
                call.end = StepEnd(
                    step=self.under_way.step,
                    started_ns=call.started_ns,
                    duration_s=time.perf_counter() - call.started_s,
                    status=status,
                    reason=reason,
                    dropped=self.under_way.dropped,
                    is_whole=not self._tracker.keys.is_in_block,
                )
            assert call.counts is not None
            self.counts = call.counts
            self._tracker.end(call.end.status, call.end.reason)
            self._rings.publish(call.end)
        self.under_way = self._call = None


def _opened(call: Call, step: Step) -> OpenStep:
    """Return a step that begins, of which nothing is stored yet."""
    return OpenStep(
        step=step,
        batch=(step.n_sequences, step.n_query),
        whole=Placement(n_rows=len(step.rows), index=step.selected, rows=step.rows),
        chosen=call.chosen(step.n_query) if step.is_language else None,
        stored=None,
    )


def _reason(error: BaseException | None) -> str:
    return INTERRUPTED if error is None else f"{type(error).__name__}: {error}"[:_REASON_CHARS]
