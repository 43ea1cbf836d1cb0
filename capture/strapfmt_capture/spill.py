"""A second place for steps that come while the ring is full: a file that the drain reads back, in order.

A step that is spilled goes through a ring of its own, from which a thread appends records of items and values to the
file; where each lies is an item of the main ring, so that the drain meets everything in the order in which it happened.
The file has no name: whatever ends the process, nothing of it stays.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from strapfmt.errors import ArgumentError
from strapfmt_capture.items import Item, Spilled, StepStart
from strapfmt_capture.memory import Memory, aligned
from strapfmt_capture.messages import ItemReader, encode_items
from strapfmt_capture.ring import Ring
from strapfmt_capture.turn import Block, Values

__all__ = ["Spill", "SpillFile"]

_SHARE = 8
_POLL_S = 0.02
#: Sizes of the three parts of a record, which begins with them: items, their arrays, and values at a multiple of 64.
_SIZES = struct.Struct("<QQQ")
_PUNCH_HOLE_KEEP_SIZE = 3


class SpillFile:
    """Records one behind the other; one process appends them, and the same or another one reads them once.

    Parameters
    ----------
    fd : int
        The file's own from here on.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        #: Where the next record goes, and before which nothing is needed any more.
        self.end = self.freed = 0

    def append(self, items: Sequence[Item]) -> Spilled:
        """Write a record of `items` and of the values they speak of.

        Raises
        ------
        OSError
            If the system refuses; the file is as it was before.
        """
        placed, pieces = _placed(items)
        coded, arrays = encode_items(placed)
        text = json.dumps(coded, separators=(",", ":")).encode()
        tail = b"".join([array.tobytes() for array in arrays])
        n_bytes = sum(aligned(len(piece)) for piece in pieces)
        at = _write(self.fd, _SIZES.pack(len(text), len(tail), n_bytes) + text + tail, self.end)
        at = start = aligned(at)
        for piece in pieces:
            at = _write(self.fd, piece.data, at)
            at = _write(
                self.fd, bytes(aligned(at) - at), at
            )  # or the last record would be shorter than it says
        record = Spilled(start=self.end, stop=start + n_bytes)
        self.end = record.stop
        return record

    def read(self, start: int, reader: ItemReader) -> tuple[list[Item], int]:
        """Return the items of the record at `start`, with memory of their own, and where the next record begins."""
        n_text, n_tail, n_bytes = _SIZES.unpack(_read(self.fd, _SIZES.size, start))
        at = start + _SIZES.size
        text, tail = _read(self.fd, n_text, at), _read(self.fd, n_tail, at + n_text)
        at = aligned(at + n_text + n_tail)
        memory = Memory(max(n_bytes, 1))
        _read_into(self.fd, memory.bytes[:n_bytes], at)
        return reader.decode(json.loads(text), tail, memory), at + n_bytes

    def release(self, position: int) -> None:
        """Give the space before `position` back, where the file system can do that."""
        if position > self.freed and _fallocate is not None:
            _fallocate(self.fd, _PUNCH_HOLE_KEEP_SIZE, self.freed, position - self.freed)
        self.freed = max(self.freed, position)

    def close(self) -> None:
        """Close the file, and with it remove it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Spill:
    """The producer's side: a ring for steps that are spilled, and the thread that empties it into the file.

    Parameters
    ----------
    directory : Path
        Where the file is made.
    main : Ring
        Gets an item for what was spilled; when the directory is full, it gets the values themselves, as it has space.
    on_failure : callable
        Called with what else may end the thread.

    Attributes
    ----------
    ring : Ring
        For the items and values of steps that are spilled.
    file : SpillFile
    n_steps : int
        Steps that have begun while the main ring was full, as far as the thread has come.
    n_refused : int
        How often the directory was full.
    """

    def __init__(
        self, directory: Path, main: Ring[Item], on_failure: Callable[[BaseException], None]
    ) -> None:
        try:
            with tempfile.TemporaryFile(dir=directory, prefix="strapfmt-spill-") as file:
                self.file = SpillFile(os.dup(file.fileno()))
        except OSError as error:
            raise ArgumentError(f"spill_path: no file can be made in {str(directory)!r}: {error}") from error
        self.ring: Ring[Item | threading.Event] = Ring(main.n_bytes, linger_s=main.linger_s)
        self.n_steps = self.n_refused = 0
        self._last_step = -1
        self._main, self._on_failure = main, on_failure
        self._last: Spilled | None = None
        self._thread = threading.Thread(target=self._run, name="strapfmt-spill", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def settle(self) -> None:
        """Return when the main ring has an item for everything that was spilled: what comes next may go there."""
        done = threading.Event()
        self.ring.publish(done)
        while not self.ring.is_aborted:
            self.ring.press()
            if done.wait(_POLL_S):
                return

    def close(self) -> None:
        """End the thread, and give memory back; the file stays for who reads it."""
        self.ring.close()
        self._thread.join()
        self.ring.free()

    def abort(self) -> None:
        """End the thread, wherever it is."""
        self.ring.abort()

    def _run(self) -> None:
        try:
            while items := self.ring.take(self.ring.n_bytes // _SHARE):
                position = self.ring.position
                some: list[Item] = []
                for item in items:
                    if isinstance(item, threading.Event):
                        self._move(some)
                        some = []
                        item.set()
                    else:
                        some.append(item)
                        self._count(item)
                self._move(some)
                self.ring.release(position)
        except BaseException as error:  # noqa: BLE001 - raised where the user waits
            self.ring.abort()
            self._on_failure(error)

    def _count(self, item: Item) -> None:
        if (
            isinstance(item, StepStart) and item.step.step != self._last_step
        ):  # an interrupt lets it be said again
            self._last_step = item.step.step
            self.n_steps += 1

    def _move(self, items: Sequence[Item]) -> None:
        if not items:
            return
        try:
            record = self.file.append(items)
        except OSError:
            self.n_refused += 1
            self._carry(items)
            return
        if self._last is not None:
            longer = Spilled(start=self._last.start, stop=record.stop)
            if self._main.replace_last(self._last, longer):
                self._last = longer
                return
        self._last = record
        self._main.publish(record)

    def _carry(self, items: Sequence[Item]) -> None:
        """Move items to the main ring, waiting for space there."""
        for item in items:
            if not isinstance(item, Values | Block):
                self._main.publish(item)
                continue
            slot = self._main.reserve(item.extent)
            if slot is None:
                return
            self._main.array(slot.start, np.dtype(np.uint8), (item.extent,))[:] = _bytes_of(item)
            self._main.publish(replace(item, memory=self._main.memory, start=slot.start), slot)


def _placed(items: Sequence[Item]) -> tuple[list[Item], list[npt.NDArray[np.uint8]]]:
    """Return items whose values lie one behind the other from 0, and the bytes of these."""
    placed: list[Item] = []
    pieces: list[npt.NDArray[np.uint8]] = []
    at = 0
    for item in items:
        if isinstance(item, Values | Block):
            pieces.append(_bytes_of(item))
            placed.append(replace(item, start=at))
            at += aligned(item.extent)
        else:
            placed.append(item)
    return placed, pieces


def _bytes_of(values: Values | Block) -> npt.NDArray[np.uint8]:
    return values.memory.array(values.start, np.dtype(np.uint8), (values.extent,))


def _write(fd: int, data: bytes | memoryview, at: int) -> int:
    """Write all of `data` at an offset; return the one behind it."""
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, at)
        view, at = view[n:], at + n
    return at


def _read(fd: int, n_bytes: int, at: int) -> bytes:
    data = np.empty(n_bytes, np.uint8)
    _read_into(fd, data, at)
    return data.tobytes()


def _read_into(fd: int, target: npt.NDArray[np.uint8], at: int) -> None:
    view = target.data
    while view:
        n = os.preadv(fd, [view], at)
        if n == 0:
            raise EOFError(f"the spill file ends at {at}, before {len(view)} bytes that were written to it")
        view, at = view[n:], at + n


def _find_fallocate() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).fallocate
    except (AttributeError, OSError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function


_fallocate = _find_fallocate()
