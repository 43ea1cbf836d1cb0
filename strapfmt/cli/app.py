"""Owns the typer application that the commands register with, and the arguments they share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from strapfmt import __version__
from strapfmt.errors import DatasetExistsError

__all__ = ["DatasetPath", "JsonOption", "SiteName", "app", "new_dataset"]

app = typer.Typer(
    name="strapfmt",
    help=(
        "Capture a language model's activations to disk, query them in SQL, train on them.\n\n"
        "Start with: strapfmt demo. Every command takes --json, which prints one JSON document on stdout; "
        "progress and remarks go to stderr. Exit codes: 0 done, 1 a problem was found (verify, repair), "
        "2 wrong usage or input, 141 the reader of a pipe has gone."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DatasetPath = Annotated[
    Path, typer.Argument(metavar="DATASET", help="A dataset, NAME.strap.", show_default=False)
]
SiteName = Annotated[
    str | None,
    typer.Argument(metavar="[SITE]", help="A stored site, such as blocks.3.resid_post.", show_default=False),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", show_default=False)
]


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"strapfmt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


@contextmanager
def new_dataset(path: Path, advice: str) -> Iterator[None]:
    """Say of a dataset that exists already what can be done on the command line, rather than in Python."""
    try:
        yield
    except DatasetExistsError as error:
        raise DatasetExistsError(f"{path} exists already: {advice}") from error
