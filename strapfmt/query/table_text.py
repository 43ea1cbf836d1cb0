"""An Arrow table as text for a person: few rows, short cells, nothing a terminal would act on."""

import unicodedata

import pyarrow as pa

from strapfmt.text import visible

__all__ = ["cells", "text_table"]

MAX_ROWS = 20
MAX_CELL_CHARS = 48
MAX_LIST_VALUES = 3
MAX_LINE_CHARS = 160
_GAP = "…"


def text_table(table: pa.Table) -> str:
    """Return the table as aligned lines, numbers to the right, and a last line with its size."""
    header, rows, summary = cells(table)
    columns = (
        [[name, *column] for name, column in zip(header, zip(*rows, strict=True), strict=True)]
        if rows
        else []
    )
    columns = columns or [[name] for name in header]
    numeric = [_is_number(field.type) for field in table.schema]
    lines = [_padded(column, to_right) for column, to_right in zip(columns, numeric, strict=True)]
    shown = _fitting(lines)
    text = ["  ".join(line).rstrip() for line in zip(*shown, strict=True)]
    if text:
        text.insert(1, "  ".join("─" * _width(column[0]) for column in shown))
    return "\n".join([*text, summary])


def cells(table: pa.Table) -> tuple[list[str], list[list[str]], str]:
    """Return the header, the shown rows and a line about the size, all as printable text."""
    n = table.num_rows
    half = MAX_ROWS // 2
    parts = [table] if n <= MAX_ROWS else [table.slice(0, half), table.slice(n - half)]
    blocks = [_rows(part) for part in parts]
    rows = blocks[0] if len(blocks) == 1 else [*blocks[0], [_GAP] * table.num_columns, *blocks[1]]
    shown = "" if n <= MAX_ROWS else f", the first and last {half} shown"
    summary = f"{_counted(n, 'row')} x {_counted(table.num_columns, 'column')}{shown}"
    return [visible(name, MAX_CELL_CHARS) for name in table.column_names], rows, summary


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _rows(table: pa.Table) -> list[list[str]]:
    columns = [[_cell(value) for value in column] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


def _cell(value: pa.Scalar) -> str:
    if not value.is_valid:
        return "NULL"
    if isinstance(value, (pa.ListScalar, pa.LargeListScalar, pa.FixedSizeListScalar)):
        items = value.values
        shown = [_cell(item) for item in items[:MAX_LIST_VALUES]]
        more = [f"{_GAP} {len(items)} in all"] if len(items) > MAX_LIST_VALUES else []
        return f"[{', '.join(shown + more)}]"
    python = value.as_py()
    if isinstance(python, float):
        return f"{python:.6g}"
    return visible(str(python), MAX_CELL_CHARS)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _padded(column: list[str], to_right: bool) -> list[str]:
    width = max(map(_width, column))
    spaces = [" " * (width - _width(cell)) for cell in column]
    return [space + cell if to_right else cell + space for cell, space in zip(column, spaces, strict=True)]


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def _fitting(columns: list[list[str]]) -> list[list[str]]:
    """Leave out columns from the middle until a line fits."""
    widths = [_width(column[0]) + 2 for column in columns]
    left, right = (len(columns) + 1) // 2, (len(columns) + 1) // 2
    while left + len(columns) - right > 2 and sum(widths[:left]) + sum(widths[right:]) > MAX_LINE_CHARS:
        if left > len(columns) - right:
            left -= 1
        else:
            right += 1
    gap = [[_GAP] * len(columns[0])] if left < right else []
    return [*columns[:left], *gap, *columns[right:]]
