"""In which order an epoch visits rows: pure functions of a seed, so that any place in it can be computed anew.

Three orders, each holding every row exactly once per epoch:

=======  ==========================================================================================================
"none"   as stored
"full"   one permutation of all rows: reading is random, for data that the page cache holds
"block"  the stored record batches are permuted, and this sequence is cut into pools of `pool_rows` rows, each
         permuted within: a pool is read record batch by record batch, for data larger than memory
=======  ==========================================================================================================

A shard, one of `count` ranks, takes one stretch of the stored order or of the block sequence, or every `count`-th
element of the full permutation; sizes differ by at most one row.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from strapfmt.arguments import as_integer
from strapfmt.errors import ArgumentError

__all__ = ["FULL_SHUFFLE_BYTES", "FULL_SHUFFLE_ROWS", "Epoch", "Order", "Shuffle"]

Shuffle = Literal["none", "full", "block"]
Integers = NDArray[np.int64]

FULL_SHUFFLE_BYTES = 4 << 30
FULL_SHUFFLE_ROWS = 1 << 26

_WHOLE, _POOL = 1, 2  # what a permutation is of: the first word of its seed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """The order of rows 0 to `n_rows` in every epoch, as one shard sees it.

    Attributes
    ----------
    n_rows : int
        Rows in an epoch over all shards.
    kind : {"none", "full", "block"}
    seed : int
        At least 0.
    block_starts : int64 [n_blocks + 1]
        First row of each block, and `n_rows`; only "block" looks at it.
    pool_rows : int
        Rows permuted together by "block".
    shard : (int, int)
        Number of this shard, and how many there are.
    """

    n_rows: int
    kind: Shuffle
    seed: int
    block_starts: Integers
    pool_rows: int
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        is_pair = isinstance(self.shard, (tuple, list)) and len(self.shard) == 2
        index, count = (as_integer("shard", number) for number in self.shard) if is_pair else (0, 0)
        if not 0 <= index < count:
            raise ArgumentError(f"shard: expected (index, count) with 0 <= index < count, got {self.shard!r}")
        object.__setattr__(self, "shard", (index, count))
        object.__setattr__(self, "seed", as_integer("seed", self.seed, least=0))

    @property
    def begin(self) -> int:
        """Where this shard's stretch begins."""
        return self.n_rows * self.shard[0] // self.shard[1]

    @property
    def end(self) -> int:
        """Where this shard's stretch ends."""
        return self.n_rows * (self.shard[0] + 1) // self.shard[1]

    @property
    def size(self) -> int:
        """Rows of an epoch in this shard."""
        index, count = self.shard
        if self.kind == "full":
            return len(range(index, self.n_rows, count))
        return self.end - self.begin

    @property
    def smallest_size(self) -> int:
        """Rows of an epoch in the smallest shard."""
        return self.n_rows // self.shard[1]

    def epoch(self, number: int) -> "Epoch":
        """Return the order of one epoch; it holds a permutation of all rows ("full") or of all blocks ("block")."""
        if self.kind == "none":
            return Epoch(self, number, np.empty(0, np.int64))
        if self.kind == "full":
            index, count = self.shard
            return Epoch(
                self, number, _permutation(self.n_rows, _WHOLE, self.seed, number)[index::count].copy()
            )
        return Epoch(self, number, _permutation(len(self.block_starts) - 1, _WHOLE, self.seed, number))


class Epoch:
    """One epoch's order, made by `Order.epoch`."""

    def __init__(self, order: Order, number: int, permutation: Integers) -> None:
        self._order, self._number, self._permutation = order, number, permutation
        self._pool_number, self._pool_shuffled = -1, np.empty(0, np.int64)
        self._starts: Integers = np.empty(0, np.int64)
        self._places: Integers = np.empty(0, np.int64)
        if order.kind == "block":
            self._starts = order.block_starts[permutation]
            lengths = order.block_starts[permutation + 1] - self._starts
            self._places = np.concatenate([[0], np.cumsum(lengths)])

    def rows(self, start: int, stop: int) -> Integers:
        """Return the rows at places `start` to `stop`, int64 [stop - start].

        With "block" the two must lie in one pool.
        """
        order = self._order
        if order.kind == "none":
            return np.arange(order.begin + start, order.begin + stop, dtype=np.int64)
        if order.kind == "full":
            return self._permutation[start:stop]
        number = start // order.pool_rows
        first = number * order.pool_rows
        return self._pool(number)[start - first : stop - first]

    def _pool(self, number: int) -> Integers:
        if number != self._pool_number:
            order = self._order
            first = order.begin + number * order.pool_rows
            rows = self._sequence(first, min(first + order.pool_rows, order.end))
            key = (_POOL, order.seed, self._number, order.shard[0], number)
            self._pool_number, self._pool_shuffled = number, rows[_permutation(len(rows), *key)]
        return self._pool_shuffled

    def _sequence(self, start: int, stop: int) -> Integers:
        """Return places `start` to `stop` of the permuted blocks laid end to end."""
        places = np.arange(start, stop, dtype=np.int64)
        block = np.searchsorted(self._places, places, "right") - 1
        return self._starts[block] + places - self._places[block]


def _permutation(n: int, *key: int) -> Integers:
    """Return a permutation of `n` numbers that depends on `key` only.

    NumPy promises the same raw bits in every version, and no such thing for `Generator.permutation`.
    """
    raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw(n)
    permutation: Integers = np.argsort(raw, kind="stable")
    return permutation
