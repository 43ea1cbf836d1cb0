"""Small datasets whose content is known bit for bit, and the list model that readers are compared with.

`Contents` is what a dataset holds, column by column as bytes; equal contents are equal bit for bit. A `Model` says what
was written, `contents_of` what is read. A `Script` is a run that any process can repeat: same steps, same values.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from strapfmt import spec
from strapfmt.dtypes import DTYPES
from strapfmt.reader import Reader
from strapfmt.schema import TABLE_SCHEMAS, SiteSpec
from strapfmt.site import Site
from strapfmt.writer import DatasetWriter

if TYPE_CHECKING:
    import torch

Array = npt.NDArray[Any]
Contents = dict[str, dict[str, bytes]]
Chunk = dict[str, Array]

#: Where many small files are cheap to make durable.
QUICK_DIRECTORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

SITES = (
    SiteSpec(name="blocks.0.resid_post", dtype="bfloat16", shape=(8,)),
    SiteSpec(name="Head/π", dtype="float16", shape=(2, -1), statistics=("l2_norm", "n_nonfinite")),
    SiteSpec(name="logits", dtype="float32", shape=(3, 5), row_space="own", codec="zstd", statistics=()),
)


@contextmanager
def quick_directory() -> Iterator[Path]:
    """Make a directory in memory where there is one, and remove it."""
    with tempfile.TemporaryDirectory(dir=QUICK_DIRECTORY, prefix="strapfmt-") as name:
        yield Path(name)


# What was written.


def random_chunk(site: SiteSpec, n_rows: int, rng: np.random.Generator) -> Chunk:
    """Return `n_rows` rows of arbitrary bits, without their row numbers; the keys are arguments of `write`."""
    storage = site.stored_dtype.numpy
    chunk: Chunk = {}
    if site.is_ragged:
        fixed = np.array(site.shape)
        shapes = np.where(fixed < 0, rng.integers(0, 4, (n_rows, len(fixed))), fixed).astype(np.int32)
        chunk["shapes"] = shapes
        n_values = int(np.prod(shapes, axis=1, dtype=np.int64).sum())
        chunk["values"] = np.frombuffer(rng.bytes(n_values * storage.itemsize), storage)
    else:
        data = rng.bytes(n_rows * site.row_bytes)
        chunk["values"] = np.frombuffer(data, storage).reshape(n_rows, *site.shape)
    if site.dtype == "bool":
        chunk["values"] = chunk["values"] & 1
    for name in site.statistics:
        kind = np.int32 if name == "n_nonfinite" else np.float32
        chunk[name] = np.frombuffer(rng.bytes(4 * n_rows), kind)
    if site.row_space == "own":
        chunk["token_row"] = rng.integers(-1, 100, n_rows)
        chunk["call"] = rng.integers(0, 9, n_rows)
    return chunk


def write_chunk(writer: DatasetWriter, site: SiteSpec, chunk: Chunk, rows: Array | None) -> None:
    """Write a chunk; `rows` only for sites in the row space of the tokens."""
    writer.write(
        site.name,
        chunk["values"],
        rows=rows,
        shapes=chunk.get("shapes"),
        statistics={name: chunk[name] for name in site.statistics},
        token_row=chunk.get("token_row"),
        call=chunk.get("call"),
    )


class Model:
    """What a dataset must hold: lists of chunks and of table rows."""

    def __init__(self) -> None:
        self.sites: dict[str, SiteSpec] = {}
        self.chunks: dict[str, list[Chunk]] = {}
        self.tables: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLE_SCHEMAS}

    def add_site(self, site: SiteSpec) -> None:
        self.sites[site.name] = site
        self.chunks.setdefault(site.name, [])

    def rows(self, name: str) -> Array:
        """Return the row numbers of a site."""
        return np.concatenate([np.empty(0, np.int64), *(chunk["rows"] for chunk in self.chunks[name])])

    def add(self, name: str, chunk: Chunk, rows: Array | None, *, rank: int = 0) -> None:
        """Add rows; a site's own rows are numbered from the last."""
        n_rows = len(chunk["shapes"] if "shapes" in chunk else chunk["values"])
        if rows is None:
            known = self.rows(name)
            first = int(known[-1]) + 1 if len(known) else rank << spec.RANK_SHIFT
            rows = np.arange(first, first + n_rows)
        self.chunks[name].append(chunk | {"rows": np.asarray(rows, np.int64)})

    def values(self, name: str) -> Array:
        """Return a site's values as unsigned integers, [n_rows, row_values] (or [n_values] where ragged)."""
        site = self.sites[name]
        data = b"".join(chunk["values"].tobytes() for chunk in self.chunks[name])
        flat = np.frombuffer(data, f"u{site.stored_dtype.item_bytes}")
        return flat if site.is_ragged else flat.reshape(-1, site.row_values)

    def contents(self) -> Contents:
        """Return everything, comparable with `contents_of` a reader."""
        contents = {f"site {name}": self._site(site) for name, site in self.sites.items()}
        return contents | {f"table {name}": {"rows": _text(rows)} for name, rows in self.tables.items()}

    def copy(self) -> Model:
        """Return the same at this time."""
        twin = Model()
        twin.sites = dict(self.sites)
        twin.chunks = {name: list(chunks) for name, chunks in self.chunks.items()}
        twin.tables = {name: list(rows) for name, rows in self.tables.items()}
        return twin

    def _site(self, site: SiteSpec) -> dict[str, bytes]:
        chunks = self.chunks[site.name]
        columns = {"activation": self.values(site.name).tobytes(), "row": self.rows(site.name).tobytes()}
        kinds: dict[str, Any] = dict.fromkeys(site.statistics, np.float32)
        if "n_nonfinite" in kinds:
            kinds["n_nonfinite"] = np.int32
        if site.row_space == "own":
            kinds |= {"token_row": np.int64, "call": np.int64}
        for name, kind in kinds.items():
            columns[name] = b"".join(chunk[name].astype(kind).tobytes() for chunk in chunks)
        if site.is_ragged:
            columns["shape"] = b"".join(chunk["shapes"].astype(np.int32).tobytes() for chunk in chunks)
        return columns


# What is read.


def contents_of(reader: Reader) -> Contents:
    """Read everything there is through Arrow."""
    contents = {f"site {name}": _columns(reader[name].to_arrow()) for name in reader.names}
    for name, table in reader.tables.items():
        contents[f"table {name}"] = {"rows": _text(table.to_arrow().to_pylist())}
    return contents


def check_routes(site: Site, model: Model, rng: np.random.Generator) -> None:
    """Compare every way to the rows of a site with the model."""
    import torch

    name = site.name
    rows = model.rows(name)
    assert site.n_rows == len(site) == len(rows)
    np.testing.assert_array_equal(site.rows, rows)
    assert site.batch_ordinals[-1] == len(rows)
    assert len(site.batch_ordinals) == site.n_batches + 1
    if site.is_ragged:
        return
    values = model.values(name)
    assert bits(site.tensor()) == values.tobytes()
    assert bits(site.tensor(copy=True)) == values.tobytes()
    if not len(rows):
        return
    start, stop = sorted(rng.integers(0, len(rows) + 1, 2).tolist())
    assert bits(site[start:stop]) == values[start:stop].tobytes()
    assert site[start:stop].shape == (stop - start, *site.shape)
    step = int(rng.integers(2, 4))
    assert bits(site[start:stop:step]) == values[start:stop:step].tobytes()
    assert bits(site[::-1]) == values[::-1].tobytes()
    one = int(rng.integers(-len(rows), len(rows)))
    assert bits(site[one]) == values[one].tobytes()
    chosen = rng.integers(0, len(rows), 12)
    assert bits(taken(site, rows[chosen])) == values[chosen].tobytes()
    out = torch.empty((12, *site.shape), dtype=site.spec.stored_dtype.torch)
    assert site.gather(chosen, out=out) is out
    assert bits(out) == values[chosen].tobytes()
    np.testing.assert_array_equal(site.ordinals_of(rows[chosen]), chosen)
    np.testing.assert_array_equal(site.rows_between(start, stop), rows[start:stop])
    if site.codec == "none":
        at = 0
        for view in site.views():
            assert view.first_ordinal == at
            assert view.tensor.shape[2:] == site.shape
            n_rows = view.tensor.shape[0] * view.tensor.shape[1]
            assert bits(view.tensor) == values[at : at + n_rows].tobytes()
            at += n_rows
        assert at == len(rows)
    size, limit = int(rng.integers(1, 5)), int(rng.integers(1, 12))
    scanned = list(site.scan(["row"], batch_size=size, limit=limit))
    assert [len(batch) for batch in scanned[:-1]] == [size] * (len(scanned) - 1)
    got = [row for batch in scanned for row in batch.column("row").to_pylist()]
    assert got == rows[:limit].tolist()


def taken(site: Site, rows: Array) -> torch.Tensor:
    """Take rows by the site's own idea of their numbers."""
    return site.take(own_rows=rows) if site.row_space == "own" else site.take(rows)


def bits(tensor: torch.Tensor) -> bytes:
    """Return a tensor's elements as bytes, in order."""
    import torch

    flat = tensor.contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _columns(table: pa.Table) -> dict[str, bytes]:
    return {name: b"".join(_bytes(chunk) for chunk in table[name].chunks) for name in table.column_names}


def _bytes(array: pa.Array) -> bytes:
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        array = array.flatten()
    if array.null_count:
        array = array.fill_null(-1)
    return array.to_numpy(zero_copy_only=False).tobytes()


def _text(rows: list[dict[str, Any]]) -> bytes:
    return repr(rows).encode()


# Runs that can be repeated.


@dataclass(frozen=True)
class Script:
    """A run of steps whose content depends on their numbers alone.

    Attributes
    ----------
    sites : tuple of SiteSpec
    seed : int
    rank : int
    """

    sites: tuple[SiteSpec, ...] = SITES
    seed: int = 0
    rank: int = 0

    def n_tokens(self, step: int) -> int:
        """Return the tokens of a step: now and then a prefill."""
        return 7 if step % 5 == 0 else 1 + step % 3

    def declare(self, writer: DatasetWriter) -> None:
        """Declare all sites."""
        for site in self.sites:
            writer.add_site(site)

    def write(self, writer: DatasetWriter, step: int) -> None:
        """Write one step; it must be the next."""
        n_tokens = self.n_tokens(step)
        first = writer.reserve("row", n_tokens)
        assert writer.reserve("step", 1) == self.rank << spec.RANK_SHIFT | step
        tables, chunks = self.step(step, first)
        for name, columns in tables.items():
            writer.write_table(name, columns)
        for site in self.sites:
            rows = None if site.row_space == "own" else np.arange(first, first + n_tokens)
            write_chunk(writer, site, chunks[site.name], rows)
            writer.count(site.name, expected=n_tokens)
        writer.wait()
        writer.end_step()

    def step(self, step: int, first: int) -> tuple[dict[str, dict[str, list[Any]]], dict[str, Chunk]]:
        """Return the tables and the activations of a step whose first row is `first`."""
        rng = np.random.default_rng([self.seed, self.rank, step])
        n = self.n_tokens(step)
        number = self.rank << spec.RANK_SHIFT | step
        tokens: dict[str, list[Any]] = {
            "row": [first + i for i in range(n)],
            "step": [number] * n,
            "phase": ["prefill" if n == 7 else "decode"] * n,
            "batch_index": [0] * n,
            "sequence_id": [number // 5] * n,
            "position": list(range(n)),
            "token_id": rng.integers(0, 1000, n).tolist(),
            "token": [f"t{step}.{i}" for i in range(n)],
            "is_special": [None if i % 2 else False for i in range(n)],
            "parent_row": [None, *range(first, first + n - 1)],
            "dropped": [False] * n,
        }
        steps: dict[str, list[Any]] = {
            "step": [number],
            "phase": [tokens["phase"][0]],
            "n_sequences": [1],
            "n_query": [n],
            "n_rows": [n],
            "first_row": [first],
            "started_ns": [1000 * step],
            "duration_s": [0.5],
            "status": ["complete"],
            "reason": [None],
        }
        tables = {"tokens": tokens, "steps": steps}
        return tables, {site.name: random_chunk(site, n, rng) for site in self.sites}

    def model(self, n_steps: int) -> Model:
        """Return what a dataset of the first `n_steps` steps holds."""
        model = Model()
        for site in self.sites:
            model.add_site(site)
        first = self.rank << spec.RANK_SHIFT
        for step in range(n_steps):
            tables, chunks = self.step(step, first)
            for name, columns in tables.items():
                model.tables[name] += _records(columns)
            rows = np.arange(first, first + self.n_tokens(step))
            for site in self.sites:
                own = site.row_space == "own"
                model.add(site.name, chunks[site.name], None if own else rows, rank=self.rank)
            first += self.n_tokens(step)
        return model

    def contents(self, n_steps: int) -> Contents:
        """Return the contents of the first `n_steps` steps."""
        return self.model(n_steps).contents()

    def n_steps_of(self, reader: Reader) -> int:
        """Return how many steps of this script's rank a dataset holds, by its table."""
        steps = reader.steps.to_arrow(["step"])["step"].to_numpy()
        return int(np.count_nonzero(steps >> spec.RANK_SHIFT == self.rank))


def _records(columns: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def make_dataset(path: Path, *, n_steps: int = 6, unclean: bool = False, **options: Any) -> Script:
    """Write a small dataset of every kind of file: sealed and (where `unclean`) open shards, tails, every layout."""
    script = Script()
    options = {"batch_bytes": 128, "shard_bytes": 3000} | options
    writer = DatasetWriter(path, commit_interval_s=1e9, **options)
    script.declare(writer)
    for step in range(n_steps):
        script.write(writer, step)
        if step % 2:
            writer.commit()
    writer.commit()
    if unclean:
        writer.abort()
    else:
        writer.close()
    return script


def all_dtypes() -> list[str]:
    """Return the names of every element type."""
    return list(DTYPES)
