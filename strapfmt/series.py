"""The shards of one site or table: opens the next one when the last is full, and says what a commit made of them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from strapfmt import spec
from strapfmt.arrowfile import MessageEncoder
from strapfmt.commit import Disk, IoThread, Publisher
from strapfmt.errors import ArgumentError
from strapfmt.manifest import Shard
from strapfmt.shard import RowBatch, ShardWriter

__all__ = ["ShardSeries"]

_NUMBERED = re.compile("[0-9]{6}")


class ShardSeries:
    """The shards of one site or table, in order; opens the next one when the last is full.

    Raises
    ------
    ArgumentError
        If its directory is a link, or all numbers of shards are used.
    """

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
        self._number = _next_number(self.directory)
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


def _next_number(directory: Path) -> int:
    """Return the number of a new shard: above that of every file that is there, whoever left it."""
    if not _is_directory(directory.parent) or not _is_directory(directory):
        return 0
    found = [match for name in os.listdir(directory) if (match := _NUMBERED.match(name))]
    number = max((int(match[0]) for match in found), default=-1) + 1
    if number >= spec.MAX_SHARDS:
        raise ArgumentError(
            f"{directory}: expected numbers of shards below {spec.MAX_SHARDS}, but a file there has the last one; "
            "move it away if it is not of this dataset, or write into a new dataset"
        )
    return number


def _is_directory(path: Path) -> bool:
    """Whether a directory is there; what else may stand in its place is refused, as every reader would."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(mode):
        found = "a symbolic link" if stat.S_ISLNK(mode) else "a file"
        raise ArgumentError(
            f"{path}: expected a directory, found {found}, which readers do not follow: nothing written there could "
            "be read again; put the directory itself in its place"
        )
    return True
