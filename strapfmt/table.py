"""A table of a dataset, read: the rows that say what a token, a sequence or a step was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from strapfmt.errors import ArgumentError
from strapfmt.extras import require
from strapfmt.shard_reader import ShardReader
from strapfmt.text import table_of

__all__ = ["TableView"]


@dataclass(frozen=True, slots=True)
class TableView:
    """A table over all ranks; columns are read when asked for."""

    name: str
    schema: pa.Schema
    shards: Sequence[ShardReader]

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self.schema.names)

    def __len__(self) -> int:
        return sum(shard.shard.n_rows for shard in self.shards)

    def to_arrow(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Return the rows as an Arrow table that aliases the maps; hashes are compared on first touch.

        Raises
        ------
        CorruptError
        ArgumentError
            If a column does not exist.
        """
        batches = [shard.batch(i, verify=True) for shard in self.shards for i in range(shard.n_batches)]
        table = pa.Table.from_batches(batches, self.schema)
        if columns is None:
            return table
        wanted = list(columns)
        unknown = [name for name in wanted if name not in self.schema.names]
        if unknown:
            raise ArgumentError(
                f"table {self.name!r}: no columns {unknown}; there are {', '.join(self.schema.names)}"
            )
        return table.select(wanted)

    def to_pandas(self, columns: Iterable[str] | None = None) -> Any:
        """Return the rows as a pandas data frame (needs pandas)."""
        require("pandas", "pandas", "to_pandas()")
        return self.to_arrow(columns).to_pandas()

    def __repr__(self) -> str:
        head = self.to_arrow().slice(0, 10).to_pylist()
        rows = [tuple("" if value is None else str(value) for value in row.values()) for row in head]
        more = f"\n... {len(self)} rows" if len(self) > len(rows) else ""
        return table_of(tuple(self.columns), rows) + more
