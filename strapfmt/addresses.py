"""Gathers rows by their addresses: the shards of a site are one memory, whatever maps they lie in."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from strapfmt.bits import as_integers, integers_of_size
from strapfmt.schema import SiteSpec
from strapfmt.shard_reader import ShardReader

if TYPE_CHECKING:
    import torch

__all__ = ["RowAddresses"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mapped:
    """The record batches of the shards that are mapped, in order.

    Attributes
    ----------
    shards : bool [n_shards]
    first_batches : int64 [n_shards]
        Which batch is the shard's first.
    firsts, bodies : int64 [n_batches]
        Each batch's first ordinal, and the place of its body in `memory`.
    is_regular : bool
        Whether every batch of a shard but its last holds `batch_rows` rows.
    memory : tensor [n, row_values] of integers
        From the first body to the end of the last: a row begins at every item, most of them not mapped at all.
    """

    shards: npt.NDArray[np.bool_]
    first_batches: Array
    firsts: Array
    bodies: Array
    is_regular: bool
    memory: torch.Tensor


class RowAddresses:
    """Where the rows of uncompressed shards lie in this process's memory; a shard is mapped when first asked for.

    A gather is one `index_select`, as quick as on a matrix, however many shards there are: its source spans all their
    maps, and only the rows asked for are read. Safe from several threads.

    Parameters
    ----------
    site : SiteSpec
    readers : sequence of ShardReader
        They hold the maps.
    starts : int64 [n_shards + 1]
        Ordinal of each shard's first row.
    batch_rows : int
        Rows in a record batch of a regular shard.
    """

    def __init__(
        self, site: SiteSpec, readers: Sequence[ShardReader], starts: Array, *, batch_rows: int
    ) -> None:
        self._readers, self._starts = readers, starts
        self._width, self._item = site.row_values, site.stored_dtype.item_bytes
        self._batch_rows = max(batch_rows, 1)
        self._mapped: _Mapped | None = None

    def gather(self, ordinals: Array, shards: Array, out: torch.Tensor) -> None:
        """Copy the rows at `ordinals` (int64 [n]), each in one of `shards` ([n]), into `out` [n, row_values]."""
        import torch

        if not len(ordinals):
            return
        mapped = self._mapped
        if mapped is None or not np.all(mapped.shards[shards]):
            mapped = self._mapped = self._map(shards)
        if mapped.is_regular:
            batches = mapped.first_batches[shards] + (ordinals - self._starts[shards]) // self._batch_rows
        else:
            batches = np.searchsorted(mapped.firsts, ordinals, "right") - 1
        places = mapped.bodies[batches] + (ordinals - mapped.firsts[batches]) * self._width
        torch.index_select(mapped.memory, 0, torch.from_numpy(places), out=as_integers(out))

    def _map(self, shards: Array) -> _Mapped:
        """Map these shards beside those that are mapped."""
        import torch

        is_mapped = np.zeros(len(self._readers), bool) if self._mapped is None else self._mapped.shards.copy()
        is_mapped[shards] = True
        numbers = np.flatnonzero(is_mapped)
        readers = [self._readers[number] for number in numbers.tolist()]
        addresses = np.concatenate([reader.body_addresses for reader in readers])
        n_rows = np.concatenate([reader.index.batches["n_rows"] for reader in readers]).astype(np.int64)
        begin, end = int(addresses.min()), int((addresses + n_rows * (self._width * self._item)).max())
        span = (ctypes.c_char * (end - begin)).from_address(begin)
        items = torch.frombuffer(span, dtype=integers_of_size(self._item))
        first_batches = np.zeros(len(is_mapped), np.int64)
        first_batches[numbers] = np.cumsum([0, *(reader.n_batches for reader in readers[:-1])])
        starts = zip(readers, self._starts[numbers], strict=True)
        return _Mapped(
            shards=is_mapped,
            first_batches=first_batches,
            firsts=np.concatenate([reader.first_ordinals + start for reader, start in starts]),
            bodies=(addresses - begin) // self._item,
            is_regular=all(reader.is_regular(self._batch_rows) for reader in readers),
            memory=items.as_strided((len(items) - self._width + 1, self._width), (1, 1)),
        )
