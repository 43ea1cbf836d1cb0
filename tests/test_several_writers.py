"""Writers and readers in several processes: ranks side by side, one owner a rank, readers that follow."""

import multiprocessing
import time
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import pytest
from small_datasets import Model, Script, contents_of, quick_directory

from strapfmt.errors import DatasetExistsError, DatasetNotFoundError, StrapfmtError, WriterConflictError
from strapfmt.reader import Reader
from strapfmt.verify import verify
from strapfmt.writer import DatasetWriter

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["small_datasets", "forge"])
OPTIONS: dict[str, Any] = {"batch_bytes": 128, "shard_bytes": 3000, "commit_interval_s": 0.0}


def write_rank(path: str, rank: int, n_steps: int, barrier: Barrier) -> None:
    script = Script(rank=rank)
    barrier.wait(20)
    with DatasetWriter(path, rank=rank, **OPTIONS) as writer:
        script.declare(writer)
        for step in range(n_steps):
            script.write(writer, step)


def test_ranks_write_side_by_side_and_are_read_as_one() -> None:
    with quick_directory() as directory:
        path, barrier = directory / "a.strap", PROCESSES.Barrier(4)
        processes = [
            PROCESSES.Process(target=write_rank, args=(str(path), r, 6 + r, barrier)) for r in range(4)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 4
        whole = Model()
        for rank in range(4):
            model = Script(rank=rank).model(6 + rank)
            for name, site in model.sites.items():
                whole.add_site(site)
                whole.chunks[name] += model.chunks[name]
            for name, rows in model.tables.items():
                whole.tables[name] += rows
        with Reader(path, verify="always") as reader:
            assert reader.ranks == [0, 1, 2, 3]
            assert contents_of(reader) == whole.contents()
            assert reader.report.is_clean


def claim(path: str, mode: Any, rank: int | None, barrier: Barrier, n_rounds: int, results: Any) -> None:
    for number in range(n_rounds):
        barrier.wait(20)
        try:
            with DatasetWriter(f"{path}{number}.strap", rank=rank, mode=mode) as writer:
                results.put((number, "won"))
                Script().declare(writer)
                barrier.wait(20)
        except (DatasetExistsError, WriterConflictError) as error:
            results.put((number, type(error).__name__))
            barrier.wait(20)


@pytest.mark.parametrize("mode", ["create", "append"])
def test_of_many_who_claim_a_rank_one_gets_it_and_the_others_learn_at_once(mode: str) -> None:
    n_rounds, n_processes = 8, 3
    with quick_directory() as directory:
        if mode == "append":
            for number in range(n_rounds):
                DatasetWriter(directory / f"{number}.strap").close()
        barrier, results = PROCESSES.Barrier(n_processes), PROCESSES.SimpleQueue()
        args = (f"{directory}/", mode, None if mode == "create" else 0, barrier, n_rounds, results)
        processes = [PROCESSES.Process(target=claim, args=args) for _ in range(n_processes)]
        for process in processes:
            process.start()
        found: dict[int, list[str]] = {}
        for _ in range(n_rounds * n_processes):
            number, outcome = results.get()
            found.setdefault(number, []).append(outcome)
        for process in processes:
            process.join(30)
            assert process.exitcode == 0
    assert [outcomes.count("won") for _, outcomes in sorted(found.items())] == [1] * n_rounds


def test_the_second_claimant_in_one_process_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    path, script = tmp_path / "a.strap", Script()
    with DatasetWriter(path, **OPTIONS) as writer:
        script.declare(writer)
        script.write(writer, 0)
        started = time.monotonic()
        for mode in ("append", "overwrite", "create"):
            with pytest.raises((WriterConflictError, DatasetExistsError)):
                DatasetWriter(path, mode=mode)  # type: ignore[arg-type]
        assert time.monotonic() - started < 2
        script.write(writer, 1)
    with Reader(path, verify="always") as reader:
        assert contents_of(reader) == script.contents(2)
    with DatasetWriter(path, mode="append") as writer:
        script.declare(writer)


def write_until(path: str, stop: Event, n_steps: Any) -> None:
    script, step = Script(), 0
    with DatasetWriter(path, **OPTIONS) as writer:
        script.declare(writer)
        while not stop.is_set() or step < 5:
            script.write(writer, step)
            writer.commit()
            step += 1
    n_steps.put(step)


def test_readers_see_exact_commits_while_a_writer_is_at_work() -> None:
    script = Script()
    with quick_directory() as directory:
        path, stop, result = directory / "a.strap", PROCESSES.Event(), PROCESSES.SimpleQueue()
        process = PROCESSES.Process(target=write_until, args=(str(path), stop, result))
        process.start()
        followers: list[tuple[Reader, int]] = []
        n_opened, last, began = 0, 0, time.monotonic()
        while goes_on(began, is_enough=n_opened > 5 and last > 3):
            try:
                reader = Reader(path, verify="always")
            except DatasetNotFoundError:
                continue
            n_steps = script.n_steps_of(reader)
            assert n_steps >= last
            last = n_steps
            if reader.names:
                assert contents_of(reader) == script.contents(n_steps)
                n_opened += 1
            if n_opened in (2, 5):
                followers.append((reader, n_steps))
        for reader, n_steps in followers:
            assert contents_of(reader) == script.contents(n_steps)
            reader.refresh()
            assert contents_of(reader) == script.contents(script.n_steps_of(reader))
        stop.set()
        n_steps = result.get()
        process.join(30)
        assert process.exitcode == 0
        assert n_opened > 5
        assert last > 3
        for reader, _ in followers:
            reader.refresh()
            assert contents_of(reader) == script.contents(n_steps)
        assert verify(path).problems == ()


def goes_on(began: float, *, is_enough: bool) -> bool:
    """Say whether to go on: some seconds, and on a busy machine until enough has been seen."""
    return time.monotonic() - began < (2 if is_enough else 60)


def overwrite_until(path: str, stop: Event) -> None:
    seed = 0
    while not stop.is_set():
        seed += 1
        script = Script(seed=seed % 5)
        with DatasetWriter(path, mode="overwrite", **OPTIONS) as writer:
            script.declare(writer)
            script.write(writer, 0)
            script.write(writer, 1)


def test_a_dataset_that_is_replaced_over_and_over_is_read_whole_or_refused() -> None:
    whole = [Script(seed=seed).contents(n) for seed in range(5) for n in (0, 1, 2)]
    outcomes = {"read": 0, "refused": 0}
    with quick_directory() as directory:
        path, stop = directory / "a.strap", PROCESSES.Event()
        process = PROCESSES.Process(target=overwrite_until, args=(str(path), stop))
        process.start()
        began = time.monotonic()
        while goes_on(began, is_enough=outcomes["read"] > 0):
            try:
                with Reader(path, verify="always") as reader:
                    if reader.names:
                        assert contents_of(reader) in whole
                        outcomes["read"] += 1
            except StrapfmtError:
                outcomes["refused"] += 1
        stop.set()
        process.join(30)
        assert process.exitcode == 0
    assert outcomes["read"] > 0
