"""A worker as the parent sees it: started in an environment, asked for measurements, ended."""

from __future__ import annotations

import json
import subprocess
from contextlib import suppress
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any, Self

__all__ = ["PeerError", "Process"]

_ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 900.0


class PeerError(Exception):
    """A system could not do what it was asked for; the message is one line."""


class Process:
    """A worker, which lives until the end of a with statement.

    Parameters
    ----------
    python : Path
        The interpreter of its environment.
    module : str
        Of `benchmarks.peers`.
    source : Path
        The directory of the model.
    log : Path
        Where its standard error goes.

    Attributes
    ----------
    systems : dict of str to dict
        What it can measure.
    versions : dict of str to str

    Raises
    ------
    PeerError
        If it does not start.
    """

    def __init__(self, python: Path, module: str, source: Path, log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), "-m", f"benchmarks.peers.{module}", str(source.resolve())],
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            hello = self._answer()
        except PeerError:
            self._end()
            raise
        self.systems: dict[str, dict[str, Any]] = hello["systems"]
        self.versions: dict[str, str] = hello["versions"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        Raises
        ------
        PeerError
            If the worker says so, or has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self._last_words()) from None
        answer = self._answer()
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self._end()

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = Timer(_TIMEOUT_S, self._process.kill)
        timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise PeerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else f"its process ended with {code} and said nothing"
