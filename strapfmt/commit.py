"""How bytes reach the disk: a thread that writes in order, and files that appear whole or not at all.

Everything that touches the disk on the writing side goes through one `Disk`, so that tests can fail any call or
replay what a power loss would have left.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from strapfmt import spec
from strapfmt.errors import ArgumentError, WriteError, WriterConflictError

__all__ = ["Disk", "IoThread", "Lock", "Publisher", "check_open_files"]

_IOV_MAX = 512
_MAX_PENDING = 64
#: Descriptors left for files being published, and for the rest of the process.
_SPARE_FILES = _MAX_PENDING + 64
_SYNC_FILE_RANGE_WRITE = 2


class Disk:
    """The operations a writer performs; each raises `OSError` when the system does."""

    def create(self, path: Path) -> int:
        """Create `path`, which must not exist, and return its descriptor.

        Where few more files may be open, the limit of this process (`RLIMIT_NOFILE`) is raised, up to its hard one.
        """
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        _allow_open_files(fd + _SPARE_FILES)  # the system gives the lowest number that is free
        return fd

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

    def rmdir(self, path: Path) -> None:
        """Remove a directory, which must be empty."""
        os.rmdir(path)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def check_open_files(n: int, what: str) -> None:
    """Refuse what would need `n` open files at a time, if the hard limit of this process forbids that for good.

    Raises
    ------
    ArgumentError
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and n + _SPARE_FILES > hard:
        raise ArgumentError(
            f"{what}: expected at most {max(hard - _SPARE_FILES, 0)} files open for writing, as the hard limit of this "
            f"process is {hard} and each site keeps one open; raise it (ulimit -Hn) or write fewer sites"
        )


def _allow_open_files(n: int) -> None:
    """Raise the soft limit of open files to twice what is needed, if it is below, and the hard limit allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or n < soft or soft == hard:
        return
    more = 2 * n if hard == resource.RLIM_INFINITY else min(2 * n, hard)
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than the hard limit says
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))


class Publisher:
    """Makes files durable, many at a time: what is to be published is written first and waited for later.

    So the disk writes many files of a commit at once, and one journal entry of the file system holds most of them.
    After a failure nothing more may be asked of it but `close`: what `finish` would try again may be lost already.

    Parameters
    ----------
    disk : Disk
    check : callable, optional
        Called before a file is made or named; raises if its directory is not this writer's any more.
    """

    def __init__(self, disk: Disk, check: Callable[[], None] = lambda: None) -> None:
        self._disk, self.check = disk, check
        #: Descriptors to be made durable in this order, and what is done then.
        self._pending: deque[tuple[int, Callable[[], None]]] = deque()
        #: Those of them that are files under a temporary name.
        self._staged: list[int] = []
        self._doomed: list[tuple[float, Path]] = []

    def publish(self, path: Path, pieces: Sequence[bytes | memoryview]) -> None:
        """Write a whole file under a temporary name (its `pieces` joined); `finish` gives it its own.

        The name itself is durable after `sync_directory` on the parent.
        """
        self.check()
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
            self.check()
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
            with contextlib.suppress(OSError):
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
    signal in `submit` or `wait` leaves no job half counted: what waits is read off the queue itself. The thread starts
    with the first job.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        #: A job stays at the front until it has run.
        self._jobs: deque[_Job] = deque()
        self._done_bytes = 0
        self._failure: BaseException | None = None
        #: What to do last; None while more may come.
        self._last: Callable[[], None] | None = None
        self._is_over = False
        #: Entered itself and not through the condition, whose `__enter__` a signal can end with the lock taken.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="strapfmt-io", daemon=True)

    def submit(self, job: Callable[[], None], n_bytes: int = 0) -> None:
        """Run `job` after all earlier ones; blocks while more than the limit waits."""
        with self._lock:
            self._changed.wait_for(
                lambda: self._failure or self._end_bytes - self._done_bytes <= self._limit_bytes
            )
            self.check()
            if self._thread.ident is None:
                self._thread.start()
            self._changed.notify_all()  # before: a signal in between must not leave a job that nobody looks for
            self._jobs.append(_Job(job, self._end_bytes + n_bytes))

    def wait(self) -> None:
        """Block until every job so far has run."""
        with self._lock:
            self._changed.wait_for(lambda: self._failure or not self._jobs)
            self.check()

    def check(self) -> None:
        """Raise the failure of an earlier job, if there was one."""
        if self._failure is not None:
            raise WriteError(self._failure) from self._failure

    def stop(self, last: Callable[[], None]) -> None:
        """Finish what is queued (nothing more after a failure), do `last`, end the thread; returns when that is done.

        An exception raised by a signal meanwhile passes on, and the thread still does all of it. On the thread itself,
        where the garbage collector may call it, it returns before. Safe to call twice, if `last` is.
        """
        if self._thread.ident is None:
            last()
            return
        with self._lock:
            self._changed.notify_all()
            self._last = self._last or last
            if threading.current_thread() is self._thread:
                return
            # Not by `join`, which takes a thread for ended once it was interrupted.
            self._changed.wait_for(lambda: self._is_over)
        self._thread.join()

    @property
    def _end_bytes(self) -> int:
        return self._jobs[-1].end_bytes if self._jobs else self._done_bytes

    def _run(self) -> None:
        while job := self._next_job():
            failure = None
            try:
                job.run()
            except BaseException as error:  # noqa: BLE001 - kept, and raised where the caller waits
                failure = error
            with self._lock:
                self._done_bytes = job.end_bytes
                self._jobs.popleft()
                if failure is not None:
                    self._failure = failure
                    self._jobs.clear()
                self._changed.notify_all()
            del job, failure
        try:
            if self._last is not None:
                self._last()
        finally:
            with self._lock:
                self._is_over = True
                self._changed.notify_all()

    def _next_job(self) -> _Job | None:
        """Wait for a job; None if no more will come."""
        with self._lock:
            self._changed.wait_for(lambda: self._jobs or self._last)
            return self._jobs[0] if self._jobs else None


class Lock:
    """The claim of one writer on one rank: an advisory lock that ends with the process that holds it."""

    def __init__(self, directory: Path) -> None:
        self._path = path = directory / spec.LOCK_NAME
        self._fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            self._lock()
        except BaseException:
            os.close(self._fd)
            raise
        self._process = os.getpid()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 200, 0).decode(errors="replace").strip() or "another process"
            raise WriterConflictError(
                f"{self._path.parent}: {holder} is writing here; give each writer its own rank= or wait until it has "
                "closed"
            ) from None
        if not self._is_in_place():
            raise WriterConflictError(
                f"{self._path.parent}: another process removed or replaced it at this moment; try again"
            )
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the note for people
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)

    def check(self) -> None:
        """Raise if the directory was moved, removed or made anew since: then it is somebody else's.

        Raises
        ------
        WriterConflictError
        """
        if not self._is_in_place():
            raise WriterConflictError(
                f"{self._path.parent}: this directory was removed or moved while it was written, and nothing more goes "
                "into what may be there now; what was committed is where it was moved to"
            )

    def _is_in_place(self) -> bool:
        """Whether the locked file still has its name: a lock on one that was removed keeps nobody out."""
        try:
            return os.path.samestat(os.fstat(self._fd), os.lstat(self._path))
        except OSError:
            return False

    @property
    def is_held(self) -> bool:
        """Whether this process holds the claim: not after `release`, nor in a fork, nor if the directory is gone."""
        return self._fd >= 0 and os.getpid() == self._process and self._is_in_place()

    def release(self) -> None:
        """Give the claim back. Safe to call twice."""
        if self._fd >= 0:
            if os.getpid() == self._process:
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # a forked child may hold the descriptor too
            os.close(self._fd)
            self._fd = -1
