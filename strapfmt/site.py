"""One site of a dataset, read: tensors over all its shards, and what it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import numpy as np
import numpy.typing as npt

from strapfmt.addresses import RowAddresses
from strapfmt.arguments import as_integer, integers_of
from strapfmt.arrow_rows import ArrowRows
from strapfmt.bits import as_numpy
from strapfmt.errors import ArgumentError, DatasetChangedError, OrdinalNotFoundError, ViewError
from strapfmt.sharded import distinct

if TYPE_CHECKING:
    import torch

__all__ = ["Site", "View"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """Rows of a site that alias the memory map, as all views of the site do: see `Site.tensor`.

    Attributes
    ----------
    first_ordinal : int
        Ordinal of the first row.
    tensor : tensor [n_batches, batch_rows, *shape]
        Row `first_ordinal + i * batch_rows + j` is `tensor[i, j]`.
    """

    first_ordinal: int
    tensor: torch.Tensor


class Site(ArrowRows):
    """One site over all ranks and shards, in row order.

    `len()`, `[i]` and `[i:j]` count rows by ordinal, 0-based; `take` wants row ids, as in the column `row`. Pickled,
    it opens the dataset again, and refuses one that has grown meanwhile.

    Attributes
    ----------
    spec : SiteSpec
    layout : Layout
    """

    #: Opens the dataset anew, for pickles; set by what opened it.
    reopen: Callable[[], Any]

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

    # Tensors.

    def __len__(self) -> int:
        return self.n_rows

    def __getitem__(self, key: SupportsIndex | slice) -> torch.Tensor:
        """Return rows by ordinal: a view (see `tensor`) where they lie in one body, else a copy.

        Raises
        ------
        OrdinalNotFoundError
        """
        if isinstance(key, slice):
            start, stop, step = _indices(key, self.n_rows)
            if step == 1:
                return self._slice(start, max(start, stop))
            return self.gather(np.arange(start, stop, step))
        try:
            ordinal = as_integer("ordinal", key)
        except ArgumentError:
            raise ArgumentError(
                f"site {self.name!r}: [...] takes one ordinal or a slice, got {key!r}; gather(ordinals) takes a list, "
                "take() row ids"
            ) from None
        if not -self.n_rows <= ordinal < self.n_rows:
            raise OrdinalNotFoundError(self.name, self.n_rows, [ordinal])
        ordinal %= self.n_rows
        return self._slice(ordinal, ordinal + 1)[0]

    def __contains__(self, value: object) -> NoReturn:
        raise ArgumentError(
            f"site {self.name!r}: `in` could mean a row id, an ordinal or an activation; row ids: "
            f"`{value!r} in site.rows`"
        )

    def tensor(self, *, copy: bool | None = None) -> torch.Tensor:
        """Return all rows, [n_rows, *shape].

        Parameters
        ----------
        copy : bool, optional
            None: a view of the memory map where the rows are one contiguous body, else one copy. True: always a copy.
            False: a view or an error.

        Views of a site (of this, `[...]`, `views` and `Dataset.tensors`) share their memory with one another, so what
        is written into one shows in the others; it changes neither the file nor what `take`, `gather`, `scan`,
        loaders and SQL return. Take `copy=True`, or `.clone()`, before changing values in place.

        Raises
        ------
        ViewError
            With `copy=False` where there is no one body.
        """
        if copy is not None and not isinstance(copy, (bool, np.bool_)):
            raise ArgumentError(f"site {self.name!r}: copy: expected True, False or None, got {copy!r}")
        self._check_fixed("tensor()")
        if not copy:
            view = self._one_view(0, self.n_rows)
            if view is not None:
                return view
        if copy is not None and not copy:
            raise ViewError(
                f"site {self.name!r}: {self.n_rows} rows in {self.n_batches} record batches with codec {self.codec!r} "
                f"are no one contiguous body; {'use views(), or ' if self.codec == 'none' else ''}tensor() for one copy"
            )
        return self._copy(0, self.n_rows)

    def views(self) -> Iterator[View]:
        """Yield all rows as views (see `tensor`): one a shard and stride, then what is left over.

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
        return integers_of(name, given)

    def gather(self, ordinals: npt.ArrayLike, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return rows by ordinal, as `take` does by row id.

        Raises
        ------
        OrdinalNotFoundError
        """
        self._check_fixed("gather()")
        wanted = integers_of("ordinals", ordinals)
        if len(wanted) and wanted.view(np.uint64).max() >= self.n_rows:  # a negative one is huge
            missing = wanted[(wanted < 0) | (wanted >= self.n_rows)]
            raise OrdinalNotFoundError(self.name, self.n_rows, missing.tolist())
        target = self._out(len(wanted)) if out is None else out
        _check_out(target, (len(wanted), *self.shape), self.spec.stored_dtype.torch, self.name)
        self._fill(wanted, target.view(len(wanted), self.spec.row_values))
        return target

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.reopen, self.name, self.n_rows)

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


def _indices(key: slice, n_rows: int) -> tuple[int, int, int]:
    try:
        return key.indices(n_rows)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"[...]: expected a slice of whole numbers, got {key}: {error}") from None


def _reopened(reopen: Callable[[], Any], name: str, n_rows: int) -> Site:
    site: Site = reopen()[name]
    if len(site) != n_rows:
        raise DatasetChangedError(
            f"site {name!r} held {n_rows} rows when it was pickled, and holds {len(site)} now: pickle it anew, after "
            "the writer has closed"
        )
    return site


def _check_out(out: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, site: str) -> None:
    import torch

    expected = f"site {site!r}: out: expected contiguous {dtype} {list(shape)} on the CPU"
    if not isinstance(out, torch.Tensor):
        raise ArgumentError(f"{expected}, got {out!r}")
    is_plain = out.layout == torch.strided and out.is_contiguous() and not out.requires_grad
    if tuple(out.shape) != shape or out.dtype != dtype or out.device.type != "cpu" or not is_plain:
        grad = ", which requires grad" if out.requires_grad else ""
        raise ArgumentError(f"{expected}, got {out.dtype} {list(out.shape)} on {out.device}{grad}")
