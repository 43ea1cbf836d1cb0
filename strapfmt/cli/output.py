"""Owns how commands print: JSON and CSV for programs on stdout, progress, remarks and errors on stderr."""

import csv
import dataclasses
import datetime
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console

from strapfmt.text import visible, with_shown_paths

__all__ = [
    "EXIT_CLOSED_PIPE",
    "console",
    "notes",
    "plain_json",
    "print_csv",
    "print_json",
    "printable",
    "told",
    "writing_stdout",
]

EXIT_CLOSED_PIPE = 141  # as a shell shows a program that SIGPIPE ended

_PIPED_WIDTH = 120  # of headings; lines are as long as they are


def console() -> Console:
    """Return the console of results: stdout. Lines are wrapped on a terminal only."""
    return _console(stderr=False)


def notes() -> Console:
    """Return the console of progress and remarks: stderr."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if is_terminal else _PIPED_WIDTH
    return _Console(
        stderr=stderr,
        width=width,
        highlight=False,
        markup=False,
        emoji=False,
        soft_wrap=not is_terminal,
    )


class _Console(Console):
    """A console whose failures look like those of `print`."""

    def print(self, *objects: Any, **options: Any) -> None:
        if self.stderr:
            super().print(*objects, **options)
            return
        with writing_stdout():
            super().print(*objects, **options)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


@contextmanager
def writing_stdout() -> Iterator[None]:
    """Flush stdout at the end; say of a failure that it was stdout's, and leave quietly where nobody reads on.

    Raises
    ------
    OSError
        If stdout cannot be written.
    SystemExit
        With `EXIT_CLOSED_PIPE`, if its reader has gone.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_stdout()
        sys.exit(EXIT_CLOSED_PIPE)
    except OSError as error:
        _discard_stdout()
        raise OSError(error.errno, f"writing to stdout: {error.strerror}") from error


def _discard_stdout() -> None:
    """Send what is still buffered nowhere, as Python would try to write it once more when it exits."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def print_json(value: object) -> None:
    """Print one JSON document to stdout."""
    text = json.dumps(plain_json(value), indent=2, allow_nan=False)
    with writing_stdout():
        print(text)


def plain_json(value: Any) -> Any:
    """Return `value` as JSON types.

    NaN and infinities become the strings "NaN", "Infinity" and "-Infinity", times ISO 8601, blobs hex digits.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if hasattr(value, "tolist"):
        return plain_json(value.tolist())
    if isinstance(value, Iterable):
        return [plain_json(item) for item in value]
    return str(value)


def printable(text: str) -> str:
    """Return lines of text that is meant for people, with what a terminal would act on escaped."""
    return "\n".join(line if line.isprintable() else visible(line) for line in text.split("\n"))


def told(error: Exception) -> str:
    """Return an error as one printable text for people."""
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        message = str(error) or type(error).__name__
    return printable(with_shown_paths(message))


def print_csv(names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print comma-separated values to stdout: what is no number or text as JSON has it, lists and structs as JSON.

    On a terminal, text is made safe to show.
    """
    show = visible if sys.stdout.isatty() else str
    writer = csv.writer(sys.stdout, lineterminator="\n")
    with writing_stdout():
        writer.writerow([show(name) for name in names])
        for row in rows:
            writer.writerow([show(item) if isinstance(item, str) else _csv_value(item) for item in row])


def _csv_value(value: object) -> object:
    if value is None or isinstance(value, bool):
        return value
    plain = plain_json(value)
    return plain if isinstance(plain, str | int | float) else json.dumps(plain)
