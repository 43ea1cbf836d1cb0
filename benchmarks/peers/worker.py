"""The process that measures some systems: it answers requests, a line of JSON each, on standard input and output.

A request names a system and a workload. The workload runs twice in this process, with the capture and without, and both
are timed here, so that neither imports nor loading count. Needs torch and transformers only.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.files import sync
from benchmarks.models import Workload

__all__ = ["Passes", "Run", "System", "Worker", "each", "serve"]

#: Runs all batches of a workload.
Passes = Callable[[Sequence[torch.Tensor]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a system is asked to capture.

    Attributes
    ----------
    model : object
        What the system's `load` returned.
    workload : Workload
    path : Path
        An empty directory for its files.
    n_layers, d_model : int
    source : Path
        Where the model comes from.
    """

    model: Any
    workload: Workload
    path: Path
    n_layers: int
    d_model: int
    source: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """A way to capture the residual stream.

    Attributes
    ----------
    session : callable
        Takes a Run and returns a context manager over the function that runs all batches. The call is not timed, what
        the context manager does is.
    reader : str
        How its files are read, a name in `benchmarks.stored`; empty if there are none.
    load, load_base : callable
        The model that is captured, and the one that runs without capture.
    places : tuple of str
        What it stores of every block.
    is_last_only : bool
        Whether it stores the last block only.
    lacks : dict of str to str
        Phases that it cannot do, with the reason.
    is_durable : bool
        Whether its files are synced when its context ends. If not, whoever times it does that.
    is_slow : bool
        Whether it takes minutes to begin: a smoke test leaves it out.
    note : str
        What a reader of the figures has to know.
    """

    session: Callable[[Run], AbstractContextManager[Passes]]
    reader: str = ""
    load: Callable[[Path, str], Any] = models.load
    load_base: Callable[[Path, str], Any] = models.load
    places: tuple[str, ...] = ("resid_post",)
    is_last_only: bool = False
    lacks: Mapping[str, str] = field(default_factory=dict)
    is_durable: bool = False
    is_slow: bool = False
    note: str = ""

    def sites(self, n_layers: int) -> list[str]:
        """Return the names of what it stores."""
        layers = range(n_layers - 1 if self.is_last_only else 0, n_layers)
        return [f"blocks.{layer}.{place}" for layer in layers for place in self.places]


class Worker:
    """Runs systems on one saved model.

    Parameters
    ----------
    systems : mapping of str to System
    source : Path
        The directory of the model.
    """

    def __init__(self, systems: Mapping[str, System], source: Path) -> None:
        self._systems, self._source = systems, source
        config = json.loads((source / "config.json").read_text())
        self._n_layers, self._d_model = config["num_hidden_layers"], config["hidden_size"]
        self._d_vocab = config["vocab_size"]
        self._models: dict[tuple[Any, str], Any] = {}
        torch.set_num_threads(1)

    def describe(self) -> dict[str, Any]:
        """Return what has to be known of each system, ready for JSON."""
        return {
            name: {
                "sites": system.sites(self._n_layers),
                "reader": system.reader,
                "lacks": dict(system.lacks),
                "is_durable": system.is_durable,
                "is_slow": system.is_slow,
                "note": system.note,
            }
            for name, system in self._systems.items()
        }

    def measure(
        self, system: str, workload: dict[str, Any], path: str, *, is_base_first: bool
    ) -> dict[str, dict[str, float]]:
        """Run a workload with and without one system; return the times of both."""
        asked, work = self._systems[system], Workload(**workload)
        batches = work.batches(self._d_vocab)
        times: dict[str, dict[str, float]] = {}
        for what in ("base", "capture") if is_base_first else ("capture", "base"):
            is_base = what == "base"
            run = Run(
                model=self._model(asked.load_base if is_base else asked.load, work.dtype),
                workload=work,
                path=Path(path),
                n_layers=self._n_layers,
                d_model=self._d_model,
                source=self._source,
            )
            session = nothing(run) if is_base else asked.session(run)
            to_sync = None if is_base or asked.is_durable else run.path
            times[what] = _timed(session, batches, to_sync)
        return times

    def _model(self, load: Callable[[Path, str], Any], dtype: str) -> Any:
        if (load, dtype) not in self._models:
            self._models[load, dtype] = load(self._source, dtype)
        return self._models[load, dtype]


@contextmanager
def nothing(run: Run) -> Iterator[Passes]:
    """Run the batches and capture nothing."""
    yield each(lambda number, prompts: run.workload.run(run.model, prompts))


def each(step: Callable[[int, torch.Tensor], object]) -> Passes:
    """Return a function that does the same with every batch."""

    def passes(batches: Sequence[torch.Tensor]) -> None:
        for number, prompts in enumerate(batches):
            step(number, prompts)

    return passes


def _timed(
    session: AbstractContextManager[Passes], batches: Sequence[torch.Tensor], to_sync: Path | None
) -> dict[str, float]:
    """Return seconds: of the passes, of their thread's CPU, until all is on disk, and of all CPU until then."""
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            started, started_cpu = time.perf_counter(), _cpu_s()
            with session as passes:
                began, began_thread = time.perf_counter(), time.thread_time()
                passes(batches)
                passes_s, thread_s = time.perf_counter() - began, time.thread_time() - began_thread
            if to_sync is not None:
                sync(to_sync)
            total_s, cpu_s = time.perf_counter() - started, _cpu_s() - started_cpu
    finally:
        gc.enable()
    return {"passes_s": passes_s, "thread_s": thread_s, "total_s": total_s, "cpu_s": cpu_s}


def _cpu_s() -> float:
    """CPU time of this process and of children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def serve(systems: Mapping[str, System], packages: Sequence[str]) -> None:
    """Answer requests until standard input ends; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(systems, Path(sys.argv[1]))
    versions = {package: metadata.version(package) for package in packages}
    answers.write(json.dumps({"systems": worker.describe(), "versions": versions}) + "\n")
    for line in sys.stdin:
        answer: dict[str, Any]
        try:
            answer = worker.measure(**json.loads(line))
        except Exception as error:  # noqa: BLE001 - whoever asked shows it in the system's row
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[-1]}
        answers.write(json.dumps(answer) + "\n")
