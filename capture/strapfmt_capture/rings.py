"""The rings of one capture: that in host memory, which the drain empties, and one on each GPU, emptied into it.

As long as all values are in host memory, hooks write to the host's ring themselves. With the first value on a GPU the
mover takes over: everything then goes through the rings of the devices, and the mover alone fills the host's ring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.schema import SiteSpec
from strapfmt_capture.device_ring import GPU_RING_BYTES, DeviceRing, HostStreams, Streams, streams_of
from strapfmt_capture.items import Annotation, Boundary, Events, Item, StepEnd
from strapfmt_capture.mover import Mover
from strapfmt_capture.ring import Ring, Slot
from strapfmt_capture.small_values import Gatherer
from strapfmt_capture.spill import Spill
from strapfmt_capture.turn import Values

__all__ = ["FULL_SHARE", "Rings"]

# When more than this share is in use, a ring counts as full: the rest is for a step that has begun.
FULL_SHARE = 1 / 2


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
        The rings that there are besides. Exchanged for a larger one when there is another, as other threads look at it.
    spill : Spill or None
        Where things go while the host's ring is full; set before the first is published.
    is_pinned : bool or None
        Whether the host's ring, and that of what is spilled, could be locked for the GPU; None as long as
        there is none.
    pin_refusal : str or None
        Why not.
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
        self.pin_refusal: str | None = None
        self._gpu_ring_bytes, self._streams = gpu_ring_bytes, streams or streams_of
        self._by_device: dict[torch.device, Ring[Any]] = {}
        self._small = Gatherer()
        self._mover = Mover(host)
        #: Let the rings of the devices be emptied up to here, wait for it, raise what has stopped it: see `Mover`.
        self.mark, self.settle, self.check = self._mover.mark, self._mover.settle, self._mover.check
        self._unpin: list[Callable[[], None]] = []

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
                self.mark(is_urgent=isinstance(item, Boundary) and item.is_urgent)

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

    def divert(self, is_full: bool) -> None:
        """Let what comes next be spilled, if the host's ring is full and there is a place for it, or go there again.

        Values on a GPU are spilled by the mover, when it finds the host's ring full.
        """
        if self.spill is not None and not self.devices:
            self._divert(self.spill, is_full)

    def _divert(self, spill: Spill, is_full: bool) -> None:
        if is_full:
            self._sink = spill.ring
        elif self._sink is not self.host:
            spill.settle()
            self._sink = self.host

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

    def finish(self) -> None:
        """Move what is left, and end the mover."""
        self._mover.finish()

    def abort(self) -> None:
        """End the mover without moving any more."""
        self._mover.abort()

    def free(self) -> None:
        """Give the memory back, unless something still uses it."""
        if self._mover.is_alive:
            return
        for ring in self.devices.values():
            ring.free()
        while self._unpin:
            self._unpin.pop()()
        self.host.free()

    # Inside.

    def _opened(self, device: torch.device) -> Ring[Any]:
        streams = self._streams(device)
        if streams is None:
            if not self.devices:
                self._by_device[device] = self.host
                return self._sink
            streams = HostStreams()  # a model that lies partly in host memory
        elif self.is_pinned is None:
            self._pin(streams)
        if self.spill is not None and not self.devices:  # else the mover does that, by itself
            self._divert(self.spill, False)
        ring: DeviceRing[Item] = DeviceRing(
            self._gpu_ring_bytes, device, streams, next_number=self._mover.number, mark_all=self.mark
        )
        self.devices = self._mover.rings = {**self.devices, device: ring}
        self._by_device = dict(self.devices)
        self._mover.start(self._next_sink)
        self.check()
        return ring

    def _next_sink(self) -> Ring[Any]:
        """Return where the mover is to put what comes next, which it spills while the host's ring is full."""
        if self.spill is not None:
            self._divert(self.spill, self.host.fill > FULL_SHARE)
        return self._sink

    def _pin(self, streams: Streams) -> None:
        rings: list[Ring[Any]] = [self.host, *([] if self.spill is None else [self.spill.ring])]
        try:
            for ring in rings:
                self._unpin.append(streams.pin(ring.memory.tensor))
        except RuntimeError as error:  # the report says so; copies are slower and hold up the mover only
            self.is_pinned, self.pin_refusal = False, str(error)
        else:
            self.is_pinned = True
