"""`verify` names every damaged file, says what is unfinished, and finds nothing where nothing is wrong."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forge import Forger
from small_datasets import Script, make_dataset

from strapfmt.errors import DatasetNotFoundError
from strapfmt.reader import Reader
from strapfmt.verify import verify
from strapfmt.writer import DatasetWriter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.strap"


def data_files(path: Path) -> list[Path]:
    """Return the manifest and every file that it names."""
    root, manifest = path / "rank-00000", Forger(path).manifest
    entries = [*manifest["sites"], *manifest["tables"]]
    parts = [part["file"] for entry in entries for shard in entry["shards"] for part in shard["parts"]]
    return [root / "manifest.json", *(root / part for part in parts)]


def test_a_sound_dataset_has_no_problems_and_no_notes(path: Path) -> None:
    make_dataset(path)
    report = verify(path)
    assert (report.problems, report.notes) == ((), ())
    files = [file for file in data_files(path) if file.name != "manifest.json"]
    assert report.n_bytes == sum(file.stat().st_size for file in files)
    model = Script().model(6)
    assert report.n_rows == sum(len(model.rows(name)) for name in model.sites)
    assert "a.strap" in str(report)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) * 2 // 3] ^= 16
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lose(file: Path) -> None:
    file.unlink()


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"x")


@pytest.mark.parametrize("unclean", [False, True])
@pytest.mark.parametrize("damage", [flip, cut, lose, lengthen])
def test_the_damaged_file_is_named(path: Path, damage: Callable[[Path], None], unclean: bool) -> None:
    make_dataset(path, unclean=unclean)
    for file in data_files(path):
        if file.name == "manifest.json" and damage is lose:
            continue
        if damage in (flip, lengthen) and file.name.endswith(".open"):
            continue  # its end is behind the commit, and nobody's
        whole = file.read_bytes()
        damage(file)
        problems = verify(path).problems
        assert problems, file
        # An open file that is gone may have been sealed: it is looked for under its final name.
        name = file.name.removesuffix(".open")
        assert any(name in problem and file.parent.name in problem for problem in problems), (file, problems)
        file.write_bytes(whole)
        assert verify(path).problems == ()


@pytest.mark.parametrize("damage", [lose, cut])
def test_only_what_was_checked_is_counted(path: Path, damage: Callable[[Path], None]) -> None:
    make_dataset(path)
    whole = verify(path)
    file = path / "rank-00000" / "sites" / "logits" / "000000.arrow"
    n_bytes = sum(part.stat().st_size for part in file.parent.glob("000000.*"))
    with Reader(path) as reader:
        lost = next(shard.shard for shard in reader.shards() if shard.place == str(file))
    damage(file)
    report = verify(path)
    assert (whole.n_rows - report.n_rows, whole.n_bytes - report.n_bytes) == (lost.n_rows, n_bytes)


def test_rows_of_a_damaged_record_batch_are_not_counted(path: Path) -> None:
    make_dataset(path)
    whole = verify(path)
    with Reader(path) as reader:
        site = reader["logits"]
        body = site[0].contiguous().view(torch.uint8).numpy().tobytes()
        n_rows = int(site.batch_ordinals[1])
    file = path / "rank-00000" / "sites" / "logits" / "000000.arrow"
    data = bytearray(file.read_bytes())
    data[data.index(body)] ^= 1
    file.write_bytes(data)
    report = verify(path)
    assert len(report.problems) == 1
    assert "strapfmt verify" not in str(report), "it advises what is being done"
    assert (whole.n_bytes - report.n_bytes, whole.n_rows - report.n_rows) == (0, n_rows)


def test_a_report_has_absolute_paths_and_shows_those_from_here(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(path, unclean=True)
    (path / "rank-00000" / "stray.bin").touch()
    lose(next(path.rglob("sites/logits/*.arrow.open")))
    monkeypatch.chdir(path.parent)
    report = verify(path.name)
    assert report.to_dict()["path"] == str(path)
    for said in (*report.problems, next(note for note in report.notes if "stray" in note)):
        assert said.startswith(f"{path}/")
    assert str(path) not in str(report)
    assert "a.strap/rank-00000/stray.bin" in str(report)


def test_all_damage_is_listed_not_only_the_first(path: Path) -> None:
    make_dataset(path)
    folders = {file.parent for file in path.rglob("*.arrow")}
    for folder in folders:
        flip(folder / "000000.arrow")
    problems = verify(path).problems
    assert all(any(folder.name in problem for problem in problems) for folder in folders)


def test_what_is_unfinished_is_a_note(path: Path) -> None:
    make_dataset(path, unclean=True)
    (path / "rank-00005").mkdir()
    (path / "rank-00000" / "sites" / "logits" / "stray.bin").touch()
    report = verify(path)
    assert report.problems == ()
    text = "\n".join(report.notes)
    for part in ("not closed", "rank 5", "stray.bin"):
        assert part in text


def test_a_dataset_that_was_not_closed_is_valid_and_the_first_line_says_what_it_is(path: Path) -> None:
    make_dataset(path)
    assert (verify(path).is_clean, "a.strap: valid; " in str(verify(path))) == (True, True)
    unclean, begun = path.with_name("unclean.strap"), path.with_name("begun.strap")
    make_dataset(unclean, unclean=True)
    assert "unclean.strap: valid, but not closed; " in str(verify(unclean))
    writer = DatasetWriter(begun)
    for _ in range(2):  # while it is at work, and after it has ended without a commit
        report = verify(begun)
        assert (report.valid, report.is_clean, report.problems) == (True, False, ())
        assert "begun.strap: valid, but nothing is committed; 0 rows, 0 B checked" in str(report)
        assert "not closed (a writer is at work, or it crashed); nothing is committed" in report.notes[0]
        assert report.to_dict()["is_clean"] is False
        writer.abort()
    DatasetWriter(begun, mode="append").close()
    assert "begun.strap: valid; 0 rows, 0 B checked" in str(verify(begun))


def test_rows_that_contradict_the_index_are_found(path: Path) -> None:
    make_dataset(path, shard_bytes=1 << 20)

    def swap(header: bytearray, body: bytearray) -> None:
        rows = np.frombuffer(bytes(body), np.int64)
        at = next(i for i in range(len(rows) - 3) if rows[i : i + 4].tolist() == [0, 1, 2, 3])
        body[8 * at : 8 * at + 16] = np.array([1, 0], np.int64).tobytes()

    Forger(path).edit_message(0, swap)
    problems = verify(path).problems
    assert any("the column `row` is not what the index says" in problem for problem in problems)
    assert any("strictly increasing" in problem for problem in problems)


def test_progress_ends_at_the_whole(path: Path) -> None:
    make_dataset(path)
    seen: list[tuple[int, int]] = []
    report = verify(path, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (report.n_bytes, report.n_bytes)


def test_nothing_there_is_not_found(path: Path) -> None:
    with pytest.raises(DatasetNotFoundError):
        verify(path)
