"""The rings of one capture: that in host memory, which the drain empties, and one on each GPU, emptied into it.

As long as all values are in host memory, hooks write to the host's ring themselves. With the first value on a GPU a
thread, the mover, takes over: everything then goes through the rings of the devices, numbered, and the mover alone
fills the host's ring, in the order of the numbers. It waits for what has to be waited for: copies, and space.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.errors import DrainError
from strapfmt.schema import SiteSpec
from strapfmt_capture.device_ring import GPU_RING_BYTES, CudaStreams, DeviceRing, Entry, Streams
from strapfmt_capture.items import Annotation, Boundary, Events, Item, StepEnd
from strapfmt_capture.ring import Ring, Signal, Slot
from strapfmt_capture.small_values import Gatherer
from strapfmt_capture.spill import Spill
from strapfmt_capture.turn import Values

__all__ = ["FULL_SHARE", "Rings", "streams_of"]

# When more than this share is in use, a ring counts as full: the rest is for a step that has begun.
FULL_SHARE = 1 / 2

# Moved at a time: large enough that the pause between two moves does not count.
_RUN_BYTES = 32 << 20
_RECHECK_S = 1.0
_PATIENCE_S = 2.0


def streams_of(device: torch.device) -> Streams | None:
    """Return the streams of a device that works beside the host; None for one whose values are simply copied."""
    return CudaStreams(device) if device.type == "cuda" else None


class Rings:
    """Where hooks put values, wherever these are.

    Parameters
    ----------
    host : Ring
        Emptied by the drain.
    gpu_ring_bytes : int
        Size of the ring on each GPU.
    streams : callable, optional
        In place of `streams_of`.

    Attributes
    ----------
    host : Ring
    devices : dict of torch.device to DeviceRing
        The rings that there are besides.
    spill : Spill or None
        Where things go while the host's ring is full; set before the first is published.
    is_pinned : bool or None
        Whether the host's ring could be locked for the GPU; None as long as there is none.
    """

    def __init__(
        self,
        host: Ring[Item],
        *,
        gpu_ring_bytes: int = GPU_RING_BYTES,
        streams: Callable[[torch.device], Streams | None] | None = None,
    ) -> None:
        self.host = host
        self.devices: dict[torch.device, DeviceRing[Item]] = {}
        self.spill: Spill | None = None
        #: That of the host, or the one of what is spilled.
        self._sink: Ring[Any] = host
        self.is_pinned: bool | None = None
        self._gpu_ring_bytes, self._streams = gpu_ring_bytes, streams or streams_of
        self._by_device: dict[torch.device, Ring[Any]] = {}
        self._numbers = itertools.count()
        self._n_numbered = 0
        self._work = Signal()
        self._small = Gatherer()
        self._mover: threading.Thread | None = None
        self._is_closed = False
        self._failure: BaseException | None = None
        self._unpin: Callable[[], None] | None = None

    # The producer's side.

    def publish(self, item: Item) -> None:
        """Hand over what holds no values."""
        self._small.flush()
        first = next(iter(self.devices.values()), None)
        if first is None:
            self._sink.publish(item)
        else:
            first.add(item)
            if isinstance(item, StepEnd | Events | Boundary | Annotation):
                self.mark()

    def flush(self) -> None:
        """Hand over small values that were gathered."""
        self._small.flush()

    def put(self, ring: Ring[Any], values: Values, slot: Slot) -> None:
        """Hand over values, in a slot of the ring that `of` gave."""
        if isinstance(ring, DeviceRing):
            ring.add(values, slot)
        else:
            ring.publish(values, slot)

    def of(self, device: torch.device) -> Ring[Any]:
        """Return the ring for values on `device`, on that device if it works beside the host."""
        self._small.flush()
        ring = self._by_device.get(device)
        if ring is self.host:
            return self._sink
        return self._opened(device) if ring is None else ring

    def has_room(self, n_bytes: int, rows: npt.NDArray[np.int64]) -> bool:
        """Whether a small value in host memory, one of these rows, can be given to `add_small` now."""
        return not self.devices and self._small.has_room(self._sink, n_bytes, rows)

    def add_small(self, spec: SiteSpec, x: torch.Tensor, n_bytes: int) -> None:
        """Copy a contiguous tensor in host memory, for which `has_room` has made room."""
        self._small.add(spec, x, n_bytes)

    def divert(self, is_full: bool) -> bool:
        """Let what comes next be spilled, if the host's ring is full, or go there again; return which.

        Values on a GPU are spilled by the mover, when it finds the host's ring full.
        """
        if self.spill is None or self.devices:
            return False
        self._divert(self.spill, is_full)
        return is_full

    def _divert(self, spill: Spill, is_full: bool) -> None:
        if is_full:
            self._sink = spill.ring
        elif self._sink is not self.host:
            spill.settle()
            self._sink = self.host

    def mark(self) -> None:
        """Let the rings of the devices be emptied up to here."""
        for ring in self.devices.values():
            ring.mark()
        if self.devices:
            self._work.set()

    @property
    def most_bytes(self) -> int:
        """Bytes of the smallest ring, the most that a slot may have."""
        return min([self.host.n_bytes, *(ring.n_bytes for ring in self.devices.values())])

    @property
    def n_used(self) -> int:
        """Bytes in use in all rings; those on their way from one to another count in both."""
        spilling = 0 if self.spill is None else self.spill.ring.n_used
        return self.host.n_used + spilling + sum(ring.n_used for ring in self.devices.values())

    @property
    def fill(self) -> float:
        """Share in use of the ring that is fullest."""
        return max([self.host.fill, *(ring.fill for ring in self.devices.values())])

    @property
    def peak_fill(self) -> float:
        """Largest share in use at a time of the ring that was fullest."""
        rings: list[Ring[Any]] = [self.host, *self.devices.values()]
        return max(ring.peak_bytes / ring.n_bytes for ring in rings)

    @property
    def stall_s(self) -> float:
        """How long the model has waited for space."""
        rings: list[Ring[Any]] = [*self.devices.values()] or [
            self.host,
            *([self.spill.ring] if self.spill else []),
        ]
        return sum(ring.stall_s for ring in rings)

    def check(self) -> None:
        """Raise what has stopped the mover, if anything has.

        Raises
        ------
        DrainError
            With the failure as its cause.
        """
        if self._failure is not None:
            raise DrainError(
                f"moving values from the GPU to host memory failed ({type(self._failure).__name__}: {self._failure}); "
                "what was committed before can be read"
            ) from self._failure

    def finish(self) -> None:
        """Move what is left, and end the mover."""
        self.mark()
        self._is_closed = True
        self._work.set()
        if self._mover is not None:
            self._mover.join()
        self.check()

    def abort(self) -> None:
        """End the mover without moving any more."""
        for ring in self.devices.values():
            ring.abort()
        self._is_closed = True
        self._work.set()
        if self._mover is not None:
            self._mover.join(_PATIENCE_S)

    def free(self) -> None:
        """Give the memory back, unless something still uses it."""
        if self._mover is not None and self._mover.is_alive():
            return
        for ring in self.devices.values():
            ring.free()
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self.host.free()

    # Inside.

    def _opened(self, device: torch.device) -> Ring[Any]:
        streams = self._streams(device)
        if streams is None:
            if not self.devices:
                self._by_device[device] = self.host
                return self._sink
            streams = _HostStreams()  # a model that lies partly in host memory
        elif self.is_pinned is None:
            self._pin(streams)
        if self.spill is not None:
            self._divert(self.spill, False)
        ring: DeviceRing[Item] = DeviceRing(
            self._gpu_ring_bytes, device, streams, next_number=self._number, mark_all=self.mark
        )
        self.devices[device] = ring
        self._by_device = dict(self.devices)
        if self._mover is None:
            self._mover = threading.Thread(target=self._run, name="strapfmt-mover", daemon=True)
            self._mover.start()
        return ring

    def _pin(self, streams: Streams) -> None:
        try:
            self._unpin = streams.pin(self.host.memory.tensor)
        except RuntimeError:  # the report says so; copies are slower and hold up the mover only
            self.is_pinned = False
        else:
            self.is_pinned = True

    def _number(self) -> int:
        self._n_numbered = number = next(self._numbers)
        return number

    def _run(self) -> None:
        try:
            self._move_all()
        except BaseException as error:  # noqa: BLE001 - raised where the user waits, by check()
            self._failure = error
            self.host.abort()
        finally:
            for ring in self.devices.values():
                ring.abort()

    def _move_all(self) -> None:
        waiting = _Waiting()
        run_bytes = min(_RUN_BYTES, self.host.n_bytes // 4)
        while True:
            is_last = self._is_closed
            # Everything up to this number has been published: nothing that comes later belongs before it.
            limit = self._n_numbered
            rings = list(self.devices.values())
            for ring in rings:
                waiting.add(ring, ring.take_now())
            for run in _runs(waiting.ready(limit), run_bytes):
                if not self._move(run):
                    return
            if is_last:
                return
            self._work.wait(_RECHECK_S)

    def _move(self, run: _Run) -> bool:
        """Move neighbours in one ring to the host's ring; False if the drain has gone."""
        start, stop = run.start, run.stop
        if self.spill is not None:
            self._divert(self.spill, self.host.fill > FULL_SHARE)
        sink = self._sink
        slot = sink.reserve(stop - start)
        if slot is None:
            return False
        if stop > start:
            streams = run.ring.streams
            source = run.ring.view(start, torch.uint8, (stop - start,))
            target = sink.view(slot.start, torch.uint8, (stop - start,))
            streams.wait(streams.fetch(source, target, run.marks))
            run.ring.release(stop)
        for entry in run.entries:
            if entry.slot is None:
                assert entry.item is not None
                sink.publish(entry.item)
                continue
            values, offset = entry.item, slot.start - start
            assert isinstance(values, Values)
            values.memory, values.start = sink.memory, values.start + offset
            sink.publish(values, Slot(entry.slot.start + offset, entry.slot.stop + offset))
        return True


@dataclass(slots=True)
class _Marked:
    """An entry that may be fetched, its ring, and the mark behind it."""

    ring: DeviceRing[Item]
    entry: Entry[Item]
    mark: Any


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
                    heapq.heappush(self._marked, (each.number, _Marked(ring, each, entry.mark)))
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
    marks: list[Any] = field(default_factory=list)  # behind what each of its slots was filled by

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
            if not self.marks or self.marks[-1] is not marked.mark:
                self.marks.append(marked.mark)
            self.start, self.stop = (slot.start if is_first else self.start), slot.stop
        self.entries.append(marked.entry)
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


class _HostStreams:
    """Host memory beside a GPU: what was copied is there."""

    def current(self) -> int:
        return 0

    def mark(self, stream: Any) -> int:
        return 0

    def fetch(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Any]) -> int:
        target.copy_(source)
        return 0

    def wait(self, event: Any) -> None:
        """Return at once."""

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        raise RuntimeError("host memory is not pinned for the host")
