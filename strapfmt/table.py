"""A table of a dataset, read: the rows that say what a token, a sequence or a step was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from strapfmt.arguments import as_names
from strapfmt.errors import ArgumentError, DatasetChangedError
from strapfmt.extras import require
from strapfmt.shard_reader import ShardReader
from strapfmt.text import table_of

__all__ = ["TableView"]

_SHOWN_ROWS = 10


@dataclass(frozen=True, slots=True)
class TableView:
    """A table over all ranks; columns are read when asked for.

    Pickled, it opens the dataset again, and refuses one that has grown meanwhile.

    Attributes
    ----------
    name : str
    schema : pyarrow.Schema
    shards : sequence of ShardReader
    reopen : callable
        Opens the dataset anew, for pickles.
    """

    name: str
    schema: pa.Schema
    shards: Sequence[ShardReader]
    reopen: Callable[[], Any]

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.schema.names)

    def __len__(self) -> int:
        return sum(shard.shard.n_rows for shard in self.shards)

    def to_arrow(self, columns: str | Iterable[str] | None = None) -> pa.Table:
        """Return the rows as an Arrow table that aliases the maps; hashes are compared on first touch.

        Raises
        ------
        CorruptError
        ArgumentError
            If a column does not exist.
        """
        wanted = self.columns if columns is None else as_names("columns", columns)
        unknown = [name for name in wanted if name not in self.columns]
        if unknown:
            raise ArgumentError(
                f"table {self.name!r}: no columns {unknown}; there are {', '.join(self.columns)}"
            )
        batches = [shard.batch(i, verify=True) for shard in self.shards for i in range(shard.n_batches)]
        return pa.Table.from_batches(batches, self.schema).select(wanted)

    def to_pandas(self, columns: str | Iterable[str] | None = None) -> Any:
        """Return the rows as a pandas data frame (needs pandas)."""
        require("pandas", "pandas", "to_pandas()")
        return self.to_arrow(columns).to_pandas()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.reopen, self.name, len(self))

    def __repr__(self) -> str:
        rows = [tuple("" if value is None else str(value) for value in row.values()) for row in self._head()]
        more = f"\n... {len(self)} rows" if len(self) > len(rows) else ""
        return table_of(tuple(self.columns), rows) + more

    def _head(self) -> list[dict[str, Any]]:
        """Return the first rows, reading no record batch behind them."""
        rows: list[dict[str, Any]] = []
        for shard in self.shards:
            for number in range(shard.n_batches):
                rows += shard.batch(number, verify=True).slice(0, _SHOWN_ROWS - len(rows)).to_pylist()
                if len(rows) == _SHOWN_ROWS:
                    return rows
        return rows


def _reopened(reopen: Callable[[], Any], name: str, n_rows: int) -> TableView:
    table: TableView = reopen().tables[name]
    if len(table) != n_rows:
        raise DatasetChangedError(
            f"table {name!r} held {n_rows} rows when it was pickled, and holds {len(table)} now: pickle it anew, after "
            "the writer has closed"
        )
    return table
