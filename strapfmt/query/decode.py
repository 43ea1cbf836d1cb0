"""Stored numbers to values inside SQL: vectorised functions that DuckDB calls for the rows a query needs.

DuckDB 2 has neither bfloat16 nor float8 and refuses Arrow's half floats, so those columns are registered as integers
of the same bits, and a view calls one of these functions where the query names `activation`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from strapfmt import spec
from strapfmt.dtypes import DType
from strapfmt.errors import ArgumentError
from strapfmt.schema import SiteSpec

__all__ = ["DECODED", "SQL_ELEMENTS", "array_type", "as_registered", "decoder", "float8_values"]

DECODED = frozenset(
    {"bfloat16", "float16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz"}
)

SQL_ELEMENTS = {
    "float64": "DOUBLE",
    "float32": "FLOAT",
    "int8": "TINYINT",
    "int16": "SMALLINT",
    "int32": "INTEGER",
    "int64": "BIGINT",
    "uint8": "UTINYINT",
    "uint16": "USMALLINT",
    "uint32": "UINTEGER",
    "uint64": "UBIGINT",
}

# Exponent bits, mantissa bits and bias; "fn" has no infinity, "uz" neither infinity nor a negative zero.
_FLOAT8 = {
    "float8_e4m3fn": (4, 3, 7),
    "float8_e5m2": (5, 2, 15),
    "float8_e4m3fnuz": (4, 3, 8),
    "float8_e5m2fnuz": (5, 2, 16),
}

Kernel = Callable[[NDArray[Any], NDArray[np.float32]], None]


def array_type(site: SiteSpec, element: str | None = None) -> str:
    """Return the SQL type of a site's registered activation: `USMALLINT[768]`, or `USMALLINT[]` where ARRAY ends.

    Parameters
    ----------
    site : SiteSpec
        The site; ragged ones, and rows of more than `spec.MAX_DUCKDB_ARRAY` values, are lists.
    element : str, optional
        SQL name of the element, where it is not that of the stored numbers.
    """
    size = "" if _is_list(site) else str(site.row_values)
    return f"{element or SQL_ELEMENTS[_registered(site.stored_dtype)]}[{size}]"


def as_registered(column: pa.ChunkedArray, site: SiteSpec) -> pa.ChunkedArray:
    """Return a site's activation column as DuckDB can take it, sharing its memory."""
    storage = pa.from_numpy_dtype(np.dtype(_registered(site.stored_dtype)))
    if site.is_ragged:
        kind = pa.list_(storage)
    elif _is_list(site):
        kind = pa.large_list(storage)
    else:
        kind = pa.list_(storage, site.row_values)
    chunks = [_as_registered(chunk, site, storage) for chunk in column.chunks]
    return pa.chunked_array(chunks, type=kind)


def decoder(site: SiteSpec, *, as_list: bool) -> Callable[[pa.ChunkedArray], pa.Array]:
    """Return the function from registered numbers to float32.

    Parameters
    ----------
    site : SiteSpec
        Its element type and row shape are built into the function.
    as_list : bool
        Return lists also for rows of fixed size, so that sites of different widths fit one column.
    """
    kernel = _kernel(site.stored_dtype)
    width = None if _is_list(site) else site.row_values

    def decode(column: pa.ChunkedArray) -> pa.Array:
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        mask = array.is_null() if array.null_count else None
        if width is None:
            start, stop = array.offsets[0].as_py(), array.offsets[-1].as_py()
            offsets = array.offsets.to_numpy() - start
            values = _floats(array.values.slice(start, stop - start), kernel)
            return _lists(offsets, values, mask)
        values = _floats(array.values.slice(array.offset * width, len(array) * width), kernel)
        if as_list:
            return _lists(np.arange(len(array) + 1, dtype=np.int64) * width, values, mask)
        return pa.FixedSizeListArray.from_arrays(values, width, mask=mask)

    return decode


def float8_values(name: str) -> NDArray[np.float32]:
    """Return the 256 values of a float8 type by bit pattern (OCP OFP8; "fnuz": Noune et al., arXiv 2206.02915)."""
    n_exponent, n_mantissa, bias = _FLOAT8[name]
    bits = np.arange(256)
    sign = np.where(bits & 0x80, -1.0, 1.0)
    exponent = bits >> n_mantissa & (1 << n_exponent) - 1
    fraction = (bits & (1 << n_mantissa) - 1) / (1 << n_mantissa)
    normal = np.ldexp(1 + fraction, exponent - bias)
    values = sign * np.where(exponent > 0, normal, np.ldexp(fraction, 1 - bias))
    if name.endswith("fnuz"):
        values[0x80] = np.nan
    elif name == "float8_e4m3fn":
        values[[0x7F, 0xFF]] = np.nan
    else:
        special = exponent == (1 << n_exponent) - 1
        values[special] = np.where(fraction[special] == 0, sign[special] * np.inf, np.nan)
    return values.astype(np.float32)


def _is_list(site: SiteSpec) -> bool:
    return site.is_ragged or site.row_values > spec.MAX_DUCKDB_ARRAY


def _registered(dtype: DType) -> str:
    return "uint16" if dtype.name == "float16" else dtype.storage


def _as_registered(chunk: pa.Array, site: SiteSpec, storage: pa.DataType) -> pa.Array:
    array = chunk.storage if isinstance(chunk, pa.ExtensionArray) else chunk
    if site.is_ragged:
        return array.view(pa.list_(storage))
    array = array.view(pa.list_(storage, site.row_values))
    if not _is_list(site):
        return array
    start = array.offset * site.row_values
    offsets = np.arange(len(array) + 1, dtype=np.int64) * site.row_values
    return pa.LargeListArray.from_arrays(offsets, array.values.slice(start, len(array) * site.row_values))


def _floats(stored: pa.Array, kernel: Kernel) -> pa.Array:
    """Decode into memory of Arrow's pool: it keeps pages between calls, where fresh ones cost ten times the copy."""
    buffer = pa.allocate_buffer(len(stored) * 4)
    kernel(stored.to_numpy(), np.frombuffer(buffer, np.float32))
    return pa.Array.from_buffers(pa.float32(), len(stored), [None, buffer])


def _lists(offsets: NDArray[np.integer], values: pa.Array, mask: pa.Array | None) -> pa.Array:
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ArgumentError(
            f"{offsets[-1]} values in one go are more than a list column holds; use scan() or take()"
        )
    return pa.ListArray.from_arrays(offsets.astype(np.int32), values, mask=mask)


def _kernel(dtype: DType) -> Kernel:
    if dtype.name == "bfloat16":
        return _from_bfloat16
    if dtype.name == "float16":
        return _from_float16
    if dtype.name in _FLOAT8:
        return _from_table(float8_values(dtype.name))
    return _from_numbers


def _from_bfloat16(stored: NDArray[Any], out: NDArray[np.float32]) -> None:
    np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)


def _from_float16(stored: NDArray[Any], out: NDArray[np.float32]) -> None:
    out[...] = stored.view(np.float16)


def _from_table(values: NDArray[np.float32]) -> Kernel:
    def kernel(stored: NDArray[Any], out: NDArray[np.float32]) -> None:
        np.take(values, stored, out=out, mode="clip")

    return kernel


def _from_numbers(stored: NDArray[Any], out: NDArray[np.float32]) -> None:
    with np.errstate(over="ignore"):
        out[...] = stored
