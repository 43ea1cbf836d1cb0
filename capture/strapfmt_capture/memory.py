"""A block of memory that values lie in: views of it for torch and NumPy, and a block that two processes share."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.dtypes import DTYPES
from strapfmt.spec import ALIGNMENT_BYTES

__all__ = ["Memory", "aligned"]

# Making a view and copying to it takes four calls into torch, as long as the copy itself takes up to here.
_SMALL_BYTES = 64 << 10
_DTYPES = [dtype.torch for dtype in DTYPES.values()]


class Memory:
    """Bytes that begin at a multiple of 64; a position beyond their end is one after a number of rounds.

    Parameters
    ----------
    n_bytes : int
        Rounded up to a multiple of 64.
    device : str
        Where it lies.
    fd : int, optional
        The block that `share` made, here or in another process, to be mapped; the descriptor stays the caller's.

    Raises
    ------
    RuntimeError, TypeError, OSError
        If there is not so much memory.
    """

    def __init__(self, n_bytes: int, *, device: str = "cpu", fd: int | None = None) -> None:
        self.n_bytes = aligned(n_bytes)
        # Memory from inside inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            if fd is None:
                block = torch.empty(self.n_bytes + ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
                _ask_for_huge_pages(block)
            else:
                block = torch.frombuffer(_mapped(fd, self.n_bytes), dtype=torch.uint8)
            start = -block.data_ptr() % ALIGNMENT_BYTES
            usable = block[start : start + self.n_bytes]
            self._typed = {dtype: usable.view(dtype) for dtype in _DTYPES}
            #: All of it, uint8 [n_bytes].
            self.tensor = usable
            self._address = usable.data_ptr()
            self.bytes: npt.NDArray[np.uint8] = (
                usable.numpy() if usable.device.type == "cpu" else np.empty(0, np.uint8)
            )

    @staticmethod
    def share(n_bytes: int) -> int:
        """Make a block that other processes can map, populated, and return its descriptor.

        Raises
        ------
        RuntimeError, TypeError, OSError
            If there is not so much memory.
        """
        n_bytes = aligned(n_bytes)
        # The system refuses this where it would let populated pages take the last memory there is.
        torch.empty(n_bytes, dtype=torch.uint8, device="cpu")
        fd = os.memfd_create("strapfmt-ring")
        try:
            os.posix_fallocate(fd, 0, n_bytes)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def view(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Return the memory from position `start` as a contiguous tensor.

        Returns
        -------
        torch.Tensor, shape `shape`
            The memory itself.
        """
        return self._typed[dtype].as_strided(shape, _strides(shape), start % self.n_bytes // dtype.itemsize)

    def array(self, start: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """Return the memory from position `start` as a contiguous NumPy array, as `view` does; in host memory."""
        first = start % self.n_bytes
        flat = self.bytes[first : first + math.prod(shape) * dtype.itemsize]
        return flat.view(dtype).reshape(shape)

    def blocks(
        self, start: int, dtype: np.dtype[Any], shape: tuple[int, ...], n_blocks: int, stride: int
    ) -> npt.NDArray[Any]:
        """Return arrays of one shape, each `stride` bytes behind the one before, as a view `[n_blocks, *shape]`."""
        strides = (stride, *(step * dtype.itemsize for step in _strides(shape)))
        return np.ndarray((n_blocks, *shape), dtype, self.bytes, start % self.n_bytes, strides)

    def address_of(self, start: int) -> int:
        """Return the address of position `start`, in host memory."""
        return self._address + start % self.n_bytes

    def copy_in(self, start: int, x: torch.Tensor) -> None:
        """Copy `x` to position `start`, contiguous."""
        if x.nbytes <= _SMALL_BYTES and x.is_cpu and x.is_contiguous() and not x.is_neg():
            ctypes.memmove(self._address + start % self.n_bytes, x.data_ptr(), x.nbytes)
        else:
            self.view(start, x.dtype, tuple(x.shape)).copy_(x)

    def free(self) -> None:
        """Give the memory back, as far as nobody has a view of it."""
        self._typed, self.bytes = {}, np.empty(0, np.uint8)
        self.tensor = torch.empty(0, dtype=torch.uint8, device="cpu")


def aligned(n_bytes: int) -> int:
    """Return `n_bytes` rounded up to a multiple of 64."""
    return -(-n_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _ask_for_huge_pages(block: torch.Tensor) -> None:
    """Have the system give memory 2 MiB at a time: touching new pages costs more than copying to them. Only a hint."""
    if block.is_cpu and _madvise is not None:
        start = -(-block.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (block.data_ptr() + block.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            _madvise(start, stop - start, mmap.MADV_HUGEPAGE)


def _find_madvise() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).madvise
    except (AttributeError, OSError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function if hasattr(mmap, "MADV_HUGEPAGE") else None


_madvise = _find_madvise()


def _mapped(fd: int, n_bytes: int) -> mmap.mmap:
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return mmap.mmap(fd, n_bytes, flags=flags)


@lru_cache(maxsize=1024)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
