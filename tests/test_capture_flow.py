"""Between hook and disk: a ring that fills up, disks that are slow or fail, and interrupts at any moment."""

from __future__ import annotations

import errno
import gc
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupts import interrupts

import strapfmt
from strapfmt.commit import Disk
from strapfmt.errors import CaptureError, DrainError, RingFullError, WriteError
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter
from strapfmt_capture import small_values
from strapfmt_capture.items import StepEnd
from strapfmt_capture.session import Capture

WIDTH = 256
PATIENCE_S = 20.0
SMALL: dict[str, Any] = {"host_ring_bytes": 64 << 10, "batch_bytes": 4 << 10, "quiet": True}


class Wide(torch.nn.Module):
    """Gives rows of 1 KiB that hold the number of their token, and one more than that."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Identity(), torch.nn.Identity()
        self.middle: Callable[[], None] = lambda: None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.one(input_ids[..., None].expand(*input_ids.shape, WIDTH).float())
        self.middle()
        return self.two(x + 1)


def ids(n: int, start: int = 0) -> torch.Tensor:
    return torch.arange(start, start + n)[None]


def capture(path: Path, **options: Any) -> tuple[Wide, Capture]:
    model = Wide()
    return model, strapfmt.capture(model, path / "x.strap", sites=["one", "two"], **{**SMALL, **options})


def call(model: torch.nn.Module, *inputs: torch.Tensor) -> None:
    for x in inputs:
        model(x)


def assert_consistent(reader: Reader) -> None:
    """Every stored row is a token that was not dropped, and holds that token's number."""
    tokens = reader.tokens.to_arrow(["row", "token_id", "dropped"])
    numbers = dict(zip(tokens["row"].to_pylist(), tokens["token_id"].to_pylist(), strict=True))
    dropped = {
        row for row, d in zip(*tokens.select(["row", "dropped"]).to_pydict().values(), strict=True) if d
    }
    for name, offset in (("one", 0), ("two", 1)):
        if name not in reader:
            continue
        rows = reader[name].rows.tolist()
        assert set(rows) <= set(numbers) - dropped
        expected = torch.tensor([numbers[row] + offset for row in rows], dtype=torch.float32)
        assert torch.equal(reader[name].tensor(), expected[:, None].expand(len(rows), WIDTH))
        assert reader[name].to_arrow(["abs_max"])["abs_max"].to_pylist() == expected.tolist()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Callable[[], None], threading.Event]]:
    """A function that shuts the disk, and the event that opens it again."""
    is_open = threading.Event()
    write = Disk.write

    def wait(self: Disk, *arguments: Any) -> None:
        assert is_open.wait(PATIENCE_S)
        write(self, *arguments)

    yield lambda: monkeypatch.setattr(Disk, "write", wait), is_open
    is_open.set()


def fail_disk(monkeypatch: pytest.MonkeyPatch, name: str = "write", delay_s: float = 0.0) -> None:
    def fail(*_: Any) -> None:
        time.sleep(delay_s)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Disk, name, fail)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


# A ring that fills up.


def test_a_long_prefill_passes_through_a_small_ring(tmp_path: Path) -> None:
    model, cap = capture(tmp_path)
    with cap:
        call(model, ids(1000), ids(5, 7))
    reader = Reader(tmp_path / "x.strap")
    assert reader["two"].n_rows == 1005
    assert_consistent(reader)
    assert cap.report.peak_fill <= 1
    assert cap.report.n_dropped == 0


def test_padding_is_left_out_of_a_long_prefill_too(tmp_path: Path) -> None:
    class Masked(Wide):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids)

    model = Masked()
    mask = torch.ones(3, 200, dtype=torch.int64)
    mask[1, :77], mask[2, :199] = 0, 0
    with strapfmt.capture(model, tmp_path / "x.strap", sites="*", **SMALL):
        model(torch.arange(600).reshape(3, 200), attention_mask=mask)
    reader = Reader(tmp_path / "x.strap")
    assert_consistent(reader)
    assert reader["one"].tensor()[:, 0].tolist() == torch.arange(600)[mask.bool().flatten()].tolist()


def test_block_waits_and_counts_the_wait(tmp_path: Path, gate: Any) -> None:
    shut, is_open = gate
    model, cap = capture(tmp_path)
    with cap:
        shut()
        threading.Timer(0.1, is_open.set).start()
        call(model, *(ids(16, start) for start in range(0, 160, 16)))
    assert cap.report.stall_s > 0.01
    reader = Reader(tmp_path / "x.strap")
    assert reader["one"].rows.tolist() == reader["two"].rows.tolist() == list(range(160))
    assert_consistent(reader)


def test_drop_leaves_out_whole_steps_and_says_which(tmp_path: Path, gate: Any) -> None:
    shut, is_open = gate
    model, cap = capture(tmp_path, on_full="drop")
    with cap:
        shut()
        call(model, ids(16), ids(16, 100), ids(16, 200), ids(10, 300))
        assert cap.report.n_dropped_steps == 2
        is_open.set()
        wait_until(lambda: cap._engine.rings.host.n_used == 0)
        call(model, ids(4, 400))
    reader = Reader(tmp_path / "x.strap")
    assert_consistent(reader)
    steps = reader.steps.to_arrow().to_pylist()
    assert [step["status"] for step in steps] == ["complete", "complete", "dropped", "dropped", "complete"]
    assert steps[2]["reason"] == "the ring was full"
    dropped = reader.tokens.to_arrow()["dropped"].to_pylist()
    assert dropped == [False] * 32 + [True] * 26 + [False] * 4
    for name in ("one", "two"):
        assert reader[name].rows.tolist() == [*range(32), *range(58, 62)]
    stored = {site.name: (site.expected, site.written, site.dropped) for site in reader.report.sites}
    assert stored == {"one": (62, 36, 26), "two": (62, 36, 26)}
    assert [(site.expected, site.written, site.dropped) for site in cap.report.sites] == [(62, 36, 26)] * 2
    assert "52 dropped in 2 of 5 steps (at one, two)" in cap.report.summary()


def test_raise_refuses_the_step_and_the_next_one_may_go_on(tmp_path: Path, gate: Any) -> None:
    shut, is_open = gate
    model, cap = capture(tmp_path, on_full="raise")
    with cap:
        shut()
        call(model, ids(16), ids(16, 100))
        with pytest.raises(RingFullError, match=r'the ring is full.*on_full="raise"'):
            model(ids(16, 200))
        is_open.set()
        wait_until(lambda: cap._engine.rings.host.n_used == 0)
        model(ids(2, 300))
    reader = Reader(tmp_path / "x.strap")
    assert_consistent(reader)
    assert reader["two"].n_rows == 34
    assert reader.steps.to_arrow()["status"].to_pylist() == ["complete"] * 3


def test_an_idle_drain_is_not_taken_for_a_full_ring(tmp_path: Path) -> None:
    model, cap = capture(tmp_path, on_full="drop")
    with cap:
        for start in range(40):
            model(ids(2, start))
            time.sleep(0.005)
    assert cap.report.n_dropped == 0


def test_a_row_larger_than_the_ring_is_refused(tmp_path: Path) -> None:
    model, cap = capture(tmp_path, host_ring_bytes=512)
    with pytest.raises(CaptureError, match=r"site 'one'.*one row has 1024 bytes.*raise host_ring_bytes"), cap:
        model(ids(1))


def test_small_rings_of_any_size_lose_nothing(tmp_path: Path) -> None:
    for number, host_ring_bytes in enumerate((1024, 1500, 3000, 8192, 10_000)):
        model = Wide()
        with strapfmt.capture(
            model,
            tmp_path / f"{number}.strap",
            sites=["one", "two"],
            host_ring_bytes=host_ring_bytes,
            quiet=True,
        ):
            call(model, ids(7), ids(1, 7), ids(30, 8))
        reader = Reader(tmp_path / f"{number}.strap")
        assert reader["two"].n_rows == 38
        assert_consistent(reader)


# Commits.


def test_commits_hold_whole_steps_of_every_site(tmp_path: Path) -> None:
    model, cap = capture(tmp_path, commit_interval_s=0.0)
    seen = set()
    with cap:
        for start in range(0, 240, 6):
            model(ids(6, start))
            reader = Reader(tmp_path / "x.strap")
            assert_consistent(reader)
            n_rows = len(reader.tokens)
            assert n_rows % 6 == 0
            if n_rows:
                assert reader["one"].n_rows == reader["two"].n_rows == n_rows == 6 * len(reader.steps)
            seen.add(n_rows)
    assert len(seen) > 3
    assert Reader(tmp_path / "x.strap")["two"].n_rows == 240


# Disks that fail.


def never_ends(model: torch.nn.Module) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        model(ids(16))
    raise AssertionError("nothing was raised")


def test_a_failing_disk_is_raised_at_a_later_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cap = capture(tmp_path, commit_interval_s=0.0)

    def body() -> None:
        model(ids(16))
        wait_until(lambda: len(Reader(tmp_path / "x.strap").tokens) == 16)
        fail_disk(monkeypatch)
        never_ends(model)

    with pytest.raises(DrainError, match="No space left on device") as caught, cap:
        body()
    assert isinstance(caught.value.__cause__, WriteError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert not model._forward_hooks
    assert cap.report.state == "failed"
    assert sum(site.expected for site in cap.report.sites) > 32
    reader = Reader(tmp_path / "x.strap")
    assert not reader.report.is_clean
    assert reader["two"].n_rows == 16
    assert_consistent(reader)
    monkeypatch.undo()
    with strapfmt.capture(model, tmp_path / "x.strap", sites=["one", "two"], mode="append", **SMALL):
        model(ids(3, 50))
    assert Reader(tmp_path / "x.strap")["two"].n_rows == 19
    assert_consistent(Reader(tmp_path / "x.strap"))


@pytest.mark.parametrize("name", ["write", "fsync", "rename", "create"])
def test_a_failing_disk_is_raised_at_the_end_at_the_latest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, cap = capture(tmp_path, quiet=False)

    def body() -> None:
        fail_disk(monkeypatch, name)
        model(ids(3))

    with pytest.raises(DrainError, match="No space left"), cap:
        body()
    assert "writing FAILED" in capsys.readouterr().err
    assert len(Reader(tmp_path / "x.strap").tokens) == 0


def test_a_swallowed_failure_is_raised_again_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cap = capture(tmp_path)

    def body() -> None:
        fail_disk(monkeypatch)
        with pytest.raises(DrainError):
            never_ends(model)

    with pytest.raises(DrainError, match="No space left"), cap:
        body()


def test_a_failing_disk_wakes_a_model_that_waits_for_the_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cap = capture(tmp_path)

    def body() -> None:
        fail_disk(monkeypatch, delay_s=0.1)
        model(ids(3000))

    with pytest.raises(DrainError), cap:
        body()
    assert cap.report.stall_s > 0


def test_the_users_own_error_wins_over_a_failing_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cap = capture(tmp_path)

    def body() -> None:
        fail_disk(monkeypatch)
        model(ids(3))
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine") as caught, cap:
        body()
    assert "No space left" in caught.value.__notes__[0]


def test_a_file_size_limit_of_the_system_is_a_drain_error(tmp_path: Path) -> None:
    model, cap = capture(tmp_path, commit_interval_s=0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def body() -> None:
        model(ids(16))
        wait_until(lambda: len(Reader(tmp_path / "x.strap").tokens) == 16)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
        never_ends(model)

    try:
        with pytest.raises(DrainError, match="File too large"), cap:
            body()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    reader = Reader(tmp_path / "x.strap")
    assert reader["one"].n_rows >= 16
    assert_consistent(reader)


def test_any_other_failure_of_the_writing_side_is_a_drain_error_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cap = capture(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("a mistake of ours")

    def body() -> None:
        monkeypatch.setattr(DatasetWriter, "write", refuse)
        never_ends(model)

    with pytest.raises(DrainError, match="RuntimeError: a mistake of ours"), cap:
        body()


# Interrupts.


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Raise KeyboardInterrupt after so many seconds."""
    with interrupts(KeyboardInterrupt) as arm:
        yield arm


def test_an_interrupt_at_any_moment_leaves_a_clean_dataset(
    tmp_path: Path, alarm: Callable[[float], None]
) -> None:
    rng = random.Random(0)
    for number in range(25):
        model = Wide()
        cap = strapfmt.capture(model, tmp_path / f"{number}.strap", sites=["one", "two"], **SMALL)

        def body(model: Wide = model) -> None:
            alarm(rng.uniform(0.001, 0.02))
            never_ends(model)

        with pytest.raises(KeyboardInterrupt), cap:
            body()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        reader = Reader(tmp_path / f"{number}.strap")
        assert reader.report.is_clean
        assert_consistent(reader)


def test_interrupts_that_are_caught_leave_a_capture_that_works(
    tmp_path: Path, alarm: Callable[[float], None]
) -> None:
    model, cap = capture(tmp_path)
    rng, n_interrupts, began = random.Random(1), 0, time.monotonic()

    def goes_on() -> bool:
        return time.monotonic() - began < (0.5 if n_interrupts > 20 else PATIENCE_S)

    with cap:
        while goes_on():
            try:
                alarm(rng.uniform(0.0005, 0.004))
                while goes_on():
                    model(ids(rng.choice([1, 16, 40])))
                alarm(0.0)
            except KeyboardInterrupt:
                n_interrupts += 1
        model(ids(5, 5000))
    assert n_interrupts > 20
    reader = Reader(tmp_path / "x.strap")
    assert reader.report.is_clean
    assert_consistent(reader)
    assert reader["two"].tensor()[-5:, 0].tolist() == [5001.0, 5002.0, 5003.0, 5004.0, 5005.0]
    abandoned = [step for step in reader.steps.to_arrow().to_pylist() if step["status"] == "abandoned"]
    assert 0 < len(abandoned) == cap.report.n_abandoned_steps


@pytest.mark.parametrize("drain", ["thread", "process"])
def test_an_interrupt_beside_an_item_neither_loses_nor_doubles_it(
    drain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cap = capture(tmp_path, drain=drain)
    with cap:
        publish = cap._engine.rings.publish

        def strike(kind: type, *, comes_before: bool) -> None:
            def interrupted(item: Any) -> None:
                if not (isinstance(item, kind) and comes_before):
                    publish(item)
                if isinstance(item, kind):
                    monkeypatch.undo()
                    raise KeyboardInterrupt

            monkeypatch.setattr(cap._engine.rings, "publish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                model(ids(3))

        strike(SiteSpec, comes_before=True)
        strike(SiteSpec, comes_before=False)
        model(ids(1, 20))
        strike(StepEnd, comes_before=False)
        model(ids(2, 10))
    reader = Reader(tmp_path / "x.strap")
    statuses = [step["status"] for step in reader.steps.to_arrow().to_pylist()]
    assert statuses == ["abandoned", "abandoned", "complete", "complete", "complete"]
    assert reader["two"].n_rows == 6
    assert_consistent(reader)


def test_an_interrupt_while_the_end_waits_for_the_disk_passes(
    tmp_path: Path, gate: Any, alarm: Callable[[float], None]
) -> None:
    shut, is_open = gate
    model, cap = capture(tmp_path)

    def body() -> None:
        model(ids(3))
        shut()
        threading.Timer(0.4, is_open.set).start()
        alarm(0.1)

    with pytest.raises(KeyboardInterrupt), cap:
        body()
    assert not model._forward_hooks
    assert cap.report.state == "failed"
    wait_until(lambda: not any(thread.name == "strapfmt-drain" for thread in threading.enumerate()))
    assert_consistent(Reader(tmp_path / "x.strap"))


def test_no_thread_and_no_file_is_left_open(tmp_path: Path) -> None:
    model, cap = capture(tmp_path)
    before = {thread.name for thread in threading.enumerate()}
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with cap:
        model(ids(3))
    gc.collect()
    assert {thread.name for thread in threading.enumerate()} == before
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors


def test_statistics_belong_to_their_rows_however_they_were_grouped(tmp_path: Path) -> None:
    model, cap = capture(tmp_path, host_ring_bytes=1 << 20)
    with cap:
        call(model, ids(3), ids(1, 10), ids(500, 20), ids(1, 600))
    for name in ("one", "two"):
        columns = Reader(tmp_path / "x.strap")[name].to_arrow(["activation", "mean", "std", "abs_max"])
        values = np.stack([value.values.to_numpy() for value in columns["activation"]])
        np.testing.assert_allclose(columns["mean"].to_numpy(), values.mean(1), rtol=1e-6)
        np.testing.assert_array_equal(columns["abs_max"].to_numpy(), values.max(1))
        assert not columns["std"].to_numpy().any()


@pytest.mark.parametrize("is_first_complete", [False, True])
def test_an_interrupt_right_behind_the_end_of_a_step_does_not_end_it_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_first_complete: bool
) -> None:
    model, cap = capture(tmp_path)

    def fail() -> None:
        raise ValueError("in the middle")

    with cap:
        assert cap._engine is not None
        rings = cap._engine.rings
        publish = rings.publish

        def publish_and_strike(item: Any) -> None:
            publish(item)
            if isinstance(item, StepEnd):
                monkeypatch.setattr(rings, "publish", publish)
                raise KeyboardInterrupt

        monkeypatch.setattr(rings, "publish", publish_and_strike)
        if not is_first_complete:
            model.middle = fail
        with pytest.raises(KeyboardInterrupt):
            model(ids(3))
        model.middle = lambda: None
        model(ids(2, 10))
    statuses = [step["status"] for step in Reader(tmp_path / "x.strap").steps.to_arrow().to_pylist()]
    assert statuses == ["complete" if is_first_complete else "abandoned", "complete"]
    assert cap.report.n_abandoned_steps == statuses.count("abandoned")


def test_values_that_an_interrupt_cuts_off_at_the_end_of_a_step_are_not_those_of_a_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cap = capture(tmp_path)

    def strike(**_: Any) -> None:
        raise KeyboardInterrupt

    with cap:
        model(ids(1))  # known sites go the short way
        with monkeypatch.context() as patch:
            patch.setattr(small_values, "Block", strike)
            with pytest.raises(KeyboardInterrupt):
                model(ids(3, 10))
        model(ids(2, 20))
    statuses = [step["status"] for step in Reader(tmp_path / "x.strap").steps.to_arrow().to_pylist()]
    assert statuses == ["complete", "abandoned", "complete"]
    assert {(site.expected, site.written, site.dropped) for site in cap.report.sites} == {(6, 3, 3)}
    assert_consistent(Reader(tmp_path / "x.strap"))
