"""A ring on a GPU, and the streams that copy out of it, so that the model's own stream never waits for the host.

The hook copies device to device on whatever stream the model uses. From time to time a mark (an event) is recorded
behind these copies; what lies before a mark may be fetched. A side stream waits for the mark and copies to pinned host
memory, and only when the host has seen that copy end is the slot given back. So a slot is never written while it is
read, and neither stream waits for the other but through events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from strapfmt_capture.ring import RECHECK_S, Ring, Slot

__all__ = ["GPU_RING_BYTES", "CudaStreams", "DeviceRing", "Entry", "HostStreams", "Streams", "streams_of"]

GPU_RING_BYTES = 256 << 20
# A mark is recorded behind so many bytes, besides at the end of every step. Larger transfers gain nothing, and
# hold up the model's own.
_MARK_BYTES = 8 << 20

Item = TypeVar("Item")


class Streams(Protocol):
    """What a device does in order, and how the host follows it."""

    def current(self) -> Any:
        """Return the stream that the model uses now; streams that are the same compare equal."""

    def mark(self, stream: Any) -> Any:
        """Return an event behind everything that `stream` was given so far."""

    def fetch(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Any]) -> Any:
        """Begin to copy `source` to host memory, once the events `after` have come; return the end as an event."""

    def wait(self, event: Any) -> None:
        """Wait for an event, while other Python threads run."""

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        """Lock host memory, so that copies to it run beside the model; return what unlocks it."""


class CudaStreams:
    """The streams of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def current(self) -> torch.cuda.Stream:
        """Return the stream that the model uses now."""
        return torch.cuda.current_stream(self._device)

    def mark(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """Return an event behind everything that `stream` was given so far."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def fetch(
        self, source: torch.Tensor, target: torch.Tensor, after: Sequence[torch.cuda.Event]
    ) -> torch.cuda.Event:
        """Begin to copy in pieces, between which transfers of the model's own find their turn."""
        # The thread that calls this has a current device of its own, which may be another one.
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            end = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            for event in after:
                self._side.wait_event(event)
            for start in range(0, len(source), _MARK_BYTES):
                some = slice(start, start + _MARK_BYTES)
                target[some].copy_(source[some], non_blocking=True)
            end.record(self._side)
        return end

    def wait(self, event: torch.cuda.Event) -> None:
        """Wait for an event, while other Python threads run."""
        event.synchronize()

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        """Register host memory with CUDA.

        Raises
        ------
        RuntimeError
            If the driver refuses (too much memory locked).
        """
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device):
            error = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
            if error != 0:
                # CUDA keeps the error for whoever asks next, which would be the model.
                with suppress(RuntimeError):
                    torch.empty(1, device=self._device).fill_(0)
        if error != 0:
            raise RuntimeError(f"cudaHostRegister of {memory.nbytes} bytes failed with CUDA error {error}")

        def unpin() -> None:
            with torch.cuda.device(self._device):
                runtime.cudaHostUnregister(memory.data_ptr())

        return unpin


class HostStreams:
    """Host memory beside a GPU: what was copied is there."""

    def current(self) -> int:
        """Return the stream that the model uses now, of which there is one."""
        return 0

    def mark(self, stream: Any) -> int:
        """Return what stands for an event that has come."""
        return 0

    def fetch(self, source: torch.Tensor, target: torch.Tensor, after: Sequence[Any]) -> int:
        """Copy."""
        target.copy_(source)
        return 0

    def wait(self, event: Any) -> None:
        """Return at once."""

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        """Refuse."""
        raise RuntimeError("host memory is not pinned for the host")


def streams_of(device: torch.device) -> Streams | None:
    """Return the streams of a device that works beside the host; None for one whose values are simply copied."""
    return CudaStreams(device) if device.type == "cuda" else None


@dataclass(slots=True)
class Entry(Generic[Item]):
    """An item in a device's ring; `number` orders the items of all rings.

    Without an item it says that `mark` was recorded, on `stream`, behind those before it.
    """

    number: int
    item: Item | None
    slot: Slot | None
    mark: Any = None
    stream: Any = None


class DeviceRing(Ring[Entry[Item]]):
    """A `Ring` on a device, whose consumer copies slots to the host.

    Parameters
    ----------
    n_bytes : int
    device : torch.device
    streams : Streams
    next_number : callable
        Gives each item its place among those of all rings.
    mark_all : callable
        Calls `mark` of all rings: the items of one wait for those before them in another.
    """

    def __init__(
        self,
        n_bytes: int,
        device: torch.device,
        streams: Streams,
        *,
        next_number: Callable[[], int],
        mark_all: Callable[[], None],
    ) -> None:
        super().__init__(n_bytes, device=str(device), argument="gpu_ring_bytes")
        self.streams = streams
        self._next_number, self._mark_all = next_number, mark_all
        self._stream: Any = None
        self._n_unmarked, self._n_unmarked_bytes = 0, 0

    def add(self, item: Item, slot: Slot | None = None) -> None:
        """Hand over `item`, and the `slot` that the stream in use was told to fill."""
        if slot is not None:
            stream = self.streams.current()
            if self._stream is not None and stream != self._stream:
                self.mark()  # on the one that was used up to here
            self._stream = stream
            self._n_unmarked_bytes += slot.stop - slot.start
        self._n_unmarked += 1
        self.publish(Entry(self._next_number(), item, slot), slot)
        if self._n_unmarked_bytes >= _MARK_BYTES:
            self._mark_all()

    def mark(self) -> None:
        """Say that everything so far may be fetched once the stream has come to here."""
        if self._n_unmarked:
            mark = None if self._stream is None else self.streams.mark(self._stream)
            self.publish(Entry(self._next_number(), None, None, mark, self._stream))
            self._stream, self._n_unmarked, self._n_unmarked_bytes = None, 0, 0

    @property
    def is_worth_moving(self) -> bool:
        """Whether there is enough in it to be moved at once."""
        return self.n_used >= self._worthwhile_bytes

    def wait_until_empty(self) -> None:
        """Return when all that was marked has been moved, or nobody moves it any more."""
        while self.n_used and not self.is_aborted:
            self._space.wait(RECHECK_S)

    def take_now(self) -> list[Entry[Item]]:
        """Take whatever there is, without waiting."""
        return self.take(2 * self.n_bytes, wait=False)  # what is skipped at the end of the memory counts

    def _is_worthwhile(self) -> bool:
        return True

    def _wait_for_place(self, needed: int) -> Slot | None:
        self._mark_all()
        return super()._wait_for_place(needed)
