"""Reads what is sound in one file of a shard, of which nothing but the file itself need be left."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from strapfmt import spec
from strapfmt.arrowfile import check_message, decoded_bytes, is_compressed, message_bytes
from strapfmt.errors import ArgumentError, FormatError
from strapfmt.index import ShardIndex
from strapfmt.mapped import map_file

__all__ = ["LINK", "Stream", "lost_files", "open_streams", "reading"]

LINK = "expected a plain directory, found a symbolic link; it was left out"


_NUMBERED = re.compile("[0-9]{6}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """One data or tail file found on disk.

    Attributes
    ----------
    root : Path
        The rank's directory.
    file : str
        Its path below `root`.
    number : int
        Of its shard.
    is_tail : bool
    memory : memoryview
        The whole file, mapped.
    schema : pyarrow.Schema
    start : int
        Where the first record batch begins, in bytes.
    session : int
        Of the writer that wrote it, counted from 0.
    """

    root: Path
    file: str
    number: int
    is_tail: bool
    memory: memoryview
    schema: pa.Schema
    start: int
    session: int

    def batches(self, problems: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield every record batch that agrees with its hashes; add what does not to `problems`."""
        known = self._known_offsets()
        offset = self.start
        while True:
            while known and known[0] < offset:
                known.pop(0)
            lengths = message_bytes(self.memory, offset)
            if lengths is None:
                if not known:
                    return
                problems.append(f"{self.root / self.file}: no record batch at byte {offset}")
                offset = (
                    known.pop(0) if known[0] > offset else known[1] if len(known) > 1 else len(self.memory)
                )
                continue
            header = self.memory[offset : offset + lengths[0]]
            body = self.memory[offset + lengths[0] : offset + sum(lengths)]
            batch = _read_batch(self.schema, header, body, self.memory[offset : offset + sum(lengths)])
            if batch is None:
                problems.append(f"{self.root / self.file}: the record batch at byte {offset} is damaged")
            elif batch.num_rows:
                yield batch
            following = [at for at in known if at > offset]
            offset = following[0] if batch is None and following else offset + sum(lengths)

    def first_id(self, column: str) -> int | None:
        """Return the lowest number in a column of the first sound batch, None where there is none."""
        batch = next(self.batches([]), None)
        return None if batch is None else int(batch.column(column).to_numpy().min())

    def _known_offsets(self) -> list[int]:
        """Return where record batches begin according to an index, to go on behind a damaged header."""
        if self.is_tail:
            return []
        directory, _, _ = self.file.rpartition("/")
        for path in sorted(
            (self.root / directory).glob(f"{self.number:06d}*{spec.INDEX_SUFFIX}"), reverse=True
        ):
            index = _read_index(self.root, f"{directory}/{path.name}")
            if index is None:
                continue
            batches = index.batches[:-1] if index.has_tail else index.batches
            return [int(offset) for offset in batches["offset"]]
        return []


def open_streams(root: Path, directory: str, unreadable: dict[str, str]) -> Iterator[Stream]:
    """Yield the data and tail files of a directory in the order of their rows; tails oldest first.

    Parameters
    ----------
    root : Path
        The rank's directory.
    directory : str
        A site's or a table's, below `root`.
    unreadable : dict
        Gets the files that cannot be read, and why.
    """
    place = root / directory
    if not place.is_dir() or place.is_symlink() or place.parent.is_symlink():
        return
    found = []
    for path in place.iterdir():
        name = path.name
        is_data = name.endswith((spec.DATA_SUFFIX, spec.OPEN_SUFFIX))
        if _NUMBERED.match(name) and is_data and path.is_file() and not path.is_symlink():
            found.append((int(name[:6]), name.endswith(spec.TAIL_SUFFIX), _commit_number(name), name))
    for number, is_tail, _, name in sorted(found):
        try:
            yield _open(root, f"{directory}/{name}", number, is_tail=is_tail)
        except (ArgumentError, FormatError, pa.ArrowException, ValueError, OSError) as error:
            unreadable[f"{directory}/{name}"] = f"cannot be read: {error}"


def lost_files(
    root: Path, directory: str, streams: Iterable[Stream], unreadable: dict[str, str]
) -> Iterator[str]:
    """Yield a problem for all in a directory that is not as a writer leaves it.

    For a rank without a usable manifest, which would say what has to be there.

    Parameters
    ----------
    root : Path
        The rank's directory.
    directory : str
        A site's or a table's, below `root`.
    streams : iterable of Stream
        Its files that can be read.
    unreadable : dict
        Files that cannot, and why; those of this directory are taken out.
    """
    place = root / directory
    if place.is_symlink():
        yield f"{place}: {LINK}"
        return
    damaged = [file for file in unreadable if file.startswith(f"{directory}/")]
    there = {*damaged, *(stream.file for stream in streams)}
    indexes = _newest_indexes(place)
    if not there and not indexes:
        yield f"{place}: no data file is in it; what was written there is gone"
    yield from (f"{root / file}: {unreadable.pop(file)}" for file in damaged)
    yield from filter(None, (_gone(root, f"{directory}/{name}", there) for name in indexes))


def _gone(root: Path, file: str, there: set[str]) -> str:
    """Say which file an index belongs to that is not among those there, or nothing."""
    index, shard = _read_index(root, file), file[: file.rindex("/") + 7]
    if shard + spec.DATA_SUFFIX in there:
        return ""
    if shard + spec.OPEN_SUFFIX not in there:
        rows = f"{index.n_rows:,} rows" if index else "rows"
        return f"{root / file}: it is the index of {rows} whose data file is gone"
    tail = file.removesuffix(spec.INDEX_SUFFIX) + spec.TAIL_SUFFIX
    if index and index.has_tail and tail not in there:
        return f"{root / tail}: the file is gone; the last rows of a shard were in it"
    return ""


def _newest_indexes(place: Path) -> list[str]:
    """Return the index of the last commit of each shard; one without a commit's number is that of a sealed shard."""
    newest: dict[str, tuple[float, str]] = {}
    for path in place.glob(f"[0-9]*{spec.INDEX_SUFFIX}"):
        shard, commit = path.name[:6], _commit_number(path.name)
        each = (math.inf if commit < 0 else commit, path.name)
        newest[shard] = max(each, newest.get(shard, each))
    return [name for _, name in sorted(newest.values(), key=lambda each: each[1])]


def _read_index(root: Path, file: str) -> ShardIndex | None:
    try:
        return ShardIndex.decode(map_file(root, file, (root / file).stat().st_size), str(root / file))
    except (FormatError, OSError):
        return None


def reading(path: Path, progress: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """Return what to tell how many bytes of a dataset's data files were read; it calls `progress` with the sums."""
    if progress is None:
        return lambda n_bytes: None
    suffixes = (spec.DATA_SUFFIX, spec.OPEN_SUFFIX)
    files = [file for file in path.glob("rank-*/*/*/[0-9]*") if file.name.endswith(suffixes)]
    total, done = sum(file.lstat().st_size for file in files), 0

    def read(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        progress(min(done, total), total)

    return read


def _open(root: Path, file: str, number: int, *, is_tail: bool) -> Stream:
    memory = map_file(root, file, (root / file).stat().st_size)
    lengths = message_bytes(memory, len(spec.IPC_PREFIX))
    if lengths is None or bytes(memory[:8]) != spec.IPC_PREFIX:
        raise ArgumentError("no Arrow schema at its beginning")
    start = len(spec.IPC_PREFIX) + sum(lengths)
    schema = pa.ipc.read_schema(pa.py_buffer(memory[len(spec.IPC_PREFIX) : start]))
    session = (schema.metadata or {}).get(spec.SESSION_KEY.encode(), b"0")
    return Stream(
        root=root,
        file=file,
        number=number,
        is_tail=is_tail,
        memory=memory,
        schema=schema,
        start=start,
        session=int(session) if session.isdigit() else 0,
    )


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


def _commit_number(file: str) -> int:
    found = re.match(r"[0-9]{6}\.c([0-9]+)\.", file)
    return int(found[1]) if found else -1
