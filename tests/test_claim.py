"""A writer gets its rank, or an error at once that says whose it is and what to do."""

from pathlib import Path

import numpy as np
import pytest

import strapfmt
from strapfmt.claim import check_writable
from strapfmt.errors import ArgumentError, DatasetExistsError, UnsupportedError, WriterConflictError
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter


def test_a_rank_being_written_is_a_conflict_and_not_advice_to_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    with DatasetWriter(path):
        for mode in ("create", "overwrite", "append"):
            with pytest.raises(WriterConflictError, match="is writing here"):
                DatasetWriter(path, mode=mode)
    with pytest.raises(DatasetExistsError, match=r"overwrite=True.*mode='append'"):
        DatasetWriter(path)


def test_what_is_no_part_of_a_dataset_is_never_deleted(tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    DatasetWriter(path).close()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(DatasetExistsError, match=r"notes\.txt"):
        DatasetWriter(path, mode="overwrite")
    DatasetWriter(path, mode="append").close()
    assert (path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("mode", ["create", "overwrite", "append"])
def test_a_directory_of_other_things_is_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "x.strap"
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises((DatasetExistsError, strapfmt.DatasetNotFoundError)):
        check_writable(path, mode=mode)
    assert [entry.name for entry in path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("mode", ["create", "overwrite"])
@pytest.mark.parametrize("below", ["x.strap", "more/x.strap"])
def test_a_place_below_a_file_is_refused(tmp_path: Path, mode: str, below: str) -> None:
    file = tmp_path / "file.txt"
    file.write_text("mine")
    with pytest.raises(
        ArgumentError, match=r"path: expected a place in a directory, but .*file\.txt is a file"
    ):
        DatasetWriter(file / below, mode=mode)  # type: ignore[arg-type]
    assert file.read_text() == "mine"


def test_an_empty_directory_becomes_a_dataset(tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    path.mkdir()
    DatasetWriter(path).close()
    assert strapfmt.open(path).ranks == [0]


def test_create_takes_its_rank_from_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    with strapfmt.create(tmp_path / "x.strap") as recorder:
        recorder.write("a.site", np.ones((2, 4), np.float32))
    assert strapfmt.open(tmp_path / "x.strap").ranks == [3]
    monkeypatch.setenv("RANK", "three")
    with pytest.raises(ArgumentError, match="environment variable RANK"):
        strapfmt.create(tmp_path / "y.strap")


def test_ranks_that_declare_a_site_differently_say_how(tmp_path: Path) -> None:
    for rank, width in enumerate((4, 8)):
        with DatasetWriter(tmp_path / "x.strap", rank=rank) as writer:
            writer.add_site(SiteSpec(name="a.site", dtype="float32", shape=(width,), statistics=()))
    site = strapfmt.open(tmp_path / "x.strap")["a.site"]
    with pytest.raises(UnsupportedError, match=r"its shape is \(4,\) in rank 0 and \(8,\) in rank 1"):
        site.tensor()


def test_a_writer_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    writer = DatasetWriter("x.strap")
    assert writer.path == tmp_path / "x.strap"
    writer.add_site(SiteSpec(name="s", dtype="float32", shape=(2,), statistics=()))
    for directory in ("elsewhere", ".."):
        monkeypatch.chdir(directory)
        first = writer.reserve("row", 3)
        writer.write("s", np.ones((3, 2), np.float32), rows=np.arange(first, first + 3))
        writer.wait()
        writer.commit()
    writer.close()
    assert list((tmp_path / "elsewhere").iterdir()) == []
    with strapfmt.open(tmp_path / "x.strap") as dataset:
        assert dataset["s"].n_rows == 6


@pytest.mark.parametrize("entered", [False, True])
def test_a_capture_stays_where_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, entered: bool
) -> None:
    import torch

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    session = strapfmt.capture(model, "x.strap", sites="0", quiet=True)
    if not entered:
        monkeypatch.chdir("elsewhere")
    with session:
        monkeypatch.chdir(tmp_path / "elsewhere")
        model(torch.ones(3, 2))
    assert session.path == tmp_path / "x.strap"
    assert list((tmp_path / "elsewhere").iterdir()) == []
    with strapfmt.open(session.path) as dataset:
        assert dataset["0"].n_rows > 0


def test_a_recording_stays_where_it_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with strapfmt.create("x.strap") as recording:
        monkeypatch.chdir("elsewhere")
        recording.write("s", torch.ones(3, 2))
    assert list((tmp_path / "elsewhere").iterdir()) == []
    with strapfmt.open(tmp_path / "x.strap") as dataset:
        assert dataset["s"].n_rows == 3


def test_what_is_no_path_is_refused() -> None:
    for wrong in (None, 3, b"x.strap"):
        with pytest.raises(ArgumentError, match="path: expected"):
            DatasetWriter(wrong)  # type: ignore[arg-type]
