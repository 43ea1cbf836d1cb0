"""The bounded buffer between hooks and the drain: one block of memory, used in turns.

A producer reserves a slot, fills it and publishes it with an item that says what it holds; the consumer takes items in
that order, and releases the slots in that order. Positions count bytes from the beginning of time, so that the place
in memory is `position % n_bytes`, and what is in use is the difference of two positions.

An interrupt (Ctrl-C) may strike the producer between any two steps. A slot exists from the moment its item is in the
queue, which is one operation: a slot that was reserved and never published is simply reserved again.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import deque
from typing import Generic, NamedTuple, TypeVar

from strapfmt.errors import ArgumentError
from strapfmt.spec import ALIGNMENT_BYTES
from strapfmt_capture.memory import Memory, aligned

__all__ = ["LINGER_S", "RECHECK_S", "RING_BYTES", "Ring", "Signal", "Slot"]

RING_BYTES = 256 << 20
# The consumer is woken for this share of the ring, or for whatever there is after so long: each turn it takes costs
# the model's thread a little, and large turns cost less than many small ones. No more than a turn of the drain has, so
# that what has waited is taken as a whole.
_WORTHWHILE_SHARE = 1 / 8
_WORTHWHILE_BYTES = 8 << 20
LINGER_S = 1.0
# A wake-up that an interrupt has swallowed is made good after so long.
RECHECK_S = 1.0

Item = TypeVar("Item")


class Slot(NamedTuple):
    """Memory of a ring, from one position to another; contiguous, its start a multiple of 64 bytes in memory."""

    start: int
    stop: int


class Ring(Generic[Item]):
    """A block of memory that one producer fills and one consumer empties; several producers take turns by a lock.

    Parameters
    ----------
    n_bytes : int
        Size, rounded up to a multiple of 64.
    device : str
        Where the memory lies.
    is_shared : bool
        Whether another process is to map the memory, in which case it is populated and `fd` is its descriptor.
    linger_s : float
        For so long the consumer waits for more than a little.
    argument : str
        What its size is called where the user gives it, for messages.

    Attributes
    ----------
    n_bytes : int
    memory : Memory
        What the slots lie in.
    fd : int or None
    linger_s : float
    stall_s : float
        How long producers have waited for space.
    peak_bytes : int
        Most bytes in use at a time.
    """

    def __init__(
        self,
        n_bytes: int = RING_BYTES,
        *,
        device: str = "cpu",
        is_shared: bool = False,
        linger_s: float = LINGER_S,
        argument: str = "host_ring_bytes",
    ) -> None:
        if n_bytes < ALIGNMENT_BYTES:
            raise ArgumentError(f"{argument}: expected at least {ALIGNMENT_BYTES}, got {n_bytes}")
        self.stall_s, self.peak_bytes = 0.0, 0
        self.fd: int | None = None
        try:
            self.fd = Memory.share(n_bytes) if is_shared else None
            self.memory = Memory(n_bytes, device=device, fd=self.fd)
        except (RuntimeError, TypeError, OSError, OverflowError) as error:  # for the machine; for 64 bits
            self._close_fd()
            raise ArgumentError(
                f"{argument}: expected no more memory than there is, got {n_bytes}; 256 MiB usually do"
            ) from error
        self._argument = argument
        self.n_bytes, self.linger_s = self.memory.n_bytes, linger_s
        #: Views of the memory, and a copy into it, from a position; see `Memory`.
        self.view, self.array, self.copy_in = self.memory.view, self.memory.array, self.memory.copy_in
        self._worthwhile_bytes = min(_WORTHWHILE_BYTES, int(self.n_bytes * _WORTHWHILE_SHARE))
        self._items: deque[tuple[Item, int]] = deque()
        self._taken = 0
        self._released = 0
        self._is_pressed = self._is_closed = self._is_aborted = False
        self._lock = threading.Lock()
        self._space, self._work = Signal(), Signal()

    # What anybody may ask.

    @property
    def n_used(self) -> int:
        """Bytes in use: reserved, published or taken, and not yet released."""
        with self._lock:
            return self._head() - self._released

    @property
    def fill(self) -> float:
        """Share of the ring in use."""
        return self.n_used / self.n_bytes

    @property
    def is_aborted(self) -> bool:
        """Whether the consumer has gone."""
        return self._is_aborted

    # The producer's side.

    def reserve(self, n_bytes: int) -> Slot | None:
        """Wait for a contiguous slot of `n_bytes`; it is taken when it is published.

        Returns
        -------
        Slot or None
            None if the consumer has gone.

        Raises
        ------
        ArgumentError
            If the ring could never hold it.
        """
        needed = aligned(n_bytes)
        if needed > self.n_bytes:
            raise ArgumentError(
                f"a slot of {n_bytes} bytes does not fit a ring of {self.n_bytes}; raise {self._argument}"
            )
        slot = self._place(needed)
        return self._wait_for_place(needed) if slot is None and not self._is_aborted else slot

    def publish(self, item: Item, slot: Slot | None = None) -> None:
        """Hand over `item`, and the filled `slot` it speaks of."""
        with self._lock:
            stop = self._head() if slot is None else slot.stop
            self._items.append((item, stop))
            self.peak_bytes = max(self.peak_bytes, stop - self._released)
            wakes = len(self._items) == 1 or stop - self._taken >= self._worthwhile_bytes
        if wakes:
            self._work.set()

    def press(self) -> None:
        """Let the consumer take what there is, without waiting for more."""
        self._is_pressed = True
        self._work.set()

    def replace_last(self, old: Item, new: Item) -> bool:
        """Put `new` in the place of `old`, an item without a slot, if that came last and was not taken yet."""
        with self._lock:
            if not self._items or self._items[-1][0] is not old:
                return False
            self._items[-1] = (new, self._items[-1][1])
            return True

    def free(self) -> None:
        """Give the memory back; nothing but the counts may be asked for afterwards."""
        self.memory.free()
        self._close_fd()

    def close(self) -> None:
        """Say that nothing more will be published."""
        self._is_closed = True
        self._work.set()

    def abort(self) -> None:
        """Give up: producers that wait return with nothing, and so does the consumer."""
        self._is_aborted = self._is_closed = True
        self._work.set()
        self._space.set()

    # The consumer's side.

    def take(self, max_bytes: int, *, wait: bool = True) -> list[Item]:
        """Take items in order, as many as come with `max_bytes` of slots but at least one.

        Parameters
        ----------
        max_bytes : int
        wait : bool
            Whether to wait for something worth taking: a good part of the ring, whatever there is after `linger_s`, or
            anything while a producer waits for space.

        Returns
        -------
        list
            Empty if there is nothing worth taking: at once without `wait`, else only after `close` or `abort`.
        """
        if wait:
            self._wait_for_items()
        elif not self._is_worthwhile():
            return []
        with self._lock:
            self._is_pressed = False
            taken: list[Item] = []
            first = self._taken
            while (
                self._items and not self._is_aborted and (not taken or self._items[0][1] - first <= max_bytes)
            ):
                item, stop = self._items.popleft()
                self._taken = max(self._taken, stop)
                taken.append(item)
        return taken

    @property
    def position(self) -> int:
        """Position behind everything taken so far, for `release`."""
        return self._taken

    def release(self, position: int) -> None:
        """Give back all slots before `position`."""
        with self._lock:
            self._released = max(self._released, position)
        self._space.set()

    # Inside.

    def _close_fd(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def _head(self) -> int:
        """Position behind the last published slot."""
        items = self._items
        return max(items[-1][1] if items else self._taken, self._released)

    def _place(self, needed: int) -> Slot | None:
        with self._lock:
            if self._is_aborted:
                return None
            head = self._head()
            if head == self._released:
                # Empty: begin again at the start of the memory, part of which is still in the cache.
                head = self._taken = self._released = math.ceil(head / self.n_bytes) * self.n_bytes
            room = self.n_bytes - head % self.n_bytes
            start = head if needed <= room else head + room
            fits = start + needed - self._released <= self.n_bytes
            return Slot(start, start + needed) if fits else None

    def _wait_for_place(self, needed: int) -> Slot | None:
        started = time.monotonic()
        try:
            while (slot := self._place(needed)) is None and not self._is_aborted:
                self.press()
                self._space.wait(RECHECK_S)
            return slot
        finally:
            self.stall_s += time.monotonic() - started

    def _wait_for_items(self) -> None:
        while not self._items and not self._is_closed:
            self._work.wait(RECHECK_S)
        until = time.monotonic() + self.linger_s
        while not self._is_worthwhile() and (left := until - time.monotonic()) > 0:
            self._work.wait(left)

    def _is_worthwhile(self) -> bool:
        if self._is_closed or self._is_pressed:
            return True
        with self._lock:
            return self._head() - self._taken >= self._worthwhile_bytes


class Signal:
    """Wakes one thread that waits, or lets the next one that comes pass.

    Unlike a Condition or an Event it is one lock, so that an interrupt cannot leave it half-way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Wake the thread."""
        if self._lock.locked():
            with contextlib.suppress(RuntimeError):  # another thread was quicker
                self._lock.release()

    def wait(self, timeout_s: float) -> None:
        """Wait to be woken, or for so long."""
        self._lock.acquire(timeout=timeout_s)
