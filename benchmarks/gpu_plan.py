"""How long there is for what needs a GPU, and the file that says what was found: written after every piece of it."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine, rounded, versions

__all__ = ["COMPILED", "EAGER", "GRAPHS", "MODES", "Plan", "Results", "failure_of"]

EAGER, COMPILED, GRAPHS = MODES = ("eager", "compiled", "CUDA graphs")


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

    def time(self, run: Callable[[], object], n: int = 1, *, n_warm: int = 0) -> float:
        """Return the seconds that `n` runs take, after some that do not count."""
        for _ in range(n_warm):
            run()
        self.wait()
        started = time.perf_counter()
        for _ in range(n):
            run()
        self.wait()
        return time.perf_counter() - started

    def clean(self, *, is_thorough: bool = False) -> None:
        """Give back memory that nothing uses; also what was compiled, if `is_thorough`."""
        if is_thorough and "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        gc.collect()
        if self.device.type == "cuda":
            with suppress(
                RuntimeError
            ):  # after an error the device may refuse everything, and the next row says so
                torch.cuda.empty_cache()


class Results:
    """The file of results: sections, each with the machine and the versions that it was found with.

    Sections of an earlier run stay until they are run again.

    Parameters
    ----------
    path : Path
    plan : Plan
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self._plan = path, plan
        self.sections: dict[str, dict[str, Any]] = {}
        with suppress(OSError, ValueError, KeyError, TypeError):  # there is none, or none that is whole
            self.sections = dict(json.loads(path.read_text())["sections"])

    @contextmanager
    def section(self, name: str) -> Iterator[dict[str, Any]]:
        """Fill a section anew; what ends it early is noted in it, and the next one can begin."""
        self.sections[name] = section = self._header()
        self.save()
        try:
            yield section
        except BaseException as error:
            section["failure"] = failure_of(error)
            print(f"{name}: {section['failure']}", flush=True)
            if not isinstance(error, Exception):
                raise
        finally:
            self.save()

    def measure(
        self, section: dict[str, Any], name: str, needs_s: float, run: Callable[[], dict[str, Any]]
    ) -> None:
        """Add a row to a section, or say that the time did not reach to it, or why it failed."""
        if self._plan.left_s < needs_s:
            section.setdefault("not_reached", []).append(name)
            self.save()
            return
        started = time.monotonic()
        row: dict[str, Any] = {"case": name}
        try:
            row |= run()
        except Exception as error:  # noqa: BLE001 - a row that failed is a result, and the others go on
            row["failure"] = failure_of(error)
        row["took_s"] = time.monotonic() - started
        section.setdefault("rows", []).append(rounded(row))
        self.save()
        print(json.dumps(rounded(row)), flush=True)
        self._plan.clean()

    def save(self) -> None:
        """Write the file; whatever ends the process, it is whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps({"question": "gpu", "sections": self.sections}, indent=1) + "\n")
        os.replace(temporary, self.path)

    def _header(self) -> dict[str, Any]:
        header = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "is_quick": self._plan.is_quick,
            "machine": machine(self._plan.disk),
            "versions": versions(),
        }
        if self._plan.device.type == "cuda":
            try:
                properties = torch.cuda.get_device_properties(self._plan.device)
            except Exception as error:  # noqa: BLE001 - the rest may be of use all the same
                header["machine"]["gpu"] = failure_of(error)
            else:
                header["machine"] |= {
                    "gpu": properties.name,
                    "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
                    "cuda": torch.version.cuda,
                }
        return header


def failure_of(error: BaseException) -> str:
    """Return the kind of an error and the beginning of what it says."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:500]}" if said else type(error).__name__
