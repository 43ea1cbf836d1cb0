"""Files opened without strapfmt: pyarrow, polars, DuckDB, JavaScript, and NumPy by the arithmetic of the specification.

What they read are golden datasets; what they must find was recorded when those were written.
"""

import io
import json
import shutil
import struct
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.ipc
import pytest

from strapfmt.dtypes import DTYPES

VALID = Path(__file__).resolve().parents[1] / "spec" / "vectors" / "v1" / "valid"
JS = Path(__file__).resolve().parent / "js"
STATISTICS = ("l2_norm", "mean", "std", "abs_max")
COMPRESSED = [("layouts", "lz4"), ("layouts", "zstd"), ("ragged", "attn.lz4"), ("ragged", "attn.zstd")]


@cache
def _expected(dataset: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((VALID / f"{dataset}.json").read_text())
    return found


@cache
def _manifest(dataset: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        next((VALID / f"{dataset}.strap").glob("rank-*/manifest.json")).read_bytes()
    )
    return found


def _files(dataset: str, site: str, role: str = "data") -> list[Path]:
    """Return the files of a site as its manifest lists them."""
    entry = next(entry for entry in _manifest(dataset)["sites"] if entry["name"] == site)
    parts = [part for shard in entry["shards"] for part in shard["parts"] if part["role"] == role]
    return [VALID / f"{dataset}.strap" / "rank-00000" / part["file"] for part in parts]


def _sites() -> Iterator[tuple[str, str]]:
    for dataset in ("dtypes", "all-bits", "layouts", "ragged", "own-rows", "appended"):
        for site in _expected(dataset)["sites"]:
            yield dataset, site


SITES = list(_sites())


def _rows_of(dataset: str, site: str) -> list[bytes]:
    """Return the bytes of each row that was written."""
    entry = _expected(dataset)["sites"][site]
    if isinstance(entry["activation"], list):
        return [bytes.fromhex(row) for row in entry["activation"]]
    counting = entry["activation"]["counting"]
    n, width = counting["n_rows"], counting["row_values"]
    values = np.arange(n * width).astype(f"<u{DTYPES[entry['dtype']].item_bytes}").reshape(n, width)
    return [row.tobytes() for row in values]


def _check(table: pa.Table, dataset: str, site: str) -> None:
    entry = _expected(dataset)["sites"][site]
    table.validate(full=True)
    assert table["row"].to_pylist() == entry["rows"]
    found = [row.values.to_numpy(zero_copy_only=False).tobytes() for row in table["activation"]]
    assert found == _rows_of(dataset, site)
    for name, column in entry["statistics"].items():
        assert [value.tobytes().hex() for value in table[name].to_numpy()] == column
    if "shape_column" in entry:
        assert table["shape"].to_pylist() == entry["shape_column"]
    if "token_row" in entry:
        assert table["token_row"].to_pylist() == entry["token_row"]
        assert table["call"].to_pylist() == entry["call"]


# pyarrow.


@pytest.mark.parametrize(("dataset", "site"), SITES)
def test_pyarrow_opens_a_sealed_shard_as_a_file(dataset: str, site: str) -> None:
    tables = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in _files(dataset, site)]
    _check(pa.concat_tables(tables), dataset, site)


@pytest.mark.parametrize(("dataset", "site"), SITES)
def test_pyarrow_opens_a_sealed_shard_as_a_stream_from_byte_8(dataset: str, site: str) -> None:
    tables = [pa.ipc.open_stream(file.read_bytes()[8:]).read_all() for file in _files(dataset, site)]
    _check(pa.concat_tables(tables), dataset, site)


@pytest.mark.parametrize("site", ["x", "z", "small"])
def test_pyarrow_opens_an_unsealed_shard_as_a_stream_and_its_tail_as_a_file(site: str) -> None:
    entry = next(entry for entry in _manifest("unclean")["sites"] if entry["name"] == site)
    root = VALID / "unclean.strap" / "rank-00000"
    tables = []
    for shard in entry["shards"]:
        parts = {part["role"]: part for part in shard["parts"]}
        data = (root / parts["data"]["file"]).read_bytes()
        if shard["is_sealed"]:
            tables.append(pa.ipc.open_file(data).read_all())
            continue
        with pytest.raises(pa.ArrowInvalid):
            pa.ipc.open_file(data)
        tables.append(pa.ipc.open_stream(data[8 : parts["data"]["n_bytes"]]).read_all())
        tables.append(pa.ipc.open_file((root / parts["tail"]["file"]).read_bytes()).read_all())
    _check(pa.concat_tables(tables), "unclean", site)


def test_pyarrow_sees_dtype_and_shape_as_an_extension_type() -> None:
    schema = pa.ipc.open_file(_files("layouts", "rows.bf16")[0].read_bytes()).schema
    metadata = schema.field("activation").metadata
    assert metadata[b"ARROW:extension:name"] == b"strapfmt.tensor"
    assert json.loads(metadata[b"ARROW:extension:metadata"]) == {"dtype": "bfloat16", "shape": [2, 16]}


@pytest.mark.parametrize("site", ["rows.f32", "rows.bf16", "strided.f32", "lz4", "zstd"])
def test_pyarrow_dataset_pushes_filters_and_columns_down(site: str) -> None:
    files = [str(file) for file in _files("layouts", site)]
    dataset = pads.dataset(files, format="ipc")
    entry = _expected("layouts")["sites"][site]
    wanted = [row for row in entry["rows"] if 20 <= row < 200]
    found = dataset.to_table(
        columns=["row", "l2_norm"], filter=(pads.field("row") >= 20) & (pads.field("row") < 200)
    )
    assert found["row"].to_pylist() == wanted
    assert dataset.count_rows() == len(entry["rows"])
    _check(dataset.to_table(), "layouts", site)


def test_native_half_floats_are_numbers_to_pyarrow() -> None:
    table = pa.ipc.open_file(_files("all-bits", "float16")[0].read_bytes()).read_all()
    assert table.schema.field("activation").type.value_type == pa.float16()
    assert table["activation"][0].as_py()[:3] == [0.0, 5.960464477539063e-08, 1.1920928955078125e-07]


# polars.


@pytest.mark.parametrize(("dataset", "site"), SITES)
def test_polars_reads_and_scans(dataset: str, site: str) -> None:
    entry = _expected(dataset)["sites"][site]
    files = _files(dataset, site)
    scanned = pl.scan_ipc(files).collect()
    read = pl.concat([pl.read_ipc(file) for file in files])
    for frame in (scanned, read):
        assert frame["row"].to_list() == entry["rows"]
        for name in STATISTICS:
            if name in entry["statistics"]:
                expected = np.frombuffer(bytes.fromhex("".join(entry["statistics"][name])), "<f4")
                np.testing.assert_array_equal(frame[name].to_numpy(), expected)
        stored = frame["activation"].ext.storage()
        assert [row.to_numpy().tobytes() for row in stored] == _rows_of(dataset, site)


def test_polars_pushes_filters_and_columns_down() -> None:
    frame = (
        pl.scan_ipc(_files("layouts", "rows.f32"))
        .filter(pl.col("row") > 180)
        .select("row", "l2_norm")
        .collect()
    )
    assert frame["row"].to_list() == [
        row for row in _expected("layouts")["sites"]["rows.f32"]["rows"] if row > 180
    ]


# NumPy, and nothing else.


@pytest.mark.parametrize("site", ["rows.f32", "rows.bf16", "scalar"])
def test_numpy_gathers_rows_by_the_arithmetic_of_the_specification(site: str) -> None:
    manifest = json.loads((VALID / "layouts.strap/rank-00000/manifest.json").read_bytes())
    entry = next(entry for entry in manifest["sites"] if entry["name"] == site)
    item = {"float32": 4, "bfloat16": 2}[entry["dtype"]]
    row_bytes = item * int(np.prod(entry["shape"]))
    found: list[bytes] = []
    for shard in entry["shards"]:
        parts = {part["role"]: VALID / "layouts.strap/rank-00000" / part["file"] for part in shard["parts"]}
        index = parts["index"].read_bytes()
        (n_batches,) = struct.unpack_from("<Q", index, 16)
        starts, firsts = [], []
        for number in range(n_batches):
            offset, header_bytes, _, _, _, first = struct.unpack_from("<QIIQQQ", index, 128 + 96 * number)
            starts.append((offset + header_bytes) // row_bytes)
            firsts.append(first)
        file = np.memmap(parts["data"], np.uint8, "r")
        rows = file[: len(file) // row_bytes * row_bytes].reshape(
            -1, row_bytes
        )  # the whole shard, one 2-D array
        k = np.arange(shard["n_rows"])
        b = k // entry["layout"]["batch_rows"]
        found += [row.tobytes() for row in rows[np.array(starts)[b] + k - np.array(firsts)[b]]]
    assert found == _rows_of("layouts", site)


# DuckDB.


def test_duckdb_queries_files_through_pyarrow() -> None:
    site = pads.dataset([str(file) for file in _files("layouts", "rows.f32")], format="ipc")
    with duckdb.connect() as connection:
        connection.register("site", site)
        found = connection.execute("SELECT count(*), min(row), max(row) FROM site WHERE row >= 20").fetchall()
        norms = connection.execute(
            "SELECT max(abs(l2_norm - sqrt(list_sum(list_transform(activation, lambda x: x * x))))) FROM site"
        ).fetchall()
    rows = [row for row in _expected("layouts")["sites"]["rows.f32"]["rows"] if row >= 20]
    assert found == [(len(rows), rows[0], rows[-1])]
    assert norms[0][0] < 1e-4


def test_duckdb_needs_half_floats_selected_away_or_cast() -> None:
    table = pa.ipc.open_file(_files("ragged", "attn.none")[0].read_bytes()).read_all()
    with duckdb.connect() as connection, pytest.raises(duckdb.NotImplementedException, match="Arrow Type e"):
        connection.register("whole", table)
    cast = table.set_column(0, "activation", table["activation"].cast(pa.list_(pa.float32())))
    with duckdb.connect() as connection:
        connection.register("small", table.select(["row", "l2_norm"]))
        connection.register("floats", cast)
        (norm,) = connection.execute("SELECT max(l2_norm) FROM small").fetchall()
        (same,) = connection.execute(
            "SELECT max(sqrt(list_sum(list_transform(activation, lambda x: x * x)))) FROM floats"
        ).fetchall()
    assert same[0] == pytest.approx(norm[0], rel=1e-5)


# JavaScript.


@cache
def _read_by_node(*, codecs: bool) -> dict[str, Any]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed, so the npm package apache-arrow cannot be tried")
    if not (JS / "node_modules" / "apache-arrow").is_dir():
        pytest.skip("apache-arrow is not installed: run npm install in tests/js, or make js")
    files = [str(file) for dataset, site in SITES for file in _files(dataset, site)]
    command = [node, str(JS / "read.mjs"), *(["--codecs"] if codecs else []), *files]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60)
    return dict(json.load(io.BytesIO(done.stdout)))


def _javascript(dataset: str, site: str) -> dict[str, list[Any]]:
    """Return the columns of a site as arrow-js reads them."""
    found = _read_by_node(codecs=True)
    columns: dict[str, list[Any]] = {}
    for file in _files(dataset, site):
        read = found[str(file)]
        assert "error" not in read, read
        assert read["isFile"]
        assert read["extension"] == "strapfmt.tensor"
        for name, values in read["columns"].items():
            columns.setdefault(name, []).extend(values)
    return columns


@pytest.mark.parametrize(("dataset", "site"), SITES)
def test_arrow_js_reads_every_site(dataset: str, site: str) -> None:
    entry = _expected(dataset)["sites"][site]
    columns = _javascript(dataset, site)
    assert columns["row"] == entry["rows"]
    assert columns["activation"] == [row.hex() for row in _rows_of(dataset, site)]
    for name in STATISTICS:
        if name in entry["statistics"]:
            assert columns[name] == entry["statistics"][name]
    if "n_nonfinite" in entry["statistics"]:
        counts = [
            int.from_bytes(bytes.fromhex(value), "little") for value in entry["statistics"]["n_nonfinite"]
        ]
        assert columns["n_nonfinite"] == counts
    if "shape_column" in entry:
        assert columns["shape"] == [struct.pack("<2i", *shape).hex() for shape in entry["shape_column"]]
    if "token_row" in entry:
        assert columns["token_row"] == entry["token_row"]


@pytest.mark.parametrize(("dataset", "site"), COMPRESSED)
def test_arrow_js_asks_for_a_codec_where_a_site_is_compressed(dataset: str, site: str) -> None:
    found = _read_by_node(codecs=False)[str(_files(dataset, site)[0])]
    assert "codec not found" in found["error"]
