"""Owns what commands print: JSON for programs on stdout, tables for people, everything else on stderr."""

import csv
import dataclasses
import datetime
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

from strapfmt.text import visible

__all__ = [
    "EXIT_CLOSED_PIPE",
    "cell",
    "console",
    "notes",
    "plain_json",
    "print_csv",
    "print_json",
    "print_table",
    "printable",
    "writing_stdout",
]

EXIT_CLOSED_PIPE = 141  # as a shell shows a program that SIGPIPE ended

_PIPED_WIDTH = 120
_CELL_CHARS = 60
_LIST_ITEMS = 4


def console() -> Console:
    """Return the console of results: stdout, with a fixed width where no terminal says one."""
    return _console(stderr=False)


def notes() -> Console:
    """Return the console of progress and remarks: stderr."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    is_terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if is_terminal else _PIPED_WIDTH
    return _Console(stderr=stderr, width=width, highlight=False, markup=False, emoji=False, soft_wrap=False)


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
    """Return `value` as JSON types; NaN and infinities become the strings "NaN", "Infinity" and "-Infinity"."""
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
    if hasattr(value, "tolist"):
        return plain_json(value.tolist())
    if isinstance(value, Iterable):
        return [plain_json(item) for item in value]
    return str(value)


def printable(text: str) -> str:
    """Return lines of text that is meant for people, with what a terminal would act on escaped."""
    return "\n".join(line if line.isprintable() else visible(line) for line in text.split("\n"))


def print_csv(names: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print comma-separated values to stdout: times as ISO 8601, blobs in hex, lists and structs as JSON.

    On a terminal, text is made safe to show.
    """
    show = visible if sys.stdout.isatty() else str
    writer = csv.writer(sys.stdout, lineterminator="\n")
    with writing_stdout():
        writer.writerow([show(name) for name in names])
        for row in rows:
            writer.writerow([show(item) if isinstance(item, str) else _csv_value(item) for item in row])


def _csv_value(value: object) -> object:
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    plain = plain_json(value)
    return plain if isinstance(plain, str) else json.dumps(plain)


def print_table(
    names: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    title: str | None = None,
    to: Console | None = None,
) -> None:
    """Print a table for people: numbers to the right, text escaped and cut.

    Parameters
    ----------
    names : sequence of str
        Column heads.
    rows : iterable of sequences
        Python values.
    title : str, optional
        Shown above.
    to : rich.console.Console, optional
        Where; default `console()`.
    """
    rows = [list(row) for row in rows]
    table = Table(title=title and Text(visible(title)), title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(names):
        is_number = any(_is_number(row[i]) for row in rows)
        table.add_column(
            Text(visible(name)),
            justify="right" if is_number else "left",
            overflow="fold",
            header_style="bold",
        )
    for row in rows:
        table.add_row(*map(cell, row))
    (to or console()).print(table)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cell(value: object) -> Text:
    """Return one value as a person wants to see it: escaped, short, never read as markup."""
    if value is None:
        return Text("-", style="dim")
    if isinstance(value, Text):
        return value
    if isinstance(value, float):
        return Text(f"{value:.4g}")
    if isinstance(value, Path):
        return Text(visible(str(value)))
    if isinstance(value, list | tuple):
        more = f", … {len(value)} in all" if len(value) > _LIST_ITEMS else ""
        return Text(f"[{', '.join(cell(item).plain for item in value[:_LIST_ITEMS])}{more}]")
    return Text(visible(str(value), _CELL_CHARS))
