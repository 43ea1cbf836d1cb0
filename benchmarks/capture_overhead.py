"""Capturing: what the residual stream of every block costs a model, until it is on disk, and whether it is right."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.files import sync
from benchmarks.measure import Report, Settings, quartiles, scratch
from benchmarks.models import SMALL, TINY, Workload, save
from benchmarks.peers.environments import ENVIRONMENTS, python_of
from benchmarks.peers.process import PeerError, Process
from benchmarks.stored import Check, Reference, check, reference

__all__ = ["measure"]

_LIMIT_BYTES = 256 << 20


@dataclass(slots=True)
class _Case:
    """What is known of one system in one workload."""

    process: Process | None
    facts: Mapping[str, Any]
    times: list[dict[str, dict[str, float]]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    failure: str | None = None


def measure(settings: Settings) -> Report:
    """Measure every system on every workload."""
    torch.set_num_threads(1)
    shape, workloads = (TINY if settings.is_quick else SMALL), _workloads(settings)
    report = Report(
        "Running a Llama of random weights while its residual stream goes to disk. Every system runs the same prompts "
        "with and without capture, one after the other in one process; a ratio is of that pair."
    )
    report.setup = {"shape": asdict(shape), "workloads": {work.name: asdict(work) for work in workloads}}
    with scratch(settings) as directory, ExitStack() as running:
        source = directory / "model"
        save(shape, source)
        processes, missing = _start(settings, source, directory, running)
        report.setup["versions"] = {name: process.versions for name, process in processes.items()}
        for workload in workloads:
            cases = {
                name: _Case(process, facts)
                for process in processes.values()
                for name, facts in process.systems.items()
                if not (settings.is_quick and facts["is_slow"])
            }
            cases |= {name: _Case(None, {}, failure=why) for name, why in missing.items()}
            true = reference(source, workload)
            _run(cases, true, directory, settings)
            report.rows += [_row(name, case, workload) for name, case in cases.items()]
        report.facts = _limits(directory, settings)
    notes = {name: case.facts["note"] for name, case in cases.items() if case.facts.get("note")}
    report.facts["notes"] = notes
    return report


def _workloads(settings: Settings) -> list[Workload]:
    prefill = {"phase": "prefill", "n_prompt": settings.size(128, 8)}
    decode = {"phase": "decode", "n_prompt": settings.size(16, 4), "n_batches": 1}
    if settings.is_quick:
        return [
            Workload(**prefill, n_sequences=2, n_batches=2, dtype="bfloat16"),
            Workload(**decode, n_sequences=2, n_new=3),
        ]
    return [
        Workload(**prefill, n_sequences=1, n_batches=12),
        Workload(**prefill, n_sequences=8, n_batches=2),
        Workload(**decode, n_sequences=1, n_new=64),
        Workload(**decode, n_sequences=8, n_new=32),
        Workload(**prefill, n_sequences=1, n_batches=12, dtype="bfloat16"),
    ]


def _start(
    settings: Settings, source: Path, directory: Path, running: ExitStack
) -> tuple[dict[str, Process], dict[str, str]]:
    """Start all workers; return them, and why others are missing."""
    ours = Process(Path(sys.executable), "ours", source, directory / "ours.log")
    processes, missing = {"ours": running.enter_context(ours)}, {}
    for name in ENVIRONMENTS if settings.peers else ():
        try:
            python = python_of(name, settings.peers_directory.absolute(), is_made=not settings.is_quick)
            if python is not None:
                process = Process(python, name, source, directory / f"{name}.log")
                processes[name] = running.enter_context(process)
        except PeerError as error:
            missing[name] = str(error)
        except subprocess.CalledProcessError as error:
            missing[name] = f"not installed: {error.output.strip().splitlines()[-1]}"
    return processes, missing


def _run(cases: Mapping[str, _Case], true: Reference, directory: Path, settings: Settings) -> None:
    """Run a pair of every system once a round, in an order that rotates; in every other round the capture first."""
    names = list(cases)
    for number in range(0 if settings.is_quick else -1, settings.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            case = cases[name]
            case.failure = case.failure or case.facts["lacks"].get(true.workload.phase)
            if case.failure is None:
                _run_pair(name, case, true, directory, is_base_first=number % 2 == 0, counts=number >= 0)


def _run_pair(
    name: str, case: _Case, true: Reference, directory: Path, *, is_base_first: bool, counts: bool
) -> None:
    assert case.process is not None
    path = directory / "captured"
    path.mkdir()
    try:
        workload = asdict(true.workload)
        times = case.process.ask(
            system=name, workload=workload, path=str(path.resolve()), is_base_first=is_base_first
        )
        if counts:
            case.times.append(times)
            if case.facts["reader"]:
                case.checks.append(check(path, case.facts["reader"], case.facts["sites"], true))
    except PeerError as error:
        case.failure = f"failed: {error}"
    finally:
        shutil.rmtree(path)


def _row(name: str, case: _Case, workload: Workload) -> dict[str, Any]:
    row: dict[str, Any] = {
        "group": workload.name,
        "case": name,
        "reference": "no capture",
        "ratio_of": "times",
    }
    if case.failure is not None:
        return row | {"failure": case.failure}
    row |= _overheads(case)
    if case.checks:
        worst = min(case.checks, key=lambda found: (found.n_rows - found.n_wrong, found.n_exact))
        row |= {
            "n_rows": worst.n_rows,
            "n_expected": worst.n_expected,
            "n_wrong": worst.n_wrong,
            "verdict": worst.verdict,
            "syncs_itself": case.facts["is_durable"],
        }
    return row


def _overheads(case: _Case) -> dict[str, Any]:
    """Return ratios, each to the passes alone of the same pair."""
    pairs = [(times["capture"], times["base"]) for times in case.times]
    ratios = {
        what: [ours[f"{what}_s"] / theirs[f"{what}_s"] for ours, theirs in pairs]
        for what in ("passes", "thread", "cpu", "total")
    }
    return {
        "median_s": statistics.median(ours["passes_s"] for ours, _ in pairs),
        "ratio": statistics.median(ratios["passes"]),
        "ratio_quartiles": quartiles(ratios["passes"]),
        **{f"{what}_ratio": statistics.median(ratios[what]) for what in ("thread", "cpu", "total")},
        **{f"{what}_quartiles": quartiles(ratios[what]) for what in ("thread", "cpu", "total")},
        "seconds": [ours["passes_s"] for ours, _ in pairs],
        "pairs": case.times,
    }


def _limits(directory: Path, settings: Settings) -> dict[str, float]:
    """Measure what a core copies and what the disk takes, the quickest of a few."""
    x = torch.ones(settings.size(_LIMIT_BYTES, 1 << 20), dtype=torch.uint8)
    y, path = torch.zeros_like(x), directory / "limit"

    def write() -> None:
        path.write_bytes(memoryview(x.numpy()))
        sync(path)

    quickest = {}
    for name, run in (("memory_copy_gb_per_s", lambda: y.copy_(x)), ("raw_write_gb_per_s", write)):
        times = list(_times(run))
        quickest[name] = x.numel() / min(times) / 1e9
    return quickest


def _times(run: Any) -> Iterator[float]:
    for _ in range(5):
        started = time.perf_counter()
        run()
        yield time.perf_counter() - started
