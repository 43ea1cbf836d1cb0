"""Owns tables for people: no name or number is folded; columns that do not fit on a terminal are left out and named."""

from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from strapfmt.cli.output import console, notes
from strapfmt.text import visible

__all__ = ["ABSENT", "cell", "count", "print_table"]

#: For a fact that does not exist; a NULL of the data is shown as such.
ABSENT = Text("-", style="dim")

_CELL_CHARS = 60
_LIST_ITEMS = 4
_GAP = "  "


def print_table(
    names: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    leave_out: Sequence[str] = (),
    to: Console | None = None,
) -> None:
    """Print a table for people: numbers to the right, text escaped and cut.

    Parameters
    ----------
    names : sequence of str
        Column heads.
    rows : iterable of sequences
        Python values.
    leave_out : sequence of str
        Columns to leave out first where a terminal is narrow; the others go from the middle outwards.
    to : rich.console.Console, optional
        Where; default `console()`.
    """
    to = to or console()
    rows = [list(row) for row in rows]
    columns = [_column(name, [row[i] for row in rows]) for i, name in enumerate(names)]
    widths = [max(cell_len(each.plain) for each in column) for column in columns]
    shown = list(range(len(columns)))
    if to.file.isatty():
        first = [names.index(name) for name in leave_out if name in names]
        shown = _fitting(widths, to.width, first)
    lines = [_line([columns[i][n] for i in shown], [widths[i] for i in shown]) for n in range(len(rows) + 1)]
    to.print(Text("\n").join(lines), soft_wrap=True)
    hidden = [visible(name) for i, name in enumerate(names) if i not in shown]
    if hidden:
        notes().print(f"no room for: {', '.join(hidden)}; a wider terminal or --json shows all", style="dim")


def _column(name: str, values: list[object]) -> list[Text]:
    cells = [Text(visible(name), style="bold"), *map(cell, values)]
    if any(_is_number(value) for value in values):
        for each in cells:
            each.justify = "right"
    return cells


def _is_number(value: object) -> bool:
    if isinstance(value, Text):
        return value.justify == "right"
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _fitting(widths: Sequence[int], room: int, first: Sequence[int]) -> list[int]:
    """Return which columns fit; at least two stay."""
    middle = (len(widths) - 1) / 2
    outwards = sorted(range(len(widths)), key=lambda i: (abs(i - middle), -i))
    shown = list(range(len(widths)))
    for i in dict.fromkeys([*first, *outwards]):
        if sum(widths[j] for j in shown) + len(_GAP) * (len(shown) - 1) <= room or len(shown) <= 2:
            break
        shown.remove(i)
    return shown


def _line(cells: Sequence[Text], widths: Sequence[int]) -> Text:
    padded = []
    for each, width in zip(cells, widths, strict=True):
        space = " " * (width - cell_len(each.plain))
        padded.append(Text(space) + each if each.justify == "right" else each + Text(space))
    line = Text(_GAP).join(padded)
    line.rstrip()
    return line


def cell(value: object) -> Text:
    """Return one value as a person wants to see it: escaped, short, never read as markup."""
    if value is None:
        return Text("NULL", style="dim")
    if isinstance(value, Text):
        return value.copy()
    if isinstance(value, float):
        return Text(f"{value:.6g}")
    if isinstance(value, Path):
        return Text(visible(str(value)))
    if isinstance(value, list | tuple):
        more = f", … {len(value):,} in all" if len(value) > _LIST_ITEMS else ""
        return Text(f"[{', '.join(map(_item, value[:_LIST_ITEMS]))}{more}]")
    return Text(visible(str(value), _CELL_CHARS))


def _item(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else cell(value).plain


def count(n: int) -> Text:
    """Return a number of things with its thousands apart; the numbers of rows and tokens are shown as they are."""
    return Text(f"{n:,}", justify="right")
