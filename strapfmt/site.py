"""One site of a dataset, read: tensors and Arrow over all its shards."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from strapfmt.addresses import RowAddresses
from strapfmt.batches import limited, resized
from strapfmt.bits import as_numpy
from strapfmt.errors import ArgumentError, ViewError
from strapfmt.manifest import Layout
from strapfmt.schema import SiteSpec, site_schema
from strapfmt.sharded import ShardedRows, distinct, integers_of

if TYPE_CHECKING:
    import torch

__all__ = ["Site", "View"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Rows of a site that alias the memory map.

    Attributes
    ----------
    first_ordinal : int
        Ordinal of the first row.
    tensor : tensor [n_batches, batch_rows, *shape]
        Row `first_ordinal + i * batch_rows + j` is `tensor[i, j]`.
    """

    first_ordinal: int
    tensor: torch.Tensor


class Site(ShardedRows):
    """One site over all ranks and shards, in row order.

    `len()`, `[i]` and `[i:j]` count rows by ordinal, 0-based; `take` wants row ids, as in the column `row`.

    Attributes
    ----------
    spec : SiteSpec
    layout : Layout
    """

    def __init__(
        self, site: SiteSpec, layout: Layout, *, problem: str = "", where: str = "", verify: bool = False
    ) -> None:
        super().__init__(site.name, where=where, problem=problem)
        self.spec, self.layout = site, layout
        self._always = verify
        #: Turns a `where` string into row ids; set by what can run SQL.
        self.resolve_where: Callable[[Site, str], Array] | None = None

    # What it is.

    @property
    def dtype(self) -> str:
        """Element type by its torch name, such as "bfloat16"."""
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row; -1 where it varies."""
        return self.spec.shape

    @property
    def row_space(self) -> str:
        """Either "tokens", or "own" where the site numbers its rows itself."""
        return self.spec.row_space

    @property
    def codec(self) -> str:
        """How it is compressed."""
        return self.spec.codec

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics stored with each row."""
        return self.spec.statistics

    @property
    def is_ragged(self) -> bool:
        """Whether rows differ in shape."""
        return self.spec.is_ragged

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema of its shards."""
        self._shards()
        return site_schema(self.spec)

    # Tensors.

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, key: SupportsIndex | slice) -> torch.Tensor:
        """Return rows by ordinal: a view where they lie in one body, else a copy."""
        if isinstance(key, slice):
            start, stop, step = _indices(key, self.n_rows)
            if step == 1:
                return self._slice(start, max(start, stop))
            return self.gather(np.arange(start, stop, step))
        try:
            ordinal = operator.index(key)
        except TypeError:
            raise ArgumentError(
                f"site {self.name!r}: [...] takes one ordinal or a slice, got {key!r}; gather(ordinals) takes a list, "
                "take() row ids"
            ) from None
        if not -self.n_rows <= ordinal < self.n_rows:
            raise IndexError(f"site {self.name!r} has {self.n_rows} rows, got ordinal {ordinal}")
        ordinal %= self.n_rows
        return self._slice(ordinal, ordinal + 1)[0]

    def tensor(self, *, copy: bool | None = None) -> torch.Tensor:
        """Return all rows, [n_rows, *shape].

        Parameters
        ----------
        copy : bool, optional
            None: a view of the memory map where the rows are one contiguous body, else one copy. True: always a copy.
            False: a view or an error. Writing into a view changes this process's memory only, never the file.

        Raises
        ------
        ViewError
            With `copy=False` where there is no one body.
        """
        self._check_fixed("tensor()")
        if copy is not True:
            view = self._one_view(0, self.n_rows)
            if view is not None:
                return view
        if copy is False:
            raise ViewError(
                f"site {self.name!r}: {self.n_rows} rows in {self.n_batches} record batches with codec {self.codec!r} "
                f"are no one contiguous body; {'use views(), or ' if self.codec == 'none' else ''}tensor() for one copy"
            )
        return self._copy(0, self.n_rows)

    def views(self) -> Iterator[View]:
        """Yield all rows as tensors that alias the map: one a shard and stride, then what is left over.

        Raises
        ------
        ViewError
            If the site is compressed.
        """
        self._check_fixed("views()")
        for shard, start, _ in self._spans():
            if not shard.is_plain:
                raise ViewError(f"site {self.name!r}: {shard.place} is compressed; use tensor() or scan()")
            if self._always:
                shard.verify(0, shard.n_batches)
            for first, tensor in shard.views():
                yield View(first_ordinal=start + first, tensor=tensor)

    def take(
        self,
        rows: npt.ArrayLike | None = None,
        *,
        own_rows: npt.ArrayLike | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the rows with these row ids, in this order, repeats allowed: [n, *shape], a copy.

        Parameters
        ----------
        rows : int64 [n]
            Row ids of tokens, as in the column `row`.
        own_rows : int64 [n]
            Instead of `rows` where the site numbers its rows itself: `own_row` in SQL, `site.rows` in all.
        out : tensor [n, *shape], optional
            Contiguous memory of the site's dtype to fill; fresh memory costs several times the copy.

        Raises
        ------
        RowNotFoundError
            If the site does not hold one of them.
        ArgumentError
            With `rows` on a site of own rows, whose numbers would stand for other tokens, and the other way round.
        """
        self._check_fixed("take()")
        return self.gather(self.ordinals_of(self.checked_rows(rows, own_rows, "take")), out=out)

    def checked_rows(
        self, rows: npt.ArrayLike | None, own_rows: npt.ArrayLike | None, what: str
    ) -> npt.NDArray[np.int64]:
        """Return whichever of the two was given and fits this site's row space, int64 [n].

        Raises
        ------
        ArgumentError
            If it is the other one, or not exactly one was given; `what` names the method.
        """
        if self.row_space == "own" and rows is not None:
            raise ArgumentError(
                f"site {self.name!r} numbers its rows itself, so rows of the tokens table mean nothing there; "
                f"{what}(own_rows=...) wants its own numbers (`own_row` in SQL). Those of some tokens: SELECT own_row "
                f'FROM "{self.name}" WHERE token_row IN (...)'
            )
        if self.row_space != "own" and own_rows is not None:
            raise ArgumentError(
                f"site {self.name!r} has the rows of the tokens table: {what}(rows=...); own_rows= is for sites that "
                "number their rows themselves"
            )
        name, given = ("own_rows", own_rows) if self.row_space == "own" else ("rows", rows)
        if given is None:
            raise ArgumentError(f"site {self.name!r}: {what}() wants {name}=")
        return integers_of(given, name)

    def gather(self, ordinals: npt.ArrayLike, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return rows by ordinal, as `take` does by row id."""
        self._check_fixed("gather()")
        wanted = integers_of(ordinals, "ordinals")
        if len(wanted) and wanted.view(np.uint64).max() >= self.n_rows:  # a negative one is huge
            raise IndexError(
                f"site {self.name!r} has {self.n_rows} rows, got ordinals {wanted.min()}..{wanted.max()}"
            )
        target = self._out(len(wanted)) if out is None else out
        _check_out(target, (len(wanted), *self.shape), self.spec.stored_dtype.torch, self.name)
        self._fill(wanted, target.view(len(wanted), self.spec.row_values))
        return target

    # Arrow.

    def scan(
        self,
        columns: Iterable[str] | None = None,
        *,
        where: str | pc.Expression | None = None,
        limit: int | None = None,
        batch_size: int | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows in order, hashes compared on first touch.

        Parameters
        ----------
        columns : iterable of str, optional
            All by default.
        where : str or pyarrow.compute.Expression, optional
            SQL over the columns of `tokens` and this site, or an Arrow expression over the site's columns. Statistics
            leave out values that are not finite: a row of NaN alone has an l2_norm of 0, so add `n_nonfinite = 0`.
        limit : int, optional
            At most so many rows.
        batch_size : int, optional
            Rows in every batch but the last; as stored by default. Stored batches alias the map, others are copies.
        """
        wanted = self._columns(columns)
        if where is not None and not isinstance(where, (str, pc.Expression)):
            raise ArgumentError(f"where: expected SQL text or a pyarrow expression, got {where!r}")
        batches = self._filtered(where)
        if limit is not None:
            batches = limited(batches, limit)
        if batch_size is not None:
            batches = resized(batches, batch_size, self.schema)
        for batch in batches:
            yield batch.select(wanted)

    def to_arrow(self, columns: Iterable[str] | None = None, *, verify: bool = True) -> pa.Table:
        """Return all rows as an Arrow table, a chunk a record batch.

        Parameters
        ----------
        columns : iterable of str, optional
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

    def __repr__(self) -> str:
        shape = ", ".join(["n", *("?" if size < 0 else str(size) for size in self.shape)])
        kind = f"{self.dtype} [{shape}], codec {self.codec}, {self.row_space} rows"
        return f"Site({self.name!r}: {self.n_rows} rows, {kind})"

    # Inside.

    def _check_fixed(self, what: str) -> None:
        self._shards()
        if self.is_ragged:
            raise ViewError(
                f"site {self.name!r}: rows differ in shape {self.shape}, so {what} has no rectangle to return; use "
                "scan() or to_arrow(), whose column `shape` says how to fold each list"
            )

    def _out(self, n_rows: int) -> torch.Tensor:
        import torch

        return torch.empty((n_rows, *self.shape), dtype=self.spec.stored_dtype.torch)

    def _slice(self, start: int, stop: int) -> torch.Tensor:
        self._check_fixed("[...]")
        view = self._one_view(start, stop)
        return self._copy(start, stop) if view is None else view

    def _one_view(self, start: int, stop: int) -> torch.Tensor | None:
        """Return rows `start` to `stop` as a view where they lie in one plain body."""
        if start >= stop:
            return None
        number = int(np.searchsorted(self._starts, start, "right")) - 1
        shard, begin = self._readers[number], int(self._starts[number])
        firsts = shard.index.batches["first_ordinal"].astype(np.int64)
        batch = int(np.searchsorted(firsts, start - begin, "right")) - 1
        first = begin + int(firsts[batch])
        if not shard.is_plain or stop > first + int(shard.index.batches["n_rows"][batch]):
            return None
        if self._always:
            shard.verify(batch, batch + 1)
        return shard.view(batch)[start - first : stop - first]

    def _copy(self, start: int, stop: int) -> torch.Tensor:
        out = self._out(stop - start)
        self._fill(np.arange(start, stop), out.view(stop - start, self.spec.row_values))
        return out

    def _fill(self, ordinals: Array, out: torch.Tensor) -> None:
        """Copy the rows at `ordinals` into `out` [n, row_values]."""
        shards, numbers = np.zeros(len(ordinals), np.int64), [0]
        if len(self._readers) != 1:
            shards = np.searchsorted(self._starts, ordinals, "right") - 1
            numbers = distinct(shards)
        for number in numbers:
            if self._always:
                firsts = self._readers[number].first_ordinals + self._starts[number]
                for batch in np.unique(
                    np.searchsorted(firsts, ordinals[shards == number], "right") - 1
                ).tolist():
                    self._readers[number].verify(batch, batch + 1)
        if all(self._readers[number].is_plain for number in numbers):
            self._addresses.gather(ordinals, shards, out)
            return
        for number in numbers:
            chosen = np.flatnonzero(shards == number)
            self._readers[number].gather(ordinals[chosen] - self._starts[number], as_numpy(out), chosen)

    @cached_property
    def _addresses(self) -> RowAddresses:
        return RowAddresses(self.spec, self._readers, self._starts, batch_rows=self.layout.batch_rows)

    def _columns(self, columns: Iterable[str] | None) -> list[str]:
        wanted = list(self.schema.names) if columns is None else list(columns)
        unknown = [name for name in wanted if name not in self.schema.names]
        if unknown:
            raise ArgumentError(
                f"site {self.name!r}: no columns {unknown}; there are {', '.join(self.schema.names)}"
            )
        return wanted

    def _filtered(self, where: str | pc.Expression | None) -> Iterator[pa.RecordBatch]:
        if isinstance(where, str):
            if self.resolve_where is None:
                raise ArgumentError(
                    "where: SQL needs strapfmt.open(); a bare Reader takes a pyarrow expression"
                )
            kept = np.sort(self.resolve_where(self, where))
        for shard in self._shards():
            for number in range(shard.n_batches):
                if isinstance(where, str):
                    start = int(shard.index.batches["first_ordinal"][number])
                    rows = shard.rows_between(start, start + int(shard.index.batches["n_rows"][number]))
                    mask = np.isin(rows, kept, assume_unique=True)
                    if mask.any():
                        batch = shard.batch(number, verify=True)
                        yield batch if mask.all() else batch.filter(pa.array(mask))
                else:
                    batch = shard.batch(number, verify=True)
                    yield batch if where is None else batch.filter(where)


def _indices(key: slice, n_rows: int) -> tuple[int, int, int]:
    try:
        return key.indices(n_rows)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"[...]: expected a slice of whole numbers, got {key}: {error}") from None


def _check_out(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, site: str) -> None:
    good = (
        tuple(out.shape) == shape and out.dtype == dtype and out.is_contiguous() and out.device.type == "cpu"
    )
    if not good:
        raise ArgumentError(
            f"site {site!r}: out: expected contiguous {dtype} {list(shape)} on the CPU, got {out.dtype} "
            f"{list(out.shape)} on {out.device}"
        )
