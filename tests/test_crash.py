"""A killed writer, a failing disk, a full disk: what was acknowledged is there exactly, nothing is claimed wrongly."""

import ast
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
from interrupts import Interrupted, interrupt_at
from small_datasets import Contents, Script, contents_of, quick_directory

import strapfmt.commit
from strapfmt.commit import Disk
from strapfmt.errors import (
    DatasetNotFoundError,
    StrapfmtError,
    WriteError,
    WriterClosedError,
    WriterConflictError,
)
from strapfmt.reader import Reader
from strapfmt.repair import repair
from strapfmt.schema import SiteSpec
from strapfmt.verify import verify
from strapfmt.writer import DatasetWriter

N_KILLS = int(os.environ.get("STRAPFMT_N_KILLS", "200"))
OPTIONS = {"batch_bytes": 128, "shard_bytes": 4000, "commit_interval_s": 0.0}

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["small_datasets"])


# Killing a process.


def write_until_killed(path: str, mode: str, first: int, ready: int, seed: int) -> None:
    """Write steps for ever; after each acknowledged commit send the number of steps that it covers."""
    rng = random.Random(seed)
    script = Script()
    with DatasetWriter(path, mode=mode, **OPTIONS) as writer:  # type: ignore[arg-type]
        script.declare(writer)
        os.write(ready, struct.pack("<q", first))
        for step in range(first, 1 << 40):
            script.write(writer, step)
            if rng.random() < 0.3:
                writer.commit()
                os.write(ready, struct.pack("<q", step + 1))


def kill_once(path: Path, mode: str, first: int, rng: random.Random) -> int:
    """Start a writer, kill it at a random instant, return the steps it acknowledged (-1: it never got so far)."""
    read, write = os.pipe()
    os.set_inheritable(write, True)
    process: ForkServerProcess = PROCESSES.Process(
        target=_child, args=(str(path), mode, first, _Descriptor(write), rng.randrange(1 << 30))
    )
    process.start()
    os.close(write)
    wait_for_start = rng.random() < 0.9
    data = os.read(read, 8) if wait_for_start else b""
    time.sleep(rng.random() * 0.12)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    while chunk := os.read(read, 1 << 16):
        data += chunk
    os.close(read)
    whole = len(data) // 8 * 8
    return max((n for (n,) in struct.iter_unpack("<q", data[:whole])), default=-1)


class _Descriptor:
    """Carries a pipe's end to a child."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Callable[..., int], tuple[object]]:
        from multiprocessing.reduction import DupFd

        return _detach, (DupFd(self.fd),)


def _detach(duplicate: object) -> int:
    return duplicate.detach()  # type: ignore[attr-defined, no-any-return]


def _child(path: str, mode: str, first: int, ready: int, seed: int) -> None:
    write_until_killed(path, mode, first, ready, seed)


def check_recovered(path: Path, acknowledged: int) -> int:
    """Check that a dataset holds an exact prefix of whole steps, at least those acknowledged; return their number."""
    script = Script()
    try:
        reader = Reader(path, verify="always")
    except DatasetNotFoundError:
        assert acknowledged < 0
        return -1
    with reader:
        n_steps = script.n_steps_of(reader)
        assert n_steps >= acknowledged
        if reader.names or n_steps:
            assert contents_of(reader) == script.contents(n_steps)
        assert not reader.report.is_clean
    assert verify(path).problems == ()
    return n_steps


def check_rescued(path: Path, out: Path, n_steps: int) -> None:
    """Check that repair keeps all that is committed, and that what it finds beyond continues it exactly."""
    script = Script()
    repair(path, out)
    with Reader(out, verify="always") as reader:
        assert reader.report.is_clean
        found = script.n_steps_of(reader)
        assert found >= n_steps
        contents, expected = contents_of(reader), script.contents(found + 40)
    steps = ast.literal_eval(contents["table steps"]["rows"].decode())
    written = [row for row in steps if row["reason"] != "rescued after a crash"]
    contents["table steps"]["rows"] = repr(written).encode()
    for name, columns in contents.items():
        for column, data in columns.items():
            if name.startswith("site "):
                assert expected[name][column].startswith(data), (name, column)
            else:
                assert expected[name][column].startswith(data[:-1]), (name, column)
    for name, columns in script.contents(n_steps).items():
        for column, data in columns.items():
            assert len(contents.get(name, {}).get(column, b"")) >= len(data), (name, column)


def kill_many(n_kills: int, seed: int) -> None:
    rng = random.Random(seed)
    with quick_directory() as directory:
        for i in range(n_kills):
            path, n_steps = directory / f"{i}.strap", 0
            for mode in ("create", "append"):
                acknowledged = kill_once(path, mode, n_steps, rng)
                n_steps = check_recovered(path, max(acknowledged, n_steps if mode == "append" else -1))
                if n_steps < 0:
                    break
                out = directory / f"{i}.{mode}.strap"
                check_rescued(path, out, n_steps)
                shutil.rmtree(out)
            if path.exists():
                shutil.rmtree(path)


def test_killed_writers_leave_exactly_what_was_acknowledged_or_more() -> None:
    kill_many(5, seed=time.time_ns())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_writers_leave_exactly_what_was_acknowledged_or_more_in_the_long_form() -> None:
    kill_many(N_KILLS // 2, seed=1)


# A disk that fails.


class FailingDisk(Disk):
    """Fails at its `at`-th operation, and at all that follow when `sticky`; a torn write leaves half of its bytes."""

    def __init__(self, at: int, code: int, *, sticky: bool, torn: bool = False) -> None:
        self.at, self.code, self.sticky, self.torn = at, code, sticky, torn
        self.n_calls = 0
        self.has_failed = False

    def _step(self) -> bool:
        self.n_calls += 1
        fails = self.n_calls == self.at or (self.sticky and self.n_calls > self.at)
        self.has_failed |= fails
        return fails

    def _check(self) -> None:
        if self._step():
            raise OSError(self.code, os.strerror(self.code))

    def create(self, path: Path) -> int:
        self._check()
        return super().create(path)

    def write(self, fd: int, pieces: Sequence[bytes | memoryview], offset: int) -> None:
        if self._step():
            data = b"".join(bytes(piece) for piece in pieces)
            if self.torn:
                super().write(fd, [data[: len(data) // 2]], offset)
            raise OSError(self.code, os.strerror(self.code))
        super().write(fd, pieces, offset)

    def fsync(self, fd: int) -> None:
        self._check()
        super().fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._check()
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._check()
        super().unlink(path)

    def mkdir(self, path: Path) -> None:
        self._check()
        super().mkdir(path)

    def rmdir(self, path: Path) -> None:
        self._check()
        super().rmdir(path)

    def sync_directory(self, path: Path) -> None:
        self._check()
        super().sync_directory(path)


N_FAULT_STEPS = 5


def write_with(disk: Disk, path: Path) -> tuple[int, bool]:
    """Write a few steps until something fails; return the acknowledged steps (-1: none) and whether all went well."""
    script = Script()
    acknowledged = -1
    try:
        with DatasetWriter(
            path, disk=disk, batch_bytes=128, shard_bytes=2500, commit_interval_s=1e9
        ) as writer:
            acknowledged = 0
            script.declare(writer)
            for step in range(N_FAULT_STEPS):
                script.write(writer, step)
                if step % 2 == 0:
                    writer.commit()
                    acknowledged = step + 1
    except WriteError as error:
        if error.errno != getattr(disk, "code", None):
            raise
        return acknowledged, False
    return N_FAULT_STEPS, True


def check_fault(disk: FailingDisk, path: Path, known: dict[int, Contents]) -> None:
    n_descriptors = len(os.listdir("/proc/self/fd"))
    acknowledged, succeeded = write_with(disk, path)
    assert succeeded == (not disk.has_failed)
    assert len(os.listdir("/proc/self/fd")) == n_descriptors
    assert not any(thread.name == "strapfmt-io" for thread in threading.enumerate())
    try:
        reader = Reader(path, verify="always")
    except DatasetNotFoundError:
        assert acknowledged < 0
        assert disk.sticky or not path.exists()
        DatasetWriter(path).close()
        return
    with reader:
        n_steps = Script().n_steps_of(reader)
        assert n_steps >= acknowledged
        assert reader.names == [] or contents_of(reader) == known[n_steps]
        assert not succeeded or reader.report.is_clean
    with DatasetWriter(path, mode="append") as writer:
        Script().declare(writer)
        Script().write(writer, n_steps)
    with Reader(path, verify="always") as reader:
        assert contents_of(reader) == known[n_steps + 1]


def fail_everywhere(stride: int) -> int:
    """Fail at every `stride`-th operation in every way; return how many runs that were."""
    known = {n: Script().contents(n) for n in range(N_FAULT_STEPS + 2)}
    n_runs = 0
    with quick_directory() as directory:
        count = FailingDisk(-1, 0, sticky=False)
        assert write_with(count, directory / "whole.strap") == (N_FAULT_STEPS, True)
        kinds = [(c, s, t) for c in (errno.EIO, errno.ENOSPC) for s in (False, True) for t in (False, True)]
        for at in range(1, count.n_calls + 2):
            for i, (code, sticky, torn) in enumerate(kinds):
                if (at + i) % stride:
                    continue
                path = directory / f"{at}.{i}.strap"
                check_fault(FailingDisk(at, code, sticky=sticky, torn=torn), path, known)
                shutil.rmtree(path, ignore_errors=True)
                n_runs += 1
    return n_runs


def test_a_failing_disk_is_reported_and_loses_nothing_acknowledged() -> None:
    assert fail_everywhere(stride=12) > 80


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_failing_disk_is_reported_and_loses_nothing_acknowledged_in_the_long_form() -> None:
    fail_everywhere(stride=1)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwritev

    def short(fd: int, views: list[memoryview], offset: int) -> int:
        return whole(fd, [views[0][: max(len(views[0]) // 3, 1)]], offset)

    monkeypatch.setattr(strapfmt.commit.os, "pwritev", short)
    assert write_with(Disk(), tmp_path / "a.strap") == (N_FAULT_STEPS, True)
    with Reader(tmp_path / "a.strap", verify="always") as reader:
        assert contents_of(reader) == Script().contents(N_FAULT_STEPS)


def test_a_failure_in_the_background_is_raised_by_every_later_call(tmp_path: Path) -> None:
    disk = FailingDisk(1 << 40, errno.EIO, sticky=True)
    writer = DatasetWriter(tmp_path / "a.strap", disk=disk, batch_bytes=64, commit_interval_s=1e9)
    Script().declare(writer)
    writer.commit()
    disk.at = disk.n_calls + 1
    with pytest.raises(WriteError) as first:
        write_steps(writer, 5)
    assert first.value.errno == errno.EIO
    assert isinstance(first.value.__cause__, OSError)
    for call in (writer.wait, writer.commit, writer.end_step):
        with pytest.raises(WriteError, match="the last commit stays readable"):
            call()
    with pytest.raises(WriteError):
        writer.close()
    writer.close()
    with pytest.raises(WriterClosedError):
        writer.commit()


def write_steps(writer: DatasetWriter, n_steps: int) -> None:
    for step in range(n_steps):
        Script().write(writer, step)


def test_a_failed_fsync_is_never_retried(tmp_path: Path) -> None:
    class OneBadSync(Disk):
        n_fsyncs = 0
        fails_at = 0

        def fsync(self, fd: int) -> None:
            self.n_fsyncs += 1
            if self.n_fsyncs == self.fails_at:
                raise OSError(errno.EIO, "lost pages")
            super().fsync(fd)

    disk = OneBadSync()
    writer = DatasetWriter(tmp_path / "a.strap", disk=disk, commit_interval_s=1e9)
    Script().declare(writer)
    Script().write(writer, 0)
    disk.fails_at = disk.n_fsyncs + 1
    with pytest.raises(WriteError):
        writer.commit()
    n_fsyncs = disk.n_fsyncs
    with pytest.raises(WriteError):
        writer.commit()
    with pytest.raises(WriteError):
        writer.close()
    assert disk.n_fsyncs == n_fsyncs
    with Reader(tmp_path / "a.strap") as reader:
        assert len(reader.tokens) == 0


# A full disk.

FULL_DISK = """
import sys
from small_datasets import Script
from strapfmt.errors import WriteError
from strapfmt.writer import DatasetWriter
script, acknowledged = Script(), -1
try:
    with DatasetWriter(sys.argv[1], batch_bytes=256, commit_interval_s=1e9) as writer:
        acknowledged = 0
        script.declare(writer)
        for step in range(100000):
            script.write(writer, step)
            writer.commit()
            acknowledged = step + 1
except WriteError as error:
    print(acknowledged, error.errno)
"""


def run_child(code: str, *args: str, limit: Callable[[], None] | None = None) -> str:
    """Run Python code in a process of its own that can import what the tests can."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
        preexec_fn=limit,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_file_size_limit_stops_the_writer_with_a_clear_error() -> None:
    with quick_directory() as directory:
        path = directory / "a.strap"
        limit = (20_000, 20_000)
        output = run_child(
            FULL_DISK, str(path), limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        )
        acknowledged, code = map(int, output.split())
        assert code == errno.EFBIG
        assert acknowledged > 3
        assert check_recovered(path, acknowledged) >= acknowledged


def test_a_full_disk_stops_the_writer_with_a_clear_error(tmp_path: Path) -> None:
    mounted = tmp_path / "full"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        path = mounted / "a.strap"
        acknowledged, code = map(int, run_child(FULL_DISK, str(path)).split())
        assert code == errno.ENOSPC
        assert acknowledged > 3
        assert check_recovered(path, acknowledged) >= acknowledged
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


# Being interrupted.


@pytest.mark.parametrize("retry", [False, True], ids=["abort", "goes_on"])
def test_an_interrupt_anywhere_in_a_commit_costs_no_committed_step(retry: bool) -> None:
    known = {n: Script().contents(n) for n in range(6)}
    rng = random.Random(5)
    line, was_interrupted = 0, True
    with quick_directory() as directory:
        while was_interrupted:
            line += rng.randrange(1, 90)
            path, script = directory / f"{line}.strap", Script()
            writer = DatasetWriter(path, batch_bytes=128, shard_bytes=2500, commit_interval_s=1e9)
            script.declare(writer)
            for step in range(2):
                script.write(writer, step)
            writer.commit()
            script.write(writer, 2)
            was_interrupted = interrupt_at(line, writer.commit, within="/strapfmt/")
            n_steps = 3
            if retry:
                try:
                    for step in range(3, 5):
                        script.write(writer, step)
                        writer.commit()
                        n_steps = step + 1
                    writer.close()
                except StrapfmtError:
                    n_steps = 2
            writer.abort()
            with Reader(path, verify="always") as reader:
                found = script.n_steps_of(reader)
                assert contents_of(reader) == known[found]
                assert found >= (n_steps if retry or not was_interrupted else 2)
            shutil.rmtree(path)
    assert line > 200


class SlowDisk(Disk):
    """Answers no fsync before it may."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.may_answer.set()

    def fsync(self, fd: int) -> None:
        self.may_answer.wait()
        super().fsync(fd)


def interrupt_soon() -> threading.Timer:
    """Raise `Interrupted` in this thread after a moment, as Ctrl-C would."""

    def interrupt(*_: object) -> None:
        raise Interrupted

    signal.signal(signal.SIGUSR1, interrupt)
    timer = threading.Timer(0.2, signal.pthread_kill, (threading.get_ident(), signal.SIGUSR1))
    timer.start()
    return timer


@pytest.mark.parametrize("asks_again", [False, True])
def test_an_interrupt_while_abort_waits_gives_the_rank_back_all_the_same(
    tmp_path: Path, *, asks_again: bool
) -> None:
    path, disk = tmp_path / "a.strap", SlowDisk()
    writer = DatasetWriter(path, disk=disk, commit_interval_s=0.0)
    Script().declare(writer)
    disk.may_answer.clear()
    Script().write(writer, 0)  # ends its step, which begins a commit
    timer = interrupt_soon()
    with pytest.raises(Interrupted):
        writer.abort()
    timer.join()
    with pytest.raises(WriterConflictError):  # not before the commit under way is over
        DatasetWriter(path, mode="append")
    disk.may_answer.set()
    if asks_again:
        writer.abort()
    deadline = time.monotonic() + 20
    while any(thread.name == "strapfmt-io" for thread in threading.enumerate()):
        assert not asks_again
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with DatasetWriter(path, mode="append", commit_interval_s=1e9) as writer:
        Script().declare(writer)
        Script().write(writer, 1)
    with Reader(path, verify="always") as reader:
        assert contents_of(reader) == Script().contents(2)


def test_abort_finishes_the_commit_that_a_step_began_and_gives_up_what_came_after(tmp_path: Path) -> None:
    path, disk = tmp_path / "a.strap", SlowDisk()
    writer = DatasetWriter(path, disk=disk, commit_interval_s=0.0)
    writer.add_site(SiteSpec(name="a", dtype="int64", shape=(), row_space="own", statistics=()))
    writer.commit()
    disk.may_answer.clear()
    for step in range(3):  # the first begins a commit, which waits for the disk
        writer.write("a", np.full(2, step))
        writer.end_step()
    timer = threading.Timer(0.2, disk.may_answer.set)
    timer.start()
    writer.abort()
    timer.join()
    with Reader(path, verify="always") as reader:
        assert reader["a"].tensor().tolist() == [0, 0]
        assert not reader.report.is_clean


def test_abort_lets_go_of_everything_even_if_closing_fails(tmp_path: Path) -> None:
    class BadClose(Disk):
        fails = False

        def close(self, fd: int) -> None:
            super().close(fd)
            if self.fails:
                raise OSError(errno.EIO, "lost")

    disk, n_descriptors = BadClose(), len(os.listdir("/proc/self/fd"))
    writer = DatasetWriter(tmp_path / "a.strap", disk=disk, batch_bytes=128, commit_interval_s=1e9)
    Script().declare(writer)
    Script().write(writer, 0)
    writer.wait()
    disk.fails = True
    writer.abort()
    assert len(os.listdir("/proc/self/fd")) == n_descriptors
    DatasetWriter(tmp_path / "a.strap", mode="append").close()


def test_an_interrupted_with_block_keeps_the_last_commit(tmp_path: Path) -> None:
    def write() -> None:
        with DatasetWriter(tmp_path / "a.strap", commit_interval_s=1e9) as writer:
            Script().declare(writer)
            Script().write(writer, 0)
            writer.commit()
            Script().write(writer, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    with Reader(tmp_path / "a.strap") as reader:
        assert contents_of(reader) == Script().contents(1)
        assert not reader.report.is_clean
    with DatasetWriter(tmp_path / "a.strap", mode="append") as writer:
        Script().declare(writer)
        Script().write(writer, 1)
    with Reader(tmp_path / "a.strap") as reader:
        assert contents_of(reader) == Script().contents(2)


def test_a_writer_in_a_forked_child_is_refused_and_does_not_keep_the_rank(tmp_path: Path) -> None:
    code = """
import os, sys, time
import numpy as np
from strapfmt.errors import WriterClosedError
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter
writer = DatasetWriter(sys.argv[1])
writer.add_site(SiteSpec(name="a", dtype="float32", shape=(2,), row_space="own", statistics=()))
read, write = os.pipe()
if os.fork() == 0:
    try:
        writer.commit()
    except WriterClosedError:
        os.write(write, b"refused")
    writer.abort()
    time.sleep(20)
    os._exit(0)
print(os.read(read, 7).decode())
writer.write("a", np.ones((3, 2), np.float32))
writer.close()
DatasetWriter(sys.argv[1], mode="append").close()
print("appended")
os._exit(0)
"""
    started = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a.strap")],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    assert process.stdout
    try:
        lines = [process.stdout.readline().strip() for _ in range(2)]
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert lines == ["refused", "appended"]
    assert time.monotonic() - started < 15


def test_values_may_be_reused_after_wait(tmp_path: Path) -> None:
    site = SiteSpec(name="a", dtype="int64", shape=(4,), row_space="own", statistics=())
    buffer = np.zeros((8, 4), np.int64)
    with DatasetWriter(tmp_path / "a.strap", batch_bytes=256) as writer:
        writer.add_site(site)
        for i in range(50):
            buffer[:] = i
            writer.write("a", buffer)
            writer.wait()
            buffer[:] = -1
    with Reader(tmp_path / "a.strap", verify="always") as reader:
        assert reader["a"].tensor()[:, 0].tolist() == [i for i in range(50) for _ in range(8)]
