"""A writer gets its rank, or an error at once that says whose it is and what to do."""

import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_datasets import Script, contents_of

import strapfmt
from strapfmt import spec
from strapfmt.claim import check_writable
from strapfmt.commit import Disk, Lock
from strapfmt.errors import (
    ArgumentError,
    DatasetExistsError,
    DatasetNotFoundError,
    UnsupportedError,
    WriteError,
    WriterConflictError,
)
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt.verify import verify
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
    with pytest.raises((DatasetExistsError, DatasetNotFoundError)):
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


# Links.


def write_one(path: Path, mode: Any, value: int) -> DatasetWriter:
    with DatasetWriter(path, mode=mode) as writer:
        writer.add_site(SiteSpec(name="s", dtype="uint8", shape=(), row_space="own", statistics=()))
        writer.write("s", np.full(3, value, np.uint8))
    return writer


@pytest.mark.parametrize("exists", [False, True], ids=["dangling", "empty"])
def test_a_link_to_a_dataset_is_written_through_and_stays(tmp_path: Path, *, exists: bool) -> None:
    target, link = tmp_path / "big disk" / "run.strap", tmp_path / "run.strap"
    if exists:
        target.mkdir(parents=True)
    link.symlink_to(target)
    assert write_one(link, "create", 1).path == target
    write_one(link, "append", 2)
    with strapfmt.open(link) as dataset:
        assert dataset["s"].tensor().tolist() == [1, 1, 1, 2, 2, 2]
    with pytest.raises(DatasetExistsError):
        DatasetWriter(link)
    write_one(link, "overwrite", 3)
    with strapfmt.open(link) as dataset:
        assert dataset["s"].tensor().tolist() == [3, 3, 3]
    assert link.is_symlink()
    assert not target.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["big disk", "run.strap"]
    assert os.listdir(target.parent) == ["run.strap"]


def test_a_link_must_lead_to_where_a_dataset_may_be(tmp_path: Path) -> None:
    circle, other = tmp_path / "circle.strap", tmp_path / "other.strap"
    circle.symlink_to(circle)
    other.symlink_to(tmp_path / "documents")
    with pytest.raises(ArgumentError, match="leads back to itself"):
        DatasetWriter(circle)
    with pytest.raises(ArgumentError, match=r"ends in '\.strap'; got .*documents"):
        DatasetWriter(other)
    assert sorted(os.listdir(tmp_path)) == ["circle.strap", "other.strap"]


# What the system refuses.


@pytest.mark.parametrize(
    "name", ["a\0b.strap", "\ud800.strap", "x" * 300 + ".strap", "x/" * 3000 + "y.strap"]
)
def test_a_path_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    for act in (DatasetWriter, check_writable, strapfmt.open, strapfmt.verify):
        with pytest.raises(ArgumentError, match="path: expected one that can exist"):
            act(tmp_path / name)  # type: ignore[operator]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", ["create", "append", "overwrite"])
def test_a_read_only_disk_is_an_error_of_ours(tmp_path: Path, mode: Any) -> None:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        write_one(mounted / "old.strap", "create", 1)
        subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
        path = mounted / ("new.strap" if mode == "create" else "old.strap")
        with pytest.raises(WriteError, match=r"was not opened for writing: .*Read-only") as caught:
            DatasetWriter(path, mode=mode)
        assert caught.value.errno == errno.EROFS
        with pytest.raises(DatasetExistsError):
            DatasetWriter(mounted / "old.strap")
        with strapfmt.open(mounted / "old.strap") as dataset:
            assert dataset["s"].tensor().tolist() == [1, 1, 1]
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize("refused", ["mkdir", "create", "write", "fsync", "rename", "sync_directory"])
def test_a_create_that_fails_leaves_nothing_behind(tmp_path: Path, refused: str) -> None:
    class Full(Disk):
        pass

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    setattr(Full, refused, fail)
    path = tmp_path / "new" / "x.strap"
    n_descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(WriteError, match="No space left") as caught:
        DatasetWriter(path, disk=Full())
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == n_descriptors
    DatasetWriter(path).close()


def test_a_create_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    class Full(Disk):
        def fsync(self, fd: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "x.strap"
    path.mkdir()
    with pytest.raises(WriteError):
        DatasetWriter(path, disk=Full())
    assert os.listdir(path) == []
    DatasetWriter(path, rank=0).close()
    with pytest.raises(WriteError):
        DatasetWriter(path, rank=1, disk=Full())
    assert os.listdir(path) == ["rank-00000"]
    before = (path / "rank-00000" / spec.MANIFEST_NAME).read_bytes()
    with pytest.raises(WriteError):
        DatasetWriter(path, rank=0, mode="append", disk=Full())
    assert (path / "rank-00000" / spec.MANIFEST_NAME).read_bytes() == before


# What a writer left that ended before its first commit.


def leave(path: Path, *names: str) -> Path:
    root = path / "rank-00000"
    root.mkdir(parents=True)
    for name in names:
        if name.endswith("/"):
            (root / name).mkdir(parents=True)
        else:
            (root / name).write_bytes(b"left")
    return root


@pytest.mark.parametrize("rank", [None, 0])
@pytest.mark.parametrize(
    "names",
    [
        (),
        ("writer.lock",),
        ("writer.lock", "sites/"),
        ("writer.lock", "sites/", "tables/", "manifest.json.tmp"),
    ],
    ids=len,
)
def test_what_never_committed_is_created_over(
    tmp_path: Path, names: tuple[str, ...], rank: int | None
) -> None:
    path = tmp_path / "x.strap"
    leave(path, *names)
    with pytest.raises(DatasetNotFoundError, match="nothing was ever committed here; use mode='create'"):
        DatasetWriter(path, rank=rank, mode="append")
    DatasetWriter(path, rank=rank).close()
    assert strapfmt.open(path).ranks == [0]
    assert strapfmt.verify(path).problems == ()


@pytest.mark.parametrize("name", ["sites/x/", "notes.txt", "sites", "manifest.json.tmp/"])
def test_files_without_a_manifest_are_never_created_over(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.strap"
    root = leave(path, "writer.lock", name)
    before = sorted(path.rglob("*"))
    for mode, kind in (("create", DatasetExistsError), ("append", DatasetNotFoundError)):
        with pytest.raises(kind, match=r"no manifest\.json .*`strapfmt repair`"):
            DatasetWriter(path, mode=mode)  # type: ignore[arg-type]
    assert sorted(path.rglob("*")) == before
    assert (root / "writer.lock").exists()


def test_a_rank_that_is_being_made_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    lock = Lock(leave(path))
    for mode in ("create", "overwrite"):
        with pytest.raises(WriterConflictError, match="is writing here"):
            DatasetWriter(path, mode=mode)  # type: ignore[arg-type]
    lock.release()
    DatasetWriter(path).close()


def go_on(writer: DatasetWriter, script: Script) -> None:
    for step in range(1, 9):
        script.write(writer, step)
        writer.commit()


@pytest.mark.parametrize("how", ["removed", "moved"])
@pytest.mark.parametrize("has_committed", [False, True])
def test_a_writer_whose_directory_is_gone_touches_nothing_of_the_next_one(
    tmp_path: Path, how: str, has_committed: bool
) -> None:
    path, old, moved = tmp_path / "a.strap", Script(seed=1), tmp_path / "moved.strap"
    first = DatasetWriter(path, commit_interval_s=1e9, batch_bytes=64)
    old.declare(first)
    old.write(first, 0)
    if has_committed:
        first.commit()
    shutil.rmtree(path) if how == "removed" else path.rename(moved)
    new = Script(seed=2)
    with DatasetWriter(path, batch_bytes=64) as second:
        new.declare(second)
        new.write(second, 0)
        second.commit()
        with pytest.raises(WriteError, match="removed or moved while it was written"):
            go_on(first, old)
        with pytest.raises(WriteError):
            first.close()
        new.write(second, 1)
    with Reader(path, verify="always") as reader:
        assert contents_of(reader) == new.contents(2)
    report = verify(path)
    assert report.problems == report.notes == ()
    if how == "moved" and has_committed:
        with Reader(moved, verify="always") as reader:
            assert contents_of(reader) == old.contents(1)


def test_giving_up_removes_nothing_of_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "a.strap"
    first = DatasetWriter(path)
    shutil.rmtree(path)
    with DatasetWriter(path) as second:
        first.abort()
        Script().declare(second)
        Script().write(second, 0)
    with Reader(path) as reader:
        assert contents_of(reader) == Script().contents(1)
