"""Small values of a pass, gathered in one slot: in decoding, a slot for each would cost more than the copy."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.schema import SiteSpec
from strapfmt_capture.items import Item
from strapfmt_capture.memory import aligned
from strapfmt_capture.ring import Ring, Slot
from strapfmt_capture.turn import Block

__all__ = ["Gatherer"]

# Room for so many values of the first one's size, until it is known how many there are.
_FIRST_VALUES = 16
_RING_SHARE = 8

# As `ctypes.memmove`, which gives other threads the chance to run, and has the model's thread wait for them.
_copy = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


class Gatherer:
    """Copies values to one slot of a ring, one behind the other, and publishes them together.

    As a slot that was reserved and not published is given to the next who asks, `flush` has to come before anything
    else is asked of the ring.
    """

    def __init__(self) -> None:
        self._specs: list[SiteSpec] = []
        self._rows = np.empty(0, np.int64)
        self._ring: Ring[Item] | None = None
        self._start = self._used = self._room = self._address = 0
        self._last_used = 0

    def has_room(self, ring: Ring[Item], n_bytes: int, rows: npt.NDArray[np.int64]) -> bool:
        """Make room for a value of these rows; False if it is no small one, or the consumer has gone."""
        if self._used + n_bytes <= self._room and rows is self._rows:
            return True
        if self._ring is not None and rows is self._rows:  # more values than it had room for
            self._last_used = 2 * self._room
        self.flush()
        most = ring.n_bytes // _RING_SHARE
        room = min(max(self._last_used, _FIRST_VALUES * aligned(n_bytes)), most)
        slot = ring.reserve(room) if n_bytes <= room else None
        if slot is None:
            return False
        self._ring, self._rows, self._specs = ring, rows, []
        self._start, self._used, self._room = slot.start, 0, room
        self._address = ring.memory.address_of(slot.start)
        return True

    def add(self, spec: SiteSpec, x: torch.Tensor, n_bytes: int) -> None:
        """Copy contiguous host memory; there is room for it."""
        used = self._used
        _copy(self._address + used, x.data_ptr(), n_bytes)
        self._used = used + aligned(n_bytes)
        self._specs.append(spec)

    def flush(self) -> None:
        """Publish what was gathered."""
        ring, self._ring = self._ring, None
        if ring is not None:
            used, self._room = self._used, 0
            self._last_used = max(used, self._last_used)
            if self._specs:
                block = Block(specs=self._specs, memory=ring.memory, start=self._start, rows=self._rows)
                ring.publish(block, Slot(self._start, self._start + used))
