"""Rescues what lies on disk into a new dataset: the committed rows, and complete record batches beyond them.

Nothing is changed in place. Where a manifest or an index is damaged, the shards speak for themselves: each begins with
a schema that names its site and session, and each record batch carries hashes of its header and its body.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from strapfmt import spec
from strapfmt.arrowfile import check_message, decoded_bytes, is_compressed, message_bytes
from strapfmt.errors import ArgumentError, DatasetNotFoundError, FormatError
from strapfmt.index import ShardIndex
from strapfmt.manifest import COUNTERS, Manifest
from strapfmt.mapped import map_file, read_file
from strapfmt.report import RepairReport, SiteRepair
from strapfmt.schema import TABLE_SCHEMAS, SiteSpec, read_site, site_schema
from strapfmt.writer import DatasetWriter

__all__ = ["RepairReport", "SiteRepair", "repair"]

Array = npt.NDArray[Any]
_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class _Key:
    """The column that orders a table's or a site's rows, and the counter its ids come from ("" for a site's own)."""

    column: str
    counter: str
    is_unique: bool = True


_TABLE_KEYS = {
    "tokens": _Key("row", "row"),
    "sequences": _Key("sequence_id", "sequence"),
    "steps": _Key("step", "step"),
    "row_events": _Key("step", "step", is_unique=False),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stream:
    """One data or tail file found on disk."""

    file: str
    number: int
    is_tail: bool
    memory: memoryview
    schema: pa.Schema
    start: int
    session: int


def repair(path: str | Path, out: str | Path) -> RepairReport:
    """Rescue a dataset into a new one at `out`.

    Row ids, sites, tables and provenance are kept. The new dataset is closed cleanly.

    Parameters
    ----------
    path : path
        The damaged or unfinished dataset; it is only read.
    out : path
        A new dataset.

    Returns
    -------
    RepairReport

    Raises
    ------
    DatasetNotFoundError
        If there is nothing to rescue at `path`.
    DatasetExistsError
        If `out` exists.
    """
    path, out = Path(path), Path(out)
    ranks = sorted(
        int(entry.name[5:]) for entry in path.glob("rank-*") if entry.is_dir() and entry.name[5:].isdigit()
    )
    if not ranks:
        raise DatasetNotFoundError(f"{path}: no rank-NNNNN directory to rescue anything from")
    sites: list[SiteRepair] = []
    tables: list[SiteRepair] = []
    notes: list[str] = []
    sole = None if ranks == [0] else ranks
    for rank in ranks:
        rescue = _Rescue(path / spec.RANK_DIRECTORY.format(rank=rank), rank, notes)
        with DatasetWriter(out, rank=rank if sole else None, provenance=rescue.provenance()) as writer:
            rescue.run(writer)
        sites += rescue.sites
        tables += rescue.tables
    return RepairReport(path=path, out=out, sites=tuple(sites), tables=tuple(tables), notes=tuple(notes))


class _Rescue:
    """The rescue of one rank."""

    def __init__(self, root: Path, rank: int, notes: list[str]) -> None:
        self.root, self.rank, self.notes = root, rank, notes
        self.sites: list[SiteRepair] = []
        self.tables: list[SiteRepair] = []
        self.manifest = self._read_manifest()

    def provenance(self) -> dict[str, Any]:
        """Return what the new session says of its origin."""
        before = [dict(session) for session in self.manifest.sessions] if self.manifest else []
        return {"repaired_from": str(self.root), "repaired_sessions": before}

    def run(self, writer: DatasetWriter) -> None:
        """Copy everything sound."""
        for kind, found in ((spec.TABLES_DIRECTORY, self.tables), (spec.SITES_DIRECTORY, self.sites)):
            parent = self.root / kind
            directories = sorted(parent.iterdir()) if parent.is_dir() and not parent.is_symlink() else []
            for directory in directories:
                if directory.is_dir() and not directory.is_symlink():
                    self._directory(f"{kind}/{directory.name}", writer, found)
        if self.manifest:
            self._keep_counts(writer, self.manifest)
        writer.skip_to(self._counters)

    def _read_manifest(self) -> Manifest | None:
        try:
            data = read_file(self.root, spec.MANIFEST_NAME, spec.MAX_MANIFEST_BYTES)
            return Manifest.decode(data, str(self.root / spec.MANIFEST_NAME))
        except (FormatError, FileNotFoundError) as error:
            self.notes.append(f"{self.root}: no usable manifest, the shards speak for themselves: {error}")
            return None

    @property
    def _counters(self) -> dict[str, int]:
        return dict(self.manifest.counters) if self.manifest else dict.fromkeys(COUNTERS, 0)

    def _keep_counts(self, writer: DatasetWriter, manifest: Manifest) -> None:
        for entry in manifest.sites:
            if entry.spec.name not in writer.sites and not entry.shards and not entry.derived_from:
                with suppress(ArgumentError):  # of a newer version, and empty
                    writer.add_site(entry.spec)
            if entry.spec.name in writer.sites:
                writer.count(entry.spec.name, expected=entry.counts.expected, dropped=entry.counts.dropped)

    def _directory(self, directory: str, writer: DatasetWriter, found: list[SiteRepair]) -> None:
        """Copy one site or table."""
        streams = list(self._streams(directory))
        if not streams:
            return
        try:
            site = read_site(streams[0].schema)
        except ArgumentError as error:
            self.notes.append(f"{self.root / directory}: {error}")
            return
        name = site.name if site else directory.rpartition("/")[2]
        if site is None and name not in TABLE_SCHEMAS:
            self.notes.append(f"{self.root / directory}: neither a site nor a known table; left out")
            return
        key = _TABLE_KEYS[name] if site is None else _Key("row", "row" if site.row_space == "tokens" else "")
        account = SiteRepair(name=name, rank=self.rank, n_committed=self._committed(name, site))
        found.append(account)
        if site:
            writer.add_site(site)
        schema = site_schema(site) if site else TABLE_SCHEMAS[name]
        target = _Target(writer, site, name, key, account)
        sound = [stream for stream in streams if stream.schema.equals(schema, check_metadata=False)]
        account.problems += [
            f"{self.root / stream.file}: its columns are not those of {name!r}"
            for stream in streams
            if stream not in sound
        ]
        for stream, limit in self._limited(sound, key):
            for batch in self._batches(stream, account):
                target.add(batch, limit)

    def _streams(self, directory: str) -> Iterator[_Stream]:
        """Yield the data and tail files of a directory in the order of their rows; tails oldest first."""
        names = [
            path.name
            for path in (self.root / directory).iterdir()
            if path.is_file() and not path.is_symlink()
        ]
        found = []
        for name in names:
            if name[:6].isdigit() and name.endswith((spec.DATA_SUFFIX, spec.OPEN_SUFFIX)):
                is_tail = name.endswith(spec.TAIL_SUFFIX)
                found.append((int(name[:6]), is_tail, _commit_number(name), name))
        for number, is_tail, _, name in sorted(found):
            stream = self._stream(f"{directory}/{name}", number, is_tail=is_tail)
            if stream is not None:
                yield stream

    def _stream(self, file: str, number: int, *, is_tail: bool) -> _Stream | None:
        try:
            memory = map_file(self.root, file, (self.root / file).stat().st_size)
            lengths = message_bytes(memory, len(spec.IPC_PREFIX))
            if lengths is None or bytes(memory[:8]) != spec.IPC_PREFIX:
                raise ArgumentError("no Arrow schema at its beginning")
            start = len(spec.IPC_PREFIX) + sum(lengths)
            schema = pa.ipc.read_schema(pa.py_buffer(memory[len(spec.IPC_PREFIX) : start]))
        except (ArgumentError, FormatError, pa.ArrowInvalid, OSError) as error:
            self.notes.append(f"{self.root / file}: cannot be read: {error}")
            return None
        session = (schema.metadata or {}).get(spec.SESSION_KEY.encode(), b"0")
        return _Stream(
            file=file,
            number=number,
            is_tail=is_tail,
            memory=memory,
            schema=schema,
            start=start,
            session=int(session) if session.isdigit() else 0,
        )

    def _limited(self, streams: list[_Stream], key: _Key) -> Iterator[tuple[_Stream, int]]:
        """Yield each stream with the first id that belongs to a later session, which may have used numbers again."""
        sessions = self.manifest.sessions if self.manifest else ()
        firsts = {stream.number: self._first_id(stream, key) for stream in streams if stream.session > 0}
        for stream in streams:
            later = stream.session + 1
            limits = [firsts[s.number] for s in streams if s.session >= later]
            if key.counter and later < len(sessions):
                next_free = _counters_of(sessions[later]).get(key.counter)
                if type(next_free) is int and 0 <= next_free <= 1 << spec.COUNTER_BITS:
                    limits.append((self.rank << spec.RANK_SHIFT) + next_free)
            yield stream, min(limits, default=_NO_LIMIT)

    def _first_id(self, stream: _Stream, key: _Key) -> int:
        batch = next(self._batches(stream, SiteRepair("", self.rank)), None)
        return _NO_LIMIT if batch is None else int(batch.column(key.column)[0].as_py())

    def _batches(self, stream: _Stream, account: SiteRepair) -> Iterator[pa.RecordBatch]:
        """Yield every record batch of a stream that agrees with its hashes."""
        known = self._known_offsets(stream)
        offset = stream.start
        while True:
            while known and known[0] < offset:
                known.pop(0)
            lengths = message_bytes(stream.memory, offset)
            if lengths is None:
                if not known:
                    return
                account.problems.append(f"{self.root / stream.file}: no record batch at byte {offset}")
                offset = (
                    known.pop(0) if known[0] > offset else known[1] if len(known) > 1 else len(stream.memory)
                )
                continue
            header = stream.memory[offset : offset + lengths[0]]
            body = stream.memory[offset + lengths[0] : offset + sum(lengths)]
            batch = _read_batch(stream.schema, header, body, stream.memory[offset : offset + sum(lengths)])
            if batch is None:
                account.problems.append(
                    f"{self.root / stream.file}: the record batch at byte {offset} is damaged"
                )
            elif batch.num_rows:
                yield batch
            following = [at for at in known if at > offset]
            offset = following[0] if batch is None and following else offset + sum(lengths)

    def _known_offsets(self, stream: _Stream) -> list[int]:
        """Return where record batches begin according to an index, to go on behind a damaged header."""
        if stream.is_tail:
            return []
        directory, _, _ = stream.file.rpartition("/")
        for path in sorted(
            (self.root / directory).glob(f"{stream.number:06d}*{spec.INDEX_SUFFIX}"), reverse=True
        ):
            try:
                name = f"{directory}/{path.name}"
                index = ShardIndex.decode(map_file(self.root, name, path.stat().st_size), str(path))
            except (FormatError, OSError):
                continue
            batches = index.batches[:-1] if index.has_tail else index.batches
            return [int(offset) for offset in batches["offset"]]
        return []

    def _committed(self, name: str, site: SiteSpec | None) -> int:
        if self.manifest is None:
            return 0
        if site is None:
            return sum(entry.n_rows for entry in self.manifest.tables if entry.name == name)
        return sum(entry.n_rows for entry in self.manifest.sites if entry.spec.name == name)


class _Target:
    """Writes rescued batches of one site or table."""

    def __init__(
        self, writer: DatasetWriter, site: SiteSpec | None, name: str, key: _Key, account: SiteRepair
    ) -> None:
        self._writer, self._site, self._name, self._key, self._account = writer, site, name, key, account
        self._last = -1

    def add(self, batch: pa.RecordBatch, limit: int) -> None:
        """Write the rows of `batch` that come after all before and lie below `limit`."""
        ids = batch.column(self._key.column).to_numpy()
        keep = ids < limit
        if self._key.is_unique:
            keep &= ids > self._last
        if not keep.any():
            return
        batch = batch if keep.all() else batch.filter(pa.array(keep))
        self._last = int(ids[keep][-1])
        self._account.n_rescued += batch.num_rows
        if self._site is None:
            self._writer.write_table(self._name, dict(zip(batch.schema.names, batch.columns, strict=True)))
        else:
            _write_site(self._writer, self._site, batch)


def _write_site(writer: DatasetWriter, site: SiteSpec, batch: pa.RecordBatch) -> None:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    values = columns["activation"].flatten().to_numpy(zero_copy_only=True)
    shapes = None
    if site.is_ragged:
        shapes = columns["shape"].flatten().to_numpy().reshape(-1, len(site.shape))
    else:
        values = values.reshape(batch.num_rows, *site.shape)
    is_own = site.row_space == "own"
    writer.write(
        site.name,
        values,
        rows=None if is_own else columns["row"].to_numpy(),
        shapes=shapes,
        statistics={name: columns[name].to_numpy() for name in site.statistics},
        token_row=columns["token_row"].fill_null(-1).to_numpy() if is_own else None,
        call=columns["call"].to_numpy() if is_own else None,
    )
    writer.wait()


def _read_batch(
    schema: pa.Schema, header: memoryview, body: memoryview, message: memoryview
) -> pa.RecordBatch | None:
    """Return a record batch that agrees with the hashes in its own metadata, else None."""
    if not check_message(header, body):
        return None
    try:
        if is_compressed(header) and decoded_bytes(header, body) > spec.MAX_BATCH_BYTES:
            return None
        batch = pa.ipc.read_record_batch(pa.py_buffer(message), schema)
        batch.validate(full=True)
    except (pa.ArrowException, ValueError, struct.error, OSError, EOFError):
        return None
    return batch


def _counters_of(session: Mapping[str, Any]) -> Mapping[str, Any]:
    counters = session.get("counters")
    return counters if isinstance(counters, dict) else {}


def _commit_number(file: str) -> int:
    middle = file.split(".")[1]
    return int(middle[1:]) if middle[:1] == "c" and middle[1:].isdigit() else -1
