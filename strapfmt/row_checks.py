"""Checks the arguments of one call that writes rows, before anything of them is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from strapfmt import spec
from strapfmt.errors import ArgumentError
from strapfmt.schema import SiteSpec

__all__ = ["TABLE_IDS", "TableIds", "check_columns", "check_ids", "check_values"]

Array = npt.NDArray[Any]

_INT64_MAX = (1 << 63) - 1
_INT32, _FLOAT32 = np.dtype(np.int32), np.dtype(np.float32)


@dataclass(frozen=True, slots=True)
class TableIds:
    """The column of a table that holds its ids, and the counter they come from ("": events tell of any row again).

    They go up where `is_rising`; sequences may begin in any order of numbers that a caller gives.
    """

    column: str
    counter: str
    is_rising: bool = True


TABLE_IDS = {
    "tokens": TableIds("row", "row"),
    "sequences": TableIds("sequence_id", "sequence", is_rising=False),
    "steps": TableIds("step", "step"),
    "row_events": TableIds("row", "", is_rising=False),
}


def check_values(site: SiteSpec, values: Array, shapes: Array | None) -> int:
    """Check the activations of a call and return how many rows they are."""
    storage = site.stored_dtype.numpy
    if values.dtype != storage or not values.flags.c_contiguous:
        contiguous = "" if values.flags.c_contiguous else "non-contiguous "
        raise ArgumentError(
            f"site {site.name!r}: values: expected C-contiguous {storage} (the storage of {site.dtype}), "
            f"got {contiguous}{values.dtype}"
        )
    if (shapes is not None) != site.is_ragged:
        raise ArgumentError(
            f"site {site.name!r}: shapes: expected {'one a row' if site.is_ragged else 'none'}"
        )
    if shapes is None:
        if values.ndim != len(site.shape) + 1 or values.shape[1:] != site.shape:
            raise ArgumentError(
                f"site {site.name!r}: values: expected [n, *{site.shape}], got {list(values.shape)}"
            )
        return len(values)
    sizes = _ragged_sizes(site, shapes)
    if values.ndim != 1 or values.size != sizes.sum():
        raise ArgumentError(
            f"site {site.name!r}: values: expected [{sizes.sum()}] as the shapes say, got {list(values.shape)}"
        )
    return len(shapes)


def _ragged_sizes(site: SiteSpec, shapes: Array) -> npt.NDArray[np.int64]:
    """Return how many elements each row has."""
    if (
        shapes.ndim != 2
        or shapes.shape[1] != len(site.shape)
        or shapes.dtype.kind not in "iu"
        or np.any(shapes < 0)
    ):
        raise ArgumentError(
            f"site {site.name!r}: shapes: expected int [n, {len(site.shape)}] >= 0, got {shapes.shape}"
        )
    fixed = [i for i, size in enumerate(site.shape) if size >= 0]
    if np.any(shapes[:, fixed] != np.array([site.shape[i] for i in fixed])):
        raise ArgumentError(f"site {site.name!r}: shapes: expected rows of shape {site.shape} (-1: any size)")
    sizes: Array = np.prod(shapes, axis=1, dtype=np.float64)  # int64 would wrap; below 2^53 this is exact
    wrong = (shapes > spec.MAX_ROW_VALUES).any(axis=1) | (sizes > spec.MAX_ROW_VALUES)
    if wrong.any():
        raise ArgumentError(
            f"site {site.name!r}: shapes: expected sizes, and values in a row, of at most {spec.MAX_ROW_VALUES}; got a "
            f"row of shape {shapes[wrong][0].tolist()}"
        )
    whole: npt.NDArray[np.int64] = sizes.astype(np.int64)
    return whole


def check_columns(
    site: SiteSpec,
    n_rows: int,
    rows: Array | None,
    statistics: Mapping[str, Array] | None,
    token_row: Array | None,
    call: int | Array | None,
    last_row: int,
    rank: int,
) -> dict[str, Array]:
    """Check the columns beside the activations and return them; they may alias what was given."""
    columns: dict[str, Array] = {}
    if site.row_space == "own":
        if rows is None:
            first = last_row + 1 if last_row >= 0 else rank << spec.RANK_SHIFT
            rows = np.arange(first, first + n_rows, dtype=np.int64)
        columns["row"] = _integers(site, "rows", rows, n_rows)
        _check_rows(site, columns["row"], last_row, rank)
        columns["token_row"] = _integers(site, "token_row", -1 if token_row is None else token_row, n_rows)
        columns["call"] = _integers(site, "call", 0 if call is None else call, n_rows)
    else:
        if rows is None or token_row is not None or call is not None:
            raise ArgumentError(
                f"site {site.name!r}: expected rows and neither token_row nor call (row space 'tokens')"
            )
        columns["row"] = _integers(site, "rows", rows, n_rows)
        _check_rows(site, columns["row"], last_row, rank)
    given = {} if statistics is None else dict(statistics)
    if set(given) != set(site.statistics):
        raise ArgumentError(f"site {site.name!r}: statistics: expected {site.statistics}, got {tuple(given)}")
    for name in site.statistics:
        columns[name] = _statistic(site, name, given[name], n_rows)
    return columns


def check_ids(table: str, ids: Array, last: int, rank: int) -> None:
    """Check the ids of rows of a table, at least one; those that have a counter are all above `last`."""
    kind = TABLE_IDS[table]
    what = f"table {table!r}: {kind.column}"
    _check_rank(what, int(ids.min()), int(ids.max()), rank)
    if kind.counter:
        _check_rising(what, ids if kind.is_rising else np.sort(ids), last)


def _statistic(site: SiteSpec, name: str, values: Any, n_rows: int) -> Array:
    array = np.asarray(values)
    storage = _INT32 if name == "n_nonfinite" else _FLOAT32
    if array.shape != (n_rows,) or array.dtype.kind not in ("iu" if storage is _INT32 else "fiu"):
        what = "whole numbers" if storage is _INT32 else "numbers"
        raise ArgumentError(
            f"site {site.name!r}: {name}: expected [{n_rows}] {what}, got {list(array.shape)} of {array.dtype}"
        )
    if array.dtype == storage:
        return array
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
        converted = array.astype(storage)
    if storage is _INT32 and np.any(converted != array):
        raise ArgumentError(
            f"site {site.name!r}: {name}: expected numbers that int32 holds, got {array[converted != array][0]}"
        )
    return converted


def _integers(site: SiteSpec, name: str, values: int | Array, n_rows: int) -> Array:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.shape not in ((), (n_rows,)):
        raise ArgumentError(
            f"site {site.name!r}: {name}: expected int [{n_rows}], got {array.dtype} {list(array.shape)}"
        )
    if array.dtype.kind == "u" and array.size and array.max() > _INT64_MAX:
        raise ArgumentError(f"site {site.name!r}: {name}: expected at most {_INT64_MAX}, got {array.max()}")
    return array.astype(np.int64, copy=False) if array.shape else np.full(n_rows, array, np.int64)


def _check_rows(site: SiteSpec, rows: Array, last_row: int, rank: int) -> None:
    if len(rows):
        what = f"site {site.name!r}: rows"
        _check_rising(what, rows, last_row)
        _check_rank(what, int(rows[0]), int(rows[-1]), rank)


def _check_rising(what: str, ids: Array, last: int) -> None:
    if ids[0] <= last or (len(ids) > 1 and np.any(ids[1:] <= ids[:-1])):
        at = int(np.argmax(ids <= np.concatenate([[last], ids[:-1]])))
        raise ArgumentError(
            f"{what}: expected strictly increasing ids above {last}, the last one used; got {ids[at]} after "
            f"{ids[at - 1] if at else last}"
        )


def _check_rank(what: str, least: int, most: int, rank: int) -> None:
    for found in (least, most):
        if found >> spec.RANK_SHIFT != rank:
            raise ArgumentError(
                f"{what}: expected ids of rank {rank} (rank << {spec.RANK_SHIFT} | n, as reserve() gives them), got "
                f"{found}"
            )
