"""When writing cannot keep up: what each policy keeps, what it counts, and that memory stays bounded."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupts import interrupts
from test_capture_flow import PATIENCE_S, assert_consistent, call, capture, gate, ids, wait_until

from strapfmt.errors import ArgumentError, CaptureError, DrainError
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt_capture import small_values
from strapfmt_capture.dropped import DroppedRows
from strapfmt_capture.items import Events, Spilled, StepEnd
from strapfmt_capture.live import CaptureStats
from strapfmt_capture.memory import Memory
from strapfmt_capture.messages import ItemReader
from strapfmt_capture.passes import Step
from strapfmt_capture.rings import Rings
from strapfmt_capture.spill import SpillFile
from strapfmt_capture.turn import Block, values_of

__all__ = ["gate"]

ROOT = Path(__file__).resolve().parents[1]


def outcome_of(path: Path) -> dict[str, Any]:
    return dict(Reader(path / "x.strap").manifests[0].sessions[-1]["outcome"])


def spilling(path: Path, **options: Any) -> Any:
    (path / "spill").mkdir(exist_ok=True)
    return capture(path, on_full="spill", spill_path=path / "spill", **options)


# Dropped rows.


def test_dropped_rows_are_listed_by_reason(tmp_path: Path, gate: Any) -> None:
    shut, is_open = gate
    model, cap = capture(tmp_path, on_full="drop")
    with cap:
        shut()
        call(model, ids(16), ids(16, 100), ids(16, 200), ids(10, 300))
        assert cap.stats.n_dropped == {"the ring was full": 52, "interrupted": 0}
        assert cap.stats.n_rows == 116
        assert cap.stats.n_pending + cap.stats.n_written == 64
        is_open.set()
        wait_until(lambda: cap._engine.rings.host.n_used == 0)
        call(model, ids(4, 400))
    reader = Reader(tmp_path / "x.strap")
    tokens = reader.tokens.to_arrow(["row", "dropped"]).to_pylist()
    ((first, stop),) = outcome_of(tmp_path)["dropped"][0]["rows"]
    assert [token["row"] for token in tokens if token["dropped"]] == list(range(first, stop))
    assert outcome_of(tmp_path)["dropped"] == [
        {
            "reason": "the ring was full",
            "n_steps": 2,
            "rows": [[32, 58]],
            "sites": {"one": 26, "two": 26},
        }
    ]
    assert cap.stats.n_pending == 0


def test_many_ranges_are_cut_and_the_cut_is_told() -> None:
    dropped = DroppedRows()
    for number in range(1005):
        step = Step(
            step=number,
            phase="decode",
            n_sequences=1,
            n_query=1,
            selected=None,
            rows=torch.tensor([3 * number]).numpy(),
            tokens=None,
            sequences=None,
            events=None,
        )
        end = {"step": step, "started_ns": 0, "duration_s": 0.0, "dropped": {"s": 1}}
        dropped.add(StepEnd(status="dropped", reason="r", **end))
        dropped.add(StepEnd(status="complete", reason=None, **{**end, "dropped": {}}))
    (account,) = dropped.to_list()
    assert account["rows"] == [[3 * number, 3 * number + 1] for number in range(1000)]
    assert (account["n_steps"], account["n_ranges_left_out"], account["sites"]) == (1005, 5, {"s": 1005})


@pytest.mark.parametrize("more", [1, -1])
def test_an_account_that_does_not_balance_is_raised(more: int, tmp_path: Path) -> None:
    model, cap = capture(tmp_path)

    def body() -> None:
        model(ids(5))
        cap._engine.hooks.taps[1].expected += more

    with (
        pytest.raises(CaptureError, match=rf"does not balance \('two': {5 + more} rows seen, 5 written, 0"),
        cap,
    ):
        body()
    assert cap.report.state == "closed"
    assert Reader(tmp_path / "x.strap").report.is_clean


def test_rows_that_an_interrupt_cut_off_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cap = capture(tmp_path)
    with cap:
        model(ids(5))
        with monkeypatch.context() as patch:
            patch.setattr(small_values, "_copy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                model(ids(3, 10))
        model(ids(2, 20))
    assert cap.stats.n_dropped == {"the ring was full": 0, "interrupted": 3}
    assert outcome_of(tmp_path)["dropped"] == [
        {"reason": "interrupted", "n_steps": 0, "rows": [], "sites": {"one": 3}}
    ]
    stored = {site.name: (site.expected, site.written, site.dropped) for site in cap.report.sites}
    assert stored == {"one": (10, 7, 3), "two": (7, 7, 0)}
    reported = {
        site.name: (site.expected, site.written, site.dropped) for site in Reader(cap.path).report.sites
    }
    assert reported == stored
    assert_consistent(Reader(cap.path))


# Spilling.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_full": "spill"}, "spill_path: expected a directory on another disk"),
        ({"spill_path": "."}, "and None otherwise"),
        ({"on_full": "spill", "spill_path": "nowhere"}, "spill_path: expected a directory that exists"),
        ({"drain": "fork"}, "drain: expected one of thread, process; got 'fork'"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        capture(tmp_path, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_stands_still_does_not_stop_the_model(tmp_path: Path, gate: Any) -> None:
    shut, is_open = gate
    model, cap = spilling(tmp_path)
    with cap:
        call(model, ids(3))
        shut()
        call(model, *(ids(7, start) for start in range(3, 703, 7)))
        assert cap.stats.n_spilled_steps > 80
        assert cap.stats.n_spill_pending_bytes > 10 * cap._engine.rings.host.n_bytes
        assert "steps spilled" in str(cap.stats)
        assert list((tmp_path / "spill").iterdir()) == []
        is_open.set()
        wait_until(lambda: cap.stats.n_spill_pending_bytes == 0)
        call(model, ids(5, 703))
    reader = Reader(tmp_path / "x.strap")
    assert reader["one"].rows.tolist() == reader["two"].rows.tolist() == list(range(708))
    assert reader["two"].tensor()[:, 0].tolist() == list(range(1, 709))
    assert_consistent(reader)
    assert {step["status"] for step in reader.steps.to_arrow().to_pylist()} == {"complete"}
    outcome = outcome_of(tmp_path)
    assert (outcome["n_spilled_steps"], outcome["dropped"]) == (cap.stats.n_spilled_steps, [])
    assert cap.report.n_dropped == 0


def test_what_is_spilled_at_the_end_is_written_then(tmp_path: Path, gate: Any) -> None:
    shut, is_open = gate
    model, cap = spilling(tmp_path)
    with cap:
        shut()
        call(model, *(ids(7, 50) for _ in range(40)), ids(300))
        is_open.set()
    assert cap.stats.n_spill_pending_bytes == 0
    assert Reader(tmp_path / "x.strap")["two"].n_rows == 280 + 300
    assert_consistent(Reader(tmp_path / "x.strap"))


def test_a_full_spill_directory_makes_the_model_wait(tmp_path: Path) -> None:
    model, cap = spilling(tmp_path, drain="process")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with cap:
        pid = cap._engine.drain.pid
        os.kill(pid, signal.SIGSTOP)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # of this process, which spills
        try:
            call(model, *(ids(7, start) for start in range(0, 70, 7)))
            started = time.monotonic()
            process = subprocess.Popen(["sh", "-c", f"sleep 0.3; kill -CONT {pid}"])
            call(model, *(ids(7, start) for start in range(70, 700, 7)))
            assert process.wait() == 0
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert time.monotonic() - started > 0.2
        assert cap.stats.n_spills_refused > 0
        assert cap.stats.stall_s > 0
    assert Reader(tmp_path / "x.strap")["two"].tensor()[:, 0].tolist() == list(range(1, 701))
    assert_consistent(Reader(tmp_path / "x.strap"))
    assert outcome_of(tmp_path)["n_spills_refused"] > 0


def test_the_other_process_reads_back_what_was_spilled(tmp_path: Path) -> None:
    model, cap = spilling(tmp_path, drain="process", commit_interval_s=0.0)
    with cap:
        os.kill(cap._engine.drain.pid, signal.SIGSTOP)
        call(model, *(ids(7, start) for start in range(0, 700, 7)))
        assert cap.stats.n_spilled_steps > 80
        os.kill(cap._engine.drain.pid, signal.SIGCONT)
        wait_until(lambda: cap.stats.n_committed_steps == 100)
        model(ids(1, 700))
    assert Reader(tmp_path / "x.strap")["two"].tensor()[:, 0].tolist() == list(range(1, 702))
    assert_consistent(Reader(tmp_path / "x.strap"))


def test_a_spill_file_that_fails_otherwise_is_raised(
    tmp_path: Path, gate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shut, is_open = gate
    model, cap = spilling(tmp_path)

    def refuse(*_: Any) -> None:
        raise RuntimeError("a mistake of ours")

    def body() -> None:
        monkeypatch.setattr(SpillFile, "append", refuse)
        shut()
        call(model, *(ids(7, start) for start in range(0, 42, 7)))
        wait_until(lambda: cap._engine.drain.failed)
        is_open.set()
        model(ids(1))

    with pytest.raises(DrainError, match="a mistake of ours"), cap:
        body()


def test_interrupts_while_spilling_leave_a_capture_that_works(tmp_path: Path, gate: Any) -> None:
    shut, is_open = gate
    model, cap = spilling(tmp_path)
    choose, n_interrupts, began = random.Random(3), 0, time.monotonic()

    def goes_on() -> bool:
        is_enough = n_interrupts > 20 and cap.stats.n_spilled_steps > 20
        return time.monotonic() - began < (0.5 if is_enough else PATIENCE_S / 2)

    with interrupts(KeyboardInterrupt) as arm, cap:
        shut()
        while goes_on():
            try:
                arm(choose.uniform(0.0005, 0.02))
                while goes_on():
                    model(ids(5))
                arm(0.0)
            except KeyboardInterrupt:
                n_interrupts += 1
        is_open.set()
        model(ids(5, 5000))
    assert n_interrupts > 20
    assert cap.stats.n_spilled_steps > 20
    reader = Reader(tmp_path / "x.strap")
    assert reader.report.is_clean
    assert_consistent(reader)
    assert reader["two"].tensor()[-5:, 0].tolist() == [5001.0, 5002.0, 5003.0, 5004.0, 5005.0]
    steps = reader.steps.to_arrow().to_pylist()
    assert [step["step"] for step in steps] == sorted(step["step"] for step in steps)


@pytest.mark.parametrize("drain", ["thread", "process"])
def test_the_manifest_counts_steps_that_are_spilled_as_the_block_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain: str
) -> None:
    append = SpillFile.append

    def late(self: SpillFile, items: Any) -> Spilled:
        time.sleep(0.01)
        return append(self, items)

    monkeypatch.setattr(SpillFile, "append", late)
    model, cap = spilling(tmp_path, drain=drain)
    with cap:
        monkeypatch.setattr(cap._engine.rings, "divert", lambda _: Rings.divert(cap._engine.rings, True))
        call(model, *(ids(7, start) for start in range(0, 210, 7)))
    outcome, stats = outcome_of(tmp_path), cap.stats
    assert (outcome["n_steps"], outcome["n_spilled_steps"]) == (30, 30)
    assert (stats.n_spilled_steps, stats.n_spilled_bytes) == (30, outcome["n_spilled_bytes"])
    assert outcome["n_spills_refused"] == 0
    assert_consistent(Reader(tmp_path / "x.strap"))


def test_a_spill_that_has_failed_as_the_block_ends_is_raised_and_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: SpillFile, items: Any) -> Spilled:
        raise ValueError("a mistake of ours")

    model, cap = spilling(tmp_path)

    def body() -> None:
        model(ids(5))
        monkeypatch.setattr(SpillFile, "append", fail)
        monkeypatch.setattr(cap._engine.rings, "divert", lambda _: Rings.divert(cap._engine.rings, True))
        cap._engine.drain.spill.ring.linger_s = PATIENCE_S  # it is settled first
        model(ids(5))

    with pytest.raises(DrainError, match="a mistake of ours"), cap:
        body()


def test_space_in_the_spill_file_is_given_back(tmp_path: Path) -> None:
    file = SpillFile(os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT))
    records = [file.append([Events(columns={"detail": ["x" * 100_000] * 4})]) for _ in range(5)]
    before = os.fstat(file.fd).st_blocks
    items, stop = file.read(records[3].start, ItemReader({}))
    assert isinstance(items[0], Events)
    assert stop == records[3].stop == records[4].start
    file.release(stop)
    assert os.fstat(file.fd).st_blocks < before / 3
    assert isinstance(file.read(stop, ItemReader({}))[0][0], Events)
    assert isinstance(records[0], Spilled)
    file.close()


def test_the_last_record_is_as_long_as_it_says(tmp_path: Path) -> None:
    spec = SiteSpec(name="odd", dtype="float32", shape=(13,))
    memory = Memory(256)
    memory.view(0, torch.float32, (13,)).copy_(torch.arange(13.0))
    block = Block(specs=[spec], memory=memory, start=0, rows=np.array([7]))
    file = SpillFile(os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT))
    for items in ([block], values_of([block])):
        record = file.append(items)
        found, stop = file.read(record.start, ItemReader({"odd": spec}))
        assert stop == record.stop
        (values,) = values_of(found)
        assert values.tensor().tolist() == [list(range(13))]
        assert values.rows is not None
        assert values.rows.tolist() == [7]
    file.close()


# Figures and memory.


def test_figures_can_be_asked_for_at_any_time(tmp_path: Path) -> None:
    model, cap = capture(tmp_path, commit_interval_s=0.0)
    assert str(cap.stats).startswith("ready: 0 steps")
    seen: list[CaptureStats] = []
    model.middle = lambda: seen.append(cap.stats)
    with cap:
        call(model, ids(10), ids(5))
        wait_until(lambda: cap.stats.n_committed_steps == 2)
        stats = cap.stats
        assert (stats.state, stats.n_steps, stats.n_tokens, stats.n_rows) == ("running", 2, 15, 30)
        assert (stats.n_written, stats.n_pending, stats.n_bytes) == (30, 0, 30 * 1024)
        assert stats.bytes_per_s > 0
        assert stats.commit_age_s >= 0
    assert [stats.n_rows for stats in seen] == [10, 25]
    assert cap.stats.state == "closed"
    assert cap.stats.to_dict()["n_pending"] == 0
    with pytest.raises(AttributeError):
        cap.stats.n_rows = 3


MEMORY = """
import sys, torch, strapfmt
from test_capture_flow import Wide
def resident(pid):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return {line.split()[0]: int(line.split()[1]) << 10 for line in list(file)[1:]}["Rss:"]
model, x = Wide(), torch.arange(512)[None]
kind, path, spill = sys.argv[1:]
more = {"on_full": "spill", "spill_path": spill} if spill != "-" else {}
with strapfmt.capture(model, path, sites=["one", "two"], drain=kind, host_ring_bytes=4 << 20, batch_bytes=1 << 18,
                      stats=False, shard_bytes=1 << 24, commit_interval_s=1.0, quiet=True, **more) as cap:
    pids = ["self"] + ([cap._engine.drain.pid] if kind == "process" else [])
    def go(n_rings):
        for _ in range(n_rings * (4 << 20) // (2 * 512 * 1024)):
            model(x)
    go(25)
    first = [resident(pid) for pid in pids]
    go(100)
    last = [resident(pid) for pid in pids]
    print(*(b - a for a, b in zip(first, last)))
"""


@pytest.mark.parametrize(("kind", "spills"), [("thread", False), ("process", False), ("thread", True)])
def test_memory_does_not_grow_over_a_hundred_rings(kind: str, spills: bool, tmp_path: Path) -> None:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "capture", ROOT / "tests")))
    ran = subprocess.run(
        [sys.executable, "-c", MEMORY, kind, str(tmp_path / "x.strap"), str(tmp_path) if spills else "-"],
        env={**os.environ, "PYTHONPATH": paths},
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
    )
    grown = [int(n) for n in ran.stdout.split()]
    assert max(grown) < 24 << 20, grown
    assert Reader(tmp_path / "x.strap")["two"].n_rows == 125 * 4 * 512
