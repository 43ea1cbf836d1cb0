"""Writing: how fast a dataset reaches the disk, beside a plain write of the same bytes."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from benchmarks.files import n_bytes_below, sync
from benchmarks.formats import Format, Strapfmt, peers, remove
from benchmarks.measure import DISK_REPEATS, Case, Report, Settings, in_rounds, scratch
from benchmarks.workloads import activations, bits, chunks_of
from strapfmt.commit import Disk

__all__ = ["measure"]

_WIDTH = 2_048
_CHUNK_ROWS = 1_024
_WRITEBACK_BYTES = 8 << 20


def measure(settings: Settings) -> Report:
    """Write one bfloat16 matrix in every way."""
    n_rows = settings.size(131_072, 2_048)
    x = activations(n_rows, _WIDTH)
    n_bytes = x.numel() * x.element_size()
    report = Report(
        "Writing a matrix of bfloat16 in chunks, until it is durable: every case ends with an fsync of its files. "
        "strapfmt computes five statistics a row and checksums; the others store the matrix alone."
    )
    report.setup = {"rows": n_rows, "width": _WIDTH, "chunk_rows": _CHUNK_ROWS, "bytes": n_bytes}
    ours: dict[str, Format] = {
        "strapfmt": Strapfmt(),
        "strapfmt, chunks of 1,000 rows": Strapfmt(chunk_rows=1_000),
        "strapfmt, no statistics": Strapfmt(statistics=()),
        "strapfmt, lz4": Strapfmt(codec="lz4"),
        "strapfmt, zstd": Strapfmt(codec="zstd"),
    }
    torch.set_num_threads(1)
    with scratch(settings) as directory:
        cases = {
            "raw write": _raw(directory / "raw", x, hints=False),
            "raw write with writeback hints": _raw(directory / "hinted", x, hints=True),
        }
        for number, (name, format_) in enumerate((ours | peers(settings)).items()):
            suffix = ".strap" if name.startswith("strapfmt") else ""
            cases[name] = _case(format_, directory / f"{number}{suffix}", x)
        report.add(
            "durable write",
            in_rounds(cases, settings),
            reference="raw write",
            n_bytes=n_bytes,
            is_rate=True,
        )
        report.add("limits", in_rounds(_limits(x), settings), reference="copy in memory", n_bytes=n_bytes)
        report.facts["size_ratio"] = {
            name: _size(format_, directory / "size.strap", x) / n_bytes
            for name, format_ in ours.items()
            if "chunks" not in name
        }
    return report


def _raw(path: Path, x: torch.Tensor, *, hints: bool) -> Case:
    disk = Disk()

    def run() -> None:
        fd = disk.create(path)
        at = started = 0
        for chunk in chunks_of(x, _CHUNK_ROWS):
            at += os.pwrite(fd, memoryview(bits(chunk)).cast("B"), at)
            if hints and at - started >= _WRITEBACK_BYTES:
                disk.start_writeback(fd, started, at - started)
                started = at
        os.close(fd)
        sync(path)

    return Case(run=run, after=lambda: remove(path), repeats=DISK_REPEATS)


def _case(format_: Format, path: Path, x: torch.Tensor) -> Case:
    def run() -> None:
        format_.write(path, x)
        sync(path)

    return Case(run=run, after=lambda: remove(path), repeats=DISK_REPEATS)


def _limits(x: torch.Tensor) -> dict[str, Case]:
    """What one core does with these bytes at all: copying them, hashing them, computing statistics."""
    import xxhash

    from strapfmt_capture.statistics import RowStatistics

    target, compute = torch.empty_like(x), RowStatistics()

    def statistics() -> None:
        for chunk in chunks_of(x, _CHUNK_ROWS):
            compute(chunk)

    def copy() -> None:
        target.copy_(x)

    def checksum() -> None:
        xxhash.xxh3_128(bits(x)).digest()

    return {
        "copy in memory": Case(run=copy),
        "statistics": Case(run=statistics),
        "checksum": Case(run=checksum),
    }


def _size(format_: Format, path: Path, x: torch.Tensor) -> float:
    remove(path)
    format_.write(path, x)
    size = n_bytes_below(path)
    remove(path)
    return float(size)
