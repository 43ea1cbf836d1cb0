"""The data that is written and read: activations with the spread of a residual stream, and datasets made of them."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.files import files_below
from strapfmt.schema import SiteSpec
from strapfmt.spec import STATISTICS
from strapfmt.writer import DatasetWriter
from strapfmt_capture.statistics import RowStatistics

__all__ = [
    "SITE",
    "activations",
    "bits",
    "chunks_of",
    "drop_cached",
    "some_ordinals",
    "store",
]

#: The site that single-site benchmarks store.
SITE = "blocks.0.resid_post"

_BLOCK_ROWS = 4_096


def activations(
    n_rows: int, width: int, dtype: torch.dtype = torch.bfloat16, *, seed: int = 0
) -> torch.Tensor:
    """Return [n_rows, width] normal numbers with a scale a dimension, some of them huge: like a residual stream."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(0.4 * torch.randn(width, generator=generator))
    scale[torch.randperm(width, generator=generator)[: max(1, width // 256)]] *= 30
    x = torch.empty(n_rows, width, dtype=dtype)
    for block in torch.split(x, _BLOCK_ROWS):
        block.copy_(torch.randn(block.shape, generator=generator) * scale)
    return x


def bits(x: torch.Tensor) -> npt.NDArray[Any]:
    """Return the memory of a contiguous tensor as the unsigned numbers that strapfmt stores for bfloat16."""
    sizes = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
    return x.view(sizes[x.element_size()]).numpy()


def chunks_of(x: torch.Tensor, n_rows: int) -> Iterator[torch.Tensor]:
    """Yield `x` as a capture delivers it: `n_rows` at a time."""
    yield from torch.split(x, n_rows)


def some_ordinals(n_rows: int, n: int, *, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return `n` random row numbers, as a shuffling loader asks for."""
    return np.random.default_rng(seed).integers(0, n_rows, n)


def store(
    path: Path,
    x: torch.Tensor,
    *,
    chunk_rows: int = 1_024,
    codec: str = "none",
    statistics: tuple[str, ...] = STATISTICS,
    **options: Any,
) -> None:
    """Write `x` [n, width] (bfloat16 or float32) as one site of a dataset, with statistics and checksums, durably."""
    compute, dtype = RowStatistics(), str(x.dtype).removeprefix("torch.")
    stored = bits if x.dtype == torch.bfloat16 else torch.Tensor.numpy
    with DatasetWriter(path, **options) as writer:
        writer.add_site(
            SiteSpec(name=SITE, dtype=dtype, shape=(x.shape[1],), codec=codec, statistics=statistics)
        )
        for chunk in chunks_of(x, chunk_rows):
            first = writer.reserve("row", len(chunk))
            rows = np.arange(first, first + len(chunk))
            writer.write(SITE, stored(chunk), rows=rows, statistics=compute(chunk, statistics))
            writer.end_step()


# Files and the page cache.


def drop_cached(path: Path) -> None:
    """Drop all pages of a dataset from this machine's page cache (a host below it keeps its own).

    Raises
    ------
    RuntimeError
        If a page stayed: then something still maps it, and nothing that is measured next is cold.
    """
    for file in files_below(path):
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if (share := _resident_share(fd)) > 0.01:
                raise RuntimeError(f"{file.name}: {share:.0%} of it is still cached")
        finally:
            os.close(fd)


def _resident_share(fd: int) -> float:
    size = os.fstat(fd).st_size
    if size == 0:
        return 0.0
    n_pages = -(-size // mmap.PAGESIZE)
    resident = (ctypes.c_ubyte * n_pages)()
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as mapped:
        address = np.frombuffer(mapped, np.uint8).ctypes.data
        if _libc.mincore(address, size, resident):
            raise OSError(ctypes.get_errno(), "mincore")
    return float(np.frombuffer(resident, np.uint8).__and__(1).mean())


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
