"""Writes one shard: full record batches into an open stream, a tail at each commit, a sealed Arrow file at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from strapfmt import spec
from strapfmt.arrowfile import Block, EncodedBatch, LaidOutBatch, MessageEncoder, digest, trailer
from strapfmt.commit import Disk, IoThread, Publisher
from strapfmt.index import BATCH_DTYPE, RUN_DTYPE, ShardIndex, find_runs
from strapfmt.manifest import Part, Shard

__all__ = ["RowBatch", "ShardWriter"]

_WRITEBACK_BYTES = 8 << 20
#: Bodies from this size on are hashed on the I/O thread, where the disk is waited for anyway.
_HASHED_LATER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBatch:
    """A record batch on its way to a shard.

    Attributes
    ----------
    batch : pyarrow.RecordBatch
    rows : int64 [n_rows] or None
        Row numbers, None for tables.
    n_values : int
        Elements of the activation column.
    release : callable or None
        Called on the I/O thread once the bytes are written.
    """

    batch: pa.RecordBatch
    rows: npt.NDArray[np.int64] | None
    n_values: int
    release: Callable[[], None] | None = None


class ShardWriter:
    """One shard of a site or a table.

    Nothing is rewritten: full batches go behind one another into `NNNNNN.arrow.open`; the rows that do not fill one
    are published at each commit as a small Arrow file of their own, the tail; sealing appends them, the footer and
    renames the file to `NNNNNN.arrow`.

    Parameters
    ----------
    disk, io, publisher : Disk, IoThread, Publisher
        Where and on which thread the bytes are written, and who makes them durable.
    root : Path
        The rank's directory.
    directory : str
        The shard's directory below it, which exists.
    number : int
    encoder : MessageEncoder
    codec : str
    alignment : int
        What the offset of every body is a multiple of.
    session : int
    """

    def __init__(
        self,
        *,
        disk: Disk,
        io: IoThread,
        publisher: Publisher,
        root: Path,
        directory: str,
        number: int,
        encoder: MessageEncoder,
        codec: str,
        alignment: int,
        session: int,
    ) -> None:
        self._disk, self._io, self._publisher, self._root = disk, io, publisher, root
        self._stem = f"{directory}/{number:06d}"
        self._encoder, self._codec, self._alignment, self._session = encoder, codec, alignment, session
        self._fd = -1
        #: Whether the file has its final name.
        self.is_finished = False
        self._offset = len(encoder.prefix)
        #: Up to where the kernel was asked to write the file out.
        self._hinted_to = 0
        self._entries: list[npt.NDArray[np.void]] = []
        #: Entries whose hashes are left to the I/O thread, and those that have them.
        self._n_deferred, self._n_hashed = 0, 0
        self._runs: list[npt.NDArray[np.void]] = []
        self._n_runs = 0
        self._rows_end: int | None = None
        self._n_rows = 0
        self._first_row: int | None = None
        self._committed: Shard | None = None
        #: Files that the next manifest no longer names.
        self.superseded: list[Path] = []
        io.submit(self._create)

    @property
    def n_bytes(self) -> int:
        """Bytes of the data file so far."""
        return self._offset

    @property
    def n_rows(self) -> int:
        """Rows in full batches so far."""
        return self._n_rows

    @property
    def index_bytes(self) -> int:
        """Bytes of the entries and runs of its index so far."""
        return spec.INDEX_BATCH_BYTES * len(self._entries) + spec.INDEX_RUN_BYTES * self._n_runs

    def append(self, batch: RowBatch) -> None:
        """Write a record batch at the end."""
        laid_out = self._encoder.lay_out(batch.batch, start=self._offset, alignment=self._alignment)
        entry = self._entry(laid_out, batch, self._offset)
        self._entries.append(entry)
        if batch.rows is not None:
            self._add_runs(batch.rows)
        self._n_rows += batch.batch.num_rows
        self._write(laid_out, entry, batch.release)

    def commit(self, tail: RowBatch | None, number: int) -> Shard | None:
        """Schedule what makes the shard durable with `tail` at its end; return what the manifest says of it."""
        n_rows = self._n_rows + (tail.batch.num_rows if tail else 0)
        if n_rows == 0 or (self._committed and self._committed.n_rows == n_rows):
            return self._committed
        self._wait_for_hashes()
        self._supersede()
        stem, start, parts = f"{self._stem}.c{number}", len(self._encoder.prefix), []
        if tail is None:
            index = self._index(sealed=False)
        else:
            encoded = self._encoder.lay_out(tail.batch, start=start, alignment=self._alignment).hashed()
            end = trailer(self._encoder.schema, [Block(start, len(encoded.header), encoded.body_bytes)])
            entry = self._entry(encoded, tail, start)
            _set_hashes(entry, encoded)
            index = self._index(sealed=False, tail=entry, end=end, rows=tail.rows)
            parts.append(
                self._publish_tail(stem, [self._encoder.prefix, encoded.header, *encoded.body, end], index)
            )
        parts.insert(0, self._data_part(spec.OPEN_SUFFIX, index.data_hash()))
        end_of_data = self._offset
        self._io.submit(lambda: self._sync(end_of_data))
        parts.append(self._publish_index(stem, index))
        self._committed = self._record(n_rows, tail.rows if tail else None, parts, sealed=False)
        return self._committed

    def seal(self, last: RowBatch | None) -> Shard:
        """Schedule the last batch, the footer, the final name and the index; return what the manifest says of it."""
        if last is not None:
            self.append(last)
        self._wait_for_hashes()
        self._supersede()
        blocks = [(int(e["offset"]), int(e["header_bytes"]), int(e["body_bytes"])) for e in self._entries]
        end = trailer(self._encoder.schema, [Block(*block) for block in blocks])
        index = self._index(sealed=True, end=end)
        offset = self._offset
        self._offset += len(end)
        self._io.submit(lambda: self._finish(end, offset), len(end))
        parts = [self._data_part(spec.DATA_SUFFIX, index.data_hash()), self._publish_index(self._stem, index)]
        return self._record(self._n_rows, None, parts, sealed=True)

    def close(self) -> None:
        """Close the descriptor, leaving the file as it is. For abort; called when no job runs."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._disk.close(fd)

    # Bookkeeping, on the caller's thread.

    def _wait_for_hashes(self) -> None:
        """Wait until the I/O thread has filled in every entry of the index."""
        if self._n_hashed < self._n_deferred:
            self._io.wait()

    def _entry(self, laid_out: LaidOutBatch, batch: RowBatch, offset: int) -> npt.NDArray[np.void]:
        """Return the index entry of a record batch, without its hashes."""
        entry = np.zeros((), BATCH_DTYPE)
        entry["offset"], entry["header_bytes"], entry["body_bytes"] = (
            offset,
            len(laid_out.header),
            laid_out.body_bytes,
        )
        entry["n_rows"], entry["first_ordinal"] = batch.batch.num_rows, self._n_rows
        entry["raw_bytes"], entry["n_values"] = _raw_bytes(batch.batch), batch.n_values
        entry["first_row"] = -1 if batch.rows is None else batch.rows[0]
        entry["first_run"] = self._n_runs
        return entry

    def _new_runs(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        runs = find_runs(rows, self._n_rows)
        return runs[1:] if self._rows_end is not None and rows[0] == self._rows_end else runs

    def _add_runs(self, rows: npt.NDArray[np.int64]) -> None:
        self._runs.append(self._new_runs(rows))
        self._n_runs += len(self._runs[-1])
        self._rows_end = int(rows[-1]) + 1
        if self._first_row is None:
            self._first_row = int(rows[0])

    def _index(
        self,
        *,
        sealed: bool,
        tail: npt.NDArray[np.void] | None = None,
        end: bytes = b"",
        rows: npt.NDArray[np.int64] | None = None,
    ) -> ShardIndex:
        entries = self._entries + ([tail] if tail is not None else [])
        runs = self._runs + ([self._new_runs(rows)] if rows is not None else [])
        end_offset = (
            self._offset if tail is None else int(tail["offset"] + tail["header_bytes"] + tail["body_bytes"])
        )
        return ShardIndex(
            batches=np.array(entries, BATCH_DTYPE),
            runs=np.concatenate(runs) if runs else np.empty(0, RUN_DTYPE),
            n_rows=self._n_rows + (int(tail["n_rows"]) if tail is not None else 0),
            prefix_bytes=len(self._encoder.prefix),
            prefix_hash=self._encoder.prefix_hash,
            trailer_offset=end_offset if end else 0,
            trailer_bytes=len(end),
            trailer_hash=digest(end) if end else bytes(16),
            is_sealed=sealed,
            has_tail=tail is not None,
        )

    def _record(
        self, n_rows: int, tail_rows: npt.NDArray[np.int64] | None, parts: list[Part], *, sealed: bool
    ) -> Shard:
        first, end = self._first_row, self._rows_end
        if tail_rows is not None:
            first, end = int(tail_rows[0]) if first is None else first, int(tail_rows[-1]) + 1
        return Shard(
            n_rows=n_rows,
            first_row=first,
            last_row=None if end is None else end - 1,
            is_sealed=sealed,
            session=self._session,
            parts=tuple(parts),
        )

    def _data_part(self, suffix: str, data_hash: bytes) -> Part:
        return Part(
            role="data",
            file=self._stem + suffix,
            codec=self._codec,
            n_bytes=self._offset,
            hash=data_hash.hex(),
        )

    def _supersede(self) -> None:
        if self._committed is not None:
            self.superseded += [
                self._root / p.file for p in self._committed.parts if p.role in ("tail", "index")
            ]

    def _publish_tail(self, stem: str, pieces: list[bytes | memoryview], index: ShardIndex) -> Part:
        file, n_bytes = stem + spec.TAIL_SUFFIX, sum(map(len, pieces))
        self._io.submit(lambda: self._publisher.publish(self._root / file, pieces), n_bytes)
        return Part(
            role="tail", file=file, codec=self._codec, n_bytes=n_bytes, hash=index.data_hash(tail=True).hex()
        )

    def _publish_index(self, stem: str, index: ShardIndex) -> Part:
        data, file = index.encode(), stem + spec.INDEX_SUFFIX
        self._io.submit(lambda: self._publisher.publish(self._root / file, [data]), len(data))
        return Part(role="index", file=file, n_bytes=len(data), hash=digest(data).hex())

    def _write(
        self, laid_out: LaidOutBatch, entry: npt.NDArray[np.void], release: Callable[[], None] | None
    ) -> None:
        offset = self._offset
        self._offset += laid_out.n_bytes
        known = None
        if laid_out.body_bytes < _HASHED_LATER_BYTES:
            known = laid_out.hashed()
            _set_hashes(entry, known)
        else:
            self._n_deferred += 1

        def job() -> None:
            encoded = known
            if encoded is None:
                encoded = laid_out.hashed()
                _set_hashes(entry, encoded)
                self._n_hashed += 1
            self._disk.write(self._fd, [encoded.header, *encoded.body], offset)
            if offset + encoded.n_bytes - self._hinted_to >= _WRITEBACK_BYTES:
                self._start_writeback(offset + encoded.n_bytes)
            if release is not None:
                release()

        self._io.submit(job, laid_out.n_bytes)

    # Jobs, on the I/O thread.

    def _create(self) -> None:
        self._publisher.check()
        self._fd = self._disk.create(self._root / (self._stem + spec.OPEN_SUFFIX))
        self._disk.write(self._fd, [self._encoder.prefix], 0)

    def _sync(self, end: int) -> None:
        self._start_writeback(end)
        self._publisher.sync(self._fd, lambda: None)

    def _finish(self, end: bytes, offset: int) -> None:
        self._disk.write(self._fd, [end], offset)
        self._start_writeback(offset + len(end))
        self._publisher.sync(self._fd, self._name)

    def _name(self) -> None:
        self.close()
        name = self._root / self._stem
        self._disk.rename(
            name.with_name(name.name + spec.OPEN_SUFFIX), name.with_name(name.name + spec.DATA_SUFFIX)
        )
        self.is_finished = True

    def _start_writeback(self, end: int) -> None:
        if end > self._hinted_to:
            self._disk.start_writeback(self._fd, self._hinted_to, end - self._hinted_to)
            self._hinted_to = end


def _set_hashes(entry: npt.NDArray[np.void], encoded: EncodedBatch) -> None:
    entry["header_hash"], entry["body_hash"] = np.void(encoded.header_hash), np.void(encoded.body_hash)


def _raw_bytes(batch: pa.RecordBatch) -> int:
    """Return the bytes of a batch's body before compression, each buffer padded to 8."""
    buffers = [buffer for column in batch.columns for buffer in column.buffers() if buffer is not None]
    return sum(-(-buffer.size // 8) * 8 for buffer in buffers)
