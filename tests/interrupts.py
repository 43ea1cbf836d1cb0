"""Interrupts by a timer, as Ctrl-C would come, for tests of what is left then."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts(error: type[BaseException]) -> Iterator[Callable[[float], None]]:
    """Give a function that makes `error` be raised after so many seconds, wherever the main thread is; 0: never."""

    def arm(after_s: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, after_s)

    def strike(_: int, frame: FrameType | None) -> None:
        # What is raised where an object dies, Python only reports: strike a moment later.
        if frame is not None and ("weakref" in frame.f_code.co_filename or frame.f_code.co_name == "__del__"):
            arm(1e-4)
            return
        raise error

    before = signal.signal(signal.SIGALRM, strike)
    try:
        yield arm
    finally:
        arm(0)
        signal.signal(signal.SIGALRM, before)
