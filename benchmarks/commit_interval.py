"""Commits: what one costs with 32 sites, and so how often a writer should make one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.formats import remove
from benchmarks.measure import DISK_REPEATS, Case, Report, Settings, in_rounds, scratch
from benchmarks.workloads import activations, bits
from strapfmt.schema import SiteSpec
from strapfmt.spec import STATISTICS
from strapfmt.writer import COMMIT_INTERVAL_S, DatasetWriter
from strapfmt_capture.statistics import RowStatistics

__all__ = ["measure"]

_WIDTH = 2_048
_BATCH_ROWS = 1_024
_INTERVALS_S = (1.0, 2.0, 5.0, 10.0, 30.0)


def measure(settings: Settings) -> Report:
    """Commit with more and less that waits for its batch to fill, then write at full speed with many commits."""
    n_sites = settings.size(32, 3)
    report = Report(
        f"A commit with {n_sites} sites of {_WIDTH} bfloat16. What does not fill a record batch of {_BATCH_ROWS} rows "
        "yet is written once more at every commit, so the fuller they are the more it costs; a capture's batches are "
        "half full on average. `until the call returns` is what the drain waits; the rest is the I/O thread's."
    )
    report.setup = {"sites": n_sites, "width": _WIDTH, "batch_rows": _BATCH_ROWS}
    torch.set_num_threads(1)
    x = activations(_BATCH_ROWS, _WIDTH)
    with scratch(settings) as directory:
        cases: dict[str, Case] = {}
        for n_rows in (1, _BATCH_ROWS // 2, _BATCH_ROWS - 1):
            for is_durable in (False, True):
                what = "until it is durable" if is_durable else "until the call returns"
                run = _one_commit(directory / "d.strap", x[:n_rows], n_sites, is_durable=is_durable)
                cases[f"{n_rows} rows a site wait, {what}"] = Case(run=run)
        seconds = in_rounds(cases, settings)
        half = f"{_BATCH_ROWS // 2} rows a site wait, until it is durable"
        report.add("one commit", seconds, reference=half)
        cost = float(np.median(seconds[half]))
        report.facts["share_of_the_disk's_time"] = {f"every {s:g} s": cost / s for s in _INTERVALS_S}
        report.facts["default_interval_s"] = COMMIT_INTERVAL_S
        n_rows = settings.size(16, 1) * _BATCH_ROWS
        streams = {
            name: Case(
                run=_stream(directory / "s.strap", x, n_rows, settings.size(8, 2), interval_s),
                after=lambda: remove(directory / "s.strap"),
                repeats=DISK_REPEATS,
            )
            for name, interval_s in (("one, at the end", 1e9), ("every 0.25 s", 0.25), ("every 0.1 s", 0.1))
        }
        report.add(
            "writing as fast as it goes, 8 sites, with commits",
            in_rounds(streams, settings),
            reference="one, at the end",
            n_bytes=n_rows * settings.size(8, 2) * _WIDTH * 2,
            is_rate=True,
        )
    return report


def _one_commit(path: Path, x: torch.Tensor, n_sites: int, *, is_durable: bool) -> Callable[[], float]:
    columns = RowStatistics()(x)

    def run() -> float:
        with DatasetWriter(path, mode="overwrite", commit_interval_s=0.0) as writer:
            for number in range(n_sites):
                name = f"blocks.{number}.resid_post"
                writer.add_site(SiteSpec(name=name, dtype="bfloat16", shape=(_WIDTH,)))
                writer.write(name, bits(x), rows=np.arange(len(x)), statistics=columns)
            writer.wait()
            start = time.perf_counter()
            writer.end_step()
            if is_durable:
                writer.wait()
            taken = time.perf_counter() - start
        remove(path)
        return taken

    return run


def _stream(path: Path, x: torch.Tensor, n_rows: int, n_sites: int, interval_s: float) -> Callable[[], None]:
    def run() -> None:
        compute, columns = RowStatistics(), {name: np.zeros(0) for name in STATISTICS}
        names = [f"blocks.{number}.resid_post" for number in range(n_sites)]
        step_rows = 3 * _BATCH_ROWS // 4  # so that commits find rows that wait
        with DatasetWriter(path, commit_interval_s=interval_s) as writer:
            for name in names:
                writer.add_site(SiteSpec(name=name, dtype="bfloat16", shape=(_WIDTH,)))
            for first in range(0, n_rows, step_rows):
                part = x[: min(step_rows, n_rows - first)]
                for name in names:
                    columns = compute(part)
                    writer.write(
                        name, bits(part), rows=np.arange(first, first + len(part)), statistics=columns
                    )
                writer.end_step()

    return run
