"""Decoding: what one step of a capture, few rows of many sites, costs the thread that writes."""

from __future__ import annotations

import os

import numpy as np
import torch

from benchmarks.files import sync
from benchmarks.formats import remove
from benchmarks.measure import DISK_REPEATS, Case, Report, Settings, in_rounds, scratch
from benchmarks.workloads import activations, bits
from strapfmt.schema import SiteSpec
from strapfmt.spec import STATISTICS
from strapfmt.writer import DatasetWriter
from strapfmt_capture.statistics import RowStatistics

__all__ = ["measure"]

_WIDTH = 2_048


def measure(settings: Settings) -> Report:
    """Write a few hundred decoding steps."""
    torch.set_num_threads(1)
    n_sites, n_sequences, n_steps = settings.size(32, 2), 8, settings.size(256, 16)
    report = Report(
        f"{n_steps} decoding steps of {n_sequences} sequences and {n_sites} sites of {_WIDTH} bfloat16, until durable. "
        "The limit copies each site's rows into a buffer and writes it when it is full."
    )
    report.setup = {"sites": n_sites, "sequences": n_sequences, "steps": n_steps, "width": _WIDTH}
    x = activations(n_sequences * n_sites, _WIDTH)
    sites = [bits(part) for part in torch.split(x, n_sequences)]
    compute = RowStatistics()

    with scratch(settings) as directory:
        path = directory / "d.strap"

        def strapfmt(statistics: tuple[str, ...]) -> None:
            with DatasetWriter(path) as writer:
                names = [f"blocks.{number}.resid_post" for number in range(n_sites)]
                for name in names:
                    writer.add_site(
                        SiteSpec(name=name, dtype="bfloat16", shape=(_WIDTH,), statistics=statistics)
                    )
                for _ in range(n_steps):
                    first = writer.reserve("row", n_sequences)
                    rows = np.arange(first, first + n_sequences)
                    columns = compute(x, statistics)
                    for number, (name, values) in enumerate(zip(names, sites, strict=True)):
                        some = slice(number * n_sequences, (number + 1) * n_sequences)
                        part = {column: array[some] for column, array in columns.items()}
                        writer.write(name, values, rows=rows, statistics=part)
                    writer.end_step()

        def raw() -> None:
            buffers = np.empty((n_sites, 128 * n_sequences, _WIDTH), np.uint16)
            path.mkdir()
            flags = os.O_CREAT | os.O_WRONLY
            files = [os.open(path / str(number), flags) for number in range(n_sites)]
            for step in range(n_steps):
                at = step % 128 * n_sequences
                for number, values in enumerate(sites):
                    buffers[number, at : at + n_sequences] = values
                    if step % 128 == 127 or step == n_steps - 1:
                        os.write(files[number], memoryview(buffers[number, : at + n_sequences]).cast("B"))
            for file in files:
                os.close(file)
            sync(path)

        cases = {
            "raw buffers": raw,
            "strapfmt": lambda: strapfmt(STATISTICS),
            "strapfmt, no statistics": lambda: strapfmt(()),
        }
        seconds = in_rounds(
            {
                name: Case(run=run, after=lambda: remove(path), repeats=DISK_REPEATS)
                for name, run in cases.items()
            },
            settings,
        )
    n_bytes = n_steps * x.numel() * x.element_size()
    report.add("decoding steps", seconds, reference="raw buffers", n_bytes=n_bytes, is_rate=True)
    report.facts["us_a_step"] = {
        name: float(np.median(times)) / n_steps * 1e6 for name, times in seconds.items()
    }
    return report
