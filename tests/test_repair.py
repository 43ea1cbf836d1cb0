"""`repair` brings back every sound row, never invents one, and never touches what it repairs."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_datasets import Contents, Model, Script, contents_of, make_dataset

from strapfmt.errors import ArgumentError, DatasetExistsError, DatasetNotFoundError, StrapfmtError
from strapfmt.reader import Reader
from strapfmt.repair import repair
from strapfmt.schema import SiteSpec
from strapfmt.verify import verify
from strapfmt.writer import DatasetWriter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.strap"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.strap"


def repaired(path: Path, out: Path) -> Contents:
    repair(path, out)
    assert verify(out).problems == verify(out).notes == ()
    with Reader(out, verify="always") as reader:
        return contents_of(reader)


def rows_by_number(reader: Reader, name: str) -> dict[int, list[Any]]:
    """Return a site's rows by their number, bits for bits."""
    table = reader[name].to_arrow()
    columns = [column for column in table.column_names if column != "row"]
    return {
        row: [np.asarray(table[column][i].as_py()).tobytes() for column in columns]
        for i, row in enumerate(table["row"].to_pylist())
    }


def test_a_sound_dataset_comes_back_as_it_is(path: Path, out: Path) -> None:
    script = make_dataset(path)
    report = repair(path, out)
    assert report.is_complete
    assert not report.notes
    with Reader(out, verify="always") as reader:
        assert contents_of(reader) == script.contents(6)
        session = reader.manifests[0].sessions[-1]
        assert session["repaired_from"] == str(path / "rank-00000")
    assert "a.strap" in str(report)
    assert report.to_dict()["is_complete"] is True


def test_what_lies_complete_behind_the_last_commit_is_rescued(path: Path, out: Path) -> None:
    script = Script()
    writer = DatasetWriter(path, batch_bytes=64, commit_interval_s=1e9)
    script.declare(writer)
    for step in range(8):
        script.write(writer, step)
        if step == 2:
            writer.commit()
    writer.abort()
    found = repaired(path, out)
    with Reader(out) as reader:
        assert script.n_steps_of(reader) > 3
    expected = script.contents(8)
    for name in (f"site {site.name}" for site in script.sites):
        assert all(expected[name][column].startswith(data) for column, data in found[name].items())
        assert len(found[name]["row"]) >= len(script.contents(3)[name]["row"])


@pytest.mark.parametrize("unclean", [False, True])
@pytest.mark.parametrize("how", ["gone", "damaged", "empty"])
def test_without_its_manifest_the_shards_speak_for_themselves(
    path: Path, out: Path, how: str, unclean: bool
) -> None:
    script = make_dataset(path, unclean=unclean)
    manifest = path / "rank-00000" / "manifest.json"
    if how == "gone":
        manifest.unlink()
    else:
        manifest.write_bytes(b"" if how == "empty" else manifest.read_bytes()[:-7])
    report = repair(path, out)
    (problem,) = report.problems
    assert str(manifest) in problem
    assert not report.is_complete, "nobody knows what was committed"
    assert {entry.n_committed for entry in (*report.sites, *report.tables)} == {None}
    assert problem in report.to_dict()["problems"]
    assert problem in str(report)
    with Reader(out, verify="always") as reader:
        found, expected = contents_of(reader), script.contents(6)
        assert {name: columns for name, columns in found.items() if columns != {"rows": b"[]"}} == {
            name: columns for name, columns in expected.items() if columns != {"rows": b"[]"}
        }


def test_numbers_used_again_after_a_crash_mean_what_was_committed(path: Path, out: Path) -> None:
    script, lost = Script(), Script(seed=77)
    options: dict[str, Any] = {"batch_bytes": 64, "commit_interval_s": 1e9}
    writer = DatasetWriter(path, **options)
    script.declare(writer)
    script.write(writer, 0)
    writer.commit()
    for step in range(1, 5):
        lost.write(writer, step)
    writer.abort()
    writer = DatasetWriter(path, mode="append", **options)
    script.declare(writer)
    for step in range(1, 4):
        script.write(writer, step)
    writer.commit()
    writer.abort()
    expected = script.contents(4)
    assert repaired(path, out) == expected
    with Reader(path) as reader:
        whole = {name: rows_by_number(reader, name) for name in reader.names}
    (path / "rank-00000" / "manifest.json").unlink()
    repair(path, out.with_name("out2.strap"))
    with Reader(out.with_name("out2.strap")) as reader:
        for name in whole:
            assert rows_by_number(reader, name).items() <= whole[name].items()


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("row_space", ["own", "tokens"])
def test_what_a_crash_left_never_takes_the_place_of_what_was_committed_after_it(
    path: Path, out: Path, row_space: str, has_manifest: bool
) -> None:
    site = SiteSpec(name="x", dtype="float32", shape=(4,), row_space=row_space, statistics=())

    def put(writer: DatasetWriter, n: int, value: float) -> None:
        rows = None if row_space == "own" else np.arange(n) + writer.reserve("row", n)
        writer.write("x", np.full((n, 4), value, np.float32), rows=rows)
        writer.wait()

    for mode, steps in (("create", [(2, 0, True), (20, 111, False)]), ("append", [(21, 222, True)])):
        writer = DatasetWriter(path, mode=mode, batch_bytes=64)  # type: ignore[arg-type]
        writer.add_site(site)
        for n, value, is_committed in steps:
            put(writer, n, value)
            if is_committed:
                writer.commit()
        writer.abort()
    committed = [0.0] * 2 + [222.0] * 21
    with Reader(path) as reader:
        assert reader["x"].tensor()[:, 0].tolist() == committed
    if not has_manifest:
        (path / "rank-00000" / "manifest.json").unlink()
    repair(path, out)
    with Reader(out, verify="always") as reader:
        assert reader["x"].tensor()[:, 0].tolist() == committed


@pytest.mark.parametrize("directory", ["tables/tokens", "sites/blocks.0.resid_post"])
def test_committed_rows_that_repair_must_leave_out_are_a_problem(
    path: Path, out: Path, directory: str
) -> None:
    make_dataset(path, shard_bytes=200, n_steps=12)
    files = sorted((path / "rank-00000" / directory).glob("*.arrow"))
    files[1].write_bytes(files[0].read_bytes())
    report = repair(path, out)
    (account,) = [
        each for each in (*report.sites, *report.tables) if each.name == directory.partition("/")[2]
    ]
    assert account.n_committed is not None
    assert account.n_rescued < account.n_committed
    assert "have numbers that rows before them have" in account.problems[0]
    assert not report.is_complete


def test_files_and_directories_with_digits_of_other_scripts_are_nobody_s(path: Path, out: Path) -> None:
    script = make_dataset(path)
    for name in ("²²²²²²", "²²²²²².arrow", "٠٠٠٠٠١.arrow"):
        (path / "rank-00000" / "sites" / "logits" / name).touch()
    (path / "rank-²²²²²").mkdir()
    assert repaired(path, out) == script.contents(6)
    with DatasetWriter(path, mode="append") as writer:
        script.declare(writer)


def test_nothing_is_invented_whatever_is_damaged(path: Path, tmp_path: Path) -> None:
    make_dataset(path, shard_bytes=1 << 20, n_steps=8)
    with Reader(path) as reader:
        names = reader.names
        whole = {name: rows_by_number(reader, name) for name in names}
    rng = random.Random(3)
    files = sorted(file for file in path.rglob("*") if file.suffix in (".arrow", ".idx", ".json"))
    n_lost = 0
    for number in range(24):
        file = files[number % len(files)]
        data = file.read_bytes()
        damaged = bytearray(data)
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        out = tmp_path / f"out{number}.strap"
        report = repair(path, out)
        with Reader(out, verify="always") as reader:
            for name in reader.names:
                found = rows_by_number(reader, name)
                assert all(whole[name].get(row) == values for row, values in found.items()), (file, name)
                if file.parent.name != name and f"sites/{name}" not in str(file):
                    n_lost += len(whole[name]) - len(found) if file.suffix == ".json" else 0
        if file.suffix == ".idx":
            assert report.is_complete, file
        file.write_bytes(data)
    assert n_lost == 0


def test_a_damaged_schema_costs_at_most_its_own_file(path: Path, tmp_path: Path) -> None:
    make_dataset(path, shard_bytes=1 << 20)
    file = path / "rank-00000" / "sites" / "logits" / "000000.arrow"
    with Reader(path) as reader:
        whole = {name: rows_by_number(reader, name) for name in reader.names}
    data = file.read_bytes()
    for at in range(8, 600, 5):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        out = tmp_path / f"out{at}.strap"
        report = repair(path, out)
        with Reader(out, verify="always") as reader:
            found = {name: rows_by_number(reader, name) for name in reader.names}
        logits = found.pop("logits", {})
        assert found == {name: rows for name, rows in whole.items() if name != "logits"}
        assert logits.items() <= whole["logits"].items(), at
        assert report.is_complete == (len(logits) == len(whole["logits"])), at


def test_one_damaged_batch_costs_one_batch(path: Path, out: Path) -> None:
    make_dataset(path, shard_bytes=1 << 20, n_steps=8)
    file = path / "rank-00000" / "sites" / "blocks.0.resid_post" / "000000.arrow"
    with Reader(path) as reader:
        site = reader["blocks.0.resid_post"]
        n_rows, ordinals = len(site), site.batch_ordinals
        body = site[int(ordinals[2]) : int(ordinals[3])]
        import torch

        raw = body.contiguous().view(torch.uint8).numpy().tobytes()
    data = bytearray(file.read_bytes())
    data[data.index(raw) + 3] ^= 1
    file.write_bytes(data)
    report = repair(path, out)
    entry = next(entry for entry in report.sites if entry.name == "blocks.0.resid_post")
    assert entry.n_committed == n_rows
    assert entry.n_rescued == n_rows - (ordinals[3] - ordinals[2])
    assert len(entry.problems) == 1
    assert not report.is_complete
    assert "damaged" in str(report)


def test_the_source_is_only_read(path: Path, out: Path) -> None:
    make_dataset(path, unclean=True)
    before = {
        file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()
    }
    repair(path, out)
    after = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.rglob("*") if file.is_file()}
    assert after == before


def test_an_existing_target_is_never_touched(path: Path, out: Path) -> None:
    make_dataset(path)
    script = make_dataset(out, n_steps=2)
    for target in (out, path):
        with pytest.raises(DatasetExistsError):
            repair(path, target)
    with Reader(out) as reader:
        assert contents_of(reader) == script.contents(2)
    with pytest.raises(DatasetNotFoundError):
        repair(path.with_name("none.strap"), out.with_name("new.strap"))
    with pytest.raises(StrapfmtError):
        repair(path, out.with_suffix(".zarr"))


def test_a_target_inside_the_source_is_refused(path: Path, tmp_path: Path) -> None:
    make_dataset(path)
    before = sorted(path.rglob("*"))
    (tmp_path / "link").symlink_to(path)
    for target in (path / "x.strap", path / "rank-00000" / "x.strap", tmp_path / "link" / "x.strap"):
        with pytest.raises(ArgumentError, match="lies inside"):
            repair(path, target)
    assert sorted(path.rglob("*")) == before


def test_progress_ends_at_the_whole(path: Path, out: Path) -> None:
    make_dataset(path, unclean=True)
    seen: list[tuple[int, int]] = []
    repair(path, out, progress=lambda done, total: seen.append((done, total)))
    n_bytes = sum(file.stat().st_size for file in path.rglob("*.arrow*"))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (n_bytes, n_bytes)


def test_ranks_stay_ranks(path: Path, out: Path) -> None:
    whole = Model()
    for rank in (1, 4):
        script = Script(rank=rank)
        with DatasetWriter(path, rank=rank) as writer:
            script.declare(writer)
            script.write(writer, 0)
        model = script.model(1)
        for name, site in model.sites.items():
            whole.add_site(site)
            whole.chunks[name] += model.chunks[name]
        for name, rows in model.tables.items():
            whole.tables[name] += rows
    assert repaired(path, out) == whole.contents()
    assert Reader(out).ranks == [1, 4]


def test_a_site_without_rows_is_kept(path: Path, out: Path) -> None:
    site = SiteSpec(name="quiet", dtype="float8_e5m2", shape=(3, -1), codec="zstd")
    with DatasetWriter(path) as writer:
        writer.add_site(site)
        writer.count("quiet", expected=7, dropped=7)
    repair(path, out)
    with Reader(out) as reader:
        assert reader["quiet"].spec == site
        assert reader.report.n_dropped == 7


def test_one_can_append_to_what_was_repaired(path: Path, out: Path) -> None:
    script = make_dataset(path, unclean=True)
    repair(path, out)
    with DatasetWriter(out, mode="append") as writer:
        script.declare(writer)
        script.write(writer, 6)
    with Reader(out, verify="always") as reader:
        assert contents_of(reader) == script.contents(7)
