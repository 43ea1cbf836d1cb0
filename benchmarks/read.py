"""Reading: how fast rows come back, in order and at random, warm and cold, beside a bare memory map."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.files import n_bytes_below, sync
from benchmarks.formats import Format, Opened, OpenedMatrix, Strapfmt, peers
from benchmarks.measure import DISK_REPEATS, Case, Report, Settings, filesystem, in_rounds, scratch
from benchmarks.workloads import activations, bits, drop_cached, some_ordinals

__all__ = ["measure"]

_WIDTH = 2_048
_GATHERED = 4_096


class _Bare:
    """The matrix and nothing else in a file, mapped: what no format can beat."""

    def write(self, path: Path, x: torch.Tensor) -> None:
        path.write_bytes(memoryview(bits(x)).cast("B"))

    def open(self, path: Path) -> Opened:
        return OpenedMatrix(
            torch.from_numpy(np.memmap(path, np.uint16, "c").reshape(-1, _WIDTH)).view(torch.bfloat16)
        )


def measure(settings: Settings) -> Report:
    """Read one bfloat16 matrix from every format."""
    torch.set_num_threads(1)
    n_rows = settings.size(65_536, 2_048)
    n_gathered = settings.size(_GATHERED, 256)
    x = activations(n_rows, _WIDTH)
    n_bytes = x.numel() * x.element_size()
    report = Report(
        "Reading a matrix of bfloat16 into memory that is there already; every answer is compared with the matrix. "
        "Warm: all of it lies in the page cache. Cold: none of it, and opening counts; the host below a virtual "
        "machine may still hold it."
    )
    report.setup = {"rows": n_rows, "width": _WIDTH, "gathered": n_gathered, "bytes": n_bytes}
    shard_bytes = settings.size(64 << 20, 2 << 20)
    formats: dict[str, Format] = {
        "bare memory map": _Bare(),
        "strapfmt": Strapfmt(),
        "strapfmt, checksums compared": Strapfmt(is_verified=True),
        f"strapfmt, shards of {shard_bytes >> 20} MiB": Strapfmt(shard_bytes=shard_bytes),
        "strapfmt, zstd": Strapfmt(codec="zstd"),
        **peers(settings),
    }
    with scratch(settings) as directory:
        paths = {}
        for number, (name, format_) in enumerate(formats.items()):
            suffix = ".strap" if name.startswith("strapfmt") else ""
            paths[name] = directory / f"{number}{suffix}"
            format_.write(paths[name], x)
            sync(paths[name])
        report.facts["size_ratio"] = {name: n_bytes_below(path) / n_bytes for name, path in paths.items()}
        _compare(report, settings, _Readers(x, formats, paths, n_gathered), list(formats))
    return report


def _compare(report: Report, settings: Settings, readers: _Readers, names: list[str]) -> None:
    gathers = [name for name in names if "checksums" not in name]
    groups: list[tuple[str, Callable[..., Case], type[_Job], list[str]]] = [
        ("warm gather", readers.warm, _Gather, gathers),
        ("warm sequential", readers.warm, _Read, names),
        ("cold gather", readers.cold, _ColdGather, gathers),
        ("cold sequential", readers.cold, _Read, names),
    ]
    for group, make, kind, chosen in groups:
        if group.startswith("cold") and filesystem(settings.directory) == "tmpfs":
            report.facts[group] = "a file system in memory is never cold"
            continue
        cases = {name: make(name, kind) for name in chosen}
        seconds = in_rounds(cases, settings, more=5 if group == "warm gather" else 1)
        del cases
        n_bytes = readers.n_bytes if kind is _Read else readers.gathered_bytes
        report.add(group, seconds, reference="bare memory map", n_bytes=n_bytes)


class _Job:
    """What a case reads, and whether it got it; the rows differ from round to round, alike for all cases."""

    def __init__(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self._x, self.out, self._round = x, out, 0

    def __call__(self, opened: Opened) -> float | None:
        raise NotImplementedError

    def _expected(self) -> torch.Tensor:
        raise NotImplementedError

    def check(self) -> None:
        """Compare with the matrix and go on to the next round."""
        if not torch.equal(self.out.view(torch.int16), self._expected().view(torch.int16)):
            raise RuntimeError("what was read is not what was written")
        self.out.fill_(0)
        self._round += 1


class _Read(_Job):
    def __call__(self, opened: Opened) -> None:
        opened.read(self.out)

    def _expected(self) -> torch.Tensor:
        return self._x


class _Gather(_Job):
    """Several gathers in a row, as a loader makes them; the time is that of one."""

    _n_gathers = 8

    def __call__(self, opened: Opened) -> float | None:
        wanted = [self._ordinals(number) for number in range(self._n_gathers)]
        start = time.perf_counter()
        for ordinals in wanted:
            opened.gather(ordinals, self.out)
        return (time.perf_counter() - start) / self._n_gathers

    def _expected(self) -> torch.Tensor:
        return self._x[torch.from_numpy(self._ordinals(self._n_gathers - 1))]

    def _ordinals(self, number: int) -> npt.NDArray[np.int64]:
        seed = self._round * self._n_gathers + number
        return some_ordinals(len(self._x), len(self.out), seed=seed)


class _ColdGather(_Gather):
    """One gather, of what is on the disk."""

    _n_gathers = 1

    def __call__(self, opened: Opened) -> None:
        opened.gather(self._ordinals(0), self.out)


class _Readers:
    """Makes cases for one matrix, stored in all formats."""

    def __init__(
        self, x: torch.Tensor, formats: Mapping[str, Format], paths: Mapping[str, Path], n_gathered: int
    ) -> None:
        self._x, self._formats, self._paths = x, formats, paths
        self._all, self._some = torch.empty_like(x), torch.empty_like(x[:n_gathered])
        self.n_bytes = self._all.nbytes
        self.gathered_bytes = self._some.nbytes

    def warm(self, name: str, kind: type[_Job]) -> Case:
        """Read again and again from what is open, its pages in the cache and in the page tables."""
        job, opened = self._job(kind), self._formats[name].open(self._paths[name])
        opened.read(self._all)
        return Case(run=lambda: job(opened), after=job.check)

    def cold(self, name: str, kind: type[_Job]) -> Case:
        """Open and read what is not in the page cache."""
        job, path = self._job(kind), self._paths[name]
        return Case(
            run=lambda: job(self._formats[name].open(path)),
            before=lambda: drop_cached(path),
            after=job.check,
            repeats=DISK_REPEATS,
        )

    def _job(self, kind: type[_Job]) -> _Job:
        return kind(self._x, self._all if kind is _Read else self._some)
