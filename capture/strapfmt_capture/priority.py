"""Scheduling of the process that writes: only where a core is idle, as far as that can be taken back."""

from __future__ import annotations

import os
import threading

__all__ = ["lower", "set_idle"]

_NICE = 10


def lower() -> bool:
    """Lower the priority of the calling thread; return whether it is idle scheduling, which `set_idle` can undo.

    Without privileges a thread that has gone idle stays so, and would starve beside other work for good. There it
    becomes nicer instead, by an amount that still leaves it a share of a busy core.
    """
    if _can_return():
        set_idle(0, True)
        return True
    os.nice(_NICE)
    return False


def set_idle(thread: int, is_idle: bool) -> None:
    """Give a thread (0: the calling one) idle or normal scheduling."""
    os.sched_setscheduler(thread, os.SCHED_IDLE if is_idle else os.SCHED_OTHER, os.sched_param(0))


def _can_return() -> bool:
    """Try it with a thread that ends."""
    results = []

    def attempt() -> None:
        try:
            set_idle(0, True)
            set_idle(0, False)
            results.append(True)
        except (AttributeError, OSError):
            results.append(False)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return results[0]
