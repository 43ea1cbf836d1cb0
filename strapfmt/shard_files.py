"""The files of one shard, mapped on first use and checked against manifest and index before anything is read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from strapfmt import spec
from strapfmt.arrowfile import digest
from strapfmt.codecs import CODECS
from strapfmt.errors import CorruptError, DatasetChangedError, FormatError, UnsupportedError
from strapfmt.index import ShardIndex
from strapfmt.manifest import ROLES, Layout, Manifest, Part, Shard
from strapfmt.mapped import map_file, read_file
from strapfmt.schema import SiteSpec

__all__ = ["ShardFiles"]


_SMALL_BYTES = 64 << 10
_NONE_VERIFIED: npt.NDArray[np.bool_] = np.zeros(0, bool)


@dataclass(slots=True)
class _Mapped:
    """The files of a shard in memory."""

    data: memoryview
    tail: memoryview


class ShardFiles:
    """One shard of a site (or, with `site` None, of a table).

    Parameters
    ----------
    root : Path
        The rank's directory.
    shard : Shard
    schema : callable
        Returns what the shard's columns must be; called when the first of them is read.
    site : SiteSpec, optional
    layout : Layout, optional
    """

    def __init__(
        self,
        root: Path,
        shard: Shard,
        schema: Callable[[], pa.Schema],
        site: SiteSpec | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.root, self.shard, self._make_schema = root, shard, schema
        self._site, self._layout = site, layout or Layout()
        self._index: ShardIndex | None = None
        self._mapped: _Mapped | None = None
        self._lent: _Mapped | None = None
        self._pinned: dict[tuple[str, bool], memoryview] = {}
        self._making = threading.RLock()
        self._verified = _NONE_VERIFIED
        for part in shard.parts:
            if (part.must_understand or part.role in ROLES) and (
                part.role not in ROLES or part.codec not in CODECS
            ):
                raise UnsupportedError(
                    f"{self.place}: a part of role {part.role!r} with codec {part.codec!r} must be understood, and "
                    "this version of strapfmt does not know it: install a newer one"
                )

    @cached_property
    def schema(self) -> pa.Schema:
        """What the columns are."""
        return self._make_schema()

    @cached_property
    def place(self) -> str:
        """The data file, for errors."""
        return str(self.root / self._part("data").file)

    @property
    def index(self) -> ShardIndex:
        """The index, mapped and checked on first use."""
        if self._index is None:
            with self._making, self._changes_told():
                if self._index is None:
                    index = self._read_index()
                    self._verified = np.zeros(len(index.batches), bool)
                    self._index = index
        return self._index

    @property
    def n_batches(self) -> int:
        """Record batches, the tail's included."""
        return len(self.index.batches)

    @property
    def is_plain(self) -> bool:
        """Whether bodies on disk are the memory of the tensor."""
        return CODECS[self._part("data").codec].is_plain

    @property
    def is_row_aligned(self) -> bool:
        """Whether the data file is one 2-D tensor."""
        return self.is_plain and self._layout.kind == "rows"

    @property
    def n_unverified_bytes(self) -> int:
        """Bytes of bodies whose hashes have not been compared yet, as far as the index was needed."""
        if self._index is None:
            return sum(part.n_bytes for part in self.shard.parts if part.role != "index")
        return int(self._index.batches["body_bytes"][~self._verified].sum())

    def pin(self) -> None:
        """Open what a live writer may replace, so that it stays; nothing is read but a small index.

        Raises
        ------
        CorruptError, DatasetChangedError
        """
        for part in self.shard.parts:
            for writable in (False, True) if self._has_views and part.role != "index" else (False,):
                if part.role in ROLES and (part.role, writable) not in self._pinned:
                    self._pinned[part.role, writable] = self._open(part, writable=writable)

    def check_files(self) -> None:
        """Map the files and check all but their record batches.

        Raises
        ------
        CorruptError, DatasetChangedError
        """
        _ = self.index, self._maps

    def release(self) -> None:
        """Let go of all maps and forget what was checked, where files can be opened again as they were.

        Nothing that was taken by its address may be used afterwards.
        """
        if self.shard.is_sealed:
            self._index = self._mapped = self._lent = None
            self._verified = _NONE_VERIFIED
            self._forget()

    def verify(self, first: int, last: int) -> None:
        """Compare the hashes of batches `first` to `last` (exclusive) with the index, each once.

        Raises
        ------
        CorruptError
        """
        _ = self.index
        for number in range(first, last):
            if not self._verified[number]:
                header, body = self._message(number)
                self._check_header(number, header)
                if digest(body) != self.index.batches["body_hash"][number].tobytes():
                    raise CorruptError(
                        f"{self.place_of(number)}: the body's checksum does not match its bytes; "
                        "`strapfmt verify` lists all damage"
                    )
                self._verified[number] = True

    @property
    def _n_in_data(self) -> int:
        """Batches in the data file, the tail's left out."""
        return self.n_batches - (1 if self.index.has_tail else 0)

    def _message(self, number: int) -> tuple[memoryview, memoryview]:
        entry = self.index.batches[number]
        start, middle = int(entry["offset"]), int(entry["offset"]) + int(entry["header_bytes"])
        memory = self._memory(number)
        return memory[start:middle], memory[middle : middle + int(entry["body_bytes"])]

    def _memory(self, number: int) -> memoryview:
        return self._maps.tail if self._in_tail(number) else self._maps.data

    def _in_tail(self, number: int) -> bool:
        return self.index.has_tail and number == self.n_batches - 1

    def place_of(self, number: int) -> str:
        """Name a record batch, for errors."""
        if self._in_tail(number):
            return f"{self.root / self._part('tail').file}: its record batch"
        return f"{self.place}: record batch {number}"

    def _check_header(self, number: int, header: memoryview) -> None:
        if digest(header) != self.index.batches["header_hash"][number].tobytes():
            raise CorruptError(f"{self.place_of(number)}: the header's checksum does not match its bytes")

    @property
    def _has_views(self) -> bool:
        return self._site is not None and not self._site.is_ragged and self.is_plain

    @property
    def _maps(self) -> _Mapped:
        """The memory that is read, hashed and gathered from; nobody can write into it."""
        if self._mapped is None:
            # Made once: where threads replaced each other's maps, addresses taken of one would outlive it.
            with self._making, self._changes_told():
                if self._mapped is None:
                    self._mapped = self._map(writable=False)
        return self._mapped

    @property
    def _lent_maps(self) -> _Mapped:
        """The same files in other memory, which views are of: PyTorch's tensors can be written into."""
        if self._lent is None:
            with self._making, self._changes_told():
                if self._lent is None:
                    self._lent = self._map(writable=True)
        return self._lent

    def _map(self, *, writable: bool) -> _Mapped:
        index, data, tail = self.index, self._part("data"), self.shard.part("tail")
        if data.n_bytes != index.data_end():
            raise CorruptError(
                f"{self.place}: the manifest says {data.n_bytes} bytes, the index {index.data_end()}"
            )
        if (tail is not None) != index.has_tail:
            raise CorruptError(f"{self.place}: manifest and index disagree on whether there is a tail")
        mapped = _Mapped(self._open(data, writable=writable), memoryview(b""))
        self._check_ends(mapped.data, data, is_tail=False)
        if tail is not None:
            mapped.tail = self._open(tail, writable=writable)
            self._check_ends(mapped.tail, tail, is_tail=True)
        if self.shard.is_sealed:
            # Its index may have been read long before: a dataset written anew meanwhile has files of the same names.
            self._index_bytes()
        return mapped

    @contextmanager
    def _changes_told(self) -> Iterator[None]:
        """Tell damage from files that were replaced since the manifest was read."""
        try:
            yield
        except CorruptError as error:
            if self._is_committed():
                raise
            raise DatasetChangedError(
                f"{self.place}: the dataset was replaced or moved on since it was opened; refresh() or open it again"
            ) from error

    def _is_committed(self) -> bool:
        """Whether the manifest, read again, lists this shard as it was; also if that cannot be said."""
        try:
            data = read_file(self.root, spec.MANIFEST_NAME, spec.MAX_MANIFEST_BYTES)
            manifest = Manifest.decode(data, str(self.root))
        except (FormatError, FileNotFoundError):
            return True
        shards = [shard for site in manifest.sites for shard in site.shards]
        shards += [shard for table in manifest.tables for shard in table.shards]
        return any(shard.parts == self.shard.parts for shard in shards)

    def _check_ends(self, memory: memoryview, part: Part, *, is_tail: bool) -> None:
        """Check magic, schema and footer, and that every message lies inside."""
        index, place = self.index, str(self.root / part.file)
        if index.data_hash(tail=is_tail).hex() != part.hash:
            raise CorruptError(f"{place}: the manifest's checksum does not match the hashes in the index")
        prefix = memory[: index.prefix_bytes]
        if digest(prefix) != index.prefix_hash or bytes(prefix[:8]) != spec.IPC_PREFIX:
            raise CorruptError(f"{place}: the checksum of the schema does not match its bytes")
        if index.is_sealed or is_tail:
            end = memory[index.trailer_offset :]
            if len(end) != index.trailer_bytes or digest(end) != index.trailer_hash:
                raise CorruptError(f"{place}: the checksum of the footer does not match its bytes")
        schema = _read_schema(prefix, place)
        if not schema.equals(self.schema, check_metadata=False):
            raise CorruptError(f"{place}: expected the columns\n{self.schema}\ngot\n{schema}")
        batches = index.batches[-1:] if is_tail else index.batches[:-1] if index.has_tail else index.batches
        ends = batches["offset"] + batches["header_bytes"].astype(np.uint64) + batches["body_bytes"]
        if len(ends) and int(ends.max()) > len(memory):
            raise CorruptError(
                f"{place}: a record batch ends at {int(ends.max())}, the file at {len(memory)}"
            )
        if self._site is not None and not self._site.is_ragged and self.is_plain:
            needed = batches["n_rows"].astype(np.uint64) * np.uint64(self._site.row_bytes)
            if np.any(needed > batches["body_bytes"]):
                raise CorruptError(f"{place}: a record batch is shorter than its rows")
            in_rows = self.is_row_aligned and not is_tail
            unit = self._site.row_bytes if in_rows else self._site.stored_dtype.item_bytes
            if np.any((batches["offset"] + batches["header_bytes"].astype(np.uint64)) % np.uint64(unit)):
                raise CorruptError(f"{place}: a body does not begin at a multiple of {unit} bytes")

    def _index_bytes(self) -> memoryview:
        """Open the index and compare it with the manifest."""
        part = self._part("index")
        place = str(self.root / part.file)
        if part.n_bytes > spec.MAX_INDEX_BYTES:
            raise CorruptError(f"{place}: expected at most {spec.MAX_INDEX_BYTES} bytes, got {part.n_bytes}")
        data = self._open(part)
        if digest(data).hex() != part.hash:
            raise CorruptError(f"{place}: the manifest's checksum does not match the index")
        return data

    def _open(self, part: Part, *, writable: bool = False) -> memoryview:
        """Return the committed bytes of a file: those that were pinned, else its map, or a copy of a small index.

        A process may hold some 65,000 maps, and a shard needs one for its data.
        """
        pinned = self._pinned.get((part.role, writable))
        if pinned is not None:
            return pinned
        if part.role == "index" and part.n_bytes <= _SMALL_BYTES:
            return memoryview(bytes(map_file(self.root, part.file, part.n_bytes)))
        return map_file(self.root, part.file, part.n_bytes, writable=writable)

    def _read_index(self) -> ShardIndex:
        data, place = self._index_bytes(), str(self.root / self._part("index").file)
        index = ShardIndex.decode(data, place)
        runs = index.runs
        if index.n_rows != self.shard.n_rows or index.is_sealed != self.shard.is_sealed:
            raise CorruptError(f"{place}: expected {self.shard.n_rows} rows, got {index.n_rows}")
        if self._site is not None:
            last = int(runs["row"][-1]) + index.n_rows - int(runs["ordinal"][-1]) - 1 if len(runs) else None
            if not len(runs) or int(runs["row"][0]) != self.shard.first_row or last != self.shard.last_row:
                raise CorruptError(
                    f"{place}: expected rows {self.shard.first_row}..{self.shard.last_row}, got {last}"
                )
        return index

    def _forget(self) -> None:
        """Drop what was derived from the maps."""

    def _part(self, role: str) -> Part:
        part = self.shard.part(role)
        if part is None:
            raise AssertionError(f"a checked manifest has a {role} part")
        return part


def _read_schema(prefix: memoryview, place: str) -> pa.Schema:
    try:
        return pa.ipc.read_schema(pa.py_buffer(prefix[len(spec.IPC_PREFIX) :]))
    except (pa.ArrowException, ValueError, OSError, EOFError) as error:
        raise CorruptError(f"{place}: Arrow cannot read the schema: {error}") from error
