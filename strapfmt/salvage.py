"""Reads what is sound in one file of a shard, of which nothing but the file itself need be left."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc

from strapfmt import spec
from strapfmt.arrowfile import check_message, decoded_bytes, is_compressed, message_bytes
from strapfmt.errors import ArgumentError, FormatError
from strapfmt.index import ShardIndex
from strapfmt.mapped import map_file

__all__ = ["Stream", "open_streams"]


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
        """Return the first sound number in a column, None where there is none."""
        batch = next(self.batches([]), None)
        return None if batch is None else int(batch.column(column)[0].as_py())

    def _known_offsets(self) -> list[int]:
        """Return where record batches begin according to an index, to go on behind a damaged header."""
        if self.is_tail:
            return []
        directory, _, _ = self.file.rpartition("/")
        for path in sorted(
            (self.root / directory).glob(f"{self.number:06d}*{spec.INDEX_SUFFIX}"), reverse=True
        ):
            try:
                name = f"{directory}/{path.name}"
                index = ShardIndex.decode(map_file(self.root, name, path.stat().st_size), str(path))
            except (FormatError, OSError):
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
        is_data = name[:6].isdigit() and name.endswith((spec.DATA_SUFFIX, spec.OPEN_SUFFIX))
        if is_data and path.is_file() and not path.is_symlink():
            found.append((int(name[:6]), name.endswith(spec.TAIL_SUFFIX), _commit_number(name), name))
    for number, is_tail, _, name in sorted(found):
        try:
            yield _open(root, f"{directory}/{name}", number, is_tail=is_tail)
        except (ArgumentError, FormatError, pa.ArrowException, ValueError, OSError) as error:
            unreadable[f"{directory}/{name}"] = f"cannot be read: {error}"


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
    middle = file.split(".")[1]
    return int(middle[1:]) if middle[:1] == "c" and middle[1:].isdigit() else -1
