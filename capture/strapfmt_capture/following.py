"""The session of a process for which another one of its tensor-parallel group writes.

It runs the hooks, as making values whole takes every process, and stores nothing. What a user tells the capture is told
in every process, so that all of them pause, stop and skip alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch

from strapfmt.errors import CaptureError
from strapfmt_capture.attention import watched
from strapfmt_capture.compiled import check_not_compiled
from strapfmt_capture.computed import is_computing
from strapfmt_capture.eager import is_repetition
from strapfmt_capture.groups import first_does
from strapfmt_capture.hookpoints import HookPoint
from strapfmt_capture.session import Capture

__all__ = ["Follower"]


class Follower(Capture):
    """A capture whose values another process writes; its report says so."""

    _attached: ExitStack | None = None
    _is_paused = False

    def __enter__(self) -> Self:
        if self._attached is not None:
            raise CaptureError(f"{self.path}: a capture is entered once; make another with mode='append'")
        check_not_compiled(self._model)
        first_does(self._group, self._begin)
        assert self._group is not None
        self._remarks.append(f"rank {self._group.ranks[0]} writes for this process, and has the account")
        self._attached = ExitStack()
        for point in self._points:
            self._attach(self._attached, point)
        if self._stop is not None:
            self._attached.enter_context(self._stop.attached(self._model, self._row_modules))
        self._state = "running"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._attached is None:
            raise CaptureError(f"{self.path}: this capture was not entered; use it in a with statement")
        self._attached.close()
        self._state = "closed"

    def __deepcopy__(self, memo: dict[int, Any]) -> Follower:
        # A copy of a hooked model takes its hooks along; it is another model, whose values nobody waits for.
        copy = Follower.__new__(Follower)
        copy._is_paused = True
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return _idle, ()

    def tagged(self, tags: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> AbstractContextManager[None]:
        """Do nothing: the process that writes is told as well."""
        self._check_running("tagged()")
        return nullcontext()

    def done(self, key: object) -> bool:
        """Return what the process that writes says, which has to be asked as well."""
        if self._attached is None:
            return super().done(key)  # which says that it has to be entered
        return first_does(self._group, lambda: False)

    def mark(self, name: str, /, **attributes: Any) -> None:
        """Do nothing: the process that writes is told as well."""
        self._check_running("mark()")

    def pause(self) -> None:
        """Take no part until `resume`."""
        self._check_running("pause()")
        self._is_paused = True

    def resume(self) -> None:
        """Take part again."""
        self._check_running("resume()")
        self._is_paused = False

    def paused(self) -> AbstractContextManager[None]:
        """Pause for the length of a `with` block."""
        self._check_running("paused()")
        return self._while_paused()

    @contextmanager
    def _while_paused(self) -> Iterator[None]:
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def _check_running(self, what: str) -> None:
        if self._state != "running":
            raise CaptureError(
                f"{self.path}: {what} is for a capture that runs, and this one is {self._state}; call it inside the "
                "with block"
            )

    def _attach(self, handles: ExitStack, point: HookPoint) -> None:
        module = self._model.get_submodule(point.module_path)
        # What is done with a value when it is whole takes one process.
        point = replace(point, split=None, rotary=None)
        if point.where == "attention":
            handles.enter_context(watched(module, partial(self._after, point, module, (), {})))
            return
        if point.where == "in":
            handle = module.register_forward_pre_hook(partial(self._before, point), with_kwargs=True)
        else:
            handle = module.register_forward_hook(partial(self._after, point), with_kwargs=True)
        handles.callback(handle.remove)

    def _before(
        self,
        point: HookPoint,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._after(point, module, args, kwargs, None)

    def _after(
        self,
        point: HookPoint,
        module: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,
    ) -> None:
        if not self._is_paused and not is_computing() and not is_repetition():
            point.read(args, kwargs, output, module)


def _idle() -> Follower:
    """Return what is left of a follower in a model that was stored while it was captured: it does nothing."""
    return Follower.__new__(Follower).__deepcopy__({})
