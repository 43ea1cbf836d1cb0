"""The rows of a site as Arrow: tables, and scans that choose columns and rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from strapfmt.arguments import as_integer, as_names
from strapfmt.batches import limited, resized
from strapfmt.errors import ArgumentError
from strapfmt.manifest import Layout
from strapfmt.schema import SiteSpec, site_schema
from strapfmt.shard_reader import ShardReader
from strapfmt.sharded import ShardedRows

__all__ = ["ArrowRows"]

Integers = npt.NDArray[np.int64]


class ArrowRows(ShardedRows):
    """Record batches and tables of one site.

    Attributes
    ----------
    spec : SiteSpec
    layout : Layout
    """

    def __init__(
        self,
        site: SiteSpec,
        layout: Layout,
        shards: Sequence[ShardReader],
        *,
        problem: str = "",
        where: str = "",
        verify: bool = False,
    ) -> None:
        super().__init__(site.name, shards, where=where, problem=problem)
        self.spec, self.layout = site, layout
        self._always = verify
        #: Turns a `where` string into row ids, ascending; set by what can run SQL.
        self.resolve_where: Callable[[Any, str], Integers] | None = None

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of its shards."""
        self._shards()
        return site_schema(self.spec)

    def scan(
        self,
        columns: str | Iterable[str] | None = None,
        *,
        where: str | pc.Expression | None = None,
        limit: int | None = None,
        batch_size: int | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Return an iterator over the rows in order, hashes compared on first touch.

        Columns are called as they are stored: `row` is the site's own number where it numbers its rows itself, which
        SQL calls `own_row`.

        Parameters
        ----------
        columns : str or iterable of str, optional
            All by default.
        where : str or pyarrow.compute.Expression, optional
            SQL over the columns of `tokens` and this site, or an Arrow expression over the site's columns. Statistics
            leave out values that are not finite: a row of NaN alone has an l2_norm of 0, so add `n_nonfinite = 0`.
        limit : int, optional
            At most so many rows.
        batch_size : int, optional
            Rows in every batch but the last; as stored by default. Stored batches alias the map, others are copies.

        Raises
        ------
        ArgumentError
            If a column does not exist, a number is none, or the expression is no condition over the site's columns.
        QueryError, CorruptError
        """
        wanted = self._columns(columns)
        batches = self._batches(where)
        if limit is not None:
            batches = limited(batches, as_integer("limit", limit, least=0))
        if batch_size is not None:
            batches = resized(batches, as_integer("batch_size", batch_size, least=1), self.schema)
        return (batch.select(wanted) for batch in batches)

    def to_arrow(self, columns: str | Iterable[str] | None = None, *, verify: bool = True) -> pa.Table:
        """Return all rows as an Arrow table, a chunk a record batch.

        Parameters
        ----------
        columns : str or iterable of str, optional
            All by default. Uncompressed columns alias the map.
        verify : bool
            Compare the hashes of what was not compared yet.

        Raises
        ------
        CorruptError
        """
        wanted = self._columns(columns)
        schema = pa.schema([self.schema.field(name) for name in wanted], self.schema.metadata)
        check = verify or self._always
        batches = [shard.batch(i, verify=check) for shard in self._shards() for i in range(shard.n_batches)]
        return pa.Table.from_batches([batch.select(wanted) for batch in batches], schema)

    # Inside.

    def _columns(self, columns: str | Iterable[str] | None) -> list[str]:
        names = list(self.schema.names)
        wanted = names if columns is None else as_names("columns", columns)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise ArgumentError(f"site {self.name!r}: no columns {unknown}; there are {', '.join(names)}")
        return wanted

    def _batches(self, where: str | pc.Expression | None) -> Iterator[pa.RecordBatch]:
        if where is None:
            return self._all()
        if isinstance(where, pc.Expression):
            self._filtered(self.schema.empty_table(), where)  # what is wrong with it shows at once
            return (self._filtered(batch, where) for batch in self._all())
        if not isinstance(where, str):
            raise ArgumentError(f"where: expected SQL text or a pyarrow expression, got {where!r}")
        if self.resolve_where is None:
            raise ArgumentError("where: SQL needs strapfmt.open(); a bare Reader takes a pyarrow expression")
        return self._kept(self.ordinals_of(self.resolve_where(self, where)))

    def _all(self) -> Iterator[pa.RecordBatch]:
        for shard in self._shards():
            for number in range(shard.n_batches):
                yield shard.batch(number, verify=True)

    def _filtered(self, rows: Any, where: pc.Expression) -> Any:
        try:
            return rows.filter(where)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise ArgumentError(
                f"site {self.name!r}: where: expected a condition over the columns {', '.join(self.schema.names)}; "
                f"Arrow says of {where}: {error}"
            ) from None

    def _kept(self, ordinals: Integers) -> Iterator[pa.RecordBatch]:
        """Yield the rows at `ordinals`, ascending; nothing of other record batches is read."""
        for shard, start, stop in self._spans():
            first, last = np.searchsorted(ordinals, [start, stop])
            if first < last:
                yield from _chosen(shard, ordinals[first:last] - start)


def _chosen(shard: ShardReader, ordinals: Integers) -> Iterator[pa.RecordBatch]:
    firsts = shard.first_ordinals
    cuts = np.append(np.searchsorted(ordinals, firsts), len(ordinals))
    for number in np.flatnonzero(np.diff(cuts)).tolist():
        batch = shard.batch(number, verify=True)
        inside = ordinals[cuts[number] : cuts[number + 1]] - firsts[number]
        yield batch if len(inside) == len(batch) else batch.take(pa.array(inside))
