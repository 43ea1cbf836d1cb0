"""Hooks: what happens inside the model's own thread when a site fires.

Every value is copied into the ring before the hook returns, in its own dtype, so that later in-place changes do not
reach it.

- A site in the tokens' row space that fires twice in a step would give a row two values: a CaptureError. In a row space
  of its own every firing adds rows.
- A firing outside any step (a part of the model is called directly) is a CaptureError, but for the second forward pass
  that gradient checkpointing makes inside backward: the values of the first are kept, the repetition is ignored.
- Of a gradient, the rows are those of the value: what `backward=True` stores is placed when the value is. It comes by a
  hook on the module's own tensor, so that what the model does to that in place later has no part in it.
- Hooks that a copy of the model has taken along do nothing.
- A hook that torch.compile traces puts a copy of the value on its `Tap`: the graph returns it there, as one more
  output, and it is taken when the compiled code is over. A pass begins before and ends after that code.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.errors import CaptureError, CompiledModelError
from strapfmt.schema import SiteSpec
from strapfmt_capture.attention import AttentionCall, watched
from strapfmt_capture.calls import OpenStep
from strapfmt_capture.channels import Channels
from strapfmt_capture.compiled import (
    attached_around,
    forget_compiled_code,
    guard_hooks,
    inlined,
    is_below_compiler,
    original,
    untraced,
)
from strapfmt_capture.computed import is_computing
from strapfmt_capture.drain_home import DrainHome
from strapfmt_capture.eager import is_graph_made, is_repetition
from strapfmt_capture.encoders import stacks_of
from strapfmt_capture.gradients import Backward, Gradients, compiled_error
from strapfmt_capture.heads import POSITIONS
from strapfmt_capture.hookpoints import HookPoint
from strapfmt_capture.passes import Step
from strapfmt_capture.rings import Rings
from strapfmt_capture.rows import RowTracker
from strapfmt_capture.selection import Selection, Selector
from strapfmt_capture.steps import OnFull, Steps
from strapfmt_capture.storing import Store
from strapfmt_capture.taps import Fit, Tap, reached_rows

__all__ = ["Hooks"]

_NO_KWARGS: dict[str, Any] = {}


class Hooks:
    """Copies what sites produce into a ring, step by step.

    Parameters
    ----------
    points : iterable of HookPoint
    heads : collection of str
        Paths of modules that may leave out all but the last positions.
    rings : Rings
    drain : DrainHome
        Asked at every step whether it has failed.
    tracker : RowTracker
    on_full : {"block", "drop", "raise", "spill"}
        What happens when the ring is full as a step begins. A step that has begun waits for space.
    codec, statistics
        Of every site.
    known : mapping of str to SiteSpec
        Sites that the dataset holds already.
    selection : Selection, optional
        Which rows are stored; None: all.
    channels : mapping of str to Channels
        By site, where not all are stored.

    Attributes
    ----------
    taps : list of Tap
        The sites.
    store : Store
    steps : Steps
        The passes of the model, counted.
    """

    def __init__(
        self,
        points: Iterable[HookPoint],
        *,
        heads: Iterable[str],
        rings: Rings,
        drain: DrainHome,
        tracker: RowTracker,
        on_full: OnFull,
        codec: str,
        statistics: tuple[str, ...],
        known: Mapping[str, SiteSpec],
        selection: Selection | None = None,
        channels: Mapping[str, Channels] = MappingProxyType({}),
    ) -> None:
        self._selector = None if selection is None else Selector(selection, self._reached)
        self.store = Store(rings, selector=self._selector, codec=codec, statistics=statistics, known=known)
        self.taps = _taps(points, set(heads), channels, self.store)
        self.steps = Steps(
            rings=rings,
            drain=drain,
            tracker=tracker,
            sizes=self.store.sizes,
            on_full=on_full,
            on_complete=self._count_missed,
            selector=self._selector,
        )
        self._rings = rings
        self._is_over = False
        # What is kept of a pass that runs to be repeated, without this code, by a CUDA graph.
        self._recorded: list[tuple[Tap, torch.Tensor]] = []
        self._is_recording = False
        # What compiled code gave to language models in it, and whether any has run.
        self._inner_tokens: tuple[torch.Tensor, ...] = ()
        self._has_staged = self._was_compiled = False
        self._two_streams: set[torch.nn.Module] = set()
        self._handles, self._is_guarded = ExitStack(), False
        # A model that runs parts of itself in several threads fires sites in all of them.
        self._producing = threading.Lock()
        self._backward = Backward(
            [tap.gradients for tap in self.taps if tap.gradients is not None],
            lock=self._producing,
            is_recording=lambda: not (self._is_over or self.steps.is_paused),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _NoHooks:
        # A copy of a hooked model takes its hooks along; it is another model, whose tokens and values are not stored.
        return _NoHooks()

    def __reduce__(self) -> tuple[type[_NoHooks], tuple[()]]:
        # A hooked model that is stored leaves them behind.
        return _NoHooks, ()

    @property
    def is_at_limit(self) -> bool:
        """Whether a site has as many rows as `max_rows` allows."""
        limit = None if self._selector is None else self._selector.selection.max_rows
        return limit is not None and any(tap.expected - tap.dropped >= limit for tap in self.taps)

    @contextmanager
    def attached(self, model: torch.nn.Module, row_modules: Iterable[torch.nn.Module]) -> Iterator[None]:
        """Attach all hooks; they are gone on exit, whatever happened.

        Of the modules that may begin a step, those inside `model` that hold no site are left alone, but for encoder
        and decoder: the tokens of both are stored.
        """
        tapped = {model.get_submodule(tap.point.module_path) for tap in self.taps}
        stacks = stacks_of(model)
        always = {model, *stacks.encoders, *stacks.decoders}
        modules = [each for each in row_modules if each in always or not tapped.isdisjoint(each.modules())]
        encoders = stacks.inside_encoders()
        self._two_streams = {
            each
            for each in model.modules()
            if each not in encoders and not encoders.isdisjoint(each.modules())
        }
        for tap in self.taps:
            tap.in_encoder = model.get_submodule(tap.point.module_path) in encoders
        with ExitStack() as handles:
            for module in modules:
                handle = module.register_forward_pre_hook(self.enter, with_kwargs=True)
                handles.callback(handle.remove)
            for tap in self.taps:
                if tap.point.is_gradient:
                    continue
                module = model.get_submodule(tap.point.module_path)
                if tap.point.attention_path is not None:
                    # Not its compiled wrapper, outside of which the site's module would not know it again.
                    around = original(model.get_submodule(tap.point.attention_path))
                    note = around.register_forward_pre_hook(partial(self.on_attention, tap), with_kwargs=True)
                    handles.callback(note.remove)
                if tap.point.where == "attention":
                    handles.enter_context(watched(module, partial(self.on_dispatch, tap)))
                    continue
                if tap.point.where == "in":
                    handle = module.register_forward_pre_hook(partial(self.on_input, tap), with_kwargs=True)
                elif tap.point.compute is not None:
                    handle = module.register_forward_hook(partial(self.on_call, tap), with_kwargs=True)
                else:
                    handle = module.register_forward_hook(partial(self.on_output, tap))
                handles.callback(handle.remove)
            for module in modules:
                handle = module.register_forward_hook(self.leave, always_call=True)
                handles.callback(handle.remove)
            handles.callback(self._forget)
            self._handles, self._is_guarded = handles, guard_hooks(handles)
            handles.enter_context(attached_around(model, modules, self))
            forget_compiled_code()
            yield

    def finish(self, error: BaseException | None) -> None:
        """End what is still open; from now on nothing is recorded."""
        if self.steps.has_begun:
            self._take_staged()
        self._backward.flush()
        self._is_over = True
        for tap in self.taps:
            if tap.gradients is not None:
                tap.n_missed = max(tap.gradients.counts.total() - tap.n_calls, 0)
        self.steps.finish(error)

    # What PyTorch calls.

    @inlined
    def enter(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run before a row module."""
        if self._is_over or (torch.compiler.is_compiling() and self.steps.is_paused):
            return
        if torch.compiler.is_compiling() and self._may_stage:
            self._note_tokens(args, kwargs)
        else:
            self._enter(module, args, kwargs, is_below_compiler())

    @inlined
    def leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Run after a row module, also when it has failed."""
        if self._is_over or (torch.compiler.is_compiling() and self.steps.is_paused):
            return
        if torch.compiler.is_compiling() and self._may_stage and not self.steps.ends_in_graph:
            return
        self._leave(output)

    @inlined
    def before_graph(self, module: torch.nn.Module, args: Any) -> None:
        """Run before a module whose own code is compiled: a step begins, as rows cannot be decided inside."""
        if not self._is_over and not torch.compiler.is_compiling():
            self._begin(module)

    @inlined
    def after_graph(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        """Run after a module whose own code is compiled."""
        if not self._is_over and not torch.compiler.is_compiling():
            self._take_staged()

    @inlined
    def on_input(
        self, tap: Tap, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Run before a module whose input is a site."""
        self._reach(tap, module, args, kwargs, None)

    @inlined
    def on_output(self, tap: Tap, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Run after a module whose output is a site."""
        if torch.compiler.is_compiling() or not self._gathers(tap, output):
            self._reach(tap, module, args, _NO_KWARGS, output)

    @inlined
    def on_call(
        self, tap: Tap, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Run after a module of whose call a site is computed."""
        self._reach(tap, module, args, kwargs, output)

    @inlined
    def on_dispatch(self, tap: Tap, call: AttentionCall) -> None:
        """Run before the attention function whose call a site is computed from."""
        self._reach(tap, call.module, (), _NO_KWARGS, call)

    # CUDA graphs.

    @contextmanager
    def recording(self) -> Iterator[list[tuple[Tap, torch.Tensor]]]:
        """Keep what sites give, which stays in its place, instead of storing it."""
        if self._is_recording:
            raise CaptureError("a recording is under way already; end it before the next one begins")
        if is_graph_made():
            raise CaptureError(
                "recording(): a CUDA graph is under way already; enter it before the graph begins"
            )
        self.steps.settle("recording()")
        self._rings.settle()  # what another thread waits for on the GPU would end a recording of it
        self._is_recording, self._recorded = True, []
        try:
            yield self._recorded
        finally:
            self._is_recording, self._recorded = False, []

    @contextmanager
    def replaying(
        self, model: torch.nn.Module, recorded: Iterable[tuple[Tap, torch.Tensor]], inputs: dict[str, Any]
    ) -> Iterator[None]:
        """Store what lies in the place of recorded values when the block ends, as one pass over `inputs`."""
        if self._is_over or self._is_recording:
            raise CaptureError("replay inside the with block of the capture, and outside of a recording")
        frame = sys._getframe()
        self.steps.enter(model, (), inputs, frame)
        try:
            self.steps.current()
            yield
            for tap, x in recorded:
                self._receive(tap, x)
        finally:
            self.steps.leave(None, frame)

    # Around compiled code.

    @property
    def _may_stage(self) -> bool:
        """Whether compiled code may return values: where they go is known."""
        return self.steps.has_begun or self._is_recording

    @untraced
    def _enter(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cuts_graph: bool
    ) -> None:
        self._take_staged()
        self._is_guarded = self._is_guarded or guard_hooks(self._handles)
        if self._is_recording:
            return
        if is_graph_made():
            raise CompiledModelError(
                "the captured model runs while a CUDA graph is captured, whose replays run no hooks; make the graph "
                "inside `with cap.recording() as recorded`, and replay it inside `with recorded.replay(**inputs)`"
            )
        if cuts_graph:
            self._check_no_gradients()
        self._backward.flush()
        # The frame two levels up is the call's.
        self.steps.enter(original(module), args, kwargs, sys._getframe(2), cuts_graph=cuts_graph)
        self._was_compiled |= cuts_graph

    @untraced
    def _leave(self, output: Any) -> None:
        try:
            self._take_staged()
        finally:
            self.steps.leave(output, sys._getframe(2))

    @untraced
    def _begin(self, module: torch.nn.Module) -> None:
        self._was_compiled = True
        self._check_no_gradients()
        if original(module) in self._two_streams:
            raise CompiledModelError(
                f"{type(original(module)).__name__} holds an encoder and a decoder, whose tokens differ, and is "
                "compiled as a whole; compile its encoder and its decoder, each by itself"
            )
        self.steps.current()

    def _check_no_gradients(self) -> None:
        if any(tap.gradient is not None for tap in self.taps):
            raise compiled_error()

    @untraced
    def _take_staged(self) -> None:
        """Take what compiled code has returned; with it the step has begun that it belongs to."""
        if not self._has_staged:
            return
        self._has_staged = False  # first, as another thread may stage more
        try:
            tokens, self._inner_tokens = (() if self._is_recording else self._inner_tokens), ()
            staged = [(tap, tap.staged) for tap in self.taps if tap.staged]
            for tap, _ in staged:
                tap.staged = ()
        except BaseException:  # an interrupt, which may leave some
            self._has_staged = True
            raise
        if any(tap.gradient is not None for tap, _ in staged):
            raise compiled_error()
        for given in tokens:
            self.steps.check_inside(given)
        for tap, values in staged:
            for x in values:
                self._receive(tap, x)

    @inlined
    def _note_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if tokens is None and args:
            tokens = args[0]
        if tokens is None and embeddings is not None:
            tokens = embeddings.detach()[..., 0].clone()
        if (
            isinstance(tokens, torch.Tensor)
            and tokens.ndim
            and (embeddings is not None or not tokens.is_floating_point())
        ):
            self._inner_tokens, self._has_staged = (*self._inner_tokens, tokens), True

    def _forget(self) -> None:
        if self._was_compiled:
            forget_compiled_code()

    @inlined
    def on_attention(
        self, tap: Tap, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Run before an attention module whose positions a site in it needs."""
        if not self._is_over and not self.steps.is_paused:
            tap.attention = module, {name: kwargs[name] for name in POSITIONS if name in kwargs}

    # Sites.

    @inlined
    def _reach(
        self, tap: Tap, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._is_over or self.steps.is_paused:
            return
        if torch.compiler.is_compiling() and self._may_stage:
            if is_computing():
                return
            attention = tap.attention
            if attention is not None:
                tap.attention = None
            x = tap.point.read(args, kwargs, output, module, attention)
            # A copy, which the model cannot change any more; the compiler makes none where it could not.
            tap.staged, self._has_staged = (*tap.staged, x.detach().clone()), True
        else:
            self._fire(tap, module, args, kwargs, output)

    @untraced
    def _gathers(self, tap: Tap, x: Any) -> bool:
        """Take the short way with a small tensor that is all rows of the step, as most are in decoding."""
        open_step = self.steps.under_way
        if open_step is None or not (tap.is_plain and open_step.takes_all) or type(x) is not torch.Tensor:
            return False
        fit = tap.fit
        if fit is None or fit.batch != open_step.batch:
            fit = tap.fit = Fit.of(tap, open_step.batch)
        if fit is None or not (
            fit.is_small
            and x.shape == fit.shape
            and x.dtype is fit.dtype
            and x.is_cpu
            and x.is_contiguous()
            and not x.is_neg()
            and not is_computing()
        ):
            return False
        step = open_step.step
        with self._producing:
            # A second value of a step, from whichever thread, is refused on the long way.
            if tap.last_step == step.step or not self._rings.has_room(fit.n_bytes, step.rows):
                return False
            tap.last_step = step.step
            tap.n_calls += 1
            tap.expected += len(step.rows)
            self._rings.add_small(fit.spec, x, fit.n_bytes)
        return True

    @untraced
    def _fire(
        self, tap: Tap, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if is_computing():
            return
        if not self.steps.has_begun and is_repetition():
            if tap.gradient is not None and tap.gradient.gradients is not None:
                with self._producing:
                    self._backward.repeat(tap.gradient.gradients, tap.point.found(args, kwargs, output))
            return
        if tap.staged:
            self._take_staged()
        if tap.is_plain and not self.steps.has_begun and not self._is_recording:
            with self._producing:
                self.steps.current()
            if self._gathers(tap, output):
                return
        attention, tap.attention = tap.attention, None
        x = tap.point.read(args, kwargs, output, module, attention)
        found = None if tap.gradient is None else tap.point.found(args, kwargs, output)
        self._receive(tap, x.detach().clone() if self._is_recording else x, found)

    def _receive(self, tap: Tap, x: torch.Tensor, found: torch.Tensor | None = None) -> None:
        if self._is_recording:
            self._recorded.append((tap, x))
            return
        with self._producing:
            open_step = self.steps.current()
            if open_step is None:
                raise CaptureError(
                    f"site {tap.point.site!r} at {tap.point.hook_point} fired outside a forward pass of the captured "
                    "model; call that model itself (not its forward method, and not a part of it), or capture the part"
                )
            awaited = self.store.take(tap, x, open_step)
            if found is not None and awaited is not None:
                assert tap.gradient is not None
                assert tap.gradient.gradients is not None
                self._backward.await_one(tap.gradient.gradients, found, awaited)

    def _reached(self, step: Step, chosen: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64] | None:
        return reached_rows(self.taps, step, chosen)

    def _count_missed(self, open_step: OpenStep) -> None:
        """Count the sites with rows of tokens that did not fire in a step that has ended."""
        step = open_step.step
        if len(step.rows):
            for tap in self.taps:
                if tap.gradients is not None:
                    tap.gradients.settle(step.step)
                    continue
                is_own = tap.layout is not None and tap.layout.ndim is not None
                is_elsewhere = tap.in_encoder != (step.phase == "encode")
                tap.n_missed += tap.last_step != step.step and not is_own and not is_elsewhere


def _taps(
    points: Iterable[HookPoint], heads: Collection[str], channels: Mapping[str, Channels], store: Store
) -> list[Tap]:
    """Return what is known of each site before it has fired."""
    taps = [
        Tap(
            point=point,
            is_head=point.is_last or point.module_path in heads,
            channels=channels.get(point.site),
        )
        for point in points
    ]
    by_site = {tap.point.site: tap for tap in taps}
    for tap in taps:
        if tap.point.is_gradient:
            tap.gradients = Gradients(
                where=f"site {tap.point.site!r} at {tap.point.hook_point}",
                store=partial(store.store_gradient, tap),
                drop=partial(store.drop_gradient, tap),
            )
            by_site[tap.point.of_value.site].gradient = tap
    for tap in taps:
        tap.is_plain = tap.point.is_plain and not tap.is_head and not tap.channels and not tap.gradient
    return taps


class _NoHooks:
    """What is left of `Hooks` in a model that was copied or stored while it was captured: it does nothing.

    A copied hook is still a method of `Hooks`, and finds here what it asks for.
    """

    _is_over = True

    def enter(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    leave = on_input = _gathers = on_output = on_call = on_dispatch = on_attention = _reach = enter
