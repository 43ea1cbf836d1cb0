"""Rows that wait for their batch: what they cost, and that nobody writes over those that were handed out."""

import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from strapfmt.commit import Disk
from strapfmt.reader import Reader
from strapfmt.row_buffer import BufferPool, RowBuffer
from strapfmt.schema import SiteSpec, site_schema
from strapfmt.writer import DatasetWriter

NARROW = SiteSpec(name="router", dtype="bfloat16", shape=(8,))
RAGGED = SiteSpec(name="pattern", dtype="float32", shape=(2, -1))
N_ROWS = 600


def write_one_by_one(writer: DatasetWriter, site: SiteSpec, start: int, stop: int) -> None:
    """Write one row a call, as decoding does."""
    figures = {name: np.zeros(1, np.float32) for name in site.statistics} | {
        "n_nonfinite": np.zeros(1, np.int32)
    }
    for row in range(start, stop):
        width = 2 * (row % 5) if site.is_ragged else 8
        values = np.full((width,) if site.is_ragged else (1, width), row % 100, site.stored_dtype.numpy)
        shapes = np.array([[2, row % 5]]) if site.is_ragged else None
        writer.write(site.name, values, rows=np.array([row]), shapes=shapes, statistics=figures)


@pytest.mark.parametrize("site", [NARROW, RAGGED], ids=lambda site: site.name)
def test_one_row_a_call_holds_hardly_more_than_the_rows(tmp_path: Path, site: SiteSpec) -> None:
    row_bytes = 8 + 20 + (8 + 4 * 4 if site.is_ragged else 2 * 8)
    with DatasetWriter(tmp_path / "a.strap", commit_interval_s=1e9) as writer:
        writer.add_site(site)
        write_one_by_one(writer, site, 0, 100)
        tracemalloc.start()
        try:
            write_one_by_one(writer, site, 100, 100 + N_ROWS)
            growth = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
    # A ragged site's buffer may have just doubled.
    assert growth < 2 * 2 * row_bytes * (100 + N_ROWS)
    with Reader(tmp_path / "a.strap", verify="always") as reader:
        values = reader[site.name].to_arrow(["activation"])["activation"].to_pylist()
        assert [row[0] for row in values if row] == [
            r % 100 for r in range(700) if not site.is_ragged or r % 5
        ]


def test_a_buffer_holds_a_batch_of_a_fixed_shape_in_one_block() -> None:
    buffer = RowBuffer(site_schema(NARROW), BufferPool(0), n_rows=64, n_values=512)
    parts = [np.random.default_rng(i).integers(0, 99, (i + 1, 8), np.uint16) for i in range(9)]
    taken, row = [], 0
    for part in parts:
        figures = {name: np.full(len(part), row) for name in NARROW.statistics}
        buffer.add(part.reshape(-1), {"row": np.arange(row, row + len(part)), **figures})
        row += len(part)
        taken.append((buffer.values, buffer.columns))
    assert buffer.room == (64, 512)
    assert all(np.shares_memory(values, buffer.values) for values, _ in taken)
    for n, (values, columns) in enumerate(taken, 1):
        assert np.array_equal(values, np.concatenate(parts[:n]).reshape(-1))
        assert columns["row"].tolist() == list(range(len(values) // 8))
    assert {name: column.dtype.name for name, column in buffer.columns.items()} == {
        "row": "int64",
        **dict.fromkeys(("l2_norm", "mean", "std", "abs_max"), "float32"),
        "n_nonfinite": "int32",
    }


def test_a_buffer_that_grows_leaves_what_it_handed_out_alone() -> None:
    site = SiteSpec(name="r", dtype="uint8", shape=(-1,), statistics=())
    buffer = RowBuffer(site_schema(site), BufferPool(1 << 20), n_rows=1, n_values=1)
    taken, moves, room = [], 0, buffer.room
    for row in range(300):
        buffer.add(
            np.full(row % 7, row % 251, np.uint8), {"row": np.array([row]), "shape": np.array([[row % 7]])}
        )
        taken.append((buffer.values, buffer.columns))
        moves, room = moves + (room != buffer.room), buffer.room
    expected = np.repeat(np.arange(300) % 251, np.arange(300) % 7)
    for n, (values, columns) in enumerate(taken, 1):
        assert np.array_equal(values, expected[: len(values)])
        assert columns["shape"][:, 0].tolist() == [row % 7 for row in range(n)]
    assert moves < 24


def test_rows_written_behind_a_tail_do_not_reach_it_before_it_is_on_disk(tmp_path: Path) -> None:
    class Slow(Disk):
        may_write = threading.Event()

        def write(self, fd: int, pieces: object, offset: int) -> None:
            assert self.may_write.wait(60)
            super().write(fd, pieces, offset)  # type: ignore[arg-type]

    Slow.may_write.set()
    writer = DatasetWriter(tmp_path / "a.strap", disk=Slow(), commit_interval_s=0.0)
    for site in (NARROW, RAGGED):
        writer.add_site(site)
    writer.wait()
    Slow.may_write.clear()
    for site in (NARROW, RAGGED):
        write_one_by_one(writer, site, 0, 50)
    writer.end_step()
    for site in (NARROW, RAGGED):
        write_one_by_one(writer, site, 50, 400)
    Slow.may_write.set()
    writer.abort()
    with Reader(tmp_path / "a.strap", verify="always") as reader:
        for site in (NARROW, RAGGED):
            stored = reader[site.name].to_arrow(["row", "activation"]).to_pydict()
            assert stored["row"] == list(range(50))
            assert all(
                set(row) <= {number} for number, row in zip(stored["row"], stored["activation"], strict=True)
            )
