"""The values that the drain takes from the ring at a time, put together so that each site is written once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.dtypes import dtype_of_torch
from strapfmt.schema import SiteSpec
from strapfmt_capture.memory import Memory, aligned
from strapfmt_capture.statistics import Columns, RowStatistics

__all__ = [
    "Block",
    "Piece",
    "Values",
    "compute_statistics",
    "pieces_of",
    "statistics_of",
    "values_of",
]

# Values of one site that arrive in pieces smaller than this are written together.
_PIECE_BYTES = 256 << 10

_Int64 = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Values:
    """Rows of one site, in `memory` from position `start`; `shape` is that of each row.

    Of several passes they may be as many blocks of rows, each `stride` bytes behind the one before.

    `at` is the place of the first row among the statistics of the turn, once these are computed, and `at_stride` how
    far apart there the first rows of two blocks are.
    """

    spec: SiteSpec
    dtype: torch.dtype
    shape: tuple[int, ...]
    n_rows: int
    memory: Memory
    start: int
    rows: _Int64 | None
    token_row: _Int64 | None
    call: int
    n_blocks: int = 1
    stride: int = 0
    at: int = 0
    at_stride: int = 0
    _gathered: npt.NDArray[Any] | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the values, without the padding of their slot."""
        return self.n_rows * math.prod(self.shape) * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Bytes from the beginning of the first row to the end of the last."""
        return self.n_bytes // self.n_blocks + (self.n_blocks - 1) * self.stride

    def stored(self) -> npt.NDArray[Any]:
        """Return them as the writer wants them, [n_rows, *shape]: their memory if that is one piece, else a copy."""
        if self._gathered is not None:
            return self._gathered
        storage = dtype_of_torch(self.dtype).numpy
        if self.n_blocks == 1:
            return self.memory.array(self.start, storage, (self.n_rows, *self.shape))
        n_block_rows = self.n_rows // self.n_blocks
        blocks = self.memory.blocks(
            self.start, storage, (n_block_rows, *self.shape), self.n_blocks, self.stride
        )
        self._gathered = np.ascontiguousarray(blocks.reshape(self.n_rows, *self.shape))
        return self._gathered

    def tensor(self) -> torch.Tensor:
        """Return them as a tensor [n_rows, *shape], of the memory that `stored` gives."""
        if self.n_blocks == 1:
            return self.memory.view(self.start, self.dtype, (self.n_rows, *self.shape))
        return torch.from_numpy(self.stored()).view(self.dtype)

    def places(self) -> _Int64:
        """Return the place of each row among the statistics of the turn."""
        places = np.arange(self.at, self.at + self.n_rows // self.n_blocks)
        if self.n_blocks == 1:
            return places
        return (np.arange(self.n_blocks)[:, None] * self.at_stride + places).reshape(-1)


@dataclass(slots=True, kw_only=True)
class Block:
    """Small values of several sites at the same rows, one behind the other in `memory`, each at a multiple of 64."""

    specs: Sequence[SiteSpec]
    memory: Memory
    start: int
    rows: _Int64

    @property
    def n_bytes(self) -> int:
        """Bytes of the values, without padding."""
        return len(self.rows) * sum(spec.row_bytes for spec in self.specs)

    @property
    def extent(self) -> int:
        """Bytes from the beginning of the first value to the end of the last one's padding."""
        return sum(aligned(len(self.rows) * spec.row_bytes) for spec in self.specs)


@dataclass(slots=True)
class Piece:
    """Values of one site that are written together."""

    values: list[Values]

    @property
    def spec(self) -> SiteSpec:
        """The site."""
        return self.values[0].spec

    @property
    def n_rows(self) -> int:
        """Rows of all values."""
        return sum(values.n_rows for values in self.values)

    def stored(self) -> npt.NDArray[Any]:
        """Return the values as the writer wants them: the memory they lie in if they are one, else a copy."""
        arrays = [values.stored() for values in self.values]
        if self.spec.is_ragged:
            arrays = [array.reshape(-1) for array in arrays]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return what stands beside the values: rows, or token_row and call, and shapes of ragged rows."""
        counts = [values.n_rows for values in self.values]
        columns: dict[str, npt.NDArray[Any]] = {}
        if self.spec.is_ragged:
            shapes = np.array([values.shape for values in self.values], np.int32)
            columns["shapes"] = np.repeat(shapes, counts, axis=0)
        if self.spec.row_space == "own":
            columns["token_row"] = np.concatenate([_token_rows(values) for values in self.values])
            columns["call"] = np.repeat([values.call for values in self.values], counts)
        else:
            columns["rows"] = np.concatenate(
                [values.rows for values in self.values if values.rows is not None]
            )
        return columns


def values_of(items: Sequence[Any]) -> list[Values]:
    """Return all values among `items`, those of each site in order.

    Blocks of the same sites that lie at equal distances, as those of decoding steps do, are put together, so that what
    is done for each site is done once for all of them.
    """
    found: list[Values] = []
    sheets: dict[tuple[str, ...], _Sheet] = {}
    sheet_of: dict[str, tuple[str, ...]] = {}

    def close(key: tuple[str, ...]) -> None:
        found.extend(sheets.pop(key).values())

    for item in items:
        if isinstance(item, Block):
            key = tuple([spec.name for spec in item.specs])
            sheet = sheets.get(key)
            if sheet is not None and sheet.add(item):
                continue
            for other in {sheet_of[name] for name in key if name in sheet_of} & sheets.keys():
                close(other)
            sheets[key] = _Sheet(item)
            sheet_of |= dict.fromkeys(key, key)
        elif isinstance(item, Values):
            other = sheet_of.get(item.spec.name, ())
            if other in sheets:
                close(other)
            found.append(item)
    for key in list(sheets):
        close(key)
    return found


def compute_statistics(values: Sequence[Values], statistics: RowStatistics) -> Columns:
    """Compute the statistics of all `values`, and set where each has its own.

    Neighbours in memory that are alike are computed as one tensor: all sites of several decoding steps often are.
    """
    parts: list[Columns] = []
    at = 0
    for group, whole in _tensors([one for one in values if one.spec.statistics]):
        n_block_rows = [one.n_rows // one.n_blocks for one in group]
        for one, place in zip(group, itertools.accumulate(n_block_rows, initial=at), strict=False):
            one.at, one.at_stride = place, sum(n_block_rows)
        parts.append(statistics(whole, group[0].spec.statistics))
        at += len(whole)
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def statistics_of(pieces: Sequence[Piece], columns: Columns) -> Iterator[Columns]:
    """Give each piece its part of the statistics of the turn; these are put in order once for all pieces."""
    places = [one.places() for piece in pieces for one in piece.values if one.spec.statistics]
    order = np.concatenate(places) if places else np.empty(0, np.int64)
    ordered = {name: column[order] for name, column in columns.items()}
    at = 0
    for piece in pieces:
        n_rows = piece.n_rows if piece.spec.statistics else 0
        yield {name: ordered[name][at : at + n_rows] for name in piece.spec.statistics}
        at += n_rows


def pieces_of(values: Sequence[Values]) -> Iterator[Piece]:
    """Group values by site, in order: small ones are written together and large ones are not copied."""
    small: dict[str, list[Values]] = {}
    for one in values:
        name = one.spec.name
        if one.n_bytes < _PIECE_BYTES:
            small.setdefault(name, []).append(one)
            continue
        if name in small:
            yield Piece(small.pop(name))
        yield Piece([one])
    for rest in small.values():
        yield Piece(rest)


class _Sheet:
    """Blocks of the same sites and as many rows, at equal distances in memory."""

    def __init__(self, block: Block) -> None:
        self._first = self._last = block
        self._rows = [block.rows]
        self._stride = 0

    def add(self, block: Block) -> bool:
        """Take one more; False if it does not fit."""
        first, stride = self._first, block.start - self._last.start
        if block.memory is not first.memory or len(block.rows) != len(first.rows):
            return False
        if stride <= 0 or (self._stride and stride != self._stride):
            return False
        n_bytes = first.memory.n_bytes
        if first.start % n_bytes + block.start + block.extent - first.start > n_bytes:
            return False
        self._stride, self._last = stride, block
        self._rows.append(block.rows)
        return True

    def values(self) -> Iterator[Values]:
        """Return the values of each site in all blocks."""
        first, start = self._first, self._first.start
        rows = self._rows[0] if len(self._rows) == 1 else np.concatenate(self._rows)
        for spec in first.specs:
            yield Values(
                spec=spec,
                dtype=spec.stored_dtype.torch,
                shape=spec.shape,
                n_rows=len(rows),
                memory=first.memory,
                start=start,
                rows=rows,
                token_row=None,
                call=0,  # which only rows of their own have
                n_blocks=len(self._rows),
                stride=self._stride,
            )
            start += aligned(len(first.rows) * spec.row_bytes)


def _tensors(values: Sequence[Values]) -> Iterator[tuple[list[Values], torch.Tensor]]:
    """Yield all values in groups, each as one tensor: of every block of rows, that of all in the group."""
    for run in _runs(values):
        first = run[0]
        n_rows = sum(one.n_rows for one in run)
        block_bytes = sum(one.n_bytes // one.n_blocks for one in run)
        if first.n_blocks == 1 or first.stride == block_bytes:
            yield run, first.memory.view(first.start, first.dtype, (n_rows, *first.shape))
        else:
            for one in run:
                yield [one], one.tensor()


def _runs(values: Sequence[Values]) -> Iterator[list[Values]]:
    """Group values that lie one behind the other in memory, without a gap, and have rows of one kind."""
    run: list[Values] = []
    for one in values:
        if run and not (_follows(run[-1], one) and one.start % one.memory.n_bytes):
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def _follows(last: Values, one: Values) -> bool:
    return (
        one.memory is last.memory
        and one.start == last.start + last.n_bytes // last.n_blocks
        and (one.n_blocks, one.stride) == (last.n_blocks, last.stride)
        and one.dtype is last.dtype
        and one.shape == last.shape
        and one.spec.statistics == last.spec.statistics
    )


def _token_rows(values: Values) -> _Int64:
    return np.full(values.n_rows, -1, np.int64) if values.token_row is None else values.token_row
