"""Series of shards: their directories, and the numbers they take."""

from pathlib import Path

import numpy as np
import pytest

from strapfmt import spec
from strapfmt.errors import ArgumentError
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter

OWN = SiteSpec(name="o", dtype="uint8", shape=(), row_space="own", statistics=())


def append(path: Path) -> None:
    mode = "append" if path.exists() else "create"
    with DatasetWriter(path, mode=mode) as writer:
        writer.add_site(OWN)
        writer.write("o", np.zeros(3, np.uint8))


@pytest.mark.parametrize("link", ["sites/o", "sites"])
def test_a_directory_that_is_a_link_is_refused(tmp_path: Path, link: str) -> None:
    path = tmp_path / "a.strap"
    append(path)
    place, elsewhere = path / "rank-00000" / link, tmp_path / "elsewhere"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    with pytest.raises(ArgumentError, match=r"found a symbolic link, which readers do not follow"):
        append(path)
    assert sorted(elsewhere.rglob("*")) == before
    place.unlink()
    elsewhere.rename(place)
    append(path)
    with Reader(path, verify="always") as reader:
        assert len(reader["o"]) == 6


def test_a_file_in_place_of_a_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.strap"
    DatasetWriter(path).close()
    (path / "rank-00000" / "tables" / "steps").write_bytes(b"")
    with DatasetWriter(path, mode="append") as writer, pytest.raises(ArgumentError, match="found a file"):
        writer.write_table("steps", {})


@pytest.mark.parametrize("stray", ["٠٠٠٠٠٧.txt", "²²²²²²", "12", "notes.txt"])
def test_strange_names_beside_shards_are_no_numbers(tmp_path: Path, stray: str) -> None:
    path = tmp_path / "a.strap"
    append(path)
    (path / "rank-00000" / "sites" / "o" / stray).write_bytes(b"")
    append(path)
    assert (path / "rank-00000" / "sites" / "o" / "000001.arrow").exists()


def test_shards_are_numbered_above_files_of_anybody(tmp_path: Path) -> None:
    path = tmp_path / "a.strap"
    append(path)
    directory = path / "rank-00000" / "sites" / "o"
    (directory / "000041.txt").write_bytes(b"")
    append(path)
    assert (directory / "000042.arrow").exists()
    (directory / f"{spec.MAX_SHARDS - 1}.txt").write_bytes(b"")
    with pytest.raises(ArgumentError, match="a file there has the last one"):
        append(path)
