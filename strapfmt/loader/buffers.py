"""Memory for batches that is used again once nobody holds it: fresh pages cost several times the copy into them."""

import sys

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Buffers"]

_KEPT = 4


class Buffers:
    """Hands out uninitialised tensors, in memory of earlier ones where those are gone.

    `torch.from_numpy` keeps its array alive as long as any tensor, view or array shares the memory, so the reference
    count of the array says whether it is free.
    """

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a contiguous tensor whose memory nothing else uses."""
        n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        array = self._free(n_bytes)
        if array is None:
            array = np.empty(n_bytes, np.uint8)
            self._arrays = [*self._arrays[1 - _KEPT :], array]
        return torch.from_numpy(array[:n_bytes]).view(dtype).view(shape)

    def _free(self, n_bytes: int) -> NDArray[np.uint8] | None:
        for number in range(len(self._arrays)):
            fits = n_bytes <= len(self._arrays[number]) <= 2 * n_bytes
            if fits and _HAS_EXACT_COUNTS and _references(self._arrays, number) == _REFERENCES_IF_FREE:
                return self._arrays[number]
        return None


def _references(arrays: list[NDArray[np.uint8]], number: int) -> int:
    return sys.getrefcount(arrays[number])


_REFERENCES_IF_FREE = _references([np.empty(1, np.uint8)], 0)
_HAS_EXACT_COUNTS = bool(getattr(sys, "_is_gil_enabled", lambda: True)())
