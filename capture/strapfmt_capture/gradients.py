"""Gradients: of a loss with respect to the values of a site, stored in the rows of those values, in their order.

Autograd goes through passes backwards: of a loss over two of them it comes to the later one first. What comes early is
kept until the earlier ones have come, until none of them can come any more (their graphs are gone), or until the next
pass begins or the capture ends; what comes later than that has no place left.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.hooks import RemovableHandle, unserializable_hook
from torch.utils.weak import WeakTensorKeyDictionary

from strapfmt.errors import ArgumentError, CaptureError, CompiledModelError
from strapfmt_capture.calls import OpenStep
from strapfmt_capture.cuts import Cut
from strapfmt_capture.eager import checkpointed_call, is_repetition
from strapfmt_capture.hookpoints import GRADIENT_SUFFIX, HookPoint
from strapfmt_capture.placement import Layout, Placement

__all__ = ["Awaited", "Backward", "Gradients", "compiled_error", "with_gradients", "without_gradient"]

_ADVICE = "run what is not to be recorded inside `with cap.paused()`"


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class Awaited:
    """A value that was stored and whose gradient may come; it lives as long as the graph that may bring it.

    Attributes
    ----------
    layout, placed, cuts, call, step
        Where the value was stored, and so where its gradient belongs.
    state : str
        What became of the gradient; "passed": later ones were stored without it.
    gradient : torch.Tensor or None
        Kept until its turn.
    handle : RemovableHandle or None
        Of the hook that brings it.
    is_shared : bool
        One tensor was the value in two passes, and its gradient is of both.
    """

    layout: Layout
    placed: Placement
    cuts: Sequence[Cut] | None
    call: int
    step: OpenStep
    state: Literal["awaited", "kept", "stored", "passed"] = "awaited"
    gradient: torch.Tensor | None = None
    handle: RemovableHandle | None = None
    is_shared: bool = False


@dataclass(slots=True, kw_only=True)
class Gradients:
    """The gradients of one site.

    Attributes
    ----------
    where : str
        Site and place, for messages.
    store : callable
        Stores the gradient of a value; called in the order of the values.
    drop : callable
        Counts the gradient of a value that was not stored because the ring was full.
    counts : Counter
        Values that were stored in passes that have ended well: whose gradient is `"awaited"`, those made while
        gradients were `"off"`, and `"constant"` ones, that require none.
    is_whole_numbers : bool
        The site holds what has no gradient.
    """

    where: str
    store: Callable[[Awaited, torch.Tensor], None]
    drop: Callable[[Awaited], None]
    counts: Counter[str] = field(default_factory=Counter)
    is_whole_numbers: bool = False
    _open_step: int = -1
    _open: Counter[str] = field(default_factory=Counter)
    _waiting: deque[weakref.ref[Awaited]] = field(default_factory=deque)
    _kept: list[Awaited] = field(default_factory=list)
    _hooked: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)

    def count(self, step: int, what: Literal["awaited", "off", "constant"]) -> None:
        """Count a value of a step under way."""
        if step != self._open_step:
            self._open_step, self._open = step, Counter()
        self._open[what] += 1

    def settle(self, step: int) -> None:
        """Take note that a step has ended well."""
        if step == self._open_step:
            self.counts += self._open
            self._open_step = -1

    @property
    def is_keeping(self) -> bool:
        """Whether it holds gradients that wait for their turn."""
        return bool(self._kept)

    def await_one(self, awaited: Awaited) -> None:
        """Take note of a value whose gradient may come."""
        self._advance()
        self._waiting.append(weakref.ref(awaited))

    def hooked(self, x: torch.Tensor, awaited: Awaited, handle: RemovableHandle) -> None:
        """Take note that `x` brings a gradient; the same tensor may have been the value of an earlier pass."""
        awaited.handle = handle
        earlier = self._hooked.get(x)  # type: ignore[no-untyped-call]
        if earlier is not None and earlier.state == "awaited":
            awaited.is_shared = earlier.is_shared = True
        elif earlier is not None:
            earlier.handle.remove()
        self._hooked[x] = awaited

    def arrived(self, awaited: Awaited, gradient: torch.Tensor) -> None:
        """Store a gradient, or keep it until its turn.

        Raises
        ------
        CaptureError
            If its row has one already, its turn is over, or it is of several passes at once.
        """
        step = awaited.step.step.step
        if awaited.is_shared:
            raise CaptureError(
                f"{self.where}: one tensor was its value in step {step} and in another, and its gradient is of both; "
                "give each pass a tensor of its own (x.clone()), or call backward() before the next pass"
            )
        if awaited.state in ("kept", "stored"):
            raise CaptureError(
                f"{self.where}: backward() came twice to step {step}, which would give its rows two gradients; add the "
                f"losses and call it once, or {_ADVICE}"
            )
        if awaited.state == "passed":
            raise CaptureError(
                f"{self.where}: the gradient of step {step} came after that of a later step was stored; call "
                f"backward() in the order of the passes, or before the next pass begins, or {_ADVICE}"
            )
        awaited.state, awaited.gradient = "kept", gradient
        self._kept.append(awaited)
        self._advance()

    def flush(self) -> None:
        """Store what was kept; earlier values have none."""
        while self._kept:
            awaited = self._waiting[0]()
            if awaited is not None and awaited.state == "awaited":
                awaited.state = "passed"
                self._waiting.popleft()
            self._advance()

    def _advance(self) -> None:
        """Store what has its turn."""
        while self._waiting:
            awaited = self._waiting[0]()
            if awaited is not None and awaited.state == "awaited":
                return
            self._waiting.popleft()
            if awaited is not None and awaited.gradient is not None:
                gradient, awaited.gradient, awaited.state = awaited.gradient, None, "stored"
                self._kept.remove(awaited)
                self.store(awaited, gradient)


class Backward:
    """Has gradients brought by autograd: by hooks on the tensors of the model.

    Inside a reentrant checkpoint the values are made without a graph, and once more in backward, with one: their
    gradients come to the repetition.

    Parameters
    ----------
    sites : iterable of Gradients
    lock : Lock
        Held while something is stored: autograd has threads of its own.
    is_recording : callable
        Whether gradients that come now are stored.
    """

    def __init__(
        self, sites: Iterable[Gradients], *, lock: threading.Lock, is_recording: Callable[[], bool]
    ) -> None:
        self._sites, self._lock, self._is_recording = list(sites), lock, is_recording
        self._repeated: weakref.WeakKeyDictionary[Any, list[tuple[Gradients, Awaited]]] = (
            weakref.WeakKeyDictionary()
        )

    def await_one(self, gradients: Gradients, x: torch.Tensor, awaited: Awaited) -> None:
        """Have the gradient with respect to `x`, the module's own tensor, stored when it comes, if it may come."""
        if not x.dtype.is_floating_point and not x.dtype.is_complex:
            gradients.is_whole_numbers = True
            return
        is_on, step = torch.is_grad_enabled(), awaited.step.step.step
        call = None if is_on else checkpointed_call()
        if call is None and not (is_on and x.requires_grad):
            gradients.count(step, "constant" if is_on else "off")
            return
        gradients.count(step, "awaited")
        if awaited.step.is_dropped:
            gradients.drop(awaited)
            return
        gradients.await_one(awaited)
        if x.requires_grad:
            self._hook(gradients, x, awaited)
        else:
            self._repeated.setdefault(call, []).append((gradients, awaited))

    def repeat(self, gradients: Gradients, x: object) -> None:
        """Take note of a value that is made once more, in the repetition of a checkpoint."""
        call = checkpointed_call()
        waiting = [] if call is None else self._repeated.get(call, [])
        place = next((place for place, (each, _) in enumerate(waiting) if each is gradients), None)
        if place is not None and isinstance(x, torch.Tensor) and x.requires_grad:
            again = waiting.pop(place)
            waiting.append(again)  # a module may run several times in it, and it may be repeated once more
            self._hook(gradients, x, again[1])

    def flush(self) -> None:
        """Store what is kept, as nothing comes before it any more."""
        keeping = [gradients for gradients in self._sites if gradients.is_keeping]
        if keeping and not is_repetition():
            with self._lock:
                for gradients in keeping:
                    gradients.flush()

    def _hook(self, gradients: Gradients, x: torch.Tensor, awaited: Awaited) -> None:
        hook = unserializable_hook(partial(self._arrive, gradients, awaited))  # type: ignore[no-untyped-call]
        handle = x.register_hook(hook)  # type: ignore[no-untyped-call]
        gradients.hooked(x, awaited, handle)

    def _arrive(self, gradients: Gradients, awaited: Awaited, gradient: torch.Tensor | None) -> None:
        """Run by autograd."""
        if (
            gradient is None or not self._is_recording()
        ):  # None: the loss depends on another output of its module
            return
        with self._lock:
            gradients.arrived(awaited, gradient)


def with_gradients(points: Iterable[HookPoint]) -> list[HookPoint]:
    """Put the site of its gradients behind each site that has them.

    Raises
    ------
    ArgumentError
        If none has.
    """
    points = list(points)
    found = []
    for point in points:
        found.append(point)
        if point.has_gradient:
            found.append(replace(point, site=point.site + GRADIENT_SUFFIX, is_gradient=True))
    if len(found) == len(points):
        raise ArgumentError(
            f"backward=True: expected a site whose values the model goes on with, got {points[0].site!r}, which is "
            "computed beside it and has no gradient; ask for another site as well"
        )
    return found


def without_gradient(points: Iterable[HookPoint]) -> list[str]:
    """Return the sites that have no gradient."""
    return [point.site for point in points if not point.has_gradient]


def compiled_error() -> CompiledModelError:
    """Return what to raise where gradients of compiled code are wanted."""
    return CompiledModelError(
        "backward=True: expected a model that is not compiled, as compiled code makes gradients without the tensors "
        "that hooks see; capture gradients before compiling, or in a copy that is not compiled"
    )
