"""Where rows of a site wait until they fill a batch: their columns, side by side in one block of memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from strapfmt import spec

__all__ = ["BufferPool", "RowBuffer"]

Array = npt.NDArray[Any]


class BufferPool:
    """Batch buffers that all sites of a writer share; a new one costs page faults, a used one does not.

    Buffers are given back on the I/O thread.

    Parameters
    ----------
    limit_bytes : int
        Keep at most so many bytes for the next one who asks.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes, self._free_bytes = limit_bytes, 0
        self._free: dict[int, list[Array]] = {}
        self._changing = threading.Lock()

    def take(self, n_bytes: int) -> Array:
        """Return a buffer, uint8 [n_bytes]."""
        with self._changing:
            if free := self._free.get(n_bytes):
                self._free_bytes -= n_bytes
                return free.pop()
        return np.empty(n_bytes, np.uint8)

    def give(self, buffer: Array) -> None:
        """Take a buffer back."""
        with self._changing:
            if self._free_bytes + buffer.nbytes <= self._limit_bytes:
                self._free.setdefault(buffer.nbytes, []).append(buffer)
                self._free_bytes += buffer.nbytes


class RowBuffer:
    """Rows of one site that do not fill a batch yet, every column in one piece.

    What `values` and `columns` returned is never written again, since the I/O thread may still read it: rows are only
    added behind. A buffer that is too small moves into another block.

    Parameters
    ----------
    schema : pyarrow.Schema
        The site's, of which `activation` is the first column.
    pool : BufferPool
    n_rows, n_values : int
        Room for so many rows, with so many elements of the activation in all.

    Attributes
    ----------
    n_rows, n_values : int
        What it holds.
    """

    def __init__(self, schema: pa.Schema, pool: BufferPool, *, n_rows: int, n_values: int) -> None:
        self._pool = pool
        activation, *others = schema
        self._storage = np.dtype(activation.type.value_type.to_pandas_dtype())
        self._types = {column.name: _numpy_type(column) for column in others}
        self.n_rows = self.n_values = 0
        self._block: Array
        self._values: Array
        self._columns: dict[str, Array]
        self._allocate(n_rows, n_values)

    @property
    def room(self) -> tuple[int, int]:
        """How many rows and elements fit."""
        return len(self._columns["row"]), len(self._values)

    @property
    def values(self) -> Array:
        """The elements of all rows, [n_values]; a view."""
        return self._values[: self.n_values]

    @property
    def columns(self) -> dict[str, Array]:
        """The other columns, each [n_rows] (`shape`: [n_rows, ndim]); views."""
        return {name: column[: self.n_rows] for name, column in self._columns.items()}

    def add(self, values: Array, columns: Mapping[str, Array]) -> None:
        """Copy rows behind those there are: their elements, [n], and their other columns."""
        n_rows, n_values = self.n_rows + len(columns["row"]), self.n_values + len(values)
        self._make_room(n_rows, n_values)
        for name, column in self._columns.items():
            column[self.n_rows : n_rows] = columns[name]
        self._values[self.n_values : n_values] = values
        self.n_rows, self.n_values = n_rows, n_values

    def release(self) -> Callable[[], None]:
        """Return what gives the memory back, to be called when nobody reads it any more."""
        pool, block = self._pool, self._block
        return lambda: pool.give(block)

    def _make_room(self, n_rows: int, n_values: int) -> None:
        """Double what is too small, so that all copies together cost no more than the rows themselves."""
        rows_room, values_room = self.room
        if n_rows <= rows_room and n_values <= values_room:
            return
        values, columns = self.values, self.columns
        self._allocate(
            rows_room if n_rows <= rows_room else max(n_rows, 2 * rows_room),
            values_room if n_values <= values_room else max(n_values, 2 * values_room),
        )
        self._values[: self.n_values] = values
        for name, column in columns.items():
            self._columns[name][: self.n_rows] = column

    def _allocate(self, n_rows: int, n_values: int) -> None:
        """Take a block for so many rows; the activation comes first, as its element may be the widest."""
        shapes = {name: (kind, (n_rows, *inner)) for name, (kind, inner) in self._types.items()}
        sizes = [n_values * self._storage.itemsize]
        sizes += [kind.itemsize * math.prod(shape) for kind, shape in shapes.values()]
        starts = np.cumsum([0, *(-(-size // spec.ALIGNMENT_BYTES) * spec.ALIGNMENT_BYTES for size in sizes)])
        self._block = self._pool.take(int(starts[-1]))
        parts = [self._block[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        self._values = parts[0].view(self._storage)
        self._columns = {
            name: part.view(kind).reshape(shape)
            for part, (name, (kind, shape)) in zip(parts[1:], shapes.items(), strict=True)
        }


def _numpy_type(column: pa.Field) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Return the element type of a column that is not the activation, and the shape of one row."""
    if pa.types.is_fixed_size_list(column.type):
        return np.dtype(column.type.value_type.to_pandas_dtype()), (column.type.list_size,)
    return np.dtype(column.type.to_pandas_dtype()), ()
