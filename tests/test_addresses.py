"""Gathers over shards: rows by address, whatever file and layout they lie in."""

from pathlib import Path

import numpy as np
import pytest
import torch

from strapfmt.errors import CorruptError, RowNotFoundError
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter


def values_of(rows: np.ndarray, width: int) -> np.ndarray:
    return rows[:, None].astype(np.float32) * 100 + np.arange(width, dtype=np.float32)


def write(path: Path, rows: np.ndarray, width: int, **options: object) -> DatasetWriter:
    """Write `rows` in calls of uneven size, a commit in between; the writer is still open."""
    writer = DatasetWriter(path, **options)
    writer.add_site(SiteSpec(name="s", dtype="float32", shape=(width,), statistics=()))
    for number, part in enumerate(np.array_split(rows, 7)):
        writer.write("s", values_of(part, width), rows=part, statistics={})
        if number == 3:
            writer.commit()
    writer.commit()
    return writer


@pytest.mark.parametrize("width", [1, 3, 16, 100])
@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_gather_reaches_every_shard_and_the_tail(tmp_path: Path, width: int, is_sealed: bool) -> None:
    rows = np.arange(5, 905)
    writer = write(tmp_path / "d.strap", rows, width, batch_bytes=512, shard_bytes=8 << 10)
    if is_sealed:
        writer.close()
    with Reader(tmp_path / "d.strap") as reader:
        site = reader["s"]
        assert site.n_batches > 10
        ordinals = np.random.default_rng(0).integers(0, len(rows), 500)
        out = torch.full((500, width), -1.0)
        assert site.gather(ordinals, out=out) is out
        np.testing.assert_array_equal(out.numpy(), values_of(rows[ordinals], width))
        np.testing.assert_array_equal(site.take(rows[::-1]).numpy(), values_of(rows[::-1], width))
        np.testing.assert_array_equal(site.tensor().numpy(), values_of(rows, width))
        assert site.gather([]).shape == (0, width)
    writer.abort()


def test_shards_are_mapped_when_they_are_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "d.strap", np.arange(900), 16, batch_bytes=512, shard_bytes=8 << 10).close()
    site = Reader(tmp_path / "d.strap")["s"]
    before = site.n_unverified_bytes
    assert site.take([850])[0, 0] == 85_000
    files = sorted((tmp_path / "d.strap/rank-00000/sites/s").glob("*.arrow"))
    files[1].unlink()  # a shard that nobody has asked for
    assert site.take([850, 3])[1, 1] == 301
    assert site.n_unverified_bytes <= before


def test_a_site_whose_rows_have_gaps_finds_the_rows_it_holds_and_no_others(tmp_path: Path) -> None:
    rows = np.flatnonzero(np.random.default_rng(1).random(3_000) < 0.4)
    write(tmp_path / "d.strap", rows, 16, batch_bytes=512, shard_bytes=8 << 10).close()
    site = Reader(tmp_path / "d.strap")["s"]
    wanted = np.random.default_rng(2).permutation(rows)
    np.testing.assert_array_equal(site.take(wanted).numpy(), values_of(wanted, 16))
    for missing in [*np.setdiff1d(np.arange(3000), rows)[[0, 500, -1]].tolist(), -1, 3001, 1 << 40]:
        with pytest.raises(RowNotFoundError):
            site.take([int(rows[0]), missing])


def test_compressed_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    path, rows = tmp_path / "d.strap", np.arange(900)
    with DatasetWriter(path, batch_bytes=512, shard_bytes=8 << 10) as writer:
        writer.add_site(SiteSpec(name="s", dtype="float32", shape=(16,), codec="zstd", statistics=()))
        writer.write("s", values_of(rows, 16), rows=rows, statistics={})
    wanted = np.random.default_rng(2).integers(0, 900, 300)
    np.testing.assert_array_equal(Reader(path)["s"].take(wanted).numpy(), values_of(wanted, 16))


def test_rows_of_several_ranks_are_gathered_at_once(tmp_path: Path) -> None:
    path = tmp_path / "d.strap"
    for rank in range(2):
        write(path, np.arange(700) + (rank << 40), 16, rank=rank, batch_bytes=512).close()
    wanted = np.array([(1 << 40) + 3, 5, 699, (1 << 40) + 699])
    np.testing.assert_array_equal(Reader(path)["s"].take(wanted).numpy(), values_of(wanted, 16))


def test_a_damaged_shard_is_refused_every_time(tmp_path: Path) -> None:
    write(tmp_path / "d.strap", np.arange(900), 16, batch_bytes=512, shard_bytes=8 << 10).close()
    site = Reader(tmp_path / "d.strap")["s"]
    site.take([3])
    last = sorted((tmp_path / "d.strap/rank-00000/sites/s").glob("*.arrow"))[-1]
    last.write_bytes(last.read_bytes()[:-8])
    for _ in range(2):
        with pytest.raises(CorruptError):
            site.take([3, 899])
    assert site.take([3])[0, 0] == 300
