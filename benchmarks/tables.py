"""Tables of stored results, as `docs/performance.md` shows them: `python -m benchmarks.tables [RESULTS]`."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.__main__ import QUESTIONS

__all__ = ["tables"]

RESULTS = Path(__file__).parent / "results"


def tables(results: Path = RESULTS) -> Iterator[str]:
    """Yield every group of every result as a Markdown table, its name in the first cell."""
    for question in QUESTIONS:
        rows = json.loads((results / f"{question}.json").read_text())["rows"]
        for group in dict.fromkeys(row["group"] for row in rows):
            table = _overheads if any("thread_ratio" in row for row in rows) else _table
            yield table(group, [row for row in rows if row["group"] == group])


def _table(group: str, rows: list[dict[str, Any]]) -> str:
    has_rate = any(row.get("gb_per_s") is not None for row in rows)
    head = [f"{group[:1].upper()}{group[1:]}", "ratio", "quartiles", "time", *(["GB/s"] if has_rate else [])]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        low, high = row["ratio_quartiles"]
        cells = [row["case"], f"**{row['ratio']:.2f}**", f"{low:.2f}-{high:.2f}", _time(row["median_s"])]
        lines.append([*cells, *([f"{row['gb_per_s']:.2f}"] if has_rate else [])])
    return _markdown(lines)


def _overheads(group: str, rows: list[dict[str, Any]]) -> str:
    """What captures add to passes, and what they left on disk."""
    head = [
        f"{group[:1].upper()}{group[1:]}",
        "time",
        "passes",
        "quartiles",
        "thread",
        "all CPU",
        "until on disk",
    ]
    lines = [[*head, "rows", "values"], ["---"] * (len(head) + 2)]
    for row in rows:
        if "failure" in row:
            lines.append(
                [
                    row["case"],
                    textwrap.shorten(row["failure"], 100, placeholder=" ...").replace("|", "\\|"),
                    *[""] * len(head),
                ]
            )
            continue
        low, high = (_added(ratio) for ratio in row["ratio_quartiles"])
        others = [_added(row[f"{what}_ratio"]) for what in ("thread", "cpu", "total")]
        cells = [
            row["case"],
            _time(row["median_s"]),
            f"**{_added(row['ratio'])}**",
            f"{low} to {high}",
            *others,
        ]
        lines.append([*cells, _rows(row), row.get("verdict", "")])
    return _markdown(lines)


def _added(ratio: float) -> str:
    return f"{round(100 * (ratio - 1), 1) + 0.0:+.1f} %"


def _rows(row: dict[str, Any]) -> str:
    if "n_rows" not in row:
        return ""
    n_rows, n_expected = row["n_rows"], row["n_expected"]
    return f"{n_rows:,}" if n_rows == n_expected else f"{n_rows:,} of {n_expected:,}"


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _time(seconds: float) -> str:
    ms = 1e3 * seconds
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 10 else f"{ms:.2f} ms"


if __name__ == "__main__":
    print("\n\n".join(tables(Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS)))
