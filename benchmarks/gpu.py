"""All that needs a GPU, in one command and under nine minutes: is it right, then what does it cost.

    python -m benchmarks.gpu                    the tests marked gpu, then the figures, most wanted first
    python -m benchmarks.gpu --only tests       one section; the file keeps the others as they are
    python -m benchmarks.gpu --only figures --mode compiled
    python -m benchmarks.gpu --quick --device cpu --only figures    shows that it runs, and measures nothing

One file holds the results, and is written after every piece of them: whatever ends the process, what was found until
then is there. What the time does not suffice for is listed as not reached.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_costs import is_wrong, measure_all
from benchmarks.gpu_plan import MODES, Plan, Results, failure_of
from benchmarks.measure import rounded

__all__ = ["main"]

_ROOT = Path(__file__).parents[1]
_SIZES = (64 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
#: What the tests may take where something else is to follow, and what is kept for writing down how they ended.
_TESTS_S, _RESERVE_S = 240.0, 10.0
_TEST_S = 150
_LOG_CHARS = 3000
#: What each section imports, so that what is missing is told in the first seconds.
_NEEDS = {
    "tests": ("pytest", "tokenizers", "transformers:StaticCache", "transformers.generation:CompileConfig"),
    "limits": (),
    "figures": ("transformers:LlamaForCausalLM", "transformers:StaticCache.early_initialization"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run everything and store the results."""
    given = _parser().parse_args(arguments)
    given.disk.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in _NEEDS if name in (given.only or _NEEDS)]
    plan = Plan(
        device=torch.device(given.device),
        is_quick=given.quick,
        until=time.monotonic() + 60 * given.minutes,
        modes=tuple(given.mode or MODES),
        memory=given.memory,
        disk=given.disk,
    )
    results = Results(given.results, plan)
    sections: dict[str, Callable[[dict[str, Any]], None]] = {
        "tests": partial(_tests, plan, results, is_alone=chosen == ["tests"]),
        "limits": partial(_limits, plan, results),
        "figures": partial(measure_all, plan, results),
    }
    lacking = {name: lacks for name in chosen if (lacks := _lacking(name, plan.device))}
    for name, lacks in lacking.items():
        print(f"{name}: missing {lacks}", flush=True)
    for name in chosen:
        with results.section(name) as section:
            if name in lacking:
                raise RuntimeError(f"missing {lacking[name]}")
            sections[name](section)
    sys.exit(_summary({name: results.sections[name] for name in chosen}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a directory in memory")
    parser.add_argument("--disk", type=Path, default=Path("build/benchmarks"), help="a directory on the disk")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--mode", action="append", choices=MODES, help="repeat for more; all by default")
    parser.add_argument(
        "--only", action="append", choices=list(_NEEDS), help="repeat for more; all by default"
    )
    return parser


def _lacking(section: str, device: torch.device) -> str:
    """Return what is missing for a section, and why."""
    found = []
    if device.type == "cuda" and not torch.cuda.is_available():
        found.append(f"a GPU that PyTorch {torch.__version__} can use")
    for name in _NEEDS[section]:
        module, _, attribute = name.partition(":")
        try:
            held = importlib.import_module(module)
            if attribute:
                attrgetter(attribute)(held)
        except Exception as error:  # noqa: BLE001 - whatever it is, the section cannot run
            found.append(f"{name} ({failure_of(error)})")
    return ", ".join(found)


def _summary(sections: dict[str, dict[str, Any]]) -> int:
    """Print what went wrong and what is missing; return whether anything did."""
    cases = [case for section in sections.values() for case in section.get("cases", [])]
    rows = [row for section in sections.values() for row in section.get("rows", [])]
    failed = [case["test"] for case in cases if _has_failed(case)]
    wrong = [row["case"] for row in rows if is_wrong(row)]
    broken = [f"{name}: {section['failure']}" for name, section in sections.items() if "failure" in section]
    missed = [name for section in sections.values() for name in section.get("not_reached", [])]
    print(f"{len(cases)} tests, {len(failed)} failed; {len(rows)} rows, {len(wrong)} failed or wrong")
    print("\n".join([*failed, *wrong, *broken]) or "all well")
    print(f"not reached: {', '.join(missed) or 'nothing'}", flush=True)
    return int(bool(failed or wrong or broken))


# Right?


def _tests(plan: Plan, results: Results, section: dict[str, Any], *, is_alone: bool) -> None:
    """Run the tests that need a GPU, file by file; add each with its outcome."""
    until = plan.until if is_alone else min(plan.until, time.monotonic() + _TESTS_S)
    section["cases"] = []
    for file in sorted((_ROOT / "tests").glob("test_*.py")):
        if not re.search(r"^(@|pytestmark = )pytest\.mark\.gpu\b", file.read_text(), re.MULTILINE):
            continue
        left_s = until - time.monotonic() - _RESERVE_S
        if left_s < _RESERVE_S:
            section.setdefault("not_reached", []).append(file.name)
            continue
        section["cases"] += _run_file(file, left_s)
        results.save()


def _run_file(file: Path, timeout_s: float) -> list[dict[str, Any]]:
    """Run one file of tests in a process of its own; return an outcome for each, and one for what ended it early."""
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-W", "default", "--tb=short"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", str(_TEST_S)]
    else:
        command += [
            "-o",
            "addopts=",
        ]  # with the options there, settings of a plugin that is missing are an error
    with tempfile.TemporaryDirectory() as directory:
        report, log = Path(directory) / "report.xml", Path(directory) / "log.txt"
        ended = _run([*command, f"--junitxml={report}", str(file)], log, timeout_s)
        said = log.read_text(errors="replace")
        print(said[-_LOG_CHARS:], flush=True)
        try:
            cases = [_outcome(file, case) for case in ElementTree.parse(report).getroot().iter("testcase")]
        except (OSError, ElementTree.ParseError):
            cases, ended = _outcomes_in(said), f"{ended}, and left no report"
            is_well = False
        else:
            is_well = ended == "it ended with 0" or any(_has_failed(case) for case in cases)
    if not is_well:
        cases.append({"test": file.name, "outcome": "error", "why": ended, "detail": said[-_LOG_CHARS:]})
    return cases


def _run(command: list[str], log: Path, timeout_s: float) -> str:
    """Run a command; return how it ended."""
    paths = [str(_ROOT), str(_ROOT / "capture"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command,
                cwd=_ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"it was ended after {timeout_s:.0f} s"
    return f"it ended with {code}"


def _has_failed(case: dict[str, Any]) -> bool:
    return case["outcome"] not in ("passed", "skipped")


def _outcome(file: Path, case: ElementTree.Element) -> dict[str, Any]:
    name = f"{file.stem}::{case.get('name')}"
    for kind in ("failure", "error", "skipped"):
        if (told := case.find(kind)) is not None:
            why = (told.get("message") or "").strip().splitlines()
            detail = {"detail": (told.text or "")[-_LOG_CHARS:]} if kind != "skipped" else {}
            return {"test": name, "outcome": kind, "why": why[0] if why else "", **detail}
    return {"test": name, "outcome": "passed"}


def _outcomes_in(log: str) -> list[dict[str, Any]]:
    """Return the outcomes that pytest has printed."""
    lines = re.findall(r"^(?:\S*/)?(\w+)\.py::(\S.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", log, re.MULTILINE)
    names = {"FAILED": "failure"}
    return [
        {"test": f"{file}::{test}", "outcome": names.get(kind, kind.lower())} for file, test, kind in lines
    ]


# What bounds everything.


def _limits(plan: Plan, results: Results, section: dict[str, Any]) -> None:
    """Add the rates of disk, memory and transfers, each by itself."""
    measures: dict[str, Callable[[], Any]] = {
        "disk_gb_per_s": partial(_disk_rate, plan, plan.disk),
        "memory_gb_per_s": partial(_disk_rate, plan, plan.memory),
    }
    if plan.device.type == "cuda":
        measures["on_device_gb_per_s"] = partial(_device_rate, plan)
        for name, is_pinned in (("locked", True), ("other", False)):
            for size in _SIZES:
                measures[f"to_{name}_gb_per_s, {size} bytes"] = partial(
                    _transfer_rate, plan, size, is_pinned=is_pinned
                )
    found = section["found"] = {}
    for name, measure in measures.items():
        try:
            found[name] = rounded(measure())
        except Exception as error:  # noqa: BLE001 - a limit that cannot be found is a result
            found[name] = failure_of(error)
        results.save()
    print(found, flush=True)
    plan.clean()


def _rate(plan: Plan, n_bytes: int, run: Callable[[], object], *, n: int = 10) -> float:
    return n * n_bytes / plan.time(run, n, n_warm=1) / 1e9


def _device_rate(plan: Plan) -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    return _rate(plan, source.nbytes, lambda: target.copy_(source))


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


if __name__ == "__main__":
    main()
