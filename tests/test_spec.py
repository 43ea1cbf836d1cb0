"""The specification says what the code does: constants, tables, layouts in bytes, examples, the manifest's schema."""

import ast
import json
import re
import struct
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pytest
import xxhash

from strapfmt import index as index_module
from strapfmt import spec
from strapfmt.arrowfile import digest
from strapfmt.codecs import CODECS
from strapfmt.dtypes import DTYPES
from strapfmt.errors import CorruptError, UnsupportedError
from strapfmt.index import BATCH_DTYPE, RUN_DTYPE, ShardIndex
from strapfmt.manifest import COUNTERS, LAYOUTS, ROLES, Manifest, Part, Shard, file_slug
from strapfmt.schema import ROW_SPACES, TABLE_SCHEMAS, SiteSpec, site_schema
from strapfmt.writer import DatasetWriter

ROOT = Path(__file__).resolve().parents[1] / "spec"
TEXT = (ROOT / "strapfmt-1.md").read_text()
SCHEMA = json.loads((ROOT / "manifest.schema.json").read_text())
VECTORS = ROOT / "vectors" / "v1"
EXAMPLE = VECTORS / "valid" / "layouts.strap" / "rank-00000"


def _section(heading: str) -> str:
    """Return the text below a heading, up to the next one of its level or above."""
    start = TEXT.index(f"\n{heading}")
    level = heading.split()[0]
    end = re.search(rf"\n#{{2,{len(level)}}} ", TEXT[start + len(heading) :])
    return TEXT[start:][: len(heading) + end.start()] if end else TEXT[start:]


def _tables(text: str) -> list[list[list[str]]]:
    """Return the cells of every Markdown table, heads and rules left out."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        line = line.strip()
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])]
        if not inside:
            tables.append([])
        elif not set(line) <= set("|- "):
            tables[-1].append(cells)
        inside = True
    return tables


def _code(cell: str) -> str:
    return cell.strip("`")


# Constants and tables.


def test_constants_are_those_of_the_code() -> None:
    (rows,) = _tables(_section("## 20 Constants"))
    stated = {_code(name): ast.literal_eval(value.strip("`").replace("\\|", "|")) for name, value, _ in rows}
    assert stated == {name: getattr(spec, name) for name in spec.__all__}


def test_every_number_spelled_in_the_text_is_a_constant() -> None:
    assert f"0 to {spec.MAX_RANK}," in TEXT
    assert f"last {spec.MANIFEST_HASH_SUFFIX_BYTES} bytes" in TEXT
    assert f"1 to {spec.MAX_NAME_BYTES} bytes" in TEXT
    assert f"rank << {spec.RANK_SHIFT} | n" in TEXT
    assert spec.IPC_END.hex(" ") in TEXT
    units = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    (rows,) = _tables(_section("## 16 Limits"))
    limits = {}
    for what, limit in rows:
        number, _, unit = limit.partition(" ")
        power = re.fullmatch(r"2\^(\d+)( - 1)?", limit)
        limits[what] = (1 << int(power[1])) - bool(power[2]) if power else int(number) * units.get(unit, 1)
    assert limits == {
        "manifest": spec.MAX_MANIFEST_BYTES,
        "index": spec.MAX_INDEX_BYTES,
        "header of a record batch": spec.MAX_HEADER_BYTES,
        "decompressed record batch": spec.MAX_BATCH_BYTES,
        "name of a site": spec.MAX_NAME_BYTES,
        "dimensions of a row": spec.MAX_NDIM,
        "values in a row": spec.MAX_ROW_VALUES,
        "sites in a manifest": spec.MAX_SITES,
        "shards of a site": spec.MAX_SHARDS,
        "parts of a shard": spec.MAX_PARTS,
        "`batch_rows`": spec.MAX_BATCH_ROWS,
        "ranks": spec.MAX_RANK + 1,
        "ids of one kind in a rank": 1 << spec.COUNTER_BITS,
        "any other integer in a manifest": 1 << 62,
    }


def test_element_types_are_those_of_the_code() -> None:
    (rows,) = _tables(_section("### 4.2 Element types"))
    stated = {_code(name): (_code(storage), int(size)) for name, storage, size, _ in rows}
    assert stated == {name: (dtype.storage, dtype.item_bytes) for name, dtype in DTYPES.items()}


def test_site_columns_are_those_of_the_code() -> None:
    (rows,) = _tables(_section("### 4.1 Columns"))
    stated = [_code(name) for name, _, _ in rows]
    site = SiteSpec(name="x", dtype="bfloat16", shape=(2, -1), row_space="own")
    schema = site_schema(site)
    assert stated == schema.names
    kinds = {
        "activation": pa.list_(pa.field("item", pa.uint16(), nullable=False)),
        "shape": pa.list_(pa.field("item", pa.int32(), nullable=False), 2),
    }
    for name, kind, _ in rows:
        field = schema.field(_code(name))
        expected = kinds.get(_code(name))
        if expected is None:
            expected = pa.type_for_alias(_code(kind.split(",")[0]))
        assert field.type == expected, name
        assert field.nullable == ("nullable" in kind), name


def test_extension_metadata_is_as_stated() -> None:
    schema = site_schema(SiteSpec(name="x", dtype="bfloat16", shape=(2048,), statistics=()))
    metadata = schema.field("activation").metadata
    assert metadata[b"ARROW:extension:name"].decode() == spec.EXTENSION_NAME
    assert metadata[b"ARROW:extension:metadata"].decode() in _section("### 4.1 Columns")
    members = [_code(row[0]) for row in _tables(_section("### 10.3 Members of a site"))[0]]
    described = json.loads(schema.metadata[spec.SPEC_KEY.encode()])
    assert list(described) == members[: members.index("hook_point") + 1]
    assert schema.metadata[spec.VERSION_KEY.encode()] == b"1"


def test_tables_are_those_of_the_code() -> None:
    text = _section("## 5 Tables")
    names = re.findall(r"^\*\*(\w+)\*\*:", text, re.MULTILINE)
    assert tuple(names) == spec.TABLES == tuple(TABLE_SCHEMAS)
    for name, rows in zip(names, _tables(text), strict=True):
        stated = {_code(column): kind for column, kind, _ in rows}
        actual = {
            field.name: str(field.type).replace("item: ", "") + ("?" if field.nullable else "")
            for field in TABLE_SCHEMAS[name]
        }
        assert stated == actual, name


def test_codecs_layouts_roles_and_row_spaces_are_those_of_the_code() -> None:
    (codecs,) = _tables(_section("## 9 Codecs"))
    assert {_code(name): views == "yes" for name, _, views in codecs} == {
        name: codec.is_plain for name, codec in CODECS.items()
    }
    (layouts,) = _tables(_section("### 8.1 Kinds"))
    assert tuple(_code(row[0]) for row in layouts) == LAYOUTS
    assert ", ".join(f"`{role}`" for role in ROLES) in _section("### 10.4 Members")
    assert " or ".join(f"`{space}`" for space in ROW_SPACES) in _section("### 10.3 Members")
    assert ", ".join(f"`{name}`" for name in COUNTERS) in _section("### 10.2 Members")


def test_statistics_are_those_of_the_code() -> None:
    (rows,) = _tables(_section("### 4.4 Statistics"))
    assert tuple(_code(row[0]) for row in rows) == spec.STATISTICS


def test_statistics_follow_their_definitions() -> None:
    import torch

    from strapfmt_capture.statistics import RowStatistics

    values = torch.tensor(
        [[3.0, -4.0, 0.0, 1.0], [float("nan"), 2.0, float("-inf"), 6.0], [float("nan")] * 4]
    )
    found = RowStatistics()(values)
    root = np.sqrt
    expected = {
        "l2_norm": [root(26), root(40), 0],
        "mean": [0, 4, np.nan],
        "std": [root(26 / 4), 2, np.nan],
        "abs_max": [4, 6, 0],
        "n_nonfinite": [0, 2, 4],
    }
    assert list(found) == list(expected)
    for name, column in expected.items():
        np.testing.assert_allclose(found[name], column, rtol=1e-5, atol=1e-6, err_msg=name)


def test_members_of_the_manifest_are_those_written() -> None:
    manifest = json.loads((EXAMPLE / spec.MANIFEST_NAME).read_bytes())
    shard = manifest["sites"][0]["shards"][0]
    members = _section("### 10.4 Members")
    for rows, written in (
        (_tables(_section("### 10.2 Members"))[0], manifest),
        (_tables(_section("### 10.3 Members"))[0], manifest["sites"][0]),
        (_tables(members)[0], shard),
        (_tables(members)[1], shard["parts"][0]),
    ):
        stated = [_code(name) for row in rows for name in row[0].split(", ")]
        assert sorted(stated) == sorted(written)


def test_slugs_are_as_stated() -> None:
    (rows, files) = _tables(_section("## 2 Directory and names"))
    assert {_code(name): _code(slug) for name, slug in rows} == {
        _code(name): file_slug(_code(name)) for name, _ in rows
    }
    suffixes = {
        "NNNNNN" + spec.DATA_SUFFIX,
        "NNNNNN" + spec.OPEN_SUFFIX,
        "NNNNNN.cK" + spec.TAIL_SUFFIX,
        "NNNNNN" + spec.INDEX_SUFFIX,
        "NNNNNN.cK" + spec.INDEX_SUFFIX,
    }
    assert {_code(name) for name, _ in files} == suffixes


@pytest.mark.parametrize(
    "name", ["a", "_x", "-", "..", "A" * 300, "é" * 512, "x/y", "a.", "CON", "\n", "._-", "x~y"]
)
def test_slugs_are_paths_that_readers_accept(name: str) -> None:
    pattern = re.compile(_code(re.search(r"MUST match\s+(`[^`]+`)", TEXT)[1]))  # type: ignore[index]
    assert pattern.fullmatch(f"sites/{file_slug(name)}/000000.arrow")
    assert pattern.pattern == SCHEMA["$defs"]["part"]["properties"]["file"]["pattern"][1:-1]


# The index.


def _fields(rows: list[list[str]]) -> dict[str, tuple[int, int]]:
    return {
        _code(name): (int(offset), int(size)) for offset, size, name, _ in rows if name and size.isdigit()
    }


def test_index_is_laid_out_as_stated() -> None:
    header, entry, run = _tables(_section("## 7 Index"))
    for rows, dtype in ((entry, BATCH_DTYPE), (run, RUN_DTYPE)):
        stated = _fields(rows)
        assert stated == {name: (offset, kind.itemsize) for name, (kind, offset) in dtype.fields.items()}
        letters = {"u4": "<u4", "u8": "<u8", "i8": "<i8"}
        for _, _, name, meaning in rows:
            kind = meaning.split("`")[1] if meaning.startswith("`") else ""
            assert dtype[_code(name)].str == letters.get(kind, "|V16"), name
    assert BATCH_DTYPE.itemsize == spec.INDEX_BATCH_BYTES
    assert RUN_DTYPE.itemsize == spec.INDEX_RUN_BYTES
    fields = _fields([row for row in header if row[0].isdigit()])
    assert index_module._HEADER.size == spec.INDEX_HEADER_BYTES
    ends = [offset + size for offset, size in fields.values()]
    assert [offset for offset, _ in fields.values()] == [0, *ends[:-1]], "no gaps"
    data = (EXAMPLE / "sites/rows.f32/000000.idx").read_bytes()
    decoded = ShardIndex.decode(data, "index")
    formats = {4: "<I", 8: "<Q"}
    for name in ("n_rows", "prefix_bytes", "trailer_offset", "trailer_bytes"):
        offset, size = fields[name]
        assert struct.unpack_from(formats[size], data, offset)[0] == getattr(decoded, name)
    for name in ("prefix_hash", "trailer_hash"):
        offset, size = fields[name]
        assert data[offset : offset + size] == getattr(decoded, name)
    assert struct.unpack_from("<IIQQ", data, 8) == (1, 1, len(decoded.batches), len(decoded.runs))


# Worked examples, computed here from the text alone: NumPy, xxhash and the files.


def _h(data: bytes) -> bytes:
    return xxhash.xxh3_128(data, seed=0).digest()


def _example() -> tuple[dict[str, Any], bytes, bytes]:
    manifest = json.loads((EXAMPLE / "manifest.json").read_bytes())
    site = next(site for site in manifest["sites"] if site["name"] == "rows.f32")
    parts = {part["role"]: part for part in site["shards"][0]["parts"]}
    data, index = ((EXAMPLE / parts[role]["file"]).read_bytes() for role in ("data", "index"))
    return site, data, index


def test_worked_byte_count() -> None:
    _, _, index = _example()
    n_batches, n_runs = struct.unpack_from("<QQ", index, 16)
    stated = re.search(r"128 \+ (\d+) \* 96 \+ (\d+) \* 16 \+ 16 = (\d+) bytes", TEXT)
    assert stated is not None
    assert tuple(map(int, stated.groups())) == (n_batches, n_runs, len(index))


def test_worked_address() -> None:
    site, data, index = _example()
    starts = []
    for number in range(2):
        offset, header, _ = struct.unpack_from("<QII", index, 128 + 96 * number)
        starts.append(offset + header)
        assert f"{offset} + {header} = {starts[-1]}" in TEXT
    row_bytes = 16 * 4
    s = [start // row_bytes for start in starts]
    assert f"`s` = {s[0]} and {s[1]} (a stride of {s[1] - s[0]} array rows" in TEXT
    p = s[1] + (100 - site["layout"]["batch_rows"])
    assert f"its activation lies at bytes {p * row_bytes} to {(p + 1) * row_bytes}" in TEXT
    expected = json.loads((VECTORS / "valid" / "layouts.json").read_text())["sites"]["rows.f32"]["activation"]
    assert data[p * row_bytes : (p + 1) * row_bytes].hex() == expected[100]


def test_hashes_are_made_as_stated() -> None:
    site, data, index = _example()
    assert index[-16:] == _h(index[:-16])
    n_batches = struct.unpack_from("<Q", index, 16)[0]
    prefix_bytes, prefix_hash = struct.unpack_from("<Q16s", index, 40)
    trailer_offset, trailer_bytes, trailer_hash = struct.unpack_from("<QQ16s", index, 64)
    assert prefix_hash == _h(data[:prefix_bytes])
    assert trailer_hash == _h(data[trailer_offset:])
    assert trailer_offset + trailer_bytes == len(data)
    joined = prefix_hash
    for number in range(n_batches):
        at = 128 + 96 * number
        offset, header_bytes, _, body_bytes = struct.unpack_from("<QIIQ", index, at)
        header = data[offset : offset + header_bytes]
        body = data[offset + header_bytes : offset + header_bytes + body_bytes]
        assert index[at + 64 : at + 80] == _h(header)
        assert index[at + 80 : at + 96] == _h(body)
        joined += _h(header) + _h(body)
        keys = re.search(rb"([0-9a-f]{32}).{1,40}strapfmt\.header", header, re.DOTALL)
        assert _h(body).hex().encode() in header
        own = next(
            found
            for found in re.findall(rb"[0-9a-f]{32}", header)
            if _h(header.replace(found, b"h" * 32)).hex().encode() == found
        )
        assert own, keys
    parts = {part["role"]: part for part in site["shards"][0]["parts"]}
    assert parts["data"]["hash"] == _h(joined + trailer_hash).hex()
    assert parts["index"]["hash"] == _h(index).hex()
    manifest = (EXAMPLE / "manifest.json").read_bytes()
    assert manifest[-44:] == b',"hash":"' + _h(manifest[:-44]).hex().encode() + b'"}\n'


def test_numbers_of_a_rank_never_meet_those_of_another() -> None:
    largest = spec.MAX_RANK << spec.RANK_SHIFT | ((1 << spec.COUNTER_BITS) - 1)
    assert largest < 1 << 62
    assert (1 << spec.RANK_SHIFT) > (1 << spec.COUNTER_BITS) - 1


# The schema of manifests.


def _errors(manifest: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize(
    "path", sorted(VECTORS.glob("valid/*.strap/rank-*/manifest.json")), ids=lambda path: path.parts[-3]
)
def test_schema_accepts_the_golden_manifests(path: Path) -> None:
    assert _errors(json.loads(path.read_bytes())) == []


def test_schema_accepts_what_a_writer_writes(tmp_path: Path) -> None:
    path = tmp_path / "run.strap"
    with DatasetWriter(path, provenance={"model": {"name": "tiny"}}) as writer:
        assert _errors(json.loads((path / "rank-00000/manifest.json").read_bytes())) == []
        writer.add_site(SiteSpec(name="x", dtype="float32", shape=(2,), statistics=()))
        writer.write("x", np.zeros((3, 2), np.float32), rows=np.arange(3))
        writer.commit()
        assert _errors(json.loads((path / "rank-00000/manifest.json").read_bytes())) == []
    assert _errors(json.loads((path / "rank-00000/manifest.json").read_bytes())) == []


def test_schema_covers_the_records() -> None:
    definitions = SCHEMA["$defs"]
    part = asdict(Part(role="data", file="x", n_bytes=1, hash="x"))
    assert set(part) == set(definitions["part"]["required"])
    shard = asdict(Shard(n_rows=1, is_sealed=True, session=0, parts=()))
    assert set(shard) == set(definitions["shard"]["required"])


def _site(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["sites"][0]
    return found


def _shard(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = _site(manifest)["shards"][0]
    return found


_BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda m: m.update(format="parquet"),
    "format missing": lambda m: m.pop("format"),
    "version 0": lambda m: m.update(format_version=0),
    "newer reader": lambda m: m.update(min_reader_version=2),
    "required feature": lambda m: m.update(required_features=["x"]),
    "features no array": lambda m: m.update(optional_features="x"),
    "rank": lambda m: m.update(rank=spec.MAX_RANK + 1),
    "writer id": lambda m: m.update(writer_id="X" * 32),
    "commit": lambda m: m.update(commit=-1),
    "clean": lambda m: m.update(is_clean=1),
    "counter missing": lambda m: m["counters"].pop("step"),
    "counter": lambda m: m["counters"].update(row=(1 << 40) + 1),
    "sessions": lambda m: m.update(sessions=["x"]),
    "sites no array": lambda m: m.update(sites={}),
    "site no object": lambda m: m.update(sites=[1]),
    "name empty": lambda m: _site(m).update(name=""),
    "name with NUL": lambda m: _site(m).update(name="a\0"),
    "shape 0": lambda m: _site(m).update(shape=[0]),
    "shape -2": lambda m: _site(m).update(shape=[-2]),
    "nine dimensions": lambda m: _site(m).update(shape=[1] * 9),
    "row space": lambda m: _site(m).update(row_space="heads"),
    "statistics": lambda m: _site(m).update(statistics=["median"]),
    "layout": lambda m: _site(m)["layout"].update(kind="x"),
    "counts": lambda m: _site(m)["counts"].pop("dropped"),
    "no rows": lambda m: _shard(m).update(n_rows=0),
    "null rows": lambda m: _shard(m).update(first_row=None),
    "sealed": lambda m: _shard(m).update(is_sealed="yes"),
    "session": lambda m: _shard(m).update(session=-1),
    "no data": lambda m: _shard(m).update(parts=_shard(m)["parts"][1:]),
    "two data": lambda m: _shard(m)["parts"].append(_shard(m)["parts"][0]),
    "path": lambda m: _shard(m)["parts"][0].update(file="sites/../x"),
    "bytes": lambda m: _shard(m)["parts"][0].update(n_bytes=-1),
    "hash": lambda m: _shard(m)["parts"][0].update(hash="0"),
    "understand": lambda m: _shard(m)["parts"][0].update(must_understand="no"),
}


@pytest.mark.parametrize("name", list(_BROKEN))
def test_schema_and_reader_refuse_a_broken_manifest(name: str) -> None:
    manifest = json.loads((EXAMPLE / "manifest.json").read_bytes())
    assert _errors(manifest) == []
    _BROKEN[name](manifest)
    assert _errors(manifest) != []
    del manifest["hash"]
    text = json.dumps(manifest, separators=(",", ":")).encode()[:-1]
    data = text + b',"hash":"' + digest(text).hex().encode() + b'"}\n'
    with pytest.raises((CorruptError, UnsupportedError)):
        Manifest.decode(data, "manifest.json")
