"""The golden datasets: valid ones read as recorded, others are refused, a rebuild gives the same bytes."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from small_datasets import taken

from strapfmt.arrowfile import digest
from strapfmt.dtypes import get_dtype
from strapfmt.errors import (
    CorruptError,
    DatasetChangedError,
    DatasetNotFoundError,
    StrapfmtError,
    UnsupportedError,
)
from strapfmt.manifest import Manifest
from strapfmt.reader import Reader
from strapfmt.site import Site
from strapfmt.verify import verify

VECTORS = Path(__file__).resolve().parents[1] / "spec" / "vectors" / "v1"
VALID = sorted(VECTORS.glob("valid/*.strap"), key=lambda path: path.name)
REFUSED = sorted(VECTORS.glob("refused/*.strap"), key=lambda path: path.name)
ERRORS = {
    "corrupt": (CorruptError,),
    "unsupported": (UnsupportedError,),
    "missing": (DatasetNotFoundError, DatasetChangedError),
}


def _document(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


def _name(path: Path) -> str:
    return path.stem


def _expected_bits(entry: dict[str, Any], dtype: np.dtype[Any]) -> list[bytes]:
    """Return the bytes of each row."""
    if isinstance(entry["activation"], list):
        return [bytes.fromhex(row) for row in entry["activation"]]
    counting = entry["activation"]["counting"]
    n, width = counting["n_rows"], counting["row_values"]
    values = np.arange(n * width, dtype=f"<u{dtype.itemsize}").reshape(n, width)
    return [row.tobytes() for row in values]


def _bytes_of_rows(table: pa.Table) -> list[bytes]:
    return [
        np.ascontiguousarray(row.values.to_numpy(zero_copy_only=False)).tobytes()
        for row in table["activation"]
    ]


def _tensor_bytes(tensor: torch.Tensor) -> list[bytes]:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    size = len(data) // max(len(tensor), 1)
    return [data[i * size : (i + 1) * size] for i in range(len(tensor))]


def _check_site(site: Site, entry: dict[str, Any]) -> None:
    described = (site.dtype, list(site.shape), site.row_space, site.codec, site.layout.kind)
    assert described == tuple(entry[key] for key in ("dtype", "shape", "row_space", "codec", "layout"))
    bits = _expected_bits(entry, get_dtype(site.dtype).numpy)
    table = site.to_arrow()
    assert site.rows.tolist() == entry["rows"]
    assert table["row"].to_pylist() == entry["rows"]
    assert _bytes_of_rows(table) == bits
    for name in ("token_row", "call"):
        if name in entry:
            assert table[name].to_pylist() == entry[name]
    assert set(site.statistics) == set(entry["statistics"])
    for name, column in entry["statistics"].items():
        assert [value.tobytes().hex() for value in table[name].to_numpy()] == column, name
    if site.is_ragged:
        assert table["shape"].to_pylist() == entry["shape_column"]
        return
    assert _tensor_bytes(site.tensor()) == bits
    if bits:
        order = np.random.default_rng(0).permutation(len(bits))
        assert _tensor_bytes(taken(site, site.rows[order])) == [bits[i] for i in order]
        assert _tensor_bytes(site[1:]) == bits[1:]


def test_vectors_are_there() -> None:
    assert {"dtypes", "all-bits", "layouts", "ragged", "unclean", "future"} <= {path.stem for path in VALID}
    assert len(VALID) >= 13
    assert len(REFUSED) >= 65


@pytest.mark.parametrize("path", [*VALID, *REFUSED], ids=_name)
def test_files_are_the_ones_that_were_published(path: Path) -> None:
    files = {
        str(file.relative_to(path)): digest(file.read_bytes()).hex()
        for file in path.rglob("*")
        if file.is_file()
    }
    assert files == _document(path)["files"]


@pytest.mark.parametrize("path", VALID, ids=_name)
def test_valid_dataset_reads_as_recorded(path: Path) -> None:
    expected = _document(path)
    with Reader(path, verify="always") as reader:
        assert reader.ranks == expected["ranks"]
        assert all(manifest.is_clean for manifest in reader.manifests.values()) == expected["is_clean"]
        assert set(reader.names) == {*expected["sites"], *expected["refused_sites"]}
        for name, entry in expected["sites"].items():
            _check_site(reader[name], entry)
        for name, error in expected["refused_sites"].items():
            with pytest.raises(ERRORS[error]):
                reader[name].to_arrow()
        for name, view in reader.tables.items():
            columns = expected["tables"].get(name, {})
            assert len(view) == len(next(iter(columns.values()), []))
            if columns:
                assert view.to_arrow().to_pydict() == columns


@pytest.mark.parametrize("path", VALID, ids=_name)
def test_verify_finds_nothing_wrong_with_a_valid_dataset(path: Path) -> None:
    report = verify(path)
    refused = _document(path)["refused_sites"]
    assert all(any(repr(name) in problem for name in refused) for problem in report.problems), report


@pytest.mark.parametrize("path", [path for path in VALID if path.stem != "future"], ids=_name)
def test_manifests_are_encoded_byte_for_byte(path: Path) -> None:
    for file in path.glob("rank-*/manifest.json"):
        data = file.read_bytes()
        assert Manifest.decode(data, str(file)).encode() == data


def _read_everything(path: Path) -> None:
    with Reader(path, verify="always") as reader:
        for name in reader:
            reader[name].to_arrow()
            if not reader[name].is_ragged:
                reader[name].tensor()
        for table in reader.tables.values():
            table.to_arrow()


@pytest.mark.parametrize("path", [path for path in REFUSED if _document(path)["when"] != "verify"], ids=_name)
def test_refused_dataset_is_refused(path: Path) -> None:
    expected = _document(path)
    with pytest.raises(StrapfmtError) as caught:
        (Reader if expected["when"] == "open" else _read_everything)(path)
    assert isinstance(caught.value, ERRORS[expected["error"]]), repr(caught.value)
    assert str(path) in str(caught.value), "the message says where"


@pytest.mark.parametrize("path", REFUSED, ids=_name)
def test_verify_reports_a_refused_dataset(path: Path) -> None:
    try:
        assert not verify(path).valid
    except (DatasetNotFoundError, DatasetChangedError):
        assert _document(path)["error"] == "missing"


def test_a_later_version_may_be_read_and_not_appended_to(tmp_path: Path) -> None:
    from strapfmt.writer import DatasetWriter

    path = tmp_path / "future.strap"
    shutil.copytree(VECTORS / "valid" / "future.strap", path)
    before = {file: file.read_bytes() for file in path.rglob("manifest.json")}
    with pytest.raises(UnsupportedError, match="must not append"):
        DatasetWriter(path, mode="append")
    assert {file: file.read_bytes() for file in path.rglob("manifest.json")} == before


def test_a_rebuild_gives_the_same_bytes(tmp_path: Path) -> None:
    recorded = json.loads((VECTORS / "vectors.json").read_text())
    if recorded["pyarrow"] != pa.__version__:
        pytest.skip(
            f"built with PyArrow {recorded['pyarrow']}, this is {pa.__version__}: Arrow may encode otherwise"
        )
    spec = importlib.util.spec_from_file_location("build", VECTORS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(VECTORS))
    try:
        spec.loader.exec_module(module)
        module.build(tmp_path)
    finally:
        sys.path.remove(str(VECTORS))
        sys.modules.pop("forging", None)
    for kind in ("valid", "refused"):
        stored = {str(f.relative_to(VECTORS)): f for f in (VECTORS / kind).rglob("*") if f.is_file()}
        rebuilt = {str(f.relative_to(tmp_path)): f for f in (tmp_path / kind).rglob("*") if f.is_file()}
        assert set(stored) == set(rebuilt)
        assert not [name for name, file in stored.items() if file.read_bytes() != rebuilt[name].read_bytes()]
