"""What the drain takes from the ring at a time, put together so that each site and table is written once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from strapfmt.dtypes import dtype_of_torch
from strapfmt.schema import TABLE_SCHEMAS, SiteSpec
from strapfmt_capture.memory import Memory
from strapfmt_capture.statistics import Columns, RowStatistics

__all__ = ["Piece", "Values", "compute_statistics", "merged", "pieces_of", "statistics_of"]

# Values of one site that arrive in pieces smaller than this are written together.
_PIECE_BYTES = 256 << 10

_Int64 = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Values:
    """Rows of one site, in `memory` from position `start`; `shape` is that of each row.

    `at` is their place among the statistics of the turn, once these are computed.
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

    def stored(self) -> npt.NDArray[Any]:
        """Return the values as the writer wants them: the memory they lie in if they are one, else a copy."""
        storage = dtype_of_torch(self.values[0].dtype).numpy
        arrays = [
            values.memory.array(values.start, storage, (values.n_rows, *values.shape))
            for values in self.values
        ]
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


def compute_statistics(values: Sequence[Values], statistics: RowStatistics) -> Columns:
    """Compute the statistics of all `values`, and set where each has its own.

    Neighbours in memory that are alike are computed as one tensor: all sites of several decoding steps often are.
    """
    parts: list[Columns] = []
    at = 0
    for run in _runs([one for one in values if one.spec.statistics]):
        first, start = run[0], at
        for one in run:
            one.at = at
            at += one.n_rows
        whole = first.memory.view(first.start, first.dtype, (at - start, *first.shape))
        parts.append(statistics(whole, first.spec.statistics))
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def statistics_of(pieces: Sequence[Piece], columns: Columns) -> Iterator[Columns]:
    """Give each piece its part of the statistics of the turn; these are put in order once for all pieces."""
    values = [one for piece in pieces for one in piece.values]
    counts = np.array([one.n_rows if one.spec.statistics else 0 for one in values], np.int64)
    stops = np.cumsum(counts)
    order = np.arange(stops[-1] if len(stops) else 0)
    order += np.repeat(np.array([one.at for one in values], np.int64) - (stops - counts), counts)
    ordered = {name: column[order] for name, column in columns.items()}
    at = 0
    for piece in pieces:
        n_rows = piece.n_rows if piece.spec.statistics else 0
        yield {name: ordered[name][at : at + n_rows] for name in piece.spec.statistics}
        at += n_rows


def merged(table: str, parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the columns of several steps as those of one."""
    if len(parts) == 1:
        return parts[0]
    return {
        field.name: _joined([part[field.name] for part in parts], field.type)
        for field in TABLE_SCHEMAS[table]
    }


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


def _joined(columns: Sequence[Any], kind: pa.DataType) -> Any:
    if all(isinstance(column, np.ndarray) for column in columns):
        return np.concatenate(columns)
    if all(isinstance(column, list) for column in columns):
        return [value for column in columns for value in column]
    return pa.concat_arrays(
        [column if isinstance(column, pa.Array) else pa.array(column, kind) for column in columns]
    )


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
        and one.start == last.start + last.n_bytes
        and one.dtype is last.dtype
        and one.shape == last.shape
        and one.spec.statistics == last.spec.statistics
    )


def _token_rows(values: Values) -> _Int64:
    return np.full(values.n_rows, -1, np.int64) if values.token_row is None else values.token_row
