"""Gathers rows by their addresses: the shards of a site are one memory, whatever maps they lie in."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from strapfmt.bits import as_integers
from strapfmt.shard_reader import ShardReader

if TYPE_CHECKING:
    import torch

__all__ = ["RowAddresses", "gather_addresses"]

Array = npt.NDArray[Any]


def gather_addresses(addresses: Array, out: torch.Tensor) -> None:
    """Copy the rows that begin at `addresses` (int64 [n]) into `out` [n, row_values], one row each.

    This is one `index_select`, as quick as on a matrix: its source is a view over the addresses from the first row to
    the last, in which a row begins at every item. Only the rows asked for are read; they must be mapped, aligned to
    items, and stay so during the call.
    """
    import torch

    if not len(addresses):
        return
    target = as_integers(out)
    item, width = target.element_size(), target.shape[1]
    first = int(addresses.min())
    n_rows = (int(addresses.max()) - first) // item + 1
    span = (ctypes.c_char * ((n_rows + width - 1) * item)).from_address(first)
    rows = torch.frombuffer(span, dtype=target.dtype).as_strided((n_rows, width), (1, 1))
    torch.index_select(rows, 0, torch.from_numpy((addresses - first) // item), out=target)


class RowAddresses:
    """Where the rows of uncompressed shards lie in this process's memory; a shard is mapped when first asked for.

    Parameters
    ----------
    readers : sequence of ShardReader
        They hold the maps: keep them as long as the addresses are used.
    starts : int64 [n_shards + 1]
        Ordinal of each shard's first row.
    row_bytes, batch_rows : int
    """

    def __init__(
        self, readers: Sequence[ShardReader], starts: Array, *, row_bytes: int, batch_rows: int
    ) -> None:
        self._readers, self._starts = readers, starts
        self._row_bytes, self._batch_rows = row_bytes, max(batch_rows, 1)
        self._is_mapped = np.zeros(len(readers), bool)
        self._firsts = self._bodies = self._first_batches = np.empty(0, np.int64)
        self._is_regular = True

    def of(self, ordinals: Array, shards: Array) -> Array:
        """Return the address of each row, int64 [n], given its ordinal and the number of its shard."""
        if not np.all(self._is_mapped[shards]):
            self._map(shards)
        if self._is_regular:
            batches = self._first_batches[shards] + (ordinals - self._starts[shards]) // self._batch_rows
        else:
            batches = np.searchsorted(self._firsts, ordinals, "right") - 1
        addresses: Array = self._bodies[batches] + (ordinals - self._firsts[batches]) * self._row_bytes
        return addresses

    def _map(self, shards: Array) -> None:
        """Map these shards too and lay the record batches of all mapped ones behind one another."""
        self._is_mapped[shards] = True
        numbers = np.flatnonzero(self._is_mapped)
        mapped = [self._readers[number] for number in numbers.tolist()]
        self._bodies = np.concatenate([reader.body_addresses for reader in mapped])
        firsts = zip(mapped, self._starts[numbers], strict=True)
        self._firsts = np.concatenate([reader.first_ordinals + start for reader, start in firsts])
        self._first_batches = np.zeros(len(self._readers), np.int64)
        counts = [reader.n_batches for reader in mapped]
        self._first_batches[numbers] = np.cumsum([0, *counts[:-1]])
        self._is_regular = all(reader.is_regular for reader in mapped)
