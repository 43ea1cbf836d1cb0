"""What the drain takes from the ring at a time, put together so that each site is written once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.dtypes import dtype_of_torch
from strapfmt.schema import SiteSpec
from strapfmt_capture.ring import Ring
from strapfmt_capture.statistics import Columns, RowStatistics

__all__ = ["Piece", "Values", "compute_statistics", "pieces_of"]

# Values of one site that arrive in pieces smaller than this are written together.
_PIECE_BYTES = 256 << 10

_Int64 = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Values:
    """Rows of one site, in the ring from position `start`; `shape` is that of each row.

    `at` is their place among the statistics of the turn, once these are computed.
    """

    spec: SiteSpec
    dtype: torch.dtype
    shape: tuple[int, ...]
    n_rows: int
    start: int
    rows: _Int64 | None
    token_row: _Int64 | None
    call: int
    at: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of the values, without the padding of their slot."""
        return self.n_rows * math.prod(self.shape) * self.dtype.itemsize


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

    def stored(self, ring: Ring[Any]) -> npt.NDArray[Any]:
        """Return the values as the writer wants them: the ring's own memory if they are one, else a copy."""
        storage = dtype_of_torch(self.values[0].dtype).numpy
        arrays = [ring.array(values.start, storage, (values.n_rows, *values.shape)) for values in self.values]
        if self.spec.is_ragged:
            arrays = [array.reshape(-1) for array in arrays]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def statistics(self, columns: Columns) -> Columns:
        """Return this piece's part of the statistics of the turn."""
        if len(self.values) == 1:
            part: slice | _Int64 = slice(self.values[0].at, self.values[0].at + self.values[0].n_rows)
        else:
            counts = np.array([values.n_rows for values in self.values])
            offsets = np.array([values.at for values in self.values]) - (np.cumsum(counts) - counts)
            part = np.arange(counts.sum()) + np.repeat(offsets, counts)
        return {name: columns[name][part] for name in self.spec.statistics}

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


def compute_statistics(values: Sequence[Values], ring: Ring[Any], statistics: RowStatistics) -> Columns:
    """Compute the statistics of all `values`, and set where each has its own.

    Neighbours in memory that are alike are computed as one tensor: the sites of a decoding step often are.
    """
    parts: list[Columns] = []
    at = 0
    for run in _runs([one for one in values if one.spec.statistics], ring.n_bytes):
        first, start = run[0], at
        for one in run:
            one.at = at
            at += one.n_rows
        parts.append(
            statistics(ring.view(first.start, first.dtype, (at - start, *first.shape)), first.spec.statistics)
        )
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


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


def _runs(values: Sequence[Values], ring_bytes: int) -> Iterator[list[Values]]:
    """Group values that lie one behind the other in memory, without a gap, and have rows of one kind."""
    run: list[Values] = []
    for one in values:
        if run and not (_follows(run[-1], one) and one.start % ring_bytes):
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def _follows(last: Values, one: Values) -> bool:
    return (
        one.start == last.start + last.n_bytes
        and one.dtype is last.dtype
        and one.shape == last.shape
        and one.spec.statistics == last.spec.statistics
    )


def _token_rows(values: Values) -> _Int64:
    return np.full(values.n_rows, -1, np.int64) if values.token_row is None else values.token_row
