"""How everything here is timed: interleaved rounds, medians of paired ratios, the machine stored with the result."""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from strapfmt_capture.machine import filesystem

__all__ = [
    "DISK_REPEATS",
    "Case",
    "Question",
    "Report",
    "Settings",
    "filesystem",
    "in_rounds",
    "is_installed",
    "machine",
    "quartiles",
    "rounded",
    "scratch",
    "versions",
]

#: Runs in a row of anything that fills the page cache. On a virtual machine, memory that has lain free for two seconds
#: may belong to the host again, and the first to touch it waits for it: a write then runs at a tenth of its speed.
#: Which run that meets is chance; the quickest of a few in a row has found the memory of those before it.
DISK_REPEATS = 3

_PACKAGES = (
    "strapfmt",
    "torch",
    "transformers",
    "numpy",
    "pyarrow",
    "duckdb",
    "xxhash",
    "safetensors",
    "datasets",
    "pylance",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much to measure and where.

    Attributes
    ----------
    is_quick : bool
        Sizes for a smoke test: the numbers mean nothing.
    rounds : int
    directory : Path
        Scratch files go below it: what is measured is the disk it lies on.
    peers : bool
        Measure others too, those that are installed.
    peers_directory : Path
        Where environments of peers are that cannot be installed beside strapfmt.
    """

    is_quick: bool = False
    rounds: int = 7
    directory: Path = Path("build/benchmarks")
    peers: bool = True
    peers_directory: Path = Path(__file__).parent / ".peers"

    def size(self, full: int, quick: int) -> int:
        """Return the size to use."""
        return quick if self.is_quick else full


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing that is timed.

    Attributes
    ----------
    run : callable
        What is timed. A float that it returns is taken as the seconds, which leaves out what does not belong to them.
    before, after : callable
        Not timed, around every run.
    repeats : int
        Runs in a row, of which the quickest counts.
    """

    run: Callable[[], object]
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    repeats: int = 1


@dataclass(slots=True)
class Report:
    """The answer to one question.

    Attributes
    ----------
    text : str
        What is compared, in a sentence.
    setup : dict
        Sizes and options.
    rows : list of dict
        A case each: its median time, rate where bytes are known, and the median ratio to its reference; or why it
        could not be measured.
    facts : dict
        Anything else that was found.
    """

    text: str
    setup: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(
        self,
        group: str,
        seconds: Mapping[str, Sequence[float]],
        *,
        reference: str,
        n_bytes: int | None = None,
        is_rate: bool = False,
    ) -> None:
        """Add the cases of one group, each compared with `reference` round by round.

        Parameters
        ----------
        n_bytes : int, optional
            What each run moves, for GB/s.
        is_rate : bool
            Report the ratio of rates (more is better) and not of times (less is better).
        """
        for name, times in seconds.items():
            pairs = list(zip(times, seconds[reference], strict=True))
            ratios = [theirs / ours if is_rate else ours / theirs for ours, theirs in pairs]
            row: dict[str, Any] = {"group": group, "case": name, "median_s": statistics.median(times)}
            if n_bytes is not None:
                row["gb_per_s"] = n_bytes / row["median_s"] / 1e9
            row |= {
                "reference": reference,
                "ratio": statistics.median(ratios),
                "ratio_of": "rates" if is_rate else "times",
                "ratio_quartiles": quartiles(ratios),
                "seconds": list(times),
            }
            self.rows.append(row)

    def save(self, path: Path, settings: Settings) -> None:
        """Write the report with machine, versions and date."""
        document = {
            "question": path.stem,
            "text": self.text,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(settings.directory),
            "versions": versions(),
            "settings": {
                name: value.name if isinstance(value, Path) else value
                for name, value in asdict(settings).items()
            },
            "setup": self.setup,
            "rows": [rounded(row) for row in self.rows],
            "facts": rounded(self.facts),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

    def __str__(self) -> str:
        width = max((len(row["case"]) for row in self.rows), default=0)
        lines, group = [self.text], ""
        for row in self.rows:
            if row["group"] != group:
                group = row["group"]
                lines.append(f"  {group}  (ratio of {row['ratio_of']} to {row['reference']!r})")
            if "failure" in row:
                lines.append(f"    {row['case']:{width}}  {row['failure']}")
                continue
            low, high = row["ratio_quartiles"]
            rate = f"  {row['gb_per_s']:8.2f} GB/s" if "gb_per_s" in row else ""
            lines.append(
                f"    {row['case']:{width}}  {row['ratio']:8.3f}  [{low:.2f}, {high:.2f}]"
                f"  {row['median_s'] * 1e3:10.3f} ms{rate}{_captured(row)}"
            )
        lines += [f"  {name}: {value}" for name, value in rounded(self.facts).items()]
        return "\n".join(lines)


#: A module of this package offers one as `measure`.
Question = Callable[[Settings], Report]


def in_rounds(
    cases: Mapping[str, Case], settings: Settings, *, more: int = 1, warm_up: bool = True
) -> dict[str, list[float]]:
    """Time all `cases` once a round, in an order that rotates, so that drift of the machine meets all alike.

    Parameters
    ----------
    more : int
        So many times the rounds of the settings, for cases that take milliseconds.
    warm_up : bool
        Run a round that is not counted first.

    Returns
    -------
    dict of str to list of float
        Seconds by case, [rounds].
    """
    names = list(cases)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    is_quick = settings.is_quick
    for number in range(-1 if warm_up and not is_quick else 0, settings.rounds * (1 if is_quick else more)):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            taken = min(_time(cases[name]) for _ in range(1 if is_quick else cases[name].repeats))
            if number >= 0:
                seconds[name].append(taken)
    return seconds


def _time(case: Case) -> float:
    gc.collect()
    case.before()
    gc.disable()
    try:
        start = time.perf_counter()
        told = case.run()
        taken = time.perf_counter() - start
    finally:
        gc.enable()
        case.after()
    return told if isinstance(told, float) else taken


@contextmanager
def scratch(settings: Settings) -> Iterator[Path]:
    """Yield a directory for the files of one benchmark; it is gone afterwards."""
    settings.directory.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=settings.directory))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def is_installed(package: str) -> bool:
    """Return whether a distribution is installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def versions() -> dict[str, str]:
    """Return the versions of what is measured."""
    found = {name: metadata.version(name) for name in _PACKAGES if is_installed(name)}
    return {"python": platform.python_version(), **found}


def machine(directory: Path) -> dict[str, Any]:
    """Return what the numbers depend on."""
    directory.mkdir(parents=True, exist_ok=True)
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "filesystem": filesystem(directory),
        "load": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    facts: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    return f"{facts.get('model name', platform.processor())} ({family})"


def _captured(row: Mapping[str, Any]) -> str:
    if "thread_ratio" not in row:
        return ""
    cost = "".join(f"  {what} {row[f'{what}_ratio']:.3f}" for what in ("thread", "cpu", "total"))
    return cost + (
        f"  {row['n_rows']} of {row['n_expected']} rows, {row['verdict']}" if "n_rows" in row else ""
    )


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower and the upper quartile."""
    if len(values) < 2:
        return [values[0], values[0]]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, high]


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(inner) for inner in value]
    return value
