"""Turns the rows of one site, or of one table, into record batches of a fixed number of rows and rolls shards over."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from strapfmt import spec
from strapfmt.arrowfile import MessageEncoder
from strapfmt.commit import Disk, IoThread, Publisher
from strapfmt.errors import ArgumentError
from strapfmt.manifest import Counts, Layout, Shard, SiteEntry, TableEntry
from strapfmt.schema import TABLE_SCHEMAS, SiteSpec, site_schema
from strapfmt.shard import RowBatch, ShardWriter

__all__ = ["BufferPool", "ShardSeries", "SiteWriter", "TableWriter"]

Array = npt.NDArray[Any]

_MAX_RAGGED_ROWS = 1 << 16


class ShardSeries:
    """The shards of one site or table, in order; opens the next one when the last is full."""

    def __init__(
        self,
        *,
        disk: Disk,
        io: IoThread,
        publisher: Publisher,
        root: Path,
        directory: str,
        encoder: MessageEncoder,
        codec: str = "none",
        alignment: int = 8,
        shard_bytes: int,
        session: int,
        done: Sequence[Shard] = (),
    ) -> None:
        self._make = partial(
            ShardWriter,
            disk=disk,
            io=io,
            publisher=publisher,
            root=root,
            directory=directory,
            encoder=encoder,
            codec=codec,
            alignment=alignment,
            session=session,
        )
        self._io, self._publisher = io, publisher
        self.directory = root / directory
        self._shard_bytes = shard_bytes
        self._done = list(done)
        self._listed = list(done)
        self._changed = False
        self._open: ShardWriter | None = None
        self._unfinished: list[ShardWriter] = []
        self._superseded: list[Path] = []
        names = [path.name for path in self.directory.iterdir()] if self.directory.exists() else []
        self._number = max((int(name[:6]) for name in names if name[:6].isdigit()), default=-1) + 1
        io.submit(lambda: self._prepare(disk))

    def append(self, batch: RowBatch) -> None:
        """Write a full batch."""
        writer = self._writer()
        writer.append(batch)
        if writer.n_bytes >= self._shard_bytes or writer.index_bytes >= spec.MAX_INDEX_BYTES // 2:
            self._seal(None)
            self._io.submit(self._publisher.finish)

    def commit(self, tail: RowBatch | None, number: int) -> list[Shard]:
        """Schedule what makes everything so far durable; return the shards as the manifest lists them."""
        last = self._writer().commit(tail, number) if tail or self._open else None
        shards = self._done + ([last] if last else [])
        self._changed |= shards != self._listed
        self._listed = shards
        return shards

    def seal(self, last: RowBatch | None) -> list[Shard]:
        """Schedule sealing the last shard."""
        if last or self._open:
            self._seal(last)
        self._changed |= self._done != self._listed
        return self._done

    def take_changed(self) -> bool:
        """Return whether files were published since the last call."""
        changed, self._changed = self._changed, False
        return changed

    def take_superseded(self) -> list[Path]:
        """Return the files that only manifests before the last commit name."""
        taken, self._superseded = self._superseded, []
        if self._open:
            taken += self._open.superseded
            self._open.superseded = []
        return taken

    def close(self) -> None:
        """Close descriptors, for abort."""
        for writer in self._unfinished:
            writer.close()

    def _writer(self) -> ShardWriter:
        if self._open is None:
            self._unfinished = [writer for writer in self._unfinished if not writer.is_finished]
            self._open = self._make(number=self._number)
            self._unfinished.append(self._open)
            self._number += 1
        return self._open

    def _prepare(self, disk: Disk) -> None:
        """Make the directory and its name durable, also where a crashed writer left it; runs on the I/O thread."""
        if not self.directory.exists():
            disk.mkdir(self.directory)
        disk.sync_directory(self.directory.parent)

    def _seal(self, last: RowBatch | None) -> None:
        writer = self._writer()
        self._open = None
        if last is None and writer.n_rows == 0:
            raise AssertionError("an empty shard is never sealed")
        self._done.append(writer.seal(last))
        self._superseded += writer.superseded


class BufferPool:
    """Batch buffers that all sites of a writer share; a new one costs page faults, a used one does not.

    Buffers are given back on the I/O thread.

    Parameters
    ----------
    limit_bytes : int
        Keep at most so many bytes for the next one who asks.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._free_bytes = limit_bytes, 0
        self._free: dict[int, list[Array]] = {}
        self._changing = threading.Lock()

    def take(self, n_bytes: int) -> Array:
        """Return a buffer, uint8 [n_bytes]."""
        with self._changing:
            if free := self._free.get(n_bytes):
                self._free_bytes -= n_bytes
                return free.pop()
        return np.empty(n_bytes, np.uint8)

    def give(self, buffer: Array) -> None:
        """Take a buffer back."""
        with self._changing:
            if self._free_bytes + buffer.nbytes <= self._limit_bytes:
                self._free.setdefault(buffer.nbytes, []).append(buffer)
                self._free_bytes += buffer.nbytes


@dataclass(slots=True)
class _Pending:
    """Rows that do not fill a batch yet."""

    values: list[Array] = field(default_factory=list)
    columns: list[dict[str, Array]] = field(default_factory=list)
    n_rows: int = 0
    n_values: int = 0


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
        self._batch_bytes = batch_bytes
        self.expected, self.written, self.dropped = counts.expected, counts.written, counts.dropped
        self.last_row = last_row
        self._pending = _Pending()
        self._pool = pool
        #: Of `layout.batch_rows` rows, uint8; the pending ones lie at its beginning.
        self._buffer: Array | None = None

    def write(
        self, values: Array, columns: dict[str, Array], shapes: Array | None, before_emit: Callable[[], None]
    ) -> None:
        """Add rows; `columns` are checked, owned and all of one length. See `DatasetWriter.write`."""
        n_rows = len(columns["row"])
        self.last_row = int(columns["row"][-1])
        self.written += n_rows
        if shapes is not None:
            self._write_ragged(values, columns, shapes, before_emit)
            return
        values = values.reshape(n_rows, -1)
        at = 0
        while at < n_rows:
            space = self.layout.batch_rows - self._pending.n_rows
            take = min(space, n_rows - at)
            part = {name: column[at : at + take] for name, column in columns.items()}
            if take == self.layout.batch_rows:
                before_emit()
                self.series.append(self._batch(values[at : at + take], [part], None))
            else:
                self._keep(values[at : at + take], part)
                if self._pending.n_rows == self.layout.batch_rows:
                    before_emit()
                    self._emit()
            at += take

    def commit(self, number: int) -> SiteEntry:
        """Schedule a commit of everything written; return the manifest's entry."""
        return self._entry(self.series.commit(self._tail(), number))

    def seal(self) -> SiteEntry:
        """Schedule sealing; return the manifest's entry."""
        last = self._tail()
        self._pending, self._buffer = _Pending(), None
        return self._entry(self.series.seal(last))

    def _entry(self, shards: Sequence[Shard]) -> SiteEntry:
        counts = Counts(expected=self.expected, written=self.written, dropped=self.dropped)
        return SiteEntry(spec=self.site, layout=self.layout, counts=counts, shards=tuple(shards))

    def _write_ragged(
        self, values: Array, columns: dict[str, Array], shapes: Array, before_emit: Callable[[], None]
    ) -> None:
        sizes = np.prod(shapes, axis=1, dtype=np.int64)
        ends = np.cumsum(sizes)
        limit = min(max(self._batch_bytes // self.site.stored_dtype.item_bytes, 1), spec.MAX_ROW_VALUES)
        at = 0
        while at < len(sizes):
            used = ends[at - 1] if at else 0
            stop = int(np.searchsorted(ends, used + limit - self._pending.n_values, "right"))
            stop = min(stop, at + _MAX_RAGGED_ROWS - self._pending.n_rows)
            if stop <= at and self._pending.n_rows:
                before_emit()
                self._emit()
                continue
            stop = max(stop, at + 1)  # a row wider than a batch is one
            part = {name: column[at:stop] for name, column in columns.items()}
            part["shape"] = shapes[at:stop]
            self._pending.values.append(values[used : ends[stop - 1]].copy())
            self._pending.columns.append(part)
            self._pending.n_rows += stop - at
            self._pending.n_values += int(ends[stop - 1] - used)
            at = stop
        if self._pending.n_values >= limit:
            before_emit()
            self._emit()

    def _keep(self, values: Array, columns: dict[str, Array]) -> None:
        if self._buffer is None:
            self._buffer = self._pool.take(self.layout.batch_rows * self.site.row_bytes)
        start, width = self._pending.n_rows, self.site.row_bytes
        target = self._buffer[start * width : (start + len(values)) * width]
        target.view(values.dtype)[:] = values.reshape(-1)
        self._pending.columns.append(columns)
        self._pending.n_rows += len(values)

    def _tail(self) -> RowBatch | None:
        pending = self._pending
        if not pending.n_rows:
            return None
        if self.site.is_ragged:
            return self._batch(np.concatenate(pending.values), pending.columns, None)
        if self._buffer is None:
            raise AssertionError("pending rows lie in a buffer")
        values = self._buffer[: pending.n_rows * self.site.row_bytes].view(self.site.stored_dtype.numpy)
        return self._batch(values, pending.columns, None)

    def _emit(self) -> None:
        buffer, pool = self._buffer, self._pool
        batch = self._tail()
        if batch is None:
            raise AssertionError("nothing to emit")
        self._pending, self._buffer = _Pending(), None
        if buffer is not None:
            batch = RowBatch(
                batch=batch.batch, rows=batch.rows, n_values=batch.n_values, release=lambda: pool.give(buffer)
            )
        self.series.append(batch)

    def _batch(
        self, values: Array, parts: Sequence[Mapping[str, Array]], release: Callable[[], None] | None
    ) -> RowBatch:
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        rows = columns["row"]
        flat = values.reshape(-1)
        arrays = [_column(field, columns, flat, len(rows)) for field in self.schema]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        return RowBatch(batch=batch, rows=rows, n_values=flat.size, release=release)


def _column(column: pa.Field, columns: Mapping[str, Array], flat: Array, n_rows: int) -> pa.Array:
    """Return one Arrow column; the activation's aliases `flat`."""
    if column.name == "activation":
        return _activation(column.type, columns, flat, n_rows)
    values = columns[column.name]
    if column.name == "shape":
        inner = _primitive(column.type.value_type, np.ascontiguousarray(values, np.int32).reshape(-1))
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
    """Gathers the rows of one table; they are written as soon as anything refers to them."""

    def __init__(self, name: str, series: ShardSeries) -> None:
        self.name, self.schema = name, TABLE_SCHEMAS[name]
        self.series = series
        self._pending: list[pa.RecordBatch] = []

    def write(self, columns: Mapping[str, Any]) -> None:
        """Add rows, given as one sequence a column.

        Raises
        ------
        ArgumentError
            If a column is missing, unknown, of another length or of a type that does not fit.
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
            self._pending.append(batch)

    def flush(self) -> None:
        """Hand what is pending to the shard, as one batch."""
        if self._pending:
            table = pa.Table.from_batches(self._pending, self.schema).combine_chunks()
            self._pending = []
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
