"""Opening: which state one gets, what is found in strange places, and how a reader follows a writer."""

import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forge import Forger
from small_datasets import SITES, Script, bits, contents_of, make_dataset, random_chunk, write_chunk

from strapfmt import spec
from strapfmt.arrowfile import digest
from strapfmt.errors import (
    ArgumentError,
    CorruptError,
    DatasetClosedError,
    DatasetNotFoundError,
    RowNotFoundError,
    SiteNotFoundError,
    StrapfmtError,
    UnsupportedError,
)
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt.verify import verify
from strapfmt.writer import DatasetWriter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.strap"


def write_rank(path: Path, rank: int, n_steps: int = 3, *, sites: tuple[SiteSpec, ...] = SITES) -> Script:
    script = Script(sites=sites, rank=rank)
    with DatasetWriter(path, rank=rank, batch_bytes=128) as writer:
        script.declare(writer)
        for step in range(n_steps):
            script.write(writer, step)
    return script


# What is there.


def test_nothing_there_is_not_found(path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match=r"a\.strap"):
        Reader(path)
    path.mkdir()
    with pytest.raises(DatasetNotFoundError, match="no rank-NNNNN directory"):
        Reader(path)
    (path / "rank-00000").mkdir()
    with pytest.raises(DatasetNotFoundError, match="not committed"):
        Reader(path)
    with pytest.raises(DatasetNotFoundError):
        Reader(path / "rank-00000" / "manifest.json")


def test_ranks_are_read_as_one(path: Path) -> None:
    scripts = [write_rank(path, rank, n_steps=rank + 1) for rank in (2, 0, 1)]
    (path / "rank-00007").mkdir()
    (path / "notes").mkdir()
    (path / "rank-x").mkdir()
    with Reader(path, verify="always") as reader:
        assert reader.ranks == [0, 1, 2]
        assert reader.report.uncommitted_ranks == (7,)
        assert not reader.report.is_clean
        rows = np.concatenate(
            [s.model(s.rank + 1).rows("logits") for s in sorted(scripts, key=lambda s: s.rank)]
        )
        np.testing.assert_array_equal(reader["logits"].rows, rows)
        assert len(reader.steps) == 6


def test_sites_may_differ_between_ranks(path: Path) -> None:
    write_rank(path, 0, sites=SITES[:2])
    write_rank(path, 1, sites=SITES[1:])
    with Reader(path) as reader:
        assert sorted(reader.names) == sorted(site.name for site in SITES)
        assert len(reader["logits"]) < len(reader["Head/π"])


def test_a_site_that_ranks_declare_differently_is_refused_and_the_others_are_not(path: Path) -> None:
    write_rank(path, 0)
    write_rank(path, 1, sites=(replace(SITES[0], shape=(9,)), *SITES[1:]))
    with Reader(path) as reader:
        assert len(reader["logits"].tensor())
        for call in (
            lambda: reader["blocks.0.resid_post"].tensor(),
            lambda: reader["blocks.0.resid_post"].to_arrow(),
            lambda: reader["blocks.0.resid_post"].rows,
        ):
            with pytest.raises(StrapfmtError, match=r"blocks\.0\.resid_post"):
                call()
        assert str(reader.report)


@pytest.mark.parametrize("lie", ["renamed", "copied", "short", "link", "long"])
def test_a_rank_directory_that_lies_is_refused(path: Path, lie: str) -> None:
    write_rank(path, 0)
    first = path / "rank-00000"
    if lie == "renamed":
        first.rename(path / "rank-00001")
    elif lie == "copied":
        shutil.copytree(first, path / "rank-00001")
    elif lie == "short":
        shutil.copytree(first, path / "rank-000000")
    elif lie == "long":
        shutil.copytree(first, path / "rank-0000001")
    else:
        first.rename(path / "elsewhere")
        first.symlink_to(path / "elsewhere")
    with pytest.raises(CorruptError, match="rank"):
        Reader(path)


def test_rows_of_another_rank_are_refused(path: Path) -> None:
    write_rank(path, 0)

    def lie(manifest: Any) -> None:
        for shard in manifest["sites"][0]["shards"]:
            shard["first_row"] += 1 << 40
            shard["last_row"] += 1 << 40

    Forger(path).edit(lie)
    with pytest.raises(CorruptError, match="rows of rank 0"):
        Reader(path)


# What newer versions add.


def test_a_part_that_must_be_understood_and_is_not_spoils_its_site_only(path: Path) -> None:
    make_dataset(path)

    def add(manifest: Any, must: bool) -> None:
        for shard in manifest["sites"][0]["shards"]:
            extra = dict(shard["parts"][0], role="planes", must_understand=must)
            shard["parts"] = [part for part in shard["parts"] if part["role"] != "planes"] + [extra]

    Forger(path).edit(lambda manifest: add(manifest, True))
    with Reader(path) as reader:
        with pytest.raises(UnsupportedError, match=r"'planes'.*install a newer"):
            reader["blocks.0.resid_post"].tensor()
        assert len(reader["logits"].tensor()) == len(reader["logits"])
    Forger(path).edit(lambda manifest: add(manifest, False))
    with Reader(path) as reader:
        assert contents_of(reader) == Script().contents(6)


@pytest.mark.parametrize(
    ("field", "value"), [("codec", "planes"), ("dtype", "float4"), ("derived_from", ["y"])]
)
def test_a_site_of_a_newer_version_says_so_when_it_is_used(path: Path, field: str, value: Any) -> None:
    make_dataset(path)

    def change(manifest: Any) -> None:
        site = manifest["sites"][0]
        site[field] = value
        if field == "codec":
            for shard in site["shards"]:
                shard["parts"][0]["codec"] = value

    Forger(path).edit(change)
    with Reader(path) as reader:
        assert "blocks.0.resid_post" in reader.names
        assert str(reader.report)
        assert repr(reader.sites)
        with pytest.raises(UnsupportedError):
            reader["blocks.0.resid_post"].tensor()
        assert len(reader["logits"].tensor())


# Names.


def test_a_wrong_name_gets_the_nearest(path: Path) -> None:
    make_dataset(path)
    with Reader(path) as reader:
        with pytest.raises(SiteNotFoundError, match=r"did you mean 'blocks\.0\.resid_post'"):
            reader["blocks.0.resid_pst"]
        with pytest.raises(SiteNotFoundError):
            reader.sites["x"]
        assert "logits" in reader
        assert list(reader) == reader.names == list(reader.sites)
        assert "Head/π" in repr(reader.sites)
        with pytest.raises(ArgumentError, match="no columns"):
            reader.tokens.to_arrow(["colour"])
        assert reader.tokens.to_arrow(["token", "row"]).column_names == ["token", "row"]
        assert "prefill" in repr(reader.tokens)


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/etc/passwd",
        "CON",
        "a\nb",
        "a;drop table x",
        "Ünïcödé/ sites",
        "x" * 1024,
        "..",
        "~",
        ".tmp",
        "%00",
    ],
)
def test_a_site_may_be_called_anything(path: Path, name: str) -> None:
    site = SiteSpec(name=name, dtype="int8", shape=(2,), row_space="own", statistics=())
    with DatasetWriter(path) as writer:
        writer.add_site(site)
        write_chunk(writer, site, random_chunk(site, 3, np.random.default_rng(0)), None)
    assert {entry.name for entry in path.parent.iterdir()} == {"a.strap"}
    with Reader(path) as reader:
        assert reader.names == [name]
        assert len(reader[name].tensor()) == 3


# Several sites.


def test_tensors_of_several_sites_are_of_the_same_tokens(path: Path) -> None:
    sites = [SiteSpec(name=name, dtype="float32", shape=(1,), statistics=()) for name in "ab"]
    rows = {"a": np.arange(0, 60, 2), "b": np.arange(0, 60, 3)}
    with DatasetWriter(path, batch_bytes=100) as writer:
        for site in (*sites, SITES[2]):
            writer.add_site(site)
        for name in "ab":
            writer.write(name, rows[name][:, None].astype(np.float32), rows=rows[name])
    with Reader(path) as reader:
        common, tensors = reader.tensors(["a", "b"])
        assert common.tolist() == list(range(0, 60, 6))
        assert tensors["a"][:, 0].tolist() == tensors["b"][:, 0].tolist() == common.tolist()
        common, tensors = reader.tensors(["b", "a"], rows=[12, 0])
        assert tensors["a"][:, 0].tolist() == [12, 0]
        with pytest.raises(LookupError):
            reader.tensors(["a", "b"], rows=[2])
        with pytest.raises(ArgumentError, match="token_row"):
            reader.tensors(["a", "logits"])


# Following a writer.


def test_a_reader_sees_commits_when_it_refreshes_and_keeps_its_own_until_then(path: Path) -> None:
    script = Script()
    with DatasetWriter(path, batch_bytes=128, shard_bytes=2500, commit_interval_s=1e9) as writer:
        script.declare(writer)
        readers: list[tuple[int, Reader]] = []
        for step in range(8):
            script.write(writer, step)
            assert all(not reader.refresh() for n, reader in readers if n == step)
            writer.commit()
            readers.append((step + 1, Reader(path, verify="always")))
        for n_steps, reader in readers:
            assert contents_of(reader) == script.contents(n_steps)
    with Reader(path) as moved:
        assert not moved.refresh()
    for _, reader in readers:
        before = reader["blocks.0.resid_post"]
        kept = before.rows, bits(before.tensor())
        assert reader.refresh()
        assert contents_of(reader) == script.contents(8)
        assert reader.report.is_clean
        assert (before.rows.tolist(), bits(before.tensor())) == (kept[0].tolist(), kept[1])
        assert not reader.refresh()


def test_a_refresh_that_fails_leaves_the_reader_as_it_was(path: Path) -> None:
    make_dataset(path)
    reader = Reader(path)
    manifest = path / "rank-00000" / "manifest.json"
    data = manifest.read_bytes()
    manifest.write_bytes(data[:-9])
    with pytest.raises(CorruptError):
        reader.refresh()
    assert contents_of(reader) == Script().contents(6)
    manifest.write_bytes(data)
    assert not reader.refresh()
    shutil.rmtree(path)
    with pytest.raises(DatasetNotFoundError):
        reader.refresh()


def test_a_missing_file_says_what_to_do(path: Path) -> None:
    make_dataset(path)
    (path / "rank-00000" / "sites" / "logits" / "000000.arrow").unlink()
    with Reader(path) as reader:
        with pytest.raises(StrapfmtError, match=r"000000\.arrow.*refresh"):
            reader["logits"].tensor()
        assert len(reader["blocks.0.resid_post"].tensor())


def test_the_report_says_what_was_not_verified(path: Path) -> None:
    make_dataset(path, unclean=True)
    with Reader(path) as reader:
        assert reader.report.n_unverified_bytes > 0
        assert "not verified" in str(reader.report)
        assert "NOT closed" in str(reader.report)
        contents_of(reader)
        assert reader.report.n_unverified_bytes == 0
        assert reader.report.to_dict()["is_clean"] is False


def test_an_unknown_way_to_verify_is_refused(path: Path) -> None:
    with pytest.raises(ArgumentError, match="'touch' or 'always'"):
        Reader(path, verify="never")  # type: ignore[arg-type]


def test_opening_makes_no_schema_of_a_site(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_dataset(path)
    monkeypatch.setattr("strapfmt.state.site_schema", lambda site: pytest.fail(f"of {site.name}"))
    with Reader(path) as reader:
        assert len(reader["logits"]) > 0
        assert str(reader.report)


def test_a_table_shows_its_head_and_reads_no_more(path: Path) -> None:
    make_dataset(path, n_steps=12)
    with Reader(path) as reader:
        shards = list(reader.tokens.shards)
        assert sum(shard.n_batches for shard in shards) > 2
        assert repr(reader.tokens).splitlines()[-1] == f"... {len(reader.tokens)} rows"
        n_bytes = [shard.index.batches["body_bytes"].sum() for shard in shards]
        assert shards[-1].n_unverified_bytes > 0
        assert sum(shard.n_unverified_bytes for shard in shards) < sum(n_bytes)
        for columns in (5, [None]):
            with pytest.raises(ArgumentError, match="columns: expected a name"):
                reader.tokens.to_arrow(columns)  # type: ignore[arg-type]
        assert reader.tokens.to_arrow("row").column_names == ["row"]


def test_opening_reads_manifests_only(path: Path) -> None:
    make_dataset(path)
    for file in path.rglob("*.arrow"):
        file.unlink()
    for file in path.rglob("*.idx"):
        file.unlink()
    with Reader(path) as reader:
        assert len(reader["logits"]) == len(Script().model(6).rows("logits"))
        assert str(reader.report)
    assert spec.MANIFEST_NAME in [file.name for file in path.rglob("*")]


def test_opening_what_is_still_written_checks_no_byte_of_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = make_dataset(path, unclean=True, shard_bytes=1 << 20)
    n_digests = 0

    def counting(*pieces: Any) -> bytes:
        nonlocal n_digests
        n_digests += 1
        return digest(*pieces)

    monkeypatch.setattr("strapfmt.shard_files.digest", counting)
    with Reader(path, verify="always") as reader:
        assert n_digests == 0
        shutil.rmtree(path)
        assert contents_of(reader) == script.contents(6)  # what a writer may replace is held all the same
    assert n_digests > 0


def test_finding_a_row_costs_no_more_than_a_search(path: Path) -> None:
    site = SiteSpec(name="x", dtype="uint8", shape=(1,), statistics=())
    rows = 2 * np.arange(60_000)
    with DatasetWriter(path) as writer:
        writer.add_site(site)
        writer.write("x", np.zeros((len(rows), 1), np.uint8), rows=rows)
    with Reader(path) as reader:
        found = reader["x"]
        assert found.rows_between(5, 7).tolist() == [10, 12]  # makes the runs ready
        found.take([4])
        tracemalloc.start()
        assert found.rows_between(30_000, 30_002).tolist() == [60_000, 60_002]
        assert found.ordinals_of([119_998, 0, 60_000]).tolist() == [59_999, 0, 30_000]
        assert found.take([60_000]).shape == (1, 1)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < len(rows)  # bytes; one copy of the runs would be 16 times that
        with pytest.raises(RowNotFoundError):
            found.take([60_001])


def test_few_maps_are_held(path: Path) -> None:
    make_dataset(path, n_steps=12, shard_bytes=200)

    def n_maps() -> int:
        return sum("a.strap" in line for line in Path("/proc/self/maps").read_text().splitlines())

    seen: list[int] = []
    verify(path, progress=lambda *_: seen.append(n_maps()))
    assert len(seen) > 20
    assert max(seen) <= 3
    with Reader(path) as reader:
        n_shards = sum(1 for _ in reader.shards())
        contents_of(reader)
        assert 0 < n_maps() <= n_shards


def test_a_thread_that_reads_while_another_closes_is_told_so(tmp_path: Path) -> None:
    make_dataset(tmp_path / "x.strap")
    reader = Reader(tmp_path / "x.strap")
    reader._state = None  # as it is for a moment
    with pytest.raises(DatasetClosedError, match="was closed"):
        len(reader)
