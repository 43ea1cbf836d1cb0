"""The commands that check: `verify` and `repair`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from strapfmt.cli.app import DatasetPath, JsonOption
from strapfmt.cli.output import console, notes, print_json, printable

__all__ = ["repair", "verify"]


def verify(dataset: DatasetPath, as_json: JsonOption = False) -> None:
    """Check every byte of a dataset.

    Exit code 1 if there is a problem.
    """
    import strapfmt

    with _progress("checking") as progress:
        report = strapfmt.verify(dataset, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        console().print(printable(str(report)), soft_wrap=True)
    if not report.valid:
        raise typer.Exit(1)


def repair(
    dataset: DatasetPath,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new dataset to write.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Rescue every complete row into a new dataset.

    The damaged or unclosed DATASET is only read. Exit code 1 if committed rows were lost or a file is wrong.
    """
    import strapfmt

    with _progress("rescuing") as progress:
        report = strapfmt.repair(dataset, out, progress=progress)
    if as_json:
        print_json(report.to_dict())
    else:
        console().print(printable(str(report)), soft_wrap=True)
    if not report.is_complete:
        raise typer.Exit(1)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Give a function that shows bytes done of bytes in all, or None where no person watches."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(*columns, console=notes(), transient=True) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
