"""Small values of a pass, gathered in one slot: in decoding, a slot for each would cost more than the copy."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.schema import SiteSpec
from strapfmt_capture.items import Item
from strapfmt_capture.memory import Memory, aligned
from strapfmt_capture.ring import Bundle, Ring, Slot
from strapfmt_capture.turn import Values

__all__ = ["Gathered", "Gatherer"]

# Room for so many values of the first one's size, until it is known how many there are.
_FIRST_VALUES = 16
_RING_SHARE = 8

# As `ctypes.memmove`, which gives other threads the chance to run, and has the model's thread wait for them.
_copy = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


class Gathered(Bundle[Item]):
    """Values of several sites at the same rows; as items they are `Values`."""

    __slots__ = ("_entries", "_memory", "_rows")

    def __init__(
        self, memory: Memory, rows: npt.NDArray[np.int64], entries: list[tuple[SiteSpec, int, int]]
    ) -> None:
        self._memory, self._rows, self._entries = memory, rows, entries

    def __iter__(self) -> Iterator[Item]:
        for spec, start, call in self._entries:
            yield Values(
                spec=spec,
                dtype=spec.stored_dtype.torch,
                shape=spec.shape,
                n_rows=len(self._rows),
                memory=self._memory,
                start=start,
                rows=self._rows,
                token_row=None,
                call=call,
            )


class Gatherer:
    """Copies values to one slot of a ring, one behind the other, and publishes them together.

    As a slot that was reserved and not published is given to the next who asks, `flush` has to come before anything
    else is asked of the ring.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[SiteSpec, int, int]] = []
        self._rows = np.empty(0, np.int64)
        self._ring: Ring[Item] | None = None
        self._start = self._used = self._room = self._address = 0
        self._last_used = 0

    def has_room(self, ring: Ring[Item], n_bytes: int, rows: npt.NDArray[np.int64]) -> bool:
        """Make room for a value of these rows; False if it is no small one, or the consumer has gone."""
        if self._used + n_bytes <= self._room and rows is self._rows:
            return True
        self.flush()
        most = ring.n_bytes // _RING_SHARE
        room = min(max(self._last_used, _FIRST_VALUES * aligned(n_bytes)), most)
        slot = ring.reserve(room) if n_bytes <= room else None
        if slot is None:
            return False
        self._ring, self._rows, self._entries = ring, rows, []
        self._start, self._used, self._room = slot.start, 0, room
        self._address = ring.memory.address_of(slot.start)
        return True

    def add(self, spec: SiteSpec, x: torch.Tensor, n_bytes: int, call: int) -> None:
        """Copy contiguous host memory; there is room for it."""
        used = self._used
        _copy(self._address + used, x.data_ptr(), n_bytes)
        self._used = used + aligned(n_bytes)
        self._entries.append((spec, self._start + used, call))

    def flush(self) -> None:
        """Publish what was gathered."""
        ring, self._ring = self._ring, None
        if ring is not None:
            used, self._room = self._used, 0
            self._last_used = max(used, self._last_used)
            if self._entries:
                bundle = Gathered(ring.memory, self._rows, self._entries)
                ring.publish(bundle, Slot(self._start, self._start + used))
