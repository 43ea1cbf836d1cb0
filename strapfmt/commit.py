"""How bytes reach the disk: a thread that writes in order, and files that appear whole or not at all.

Everything that touches the disk on the writing side goes through one `Disk`, so that tests can fail any call or
replay what a power loss would have left.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from strapfmt import spec
from strapfmt.errors import WriteError, WriterConflictError

__all__ = ["Disk", "IoThread", "Lock", "Publisher"]

_IOV_MAX = 512
_MAX_PENDING = 64
_SYNC_FILE_RANGE_WRITE = 2


class Disk:
    """The operations a writer performs; each raises `OSError` when the system does."""

    def create(self, path: Path) -> int:
        """Create `path`, which must not exist, and return its descriptor."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def write(self, fd: int, pieces: Sequence[bytes | memoryview], offset: int) -> None:
        """Write all `pieces` one behind the other from `offset`."""
        views = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
        while views:
            written = os.pwritev(fd, views[:_IOV_MAX], offset)
            offset += written
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if written:
                views[0] = views[0][written:]

    def start_writeback(self, fd: int, offset: int, n_bytes: int) -> None:
        """Ask the kernel to begin writing a range out, so that a later fsync has less to wait for. Only a hint."""
        if _sync_file_range is not None:
            _sync_file_range(fd, offset, n_bytes, _SYNC_FILE_RANGE_WRITE)

    def fsync(self, fd: int) -> None:
        """Make what was written durable. A failure is final: the kernel marks lost pages as clean."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Replace `target` by `source` in one step."""
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file that may already be gone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Create a directory, which must not exist."""
        os.mkdir(path)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Publisher:
    """Makes files durable, many at a time: what is to be published is written first and waited for later.

    So the disk writes all files of a commit at once, and one journal entry of the file system holds most of them.

    Parameters
    ----------
    disk : Disk
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        #: Descriptors to be made durable in this order, and what is done then.
        self._pending: deque[tuple[int, Callable[[], None]]] = deque()
        #: Those of them that are files under a temporary name.
        self._staged: list[int] = []
        self._doomed: list[tuple[float, Path]] = []

    def publish(self, path: Path, pieces: Sequence[bytes | memoryview]) -> None:
        """Write a whole file under a temporary name (its `pieces` joined); `finish` gives it its own.

        The name itself is durable after `sync_directory` on the parent.
        """
        temporary = path.with_name(path.name + spec.TMP_SUFFIX)
        self._disk.unlink(temporary)
        fd = self._disk.create(temporary)
        self._staged.append(fd)
        self._disk.write(fd, pieces, 0)
        self._disk.start_writeback(fd, 0, sum(map(len, pieces)))
        self.sync(fd, lambda: self._name(fd, temporary, path))

    def sync(self, fd: int, then: Callable[[], None]) -> None:
        """Make what was written to `fd` durable, then do `then`; both happen in `finish`, or before."""
        self._pending.append((fd, then))
        if len(self._pending) >= _MAX_PENDING:
            self.finish()

    def finish(self) -> None:
        """Return when everything so far is durable and has its name."""
        while self._pending:
            fd, then = self._pending[0]
            self._disk.fsync(fd)
            then()
            self._pending.popleft()

    def commit(self, path: Path, data: bytes, directories: Sequence[Path]) -> None:
        """Publish the file that lists all others: those and their names in `directories` become durable before it."""
        self.finish()
        for directory in directories:
            self._disk.sync_directory(directory)
        self.publish(path, [data])
        self.finish()
        self._disk.sync_directory(path.parent)

    def remove(self, paths: Iterable[Path], *, after_s: float) -> None:
        """Remove files that nothing names any more, at the first call that comes so much later; 0: all of them now."""
        now = time.monotonic()
        self._doomed += [(now + after_s, path) for path in paths]
        due = [path for when, path in self._doomed if when <= now or not after_s]
        self._doomed = self._doomed[len(due) :]
        for path in due:
            self._disk.unlink(path)

    def close(self) -> None:
        """Close the descriptors of files that were not finished. For abort; called when no job runs."""
        self._pending.clear()
        while self._staged:
            self._disk.close(self._staged.pop())

    def _name(self, fd: int, temporary: Path, path: Path) -> None:
        self._staged.remove(fd)
        self._disk.close(fd)
        self._disk.rename(temporary, path)


def _find_sync_file_range() -> Callable[..., int] | None:
    try:
        function = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (AttributeError, OSError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


_sync_file_range = _find_sync_file_range()


class _Job(NamedTuple):
    run: Callable[[], None]
    #: Bytes of all jobs up to this one.
    end_bytes: int


class IoThread:
    """One thread that runs jobs in order; at most `limit_bytes` of them wait at a time.

    The first failure stops it: every later `submit` and `wait` raises it, as `WriteError`. An exception raised by a
    signal in `submit` or `wait` leaves no job half counted: what waits is read off the queue itself.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        #: A job stays at the front until it has run.
        self._jobs: deque[_Job] = deque()
        self._done_bytes = 0
        self._failure: BaseException | None = None
        self._is_stopping = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="strapfmt-io", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None], n_bytes: int = 0) -> None:
        """Run `job` after all earlier ones; blocks while more than the limit waits."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or self._end_bytes - self._done_bytes <= self._limit_bytes
            )
            self.check()
            self._jobs.append(_Job(job, self._end_bytes + n_bytes))
            self._changed.notify_all()

    def wait(self) -> None:
        """Block until every job so far has run."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._jobs)
            self.check()

    def check(self) -> None:
        """Raise the failure of an earlier job, if there was one."""
        if self._failure is not None:
            raise WriteError(self._failure) from self._failure

    def stop(self) -> None:
        """Finish what is queued (nothing more after a failure) and end the thread. Never raises."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def _end_bytes(self) -> int:
        return self._jobs[-1].end_bytes if self._jobs else self._done_bytes

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_stopping)
                if not self._jobs:
                    return
                job = self._jobs[0]
            failure = None
            try:
                job.run()
            except BaseException as error:  # noqa: BLE001 - kept, and raised where the caller waits
                failure = error
            with self._changed:
                self._done_bytes = job.end_bytes
                self._jobs.popleft()
                if failure is not None:
                    self._failure = failure
                    self._jobs.clear()
                self._changed.notify_all()
            del job, failure


class Lock:
    """The claim of one writer on one rank: an advisory lock that ends with the process that holds it."""

    def __init__(self, directory: Path) -> None:
        path = directory / spec.LOCK_NAME
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(self._fd)
            raise WriterConflictError(
                f"{directory}: {holder} is writing here; give each writer its own rank= or wait until it has closed"
            ) from None
        self._process = os.getpid()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)

    def release(self) -> None:
        """Give the claim back. Safe to call twice."""
        if self._fd >= 0:
            if os.getpid() == self._process:
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # a forked child may hold the descriptor too
            os.close(self._fd)
            self._fd = -1
