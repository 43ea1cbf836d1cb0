"""What a query answered: an Arrow table that turns into pandas, polars, torch, rows or readable text."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from strapfmt.errors import ArgumentError
from strapfmt.extras import require
from strapfmt.query.statement import quoted
from strapfmt.query.table_text import cells, text_table

if TYPE_CHECKING:
    import pandas as pd
    import polars
    import torch

__all__ = ["Result"]


class Result:
    """The rows a query returned, held in memory.

    Parameters
    ----------
    table : pyarrow.Table
        The answer. Whole numbers that DuckDB widened to 128 bits (sums) become int64 where they fit, and a second
        column `a` is called `a_1`.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = _narrowed(table).rename_columns(_unique(table.column_names))

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in order."""
        return list(self._table.column_names)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Rows as tuples of Python values."""
        for batch in self._table.to_batches(max_chunksize=1024):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)

    def fetchall(self) -> list[tuple[Any, ...]]:
        """Return every row as a tuple of Python values."""
        return list(self)

    def to_arrow(self) -> pa.Table:
        """Return the Arrow table itself; ARRAY columns are fixed-size lists."""
        return self._table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Hand the rows to any library that reads Arrow streams."""
        return self._table.__arrow_c_stream__(requested_schema)

    def to_pandas(self) -> pd.DataFrame:
        """Return a pandas DataFrame (a copy).

        Raises
        ------
        MissingExtraError
            If pandas is not installed.
        """
        require("pandas", "pandas", "to_pandas()")
        frame: pd.DataFrame = self._table.to_pandas()
        return frame

    df = to_pandas

    def to_polars(self) -> polars.DataFrame:
        """Return a polars DataFrame.

        Raises
        ------
        MissingExtraError
            If polars is not installed.
        """
        frame: polars.DataFrame = require("polars", "polars", "to_polars()").from_arrow(self._table)
        return frame

    pl = to_polars

    def to_torch(self) -> dict[str, torch.Tensor]:
        """Return one tensor per column: `[n]`, or `[n, width]` for ARRAY columns and lists of one length (copies).

        A null becomes NaN in floating-point columns.

        Raises
        ------
        ArgumentError
            If a column holds no numbers, nulls in whole numbers, or lists of several lengths.
        """
        import torch

        return {name: torch.from_numpy(_numbers(name, self._table[name])) for name in self.columns}

    def __repr__(self) -> str:
        if self.columns == ["explain_key", "explain_value"]:
            return "\n".join(str(value) for value in self._table["explain_value"].to_pylist())
        return text_table(self._table)

    def _repr_html_(self) -> str:
        header, rows, summary = cells(self._table)
        head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
        )
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{html.escape(summary)}</p>"
        )


def _unique(names: list[str]) -> list[str]:
    unique: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        unique[next(new for new in itertools.chain([name], numbered) if new not in unique)] = None
    return list(unique)


def _narrowed(table: pa.Table) -> pa.Table:
    for position, field in enumerate(table.schema):
        if pa.types.is_decimal128(field.type) and field.type.precision == 38 and field.type.scale == 0:
            try:
                column = pc.cast(table.column(position), pa.int64())
            except pa.ArrowInvalid:  # too large for 64 bits: stays as it is
                continue
            table = table.set_column(position, pa.field(field.name, pa.int64()), column)
    return table


def _numbers(name: str, column: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[Any]]:
    """Return a column as a fresh NumPy array."""
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    kind = array.type
    if pa.types.is_nested(kind) and array.null_count:
        raise ArgumentError(
            f"column {name!r} has no value (NULL) in {array.null_count} of {len(array)} rows, as an outer join gives; "
            f"add WHERE {quoted(name)} IS NOT NULL to the query"
        )
    if pa.types.is_fixed_size_list(kind):
        values = array.values.slice(array.offset * kind.list_size, len(array) * kind.list_size)
        return _flat_numbers(name, values).reshape(len(array), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = np.diff(array.offsets.to_numpy())
        if len(set(lengths.tolist())) > 1:
            raise ArgumentError(
                f"column {name!r} holds lists of {lengths.min()} to {lengths.max()} values, which one tensor cannot; "
                "take it with to_arrow() or fetchall()"
            )
        return _flat_numbers(name, array.flatten()).reshape(len(array), -1 if len(array) else 0)
    return _flat_numbers(name, array)


def _flat_numbers(name: str, array: pa.Array) -> np.ndarray[Any, np.dtype[Any]]:
    kind = array.type
    if pa.types.is_decimal(kind):
        array, kind = pc.cast(array, pa.float64()), pa.float64()
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise ArgumentError(
            f"column {name!r} is {kind}, not numbers; leave it out of the query, or take to_arrow()"
        )
    if array.null_count:
        if not pa.types.is_floating(kind):
            raise ArgumentError(
                f"column {name!r} holds {array.null_count} nulls; use coalesce() in the query"
            )
        array = pc.fill_null(array, float("nan"))
    return np.array(array.to_numpy(zero_copy_only=False))
