"""The formats that are compared: each writes a bfloat16 matrix, reads it in order, and gathers rows of it.

Each is used the quickest way that its documentation shows. All deliver the bits into the same tensor.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from benchmarks.measure import Settings, is_installed
from benchmarks.workloads import SITE, bits, chunks_of, store
from strapfmt.reader import Reader

__all__ = ["Format", "Opened", "peers", "remove"]

Ordinals = npt.NDArray[np.int64]


class Opened(Protocol):
    """A dataset of one matrix, open for reading."""

    def read(self, out: torch.Tensor) -> None:
        """Copy all rows into `out`, in order."""

    def gather(self, ordinals: Ordinals, out: torch.Tensor) -> None:
        """Copy the rows at `ordinals` into `out`."""


class Format(Protocol):
    """A way to store a matrix."""

    def write(self, path: Path, x: torch.Tensor) -> None:
        """Write `x`; whoever times it makes the files durable afterwards."""

    def open(self, path: Path) -> Opened:
        """Open what was written."""


def peers(settings: Settings) -> dict[str, Format]:
    """Return the other formats, as far as they are installed."""
    all_peers: dict[str, tuple[str, Format]] = {
        "npy memmap": ("numpy", Npy()),
        "safetensors": ("safetensors", Safetensors()),
        "Lance": ("pylance", Lance()),
        "HF datasets": ("datasets", HuggingFace()),
    }
    if not settings.peers:
        return {}
    return {name: peer for name, (package, peer) in all_peers.items() if is_installed(package)}


def remove(path: Path) -> None:
    """Remove a file or a directory, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class Strapfmt:
    """strapfmt, by its reader."""

    def __init__(self, *, codec: str = "none", is_verified: bool = False, **options: Any) -> None:
        self._codec, self._is_verified, self._options = codec, is_verified, options

    def write(self, path: Path, x: torch.Tensor) -> None:
        """Write statistics and checksums too."""
        store(path, x, codec=self._codec, **self._options)

    def open(self, path: Path) -> Opened:
        """Open the dataset."""
        return _OpenedStrapfmt(path, is_scanned=self._is_verified or self._codec != "none")


class _OpenedStrapfmt:
    def __init__(self, path: Path, *, is_scanned: bool) -> None:
        self._site, self._is_scanned = Reader(path)[SITE], is_scanned

    def read(self, out: torch.Tensor) -> None:
        if self._is_scanned:
            at = 0
            for batch in self._site.scan(["activation"]):
                at = _copy(batch.column(0).flatten(), out, at)
            return
        at = 0
        for view in self._site.views():
            for batch in view.tensor:
                out[at : at + len(batch)].copy_(batch)
                at += len(batch)

    def gather(self, ordinals: Ordinals, out: torch.Tensor) -> None:
        self._site.gather(ordinals, out=out)


class Npy:
    """A `.npy` file, memory-mapped both ways."""

    def write(self, path: Path, x: torch.Tensor) -> None:
        """Write it chunk by chunk."""
        with path.open("wb"):
            pass
        array = np.lib.format.open_memmap(path, "w+", np.uint16, tuple(x.shape))
        at = 0
        for chunk in chunks_of(x, 1_024):
            array[at : at + len(chunk)] = bits(chunk)
            at += len(chunk)
        array.flush()

    def open(self, path: Path) -> Opened:
        """Map the file."""
        return OpenedMatrix(torch.from_numpy(np.load(path, mmap_mode="c")).view(torch.bfloat16))


class OpenedMatrix:
    """A matrix that aliases a memory map: the bare case."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self._matrix = matrix

    def read(self, out: torch.Tensor) -> None:
        """Copy all rows."""
        out.copy_(self._matrix)

    def gather(self, ordinals: Ordinals, out: torch.Tensor) -> None:
        """Copy some rows, by the one call that does it."""
        torch.index_select(self._matrix, 0, torch.from_numpy(ordinals), out=out)


class Safetensors:
    """One safetensors file; the whole matrix must be in memory to write it."""

    def write(self, path: Path, x: torch.Tensor) -> None:
        """Write the file."""
        from safetensors.torch import save_file

        save_file({SITE: x}, path)

    def open(self, path: Path) -> Opened:
        """Map the file."""
        from safetensors.torch import load_file

        return OpenedMatrix(load_file(path)[SITE])


class Lance:
    """A Lance dataset with a column of fixed-size lists."""

    def write(self, path: Path, x: torch.Tensor) -> None:
        """Write a stream of record batches."""
        import lance

        lance.write_dataset(pa.RecordBatchReader.from_batches(_schema(x), _batches(x)), str(path))

    def open(self, path: Path) -> Opened:
        """Open the dataset."""
        import lance

        return _OpenedLance(lance.dataset(str(path)))


class _OpenedLance:
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def read(self, out: torch.Tensor) -> None:
        at = 0
        for batch in self._dataset.to_batches():
            at = _copy(batch.column(0).flatten(), out, at)

    def gather(self, ordinals: Ordinals, out: torch.Tensor) -> None:
        _copy_chunks(self._dataset.take(ordinals).column(0), out)


class HuggingFace:
    """A Hugging Face dataset saved to disk, made of an Arrow table that aliases the data."""

    def write(self, path: Path, x: torch.Tensor) -> None:
        """Save the table."""
        import datasets

        datasets.disable_progress_bars()
        table = pa.Table.from_batches(_batches(x), _schema(x))
        datasets.Dataset(table).save_to_disk(str(path))

    def open(self, path: Path) -> Opened:
        """Open it, with results as Arrow tables."""
        import datasets

        return _OpenedHuggingFace(datasets.load_from_disk(str(path)).with_format("arrow"))


class _OpenedHuggingFace:
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def read(self, out: torch.Tensor) -> None:
        at = 0
        for table in self._dataset.iter(batch_size=1_024):
            at = _copy_chunks(table.column(0), out, at)

    def gather(self, ordinals: Ordinals, out: torch.Tensor) -> None:
        _copy_chunks(self._dataset[ordinals].column(0), out)


def _schema(x: torch.Tensor) -> pa.Schema:
    return pa.schema([("activation", pa.list_(pa.uint16(), x.shape[1]))])


def _batches(x: torch.Tensor) -> Iterator[pa.RecordBatch]:
    for chunk in chunks_of(x, 1_024):
        flat = pa.array(bits(chunk).reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
        yield pa.RecordBatch.from_arrays([column], schema=_schema(x))


def _copy(values: pa.Array, out: torch.Tensor, at: int = 0) -> int:
    """Copy the numbers of one Arrow array into the rows of `out` from `at`; return the row behind them."""
    array = values.to_numpy(zero_copy_only=True).reshape(-1, out.shape[1])
    bits(out)[at : at + len(array)] = array
    return at + len(array)


def _copy_chunks(column: pa.ChunkedArray, out: torch.Tensor, at: int = 0) -> int:
    for chunk in column.chunks:
        at = _copy(chunk.flatten(), out, at)
    return at
