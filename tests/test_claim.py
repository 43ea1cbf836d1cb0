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
