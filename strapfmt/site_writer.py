"""Turns the rows of one site, or of one table, into record batches for its shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from strapfmt import spec
from strapfmt.errors import ArgumentError
from strapfmt.manifest import Counts, Layout, Shard, SiteEntry, TableEntry
from strapfmt.row_buffer import BufferPool, RowBuffer
from strapfmt.row_checks import TABLE_IDS, check_ids
from strapfmt.schema import TABLE_SCHEMAS, SiteSpec, site_schema
from strapfmt.series import ShardSeries
from strapfmt.shard import RowBatch

__all__ = ["SiteWriter", "TableWriter"]

Array = npt.NDArray[Any]

_MAX_RAGGED_ROWS = 1 << 16
_FIRST_RAGGED_ROOM = (64, 4096)


class SiteWriter:
    """Gathers the rows of one site.

    Parameters
    ----------
    site : SiteSpec
    layout : Layout
    series : ShardSeries
    counts : Counts
        What earlier sessions counted.
    last_row : int
        The last row number used, -1 for none.
    batch_bytes : int
        Bound of a batch of a ragged site; others hold `layout.batch_rows` rows.
    pool : BufferPool
    """

    def __init__(
        self,
        site: SiteSpec,
        layout: Layout,
        series: ShardSeries,
        *,
        counts: Counts,
        last_row: int,
        batch_bytes: int,
        pool: BufferPool,
    ) -> None:
        self.site, self.layout = site, layout
        self.schema = site_schema(site)
        self.series = series
        self.expected, self.written, self.dropped = counts.expected, counts.written, counts.dropped
        self.last_row = last_row
        #: No session before used it as a `call`, as every call has at least one row.
        self.first_call = 0 if last_row < 0 else (last_row & ((1 << spec.COUNTER_BITS) - 1)) + 1
        self._pool = pool
        self._buffer: RowBuffer | None = None
        #: Rows of a batch, and elements of its rows: exactly for a site of fixed shape, at most for a ragged one.
        self._batch_rows, self._batch_values = _MAX_RAGGED_ROWS, spec.MAX_ROW_VALUES
        if site.is_ragged:
            n_values = max(batch_bytes // site.stored_dtype.item_bytes, 1)
            self._batch_values = min(n_values, spec.MAX_ROW_VALUES)
            self._room = _FIRST_RAGGED_ROOM
        else:
            self._batch_rows = layout.batch_rows
            self._room = layout.batch_rows, layout.batch_rows * site.row_values

    def write(
        self, values: Array, columns: dict[str, Array], shapes: Array | None, before_emit: Callable[[], None]
    ) -> None:
        """Add rows; `columns` are checked, all of one length, and copied. See `DatasetWriter.write`."""
        n_rows = len(columns["row"])
        self.last_row = int(columns["row"][-1])
        self.written += n_rows
        if shapes is not None:
            self._write_ragged(values, {**columns, "shape": shapes}, before_emit)
            return
        values, width = values.reshape(-1), self.site.row_values
        at = 0
        while at < n_rows:
            take = min(self._batch_rows - self._n_pending, n_rows - at)
            part = _rows_of(columns, at, at + take)
            part_values = values[at * width : (at + take) * width]
            if take == self._batch_rows:
                before_emit()
                owned = {name: column.copy() for name, column in part.items()}
                self.series.append(self._batch(part_values, owned, None))
            else:
                self._add(part_values, part)
                if self._n_pending == self._batch_rows:
                    before_emit()
                    self._emit()
            at += take

    def commit(self, number: int) -> SiteEntry:
        """Schedule a commit of everything written; return the manifest's entry."""
        return self._entry(self.series.commit(self._tail(), number))

    def seal(self) -> SiteEntry:
        """Schedule sealing; return the manifest's entry."""
        last = self._tail()
        self._buffer = None
        return self._entry(self.series.seal(last))

    @property
    def _n_pending(self) -> int:
        return self._buffer.n_rows if self._buffer else 0

    def _entry(self, shards: Sequence[Shard]) -> SiteEntry:
        counts = Counts(expected=self.expected, written=self.written, dropped=self.dropped)
        return SiteEntry(spec=self.site, layout=self.layout, counts=counts, shards=tuple(shards))

    def _write_ragged(
        self, values: Array, columns: dict[str, Array], before_emit: Callable[[], None]
    ) -> None:
        ends = np.cumsum(np.prod(columns["shape"], axis=1, dtype=np.int64))
        at = 0
        while at < len(ends):
            used = int(ends[at - 1]) if at else 0
            n_rows, n_values = (self._buffer.n_rows, self._buffer.n_values) if self._buffer else (0, 0)
            stop = int(np.searchsorted(ends, used + self._batch_values - n_values, "right"))
            stop = min(stop, at + self._batch_rows - n_rows)
            if stop <= at and n_rows:
                before_emit()
                self._emit()
                continue
            stop = max(stop, at + 1)  # a row wider than a batch is one
            self._add(values[used : ends[stop - 1]], _rows_of(columns, at, stop))
            at = stop
        if self._buffer and self._buffer.n_values >= self._batch_values:
            before_emit()
            self._emit()

    def _add(self, values: Array, columns: Mapping[str, Array]) -> None:
        if self._buffer is None:
            n_rows, n_values = self._room
            self._buffer = RowBuffer(self.schema, self._pool, n_rows=n_rows, n_values=n_values)
        self._buffer.add(values, columns)

    def _tail(self) -> RowBatch | None:
        """Return what is pending, as views: nothing of it is written again, later rows lie behind it."""
        if self._buffer is None:
            return None
        return self._batch(self._buffer.values, self._buffer.columns, None)

    def _emit(self) -> None:
        if self._buffer is None:
            raise AssertionError("nothing to emit")
        buffer, self._buffer = self._buffer, None
        self.series.append(self._batch(buffer.values, buffer.columns, buffer.release()))
        if self.site.is_ragged:  # the next batch needs as much, but for a single row wider than a batch
            n_rows, n_values = buffer.room
            self._room = min(n_rows, self._batch_rows), min(n_values, self._batch_values)

    def _batch(
        self, values: Array, columns: Mapping[str, Array], release: Callable[[], None] | None
    ) -> RowBatch:
        rows = columns["row"]
        arrays = [_column(field, columns, values, len(rows)) for field in self.schema]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        return RowBatch(batch=batch, rows=rows, n_values=len(values), release=release)


def _rows_of(columns: Mapping[str, Array], start: int, stop: int) -> Mapping[str, Array]:
    if start == 0 and stop == len(columns["row"]):
        return columns
    return {name: column[start:stop] for name, column in columns.items()}


def _column(column: pa.Field, columns: Mapping[str, Array], flat: Array, n_rows: int) -> pa.Array:
    """Return one Arrow column; the activation's aliases `flat`."""
    if column.name == "activation":
        return _activation(column.type, columns, flat, n_rows)
    values = columns[column.name]
    if column.name == "shape":
        inner = _primitive(column.type.value_type, values.reshape(-1))
        return pa.Array.from_buffers(column.type, n_rows, [None], children=[inner])
    if column.name == "token_row":
        return pa.array(values, column.type, mask=values < 0)
    return _primitive(column.type, values)


def _activation(kind: pa.DataType, columns: Mapping[str, Array], flat: Array, n_rows: int) -> pa.Array:
    inner = _primitive(kind.value_type, flat)
    if pa.types.is_fixed_size_list(kind):
        return pa.Array.from_buffers(kind, n_rows, [None], children=[inner])
    offsets = np.zeros(n_rows + 1, np.int32)
    offsets[1:] = np.cumsum(np.prod(columns["shape"], axis=1, dtype=np.int64))
    return pa.Array.from_buffers(kind, n_rows, [None, pa.py_buffer(offsets)], children=[inner])


def _primitive(kind: pa.DataType, values: Array) -> pa.Array:
    return pa.Array.from_buffers(kind, values.size, [None, pa.py_buffer(values)])


class TableWriter:
    """Gathers the rows of one table; they are written as soon as anything refers to them.

    Parameters
    ----------
    name : str
    series : ShardSeries
    rank : int
    counters : mapping
        The next free number of each kind as the session began: ids in earlier sessions are below.
    """

    def __init__(self, name: str, series: ShardSeries, *, rank: int, counters: Mapping[str, int]) -> None:
        self.name, self.schema = name, TABLE_SCHEMAS[name]
        self.series = series
        self._ids, self._rank = TABLE_IDS[name], rank
        self._last_id = (rank << spec.RANK_SHIFT) + counters.get(self._ids.counter, 0) - 1
        self._pending: list[pa.RecordBatch] = []
        self._pending_bytes = 0

    def write(self, columns: Mapping[str, Any]) -> None:
        """Add rows, given as one sequence a column.

        Raises
        ------
        ArgumentError
            If a column is missing, unknown, of another length or of a type that does not fit, or if the ids are of
            another rank or, but for `row_events`, do not increase.
        """
        if set(columns) != set(self.schema.names):
            raise ArgumentError(
                f"table {self.name!r}: expected the columns {', '.join(self.schema.names)}; got {', '.join(columns)}"
            )
        try:
            arrays = [pa.array(columns[column.name], column.type) for column in self.schema]
            batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
            batch.validate()
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            raise ArgumentError(f"table {self.name!r}: {error}") from error
        for column, array in zip(self.schema, batch.columns, strict=True):
            if array.null_count and not column.nullable:
                raise ArgumentError(f"table {self.name!r}: column {column.name!r} takes no nulls")
        if batch.num_rows:
            ids = batch.column(self._ids.column).to_numpy()
            check_ids(self.name, ids, self._last_id, self._rank)
            if self._ids.is_rising:
                self._last_id = int(ids[-1])
            self._pending.append(batch)
            self._pending_bytes += batch.nbytes
            if self._pending_bytes >= spec.BATCH_TARGET_BYTES:
                self.flush()

    def flush(self) -> None:
        """Hand what is pending to the shard, as one batch."""
        if self._pending:
            table = pa.Table.from_batches(self._pending, self.schema).combine_chunks()
            self._pending, self._pending_bytes = [], 0
            for batch in table.to_batches():
                self.series.append(RowBatch(batch=batch, rows=None, n_values=0))

    def commit(self, number: int) -> TableEntry:
        """Schedule a commit of everything written; return the manifest's entry."""
        self.flush()
        return TableEntry(name=self.name, shards=tuple(self.series.commit(None, number)))

    def seal(self) -> TableEntry:
        """Schedule sealing; return the manifest's entry."""
        self.flush()
        return TableEntry(name=self.name, shards=tuple(self.series.seal(None)))
