"""The disk, the thread that writes to it, and the lock on a rank."""

import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from strapfmt import spec
from strapfmt.commit import Disk, IoThread, Lock, Publisher, check_open_files
from strapfmt.errors import ArgumentError, WriteError, WriterConflictError


def test_a_published_file_is_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "manifest.json"
    (tmp_path / "manifest.json.tmp").write_bytes(b"left by a crash")
    target.write_bytes(b"before")
    pieces = [b"a" * 3, memoryview(b""), memoryview(b"bcd")] + [bytes([i % 251]) for i in range(3000)]
    publisher = Publisher(Disk())
    publisher.publish(target, pieces)
    assert target.read_bytes() == b"before"
    publisher.finish()
    assert target.read_bytes() == b"".join(bytes(piece) for piece in pieces)
    assert os.listdir(tmp_path) == ["manifest.json"]


def test_a_failed_publication_leaves_what_was_there(tmp_path: Path) -> None:
    class NoSync(Disk):
        def fsync(self, fd: int) -> None:
            raise OSError(5, "lost")

    target = tmp_path / "x"
    target.write_bytes(b"before")
    n_descriptors = len(os.listdir("/proc/self/fd"))
    publisher = Publisher(NoSync())
    publisher.publish(target, [b"after"])
    with pytest.raises(OSError, match="lost"):
        publisher.finish()
    assert target.read_bytes() == b"before"
    publisher.close()
    assert len(os.listdir("/proc/self/fd")) == n_descriptors


def test_files_are_named_in_order_each_after_it_is_durable_and_few_wait_at_a_time(tmp_path: Path) -> None:
    log: list[str] = []

    class Logging(Disk):
        def fsync(self, fd: int) -> None:
            log.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
            super().fsync(fd)

        def rename(self, source: Path, target: Path) -> None:
            log.append(f"rename {target.name}")
            super().rename(source, target)

    publisher, n_descriptors = Publisher(Logging()), len(os.listdir("/proc/self/fd"))
    for i in range(300):
        publisher.publish(tmp_path / f"{i}", [bytes([i % 256])])
        assert len(os.listdir("/proc/self/fd")) < n_descriptors + 100
    publisher.finish()
    assert log == [text for i in range(300) for text in (f"fsync {i}.tmp", f"rename {i}")]
    assert len(os.listdir("/proc/self/fd")) == n_descriptors


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_nothing_is_created_over_what_exists(tmp_path: Path, kind: str) -> None:
    target, victim = tmp_path / "x", tmp_path / "victim"
    if kind == "file":
        target.touch()
    else:
        target.symlink_to(victim)
    if kind == "link":
        victim.write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        Disk().create(target)
    assert not victim.exists() or victim.read_bytes() == b"precious"


def test_jobs_run_in_order() -> None:
    thread, done = IoThread(1 << 20), list[int]()
    for i in range(500):
        thread.submit(lambda i=i: done.append(i), 10)  # type: ignore[misc]
    thread.wait()
    assert done == list(range(500))
    thread.stop(lambda: None)


def test_submitting_blocks_while_more_than_the_limit_waits() -> None:
    thread, go, done = IoThread(100), threading.Event(), list[int]()
    thread.submit(go.wait, 60)  # type: ignore[arg-type]
    thread.submit(lambda: done.append(1), 60)
    blocked = threading.Thread(target=lambda: thread.submit(lambda: done.append(2), 1))
    blocked.start()
    blocked.join(0.1)
    assert blocked.is_alive()
    assert done == []
    go.set()
    blocked.join(5)
    thread.wait()
    assert done == [1, 2]
    thread.stop(lambda: None)


def test_a_failure_stops_the_rest_and_is_raised_wherever_one_waits() -> None:
    thread, done = IoThread(1 << 20), list[int]()

    def fail() -> None:
        raise OSError(28, "no space left")

    go = threading.Event()
    thread.submit(go.wait)  # type: ignore[arg-type]
    thread.submit(fail)
    thread.submit(lambda: done.append(1))
    go.set()
    for call in (thread.wait, lambda: thread.submit(lambda: None), thread.check, thread.wait):
        with pytest.raises(WriteError, match="no space left") as caught:
            call()
        assert caught.value.errno == 28
    thread.stop(lambda: None)
    assert done == []


def test_a_failure_wakes_who_waits_for_room() -> None:
    thread, go = IoThread(10), threading.Event()

    def fail() -> None:
        go.wait()
        raise MemoryError

    thread.submit(fail, 100)
    timer = threading.Timer(0.1, go.set)
    timer.start()
    with pytest.raises(WriteError, match="MemoryError"):
        thread.submit(lambda: None, 1)
    thread.stop(lambda: None)
    timer.join()


def test_stopping_finishes_what_is_queued() -> None:
    thread, done = IoThread(1 << 20), list[int]()
    for i in range(20):
        thread.submit(lambda i=i: (time.sleep(0.002), done.append(i))[1])  # type: ignore[misc]
    thread.stop(lambda: done.append(-1))
    assert done == [*range(20), -1]
    thread.stop(lambda: done.append(-2))
    assert done == [*range(20), -1]


def test_a_thread_that_is_stopped_from_itself_ends_behind_what_is_queued() -> None:
    thread, done, has_stopped = IoThread(1 << 20), list[int](), threading.Event()

    def stop() -> None:
        thread.stop(lambda: done.append(2))
        has_stopped.set()

    with thread._lock:  # so that both are queued before the first runs
        thread.submit(stop)
        thread.submit(lambda: done.append(1))
    assert has_stopped.wait(10)
    thread.stop(lambda: done.append(3))
    assert done == [1, 2]


def test_a_thread_that_never_had_a_job_is_never_started() -> None:
    thread, done = IoThread(1 << 20), list[int]()
    thread.wait()
    thread.stop(lambda: done.append(threading.get_ident()))
    assert done == [threading.get_ident()]


def test_one_writer_holds_a_lock_and_the_next_learns_who(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    with pytest.raises(WriterConflictError, match=f"process {os.getpid()} .* give each writer its own rank="):
        Lock(tmp_path)
    lock.release()
    lock.release()
    Lock(tmp_path).release()


def test_a_lock_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / spec.LOCK_NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        Lock(tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_holds_without_its_note_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    for call in ("ftruncate", "pwrite"):
        monkeypatch.setattr(f"strapfmt.commit.os.{call}", full)
        lock = Lock(tmp_path)
        with pytest.raises(WriterConflictError):
            Lock(tmp_path)
        lock.release()
        monkeypatch.undo()
    Lock(tmp_path).release()


def test_a_lock_that_cannot_be_had_keeps_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    n_descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("strapfmt.commit.fcntl.flock", refuse)
    with pytest.raises(OSError, match="No locks"):
        Lock(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == n_descriptors


@pytest.mark.parametrize("replaced", [False, True])
def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, replaced: bool
) -> None:
    def lock_late(fd: int, how: int) -> None:
        (tmp_path / spec.LOCK_NAME).unlink()
        if replaced:
            (tmp_path / spec.LOCK_NAME).touch()

    monkeypatch.setattr("strapfmt.commit.fcntl.flock", lock_late)
    with pytest.raises(WriterConflictError, match="try again"):
        Lock(tmp_path)


# Descriptors.


@pytest.fixture
def few_files() -> Iterator[int]:
    """Lower the soft limit of open files to a few more than there are; return the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, hard))
    yield hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_limit_of_open_files_is_raised_as_needed_and_no_further(tmp_path: Path, few_files: int) -> None:
    before, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors = [Disk().create(tmp_path / str(i)) for i in range(300)]
    after, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for fd in descriptors:
        os.close(fd)
    assert hard == few_files
    assert before < 300 < after < 2000


def test_more_files_than_the_hard_limit_allows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strapfmt.commit.resource.getrlimit", lambda _: (1024, 1024))
    check_open_files(800, "site 'x'")
    with pytest.raises(ArgumentError, match=r"site 'x': expected at most 896 files .*ulimit -Hn"):
        check_open_files(897, "site 'x'")
    monkeypatch.setattr("strapfmt.commit.resource.getrlimit", lambda _: (1024, resource.RLIM_INFINITY))
    check_open_files(1 << 20, "site 'x'")
