"""A site as tensors and Arrow: what aliases the map and what is copied, what is found and what is refused."""

import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from forge import Forger
from small_datasets import Model, bits, check_routes, contents_of, make_dataset, random_chunk, write_chunk

from strapfmt import spec
from strapfmt.dtypes import DTYPES
from strapfmt.errors import ArgumentError, OrdinalNotFoundError, RowNotFoundError, ViewError
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt.site import Site
from strapfmt.writer import DatasetWriter

N = 100


def write(
    path: Path, site: SiteSpec, n_rows: int = N, *, gap: int = 0, rank: int | None = None, **options: Any
) -> Model:
    """Write `n_rows` rows of one site, their numbers `1 + gap` apart, and leave the dataset closed."""
    model, rng = Model(), np.random.default_rng(4)
    model.add_site(site)
    rows = ((rank or 0) << spec.RANK_SHIFT) + np.arange(n_rows) * (1 + gap)
    with DatasetWriter(path, rank=rank, **options) as writer:
        writer.add_site(site)
        chunk = random_chunk(site, n_rows, rng)
        write_chunk(writer, site, chunk, None if site.row_space == "own" else rows)
    model.add(site.name, chunk, None if site.row_space == "own" else rows)
    return model


def site_of(**options: Any) -> SiteSpec:
    return SiteSpec(**({"name": "x", "dtype": "float32", "shape": (8,), "statistics": ()} | options))


def mapped_ranges(name: str) -> list[tuple[int, int]]:
    """Return the addresses at which a file is mapped into this process."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if name in line:
            begin, end = line.split()[0].split("-")
            ranges.append((int(begin, 16), int(end, 16)))
    return ranges


def is_mapped(tensor: torch.Tensor, name: str) -> bool:
    first = tensor.data_ptr()
    strides = [(n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    last = first + (sum(strides) + 1) * tensor.element_size()
    return any(begin <= first and last <= end for begin, end in mapped_ranges(name))


# Views.


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_body_is_a_view_of_the_map_by_address(tmp_path: Path, dtype: str) -> None:
    model = write(tmp_path / "a.strap", site_of(dtype=dtype))
    with Reader(tmp_path / "a.strap") as reader:
        site = reader["x"]
        for tensor in (site.tensor(), site.tensor(copy=False), site[:], site[3:50]):
            assert is_mapped(tensor, "000000.arrow")
            assert tensor.dtype == DTYPES[dtype].torch
        assert is_mapped(site[7], "000000.arrow")
        assert bits(site.tensor()) == model.values("x").tobytes()
        copies = [site.tensor(copy=True), site[::2], site.take([1]), site.gather([1])]
        assert not any(is_mapped(tensor, "000000.arrow") for tensor in copies)
        assert {t.data_ptr() for t in (site.tensor(), site[:], next(site.views()).tensor)} == {
            site[0].data_ptr()
        }
        buffer = site.to_arrow()["activation"].chunk(0).flatten().buffers()[1]
        assert any(begin <= buffer.address < end for begin, end in mapped_ranges("000000.arrow"))
        assert buffer.address != site.tensor().data_ptr()
        assert not buffer.is_mutable


@pytest.mark.parametrize(("shape", "batch_bytes"), [((8,), 1024), ((5, 3), 1000), ((), 64)])
def test_views_are_strided_over_the_map(tmp_path: Path, shape: tuple[int, ...], batch_bytes: int) -> None:
    model = write(tmp_path / "a.strap", site_of(shape=shape), 999, batch_bytes=batch_bytes)
    with Reader(tmp_path / "a.strap") as reader:
        site = reader["x"]
        views = list(site.views())
        assert site.n_batches > 4
        assert len(views) <= 3
        assert views[0].tensor.shape[1:] == (site.layout.batch_rows, *shape)
        assert all(is_mapped(view.tensor, "000000.arrow") for view in views)
        flat = b"".join(bits(view.tensor) for view in views)
        assert flat == model.values("x").tobytes()
        with pytest.raises(ViewError, match="no one contiguous body"):
            site.tensor(copy=False)


def test_a_view_outlives_the_reader(tmp_path: Path) -> None:
    model = write(tmp_path / "a.strap", site_of())
    reader = Reader(tmp_path / "a.strap")
    tensor, row, table = reader["x"].tensor(), reader["x"][5], reader["x"].to_arrow()
    views = [view.tensor for view in reader["x"].views()]
    reader.close()
    del reader
    values = model.values("x")
    assert bits(tensor) == bits(views[0]) == values.tobytes()
    assert bits(row) == values[5].tobytes()
    assert table["activation"].chunk(0).flatten().to_numpy().tobytes() == values.tobytes()
    del tensor, row, table, views
    assert mapped_ranges(str(tmp_path)) == []


@pytest.mark.parametrize("verify", ["touch", "always"])
@pytest.mark.parametrize("is_sealed", [True, False])
def test_writing_into_a_view_changes_views_and_nothing_else(
    tmp_path: Path, verify: Any, is_sealed: bool
) -> None:
    path = tmp_path / "a.strap"
    values = np.arange(N * 8, dtype=np.float32).reshape(N, 8)
    with DatasetWriter(path) as writer:
        writer.add_site(site_of())
        writer.write("x", values, rows=np.arange(N), statistics={})
        writer.commit()
        if is_sealed:
            writer.close()
        files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        with Reader(path, verify=verify) as reader:
            site = reader["x"]
            tensor = site.tensor()
            tensor.zero_()
            site[2:5].add_(1)
            for view in site.views():
                view.tensor.add_(1)
            assert site[:].unique().tolist() == [1.0, 2.0]  # views share their memory
            assert bits(site.take([3, 99])) == values[[3, 99]].tobytes()
            assert bits(site.gather([3])) == values[3].tobytes()
            assert bits(site[::2]) == values[::2].tobytes()
            assert bits(site.tensor(copy=True)) == values.tobytes()
            scanned = [b.column("activation").flatten().to_numpy() for b in site.scan()]
            assert np.concatenate(scanned).tobytes() == values.tobytes()
            assert site.to_arrow()["activation"].chunk(0).flatten().to_numpy().tobytes() == values.tobytes()
            site.verify_batches(0, site.n_batches)
        assert {file: file.read_bytes() for file in files} == files


def test_views_of_an_unfinished_shard_outlive_the_next_commits(tmp_path: Path) -> None:
    values = np.arange(N * 8, dtype=np.float32).reshape(N, 8)
    with DatasetWriter(tmp_path / "a.strap", batch_bytes=1 << 20) as writer:
        writer.add_site(site_of())
        writer.write("x", values[:50], rows=np.arange(50), statistics={})
        writer.commit()
        with Reader(tmp_path / "a.strap") as reader:
            writer.write("x", values[50:], rows=np.arange(50, N), statistics={})
            writer.commit()
            assert bits(reader["x"].tensor(copy=False)) == values[:50].tobytes()
            assert reader.refresh()
            assert bits(reader["x"].tensor()) == values.tobytes()


def test_writing_into_a_view_never_reaches_the_file(tmp_path: Path) -> None:
    model = write(tmp_path / "a.strap", site_of())
    with Reader(tmp_path / "a.strap") as reader:
        reader["x"].tensor().zero_()
    with Reader(tmp_path / "a.strap", verify="always") as reader:
        assert bits(reader["x"].tensor()) == model.values("x").tobytes()


def test_gap_rows_are_never_visible(tmp_path: Path) -> None:
    model = write(tmp_path / "a.strap", site_of(), gap=3, batch_bytes=256)
    with Reader(tmp_path / "a.strap") as reader:
        site = reader["x"]
        assert site.rows.tolist() == list(range(0, 4 * N, 4))
        assert site.tensor().shape == (N, 8)
        check_routes(site, model, np.random.default_rng(0))
        for missing in (1, 399, 4 * N, -1, 1 << 40, 1 << 62):
            with pytest.raises(RowNotFoundError, match="use site\\[i:j\\] for ordinals") as caught:
                site.take([0, missing, 4])
            assert caught.value.missing == [missing]


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_a_compressed_site_has_no_views(tmp_path: Path, codec: str) -> None:
    model = write(tmp_path / "a.strap", site_of(codec=codec))
    with Reader(tmp_path / "a.strap") as reader:
        with pytest.raises(ViewError, match="compressed"):
            next(iter(reader["x"].views()))
        with pytest.raises(ViewError, match="contiguous"):
            reader["x"].tensor(copy=False)
        check_routes(reader["x"], model, np.random.default_rng(0))


def test_a_ragged_site_has_no_rectangle_and_says_what_to_use(tmp_path: Path) -> None:
    write(tmp_path / "a.strap", site_of(shape=(2, -1)))
    with Reader(tmp_path / "a.strap") as reader:
        site = reader["x"]
        for call in (
            site.tensor,
            lambda: site.take([1]),
            lambda: site.gather([1]),
            lambda: next(iter(site.views())),
        ):
            with pytest.raises(ViewError, match="scan"):
                call()
        assert site.to_arrow().column_names == ["activation", "shape", "row"]


# Gathering.


def test_out_is_filled_and_given_back(tmp_path: Path) -> None:
    model = write(tmp_path / "a.strap", site_of(dtype="bfloat16"), batch_bytes=128)
    with Reader(tmp_path / "a.strap") as reader:
        site, out = reader["x"], torch.zeros((3, 8), dtype=torch.bfloat16)
        assert site.take([5, 99, 5], out=out) is out
        assert bits(out) == model.values("x")[[5, 99, 5]].tobytes()
        wrong: list[torch.Tensor] = [
            torch.zeros((2, 8), dtype=torch.bfloat16),
            torch.zeros((3, 8)),
            torch.zeros((3, 16), dtype=torch.bfloat16)[:, ::2],
            torch.zeros(24, dtype=torch.bfloat16),
            torch.empty((3, 8), dtype=torch.bfloat16, device="meta"),
        ]
        for tensor in wrong:
            with pytest.raises(ArgumentError, match="out: expected contiguous"):
                site.take([5, 99, 5], out=tensor)
        for other in ([1], np.zeros((3, 8)), torch.zeros((3, 8), dtype=torch.bfloat16, requires_grad=True)):
            with pytest.raises(ArgumentError, match="out: expected contiguous"):
                site.take([5, 99, 5], out=other)  # type: ignore[arg-type]


@pytest.mark.parametrize("ordinals", [[N], [-1], [0, 5, N], [1 << 40], [-(1 << 62)]])
def test_ordinals_outside_are_refused(tmp_path: Path, ordinals: list[int]) -> None:
    write(tmp_path / "a.strap", site_of(), batch_bytes=128)
    with Reader(tmp_path / "a.strap") as reader:
        with pytest.raises(OrdinalNotFoundError, match="100 rows") as caught:
            reader["x"].gather(ordinals)
        assert caught.value.missing == ordinals[-1:]
        with pytest.raises(OrdinalNotFoundError, match=r"has 100 rows, got ordinal 100; .*take\(\)"):
            reader["x"][N]
        with pytest.raises(IndexError, match="ordinal"):
            reader["x"][-N - 1]


@pytest.mark.parametrize(
    "rows",
    [
        [1.5],
        ["a"],
        [[1]],
        3,
        [True, False],
        [[1], [1, 2]],
        [None],
        torch.ones(2),
        torch.ones(2, requires_grad=True),
        torch.ones(2, dtype=torch.int64, device="meta"),
        [1 << 63],
        [1 << 64],
        np.array([1, (1 << 64) - 1], np.uint64),
    ],
)
def test_rows_are_integers(tmp_path: Path, rows: Any) -> None:
    write(tmp_path / "a.strap", site_of())
    with Reader(tmp_path / "a.strap") as reader, pytest.raises(ArgumentError, match="expected integers"):
        reader["x"].take(rows)


def test_slices_are_those_of_a_list(tmp_path: Path) -> None:
    values = write(tmp_path / "a.strap", site_of(), 23, batch_bytes=128).values("x")
    with Reader(tmp_path / "a.strap") as reader:
        site = reader["x"]
        for key in [
            slice(None),
            slice(5, 5),
            slice(9, 3),
            slice(-7, None),
            slice(None, -30),
            slice(-100, 100),
            slice(20, 2, -3),
            slice(None, None, 7),
            slice(100, None),
        ]:
            expected = values[key]
            assert site[key].shape == expected.shape
            assert bits(site[key]) == expected.tobytes()
        with pytest.raises(ValueError, match="zero"):
            site[::0]
        assert len(list(site)) == 23


def test_taking_nothing_is_an_empty_tensor(tmp_path: Path) -> None:
    write(tmp_path / "a.strap", site_of(shape=(2, 3)))
    with Reader(tmp_path / "a.strap") as reader:
        assert reader["x"].take([]).shape == reader["x"][4:4].shape == (0, 2, 3)
        assert reader["x"].take(np.empty(0, np.int64)).dtype == torch.float32


# Ranks that differ.


def test_ranks_with_other_batches_and_codecs_are_one_site(tmp_path: Path) -> None:
    path, models = tmp_path / "a.strap", []
    for rank, (codec, batch_bytes) in enumerate(
        [("none", 100), ("zstd", 400), ("none", 3000), ("lz4", 1 << 20)]
    ):
        site = site_of(codec=codec)
        models.append(write(path, site, 150, rank=rank, batch_bytes=batch_bytes, shard_bytes=5000))
    whole = Model()
    whole.add_site(site_of())
    for model in models:
        whole.chunks["x"] += model.chunks["x"]
    with Reader(path, verify="always") as reader:
        site = reader["x"]
        assert reader.ranks == [0, 1, 2, 3]
        values, rng = whole.values("x"), np.random.default_rng(1)
        for _ in range(30):
            chosen = rng.integers(0, 600, 50)
            assert bits(site.gather(chosen)) == values[chosen].tobytes()
            start, stop = np.sort(rng.integers(0, 601, 2)).tolist()
            assert bits(site[start:stop]) == values[start:stop].tobytes()
        assert b"".join(bits(row) for row in site) == values.tobytes()
        np.testing.assert_array_equal(site.rows, whole.rows("x"))
        with pytest.raises(ViewError):
            list(site.views())


def test_a_batch_size_that_lies_is_refused_or_does_no_harm(tmp_path: Path) -> None:
    model = write(tmp_path / "a.strap", site_of(), 40, batch_bytes=400)
    values = model.values("x")
    honest = Forger(tmp_path / "a.strap").manifest["sites"][0]["layout"]["batch_rows"]
    for batch_rows in (0, 1, 2, honest - 1, honest + 1, 39, 40, 41, 1 << 32):
        Forger(tmp_path / "a.strap").edit(
            lambda manifest, n=batch_rows: manifest["sites"][0]["layout"].update(batch_rows=n)
        )
        with Reader(tmp_path / "a.strap") as reader:
            chosen = np.arange(40)[::-1].copy()
            assert bits(reader["x"].gather(chosen)) == values[::-1].tobytes(), batch_rows


# Arrow.


def test_scan_projects_filters_limits_and_cuts(tmp_path: Path) -> None:
    site = site_of(statistics=("l2_norm", "n_nonfinite"))
    with DatasetWriter(tmp_path / "a.strap", batch_bytes=500) as writer:
        writer.add_site(site)
        norms = np.arange(N, dtype=np.float32)
        statistics = {"l2_norm": norms, "n_nonfinite": np.arange(N) % 3}
        writer.write("x", np.ones((N, 8), np.float32), rows=np.arange(N), statistics=statistics)
    with Reader(tmp_path / "a.strap") as reader:
        found = reader["x"]
        kept = [r for b in found.scan(["row"], where=pc.field("l2_norm") >= 90) for r in b["row"].to_pylist()]
        assert kept == list(range(90, N))
        sizes = [len(b) for b in found.scan(batch_size=7, limit=20, where=pc.field("n_nonfinite") == 1)]
        assert sizes == [7, 7, 6]
        assert list(found.scan(limit=0)) == []
        assert next(found.scan(["n_nonfinite", "row"])).schema.names == ["n_nonfinite", "row"]
        with pytest.raises(ArgumentError, match="no columns"):
            list(found.scan(["activations"]))
        for wrong in (0, -1, 1.5, "a", True):
            with pytest.raises(ArgumentError, match="batch_size: expected a whole number of at least 1"):
                found.scan(batch_size=wrong)
        for wrong in (-1, 1.5, "a", True):
            with pytest.raises(ArgumentError, match="limit: expected a whole number of at least 0"):
                found.scan(limit=wrong)
        assert [len(b) for b in found.scan(batch_size=np.int64(60), limit=torch.tensor(70))] == [60, 10]
        for where in (pc.field("nope") > 25, pc.field("l2_norm"), pc.field("l2_norm") > "a"):
            with pytest.raises(
                ArgumentError, match=r"where: expected a condition over the columns activation"
            ):
                found.scan(where=where)
        assert next(found.scan("row")).schema.names == ["row"]
        assert found.to_arrow("row").column_names == ["row"]
        for columns in (5, [5], [None], b"row"):
            with pytest.raises(ArgumentError, match="columns: expected a name or a list of names"):
                found.to_arrow(columns)
        table = found.to_arrow(["row", "l2_norm"])
        assert table.num_rows == N
        field = found.to_arrow().schema.field("activation")
        assert field.metadata[b"ARROW:extension:name"] == b"strapfmt.tensor"
        assert pa.types.is_fixed_size_list(field.type)


@pytest.mark.parametrize("wrong", ["x", 0, 1, [True]])
def test_copy_is_true_false_or_none(tmp_path: Path, wrong: Any) -> None:
    write(tmp_path / "a.strap", site_of())
    with Reader(tmp_path / "a.strap") as reader, pytest.raises(ArgumentError, match="copy: expected"):
        reader["x"].tensor(copy=wrong)


def test_in_says_what_to_ask(tmp_path: Path) -> None:
    write(tmp_path / "a.strap", site_of())
    with Reader(tmp_path / "a.strap") as reader, pytest.raises(ArgumentError, match=r"`3 in site\.rows`"):
        3 in reader["x"]  # noqa: B015


def test_batches_are_hashed_when_first_touched(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a.strap")
    with Reader(tmp_path / "a.strap") as reader:
        site: Site = reader["blocks.0.resid_post"]
        n_bytes = site.n_unverified_bytes
        site.take(site.rows)
        assert 0 < site.n_unverified_bytes <= n_bytes
        site.verify_batches(0, 1)
        after_one = site.n_unverified_bytes
        assert after_one < n_bytes
        list(site.scan(["row"]))
        assert site.n_unverified_bytes == 0


def test_a_limited_scan_touches_no_batch_behind_its_end(tmp_path: Path) -> None:
    write(tmp_path / "a.strap", site_of(), batch_bytes=256)
    with Reader(tmp_path / "a.strap") as reader:
        site = reader["x"]
        first = int(site.batch_ordinals[1])
        n_bytes = site.n_unverified_bytes
        assert sum(len(batch) for batch in site.scan(limit=first)) == first
        assert site.n_unverified_bytes == n_bytes - int(site.spec.row_bytes * first + 8 * first)


def test_threads_may_share_a_reader(tmp_path: Path) -> None:
    model = make_dataset(tmp_path / "a.strap", n_steps=12, shard_bytes=1500).model(12)
    name, expected = "blocks.0.resid_post", model.contents()
    values, wrong = model.values(name), list[str]()

    def read(reader: Reader) -> None:
        site = reader[name]
        if bits(site.take(site.rows[::-1].copy())) != values[::-1].tobytes():
            wrong.append("take()")
        if contents_of(reader) != expected:
            wrong.append("to_arrow()")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(25):
            with Reader(tmp_path / "a.strap", verify="always") as reader, ThreadPoolExecutor(4) as threads:
                for done in [threads.submit(read, reader) for _ in range(4)]:
                    done.result()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def test_reading_needs_no_descriptors(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a.strap", n_steps=12, shard_bytes=1500)
    n_open = len(os.listdir("/proc/self/fd"))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Reader(tmp_path / "a.strap") as reader:
        kept = [reader[name].to_arrow() for name in reader.names]
        assert len(os.listdir("/proc/self/fd")) == n_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 8, before[1]))
        try:
            assert all(len(table) for table in kept)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_writing_by_force_into_what_says_read_only_crashes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.strap", site_of())
    code = """
import sys, warnings, torch, strapfmt
warnings.simplefilter("ignore")
site = strapfmt.open(sys.argv[1])["x"]
column = site.to_arrow(["activation"])["activation"].chunk(0).flatten().to_numpy(zero_copy_only=True)
torch.from_numpy(column).zero_()
print(bool(site.tensor().view(torch.int32).any()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.strap")], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
