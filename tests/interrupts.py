"""Interrupts as Ctrl-C would come, by a timer or at a given line, for tests of what is left then."""

from __future__ import annotations

import dis
import linecache
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


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


# With what the call of `__exit__` begins, of a block that ends and of one that returns something.
_EXITS = ("LOAD_CONST", "SWAP")


class Interrupted(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for the user's."""


def interrupt_at(line: int, act: Callable[[], object], *, within: str) -> bool:
    """Run `act` and raise in it at the `line`-th line it reaches, as a signal would; return whether.

    Lines count in files whose names hold `within`.
    """
    n_lines = 0

    def trace(frame: object, event: str, _: object) -> object:
        nonlocal n_lines
        if within not in frame.f_code.co_filename:  # type: ignore[attr-defined]
            return None
        if event == "line" and not _ends_with_block(frame):
            n_lines += 1
            if n_lines == line:
                sys.settrace(None)
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)  # type: ignore[arg-type]
    try:
        act()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


def _ends_with_block(frame: Any) -> bool:
    """Whether a `with` statement calls `__exit__` next: a line to a tracer, but no signal can come before it."""
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
    return line.startswith("with ") and dis.opname[frame.f_code.co_code[frame.f_lasti]] in _EXITS
