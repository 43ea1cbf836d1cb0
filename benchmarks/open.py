"""Opening: what it costs to open a dataset, and to find a first row, as its record batches grow in number."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from benchmarks.files import files_below, sync
from benchmarks.measure import Case, Report, Settings, in_rounds, scratch
from benchmarks.workloads import SITE
from strapfmt import spec
from strapfmt.index import ShardIndex
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter

__all__ = ["measure"]

_WIDTH = 64
_SHARDED_BATCHES = 256


def measure(settings: Settings) -> Report:
    """Open datasets of few and of many record batches."""
    report = Report(
        "Opening a dataset, and opening it to take one row. `one shard` holds all record batches in one file; "
        f"`many shards` has {_SHARDED_BATCHES} in each, as 1 GiB shards of 4 MiB batches do. The peers on the same "
        "shard: pyarrow reads the file's footer; JSON holds the offset and length of every record batch."
    )
    counts = (1_000, 100_000) if not settings.is_quick else (50, 500)
    report.setup = {"batches": counts, "width": _WIDTH, "batches_in_a_shard": _SHARDED_BATCHES}
    with scratch(settings) as directory:
        for n_batches in counts:
            one = directory / f"one-{n_batches}.strap"
            _store(one, n_batches, shard_bytes=1 << 40)
            cases = _cases(one, n_batches)
            many = directory / f"many-{n_batches}.strap"
            _store(many, n_batches, shard_bytes=_shard_bytes(one, n_batches))
            cases["strapfmt, many shards"] = Case(run=_opens(many))
            cases["strapfmt, many shards, and a first row"] = Case(run=_takes(many, n_batches))
            seconds = in_rounds(cases, settings, more=3)
            report.add(f"{n_batches:,} record batches", seconds, reference="map the file")
            report.facts[f"n_shards, {n_batches:,}"] = len(list((many / "rank-00000/sites").rglob("*.arrow")))
    return report


def _store(path: Path, n_batches: int, *, shard_bytes: int) -> None:
    """Write a site with one row a record batch: as many messages as a site 4,096 times as large."""
    values = np.zeros((n_batches, _WIDTH), np.float32)
    values[:, 0] = np.arange(n_batches)
    with DatasetWriter(path, batch_bytes=1, shard_bytes=shard_bytes) as writer:
        writer.add_site(SiteSpec(name=SITE, dtype="float32", shape=(_WIDTH,), statistics=()))
        writer.reserve("row", n_batches)
        for start in range(0, n_batches, 1_000):
            part = values[start : start + 1_000]
            writer.write(SITE, part, rows=np.arange(start, start + len(part)), statistics={})
    sync(path)


def _shard_bytes(path: Path, n_batches: int) -> int:
    return _data_file(path).stat().st_size // n_batches * _SHARDED_BATCHES


def _data_file(path: Path) -> Path:
    return next(file for file in files_below(path) if file.suffix == ".arrow" and file.parent.name == SITE)


def _cases(path: Path, n_batches: int) -> dict[str, Case]:
    file, offsets = _data_file(path), path.parent / f"offsets-{n_batches}.json"
    index = ShardIndex.decode(file.with_suffix(spec.INDEX_SUFFIX).read_bytes(), file.name)
    names = ("offset", "header_bytes", "body_bytes", "n_rows")
    columns = (index.batches[name].tolist() for name in names)
    offsets.write_text(
        json.dumps([dict(zip(names, entry, strict=True)) for entry in zip(*columns, strict=True)])
    )
    return {
        "map the file": Case(run=lambda: _map(file)),
        "strapfmt, one shard": Case(run=_opens(path)),
        "strapfmt, one shard, and a first row": Case(run=_takes(path, n_batches)),
        "pyarrow open_file": Case(run=lambda: _arrow(file)),
        "JSON offsets": Case(run=lambda: _json(offsets)),
    }


def _opens(path: Path) -> Callable[[], None]:
    def run() -> None:
        with Reader(path) as reader:
            if reader[SITE].n_rows == 0:
                raise RuntimeError("the dataset is empty")

    return run


def _takes(path: Path, n_batches: int) -> Callable[[], None]:
    row = n_batches * 2 // 3

    def run() -> None:
        with Reader(path) as reader:
            if int(reader[SITE].take([row])[0, 0]) != row:
                raise RuntimeError("a wrong row")

    return run


def _map(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as memory:
        if memory[:6] != b"ARROW1":
            raise RuntimeError("no Arrow file")
    os.close(fd)


def _arrow(file: Path) -> None:
    with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
        if reader.num_record_batches == 0:
            raise RuntimeError("no record batches")


def _json(file: Path) -> None:
    if not json.loads(file.read_text()):
        raise RuntimeError("no offsets")
