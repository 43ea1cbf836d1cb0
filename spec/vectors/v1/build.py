"""Builds the golden datasets of format version 1, each with its expected content as JSON.

    python spec/vectors/v1/build.py [DIRECTORY]

Everything is deterministic: ids, times and pseudo-random numbers are fixed, so that a rebuild with the PyArrow version
named in `vectors.json` gives the same bytes. Golden datasets are only ever added: never change one that a release shipped.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import forging
import numpy as np
import pyarrow as pa

from strapfmt import spec
from strapfmt.arrowfile import digest
from strapfmt.dtypes import DTYPES, get_dtype
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter

HERE = Path(__file__).resolve().parent
START_NS = 1_750_000_000_000_000_000
RECORDED = {"format_version": spec.FORMAT_VERSION, "pyarrow": pa.__version__}


def build(root: Path) -> None:
    """Write every golden dataset below `root`: `valid/NAME.strap` with `valid/NAME.json`, and `refused/` alike."""
    for kind in ("valid", "refused"):
        shutil.rmtree(root / kind, ignore_errors=True)
        (root / kind).mkdir(parents=True)
    for make in VALID:
        vector = Vector(root / "valid" / make.__name__.replace("_", "-"), make.__doc__ or "")
        with _fixed_time_and_ids():
            make(vector)
        vector.finish()
    with _fixed_time_and_ids():
        forging.build(root)
    (root / "vectors.json").write_text(json.dumps(RECORDED, indent=1) + "\n")


@contextlib.contextmanager
def _fixed_time_and_ids() -> Iterator[None]:
    ticks, ids = itertools.count(START_NS, 1_000_000_000), itertools.count(1)
    with (
        mock.patch("time.time_ns", lambda: next(ticks)),
        mock.patch("uuid.uuid4", lambda: uuid.UUID(int=next(ids))),
    ):
        yield


class Vector:
    """One valid dataset and what a reader must find in it, recorded from what was written, never read back."""

    def __init__(self, stem: Path, description: str) -> None:
        self.path, self._json = stem.with_suffix(spec.DATASET_SUFFIX), stem.with_suffix(".json")
        self.expected: dict[str, Any] = {
            "description": " ".join(description.split()),
            "ranks": [],
            "is_clean": True,
            "sites": {},
            "refused_sites": {},
            "tables": {},
        }

    def writer(self, **options: Any) -> DatasetWriter:
        """Open a writer that commits only when told to."""
        options = {"commit_interval_s": 1e9, "provenance": {"made_by": "spec/vectors/v1/build.py"}} | options
        writer = DatasetWriter(self.path, **options)
        if writer.rank not in self.expected["ranks"]:
            self.expected["ranks"].append(writer.rank)
        return writer

    def write(
        self,
        writer: DatasetWriter,
        site: SiteSpec,
        values: np.ndarray,
        rows: Any = None,
        *,
        shapes: Any = None,
        layout: str | None = None,
        is_counting: bool = False,
        expect: bool = True,
        **columns: Any,
    ) -> None:
        """Write rows of a site; `values` is [n, *shape] of the storage type, or a list of arrays for a ragged site."""
        writer.add_site(site)
        rows = None if rows is None else np.asarray(rows, np.int64)
        flat = np.concatenate([v.reshape(-1) for v in values]) if shapes is not None else values
        given_shapes = None if shapes is None else np.array(shapes, np.int32)
        measured = _statistics(values, site)
        before = writer._sites[site.name].last_row
        writer.write(site.name, flat, rows=rows, shapes=given_shapes, statistics=measured, **columns)
        writer.wait()
        kind = writer._sites[site.name].layout.kind
        if layout is not None and kind != layout:
            raise AssertionError(f"{site.name}: expected the layout {layout}, the writer chose {kind}")
        if not expect:
            return
        if rows is None:
            first = before + 1 if before >= 0 else writer.rank << spec.RANK_SHIFT
            rows = np.arange(first, first + len(values))
        entry = self.expected["sites"].setdefault(site.name, self._new(site, kind))
        entry["rows"] += rows.tolist()
        if is_counting:
            entry["activation"] = {"counting": {"row_values": site.row_values, "n_rows": len(values)}}
        else:
            entry["activation"] += [row.tobytes().hex() for row in values]
        if shapes is not None:
            entry["shape_column"] += [list(shape) for shape in shapes]
        for name in ("token_row", "call") if site.row_space == "own" else ():
            numbers = np.broadcast_to(columns.get(name, -1 if name == "token_row" else 0), len(values)).tolist()
            entry[name] += [None if name == "token_row" and n < 0 else n for n in numbers]
        for name, column in measured.items():
            entry["statistics"][name] += [value.tobytes().hex() for value in column]

    @staticmethod
    def _new(site: SiteSpec, layout: str) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "dtype": site.dtype,
            "shape": list(site.shape),
            "row_space": site.row_space,
            "codec": site.codec,
            "layout": layout,
            "rows": [],
            "activation": [],
        }
        if site.is_ragged:
            entry["shape_column"] = []
        if site.row_space == "own":
            entry |= {"token_row": [], "call": []}
        return entry | {"statistics": {name: [] for name in site.statistics}}

    def table(self, writer: DatasetWriter, name: str, columns: dict[str, list[Any]]) -> None:
        """Write rows of a table."""
        writer.write_table(name, columns)
        known = self.expected["tables"].setdefault(name, {column: [] for column in columns})
        for column, values in columns.items():
            known[column] += values

    def finish(self) -> None:
        """Remove what is no content (locks name this machine), and write the expected content."""
        for lock in self.path.rglob(spec.LOCK_NAME):
            lock.unlink()
        self.expected["ranks"].sort()
        self.expected["files"] = forging.file_hashes(self.path)
        self._json.write_text(json.dumps(self.expected, indent=1, ensure_ascii=True) + "\n")


def _statistics(values: Any, site: SiteSpec) -> dict[str, np.ndarray]:
    """The definitions of the specification, in float64 without any care for speed."""
    columns: dict[str, list[float]] = {name: [] for name in site.statistics}
    for row in values if columns else ():
        numbers = _numbers(row, site.dtype)
        finite = numbers[np.isfinite(numbers)]
        results = {
            "l2_norm": np.sqrt(np.sum(finite**2)),
            "mean": finite.mean() if finite.size else np.nan,
            "std": finite.std() if finite.size else np.nan,
            "abs_max": np.abs(finite).max(initial=0.0),
            "n_nonfinite": numbers.size - finite.size,
        }
        for name in columns:
            columns[name].append(results[name])
    return {n: np.array(c, np.int32 if n == "n_nonfinite" else np.float32) for n, c in columns.items()}


def _numbers(row: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        row = (row.astype(np.uint32) << 16).view(np.float32)
    elif get_dtype(dtype).storage != dtype:
        raise AssertionError(f"no statistics of {dtype} in the vectors")
    return row.reshape(-1).astype(np.float64)


def _noise(seed: str, n_bytes: int) -> bytes:
    """Deterministic bytes: the hashes of `seed` and a counter."""
    return b"".join(digest(f"{seed}/{i}".encode()) for i in range(-(-n_bytes // 16)))[:n_bytes]


def _floats(seed: str, *shape: int) -> np.ndarray:
    """Deterministic float32 numbers in [-4, 4), with few digits."""
    noise = np.frombuffer(_noise(seed, 2 * int(np.prod(shape))), "<u2").astype(np.float32)
    return (noise / 8192 - 4).reshape(shape)


def _bf16(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _tokens(rows: list[int], **columns: list[Any]) -> dict[str, list[Any]]:
    n = len(rows)
    default = {
        "row": rows,
        "step": [rows[0] >> 40 << 40] * n,
        "phase": ["prefill"] * n,
        "batch_index": [0] * n,
        "sequence_id": [rows[0] >> 40 << 40] * n,
        "position": list(range(n)),
        "token_id": [100 + i for i in range(n)],
        "token": [f" t{i}" for i in range(n)],
        "is_special": [False] * n,
        "parent_row": [None, *rows[:-1]],
        "dropped": [False] * n,
    }
    return default | columns


# The datasets.


def dtypes(vector: Vector) -> None:
    """Every element type: a row of edge patterns (zeros, largest, NaN, infinities) and two rows of arbitrary bits."""
    with vector.writer() as writer:
        for name, dtype in DTYPES.items():
            site = SiteSpec(name=f"as.{name}", dtype=name, shape=(8,), statistics=())
            size = dtype.item_bytes
            if name == "bool":
                values = np.frombuffer(_noise(name, 24), np.uint8).reshape(3, 8) & 1
            else:
                edges = [0, 1, 1 << 8 * size - 1, (1 << 8 * size - 1) - 1, (1 << 8 * size) - 1]
                edges += {8: [0x7FF << 52, 0xFFF << 52], 4: [0x7F800000, 0xFF800000], 1: [0x7E, 0x7C]}.get(
                    size, [0x7C00, 0xFF80]
                )
                data = b"".join(edge.to_bytes(size, "little") for edge in [*edges, 0x55])
                values = np.frombuffer(data + _noise(name, 16 * size), dtype.numpy).reshape(3, 8)
            vector.write(writer, site, np.ascontiguousarray(values), [0, 1, 2])


def all_bits(vector: Vector) -> None:
    """Every bit pattern of the 16-bit and 8-bit float types, none of which may change on the way."""
    with vector.writer(batch_bytes=1 << 16) as writer:
        for name in ("bfloat16", "float16"):
            values = np.arange(1 << 16, dtype=np.uint16).view(get_dtype(name).numpy).reshape(256, 256)
            site = SiteSpec(name=name, dtype=name, shape=(256,), statistics=())
            vector.write(writer, site, values, np.arange(256), layout="rows", is_counting=True)
        for name in [name for name in DTYPES if name.startswith("float8")]:
            site = SiteSpec(name=name, dtype=name, shape=(16,), statistics=())
            values = np.arange(256, dtype=np.uint8).reshape(16, 16)
            vector.write(writer, site, values, np.arange(16), is_counting=True)


def layouts(vector: Vector) -> None:
    """Every layout over several record batches and shards: rows, strided, plain (compressed); a scalar; many dimensions."""
    n = 150
    with vector.writer(batch_bytes=4096, shard_bytes=9_000) as writer:
        for name, dtype, shape, codec, layout in (
            ("rows.f32", "float32", (16,), "none", "rows"),
            ("rows.bf16", "bfloat16", (2, 16), "none", "rows"),
            ("strided.f32", "float32", (25,), "none", "strided"),
            ("strided.bf16", "bfloat16", (5, 7), "none", "strided"),
            ("scalar", "float32", (), "none", "rows"),
            ("lz4", "float32", (16,), "lz4", "plain"),
            ("zstd", "bfloat16", (2, 16), "zstd", "plain"),
        ):
            site = SiteSpec(name=name, dtype=dtype, shape=shape, codec=codec, statistics=("l2_norm",))
            values = _floats(name, n, *shape)
            if codec != "none":
                values = np.round(values)  # so that there is something to compress
            rows = np.arange(n) + np.arange(n) // 7 * 3  # runs of seven
            stored = _bf16(values) if dtype == "bfloat16" else values
            for start in range(0, n, 50):
                part = slice(start, start + 50)
                vector.write(writer, site, stored[part], rows[part], layout=layout)


def ragged(vector: Vector) -> None:
    """Rows of different shapes, empty ones too, with every codec."""
    shapes = [(2, 1), (2, 2), (2, 0), (2, 3), (2, 40), (2, 1)]
    with vector.writer(batch_bytes=64) as writer:
        for codec in ("none", "lz4", "zstd"):
            site = SiteSpec(name=f"attn.{codec}", dtype="float16", shape=(2, -1), codec=codec)
            values = [_floats(f"{codec}{i}", *shape).astype(np.float16) for i, shape in enumerate(shapes)]
            vector.write(writer, site, values, [0, 1, 2, 3, 5, 8], shapes=shapes, layout="plain")
        site = SiteSpec(name="both", dtype="int64", shape=(-1, -1), statistics=("abs_max",))
        values = [np.arange(6).reshape(2, 3), np.arange(4).reshape(4, 1)]
        vector.write(writer, site, values, [1, 4], shapes=[(2, 3), (4, 1)])


def own_rows(vector: Vector) -> None:
    """A site that numbers its own rows: several per token, one of no token, and with statistics."""
    with vector.writer() as writer:
        vector.table(writer, "tokens", _tokens([0, 1, 2]))
        site = SiteSpec(name="experts.out", dtype="float32", shape=(4,), row_space="own")
        first = np.array([0, 0, 1, 2, -1], np.int64)
        vector.write(writer, site, _floats("a", 5, 4), token_row=first, call=0)
        vector.write(writer, site, _floats("b", 2, 4), token_row=first[:2], call=np.array([1, 2]))
        unknown = SiteSpec(name="vision.patch", dtype="float32", shape=(2,), row_space="own", statistics=())
        vector.write(writer, unknown, _floats("c", 3, 2))


def tables(vector: Vector) -> None:
    """All tables with every column, nulls, lists, and text that is no plain ASCII."""
    with vector.writer() as writer:
        vector.table(
            writer,
            "tokens",
            _tokens(
                [0, 1, 5, 6],
                step=[0, 0, 1, 2],
                phase=["prefill", "prefill", "decode", "decode"],
                token_id=[1, None, 3, 2_147_483_647],
                token=["<s>", None, "\u0000\n\u202e</script>", "\U0001f600"],
                is_special=[True, None, False, False],
                dropped=[False, False, True, False],
            ),
        )
        vector.table(
            writer,
            "sequences",
            {
                "sequence_id": [0, 1],
                "batch_index": [0, 0],
                "first_step": [0, 2],
                "parent_sequence_id": [None, 0],
                "fork_position": [None, 2],
                "n_prompt_tokens": [2, 0],
                "prompt_token_ids": [[1, 7], None],
                "prompt": ["Gr\u00fc\u00dfe", None],
                "tags": ['{"label":"a"}', "{}"],
            },
        )
        vector.table(
            writer,
            "steps",
            {
                "step": [0, 1, 2],
                "phase": ["prefill", "decode", "decode"],
                "n_sequences": [1, 1, 1],
                "n_query": [2, 1, 1],
                "n_rows": [2, 0, 1],
                "first_row": [0, 5, 6],
                "started_ns": [START_NS, START_NS + 1, START_NS + 2],
                "duration_s": [0.5, 0.25, 0.125],
                "status": ["complete", "dropped", "complete"],
                "reason": [None, "the ring was full", None],
            },
        )
        vector.table(
            writer, "row_events", {"row": [6], "step": [2], "event": ["rejected"], "detail": [None]}
        )


def two_ranks(vector: Vector) -> None:
    """Two writers: one site in both with different codecs, one in one only, and a third that has not committed."""
    for rank, codec in ((0, "none"), (3, "zstd")):
        with vector.writer(rank=rank) as writer:
            base = rank << spec.RANK_SHIFT
            vector.table(writer, "tokens", _tokens([base, base + 1, base + 2]))
            site = SiteSpec(name="x", dtype="float32", shape=(4,), codec=codec)
            vector.write(writer, site, _floats(f"x{rank}", 3, 4), [base, base + 1, base + 2])
            if rank:
                only = SiteSpec(name="y", dtype="int32", shape=(1,), statistics=())
                vector.write(writer, only, np.array([[7]], np.int32), [base + 2])
                own = SiteSpec(name="z", dtype="int32", shape=(1,), row_space="own", statistics=())
                vector.write(writer, own, np.array([[8], [9]], np.int32))
    pending = vector.path / spec.RANK_DIRECTORY.format(rank=7)
    pending.mkdir()
    (pending / (spec.MANIFEST_NAME + spec.TMP_SUFFIX)).write_bytes(b'{"format":"stra')


def appended(vector: Vector) -> None:
    """Two sessions of one rank; the second goes on with one site, in new shards, and adds another."""
    x = SiteSpec(name="x", dtype="float32", shape=(4,))
    y = SiteSpec(name="y", dtype="float16", shape=(2,), statistics=())
    for session, mode in enumerate(("create", "append")):
        with vector.writer(mode=mode) as writer:
            first = writer.reserve("row", 3)
            rows = [first, first + 1, first + 2]
            vector.table(writer, "tokens", _tokens(rows))
            vector.write(writer, x, _floats(f"x{session}", 3, 4), rows)
            if session:
                vector.write(writer, y, _floats("y", 3, 2).astype(np.float16), rows)


def unclean(vector: Vector) -> None:
    """What a crash leaves: open shards with tails, and bytes and files beyond the last commit, which readers ignore."""
    x = SiteSpec(name="x", dtype="float32", shape=(16,), statistics=("l2_norm",))
    z = SiteSpec(name="z", dtype="float32", shape=(16,), codec="zstd", statistics=())
    small = SiteSpec(name="small", dtype="bfloat16", shape=(4,), statistics=())
    live = vector.path
    vector.path = live.with_name("live.strap")
    writer = vector.writer(batch_bytes=4096, shard_bytes=12_000)
    vector.table(writer, "tokens", _tokens(list(range(300))))
    vector.write(writer, x, _floats("x", 300, 16), np.arange(300))  # sealed, open and tail
    vector.write(writer, z, np.round(_floats("z", 100, 16)), np.arange(100))
    vector.write(writer, small, _bf16(_floats("s", 3, 4)), [0, 1, 2])  # nothing but a tail
    writer.commit()
    old = {path: path.read_bytes() for path in vector.path.rglob("*.c1.*")}
    vector.write(writer, small, _bf16(_floats("s2", 1, 4)), [7])
    writer.commit()
    for path, data in old.items():
        path.write_bytes(data)  # as if the crash came before superseded files were removed
    vector.write(writer, x, _floats("lost", 70, 16), np.arange(300, 370), expect=False)
    writer.wait()
    shutil.copytree(vector.path, live)
    writer.abort()
    shutil.rmtree(vector.path)
    vector.path = live
    rank = live / spec.RANK_DIRECTORY.format(rank=0)
    (rank / (spec.MANIFEST_NAME + spec.TMP_SUFFIX)).write_bytes(b'{"format":"strapfmt","format_ver')
    (rank / "sites/small/000000.c3.idx.tmp").write_bytes(b"STRAPIDX\x01")
    vector.expected["is_clean"] = False


def sealed_since(vector: Vector) -> None:
    """A shard that was sealed after the last commit: its manifest still calls it open. The bytes committed are the same."""
    x = SiteSpec(name="x", dtype="float32", shape=(16,), statistics=("l2_norm",))
    writer = vector.writer(batch_bytes=4096)
    vector.write(writer, x, _floats("x", 100, 16), np.arange(100))
    writer.commit()
    kept = vector.path.with_name("kept.strap")
    shutil.copytree(vector.path, kept)
    vector.write(writer, x, _floats("later", 50, 16), np.arange(100, 150), expect=False)
    writer.close()
    data = "rank-00000/sites/x/000000.arrow"
    (kept / f"{data}.open").unlink()
    shutil.copy(vector.path / data, kept / data)
    shutil.rmtree(vector.path)
    kept.rename(vector.path)
    vector.expected["is_clean"] = False


def empty(vector: Vector) -> None:
    """No row at all: a declared site without shards, and no tables."""
    with vector.writer() as writer:
        writer.add_site(SiteSpec(name="x", dtype="float32", shape=(4,)))
    entry = Vector._new(SiteSpec(name="x", dtype="float32", shape=(4,)), "rows")
    vector.expected["sites"]["x"] = entry


def names(vector: Vector) -> None:
    """Names are data, never paths."""
    hostile = (
        "blocks.0.resid_post",
        "UPPER.lower",
        "upper.lower",
        "../../../escape",
        "/absolute",
        "_orig_mod.x",
        ".hidden",
        "-",
        "trailing.",
        'quote"\'; drop table tokens; --',
        "new\nline\ttab",
        "\U0001f600.\u00e9",
        "a" * 101,
        "\u00e9" * 512,
    )
    with vector.writer() as writer:
        for i, name in enumerate(hostile):
            site = SiteSpec(name=name, dtype="int8", shape=(1,), statistics=())
            vector.write(writer, site, np.array([[i]], np.int8), [i])


def future(vector: Vector) -> None:
    """Written by a later version that older readers may read: unknown members, features, roles, tables, and a site of an
    unknown type, a derived one and one in an unknown codec, which alone are refused."""
    good = SiteSpec(name="good", dtype="float32", shape=(2,), statistics=())
    with vector.writer() as writer:
        vector.write(writer, good, _floats("good", 2, 2), [0, 1])
        for name in ("newer.dtype", "newer.codec", "derived"):
            site = SiteSpec(name=name, dtype="uint8", shape=(2,), statistics=())
            vector.write(writer, site, np.zeros((1, 2), np.uint8), [0], expect=False)
    forge = forging.Forge(vector.path)
    manifest = forge.manifest
    manifest |= {"format_version": 2, "optional_features": ["tides"], "moon": {"phase": [1, None, 0.5]}}
    by_name = {site["name"]: site for site in manifest["sites"]}
    extra = {"role": "sketch", "file": "sites/good/000000.sketch", "codec": "moss", "must_understand": False}
    by_name["good"]["shards"][0]["parts"].append(extra | {"n_bytes": 3, "hash": "0" * 32, "colour": "red"})
    by_name["newer.dtype"]["dtype"] = "float4_e2m1"
    by_name["newer.codec"]["codec"] = "planes"
    for part in by_name["newer.codec"]["shards"][0]["parts"]:
        part["codec"] = "planes" if part["role"] == "data" else "none"
    by_name["derived"] |= {"derived_from": ["good"], "shards": []}
    manifest["tables"].append({"name": "tides", "shards": []})
    forge.save()
    vector.expected["refused_sites"] = dict.fromkeys(("newer.dtype", "newer.codec", "derived"), "unsupported")


VALID = [
    dtypes,
    all_bits,
    layouts,
    ragged,
    own_rows,
    tables,
    two_ranks,
    appended,
    unclean,
    sealed_since,
    empty,
    names,
    future,
]

if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
