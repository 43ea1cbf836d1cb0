"""Reads one shard through memory maps: record batches, views and gathers, each checked as far as was asked for."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.ipc

from strapfmt import spec
from strapfmt.arrowfile import decoded_bytes, is_compressed
from strapfmt.errors import CorruptError
from strapfmt.schema import SiteSpec
from strapfmt.shard_files import ShardFiles

if TYPE_CHECKING:
    import torch

__all__ = ["ShardReader"]

Array = npt.NDArray[Any]


class ShardReader(ShardFiles):
    """Record batches, views and gathers of one shard; made like `ShardFiles`."""

    # Record batches.

    def batch(self, number: int, *, verify: bool) -> pa.RecordBatch:
        """Return a record batch; uncompressed columns alias the map.

        Raises
        ------
        CorruptError
            If the header's hash, with `verify` the body's hash, or Arrow's full validation fails.
        """
        if verify:
            self.verify(number, number + 1)
        entry = self.index.batches[number]
        header, body = self._message(number)
        self._check_header(number, header)
        place = self.place_of(number)
        _check_expansion(place, header, body, entry, is_plain=self.is_plain)
        memory, start = self._memory(number), int(entry["offset"])
        message = pa.py_buffer(memory).slice(start, len(header) + len(body))
        try:
            batch = pa.ipc.read_record_batch(message, self.schema)
            batch.validate(full=True)
        except MemoryError:  # Arrow's own, which is one of these too: of this machine, not of the file
            raise
        except (pa.ArrowException, OSError, EOFError) as error:
            raise CorruptError(f"{place}: Arrow cannot read it: {error}") from error
        if batch.num_rows != entry["n_rows"]:
            raise CorruptError(f"{place}: expected {entry['n_rows']} rows, got {batch.num_rows}")
        for field, column in zip(self.schema, batch.columns, strict=True):
            if column.null_count and not field.nullable:
                raise CorruptError(f"{place}: column {field.name!r} holds nulls, which its schema forbids")
        if self._site is not None and self._site.is_ragged:
            _check_shapes(place, batch)
        elif self._site is not None and self.is_plain and batch.num_rows:
            values = batch.column(0).flatten().buffers()[1]
            if values is None or values.address != pa.py_buffer(self.body(number)).address:
                raise CorruptError(f"{place}: expected the activations at the beginning of the body")
        return batch

    # Activations without Arrow in between.

    def rows_between(self, start: int, stop: int) -> Array:
        """Return the row numbers of ordinals `start` to `stop`, int64 [stop - start]."""
        firsts, ordinals = self._runs
        at = np.arange(start, stop, dtype=np.int64)
        which = np.searchsorted(ordinals, at, "right") - 1
        rows: Array = firsts[which] + (at - ordinals[which])
        return rows

    def ordinals_of(self, rows: Array) -> Array:
        """Return the ordinals of row numbers, int64 [n]; -1 where the shard does not hold one."""
        firsts, ordinals = self._runs
        which = np.searchsorted(firsts, rows, "right") - 1
        safe = np.maximum(which, 0)
        found = ordinals[safe] + (rows - firsts[safe])
        ends = np.where(
            safe + 1 < len(ordinals), ordinals[np.minimum(safe + 1, len(ordinals) - 1)], self.index.n_rows
        )
        return np.where((which >= 0) & (found < ends), found, -1)

    @cached_property
    def _runs(self) -> tuple[Array, Array]:
        """First row and first ordinal of each run, int64 [n_runs]: copies in one piece, for searches."""
        runs = self.index.runs
        return np.ascontiguousarray(runs["row"]), runs["ordinal"].astype(np.int64)

    def body(self, number: int) -> memoryview:
        """Return the memory of one batch's activations (plain codecs and fixed shapes only)."""
        return self._memory(number)[self._body_range(number)]

    def view(self, number: int) -> torch.Tensor:
        """Return one batch's activations as a tensor [n_rows, *shape] that aliases the map of views."""
        import torch

        maps, site = self._lent_maps, self._fixed_site()
        memory = maps.tail if self._in_tail(number) else maps.data
        flat = torch.frombuffer(memory[self._body_range(number)], dtype=site.stored_dtype.torch)
        return flat.view(-1, *site.shape)

    def views(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first ordinal, tensor [n_batches, batch_rows, *shape]) for every stride, all of the map of views."""
        first = 0
        while first < self.n_batches:
            stop = self._stride_end(first)
            entry = self.index.batches[first]
            yield int(entry["first_ordinal"]), self._strided(first, stop)
            first = stop

    def gather(self, ordinals: Array, out: Array, positions: Array) -> None:
        """Copy the activations of `ordinals` (int64 [n]) into the rows `positions` of `out`, batch after batch.

        For what is compressed; rows of plain shards are gathered by their addresses.
        """
        which = np.searchsorted(self.first_ordinals, ordinals, "right") - 1
        inside = ordinals - self.first_ordinals[which]
        order = np.argsort(which, kind="stable")
        for group in np.split(order, np.flatnonzero(np.diff(which[order])) + 1):
            if len(group):
                values = self._decoded(int(which[group[0]])).view(out.dtype)
                out[positions[group]] = values[inside[group]]

    @cached_property
    def first_ordinals(self) -> Array:
        """Ordinal at which each record batch begins, int64 [n_batches]."""
        return self.index.batches["first_ordinal"].astype(np.int64)

    @cached_property
    def body_addresses(self) -> Array:
        """Where in memory each record batch's body begins, int64 [n_batches]; valid while this reader lives."""
        addresses = self._body_starts + _address(self._maps.data)
        if self.index.has_tail:
            addresses[-1] = self._body_starts[-1] + _address(self._maps.tail)
        return addresses

    def is_regular(self, batch_rows: int) -> bool:
        """Whether every batch but the last holds this number of rows, and the last no more."""
        n_rows = self.index.batches["n_rows"]
        return bool(np.all(n_rows[:-1] == batch_rows) and np.all(n_rows[-1:] <= batch_rows))

    # Inside.

    def _forget(self) -> None:
        for name in ("first_ordinals", "body_addresses", "_runs", "_body_starts"):
            self.__dict__.pop(name, None)

    def _fixed_site(self) -> SiteSpec:
        if self._site is None or self._site.is_ragged:
            raise AssertionError("only sites of a fixed shape lie as tensors")
        return self._site

    def _body_range(self, number: int) -> slice:
        start = int(self._body_starts[number])
        return slice(start, start + int(self.index.batches["n_rows"][number]) * self._fixed_site().row_bytes)

    def _decoded(self, number: int) -> Array:
        """Return one batch's activations as storage numbers, [n_rows, row_values]."""
        site = self._fixed_site()
        if self.is_plain:
            return np.frombuffer(self.body(number), site.stored_dtype.numpy).reshape(-1, site.row_values)
        values = self.batch(number, verify=False).column(0).flatten()
        return np.asarray(values.to_numpy(zero_copy_only=True)).reshape(-1, site.row_values)

    @cached_property
    def _body_starts(self) -> Array:
        starts: Array = self.index.batches["offset"].astype(np.int64) + self.index.batches["header_bytes"]
        return starts

    def _stride_end(self, first: int) -> int:
        """Return the end of the batches from `first` on that lie at one stride and are equally long."""
        batches = self.index.batches
        end = self._n_in_data
        if first >= end:
            return first + 1
        starts = self._body_starts[first:end]
        strides = np.diff(starts)
        same = (strides == (strides[0] if len(strides) else 0)) & (
            strides % self._fixed_site().stored_dtype.item_bytes == 0
        )
        same &= batches["n_rows"][first + 1 : end] == batches["n_rows"][first]
        broken = np.flatnonzero(~same)
        return first + 1 + (int(broken[0]) if len(broken) else len(same))

    def _strided(self, first: int, stop: int) -> torch.Tensor:
        import torch

        if stop - first == 1:
            return self.view(first).unsqueeze(0)
        site, batches = self._fixed_site(), self.index.batches
        item = site.stored_dtype.item_bytes
        starts = self._body_starts
        begin, stride = int(starts[first]), int(starts[first + 1] - starts[first])
        n_rows = int(batches["n_rows"][first])
        end = int(starts[stop - 1]) + n_rows * site.row_bytes
        flat = torch.frombuffer(self._lent_maps.data[begin:end], dtype=site.stored_dtype.torch)
        inner = torch.empty(site.shape, device="meta").stride()
        return flat.as_strided((stop - first, n_rows, *site.shape), (stride // item, site.row_values, *inner))


def _address(memory: memoryview) -> int:
    return int(np.frombuffer(memory, np.uint8).ctypes.data)


def _check_shapes(place: str, batch: pa.RecordBatch) -> None:
    """Refuse rows of a ragged site that are not as long as their shapes say."""
    shapes = batch.column("shape").flatten().to_numpy().reshape(batch.num_rows, -1)
    lengths = np.diff(batch.column("activation").offsets.to_numpy())
    if np.any(shapes < 0) or np.any(np.prod(shapes, axis=1, dtype=np.float64) != lengths):
        raise CorruptError(f"{place}: a row is not as long as its shape says")


def _check_expansion(
    place: str, header: memoryview, body: memoryview, entry: np.void, *, is_plain: bool
) -> None:
    """Refuse a body that would expand to more than the index admits, before anything is expanded."""
    try:
        if not is_compressed(header):
            return
        size = decoded_bytes(header, body)
    except (ValueError, struct.error) as error:
        raise CorruptError(f"{place}: {error}") from error
    if is_plain:
        raise CorruptError(f"{place}: it is compressed, which the manifest's codec denies")
    if size > int(entry["raw_bytes"]) or size > spec.MAX_BATCH_BYTES:
        raise CorruptError(
            f"{place}: it would expand to {size} bytes, the index admits {int(entry['raw_bytes'])}"
        )
