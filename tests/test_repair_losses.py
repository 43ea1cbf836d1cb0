"""Repair says what it lost, keeps every number, takes nothing that belongs elsewhere and leaves nothing half done."""

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from small_datasets import SITES, Contents, Script, contents_of, make_dataset, random_chunk, write_chunk

from strapfmt import spec
from strapfmt.errors import ArgumentError, DatasetExistsError, StrapfmtError, WriteError
from strapfmt.index import ShardIndex
from strapfmt.manifest import file_slug
from strapfmt.reader import Reader
from strapfmt.repair import repair
from strapfmt.report import RepairReport, SiteRepair
from strapfmt.schema import SiteSpec
from strapfmt.site_writer import SiteWriter
from strapfmt.verify import verify
from strapfmt.writer import DatasetWriter

TOKENS_SITE, _, OWN_SITE = SITES
TABLES = ("tokens", "steps")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.strap"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.strap"


def directory_of(path: Path, name: str, *, rank: int = 0) -> Path:
    """Return where a site's or a table's files lie."""
    place = f"tables/{name}" if name in TABLES else f"sites/{file_slug(name)}"
    return path / spec.RANK_DIRECTORY.format(rank=rank) / place


def data_files(path: Path, name: str) -> list[Path]:
    return sorted(directory_of(path, name).glob("*.arrow"))


def entry_of(report: RepairReport, name: str, *, rank: int = 0) -> SiteRepair:
    (entry,) = (e for e in (*report.sites, *report.tables) if (e.name, e.rank) == (name, rank))
    return entry


def contents(path: Path) -> Contents:
    """Return what a dataset holds, every byte of it checked."""
    assert verify(path).problems == ()
    with Reader(path, verify="always") as reader:
        assert reader.report.is_clean
        return contents_of(reader)


def remove_data(directory: Path) -> None:
    for file in directory.glob("*.arrow"):
        file.unlink()


def remove_all(directory: Path) -> None:
    shutil.rmtree(directory)


def cut_to_nothing(directory: Path) -> None:
    for file in directory.glob("*.arrow"):
        os.truncate(file, 0)


def replace_by_link(directory: Path) -> None:
    elsewhere = directory.parents[3] / "elsewhere"
    directory.rename(elsewhere)
    directory.symlink_to(elsewhere)


# What is gone is said.


@pytest.mark.parametrize("damage", [remove_data, remove_all, cut_to_nothing, replace_by_link])
@pytest.mark.parametrize("name", [TOKENS_SITE.name, OWN_SITE.name, "tokens", "steps"])
def test_a_site_or_table_without_its_data_is_reported_as_lost(
    path: Path, out: Path, name: str, damage: Callable[[Path], None]
) -> None:
    script = make_dataset(path)
    n_files = len(data_files(path, name))
    damage(directory_of(path, name))
    report = repair(path, out)
    entry = entry_of(report, name)
    assert entry.n_committed == sum(script.n_tokens(k) for k in range(6)) or (name, entry.n_committed) == (
        "steps",
        6,
    )
    assert entry.n_rescued == 0
    assert len(entry.problems) == n_files
    assert not report.is_complete
    assert all(problem in str(report) for problem in entry.problems)
    found, expected = contents(out), script.contents(6)
    for kind, columns in expected.items():
        if not kind.endswith(name):
            assert found[kind] == columns


def test_every_site_and_table_of_the_manifest_is_listed_even_if_it_is_empty(path: Path, out: Path) -> None:
    with DatasetWriter(path) as writer:
        writer.add_site(TOKENS_SITE)
    shutil.rmtree(directory_of(path, TOKENS_SITE.name))
    report = repair(path, out)
    assert report.is_complete
    assert [(entry.name, entry.n_committed) for entry in report.sites] == [(TOKENS_SITE.name, 0)]
    with Reader(out) as reader:
        assert reader.names == [TOKENS_SITE.name]


def test_one_missing_shard_of_several_is_a_problem(path: Path, out: Path) -> None:
    make_dataset(path, n_steps=12, shard_bytes=200)
    files = data_files(path, TOKENS_SITE.name)
    assert len(files) > 2
    files[1].unlink()
    report = repair(path, out)
    entry = entry_of(report, TOKENS_SITE.name)
    assert 0 < entry.n_rescued < entry.n_committed
    assert len(entry.problems) == 1
    assert files[1].name in entry.problems[0]
    assert not report.is_complete


def test_a_missing_tail_is_a_problem(path: Path, out: Path) -> None:
    make_dataset(path, unclean=True, batch_bytes=1 << 20)
    # Tails of the commits before may still lie beside it, for readers that have just read their manifest.
    tail = max(
        directory_of(path, TOKENS_SITE.name).glob(f"*{spec.TAIL_SUFFIX}"),
        key=lambda file: int(file.name.split(".")[1].removeprefix("c")),
    )
    tail.unlink()
    entry = entry_of(repair(path, out), TOKENS_SITE.name)
    assert len(entry.problems) == 1
    assert tail.name in entry.problems[0]


def test_an_unclosed_dataset_is_rescued_whole(path: Path, out: Path) -> None:
    script = make_dataset(path, unclean=True)
    report = repair(path, out)
    assert report.is_complete
    assert report.notes == ()
    assert contents(out) == script.contents(6)


def test_without_a_manifest_the_files_speak_for_themselves(path: Path, out: Path) -> None:
    script = make_dataset(path)
    (path / "rank-00000" / spec.MANIFEST_NAME).unlink()
    report = repair(path, out)
    assert contents(out) == script.contents(6)
    (problem,) = report.problems
    assert "manifest.json: the file is gone" in problem
    assert not report.is_complete


def test_a_rank_in_which_nothing_was_ever_committed_is_no_loss(path: Path, out: Path) -> None:
    make_dataset(path)
    (path / "rank-00003" / "sites").mkdir(parents=True)
    report = repair(path, out)
    assert report.is_complete
    assert [note.rpartition(": ")[2] for note in report.notes] == ["nothing was ever committed here"]


def damage_manifest(path: Path) -> None:
    file = path / "rank-00000" / spec.MANIFEST_NAME
    file.write_bytes(file.read_bytes()[:-7])


def empty(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove_data, "data file is gone"),
        (empty, "no data file is in it"),
        (cut_to_nothing, "cannot be read"),
        (replace_by_link, "symbolic link"),
    ],
)
@pytest.mark.parametrize("name", [TOKENS_SITE.name, OWN_SITE.name, "tokens"])
def test_without_a_manifest_what_is_left_of_a_site_or_table_says_that_it_was_lost(
    path: Path, out: Path, name: str, damage: Callable[[Path], None], said: str
) -> None:
    script = make_dataset(path)
    damage_manifest(path)
    place = directory_of(path, name)
    damage(place)
    report = repair(path, out)
    (account,) = (e for e in (*report.sites, *report.tables) if e.name in (name, place.name))
    assert account.n_rescued == 0
    assert account.problems
    assert all(said in problem and str(place) in problem for problem in account.problems)
    found, expected = contents(out), script.contents(6)
    for kind, columns in expected.items():
        if not kind.endswith(name):
            assert found[kind] == columns


@pytest.mark.parametrize("kind", ["sites", "tables"])
def test_a_folder_of_sites_that_is_a_link_is_a_problem(path: Path, out: Path, kind: str) -> None:
    make_dataset(path)
    damage_manifest(path)
    place = path / "rank-00000" / kind
    place.rename(path.parent / "elsewhere")
    place.symlink_to(path.parent / "elsewhere")
    assert any("symbolic link" in problem for problem in repair(path, out).problems)


def test_without_a_manifest_a_missing_tail_is_a_problem(path: Path, out: Path) -> None:
    make_dataset(path, unclean=True, batch_bytes=1 << 20)
    damage_manifest(path)
    for tail in directory_of(path, TOKENS_SITE.name).glob(f"*{spec.TAIL_SUFFIX}"):
        tail.unlink()
    report = repair(path, out)
    problems = [problem for entry in report.sites for problem in entry.problems]
    assert len(problems) == 1
    assert f"{spec.TAIL_SUFFIX}: the file is gone" in problems[0]


# Numbers stay.


@pytest.mark.parametrize("site", [TOKENS_SITE, OWN_SITE])
def test_rows_keep_their_numbers_behind_a_lost_record_batch(path: Path, out: Path, site: SiteSpec) -> None:
    script = make_dataset(path, n_steps=12)
    model = script.model(12)
    file = data_files(path, site.name)[0]
    (place,) = file.parent.glob(f"{file.name[:6]}*{spec.INDEX_SUFFIX}")
    index = ShardIndex.decode(place.read_bytes(), str(place))
    lost = range(int(index.batches["n_rows"][0]), int(index.batches["n_rows"][:2].sum()))
    with file.open("r+b") as stream:
        at = int(index.batches["offset"][1]) + int(index.batches["header_bytes"][1])
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 1]))
    report = repair(path, out)
    assert len(entry_of(report, site.name).problems) == 1
    assert verify(out).problems == ()
    kept = [row for row in model.rows(site.name).tolist() if row not in lost]
    with Reader(out) as reader:
        assert reader[site.name].rows.tolist() == kept
        values = (
            reader[site.name].tensor(copy=True).flatten(1).contiguous().numpy(force=True)
            if site is OWN_SITE
            else None
        )
    if values is not None:
        assert values.tobytes() == model.values(site.name)[kept].tobytes()


def test_own_rows_may_be_given_numbers_and_those_after_them_go_on_behind(path: Path) -> None:
    rng = np.random.default_rng(0)
    with DatasetWriter(path, rank=2) as writer:
        writer.add_site(OWN_SITE)
        first = 2 << spec.RANK_SHIFT
        write_chunk(writer, OWN_SITE, random_chunk(OWN_SITE, 3, rng), first + np.array([1, 4, 9]))
        write_chunk(writer, OWN_SITE, random_chunk(OWN_SITE, 2, rng), None)
        for wrong in ([12, 12], [10, 12], [13, 1 << 40], [-1, 13]):
            with pytest.raises(ArgumentError, match="rows: expected"):
                write_chunk(writer, OWN_SITE, random_chunk(OWN_SITE, 2, rng), first + np.array(wrong))
    with Reader(path) as reader:
        assert (reader[OWN_SITE.name].rows - first).tolist() == [1, 4, 9, 10, 11]
    assert verify(path).problems == ()


# Nothing that belongs elsewhere.


def test_a_file_of_another_site_is_refused(path: Path, out: Path) -> None:
    script = make_dataset(path)
    place = directory_of(path, TOKENS_SITE.name)
    stray = place / "000777.arrow"
    shutil.copy(data_files(path, OWN_SITE.name)[0], stray)
    report = repair(path, out)
    entry = entry_of(report, TOKENS_SITE.name)
    assert len(entry.problems) == 1
    assert str(stray) in entry.problems[0]
    assert OWN_SITE.name in entry.problems[0]
    assert not report.is_complete
    assert contents(out) == script.contents(6)


@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_first_file_of_another_site_does_not_rename_a_directory(
    path: Path, out: Path, has_manifest: bool
) -> None:
    script = make_dataset(path, n_steps=12, shard_bytes=200)
    files = data_files(path, TOKENS_SITE.name)
    shutil.copy(data_files(path, OWN_SITE.name)[0], files[0])
    if not has_manifest:
        (path / "rank-00000" / spec.MANIFEST_NAME).unlink()
    report = repair(path, out)
    assert str(files[0]) in "".join(entry_of(report, TOKENS_SITE.name).problems)
    assert entry_of(report, TOKENS_SITE.name).n_rescued > 0
    assert not report.is_complete
    found = contents(out)
    assert found[f"site {OWN_SITE.name}"] == script.contents(12)[f"site {OWN_SITE.name}"]


def test_a_directory_that_is_no_site_s_is_refused(path: Path, out: Path) -> None:
    script = make_dataset(path)
    stray = directory_of(path, "elsewhere")
    stray.mkdir()
    shutil.copy(data_files(path, OWN_SITE.name)[0], stray)
    report = repair(path, out)
    assert entry_of(report, "elsewhere").n_rescued == 0
    assert len(entry_of(report, "elsewhere").problems) == 1
    assert not report.is_complete
    assert contents(out) == script.contents(6)


@pytest.mark.parametrize("name", [TOKENS_SITE.name, OWN_SITE.name, "tokens"])
def test_a_file_of_another_rank_is_refused(path: Path, out: Path, name: str) -> None:
    for rank in (0, 1):
        with DatasetWriter(path, rank=rank, batch_bytes=128) as writer:
            script = Script(rank=rank)
            script.declare(writer)
            for step in range(3):
                script.write(writer, step)
    whole = contents(path)
    stray = directory_of(path, name, rank=1) / "000777.arrow"
    shutil.copy(directory_of(path, name) / "000000.arrow", stray)
    report = repair(path, out)
    (problem,) = entry_of(report, name, rank=1).problems
    assert problem == f"{stray}: it belongs to rank 0, not to rank 1"
    assert contents(out) == whole


# After a crash.


def write_part_of_a_step(writer: DatasetWriter, script: Script, step: int, n_batches: int) -> None:
    """Write a step's tokens and full batches of activations, which flush the tokens, but not its row of `steps`."""
    n = n_batches * 8
    first, number = writer.reserve("row", n), writer.reserve("step", 1)
    template = script.step(step, first)[0]["tokens"]
    tokens = {name: values[:1] * n for name, values in template.items()}
    tokens |= {"row": list(range(first, first + n)), "batch_index": [0, 1] * (n // 2), "step": [number] * n}
    writer.write_table("tokens", tokens)
    write_chunk(
        writer,
        TOKENS_SITE,
        random_chunk(TOKENS_SITE, n - 8, np.random.default_rng(0)),
        np.arange(first, first + n - 8),
    )


def crash_in_a_step(path: Path) -> tuple[Script, int]:
    """Leave 5 committed steps and half of a sixth; return the script and the tokens committed."""
    script = Script(sites=(TOKENS_SITE,))
    writer = DatasetWriter(path, batch_bytes=8 * TOKENS_SITE.row_bytes, commit_interval_s=1e9)
    script.declare(writer)
    for step in range(5):
        script.write(writer, step)
    writer.commit()
    write_part_of_a_step(writer, script, 5, n_batches=4)
    writer.abort()
    return script, sum(script.n_tokens(k) for k in range(5))


def test_tokens_of_a_step_that_a_crash_cut_are_counted_and_join_to_an_abandoned_step(
    path: Path, out: Path
) -> None:
    _, n_committed = crash_in_a_step(path)
    report = repair(path, out)
    assert report.is_complete
    (note,) = report.notes
    assert "32 rescued token(s) lie beyond the last complete step" in note
    assert "32 are of steps without a row in `steps` (1 added to it, status 'abandoned')" in note
    assert verify(out).problems == ()
    with Reader(out) as reader:
        n_without = n_committed + 32 - len(reader[TOKENS_SITE.name])
        steps = reader.steps.to_arrow().to_pylist()
        tokens = reader.tokens.to_arrow(["step"])["step"].to_pylist()
    assert n_without >= 8
    assert f"{n_without} come after the last activation of {TOKENS_SITE.name!r}" in note
    assert set(tokens) == {row["step"] for row in steps}
    assert [row["status"] for row in steps] == ["complete"] * 5 + ["abandoned"]
    last = steps[-1]
    assert (last["n_sequences"], last["n_query"], last["n_rows"]) == (2, 16, 32)
    assert (last["first_row"], last["reason"]) == (n_committed, "rescued after a crash")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("n_before", [0, 3])
def test_steps_whose_activations_a_crash_in_a_commit_has_cut_are_abandoned(
    path: Path, out: Path, n_before: int
) -> None:
    """Tables are written before sites: a process that dies in between leaves steps that look complete."""
    pid = os.fork()
    if not pid:
        writer, script = DatasetWriter(path, commit_interval_s=1e9), Script()
        script.declare(writer)
        for step in range(n_before):
            script.write(writer, step)
        writer.commit()
        for step in range(n_before, 5):
            script.write(writer, step)
        SiteWriter.commit = lambda *_: (writer._io.wait(), os._exit(0))  # type: ignore[assignment, return-value]
        writer.commit()
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    report = repair(path, out)
    assert verify(out).problems == ()
    with Reader(out) as reader:
        steps = reader.steps.to_arrow(["step", "status", "reason"]).to_pylist()
        stored = set(reader[TOKENS_SITE.name].rows.tolist()) if TOKENS_SITE.name in reader else set()
        tokens = reader.tokens.to_arrow(["row", "step"]).to_pylist()
    assert len(steps) == 5
    whole = {step["step"] for step in steps if step["status"] == "complete"}
    assert len(whole) == n_before
    assert {token["row"] for token in tokens if token["step"] in whole} <= stored
    assert {step["reason"] for step in steps[n_before:]} == {"rescued after a crash"}
    assert f"({5 - n_before} step(s) have the status 'abandoned' for that)" in report.notes[-1]


def test_a_lost_table_of_steps_is_damage_and_not_a_crash(path: Path, out: Path) -> None:
    crash_in_a_step(path)
    shutil.rmtree(directory_of(path, "steps"))
    report = repair(path, out)
    assert "32 are of steps without a row in `steps`;" in report.notes[0]
    with Reader(out) as reader:
        assert len(reader.steps) == 0


# All or nothing.


@contextmanager
def small_files(limit_bytes: int) -> Iterator[None]:
    """Limit how large a file may grow, as a full disk would; pytest's own output may be a file, so only inside."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("limit_bytes", [0, 500, 3000])
def test_a_full_disk_leaves_nothing_and_raises_one_error_of_ours(
    path: Path, tmp_path: Path, limit_bytes: int
) -> None:
    make_dataset(path, n_steps=12)
    out = tmp_path / "new" / "deep" / "out.strap"
    with (
        pytest.raises(
            WriteError, match=r"nothing is left at .*out\.strap: OSError: .*File too large"
        ) as caught,
        small_files(limit_bytes),
    ):
        repair(path, out)
    assert isinstance(caught.value, StrapfmtError)
    assert caught.value.errno == errno.EFBIG
    assert not (tmp_path / "new").exists()
    assert verify(path).problems == ()


def test_a_place_that_cannot_be_written_is_an_error_of_ours(path: Path, tmp_path: Path) -> None:
    make_dataset(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="is a file"):
        repair(path, tmp_path / "file" / "out.strap")
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("name", ["rank-00002", "notes.txt"])
def test_what_exists_is_neither_mixed_with_nor_removed(path: Path, out: Path, name: str) -> None:
    for rank in (0, 1):
        with DatasetWriter(path, rank=rank) as writer:
            Script(rank=rank).declare(writer)
    (out / name).mkdir(parents=True)
    with pytest.raises(DatasetExistsError, match="exists"):
        repair(path, out)
    assert [entry.name for entry in out.iterdir()] == [name]
