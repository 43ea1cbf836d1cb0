"""All that needs a GPU, in one command and under nine minutes: is it right, then what does it cost.

    python -m benchmarks.gpu                    the tests marked gpu, then the figures, most wanted first
    python -m benchmarks.gpu --quick --device cpu   shows that it runs, on any machine, and measures nothing

What the time does not suffice for is listed as such, and nothing is left out silently. One file holds the results.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import strapfmt
from benchmarks.measure import machine, quartiles, rounded, versions
from benchmarks.models import EIGHT_B, ONE_B, TINY
from strapfmt_capture.session import Capture

__all__ = ["main"]

_ROOT = Path(__file__).parents[1]
_SIZES = (64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
_SUSTAINED_S = 20.0
_MODES = ("eager", "compiled", "CUDA graphs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much to measure, and until when.

    Attributes
    ----------
    device : torch.device
    is_quick : bool
    until : float
        In seconds of `time.monotonic`.
    modes : tuple of str
        Ways of running a model.
    memory, disk : Path
        Directories in memory and on a disk, to write to.
    """

    device: torch.device
    is_quick: bool
    until: float
    modes: tuple[str, ...]
    memory: Path
    disk: Path

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One way of running a model.

    Attributes
    ----------
    phase : str
        "prefill" or "decode".
    n_sequences, n_tokens : int
        Sequences in a batch; tokens of a prompt, or tokens decoded behind a short one.
    mode : str
        "eager", "compiled", or "CUDA graphs".
    """

    phase: str
    n_sequences: int
    n_tokens: int
    mode: str = "eager"

    @property
    def name(self) -> str:
        """What the row is called."""
        return f"{self.phase} {self.n_sequences} x {self.n_tokens}, {self.mode}"


@dataclass(slots=True)
class Results:
    """What was found, and what there was no time for."""

    tests: list[dict[str, Any]] = field(default_factory=list)
    limits: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)

    def measure(self, plan: Plan, name: str, needs_s: float, run: Callable[[], dict[str, Any]]) -> None:
        """Add a row, or say that there was no time for it, or why it failed."""
        if plan.left_s < needs_s:
            self.not_measured.append(f"{name}: no time left")
            return
        started = time.monotonic()
        try:
            row = {"case": name, **run()}
        except Exception as error:  # noqa: BLE001 - a row that failed is a result, and the others go on
            row = {"case": name, "failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        gc.collect()
        if plan.device.type == "cuda":
            torch.cuda.empty_cache()
        self.rows.append(row | {"took_s": time.monotonic() - started})
        print(json.dumps(rounded(self.rows[-1])), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run everything and store the results."""
    given = _parser().parse_args(arguments)
    given.disk.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        device=torch.device(given.device),
        is_quick=given.quick,
        until=time.monotonic() + 60 * given.minutes,
        modes=tuple(given.mode or _MODES),
        memory=given.memory,
        disk=given.disk,
    )
    results = Results()
    if not given.no_tests:
        results.tests = _tests()
    results.limits = _limits(plan)
    print(json.dumps(rounded(results.limits)), flush=True)
    _measure_all(plan, results)
    _save(given.results, plan, results)
    n_wrong = sum(test["outcome"] not in ("passed", "skipped") for test in results.tests)
    print(
        f"{len(results.tests)} tests, {n_wrong} failed; {len(results.rows)} rows; not measured:", flush=True
    )
    print("\n".join(results.not_measured) or "nothing", flush=True)
    sys.exit(bool(n_wrong))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a directory in memory")
    parser.add_argument("--disk", type=Path, default=Path("build/benchmarks"), help="a directory on the disk")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--mode", action="append", choices=_MODES, help="repeat for more; all by default")
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests marked gpu")
    return parser


# Right?


def _tests() -> list[dict[str, Any]]:
    """Run the tests that need a GPU; return each with its outcome."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            "--timeout",
            "150",
            f"--junitxml={report}",
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), str(_ROOT / "capture")])}
        subprocess.run(command, cwd=_ROOT, env=environment, check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return [_outcome(case) for case in cases]


def _outcome(case: ElementTree.Element) -> dict[str, Any]:
    what = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), None)
    told = "" if what is None else (case.find(what).get("message") or "").splitlines()[0]  # type: ignore[union-attr]
    return {"test": case.get("name"), "outcome": what or "passed", **({"why": told} if told else {})}


# What bounds everything.


def _limits(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = {
        "disk_gb_per_s": _disk_rate(plan, plan.disk),
        "memory_gb_per_s": _disk_rate(plan, plan.memory),
    }
    if plan.device.type == "cuda":
        found["to_locked_gb_per_s"] = {size: _transfer_rate(plan, size, is_pinned=True) for size in _SIZES}
        found["to_other_gb_per_s"] = {size: _transfer_rate(plan, size, is_pinned=False) for size in _SIZES}
        source = torch.empty(1 << 30, dtype=torch.uint8, device=plan.device)
        target = torch.empty_like(source)
        found["on_device_gb_per_s"] = _rate(plan, source.nbytes, lambda: target.copy_(source))
    return found


def _rate(plan: Plan, n_bytes: int, run: Callable[[], object], *, n: int = 10) -> float:
    run()
    plan.wait()
    started = time.perf_counter()
    for _ in range(n):
        run()
    plan.wait()
    return n * n_bytes / (time.perf_counter() - started) / 1e9


def _transfer_rate(plan: Plan, n_bytes: int, *, is_pinned: bool) -> float:
    source = torch.empty(n_bytes, dtype=torch.uint8, device=plan.device)
    target = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=is_pinned)
    return _rate(plan, n_bytes, lambda: target.copy_(source, non_blocking=True), n=50)


def _disk_rate(plan: Plan, directory: Path) -> float:
    """A plain file, made durable."""
    data = memoryview(bytearray(8 << 20))
    n = 2 if plan.is_quick else 256
    path = directory / "strapfmt-gpu.raw"
    started = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            for _ in range(n):
                file.write(data)
            os.fsync(file.fileno())
        return n * len(data) / (time.perf_counter() - started) / 1e9
    finally:
        path.unlink(missing_ok=True)


# What it costs.


def _measure_all(plan: Plan, results: Results) -> None:
    """Go through the models, and in each through the ways to run it, most wanted first."""
    shapes = {"tiny": TINY} if plan.is_quick else {"1B": ONE_B, "8B": EIGHT_B}
    results.measure(plan, "hook, microseconds a site", 15, partial(_hook_cost, plan))
    for name, shape in shapes.items():
        needed_s = 10.0 if name != "8B" else 40.0
        if plan.left_s < needed_s:
            results.not_measured.append(f"{name}: no time left")
            continue
        model = shape.build_on(plan.device, torch.bfloat16)
        for work in _works(plan):
            results.measure(plan, f"{name}, {work.name}", needed_s, partial(_cost, plan, model, work))
        results.measure(plan, f"{name}, sustained prefill", 30, partial(_sustained, plan, model))
        for peer in (_to_host_and_save, _output_hidden_states):
            work = Work(
                phase="prefill", n_sequences=2 if plan.is_quick else 16, n_tokens=8 if plan.is_quick else 512
            )
            row = partial(_cost, plan, model, work, peer)
            results.measure(plan, f"{name}, {work.name}, {peer.__name__.strip('_')}", needed_s, row)
        del model


def _works(plan: Plan) -> Iterator[Work]:
    n_prompt, n_new = (8, 4) if plan.is_quick else (512, 64)
    for mode in plan.modes:
        for n_sequences in (1, 16, 64):
            yield Work(phase="decode", n_sequences=n_sequences, n_tokens=n_new, mode=mode)
        for n_sequences in (1, 16):
            yield Work(phase="prefill", n_sequences=n_sequences, n_tokens=n_prompt, mode=mode)


def _runner(plan: Plan, model: Any, work: Work) -> Callable[[], object]:
    """Return what runs the work once, compiled before if so asked."""
    n_prompt = work.n_tokens if work.phase == "prefill" else 16
    ids = torch.randint(3, model.config.vocab_size, (work.n_sequences, n_prompt), device=plan.device)
    mask = torch.ones_like(ids)
    model.forward = type(model).forward.__get__(model)
    if work.mode != "eager":
        how = "reduce-overhead" if work.mode == "CUDA graphs" else None
        model.forward = torch.compile(model.forward, mode=how, fullgraph=True)
    if work.phase == "prefill":
        return lambda: model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    options: dict[str, Any] = (
        {} if work.mode == "eager" else {"cache_implementation": "static", "disable_compile": True}
    )
    return lambda: model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=work.n_tokens,
        min_new_tokens=work.n_tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )


Session = Callable[[Any, Path], AbstractContextManager[Any]]


@contextmanager
def _captured(model: Any, directory: Path) -> Iterator[Any]:
    with strapfmt.capture(
        model, directory / "run.strap", sites="blocks.*.resid_post", quiet=True, progress=False
    ) as cap:
        yield cap


@contextmanager
def _to_host_and_save(model: Any, directory: Path) -> Iterator[None]:
    """What one writes without a library: `.cpu()` in a hook, `torch.save` at the end."""
    held: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, args, output: held.append(output.cpu()))
        for block in model.model.layers
    ]
    yield
    for handle in handles:
        handle.remove()
    torch.save(held, directory / "held.pt")


@contextmanager
def _output_hidden_states(model: Any, directory: Path) -> Iterator[None]:
    """The model's own, kept on the device until the end."""
    kept: list[Any] = []
    model.config.output_hidden_states = True
    handle = model.register_forward_hook(lambda module, args, output: kept.append(output.hidden_states))
    yield
    handle.remove()
    model.config.output_hidden_states = False
    torch.save([state.cpu() for states in kept for state in states], directory / "held.pt")


def _cost(plan: Plan, model: Any, work: Work, session: Session = _captured) -> dict[str, Any]:
    """Run the work with and without capture in turns: pairs of times, rows on disk and whether every value is right."""
    run = _runner(plan, model, work)
    facts: dict[str, Any] = {}
    with torch.no_grad():
        _timed(plan, run, n_warm=2)
        n_runs = max(1, min(200, int((0.05 if plan.is_quick else 0.4) / _timed(plan, run))))
        pairs: list[tuple[float, float]] = []
        same: list[float] = []
        for _ in range(1 if plan.is_quick else 7):
            before = _timed(plan, run, n_runs)
            with tempfile.TemporaryDirectory(dir=plan.memory) as directory:
                with session(model, Path(directory)) as cap:
                    _timed(plan, run, n_warm=2)  # compiles again, with the taps
                    taken = _timed(plan, run, n_runs)
                if isinstance(cap, Capture):
                    facts = _account(cap, n_runs, taken)
            _timed(plan, run)
            after = _timed(plan, run, n_runs)
            pairs.append((taken, (before + after) / 2))
            same.append(after / before)
    ratios = [taken / base for taken, base in pairs]
    return {
        "step_ms": 1e3 * median(base for _, base in pairs) / n_runs,
        "overhead": median(ratios) - 1,
        "overhead_quartiles": [each - 1 for each in quartiles(ratios)],
        "same_against_same": median(same) - 1,
        **facts,
    }


def _timed(plan: Plan, run: Callable[[], object], n: int = 1, *, n_warm: int = 0) -> float:
    for _ in range(n_warm):
        run()
    plan.wait()
    started = time.perf_counter()
    for _ in range(n):
        run()
    plan.wait()
    return time.perf_counter() - started


def _account(cap: Capture, n_runs: int, seconds: float) -> dict[str, Any]:
    report = cap.report
    n_bytes = report.n_bytes / max(report.n_steps, 1)
    with strapfmt.open(cap.path) as ds:
        n_stored = sum(len(site) for site in ds.sites.values())
    return {
        "rows_seen": sum(site.expected for site in report.sites),
        "rows_stored": n_stored,
        "rows_dropped": report.n_dropped,
        "stall_s": report.stall_s,
        "bytes_a_pass": n_bytes,
        "notes": list(report.notes),
    }


def _hook_cost(plan: Plan) -> dict[str, Any]:
    """What a hook costs the host, on a model that does nothing: ours beside one that does nothing."""
    n_sites = 64
    model = _Idle(n_sites, plan.device)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=plan.device)

    def per_site(session: AbstractContextManager[Any]) -> float:
        with session, torch.no_grad():
            _timed(plan, lambda: model(ids), 20)
            started = time.thread_time()
            for _ in range(50):
                model(ids)
            return (time.thread_time() - started) / 50 / n_sites * 1e6

    def noop(*_: Any) -> None:
        pass

    bare = [per_site(nullcontext()) for _ in range(5)]
    handles = [layer.register_forward_hook(noop) for layer in model.layers]
    empty = [per_site(nullcontext()) for _ in range(5)]
    for handle in handles:
        handle.remove()
    ours: list[float] = []
    for _ in range(5):
        with tempfile.TemporaryDirectory(dir=plan.memory) as directory:
            path = Path(directory) / "run.strap"
            ours.append(per_site(strapfmt.capture(model, path, sites="layers.*", quiet=True, progress=False)))
    return {"empty_hook_us": median(empty) - median(bare), "capture_us": median(ours) - median(bare)}


class _Idle(torch.nn.Module):
    """Layers that return what they are given."""

    def __init__(self, n_layers: int, device: torch.device) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(n_layers))
        self.x = torch.randn(1, 1, 4_096, device=device, dtype=torch.bfloat16)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.x
        for layer in self.layers:
            x = layer(x)
        return x


def _sustained(plan: Plan, model: Any) -> dict[str, Any]:
    """Prefill without a pause into a directory in memory: the rate, and how much memory it took."""
    run = _runner(
        plan,
        model,
        Work(phase="prefill", n_sequences=2 if plan.is_quick else 16, n_tokens=8 if plan.is_quick else 512),
    )
    free = os.statvfs(plan.memory).f_bavail * os.statvfs(plan.memory).f_frsize
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=plan.memory) as directory, torch.no_grad():
        base_s = min(_timed(plan, run) for _ in range(3))
        with _captured(model, Path(directory)) as cap:
            started, n = time.perf_counter(), 0
            limit_s = 0.5 if plan.is_quick else _SUSTAINED_S
            while time.perf_counter() - started < limit_s and cap.report.n_bytes < free // 2:
                run()
                n += 1
            plan.wait()
            passes_s = time.perf_counter() - started
        total_s = time.perf_counter() - started
        report = cap.report
        return {
            "gb_per_s": report.n_bytes / total_s / 1e9,
            "passes": n,
            "overhead": passes_s / n / base_s - 1,
            "stall_s": report.stall_s,
            "rows_dropped": report.n_dropped,
            "host_memory_grew_gib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20,
        }


def _save(path: Path, plan: Plan, results: Results) -> None:
    gpu: dict[str, Any] = {}
    if plan.device.type == "cuda":
        properties = torch.cuda.get_device_properties(plan.device)
        gpu = {
            "gpu": properties.name,
            "gpu_memory_gib": properties.total_memory / 2**30,
            "cuda": torch.version.cuda,
        }
    document = {
        "question": "gpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "is_quick": plan.is_quick,
        "machine": {**machine(plan.disk), **gpu},
        "versions": versions(),
        "tests": results.tests,
        "limits": rounded(results.limits),
        "rows": [rounded(row) for row in results.rows],
        "not_measured": results.not_measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
