"""One shard on disk: an open stream, a tail at each commit, and an Arrow file that anyone reads once it is sealed."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.ipc
import pytest
from forge import Forger
from small_datasets import Script, _columns, contents_of, make_dataset

from strapfmt import spec
from strapfmt.reader import Reader
from strapfmt.schema import read_site
from strapfmt.writer import DatasetWriter


def files_of(path: Path, suffix: str) -> list[Path]:
    return sorted(path.rglob(f"*{suffix}"))


def open_writer(path: Path) -> DatasetWriter:
    writer = DatasetWriter(path, batch_bytes=128, shard_bytes=1 << 20, commit_interval_s=1e9)
    Script().declare(writer)
    return writer


@pytest.mark.parametrize("name", ["blocks.0.resid_post", "logits"])
def test_a_sealed_shard_is_an_arrow_file_and_a_stream(tmp_path: Path, name: str) -> None:
    expected = make_dataset(tmp_path / "a.strap", shard_bytes=1 << 20).contents(6)[f"site {name}"]
    (file,) = files_of(tmp_path / "a.strap" / "rank-00000" / "sites" / name, spec.DATA_SUFFIX)
    data = file.read_bytes()
    assert data[:8] == spec.IPC_PREFIX
    assert data[-6:] == spec.IPC_MAGIC
    as_file = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    as_stream = pa.ipc.open_stream(data[8:]).read_all()
    as_dataset = pyarrow.dataset.dataset(file, format="ipc").to_table()
    assert _columns(as_file) == _columns(as_stream) == _columns(as_dataset) == expected
    assert as_file.schema.metadata == as_stream.schema.metadata
    site = read_site(as_file.schema)
    assert site is not None
    assert site.name == name
    assert json.loads(as_file.schema.metadata[spec.SPEC_KEY.encode()])["shape"] == list(site.shape)


def test_full_batches_are_written_once_and_the_rest_is_a_tail(tmp_path: Path) -> None:
    path, script = tmp_path / "a.strap", Script()
    writer = open_writer(path)
    folder = path / "rank-00000" / "sites" / "blocks.0.resid_post"
    seen = b""
    for step in range(7):
        script.write(writer, step)
        writer.commit()
        (data,) = files_of(folder, spec.OPEN_SUFFIX)
        assert data.read_bytes().startswith(seen)
        seen = data.read_bytes()
        shard = Forger(path).shard()
        roles = [part["role"] for part in shard["parts"]]
        tails = [path / "rank-00000" / part["file"] for part in shard["parts"] if part["role"] == "tail"]
        n_full = shard["n_rows"] // 4 * 4
        assert len(roles) == 2 + len(tails)
        assert (shard["n_rows"] != n_full) == bool(tails)
        if tails:
            (tail,) = tails
            assert pa.ipc.open_file(str(tail)).read_all().num_rows == shard["n_rows"] - n_full
    writer.close()
    (sealed,) = files_of(folder, spec.DATA_SUFFIX)  # what commits replaced is gone, at the latest now
    assert sealed.read_bytes().startswith(seen)
    assert len(list(folder.iterdir())) == 2


def test_a_commit_without_news_rewrites_no_shard(tmp_path: Path) -> None:
    path, script = tmp_path / "a.strap", Script()
    writer = open_writer(path)
    script.write(writer, 0)
    writer.commit()
    before = {
        file: file.stat().st_ino for file in path.rglob("*") if file.parent.parent.name in ("sites", "tables")
    }
    writer.commit()
    assert before == {file: file.stat().st_ino for file in before}
    assert Forger(path).manifest["commit"] == 2
    writer.abort()


def test_an_open_shard_that_was_sealed_meanwhile_is_read_under_its_new_name(tmp_path: Path) -> None:
    path = tmp_path / "a.strap"
    make_dataset(path, unclean=True)
    for file in files_of(path, spec.OPEN_SUFFIX):
        file.rename(file.with_name(file.name.removesuffix(".open")))
    with Reader(path, verify="always") as reader:
        assert contents_of(reader) == Script().contents(6)


def test_a_file_longer_than_its_commit_is_read_to_the_commit(tmp_path: Path) -> None:
    path = tmp_path / "a.strap"
    make_dataset(path, unclean=True)
    for file in files_of(path, spec.OPEN_SUFFIX):
        file.write_bytes(file.read_bytes() + b"the beginning of what was never committed")
    with Reader(path, verify="always") as reader:
        assert contents_of(reader) == Script().contents(6)


def test_tables_are_arrow_files_too(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a.strap", shard_bytes=1 << 20)
    (file,) = files_of(tmp_path / "a.strap" / "rank-00000" / "tables" / "tokens", spec.DATA_SUFFIX)
    table = pa.ipc.open_file(str(file)).read_all()
    assert table.to_pylist() == Script().model(6).tables["tokens"]
