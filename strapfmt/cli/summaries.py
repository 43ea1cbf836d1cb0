"""The commands that summarise: `info` and `stats`."""

import sys
import textwrap
import time
from typing import Any

import typer

from strapfmt import spec
from strapfmt.cli.app import DatasetPath, JsonOption, SiteName
from strapfmt.cli.output import console, notes, print_json, told
from strapfmt.cli.tables import ABSENT, count, print_table
from strapfmt.errors import StrapfmtError
from strapfmt.report import shape_text, size_text
from strapfmt.text import shown_path, visible

__all__ = ["info", "stats"]

_FIRST_FACTS = ("started_ns", "ended_ns", "outcome", "tool", "model", "tokenizer", "versions", "options")
_NOT_SHOWN = {"counters", "sites"}
_SUMMARIES = (
    ("l2_norm", "mean"),
    ("l2_norm", "min"),
    ("l2_norm", "max"),
    ("mean", "mean"),
    ("std", "mean"),
    ("abs_max", "max"),
)
# Left out first where a terminal is narrow.
_LESS_OF_INFO = ("layout", "row space", "codec", "taken at", "dropped")


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
    counts = [document[name] for name in ("n_tokens", "n_sequences", "n_steps", "n_row_events")]
    if not document["is_clean"] and not any([*counts, *(site["n_rows"] for site in document["sites"])]):
        state += ", and nothing is committed"
    out.print(
        f"{shown_path(document['path'])}: {document['n_tokens']:,} tokens in {document['n_sequences']:,} sequences and "
        f"{document['n_steps']:,} steps; {state}"
    )
    for rank in document["ranks"]:
        out.print(
            f"rank {rank['rank']}: commit {rank['commit']}, {'clean' if rank['is_clean'] else 'NOT closed'}"
        )
        for number, session in enumerate(rank["sessions"]):
            if len(rank["sessions"]) > 1:
                out.print(f"  session {number}")
            _show_session(session)
    out.print()
    names = ("site", "shape", "dtype", "rows", "dropped", "size", "codec", "layout", "row space", "taken at")
    rows = [
        (
            site["name"],
            shape_text(site["shape"]),
            site["dtype"],
            count(site["n_rows"]),
            count(site["dropped"]),
            size_text(site["n_bytes"]),
            *(site[name] or ABSENT for name in ("codec", "layout", "row_space", "hook_point")),
        )
        for site in document["sites"]
    ]
    print_table(names, rows, leave_out=_LESS_OF_INFO)


def _show_session(session: dict[str, Any]) -> None:
    out = console()
    width = out.width if sys.stdout.isatty() else sys.maxsize
    for key in sorted(
        session, key=lambda key: _FIRST_FACTS.index(key) if key in _FIRST_FACTS else sys.maxsize
    ):
        if key in _NOT_SHOWN or session[key] is None:
            continue
        line = f"{visible(key.removesuffix('_ns'))}: {visible(_told(key, session[key]))}"
        text = textwrap.fill(
            line,
            width,
            initial_indent="  ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        out.print(text, soft_wrap=True)


def _told(key: str, value: Any) -> str:
    """Return a fact of provenance as one line for people; `--json` has it as it is stored."""
    if isinstance(value, dict):
        facts = ((name, item) for name, item in value.items() if item is not None)
        return ", ".join(f"{name} {_told(name, item)}" for name, item in facts)
    if isinstance(value, list):
        if any(isinstance(item, dict) for item in value):
            return f"{len(value):,}, shown by --json"
        return " ".join(_told("", item) for item in value)
    if isinstance(value, bool | str):
        return str(value)
    if key.endswith("_ns"):
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(value / 1e9))
    if key.endswith("_bytes"):
        return size_text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def stats(dataset: DatasetPath, site: SiteName = None, as_json: JsonOption = False) -> None:
    """Summarise the statistics stored with every activation.

    Reads no activation and compares no checksum of one (verify does). Exit code 1 if a site cannot be read; the
    others are shown.
    """
    import strapfmt

    with strapfmt.open(dataset) as ds:
        sites = [ds[site]] if site else list(ds.sites.values())
        rows = [_summary(each) for each in sites]
    if as_json:
        print_json(rows)
    else:
        _show_stats(rows)
    if any(row["problem"] for row in rows):
        raise typer.Exit(1)


def _show_stats(rows: list[dict[str, Any]]) -> None:
    names = ("site", "rows", *(f"{name} {of}" for name, of in _SUMMARIES), "non-finite")
    cells = [
        [
            row["site"],
            count(row["n_rows"]),
            *(_or_absent(row[f"{name}_{of}"]) for name, of in _SUMMARIES),
            _or_absent(row["n_nonfinite"]),
        ]
        for row in rows
        if not row["problem"]
    ]
    if cells:
        print_table(names, cells)
        notes().print(
            "each is the mean, minimum or maximum over rows of a statistic that was stored with each row"
        )
    if any(row["n_nonfinite"] for row in rows):
        notes().print("non-finite values are left out of the other statistics of their row")
    for row in rows:
        if row["problem"]:
            print(f"error: {row['problem']}", file=sys.stderr)


def _or_absent(value: float | None) -> object:
    return ABSENT if value is None else count(value) if isinstance(value, int) else value


def _summary(site: Any) -> dict[str, Any]:
    """Return what a row of the table says, or why the site cannot be read."""
    row = {"site": site.name, "n_rows": site.n_rows}
    try:
        stored = [name for name in spec.STATISTICS if name in site.statistics]
        table = site.to_arrow(stored, verify=False) if stored else None
    except (StrapfmtError, OSError) as error:
        return row | _summary_of(None) | {"problem": told(error)}
    return row | _summary_of(table) | {"problem": None}


def _summary_of(table: Any) -> dict[str, Any]:
    import pyarrow.compute as pc

    def value(name: str, of: str) -> Any:
        if table is None or name not in table.column_names or not table.num_rows:
            return None
        return getattr(pc, of)(pc.cast(table[name], "float64")).as_py()

    summary = {f"{name}_{of}": value(name, of) for name, of in _SUMMARIES}
    n_nonfinite = value("n_nonfinite", "sum")
    return summary | {"n_nonfinite": None if n_nonfinite is None else int(n_nonfinite)}
