"""Checks the arrays of one call that writes rows, before anything of them is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from strapfmt import spec
from strapfmt.errors import ArgumentError
from strapfmt.schema import SiteSpec

__all__ = ["check_columns", "check_values"]

Array = npt.NDArray[Any]


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
    sizes = np.prod(shapes, axis=1, dtype=np.int64)
    if values.ndim != 1 or values.size != sizes.sum() or np.any(sizes > spec.MAX_ROW_VALUES):
        raise ArgumentError(
            f"site {site.name!r}: values: expected [{sizes.sum()}] as the shapes say, got {values.shape}"
        )
    return len(shapes)


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
    """Check the columns beside the activations and return copies of them."""
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
        columns[name] = np.array(given[name], np.int32 if name == "n_nonfinite" else np.float32)
        if columns[name].shape != (n_rows,):
            raise ArgumentError(
                f"site {site.name!r}: {name}: expected [{n_rows}], got {list(columns[name].shape)}"
            )
    return columns


def _integers(site: SiteSpec, name: str, values: int | Array, n_rows: int) -> Array:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" or array.shape not in ((), (n_rows,)):
        raise ArgumentError(
            f"site {site.name!r}: {name}: expected int [{n_rows}], got {array.dtype} {list(array.shape)}"
        )
    return np.array(np.broadcast_to(array, (n_rows,)), np.int64)


def _check_rows(site: SiteSpec, rows: Array, last_row: int, rank: int) -> None:
    if not len(rows):
        return
    if rows[0] <= last_row or np.any(rows[1:] <= rows[:-1]):
        raise ArgumentError(
            f"site {site.name!r}: rows: expected strictly increasing row ids above {last_row}, the last one written"
        )
    if rows[0] >> spec.RANK_SHIFT != rank or rows[-1] >> spec.RANK_SHIFT != rank:
        raise ArgumentError(
            f"site {site.name!r}: rows: expected ids of rank {rank} (rank << {spec.RANK_SHIFT} | n)"
        )
