"""The writer: what it accepts and refuses, sessions and ranks, and what lies in the directory afterwards."""

import json
import os
import resource
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from forge import Forger
from small_datasets import Model, Script, check_routes, contents_of, random_chunk, write_chunk

from strapfmt import spec
from strapfmt.commit import Disk
from strapfmt.errors import (
    ArgumentError,
    CorruptError,
    DatasetExistsError,
    DatasetNotFoundError,
    SiteNotFoundError,
    WriteError,
    WriterClosedError,
    WriterConflictError,
)
from strapfmt.reader import Reader
from strapfmt.schema import TABLE_SCHEMAS, SiteSpec
from strapfmt.writer import DatasetWriter

FIXED = SiteSpec(name="a", dtype="float32", shape=(3,), statistics=("l2_norm",))
RAGGED = SiteSpec(name="r", dtype="float16", shape=(2, -1), statistics=())
OWN = SiteSpec(name="o", dtype="uint8", shape=(), row_space="own", statistics=())
EMPTY = SiteSpec(name="e", dtype="uint8", shape=(-1, -1), row_space="own", statistics=())
COUNTED = SiteSpec(name="c", dtype="uint8", shape=(), row_space="own", statistics=("n_nonfinite",))

F32 = np.zeros((2, 3), np.float32)
NORMS = {"l2_norm": np.zeros(2, np.float32)}
ROWS = np.arange(2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.strap"


@pytest.fixture
def writer(path: Path) -> Any:
    with DatasetWriter(path, commit_interval_s=1e9) as writer:
        for site in (FIXED, RAGGED, OWN, EMPTY, COUNTED):
            writer.add_site(site)
        yield writer


@pytest.mark.parametrize(
    ("site", "values", "options", "problem"),
    [
        ("a", F32.astype(np.float64), {"rows": ROWS, "statistics": NORMS}, "float32"),
        ("a", F32.astype(">f4"), {"rows": ROWS, "statistics": NORMS}, "float32"),
        ("a", F32[:, ::-1], {"rows": ROWS, "statistics": NORMS}, "contiguous"),
        ("a", F32.T.copy(), {"rows": ROWS, "statistics": NORMS}, r"expected \[n"),
        ("a", F32[0], {"rows": ROWS, "statistics": NORMS}, r"expected \[n"),
        ("a", F32, {"statistics": NORMS}, "rows"),
        ("a", F32, {"rows": ROWS[:1], "statistics": NORMS}, r"int \[2\]"),
        ("a", F32, {"rows": ROWS[::-1].copy(), "statistics": NORMS}, "strictly increasing"),
        ("a", F32, {"rows": np.zeros(2, int), "statistics": NORMS}, "strictly increasing"),
        ("a", F32, {"rows": ROWS - 1, "statistics": NORMS}, "strictly increasing"),
        ("a", F32, {"rows": ROWS + (1 << 40), "statistics": NORMS}, "rank 0"),
        ("a", F32, {"rows": np.array([0, 1 << 40]), "statistics": NORMS}, "rank 0"),
        ("a", F32, {"rows": np.array([5, (1 << 64) - 1], np.uint64), "statistics": NORMS}, "rows"),
        ("a", F32, {"rows": ROWS.astype(float), "statistics": NORMS}, "rows: expected int"),
        ("a", F32, {"rows": ROWS}, "statistics"),
        ("a", F32, {"rows": ROWS, "statistics": NORMS | {"mean": ROWS}}, "statistics"),
        ("a", F32, {"rows": ROWS, "statistics": {"l2_norm": ROWS[:1]}}, r"l2_norm: expected \[2\]"),
        ("a", F32, {"rows": ROWS, "statistics": NORMS, "call": 1}, "neither token_row nor call"),
        ("a", F32, {"rows": ROWS, "statistics": NORMS, "shapes": ROWS}, "shapes: expected none"),
        ("r", np.zeros(4, np.float16), {"rows": ROWS}, "one a row"),
        (
            "r",
            np.zeros(4, np.float16),
            {"rows": ROWS, "shapes": np.array([[2, 1], [2, 2]])},
            r"expected \[6\]",
        ),
        ("r", np.zeros(4, np.float16), {"rows": ROWS, "shapes": np.array([[2, 1], [1, 2]])}, r"\(2, -1\)"),
        ("r", np.zeros(4, np.float16), {"rows": ROWS, "shapes": np.array([[2, -1], [2, 3]])}, ">= 0"),
        ("r", np.zeros(4, np.float16), {"rows": ROWS, "shapes": np.array([[2], [2]])}, r"\[n, 2\]"),
        ("o", np.zeros(2, np.uint8), {"rows": ROWS[::-1].copy()}, "strictly increasing"),
        ("o", np.zeros(2, np.uint8), {"token_row": np.zeros(3, int)}, "token_row"),
        ("o", np.zeros(2, np.uint8), {"call": 1.5}, "call"),
        ("o", np.zeros(2, np.uint8), {"call": np.uint64(1 << 63)}, "call: expected at most"),
        (
            "o",
            np.zeros(2, np.uint8),
            {"token_row": np.array([0, 1 << 63], np.uint64)},
            "token_row: expected at",
        ),
        ("e", np.zeros(0, np.uint8), {"shapes": np.array([[1 << 31, 0]])}, "of at most 2147483647"),
        ("e", np.zeros(0, np.uint8), {"shapes": np.array([[1 << 33, 1 << 33]])}, "8589934592, 8589934592"),
        ("e", np.zeros(0, np.uint8), {"shapes": np.array([[1 << 63, 2]], np.uint64)}, "of at most"),
        ("e", np.zeros(0, np.uint8), {"shapes": np.array([[1, 1], [1 << 16, 1 << 15]])}, "65536, 32768"),
        ("e", np.zeros(0, np.uint8), {"shapes": np.array([[2, 3]])}, r"expected \[6\]"),
        ("c", np.zeros(2, np.uint8), {"statistics": {"n_nonfinite": [0, (1 << 32) + 7]}}, "got 4294967303"),
        ("c", np.zeros(2, np.uint8), {"statistics": {"n_nonfinite": [0, 1.9]}}, "whole numbers, got"),
        ("c", np.zeros(2, np.uint8), {"statistics": {"n_nonfinite": ["0", "1"]}}, "whole numbers, got"),
        ("a", F32, {"rows": ROWS, "statistics": {"l2_norm": ["0", "1"]}}, r"\[2\] numbers, got"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_of_the_call_is_written(
    path: Path, writer: DatasetWriter, site: str, values: Any, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ArgumentError, match=problem):
        writer.write(site, values, **options)
    assert writer.summary().n_rows == 0
    writer.write("a", F32, rows=ROWS, statistics=NORMS)
    writer.close()
    with Reader(path) as reader:
        assert {name: len(reader[name]) for name in reader.names} == dict.fromkeys(reader.names, 0) | {"a": 2}


def test_a_site_not_declared_names_those_that_are(writer: DatasetWriter) -> None:
    with pytest.raises(SiteNotFoundError, match="add_site"):
        writer.write("b", F32, rows=ROWS)


def test_a_site_is_declared_once(writer: DatasetWriter) -> None:
    writer.add_site(FIXED)
    with pytest.raises(ArgumentError, match="declared as"):
        writer.add_site(SiteSpec(name="a", dtype="float32", shape=(4,)))
    with pytest.raises(ArgumentError, match="codec"):
        writer.add_site(SiteSpec(name="n", dtype="float32", shape=(4,), codec="brotli"))
    with pytest.raises(ArgumentError, match="dtype"):
        writer.add_site(SiteSpec(name="n", dtype="float4", shape=(4,)))
    assert list(writer.sites) == ["a", "r", "o", "e", "c"]


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("colours", {}),
        ("row_events", {"row": [1]}),
        ("row_events", {"row": [1], "step": [1], "event": ["x"], "detail": [None], "more": [1]}),
        ("row_events", {"row": [1, 2], "step": [1], "event": ["x"], "detail": [None]}),
        ("row_events", {"row": [None], "step": [1], "event": ["x"], "detail": [None]}),
        ("row_events", {"row": ["one"], "step": [1], "event": ["x"], "detail": [None]}),
        ("row_events", {"row": [1 << 63], "step": [1], "event": ["x"], "detail": [None]}),
        ("row_events", {"row": [1], "step": [1], "event": ["\ud800"], "detail": [None]}),
    ],
)
def test_a_table_takes_exactly_its_columns(
    path: Path, writer: DatasetWriter, name: str, columns: Any
) -> None:
    with pytest.raises(ArgumentError, match="table"):
        writer.write_table(name, columns)
    writer.close()
    with Reader(path) as reader:
        assert len(reader.row_events) == 0


def table_columns(name: str, ids: Any) -> dict[str, Any]:
    """Columns of a table whose rows have these ids."""
    key = {"tokens": "row", "sequences": "sequence_id", "steps": "step", "row_events": "row"}[name]
    empty = {pa.utf8(): "", pa.bool_(): False, pa.float64(): 0.0}
    columns = {
        column.name: [None if column.nullable else empty.get(column.type, 0)] * len(ids)
        for column in TABLE_SCHEMAS[name]
    }
    return columns | {key: ids}


@pytest.mark.parametrize("name", ["tokens", "sequences", "steps", "row_events"])
@pytest.mark.parametrize(
    "ids", [[3, 3], [4, 3], [2, 5], [-1], [-5, -4], [1 << 40], [5, 7 << 40], [1 << 62]], ids=repr
)
def test_ids_of_tables_are_of_this_rank_and_go_up(path: Path, name: str, ids: list[int]) -> None:
    with DatasetWriter(path) as writer:
        writer.write_table(name, table_columns(name, [0, 2]))
        if (name == "row_events" and set(ids) <= set(range(9))) or (name, ids) == ("sequences", [4, 3]):
            writer.write_table(name, table_columns(name, ids))  # in any order, events of any row again
            return
        if (name, ids) == ("sequences", [2, 5]):
            return  # who numbers sequences sees to it that none begins twice
        with pytest.raises(ArgumentError, match=rf"table '{name}': \w+: expected .*; got|of rank 0"):
            writer.write_table(name, table_columns(name, ids))
        writer.write_table(name, table_columns(name, [3, 9]))
    column = {"sequences": "sequence_id", "steps": "step"}.get(name, "row")
    assert getattr(Reader(path), name).to_arrow([column])[column].to_pylist() == [0, 2, 3, 9]


@pytest.mark.parametrize("name", ["tokens", "sequences", "steps"])
def test_ids_of_tables_go_on_above_earlier_sessions(path: Path, name: str) -> None:
    first = 3 << spec.RANK_SHIFT
    with DatasetWriter(path, rank=3) as writer:
        for kind in ("row", "sequence", "step"):
            writer.reserve(kind, 5)  # type: ignore[arg-type]
        writer.write_table(name, table_columns(name, [first + 1]))
    with DatasetWriter(path, rank=3, mode="append") as writer:
        with pytest.raises(ArgumentError, match=f"above {first + 4}, the last one used; got {first + 4}"):
            writer.write_table(name, table_columns(name, [first + 4]))
        writer.write_table(name, table_columns(name, [first + 5]))


def test_ids_are_consecutive_over_kinds_threads_and_ranks(path: Path) -> None:
    found: list[int] = []
    with DatasetWriter(path, rank=3) as writer:
        base = 3 << spec.RANK_SHIFT
        assert [writer.reserve("row", 5), writer.reserve("row", 0), writer.reserve("row", 1)] == [
            base,
            base + 5,
            base + 5,
        ]
        assert writer.reserve("step", 1) == base

        def reserve() -> None:
            for _ in range(300):
                first = writer.reserve("sequence", 3)
                found.extend(range(first, first + 3))

        threads = [threading.Thread(target=reserve) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(found) == list(range(base, base + 3600))
    assert Forger(path, 3).manifest["counters"] == {"row": 6, "step": 1, "sequence": 3600}


@pytest.mark.parametrize("n", [-3, True, 1.0, None, "1", np.int64(-1), np.array([1, 2])], ids=repr)
def test_numbers_of_things_are_whole_and_not_negative(path: Path, writer: DatasetWriter, n: Any) -> None:
    writer.reserve("row", np.int64(2))  # type: ignore[arg-type]
    writer.count("a", expected=np.uint8(3), dropped=np.int16(1))  # type: ignore[arg-type]
    for call in (
        lambda: writer.reserve("row", n),
        lambda: writer.count("a", expected=n),
        lambda: writer.count("a", dropped=n),
    ):
        with pytest.raises(ArgumentError, match="expected a whole number of at least 0"):
            call()
    with pytest.raises(ArgumentError, match="one of row, step, sequence"):
        writer.reserve("rows", 1)  # type: ignore[arg-type]
    with pytest.raises(SiteNotFoundError, match="add_site"):
        writer.count("b", expected=1)
    writer.close()
    assert Forger(path).manifest["counters"]["row"] == 2
    assert Forger(path).manifest["sites"][0]["counts"] == {"expected": 3, "written": 0, "dropped": 1}


def test_statistics_beyond_float32_are_infinite(path: Path, writer: DatasetWriter) -> None:
    writer.write("a", F32, rows=ROWS, statistics={"l2_norm": np.array([1e300, 2.0])})
    writer.close()
    assert Reader(path)["a"].to_arrow(["l2_norm"])["l2_norm"].to_pylist() == [np.inf, 2.0]


def test_arrays_beside_the_values_belong_to_the_caller_again(path: Path) -> None:
    site = SiteSpec(name="o", dtype="uint8", shape=(), row_space="own", statistics=("mean",))
    with DatasetWriter(path, batch_bytes=64) as writer:
        writer.add_site(site)
        rows, means, places = np.arange(5), np.ones(5, np.float32), np.arange(5)
        writer.write("o", np.zeros(5, np.uint8), rows=rows, statistics={"mean": means}, token_row=places)
        for array in (rows, means, places):
            array[:] = 77
    stored = Reader(path, verify="always")["o"].to_arrow(["row", "token_row", "mean"]).to_pydict()
    assert stored == {"row": [*range(5)], "token_row": [*range(5)], "mean": [1.0] * 5}


def test_the_sites_of_a_writer_are_a_view_that_costs_nothing(writer: DatasetWriter) -> None:
    sites = writer.sites
    writer.add_site(SiteSpec(name="later", dtype="float32", shape=(4,)))
    assert "later" in sites
    with pytest.raises(TypeError):
        sites["x"] = FIXED  # type: ignore[index]
    tracemalloc.start()
    try:
        assert len([writer.sites for _ in range(50)]) == 50
        assert tracemalloc.get_traced_memory()[1] < 50 * 150
    finally:
        tracemalloc.stop()


def test_a_rank_ends_at_two_to_the_forty(path: Path) -> None:
    last = (1 << spec.COUNTER_BITS) - 1
    with DatasetWriter(path, rank=spec.MAX_RANK) as writer:
        base = spec.MAX_RANK << spec.RANK_SHIFT
        writer.skip_to({"row": last})
        assert writer.reserve("row", 1) == base + last == (1 << 62) - 1
        with pytest.raises(ArgumentError, match="at most 2"):
            writer.reserve("row", 1)
        writer.add_site(FIXED)
        writer.write(
            "a", F32[:1], rows=np.array([base + last]), statistics={"l2_norm": np.zeros(1, np.float32)}
        )
    with Reader(path, verify="always") as reader:
        assert reader["a"].rows.tolist() == [(1 << 62) - 1]
        assert reader["a"].take([(1 << 62) - 1]).shape == (1, 3)
    with DatasetWriter(path, rank=spec.MAX_RANK, mode="append") as writer, pytest.raises(ArgumentError):
        writer.reserve("row", 1)


def test_zero_rows_are_nothing(path: Path, writer: DatasetWriter) -> None:
    writer.write("a", F32[:0], rows=ROWS[:0], statistics={"l2_norm": ROWS[:0]})
    writer.write("r", np.zeros(0, np.float16), rows=ROWS[:0], shapes=np.zeros((0, 2), int))
    writer.write("o", np.zeros(0, np.uint8))
    writer.write_table("row_events", {"row": [], "step": [], "event": [], "detail": []})
    writer.commit()
    writer.close()
    with Reader(path) as reader:
        assert [len(reader[name]) for name in reader.names] == [0] * 5
        assert reader["a"].tensor().shape == (0, 3)
        assert reader["a"].to_arrow().num_rows == 0
        assert list(reader["r"].scan()) == []
    assert [file.name for file in path.rglob("*.arrow*")] == []


def test_counters_and_the_summary(path: Path, writer: DatasetWriter) -> None:
    writer.write("a", F32, rows=ROWS, statistics=NORMS)
    writer.count("a", expected=5, dropped=3)
    summary = writer.summary()
    assert (summary.n_rows, summary.n_bytes, summary.sites["a"].dropped) == (2, 24, 3)
    writer.close()
    with DatasetWriter(path, mode="append") as again:
        again.add_site(FIXED)
        again.write("a", F32, rows=ROWS + 7, statistics=NORMS)
        again.count("a", expected=2)
    with Reader(path) as reader:
        report = next(site for site in reader.report.sites if site.name == "a")
        assert (report.expected, report.written, report.dropped) == (7, 4, 3)


def test_a_step_commits_when_the_interval_has_passed(path: Path) -> None:
    script = Script()
    with DatasetWriter(path, commit_interval_s=0.0) as writer:
        script.declare(writer)
        before = writer.summary().n_commits
        for step in range(3):
            script.write(writer, step)
            writer.wait()
        with Reader(path) as reader:
            assert contents_of(reader) == script.contents(3)
        assert writer.summary().n_commits > before
    seldom = path.with_name("b.strap")
    with DatasetWriter(seldom, commit_interval_s=1e9) as writer:
        script.declare(writer)
        script.write(writer, 0)
        with Reader(seldom) as reader:
            assert reader.names == []


# Modes.


def test_an_existing_path_names_the_two_ways_out(path: Path) -> None:
    DatasetWriter(path).close()
    with pytest.raises(DatasetExistsError, match=r"overwrite=True.*mode='append'"):
        DatasetWriter(path)


@pytest.mark.parametrize("mode", ["create", "overwrite", "append"])
@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_what_is_no_dataset_is_never_touched(tmp_path: Path, path: Path, mode: Any, kind: str) -> None:
    if kind == "file":
        path.write_bytes(b"precious")
    elif kind == "directory":
        path.mkdir()
        (path / "thesis.txt").write_bytes(b"precious")
    else:
        (tmp_path / "elsewhere").mkdir()
        path.mkdir()
        (path / "rank-00000").symlink_to(tmp_path / "elsewhere")
    with pytest.raises((DatasetExistsError, DatasetNotFoundError)):
        DatasetWriter(path, mode=mode)
    if kind == "link":
        assert os.listdir(tmp_path / "elsewhere") == []
    else:
        assert (path if kind == "file" else path / "thesis.txt").read_bytes() == b"precious"


def test_overwriting_leaves_nothing_of_before_and_readers_keep_what_they_mapped(path: Path) -> None:
    script = Script()
    with DatasetWriter(path, batch_bytes=128) as writer:
        script.declare(writer)
        for step in range(4):
            script.write(writer, step)
    with Reader(path) as reader:
        lazy = Reader(path)
        tensor = reader["blocks.0.resid_post"][2]
        before = contents_of(reader)
        other = Script(seed=9)
        with DatasetWriter(path, mode="overwrite") as writer:
            other.declare(writer)
            other.write(writer, 0)
        assert contents_of(reader) == before == script.contents(4)
        assert tensor.shape == (8,)
        with pytest.raises((CorruptError, OSError, RuntimeError)):
            contents_of(lazy)
        for old in (reader, lazy):
            assert old.refresh()
            assert contents_of(old) == other.contents(1)
    assert os.listdir(path.parent) == ["a.strap"]


def test_overwriting_a_live_dataset_is_refused(path: Path) -> None:
    with DatasetWriter(path) as writer:
        with pytest.raises(WriterConflictError):
            DatasetWriter(path, mode="overwrite")
        Script().declare(writer)
        Script().write(writer, 0)
    with Reader(path) as reader:
        assert contents_of(reader) == Script().contents(1)


def test_one_rank_is_overwritten_without_the_others(path: Path) -> None:
    for rank in (0, 1):
        script = Script(rank=rank)
        with DatasetWriter(path, rank=rank) as writer:
            script.declare(writer)
            script.write(writer, 0)
    with DatasetWriter(path, rank=1, mode="overwrite"):
        pass
    with Reader(path) as reader:
        assert reader.ranks == [0, 1]
        assert contents_of(reader) == Script().contents(1)


def test_appending_needs_something_committed(path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match="create"):
        DatasetWriter(path, mode="append")
    assert not path.exists()
    (path / "rank-00001").mkdir(parents=True)
    with pytest.raises(DatasetNotFoundError, match="nothing was ever committed"):
        DatasetWriter(path, rank=1, mode="append")
    with DatasetWriter(path, rank=1, mode="overwrite"):
        pass
    assert Reader(path).ranks == [1]


@pytest.mark.parametrize("target", ["rank-00000/manifest.json"])
def test_appending_to_a_damaged_dataset_is_refused_and_gives_the_lock_back(path: Path, target: str) -> None:
    DatasetWriter(path).close()
    data = (path / target).read_bytes()
    (path / target).write_bytes(data[:-5])
    for _ in range(2):
        with pytest.raises(CorruptError):
            DatasetWriter(path, mode="append")
    (path / target).unlink()
    os.mkfifo(path / target)
    with pytest.raises(CorruptError):
        DatasetWriter(path, mode="append")


def test_appending_goes_on_where_the_last_session_stopped(path: Path) -> None:
    script = Script()
    n_steps = 0
    for session in range(6):
        mode: Any = "append" if session else "create"
        writer = DatasetWriter(path, mode=mode, batch_bytes=128, commit_interval_s=1e9)
        script.declare(writer)
        for _ in range(2):
            script.write(writer, n_steps)
            n_steps += 1
        writer.commit()
        if session % 2:
            script.write(writer, n_steps)  # lost, its numbers are used again
            writer.abort()
        else:
            writer.close()
    with Reader(path, verify="always") as reader:
        assert contents_of(reader) == script.contents(n_steps)
        for name in reader.names:
            check_routes(reader[name], script.model(n_steps), np.random.default_rng(0))
        sessions = reader.manifests[0].sessions
        assert len(sessions) == 6
        assert [session["counters"]["step"] for session in sessions] == [0, 2, 4, 6, 8, 10]
        assert not reader.report.is_clean


def test_files_left_by_a_crash_are_never_written_to_again(path: Path) -> None:
    script = Script()
    writer = DatasetWriter(path, batch_bytes=64, commit_interval_s=1e9)
    script.declare(writer)
    script.write(writer, 0)
    writer.commit()
    for step in range(1, 4):
        script.write(writer, step)
    writer.abort()
    left = {
        file: file.read_bytes() for file in path.rglob("*") if ".arrow" in file.name or ".idx" in file.name
    }
    assert any(file.name.endswith(".arrow.open") for file in left)
    with DatasetWriter(path, mode="append") as writer:
        script.declare(writer)
        script.write(writer, 1)
    assert {file: file.read_bytes() for file in left} == left
    with Reader(path, verify="always") as reader:
        assert contents_of(reader) == script.contents(2)


def test_a_site_may_rest_for_a_session(path: Path) -> None:
    with DatasetWriter(path) as writer:
        writer.add_site(FIXED)
        writer.write("a", F32, rows=ROWS, statistics=NORMS)
    with DatasetWriter(path, mode="append") as writer:
        assert writer.sites == {"a": FIXED}
        writer.add_site(OWN)
        writer.write("o", np.ones(3, np.uint8))
        with pytest.raises(SiteNotFoundError):
            writer.write("a", F32, rows=ROWS + 2, statistics=NORMS)
    with DatasetWriter(path, mode="append") as writer:
        writer.add_site(OWN)
        writer.write("o", np.ones(2, np.uint8))
        writer.add_site(FIXED)
        with pytest.raises(ArgumentError, match="above 1"):
            writer.write("a", F32, rows=ROWS, statistics=NORMS)
    with Reader(path) as reader:
        assert reader["o"].rows.tolist() == [0, 1, 2, 3, 4]
        assert reader["a"].rows.tolist() == [0, 1]


# What lies in the directory.


def test_a_closed_dataset_holds_nothing_but_what_its_manifest_names(path: Path) -> None:
    script = Script()
    with DatasetWriter(path, batch_bytes=128, shard_bytes=3000) as writer:
        script.declare(writer)
        for step in range(7):
            script.write(writer, step)
            writer.commit()
    root = path / "rank-00000"
    named = {
        part["file"]
        for kind in ("sites", "tables")
        for entry in Forger(path).manifest[kind]
        for shard in entry["shards"]
        for part in shard["parts"]
    }
    found = {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
    assert found == named | {"manifest.json", "writer.lock"}
    assert all(file.endswith((".arrow", ".idx")) for file in named)
    assert all(shard["is_sealed"] for site in Forger(path).manifest["sites"] for shard in site["shards"])


def test_shards_roll_over_at_their_size(path: Path) -> None:
    site = SiteSpec(name="a", dtype="uint8", shape=(100,), row_space="own", statistics=())
    with DatasetWriter(path, batch_bytes=1000, shard_bytes=20_000) as writer:
        writer.add_site(site)
        for _ in range(10):
            writer.write("a", np.zeros((90, 100), np.uint8))
            writer.wait()
    sizes = [shard["parts"][0]["n_bytes"] for shard in Forger(path).manifest["sites"][0]["shards"]]
    assert len(sizes) > 4
    assert all(20_000 <= size < 25_000 for size in sizes[:-1])


class CountingDisk(Disk):
    """Notes the highest descriptor; the system always gives the lowest that is free."""

    highest = 0

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self.highest = max(self.highest, fd)
        return fd


def test_many_shards_and_sites_need_few_descriptors(path: Path) -> None:
    n_open = len(os.listdir("/proc/self/fd"))
    site = SiteSpec(name="a", dtype="int32", shape=(4,), row_space="own", statistics=())
    model, rng = Model(), np.random.default_rng(0)
    model.add_site(site)
    disk = CountingDisk()
    with DatasetWriter(path, batch_bytes=64, shard_bytes=1, commit_interval_s=1e9, disk=disk) as writer:
        writer.add_site(site)
        chunk = random_chunk(site, 8 * 1030, rng)
        write_chunk(writer, site, chunk, None)
        writer.close()
    assert disk.highest < n_open + 30
    model.add("a", chunk, None)
    with Reader(path, verify="always") as reader:
        assert len(reader.manifests[0].sites[0].shards) > 1024
        check_routes(reader["a"], model, rng)
        assert len(os.listdir("/proc/self/fd")) < n_open + 10


def test_more_sites_than_files_may_be_open_are_written(path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_sites = 400
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, hard))
    try:
        with DatasetWriter(path, commit_interval_s=1e9) as writer:
            for i in range(n_sites):
                writer.add_site(
                    SiteSpec(name=f"s{i}", dtype="uint8", shape=(), row_space="own", statistics=())
                )
            for _ in range(2):
                for i in range(n_sites):
                    writer.write(f"s{i}", np.full(2, i % 256, np.uint8))
                writer.commit()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with Reader(path, verify="always") as reader:
        assert len(reader.names) == n_sites
        assert reader["s399"].tensor().tolist() == [399 % 256] * 4


# What readers would refuse is not published.


def test_a_site_too_many_is_refused_when_it_is_declared(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "MAX_SITES", 3)
    sites = [
        SiteSpec(name=f"s{i}", dtype="uint8", shape=(), row_space="own", statistics=()) for i in range(4)
    ]
    with DatasetWriter(path) as writer:
        writer.add_site(sites[0])
        writer.add_site(sites[1])
    with DatasetWriter(path, mode="append") as writer:
        writer.add_site(sites[2])
        with pytest.raises(ArgumentError, match="'s3': a dataset holds at most 3 sites"):
            writer.add_site(sites[3])
        writer.add_site(sites[0])
        writer.write("s0", np.ones(2, np.uint8))
    with Reader(path) as reader:
        assert {name: len(reader[name]) for name in reader.names} == {"s0": 2, "s1": 0, "s2": 0}


@pytest.mark.parametrize(
    ("limit", "n"), [("MAX_MANIFEST_BYTES", 9_000), ("MAX_SHARDS", 12), ("MAX_SITES", 3)], ids=str
)
def test_a_commit_that_no_reader_would_take_is_refused_and_the_last_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, n: int
) -> None:
    writer = DatasetWriter(path, batch_bytes=1, shard_bytes=1, commit_interval_s=1e9)
    for site in (OWN, FIXED, RAGGED):
        writer.add_site(site)
    if limit == "MAX_SITES":
        writer.add_site(SiteSpec(name="one more", dtype="uint8", shape=(), statistics=()))
    n_rows = 0
    monkeypatch.setattr(spec, limit, n)

    def write_until_refused() -> None:
        nonlocal n_rows
        for _ in range(100):
            writer.write("o", np.full(1024, 7, np.uint8))
            writer.commit()
            n_rows += 1024

    with pytest.raises(WriteError, match=r"last commit stays readable: .*manifest\.json: expected at most"):
        write_until_refused()
    with pytest.raises(WriteError):
        writer.commit()
    with pytest.raises(WriteError):
        writer.close()
    with Reader(path, verify="always") as reader:
        assert sum(len(reader[name]) for name in reader.names) == n_rows
    monkeypatch.undo()
    with DatasetWriter(path, mode="append") as writer:
        writer.add_site(OWN)
        writer.write("o", np.full(3, 7, np.uint8))
    with Reader(path, verify="always") as reader:
        assert len(reader["o"]) == n_rows + 3


def test_sessions_that_outgrow_the_manifest_are_refused_and_give_the_rank_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, "MAX_MANIFEST_BYTES", 8_000)
    n_rows = 0

    def add_sessions() -> None:
        nonlocal n_rows
        for session in range(100):
            mode: Any = "append" if session else "create"
            with DatasetWriter(path, mode=mode, provenance={"much": "x" * 900}) as writer:
                writer.add_site(OWN)
                writer.write("o", np.zeros(2, np.uint8))
            n_rows += 2

    with pytest.raises(WriteError, match="expected at most 8000 bytes"):
        add_sessions()
    assert n_rows > 6
    with Reader(path, verify="always") as reader:
        assert len(reader["o"]) == n_rows
    monkeypatch.undo()
    DatasetWriter(path, mode="append").close()


# Provenance, closing.


@pytest.mark.parametrize("fact", [float("nan"), object(), {1, 2}, b"bytes", 10**5000], ids=type)
def test_provenance_that_is_no_json_is_refused_before_anything_is_touched(path: Path, fact: object) -> None:
    with pytest.raises(ArgumentError, match="provenance"):
        DatasetWriter(path, provenance={"fact": fact})
    assert not path.exists()
    with DatasetWriter(path) as writer:
        with pytest.raises(ArgumentError, match="provenance"):
            writer.close(provenance={"fact": fact})
        Script().declare(writer)
        Script().write(writer, 0)
    with Reader(path) as reader:
        assert contents_of(reader) == Script().contents(1)


def test_provenance_is_kept_by_session(path: Path) -> None:
    facts: Any = {"model": "gpt2", 1: "a", "1": "b", "deep": {"list": (1, None)}}
    writer = DatasetWriter(path, provenance=facts)
    facts["model"] = "changed later"
    writer.close(provenance={"n_dropped": 0, "counters": "mine"})
    with DatasetWriter(path, mode="append", provenance={"model": "llama"}):
        pass
    first, second = Reader(path).manifests[0].sessions
    assert (first["model"], second["model"], first["n_dropped"]) == ("gpt2", "llama", 0)
    assert first["deep"] == {"list": [1, None]}
    assert first["counters"] == {"row": 0, "step": 0, "sequence": 0}
    json.dumps(first)


def test_a_closed_writer_says_so(path: Path) -> None:
    writer = DatasetWriter(path)
    writer.close()
    writer.close()
    writer.abort()
    for call in (writer.commit, writer.wait, writer.end_step, lambda: writer.add_site(OWN)):
        with pytest.raises(WriterClosedError, match="closed"):
            call()
    assert Reader(path).report.is_clean
    other = DatasetWriter(path.with_name("b.strap"))
    other.abort()
    other.close()
    with pytest.raises(WriterClosedError, match="aborted"):
        other.commit()


@pytest.mark.parametrize(
    "options",
    [
        {"rank": -1},
        {"rank": spec.MAX_RANK + 1},
        {"mode": "w"},
        {"batch_bytes": 0},
        {"shard_bytes": 0},
        {"commit_interval_s": -1},
    ],
)
def test_wrong_options_touch_nothing(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        DatasetWriter(path, **options)
    with pytest.raises(ArgumentError, match=r"\.strap"):
        DatasetWriter(path.with_suffix(".zarr"))
    assert os.listdir(path.parent) == []


def test_missing_directories_above_are_made_and_made_durable(tmp_path: Path) -> None:
    class Recording(Disk):
        synced: list[Path] = []  # noqa: RUF012

        def sync_directory(self, path: Path) -> None:
            self.synced.append(path)
            super().sync_directory(path)

    DatasetWriter(tmp_path / "x" / "y" / "a.strap", disk=Recording()).close()
    assert {tmp_path, tmp_path / "x", tmp_path / "x" / "y", tmp_path / "x" / "y" / "a.strap"} <= set(
        Recording.synced
    )


def test_ragged_rows_that_exceed_a_batch_and_empty_ones(path: Path) -> None:
    site = SiteSpec(name="r", dtype="uint8", shape=(-1,), row_space="own", statistics=(), codec="lz4")
    sizes = np.array([[0], [1], [5000], [0], [0], [3], [999], [1000], [1001], [0]])
    values = np.arange(sizes.sum(), dtype=np.int64).astype(np.uint8)
    with DatasetWriter(path, batch_bytes=1000) as writer:
        writer.add_site(site)
        writer.write("r", values, shapes=sizes)
        writer.commit()
        writer.write("r", values[:0], shapes=np.zeros((4, 1), int))
    with Reader(path, verify="always") as reader:
        table = reader["r"].to_arrow()
        assert [len(row) for row in table["activation"].to_pylist()] == [
            *sizes.flatten().tolist(),
            0,
            0,
            0,
            0,
        ]
        assert np.concatenate([c.flatten() for c in table["activation"].chunks]).tobytes() == values.tobytes()
        assert table["shape"].to_pylist() == [*sizes.tolist(), [0], [0], [0], [0]]
        assert reader["r"].n_batches > 3


def test_ragged_batches_stay_bounded_in_values_and_in_rows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strapfmt.site_writer._MAX_RAGGED_ROWS", 50)
    site = SiteSpec(name="r", dtype="uint8", shape=(-1,), row_space="own", statistics=())
    rng = np.random.default_rng(3)
    sizes = np.where(rng.random(900) < 0.5, 0, rng.integers(0, 400, 900))
    sizes[::100], sizes[300:500] = 3000, 0
    with DatasetWriter(path, batch_bytes=1000) as writer:
        writer.add_site(site)
        for part in np.split(sizes, [1, 2, 70, 400, 401]):
            writer.write("r", np.ones(part.sum(), np.uint8), shapes=part[:, None])
    with Reader(path, verify="always") as reader:
        batches = list(reader["r"].scan())
        assert [n for b in batches for n in b["shape"].flatten().to_pylist()] == sizes.tolist()
        for batch in batches:
            assert len(batch) <= 50
            assert len(batch) == 1 or batch["shape"].flatten().to_numpy().sum() <= 1000
        assert len(batches) < 250


def test_a_shard_is_sealed_before_its_index_grows_too_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, "MAX_INDEX_BYTES", 40_000)
    site = SiteSpec(name="a", dtype="int8", shape=(), statistics=())
    rows = np.arange(0, 8192, 2)
    with DatasetWriter(path, batch_bytes=2000) as writer:
        writer.add_site(site)
        writer.write("a", np.zeros(4096, np.int8), rows=rows)
    with Reader(path) as reader:
        assert len(reader.manifests[0].sites[0].shards) > 2
        np.testing.assert_array_equal(reader["a"].rows, rows)
