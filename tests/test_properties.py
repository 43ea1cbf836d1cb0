"""Whatever is written comes back bit for bit, however it was cut into calls, batches, shards, commits and sessions."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from small_datasets import Model, check_routes, contents_of, quick_directory, random_chunk, write_chunk

from strapfmt import spec
from strapfmt.dtypes import DTYPES
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt.verify import verify
from strapfmt.writer import DatasetWriter

QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
N_ROUND_TRIPS, N_MACHINES = 60, 30
N_SLOW_ROUND_TRIPS, N_SLOW_MACHINES = 3000, 400


@st.composite
def site_specs(draw: st.DrawFn, name: str = "blocks.0.x") -> SiteSpec:
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 8, 17]), max_size=3))
    ragged = draw(st.integers(0, 3)) == 0
    if ragged:
        shape[draw(st.integers(0, len(shape))) :] = [-1, *shape[2:]]
    chosen = draw(st.sets(st.sampled_from(spec.STATISTICS)))
    return SiteSpec(
        name=name,
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        shape=tuple(shape),
        row_space=draw(st.sampled_from(["tokens", "own"])),
        codec=draw(st.sampled_from(["none", "none", "lz4", "zstd"])),
        statistics=tuple(name for name in spec.STATISTICS if name in chosen),
    )


ROUND_TRIP = {
    "site": site_specs(),
    "calls": st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["", "commit", "append"])), max_size=6),
    "batch_bytes": st.sampled_from([1, 64, 300, 2000, 1 << 22]),
    "shard_bytes": st.sampled_from([1, 1500, 6000, 1 << 30]),
    "gaps": st.sampled_from([0, 0, 1, 5]),
    "rank": st.sampled_from([None, 0, 3, spec.MAX_RANK]),
    "unclean": st.booleans(),
    "seed": st.integers(0, 1 << 32),
}


def check_round_trip(
    site: SiteSpec,
    calls: list[tuple[int, str]],
    batch_bytes: int,
    shard_bytes: int,
    gaps: int,
    rank: int | None,
    unclean: bool,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    model = Model()
    model.add_site(site)
    options: dict[str, Any] = {
        "rank": rank,
        "batch_bytes": batch_bytes,
        "shard_bytes": shard_bytes,
        "commit_interval_s": 1e9,
    }
    number = rank or 0
    next_row = number << spec.RANK_SHIFT
    with quick_directory() as directory:
        path = directory / "a.strap"
        writer = DatasetWriter(path, **options)
        writer.add_site(site)
        for n_rows, then in calls:
            chunk = random_chunk(site, n_rows, rng)
            rows = next_row + np.cumsum(1 + rng.integers(0, gaps + 1, n_rows))
            rows = None if site.row_space == "own" else rows
            write_chunk(writer, site, chunk, rows)
            writer.wait()
            model.add(site.name, chunk, rows, rank=number)
            next_row = int(rows[-1]) if rows is not None and n_rows else next_row
            if then == "commit":
                writer.commit()
                with Reader(path) as reader:
                    assert contents_of(reader) == model.contents()
            elif then == "append":
                writer.close()
                writer = DatasetWriter(path, mode="append", **options)
                writer.add_site(site)
        if unclean:
            writer.commit()
            writer.abort()
        else:
            writer.close()
        with Reader(path) as reader:
            assert reader.ranks == [number]
            assert reader.report.is_clean != unclean
            assert contents_of(reader) == model.contents()
            check_routes(reader[site.name], model, rng)
        with Reader(path, verify="always") as reader:
            check_routes(reader[site.name], model, rng)
            assert reader.report.sites[0].written == len(model.rows(site.name))
        report = verify(path)
        assert report.problems == ()


@settings(max_examples=N_ROUND_TRIPS, deadline=None, suppress_health_check=QUIET)
@given(**ROUND_TRIP)
def test_what_is_written_comes_back(**case: Any) -> None:
    check_round_trip(**case)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=N_SLOW_ROUND_TRIPS, deadline=None, suppress_health_check=QUIET)
@given(**ROUND_TRIP)
def test_what_is_written_comes_back_in_the_long_form(**case: Any) -> None:
    check_round_trip(**case)


class DatasetMachine(RuleBasedStateMachine):
    """Writes, commits, crashes, appends and refreshes in any order, beside a list model."""

    def __init__(self) -> None:
        super().__init__()
        self.context = quick_directory()
        self.directory = self.context.__enter__()
        self.n_crashes = 0
        self.path = self.directory / "run0.strap"
        self.model = Model()
        self.committed = [self.model.copy()]
        self.writer: DatasetWriter | None = None
        self.reader: Reader | None = None
        self.seen = 0
        self.rng = np.random.default_rng(0)

    @initialize(seed=st.integers(0, 1 << 32))
    def create(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.writer = self._open("create")

    def _open(self, mode: Any) -> DatasetWriter:
        return DatasetWriter(self.path, mode=mode, batch_bytes=200, shard_bytes=2500, commit_interval_s=1e9)

    @precondition(lambda self: self.writer)
    @rule(
        drawn=site_specs(),
        name=st.sampled_from(["a", "b.c", "Größe", "CON"]),
        sizes=st.lists(st.integers(0, 9), max_size=3),
        skipped=st.integers(0, 2),
    )
    def write(self, drawn: SiteSpec, name: str, sizes: list[int], skipped: int) -> None:
        assert self.writer
        site = self.writer.sites.get(name) or replace(drawn, name=name)
        self.writer.add_site(site)
        self.model.add_site(site)
        for n_rows in sizes:
            chunk = random_chunk(site, n_rows, self.rng)
            rows = None
            if site.row_space == "tokens":
                first = self.writer.reserve("row", n_rows + skipped) + skipped
                rows = np.arange(first, first + n_rows)
            write_chunk(self.writer, site, chunk, rows)
            self.writer.wait()
            self.model.add(site.name, chunk, rows)

    @precondition(lambda self: self.writer)
    @rule(n_rows=st.integers(0, 5))
    def write_events(self, n_rows: int) -> None:
        assert self.writer
        first = self.writer.reserve("step", n_rows)
        rows = [
            {"row": i, "step": first + i, "event": "rejected", "detail": None if i % 2 else "why"}
            for i in range(n_rows)
        ]
        names = ("row", "step", "event", "detail")
        self.writer.write_table("row_events", {name: [row[name] for row in rows] for name in names})
        self.model.tables["row_events"] += rows

    @precondition(lambda self: self.writer)
    @rule()
    def commit(self) -> None:
        assert self.writer
        self.writer.commit()
        self.committed.append(self.model.copy())

    @precondition(lambda self: self.writer)
    @rule()
    def close(self) -> None:
        assert self.writer
        self.writer.close()
        self.writer = None
        self.committed.append(self.model.copy())

    @precondition(lambda self: self.writer)
    @rule()
    def crash(self) -> None:
        """Go on with a copy of what lies on disk while the writer is still at work."""
        assert self.writer
        self.n_crashes += 1
        copy = self.directory / f"run{self.n_crashes}.strap"
        shutil.copytree(self.path, copy)
        self.writer.abort()
        self.writer = None
        self.path, self.model = copy, self.committed[-1].copy()
        self.committed.append(self.model.copy())
        self._forget_reader()

    @precondition(lambda self: self.writer is None)
    @rule()
    def append(self) -> None:
        self.writer = self._open("append")
        self.committed.append(self.model.copy())

    @precondition(lambda self: self.writer is None)
    @rule()
    def damage_is_not_found(self) -> None:
        assert verify(self.path).problems == ()

    @rule()
    def open(self) -> None:
        self._forget_reader()
        self.reader, self.seen = Reader(self.path), len(self.committed) - 1

    @precondition(lambda self: self.reader)
    @rule()
    def refresh(self) -> None:
        assert self.reader
        moved = self.reader.refresh()
        assert moved == (self.seen != len(self.committed) - 1)
        self.seen = len(self.committed) - 1

    def _forget_reader(self) -> None:
        if self.reader:
            self.reader.close()
        self.reader = None

    @invariant()
    def reader_holds_what_was_committed_when_it_looked(self) -> None:
        if self.reader is None:
            return
        model = self.committed[self.seen]
        assert contents_of(self.reader) == model.contents()
        for name in model.sites:
            check_routes(self.reader[name], model, self.rng)

    def teardown(self) -> None:
        self._forget_reader()
        if self.writer:
            self.writer.abort()
        self.context.__exit__(None, None, None)


class TestDatasetMachine(DatasetMachine.TestCase):
    settings = settings(
        max_examples=N_MACHINES, stateful_step_count=30, deadline=None, suppress_health_check=QUIET
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
class TestDatasetMachineInTheLongForm(DatasetMachine.TestCase):
    settings = settings(
        max_examples=N_SLOW_MACHINES, stateful_step_count=60, deadline=None, suppress_health_check=QUIET
    )


def test_every_bit_pattern_of_small_types_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.strap"
    names = [name for name, dtype in DTYPES.items() if dtype.item_bytes <= 2 and name != "bool"]
    with DatasetWriter(path) as writer:
        for name in names:
            storage = DTYPES[name].numpy
            patterns = np.arange(1 << 8 * storage.itemsize, dtype=f"u{storage.itemsize}").view(storage)
            writer.add_site(SiteSpec(name=name, dtype=name, shape=(256,), row_space="own", statistics=()))
            writer.write(name, patterns.reshape(-1, 256))
        writer.wait()
    with Reader(path, verify="always") as reader:
        for name in names:
            tensor = reader[name].tensor()
            assert str(tensor.dtype) == f"torch.{name}"
            width = tensor.element_size()
            import torch

            raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert raw == np.arange(1 << 8 * width, dtype=f"u{width}").tobytes()
