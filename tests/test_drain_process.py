"""The drain in a process of its own: the same dataset, whatever ends either process."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from interrupts import interrupts
from models import tiny_model
from test_capture_flow import Wide, assert_consistent, call, capture, ids, never_ends, wait_until

import strapfmt
from strapfmt.errors import (
    CaptureError,
    DatasetExistsError,
    DrainError,
    RingFullError,
    SiteNotFoundError,
    WriteError,
    WriterConflictError,
)
from strapfmt.reader import Reader
from strapfmt.writer import DatasetWriter
from strapfmt_capture.failures import described, revived
from strapfmt_capture.items import Events, Finish, Spilled
from strapfmt_capture.memory import Memory
from strapfmt_capture.messages import ItemReader, encode_items
from strapfmt_capture.priority import lower
from strapfmt_capture.session import Capture

ROOT = Path(__file__).resolve().parents[1]
PATHS = os.pathsep.join(map(str, (ROOT, ROOT / "capture", ROOT / "tests")))
SCRIPT = """
import os, signal, sys, time, torch, strapfmt
from test_capture_flow import SMALL, Wide, ids
model = Wide()
cap = strapfmt.capture(model, sys.argv[1], sites=["one", "two"], drain=sys.argv[2], **SMALL)
"""


def apart(path: Path, **options: Any) -> tuple[Wide, Capture]:
    return capture(path, drain="process", **options)


def pid_of(cap: Capture) -> int:
    return cap._engine.drain.pid


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def is_free(path: Path) -> bool:
    """Whether no writer holds the dataset."""
    try:
        DatasetWriter(path, mode="append").abort()
    except WriterConflictError:
        return False
    return True


def run_script(body: str, path: Path, *, drain: str = "process") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + body, str(path), drain],
        env={**os.environ, "PYTHONPATH": PATHS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# The same as in a thread.


def test_both_drains_write_the_same_dataset(tmp_path: Path) -> None:
    stored = {}
    for drain in ("thread", "process"):
        model = tiny_model("llama", attn_implementation="eager")
        path = tmp_path / f"{drain}.strap"
        before = len(list(Path("/proc/self/fd").iterdir()))
        with strapfmt.capture(
            model,
            path,
            sites=["blocks.*.resid_post", "logits", "blocks.0.attn_pattern"],
            drain=drain,
            host_ring_bytes=1 << 15,
            tags={"of": "both"},
            quiet=True,
        ) as cap:
            for start in range(3, 40, 7):
                model.generate(
                    torch.arange(start, start + 10).view(2, 5), max_new_tokens=4, do_sample=False, num_beams=2
                )
        assert len(list(Path("/proc/self/fd").iterdir())) <= before
        reader = Reader(path)
        tables = [reader.tokens, reader.sequences, reader.row_events]
        stored[drain] = (
            [table.to_arrow() for table in tables],
            reader.steps.to_arrow(
                ["step", "phase", "n_sequences", "n_query", "n_rows", "first_row", "status"]
            ),
            {name: reader[name].to_arrow() for name in reader},
        )
        assert reader.report.is_clean
        assert [site.dropped for site in cap.report.sites] == [0] * len(cap.report.sites)
    assert stored["thread"] == stored["process"]
    assert isinstance(stored["thread"][0][0], pa.Table)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("strapfmt")]


def test_it_goes_on_behind_what_is_there(tmp_path: Path) -> None:
    model, cap = capture(tmp_path)
    with cap:
        model(ids(5))
    model, cap = apart(tmp_path, mode="append", commit_interval_s=0.0)
    with cap:
        model(ids(1000, 5))
        model(ids(3, 2000))
        wait_until(lambda: cap.stats.n_committed_steps == 2)
        assert Reader(tmp_path / "x.strap")["two"].n_rows == 1008
    reader = Reader(tmp_path / "x.strap")
    assert reader["two"].rows.tolist() == list(range(1008))
    assert reader.steps.to_arrow()["step"].to_pylist() == [0, 1, 2]
    assert_consistent(reader)


def test_what_the_writer_refuses_is_raised_on_entry(tmp_path: Path) -> None:
    _, cap = apart(tmp_path)
    DatasetWriter(tmp_path / "x.strap").close()  # meanwhile
    with pytest.raises(DatasetExistsError, match="rank 0 of this dataset exists; overwrite=True"), cap:
        pass
    _, cap = apart(tmp_path, mode="append")
    with (
        DatasetWriter(tmp_path / "x.strap", mode="append"),
        pytest.raises(WriterConflictError, match=f"process {os.getpid()} on .* is writing here"),
        cap,
    ):
        pass


def test_a_process_that_cannot_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cap = apart(tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        pytest.raises(CaptureError, match="has ended with exit code 1 before it had opened the dataset"),
        cap,
    ):
        pass
    assert not model.one._forward_hooks
    assert list(tmp_path.iterdir()) == []


def test_a_full_ring_is_refused_and_the_process_runs_like_others_meanwhile(tmp_path: Path) -> None:
    model, cap = apart(tmp_path, on_full="raise")
    with cap:
        pid = pid_of(cap)
        can_be_idle = cap._engine.drain._may_change
        assert os.sched_getscheduler(pid) == (os.SCHED_IDLE if can_be_idle else os.SCHED_OTHER)
        os.kill(pid, signal.SIGSTOP)
        call(model, ids(16), ids(16, 100))
        with pytest.raises(RingFullError, match="the ring is full"):
            model(ids(1, 200))
        if can_be_idle:
            wait_until(lambda: os.sched_getscheduler(pid) == os.SCHED_OTHER)
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: cap._engine.rings.host.n_used == 0)
        model(ids(2, 300))
    assert Reader(tmp_path / "x.strap")["two"].n_rows == 34
    assert_consistent(Reader(tmp_path / "x.strap"))


# Whatever ends either.


def test_a_killed_writer_is_raised_at_the_next_pass_and_the_model_goes_on(tmp_path: Path) -> None:
    model, cap = apart(tmp_path, commit_interval_s=0.0)

    def body() -> None:
        model(ids(16))
        wait_until(lambda: cap.stats.n_committed_steps == 1)
        os.kill(pid_of(cap), signal.SIGKILL)
        wait_until(lambda: cap._engine.drain.failed)
        assert not is_running(pid_of(cap))
        assert cap.stats.state == "failed"
        model(ids(1))

    with pytest.raises(DrainError, match=r"ChildProcessError: the process that writes .* SIGKILL"), cap:
        body()
    assert model(ids(2)).shape == (1, 2, 256)
    assert not model.one._forward_hooks
    assert Reader(tmp_path / "x.strap")["two"].n_rows == 16
    with strapfmt.capture(model, tmp_path / "x.strap", sites=["one", "two"], mode="append", quiet=True):
        model(ids(2))
    assert_consistent(Reader(tmp_path / "x.strap"))


def test_a_writer_killed_while_the_model_waits_for_it_wakes_the_model(tmp_path: Path) -> None:
    model, cap = apart(tmp_path)

    def body() -> None:
        os.kill(pid_of(cap), signal.SIGSTOP)
        threading.Timer(0.3, os.kill, (pid_of(cap), signal.SIGKILL)).start()
        model(ids(3000))
        model(ids(1))

    with pytest.raises(DrainError, match="SIGKILL"), cap:
        body()
    assert cap.report.stall_s > 0


def test_when_the_model_is_killed_what_it_handed_over_is_committed(tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    process = run_script(
        """
model.middle = lambda: None
with cap:
    for k in range(5):
        model(ids(10, 10 * k))
    def die():
        time.sleep(2.5)  # longer than the drain waits for more
        os.fork() or time.sleep(60)  # a process that was forked, and outlives it
        os.kill(os.getpid(), signal.SIGKILL)
    model.middle = die
    model(ids(10, 100))
""",
        path,
    )
    try:
        assert process.wait(60) == -signal.SIGKILL
        wait_until(lambda: is_free(path))
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    reader = Reader(path)
    steps = reader.steps.to_arrow().to_pylist()
    assert [step["status"] for step in steps] == ["complete"] * 5 + ["abandoned"]
    assert steps[5]["reason"] == "the process that ran the model has ended"
    assert reader["one"].n_rows == 60
    assert reader["two"].n_rows == 50
    assert_consistent(reader)
    assert strapfmt.verify(path).valid


def test_ctrl_c_reaches_both_and_leaves_a_clean_dataset(tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    process = run_script(
        """
with cap:
    print("running", flush=True)
    while True:
        model(ids(16))
""",
        path,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt\nstrapfmt: " in errors
    reader = Reader(path)
    assert reader.report.is_clean
    assert reader["two"].n_rows > 0
    assert_consistent(reader)


@pytest.mark.parametrize("drain", ["thread", "process"])
def test_a_capture_that_is_still_open_when_the_program_ends_is_closed(drain: str, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    process = run_script(
        """
cap.__enter__()
model(ids(10))
if not os.fork():
    sys.exit()  # the capture is not this process's
os.wait()
del cap
""",
        path,
        drain=drain,
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors.count("the capture was still open when the program ended, and is closed now") == 1
    reader = Reader(path)
    assert reader.report.is_clean
    assert reader["two"].n_rows == 10
    assert_consistent(reader)


def test_a_refusing_disk_is_raised_with_its_cause(tmp_path: Path) -> None:
    model, cap = apart(tmp_path, commit_interval_s=0.0)

    def body() -> None:
        model(ids(16))
        wait_until(lambda: cap.stats.n_committed_steps == 1)
        resource.prlimit(pid_of(cap), resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        never_ends(model)

    with pytest.raises(DrainError, match="File too large") as caught, cap:
        body()
    assert isinstance(caught.value.__cause__, WriteError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert_consistent(Reader(tmp_path / "x.strap"))


def test_a_dataset_that_is_moved_away_is_raised_with_the_type_of_the_failure(tmp_path: Path) -> None:
    model, cap = apart(tmp_path, commit_interval_s=0.0)

    def body() -> None:
        model(ids(1))
        wait_until(lambda: cap.stats.n_committed_steps == 1)
        shutil.move(tmp_path / "x.strap", tmp_path / "y.strap")
        never_ends(model)

    with pytest.raises(DrainError, match="was removed or moved while it was written") as caught, cap:
        body()
    assert isinstance(caught.value.__cause__, WriteError)


def test_an_interrupt_while_the_end_waits_for_the_process_passes(tmp_path: Path) -> None:
    model, cap = apart(tmp_path)

    def body() -> None:
        model(ids(3))
        os.kill(pid_of(cap), signal.SIGSTOP)
        arm(0.2)

    with interrupts(KeyboardInterrupt) as arm, pytest.raises(KeyboardInterrupt), cap:
        body()
    assert cap.report.state == "failed"
    os.kill(pid_of(cap), signal.SIGCONT)
    wait_until(lambda: not is_running(pid_of(cap)))
    assert Reader(tmp_path / "x.strap").report.is_clean is False


def test_a_fork_inside_the_capture_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    model, cap = apart(tmp_path)
    with cap:
        model(ids(3))
        child = os.fork()
        if child == 0:
            try:
                with cap:
                    model(ids(3))
            except CaptureError:
                os._exit(7)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        model(ids(4, 3))
    assert Reader(tmp_path / "x.strap")["two"].n_rows == 7


# Parts.


@pytest.mark.parametrize(
    "error",
    [
        WriteError(OSError(errno.ENOSPC, "No space left on device")),
        SiteNotFoundError("a", ["ab", "b"]),
        OSError(5, "x"),
        KeyError("k"),
        ValueError("no", 3),
    ],
)
def test_exceptions_cross_over_with_type_text_and_facts(error: Exception) -> None:
    copy = revived(described(error))
    assert (type(copy), str(copy), copy.args) == (type(error), str(error), error.args)
    assert getattr(copy, "errno", None) == getattr(error, "errno", None)
    assert vars(copy) == vars(error)


def test_an_exception_of_an_unknown_type_is_named() -> None:
    class Odd(Exception):
        pass

    assert repr(revived(described(Odd("so")))) == repr(RuntimeError("Odd: so"))
    assert repr(revived(described(SystemExit(3)))) == repr(RuntimeError("SystemExit: 3"))


def test_items_survive_as_bytes() -> None:
    columns = {
        "row": torch.arange(3).numpy(),
        "gaps": torch.tensor([0, 1, 3]).numpy(),
        "same": torch.tensor([2, 2]).numpy(),
        "text": ["a", None, "\ud800"],
        "null": pa.nulls(2, pa.int32()),
        "flag": torch.tensor([True]).numpy(),
        "empty": torch.empty(0, dtype=torch.int64).numpy(),
    }
    items = [Events(columns=columns), Spilled(start=1, stop=2), Finish(facts={"a": [1]}, seen={"s": 4})]
    coded, arrays = encode_items(items)
    events, *rest = ItemReader({}).decode(coded, b"".join(array.tobytes() for array in arrays), Memory(64))
    assert rest == items[1:]
    for name, column in columns.items():
        found = events.columns[name]
        if isinstance(column, (list, pa.Array)):
            assert found == (column if isinstance(column, list) else [None, None])
        else:
            assert (found.dtype, found.tolist()) == (column.dtype, column.tolist())


def test_idle_scheduling_is_taken_only_where_it_can_be_given_back() -> None:
    policies: list[tuple[bool, int, int]] = []

    def run() -> None:
        policies.append((lower(), os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)))

    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    ((is_idle, policy, nice),) = policies
    assert policy == (os.SCHED_IDLE if is_idle else os.SCHED_OTHER)
    assert nice == niceness + (0 if is_idle else 10)
