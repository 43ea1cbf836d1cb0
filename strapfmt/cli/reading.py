"""The commands that read: `info`, `head`, `sql` and `stats`."""

import sys
import time
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.text import Text

from strapfmt import spec
from strapfmt.cli.app import DatasetPath, JsonOption, SiteName
from strapfmt.cli.output import console, notes, print_csv, print_json, print_table
from strapfmt.dtypes import DType
from strapfmt.report import shape_text, size_text
from strapfmt.text import shown_path, visible

__all__ = ["Format", "head", "info", "sql", "stats"]


_NOT_SHOWN = {"counters", "sites"}
_TOKEN_COLUMNS = ("sequence_id", "position", "phase", "token")


class Format(StrEnum):
    """How `sql` prints."""

    table = "table"
    json = "json"
    csv = "csv"


def info(dataset: DatasetPath, as_json: JsonOption = False) -> None:
    """Show what a dataset holds and where it came from.

    It reads manifests only, so it is quick however large the dataset is.
    """
    import strapfmt

    with strapfmt.open(dataset) as ds:
        document = ds.report.to_dict()
        for entry in document["sites"]:
            entry |= _more(ds[entry["name"]])
        document["n_row_events"] = len(ds.row_events)
    if as_json:
        print_json(document)
    else:
        _show_info(document)


def _more(site: Any) -> dict[str, Any]:
    return {
        "row_space": site.row_space,
        "codec": site.codec,
        "layout": site.layout.kind,
        "statistics": site.statistics,
        "module_path": site.spec.module_path,
        "hook_point": site.spec.hook_point,
    }


def _show_info(document: dict[str, Any]) -> None:
    out = console()
    state = "clean" if document["is_clean"] else "NOT closed: a writer is at work, or it crashed"
    out.print(
        f"{shown_path(document['path'])}: {document['n_tokens']:,} tokens in {document['n_sequences']:,} sequences and "
        f"{document['n_steps']:,} steps; {state}"
    )
    for rank in document["ranks"]:
        out.print(
            f"rank {rank['rank']}: commit {rank['commit']}, {'clean' if rank['is_clean'] else 'NOT closed'}"
        )
        for session in rank["sessions"]:
            _show_session(session)
    out.print()
    names = ("site", "shape", "dtype", "rows", "dropped", "size", "codec", "layout", "row space", "taken at")
    rows = [
        (
            site["name"],
            shape_text(site["shape"]),
            site["dtype"],
            site["n_rows"],
            site["dropped"],
            size_text(site["n_bytes"]),
            *(site[name] for name in ("codec", "layout", "row_space", "hook_point")),
        )
        for site in document["sites"]
    ]
    print_table(names, rows)


def _show_session(session: dict[str, Any]) -> None:
    for key, value in session.items():
        if key in _NOT_SHOWN:
            continue
        line = Text(f"  {visible(key)}: {visible(_told(key, value))}")
        console().print(line, no_wrap=True, overflow="ellipsis")


def _told(key: str, value: Any) -> str:
    """Return a fact of provenance as one line for people; `--json` has it as it is stored."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_told(name, item)}" for name, item in value.items())
    if isinstance(value, list):
        return " ".join(_told("", item) for item in value)
    if key.endswith("_ns") and isinstance(value, int):
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(value / 1e9))
    return str(value)


def head(
    dataset: DatasetPath,
    site: SiteName = None,
    n: Annotated[int, typer.Option("-n", "--rows", min=1, help="Rows to show.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Show the first tokens, or the first activations of a SITE."""
    import strapfmt

    with strapfmt.open(dataset) as ds:
        rows = _first_activations(ds, ds[site], n) if site else ds.tokens.to_arrow().slice(0, n).to_pylist()
    if as_json:
        print_json(rows)
    else:
        columns = list(rows[0]) if rows else ["row"]
        print_table(columns, [list(row.values()) for row in rows])


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
    import numpy as np
    import torch

    return torch.from_numpy(np.array(stored, dtype.numpy)).view(dtype.torch).double().tolist()


def sql(
    dataset: DatasetPath,
    query: Annotated[
        str, typer.Argument(metavar="QUERY", help="One SELECT; - reads it from stdin.", show_default=False)
    ],
    output: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.table,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows a table shows; json and csv print all.")] = 100,
    timeout_s: Annotated[
        float | None,
        typer.Option("--timeout-s", help="Stop the query after this many seconds.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question in SQL.

    Tables: tokens, sequences, steps, row_events, sites, stats, activations; each site under its own name in
    double quotes, such as "blocks.3.resid_post".
    """
    import strapfmt

    text = sys.stdin.read() if query == "-" else query
    with strapfmt.open(dataset) as ds:
        result = ds.sql(text, timeout_s=timeout_s)
    output = Format.json if as_json else output
    if output is Format.json:
        print_json([dict(zip(result.columns, row, strict=True)) for row in result])
    elif output is Format.csv:
        print_csv(result.columns, result)
    else:
        rows = result.to_arrow().slice(0, max_rows).to_pylist()
        print_table(result.columns, [list(row.values()) for row in rows])
        if len(result) > max_rows:
            notes().print(f"{max_rows} of {len(result):,} rows shown; --max-rows shows more")


def stats(dataset: DatasetPath, site: SiteName = None, as_json: JsonOption = False) -> None:
    """Summarise the statistics stored with every activation."""
    import strapfmt

    with strapfmt.open(dataset) as ds:
        rows = [_summary(ds[name]) for name in ([site] if site else ds.names)]
    if as_json:
        print_json(rows)
        return
    names = (
        "site",
        "rows",
        "l2_norm mean",
        "l2_norm min",
        "l2_norm max",
        "mean",
        "std",
        "abs_max",
        "non-finite",
    )
    print_table(names, [list(row.values()) for row in rows])
    if any(row["n_nonfinite"] for row in rows):
        notes().print("non-finite values are left out of the other statistics of their row")


def _summary(site: Any) -> dict[str, Any]:
    import pyarrow.compute as pc

    stored = [name for name in spec.STATISTICS if name in site.statistics]
    table = site.to_arrow(columns=stored) if stored else None

    def value(name: str, function: Any) -> Any:
        if table is None or name not in stored or not table.num_rows:
            return None
        return function(pc.cast(table[name], "float64")).as_py()

    n_nonfinite = value("n_nonfinite", pc.sum)
    return {
        "site": site.name,
        "n_rows": site.n_rows,
        "l2_norm_mean": value("l2_norm", pc.mean),
        "l2_norm_min": value("l2_norm", pc.min),
        "l2_norm_max": value("l2_norm", pc.max),
        "mean_mean": value("mean", pc.mean),
        "std_mean": value("std", pc.mean),
        "abs_max_max": value("abs_max", pc.max),
        "n_nonfinite": None if n_nonfinite is None else int(n_nonfinite),
    }
