"""The rows of a site over its shards: row ids to ordinals and back, without reading activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from strapfmt.arguments import integers_of
from strapfmt.errors import RowNotFoundError, UnsupportedError
from strapfmt.shard_reader import ShardReader

__all__ = ["ShardedRows", "distinct"]


class ShardedRows:
    """Rows in several shards, in row order.

    Parameters
    ----------
    name : str
        The site's name.
    shards : sequence of ShardReader
    where : str
        The dataset, for errors.
    problem : str
        Why this version cannot read the site, "" where it can; anything that needs shards raises it.
    """

    def __init__(
        self, name: str, shards: Sequence[ShardReader], *, where: str = "", problem: str = ""
    ) -> None:
        self.name, self.problem, self._where = name, problem, where
        self._readers = shards
        self._starts = np.cumsum([0, *(shard.shard.n_rows for shard in shards)], dtype=np.int64)

    @property
    def n_rows(self) -> int:
        """Stored rows."""
        return int(self._starts[-1])

    @property
    def n_bytes(self) -> int:
        """Bytes of its files."""
        return sum(part.n_bytes for shard in self._readers for part in shard.shard.parts)

    @property
    def n_unverified_bytes(self) -> int:
        """Bytes whose checksums have not been compared by this reader."""
        return sum(shard.n_unverified_bytes for shard in self._readers)

    @property
    def n_batches(self) -> int:
        """Stored record batches."""
        return sum(shard.n_batches for shard in self._shards())

    @property
    def batch_ordinals(self) -> npt.NDArray[np.int64]:
        """Ordinal at which each stored record batch begins, and the end: int64 [n_batches + 1]."""
        firsts = [
            shard.index.batches["first_ordinal"].astype(np.int64) + start
            for shard, start in zip(self._shards(), self._starts, strict=False)
        ]
        return np.concatenate([*firsts, [self.n_rows]]).astype(np.int64)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Row ids in order, int64 [n_rows], a new array."""
        parts = [shard.rows_between(0, shard.shard.n_rows) for shard in self._shards()]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def rows_between(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the row ids of ordinals `start` to `stop`, int64 [stop - start], without reading others."""
        parts = [
            shard.rows_between(max(start - begin, 0), min(stop, end) - begin)
            for shard, begin, end in self._spans()
            if begin < stop and start < end
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def ordinals_of(self, rows: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Return the ordinal of each row id, int64 [n].

        Raises
        ------
        RowNotFoundError
            If the site does not hold one of them.
        """
        wanted = integers_of("rows", rows)
        firsts, lasts, is_dense = self._row_spans
        which = np.searchsorted(firsts, wanted, "right") - 1
        ordinals = np.full(len(wanted), -1, np.int64)
        if len(firsts):
            inside = (which >= 0) & (wanted <= lasts[which])
            ordinals = np.where(inside, wanted - firsts[which] + self._starts[which], -1)
            for number in distinct(which[inside & ~is_dense[which]]):
                chosen = np.flatnonzero(which == number)
                found = self._readers[number].ordinals_of(wanted[chosen])
                ordinals[chosen] = np.where(found >= 0, found + self._starts[number], -1)
        if np.any(ordinals < 0):
            raise RowNotFoundError(self.name, wanted[ordinals < 0].tolist())
        return ordinals

    def verify_batches(self, first: int, last: int) -> None:
        """Compare the hashes of stored record batches `first` to `last` (exclusive), each once.

        Raises
        ------
        CorruptError
        """
        start = 0
        for shard in self._shards():
            end = start + shard.n_batches
            if start < last and first < end:
                shard.verify(max(first - start, 0), min(last, end) - start)
            start = end

    @cached_property
    def _row_spans(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """First and last row id of each shard, and whether it holds all between; its index is not needed then."""
        shards = [shard.shard for shard in self._shards()]
        firsts = np.array([shard.first_row for shard in shards], np.int64)
        lasts = np.array([shard.last_row for shard in shards], np.int64)
        return firsts, lasts, lasts - firsts + 1 == np.diff(self._starts)

    def _shards(self) -> Sequence[ShardReader]:
        if self.problem:
            raise UnsupportedError(f"{self._where}: site {self.name!r}: {self.problem}")
        return self._readers

    def _spans(self) -> Iterator[tuple[ShardReader, int, int]]:
        for shard, start in zip(self._shards(), self._starts.tolist(), strict=False):
            yield shard, start, start + shard.shard.n_rows


def distinct(numbers: npt.NDArray[np.int64]) -> list[int]:
    """Return which numbers there are, in order; they are small and >= 0."""
    return np.flatnonzero(np.bincount(numbers)).tolist() if len(numbers) else []
