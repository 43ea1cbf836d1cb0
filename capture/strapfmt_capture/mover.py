"""The mover: a thread that empties the rings of the devices into that in host memory, in the order of their items.

Items are numbered as they are put into any of the rings, and leave in the order of the numbers. It is the mover that
waits for what has to be waited for: copies, and space; and with a little to move for more, as each turn it takes costs
the model's thread a little.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from strapfmt_capture.device_ring import DeviceRing, Entry
from strapfmt_capture.failures import stopped
from strapfmt_capture.items import Item
from strapfmt_capture.ring import RECHECK_S, Ring, Signal, Slot
from strapfmt_capture.turn import Values

__all__ = ["Mover"]

# Moved at a time: large enough that the pause between two moves does not count.
_RUN_BYTES = 32 << 20
_PATIENCE_S = 2.0


class Mover:
    """Moves everything from the rings of the devices to host memory, once it was started.

    Parameters
    ----------
    host : Ring
        Aborted if moving fails.

    Attributes
    ----------
    rings : mapping of torch.device to DeviceRing
        The rings of the devices; exchanged for a larger one when there is another.
    """

    def __init__(self, host: Ring[Item]) -> None:
        self._host = host
        self.rings: Mapping[torch.device, DeviceRing[Item]] = {}
        self._run_bytes = min(_RUN_BYTES, host.n_bytes // 4)
        self._numbers = itertools.count()
        self._n_numbered = 0
        self._work = Signal()
        self._thread: threading.Thread | None = None
        self._is_closed = self._has_ended = False
        #: Whether anything may be moved, and whether it should be at once.
        self._is_marked = self._is_pressed = False
        self._failure: BaseException | None = None

    def start(self, next_sink: Callable[[], Ring[Any]]) -> None:
        """Begin, unless it has; where it has ended, end the rings that were opened since.

        Parameters
        ----------
        next_sink : callable
            Returns the ring in host memory for what is moved next. Held by the thread alone: memory is given back with
            its last name, not by the garbage collector.
        """
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, args=(next_sink,), name="strapfmt-mover", daemon=True
            )
            self._thread.start()
        if self._has_ended:
            self._abort_rings()

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def number(self) -> int:
        """Return the next item's number."""
        self._n_numbered = number = next(self._numbers)
        return number

    def mark(self, *, is_urgent: bool = True) -> None:
        """Let the rings be emptied up to here, now; else when they hold a good deal, or after a while."""
        rings = self.rings.values()
        for ring in rings:
            ring.mark()
        if is_urgent or any(ring.is_worth_moving for ring in rings):
            self._is_pressed = True
        if rings and (self._is_pressed or not self._is_marked):
            self._is_marked = True
            self._work.set()

    def settle(self) -> None:
        """Return when nothing is under way on the devices; what is published meanwhile by others may be."""
        self.mark()
        for ring in self.rings.values():
            ring.wait_until_empty()

    def check(self) -> None:
        """Raise what has stopped it, if anything has.

        Raises
        ------
        DrainError
            With the failure as its cause.
        """
        if self._failure is not None:
            raise stopped(
                "moving values from the GPU to host memory failed", self._failure
            ) from self._failure

    def finish(self) -> None:
        """Move what is left, and end the thread."""
        self.mark()
        self._is_closed = True
        self._work.set()
        if self._thread is not None:
            self._thread.join()
        self.check()

    def abort(self) -> None:
        """End the thread without moving any more."""
        self._abort_rings()
        self._is_closed = True
        self._work.set()
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)

    def _run(self, next_sink: Callable[[], Ring[Any]]) -> None:
        try:
            self._move_all(next_sink)
        except BaseException as error:  # noqa: BLE001 - raised where the user waits, by check()
            self._failure = error
            self._host.abort()
        finally:
            self._has_ended = True  # before that: a ring that is opened meanwhile is ended here or by `start`
            self._abort_rings()

    def _abort_rings(self) -> None:
        for ring in self.rings.values():
            ring.abort()

    def _move_all(self, next_sink: Callable[[], Ring[Any]]) -> None:
        waiting = _Waiting()
        while True:
            is_last = self._is_closed
            # Everything up to this number has been published: nothing that comes later belongs before it.
            limit = self._n_numbered
            rings = list(self.rings.values())
            for ring in rings:
                waiting.add(ring, ring.take_now())
            for run in _runs(waiting.ready(limit), self._run_bytes):
                if not run.move(next_sink()):
                    return
            if is_last:
                return
            self._wait_for_work()

    def _wait_for_work(self) -> None:
        if not self._is_marked:
            self._work.wait(RECHECK_S)  # a mark that an interrupt has kept from being told is found then
        until = time.monotonic() + self._host.linger_s
        while self._is_marked and not (self._is_pressed or self._is_closed):
            if (left := until - time.monotonic()) <= 0:
                break
            self._work.wait(left)
        self._is_marked = self._is_pressed = False  # before anything is taken: what comes later says so again


@dataclass(slots=True)
class _Marked:
    """An entry that may be fetched, its ring, and the entry that marks it."""

    ring: DeviceRing[Item]
    entry: Entry[Item]
    mark: Entry[Item]


class _Waiting:
    """Entries that were taken out of the rings and not moved yet, because no mark or an earlier one is missing."""

    def __init__(self) -> None:
        self._unmarked: dict[int, list[Entry[Item]]] = {}
        self._marked: list[tuple[int, _Marked]] = []

    def add(self, ring: DeviceRing[Item], entries: Iterable[Entry[Item]]) -> None:
        """Take in what one ring gave."""
        unmarked = self._unmarked.setdefault(id(ring), [])
        for entry in entries:
            if entry.item is not None:
                unmarked.append(entry)
            else:
                for each in unmarked:
                    heapq.heappush(self._marked, (each.number, _Marked(ring, each, entry)))
                unmarked.clear()

    def ready(self, limit: int) -> Iterator[_Marked]:
        """Yield what may be moved, in order: before anything that is not marked, and up to the number `limit`."""
        first = min((entries[0].number for entries in self._unmarked.values() if entries), default=limit + 1)
        while self._marked and self._marked[0][0] < min(first, limit + 1):
            yield heapq.heappop(self._marked)[1]


@dataclass(slots=True)
class _Run:
    """Entries of one ring whose slots are neighbours in memory; `start` and `stop` are equal if there are none."""

    ring: DeviceRing[Item]
    max_bytes: int
    entries: list[Entry[Item]] = field(default_factory=list)
    start: int = 0
    stop: int = 0
    marked: list[Entry[Item]] = field(default_factory=list)  # the last of each stretch on one stream

    @property
    def marks(self) -> list[Any]:
        """Events behind what its slots were filled by."""
        return [entry.mark for entry in self.marked]

    def takes(self, marked: _Marked) -> bool:
        """Add an entry if it belongs here."""
        slot = marked.entry.slot
        if slot is not None:
            if marked.ring is not self.ring and self.stop > self.start:
                return False
            is_first = self.stop == self.start
            if not is_first and (slot.start != self.stop or self.stop % self.ring.n_bytes == 0):
                return False
            if not is_first and slot.stop - self.start > self.max_bytes:
                return False
            self.ring = marked.ring
            if self.marked and self.marked[-1].stream == marked.mark.stream:
                self.marked.pop()
            self.marked.append(marked.mark)
            self.start, self.stop = (slot.start if is_first else self.start), slot.stop
        self.entries.append(marked.entry)
        return True

    def move(self, sink: Ring[Any]) -> bool:
        """Copy and publish them in a ring in host memory; False if the drain has gone."""
        start, stop = self.start, self.stop
        slot = sink.reserve(stop - start)
        if slot is None:
            return False
        if stop > start:
            streams = self.ring.streams
            source = self.ring.view(start, torch.uint8, (stop - start,))
            target = sink.view(slot.start, torch.uint8, (stop - start,))
            streams.wait(streams.fetch(source, target, self.marks))
            self.ring.release(stop)
        for entry in self.entries:
            if entry.slot is None:
                assert entry.item is not None
                sink.publish(entry.item)
                continue
            values, offset = entry.item, slot.start - start
            assert isinstance(values, Values)
            values.memory, values.start = sink.memory, values.start + offset
            sink.publish(values, Slot(entry.slot.start + offset, entry.slot.stop + offset))
        return True


def _runs(marked: Iterable[_Marked], max_bytes: int) -> Iterator[_Run]:
    run: _Run | None = None
    for each in marked:
        if run is None or not run.takes(each):
            if run is not None:
                yield run
            run = _Run(each.ring, max_bytes)
            run.takes(each)
    if run is not None:
        yield run
