"""Whether what a capture holds still fits on the disk: asked before each pass, while there is room to commit it."""

from __future__ import annotations

import os
from copy import copy
from pathlib import Path
from typing import NamedTuple

from strapfmt import spec
from strapfmt.errors import DiskSpaceError
from strapfmt.text import shown_path

__all__ = ["DiskSpace", "PassSize"]

# Of `tokens`, and of row ids and statistics, for each row of a site: more than they take.
_BESIDE_BYTES = 128
_FIRST_FACTOR = 2.0


class PassSize(NamedTuple):
    """What a pass will store, as far as that is known: bytes of values, and tokens, with values or without."""

    n_bytes: int = 0
    n_tokens: int = 0


class DiskSpace:
    """Compares what is free with what is still to be written, and stops the capture in time.

    Parameters
    ----------
    path : Path
        The dataset.
    min_free_bytes : int or None
        What must stay free; None: nothing is ever asked.
    batch_bytes : int
        Target size of a record batch: so much of each site waits in the writer's memory.
    """

    def __init__(self, path: Path, min_free_bytes: int | None, batch_bytes: int) -> None:
        self._path, self._min_free_bytes, self._batch_bytes = path, min_free_bytes, batch_bytes
        #: None where it is not known: not asked, or a file system that does not say.
        self._free_bytes: int | None = None
        #: Handed to the writer so far, and the most of it that waits in its memory.
        self._whole_bytes = self._most_buffered_bytes = 0
        #: Bytes on the disk for each byte of values; a guess before anything was written.
        self._factor = _FIRST_FACTOR
        #: The largest pass so far: the next one may be as large, where its size is not known.
        self._pass_bytes = 0
        self._failure: DiskSpaceError | None = None

    @property
    def is_watched(self) -> bool:
        """Whether anything is to stay free."""
        return self._min_free_bytes is not None

    @property
    def is_short(self) -> bool:
        """Whether the capture was stopped."""
        return self._failure is not None

    @property
    def note(self) -> str | None:
        """What to tell of a capture that was stopped; None of any other."""
        if self._failure is None:
            return None
        least, free = self._failure.min_free_bytes, self._failure.free_bytes
        return f"stopped before the disk was full: {free} bytes were free and {least} are to stay so"

    def look(self, *, n_bytes: int, n_rows: int, n_sites: int) -> None:
        """Ask the system, when all that was handed to the writer lies on the disk or in its buffers.

        Parameters
        ----------
        n_bytes, n_rows, n_sites : int
            Values and rows that the writer was given so far, and of how many sites.
        """
        if self._min_free_bytes is None:
            return
        try:
            found = os.statvfs(self._path)
        except FileNotFoundError:  # removed or moved, which the writer is about to say
            self._free_bytes = None
            return
        self._whole_bytes = n_bytes + n_rows * _BESIDE_BYTES
        self._most_buffered_bytes = (n_sites + len(spec.TABLES)) * self._batch_bytes
        self._factor = self._whole_bytes / n_bytes if n_bytes else _FIRST_FACTOR
        self._free_bytes = found.f_bavail * found.f_frsize if found.f_blocks else None

    def passed(self, n_bytes: int) -> None:
        """Take note of the bytes that a pass has put into the ring."""
        self._pass_bytes = max(self._pass_bytes, n_bytes)

    def check(self, n_waiting_bytes: int, size: PassSize) -> None:
        """Raise if another pass might not fit behind the bytes that wait in the ring; from then on always.

        Parameters
        ----------
        n_waiting_bytes : int
        size : PassSize
            Of this pass; that it is as large as the largest so far is assumed anyhow.

        Raises
        ------
        DiskSpaceError
        """
        least, free = self._min_free_bytes, self._free_bytes
        n_pass_bytes = max(self._pass_bytes or n_waiting_bytes, size.n_bytes)
        of_pass = max(int(n_pass_bytes * self._factor), size.n_tokens * _BESIDE_BYTES)
        to_come = int(n_waiting_bytes * self._factor) + of_pass
        # A commit writes each buffer as a tail, while the tail before it is still there for readers.
        needed = to_come + 2 * min(self._whole_bytes + to_come, self._most_buffered_bytes)
        if self._failure is None and least is not None and free is not None and free - needed < least:
            self._failure = DiskSpaceError(
                shown_path(self._path), free_bytes=free, needed_bytes=needed, min_free_bytes=least
            )
        if self._failure is not None:
            raise copy(self._failure)  # without the frames that the one before has gathered
