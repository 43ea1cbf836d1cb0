"""What a machine can take: its limits as it tells them, and its rates as they are measured, some seconds in all.

A rate is bytes of activations (bfloat16) a second. `capture` is the whole way from memory to a durable dataset, the
others are its parts: each of them bounds it.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from strapfmt import spec
from strapfmt.codecs import CODECS
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter
from strapfmt_capture.statistics import RowStatistics

__all__ = ["Gpu", "Limits", "Machine", "Rates", "examine", "filesystem"]

_WIDTH = 2_048
_CHUNK_ROWS = 1_024
_REPEATS = 2
_N_SYNCS = 8
_GPU_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One CUDA device.

    Attributes
    ----------
    name : str
    memory_bytes, free_bytes : int
    to_pinned, to_pageable : float or None
        Bytes a second from the device to host memory that is locked, and that is not; None where it is refused.
    """

    name: str
    memory_bytes: int
    free_bytes: int
    to_pinned: float | None
    to_pageable: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the system allows this process.

    Attributes
    ----------
    n_cores : int
    load : float
        Processes that wanted to run over the last minute.
    memory_bytes : int
    free_bytes : int
        On the disk.
    filesystem : str
        Its type, of the directory that is written to.
    open_files, locked_bytes : int or None
        Hard limit of open files, and of locked memory; None: no limit.
    may_idle : bool
        Whether a process may be scheduled only when a core has nothing else to do (SCHED_IDLE).
    """

    n_cores: int
    load: float
    memory_bytes: int
    free_bytes: int
    filesystem: str
    open_files: int | None
    locked_bytes: int | None
    may_idle: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Bytes a second.

    Attributes
    ----------
    copy, statistics : float
        Of one core: copying, and the five statistics of each row.
    disk : float
        A plain file, written and made durable.
    capture, capture_plain : float
        A dataset, written and made durable, with statistics and without.
    codecs : dict of str to float
        The same as `capture`, for each codec that compresses.
    sync_s : float
        Seconds that making a small file durable takes, the median.
    """

    copy: float
    statistics: float
    disk: float
    capture: float
    capture_plain: float
    codecs: dict[str, float]
    sync_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What `examine` found."""

    directory: Path
    limits: Limits
    rates: Rates
    gpus: tuple[Gpu, ...]


def examine(directory: Path, *, n_bytes: int = 256 << 20) -> Machine:
    """Measure what capturing to `directory` can reach.

    Parameters
    ----------
    directory : Path
        An existing directory; what is written there is removed.
    n_bytes : int
        Written by each measurement of the disk, twice over.

    Raises
    ------
    OSError
        If the directory cannot be written to, or has no room.
    """
    return Machine(
        directory=directory,
        limits=_limits(directory),
        rates=_rates(directory, n_bytes),
        gpus=tuple(_gpu(torch.device("cuda", number)) for number in range(torch.cuda.device_count())),
    )


def _limits(directory: Path) -> Limits:
    pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    return Limits(
        n_cores=len(os.sched_getaffinity(0)),
        load=os.getloadavg()[0],
        memory_bytes=pages * page_bytes,
        free_bytes=shutil.disk_usage(directory).free,
        filesystem=filesystem(directory),
        open_files=_hard(resource.RLIMIT_NOFILE),
        locked_bytes=_hard(resource.RLIMIT_MEMLOCK),
        may_idle=_may_idle(),
    )


def _hard(kind: int) -> int | None:
    _, hard = resource.getrlimit(kind)
    return None if hard == resource.RLIM_INFINITY else hard


def _may_idle() -> bool:
    """Try it in a process of its own, which need not be able to come back from it."""
    child = os.posix_spawn("/bin/true", ["true"], os.environ)
    try:
        os.sched_setscheduler(child, os.SCHED_IDLE, os.sched_param(0))
    except OSError:
        return False
    finally:
        os.waitpid(child, 0)
    return True


def filesystem(directory: Path) -> str:
    """Return the type of the file system that holds `directory`."""
    best, kind = "", "unknown"
    target = f"{directory.resolve()}/"
    for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines():
        _, point, found, *_ = line.split()
        if target.startswith(point.rstrip("/") + "/") and len(point) >= len(best):
            best, kind = point, found
    return kind


def _rates(directory: Path, n_bytes: int) -> Rates:
    x = torch.randn(max(n_bytes // 2 // _WIDTH, _CHUNK_ROWS), _WIDTH).to(torch.bfloat16)
    target, compute = torch.empty_like(x), RowStatistics()

    def per_second(run: Callable[[], object]) -> float:
        return x.nbytes / min(_timed(run) for _ in range(_REPEATS))

    with tempfile.TemporaryDirectory(prefix="strapfmt-doctor-", dir=directory) as scratch:
        path = Path(scratch)
        return Rates(
            copy=per_second(lambda: target.copy_(x)),
            statistics=per_second(lambda: [compute(chunk) for chunk in torch.split(x, _CHUNK_ROWS)]),
            disk=per_second(lambda: _write_file(path / "plain", x)),
            capture=per_second(lambda: _write_dataset(path / "a.strap", x, compute)),
            capture_plain=per_second(lambda: _write_dataset(path / "a.strap", x, None)),
            codecs={
                name: per_second(lambda name=name: _write_dataset(path / "a.strap", x, compute, name))  # type: ignore[misc]
                for name in CODECS
                if name != "none"
            },
            sync_s=statistics.median(
                _timed(lambda: _write_file(path / "small", x[:1])) for _ in range(_N_SYNCS)
            ),
        )


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _write_file(path: Path, x: torch.Tensor) -> None:
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        for chunk in torch.split(x.view(torch.uint8), _CHUNK_ROWS):
            left = memoryview(chunk.numpy().data).cast("B")
            while left:
                left = left[os.write(fd, left) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_dataset(path: Path, x: torch.Tensor, compute: RowStatistics | None, codec: str = "none") -> None:
    names = spec.STATISTICS if compute else ()
    with DatasetWriter(path, mode="overwrite") as writer:
        writer.add_site(SiteSpec(name="x", dtype="bfloat16", shape=(_WIDTH,), codec=codec, statistics=names))
        for chunk in torch.split(x, _CHUNK_ROWS):
            first = writer.reserve("row", len(chunk))
            rows = np.arange(first, first + len(chunk))
            columns = compute(chunk) if compute else {}
            writer.write("x", chunk.view(torch.uint16).numpy(), rows=rows, statistics=columns)
            writer.end_step()


def _gpu(device: torch.device) -> Gpu:
    free_bytes, memory_bytes = torch.cuda.mem_get_info(device)
    source = torch.empty(_GPU_BYTES, dtype=torch.uint8, device=device)

    def per_second(is_pinned: bool) -> float | None:
        try:
            target = torch.empty(_GPU_BYTES, dtype=torch.uint8, pin_memory=is_pinned)
        except RuntimeError:  # more than may be locked
            return None

        def copy() -> None:
            target.copy_(source)
            torch.cuda.synchronize(device)

        copy()
        return _GPU_BYTES / min(_timed(copy) for _ in range(_REPEATS))

    return Gpu(
        name=torch.cuda.get_device_name(device),
        memory_bytes=memory_bytes,
        free_bytes=free_bytes,
        to_pinned=per_second(True),
        to_pageable=per_second(False),
    )
