"""Layouts: which one a site gets, and that the bytes on disk obey it."""

import math
from pathlib import Path

import numpy as np
import pytest
from forge import Forger
from small_datasets import Model, check_routes, random_chunk, write_chunk

from strapfmt import spec
from strapfmt.layout import body_alignment, plan_layout
from strapfmt.manifest import Layout
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter

MIB = 1 << 20


def site_of(width: int | tuple[int, ...], dtype: str = "bfloat16", **options: object) -> SiteSpec:
    shape = width if isinstance(width, tuple) else (width,)
    return SiteSpec(name="x", dtype=dtype, shape=shape, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("site", "kind", "batch_rows"),
    [
        (site_of(2048), "rows", 1024),
        (site_of(4096, "float32"), "rows", 256),
        (site_of(64), "rows", 32768),
        (site_of(()), "rows", 65536),
        (site_of(50257, "float32"), "strided", 16),
        (site_of(2048, codec="zstd"), "plain", 1024),
        (site_of((8, -1)), "plain", 0),
        (site_of((8, -1), codec="lz4"), "plain", 0),
    ],
)
def test_a_site_gets_the_layout_that_costs_at_most_one_percent(
    site: SiteSpec, kind: str, batch_rows: int
) -> None:
    layout = plan_layout(site, 500, 4 * MIB)
    assert (layout.kind, layout.batch_rows) == (kind, batch_rows)
    if kind == "rows":
        alignment = body_alignment(site, layout)
        needed = 500 + batch_rows * (site.row_bytes + 8 + 20)
        assert (math.ceil(needed / alignment) * alignment - needed) / needed <= 0.0102


def test_a_batch_grows_at_most_four_times_for_its_alignment() -> None:
    for width in range(1, 400):
        layout = plan_layout(site_of(width, "uint8", statistics=()), 500, 64 << 10)
        rows = (64 << 10) / (width + 8)
        assert rows / 2 <= layout.batch_rows <= 6 * rows


def test_a_row_wider_than_a_batch_is_a_batch() -> None:
    assert plan_layout(site_of(50257, "float32"), 500, 1024).batch_rows == 1


def test_alignments_are_those_of_the_specification() -> None:
    site = site_of(100, "float32")
    assert body_alignment(site, Layout(kind="rows", batch_rows=8)) == math.lcm(400, 64)
    assert body_alignment(site, Layout(kind="strided", batch_rows=8)) == spec.ALIGNMENT_BYTES
    assert body_alignment(site, Layout(kind="plain", batch_rows=8)) == 8


@pytest.mark.parametrize(
    ("site", "batch_bytes", "kind"),
    [
        (site_of(32), 4096, "rows"),
        (site_of((4, 24), "float32", row_space="own"), 40_000, "rows"),
        (site_of(7, "float64", statistics=()), 4096, "strided"),
        (site_of(1000, "int8"), 2000, "strided"),
        (site_of(24, "float16", codec="lz4"), 4096, "plain"),
    ],
)
def test_bodies_on_disk_lie_where_the_layout_says(
    tmp_path: Path, site: SiteSpec, batch_bytes: int, kind: str
) -> None:
    path, model, rng = tmp_path / "a.strap", Model(), np.random.default_rng(1)
    model.add_site(site)
    with DatasetWriter(path, batch_bytes=batch_bytes, shard_bytes=200_000) as writer:
        writer.add_site(site)
        for i in range(6):
            n_rows = 600 if site.row_bytes < 500 else 40
            chunk = random_chunk(site, n_rows, rng)
            rows = None if site.row_space == "own" else np.arange(i * n_rows, (i + 1) * n_rows)
            write_chunk(writer, site, chunk, rows)
            model.add("x", chunk, rows)
            writer.wait()
    entry = Forger(path).manifest["sites"][0]
    assert entry["layout"]["kind"] == kind
    layout, values, at = Layout(**entry["layout"]), model.values("x"), 0
    for number, shard in enumerate(entry["shards"]):
        index = Forger(path).index("sites", 0, number)
        data = (Forger(path).root / shard["parts"][0]["file"]).read_bytes()
        starts = index.batches["offset"].astype(np.int64) + index.batches["header_bytes"]
        assert np.all(starts % body_alignment(site, layout) == 0)
        assert np.all(index.batches["n_rows"][:-1] == layout.batch_rows)
        for start, n_rows in zip(starts.tolist(), index.batches["n_rows"].tolist(), strict=True):
            if kind != "plain":
                assert start % 64 == 0
                raw = values[at : at + n_rows].tobytes()
                assert data[start : start + len(raw)] == raw
            at += n_rows
        if kind == "rows":  # the whole file is one tensor
            usable = len(data) // site.row_bytes * site.row_bytes
            table = np.frombuffer(data[:usable], np.uint8).reshape(-1, site.row_bytes)
            first = int(index.batches["n_rows"][0])
            found = table[starts[0] // site.row_bytes :][:first]
            shard_start = at - int(index.n_rows)
            assert found.tobytes() == values[shard_start : shard_start + first].tobytes()
    with Reader(path) as reader:
        check_routes(reader["x"], model, rng)


def test_logits_wider_than_a_batch_come_back(tmp_path: Path) -> None:
    site = site_of(50257, "float32", row_space="own", statistics=())
    model, rng = Model(), np.random.default_rng(2)
    model.add_site(site)
    with DatasetWriter(tmp_path / "a.strap", batch_bytes=64 << 10) as writer:
        writer.add_site(site)
        for n_rows in (1, 3, 2):
            chunk = random_chunk(site, n_rows, rng)
            write_chunk(writer, site, chunk, None)
            model.add("x", chunk, None)
            writer.commit()
    with Reader(tmp_path / "a.strap", verify="always") as reader:
        assert reader["x"].n_batches == 6
        check_routes(reader["x"], model, rng)
