"""Decoding: what one step of a capture, few rows of many sites, costs the thread that writes."""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.files import sync
from benchmarks.formats import remove
from benchmarks.measure import DISK_REPEATS, Case, Report, Settings, in_rounds, scratch
from benchmarks.workloads import activations, bits
from strapfmt.schema import SiteSpec
from strapfmt.spec import STATISTICS
from strapfmt.writer import DatasetWriter
from strapfmt_capture.drain import Drain
from strapfmt_capture.intake import turn_bytes
from strapfmt_capture.items import Finish, Item, StepEnd, StepStart
from strapfmt_capture.passes import Step, Tokens
from strapfmt_capture.ring import Ring
from strapfmt_capture.small_values import Gatherer
from strapfmt_capture.statistics import RowStatistics

__all__ = ["measure"]

_WIDTH = 2_048


def measure(settings: Settings) -> Report:
    """Write a few hundred decoding steps."""
    torch.set_num_threads(1)
    n_sites, n_sequences, n_steps = settings.size(32, 2), 8, settings.size(256, 16)
    report = Report(
        f"{n_steps} decoding steps of {n_sequences} sequences and {n_sites} sites of {_WIDTH} bfloat16, until durable. "
        "The limit copies each site's rows into a buffer and writes it when it is full. strapfmt takes them from a "
        "ring, in turns, as in a capture; step by step, each is handed to the writer alone, as a recorder does."
    )
    report.setup = {"sites": n_sites, "sequences": n_sequences, "steps": n_steps, "width": _WIDTH}
    x = activations(n_sequences * n_sites, _WIDTH)
    with scratch(settings) as directory:
        path = directory / "d.strap"
        cases = {
            "raw buffers": partial(_raw, path, x, n_sites, n_steps),
            "strapfmt": partial(_drain, path, x, n_sites, n_steps, STATISTICS),
            "strapfmt, no statistics": partial(_drain, path, x, n_sites, n_steps, ()),
            "strapfmt, step by step": partial(_step_by_step, path, x, n_sites, n_steps, STATISTICS),
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


def _sites(n_sites: int, statistics: tuple[str, ...]) -> list[SiteSpec]:
    return [
        SiteSpec(name=f"blocks.{number}.resid_post", dtype="bfloat16", shape=(_WIDTH,), statistics=statistics)
        for number in range(n_sites)
    ]


def _drain(path: Path, x: torch.Tensor, n_sites: int, n_steps: int, statistics: tuple[str, ...]) -> None:
    """Fill a ring as hooks do, and drain it as a capture does."""
    writer = DatasetWriter(path)
    ring: Ring[Item] = Ring()
    drain = Drain(
        ring,
        writer,
        specs={},
        spill=None,
        max_bytes=turn_bytes(ring.n_bytes),
        on_turn=lambda _, position: ring.release(position),
    )
    thread = threading.Thread(target=drain.run)
    thread.start()
    sites, n_sequences = _sites(n_sites, statistics), len(x) // n_sites
    for site in sites:
        ring.publish(site)
    gatherer, parts, slots = Gatherer(), torch.split(x, n_sequences), np.arange(n_sequences)
    for number in range(n_steps):
        step = _step(writer, number, slots)
        ring.publish(StepStart(step=step))
        for site, part in zip(sites, parts, strict=True):
            if not gatherer.has_room(ring, part.nbytes, step.rows):
                raise drain.failure or MemoryError("the ring has no room for a small value")
            gatherer.add(site, part, part.nbytes)
        gatherer.flush()
        ring.publish(_end(step))
    ring.publish(Finish(facts={}, seen={}))
    ring.close()
    thread.join()
    ring.free()
    if drain.failure is not None:
        raise drain.failure


def _step(writer: DatasetWriter, number: int, slots: np.ndarray) -> Step:
    n = len(slots)
    first, step = writer.reserve("row", n), writer.reserve("step", 1)
    rows = np.arange(first, first + n)
    tokens = Tokens(
        slots=slots,
        sequence_ids=slots,
        positions=np.full(n, number),
        previous=rows - n,
        token_ids=np.zeros(n, np.int32),
    )
    return Step(
        step=step,
        phase="decode",
        n_sequences=n,
        n_query=1,
        selected=None,
        rows=rows,
        tokens=tokens,
        sequences=None,
        events=None,
    )


def _end(step: Step) -> StepEnd:
    return StepEnd(step=step, started_ns=0, duration_s=0.0, status="complete", reason=None, dropped={})


def _step_by_step(
    path: Path, x: torch.Tensor, n_sites: int, n_steps: int, statistics: tuple[str, ...]
) -> None:
    compute, n_sequences = RowStatistics(), len(x) // n_sites
    parts = [bits(part) for part in torch.split(x, n_sequences)]
    with DatasetWriter(path) as writer:
        sites = _sites(n_sites, statistics)
        for site in sites:
            writer.add_site(site)
        for _ in range(n_steps):
            first = writer.reserve("row", n_sequences)
            rows = np.arange(first, first + n_sequences)
            columns = compute(x, statistics)
            for number, (site, values) in enumerate(zip(sites, parts, strict=True)):
                some = slice(number * n_sequences, (number + 1) * n_sequences)
                part = {column: array[some] for column, array in columns.items()}
                writer.write(site.name, values, rows=rows, statistics=part)
            writer.end_step()


def _raw(path: Path, x: torch.Tensor, n_sites: int, n_steps: int) -> None:
    n_sequences = len(x) // n_sites
    parts = [bits(part) for part in torch.split(x, n_sequences)]
    buffers = np.empty((n_sites, 128 * n_sequences, _WIDTH), np.uint16)
    path.mkdir()
    files = [os.open(path / str(number), os.O_CREAT | os.O_WRONLY) for number in range(n_sites)]
    for step in range(n_steps):
        at = step % 128 * n_sequences
        for number, values in enumerate(parts):
            buffers[number, at : at + n_sequences] = values
            if step % 128 == 127 or step == n_steps - 1:
                os.write(files[number], memoryview(buffers[number, : at + n_sequences]).cast("B"))
    for file in files:
        os.close(file)
    sync(path)
