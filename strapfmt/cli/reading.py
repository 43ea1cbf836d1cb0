"""The commands that show rows: `head` and `sql`."""

import sys
from typing import Annotated, Any

import typer

from strapfmt.cli.app import DatasetPath, JsonOption, SiteName
from strapfmt.cli.output import console, notes, print_csv, print_json, printable
from strapfmt.cli.tables import print_table
from strapfmt.dtypes import DType
from strapfmt.errors import ArgumentError

__all__ = ["head", "sql"]

_FORMATS = ("table", "json", "csv")
_TOKEN_COLUMNS = ("sequence_id", "position", "phase", "token")
# Left out first where a terminal is narrow.
_LESS_OF_TOKENS = ("batch_index", "dropped", "is_special", "parent_row", "token_id", "step", "sequence_id")
_LESS_OF_ACTIVATIONS = ("n_nonfinite", "abs_max", "std", "mean", "sequence_id", "phase")


def head(
    dataset: DatasetPath,
    site: SiteName = None,
    n: Annotated[int, typer.Option("-n", "--rows", metavar="N", min=1, help="Rows to show.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Show the first tokens, or the first activations of a SITE."""
    import strapfmt

    with strapfmt.open(dataset) as ds:
        rows = _first_activations(ds, ds[site], n) if site else ds.tokens.to_arrow().slice(0, n).to_pylist()
    if as_json:
        print_json(rows)
    elif rows:
        less = _LESS_OF_ACTIVATIONS if site else _LESS_OF_TOKENS
        print_table(list(rows[0]), [list(row.values()) for row in rows], leave_out=less)
    else:
        notes().print("0 rows")


def _first_activations(ds: Any, site: Any, n: int) -> list[dict[str, Any]]:
    rows = [row for batch in site.scan(limit=n) for row in batch.to_pylist()]
    words = _tokens_at(ds, [row.get("token_row", row["row"]) for row in rows])
    shown = []
    for row in rows:
        values = _numbers(row.pop("activation"), site.spec.stored_dtype)
        token = words.get(row.get("token_row", row["row"]), {})
        told = {name: token.get(name) for name in _TOKEN_COLUMNS}
        shown.append({"row": row.pop("row"), **told, **row, "activation": values})
    return shown


def _tokens_at(ds: Any, rows: list[int | None]) -> dict[int, dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.compute as pc

    tokens = ds.tokens.to_arrow(["row", *_TOKEN_COLUMNS])
    found = tokens.filter(pc.is_in(tokens["row"], value_set=pa.array(rows, pa.int64()))).to_pylist()
    return {token.pop("row"): token for token in found}


def _numbers(stored: list[Any], dtype: DType) -> list[float]:
    """Return stored numbers as their values; whole ones stay whole, as a float is exact up to 2^53 only."""
    import numpy as np
    import torch

    values = torch.from_numpy(np.array(stored, dtype.numpy)).view(dtype.torch)
    numbers: list[float] = (values.double() if dtype.is_floating else values).tolist()
    return numbers


def sql(
    dataset: DatasetPath,
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="One SELECT; - reads it from stdin.", show_default=False)
    ],
    output: Annotated[
        str, typer.Option("--format", metavar="table|json|csv", help="How to print.")
    ] = "table",
    max_rows: Annotated[
        int, typer.Option(metavar="N", min=1, help="Rows a table shows; json and csv print all.")
    ] = 100,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            "--timeout-s", metavar="X", help="Stop the query after this many seconds.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question in SQL.

    Tables: tokens, sequences, steps, row_events, sites, stats, activations; each site under its own name in
    double quotes, such as "blocks.3.resid_post".
    """
    import strapfmt

    if output not in _FORMATS:
        raise ArgumentError(f"--format: expected one of {', '.join(_FORMATS)}; got {output!r}")
    text = sys.stdin.read() if query == "-" else query
    with strapfmt.open(dataset) as ds:
        result = ds.sql(text, timeout_s=timeout_s)
    if as_json or output == "json":
        print_json([dict(zip(result.columns, row, strict=True)) for row in result])
    elif output == "csv":
        print_csv(result.columns, result)
    else:
        _show_answer(result, max_rows)


def _show_answer(result: Any, max_rows: int) -> None:
    if result.columns == ["explain_key", "explain_value"]:
        console().print(printable(str(result)), soft_wrap=True)  # plans are drawings of many lines
        return
    rows = result.to_arrow().slice(0, max_rows).to_pylist()
    print_table(result.columns, [list(row.values()) for row in rows])
    n = len(result)
    shown = f"{max_rows:,} of {n:,} rows shown; --max-rows shows more"
    notes().print(shown if n > max_rows else f"{n:,} row{'' if n == 1 else 's'}", style="dim")
