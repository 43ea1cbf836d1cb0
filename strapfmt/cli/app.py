"""Owns the typer application that the commands register with, and the arguments they share."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from strapfmt import __version__
from strapfmt.errors import DatasetExistsError, DatasetNotFoundError

__all__ = ["Command", "DatasetPath", "JsonOption", "SiteName", "app", "check_new"]

app = typer.Typer(
    name="strapfmt",
    help=(
        "Capture a language model's activations to disk, query them in SQL, train on them.\n\n"
        "Start with: strapfmt demo. Every command takes --json, which prints one JSON document on stdout; "
        "progress and remarks go to stderr. Exit codes: 0 done, 1 a problem was found (verify, repair, stats), "
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
    typer.Argument(metavar="SITE", help="A stored site, such as blocks.3.resid_post.", show_default=False),
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


class Command(TyperCommand):
    """A command whose help names its arguments as the documentation does: `DATASET [SITE]`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return what the usage line says after the command's name."""
        return ["[OPTIONS]", *(place for place, _ in self._arguments(ctx))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of arguments and of options."""
        options = [
            each.get_help_record(ctx) for each in self.get_params(ctx) if each.param_type_name == "option"
        ]
        for title, records in (("Arguments", self._arguments(ctx)), ("Options", options)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def _arguments(self, ctx: Any) -> list[tuple[str, str]]:
        """Return how each argument is written, and its help."""
        arguments: list[Any] = [each for each in self.get_params(ctx) if each.param_type_name == "argument"]
        return [(each.metavar if each.required else f"[{each.metavar}]", each.help) for each in arguments]


def check_new(path: Path, mode: str, advice: str) -> None:
    """Check, before anything slow, that a dataset can be written, and say what to do on the command line if not.

    Parameters
    ----------
    path : Path
    mode : {"create", "overwrite", "append"}
    advice : str
        What can be done about a dataset that exists.

    Raises
    ------
    ArgumentError, DatasetExistsError, DatasetNotFoundError, WriterConflictError
    """
    from strapfmt.claim import check_writable, rank_from_environment

    try:
        check_writable(path, rank=rank_from_environment(), mode=mode)
    except DatasetExistsError as error:
        if mode != "create" or not any(path.glob("rank-*")):
            raise
        raise DatasetExistsError(f"{path} exists already: {advice}") from error
    except DatasetNotFoundError as error:
        raise DatasetNotFoundError(
            f"{path}: no dataset to append to; leave out --append to make one"
        ) from error
