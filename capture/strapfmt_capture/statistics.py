"""Per-row statistics of a tensor, over its finite values, at memory speed.

A row is read once, in tiles that stay in the cache: converted to float32, summed, squared and summed, and its
largest magnitude taken. That is safe for almost every row a model produces. The rows where it is not are
recognised from the same numbers and done again: rows whose mean is large beside their spread by a second,
centred pass, and rows with non-finite values, or so large or small that squares leave the range of float32, in
scaled float64.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.errors import ArgumentError
from strapfmt.spec import STATISTICS

__all__ = ["RowStatistics", "check_statistics"]

# 512 KiB of float32: it fits an L2 cache.
_TILE_VALUES = 131_072
# Converted at a time, as torch starts no threads of its own for so little: these would take the model's cores.
_COPY_VALUES = 32_768
# Rows done twice are gathered, so that many values at a time at most.
_BLOCK_VALUES = 1 << 22
# Partial sums are float32 over this many values at most, and float64 above it.
_PIECE_VALUES = 4_096
# Squares of values up to 2**55, 4,096 at a time, stay below 2**122; rows with a smaller root mean square than
# 2**-50 lose digits to underflow.
_LARGEST_SAFE = 2.0**55
_SMALLEST_SAFE_SQUARE = 2.0**-100
# The variance is centred again when less than this share of the mean square is left of it.
_CANCELLATION = 0.25
_EXACT_IN_FLOAT32 = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.int8,
    torch.int16,
    torch.uint8,
    torch.uint16,
    torch.bool,
)

Columns = dict[str, npt.NDArray[np.generic]]
_Float32 = npt.NDArray[np.float32]
_Float64 = npt.NDArray[np.float64]
_Int64 = npt.NDArray[np.int64]
_Columns = dict[str, _Float64]
_TYPES = {"n_nonfinite": np.int32}


def check_statistics(names: bool | Collection[str]) -> tuple[str, ...]:
    """Return the statistics to compute, in the order of the format, from True, False or names.

    Raises
    ------
    ArgumentError
        If a name is unknown.
    """
    if isinstance(names, bool):
        return STATISTICS if names else ()
    listed = [names] if isinstance(names, str) else names
    if not isinstance(listed, Collection) or not all(isinstance(name, str) for name in listed):
        raise ArgumentError(f"stats: expected True, False or some of {', '.join(STATISTICS)}; got {names!r}")
    wanted = set(listed)
    if unknown := sorted(wanted - set(STATISTICS)):
        known = ", ".join(STATISTICS)
        raise ArgumentError(f"stats: expected True, False or some of {known}; got {', '.join(unknown)}")
    return tuple(name for name in STATISTICS if name in wanted)


class RowStatistics:
    """Computes statistics row by row; owns the scratch memory it reuses, so one object belongs to one thread.

    The definitions, over the finite values of a row (none of which a row of NaN has):

    - `l2_norm`: square root of the sum of squares; 0 without values.
    - `mean`, `std`: mean, and standard deviation around it with divisor n (population); NaN without values.
    - `abs_max`: largest magnitude; 0 without values.
    - `n_nonfinite`: how many values are NaN or infinite.

    `l2_norm`, `std` and `abs_max` are within a few float32 roundings of the exact result (a relative error below
    2e-6; infinite where the result leaves the range of float32), `mean` within 1e-6 of the root mean square.
    Float64 and integers of 32 bits and more are summed in float64, and are as exact as that is.
    """

    def __init__(self) -> None:
        # Memory from inside inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self._values = torch.empty(_TILE_VALUES, dtype=torch.float32, device="cpu")

    def __call__(self, x: torch.Tensor, names: Collection[str] = STATISTICS) -> Columns:
        """Return the statistics `names` of every row of `x`.

        Parameters
        ----------
        x : torch.Tensor, shape [n, *shape]
            Any dtype of the format, on the CPU. Only read.
        names : collection of str
            Some of `strapfmt.spec.STATISTICS`; only these are computed.

        Returns
        -------
        dict of str to numpy.ndarray
            One array [n] per name, float32, `n_nonfinite` int32.
        """
        n = x.shape[0]
        columns: _Columns = {name: np.zeros(n) for name in STATISTICS if name in names}
        if columns and x.numel():
            flat = x.detach().reshape(n, -1)
            n_rows = max(1, _BLOCK_VALUES // flat.shape[1])
            for start in range(0, n, n_rows):
                some = slice(start, start + n_rows)
                self._fill(flat[some], {name: column[some] for name, column in columns.items()})
        else:
            for name in {"mean", "std"} & columns.keys():
                columns[name].fill(np.nan)
        with np.errstate(over="ignore", under="ignore"):
            return {name: column.astype(_TYPES.get(name, np.float32)) for name, column in columns.items()}

    def _fill(self, x: torch.Tensor, columns: _Columns) -> None:
        if x.dtype not in _EXACT_IN_FLOAT32:
            _exact(x, np.arange(len(x)), columns)
            return
        with np.errstate(all="ignore"):
            sums = self._one_pass(x, mean=not columns.keys().isdisjoint(("mean", "std")))
            unsafe, cancelled = sums.fill(columns)
            if "std" in columns and len(cancelled):
                unsafe = np.concatenate([unsafe, self._centred(x, cancelled, sums.mean, columns["std"])])
        _exact(x, unsafe, columns)

    def _one_pass(self, x: torch.Tensor, *, mean: bool) -> _Sums:
        n, n_values = x.shape
        total, square, largest = np.zeros(n), np.zeros(n), np.zeros(n)
        for part, width in _parts(n_values):
            totals, squares, maxima = np.zeros((3, n * ((part.stop - part.start) // width)), np.float32)
            for tile, at in self._tiles(x[:, part], width):
                if mean:
                    totals[at] = tile.sums()
                squares[at] = tile.squares()
                maxima[at] = tile.maxima()
            total += _over_pieces(totals, n)
            square += _over_pieces(squares, n)
            np.maximum(largest, maxima.reshape(n, -1).max(1), out=largest)
        return _Sums(mean=total / n_values, mean_square=square / n_values, largest=largest, n_values=n_values)

    def _centred(self, x: torch.Tensor, rows: _Int64, mean: _Float64, std: _Float64) -> _Int64:
        """Do the deviation of `rows` again, around their mean; return the rows where even that underflows."""
        n, n_values = len(rows), x.shape[1]
        x = x if n == len(x) else x[torch.from_numpy(rows)]
        centre = mean[rows].astype(np.float32)
        total, square = np.zeros(n), np.zeros(n)
        for part, width in _parts(n_values):
            pieces = (part.stop - part.start) // width
            centres = centre.repeat(pieces)
            totals, squares = np.zeros((2, n * pieces), np.float32)
            for tile, at in self._tiles(x[:, part], width):
                tile.values -= centres[at, None]
                totals[at] = tile.sums()
                squares[at] = tile.squares()
            total += _over_pieces(totals, n)
            square += _over_pieces(squares, n)
        variance = square / n_values - (total / n_values) ** 2
        std[rows] = np.sqrt(np.maximum(variance, 0.0))
        return rows[variance < _SMALLEST_SAFE_SQUARE]

    def _tiles(self, x: torch.Tensor, width: int) -> Iterator[tuple[_Tile, slice]]:
        """Yield `x` as tiles, and which pieces each is; a tile is overwritten by the next."""
        n_rows, n_copied = max(1, _TILE_VALUES // x.shape[1]), max(1, _COPY_VALUES // x.shape[1])
        at, n_converted = 0, 0
        for source in torch.split(x, n_rows):
            if len(source) != n_converted:
                n_converted = len(source)
                target = self._values[: source.numel()].view(source.shape)
                targets, tile = torch.split(target, n_copied), _Tile(target.view(-1, width).numpy())
            for to, part in zip(targets, torch.split(source, n_copied), strict=True):
                to.copy_(part)
            yield tile, slice(at, at + tile.n_pieces)
            at += tile.n_pieces


class _Tile:
    """Float32 rows cut into pieces, [n_pieces, width], in the cache; its results are overwritten by the next one."""

    def __init__(self, values: _Float32) -> None:
        self.n_pieces, width = values.shape
        self.values, self._results = values, np.empty(self.n_pieces, np.float32)
        self._ones = np.ones(width, np.float32)

    def sums(self) -> _Float32:
        """Sum of each piece, [n_pieces] (a BLAS dot product with ones, which NumPy's own sum takes four times)."""
        return np.vecdot(self.values, self._ones, out=self._results)

    def squares(self) -> _Float32:
        """Sum of squares of each piece, [n_pieces] (a BLAS dot product: one read, no square stored)."""
        return np.vecdot(self.values, self.values, out=self._results)

    def maxima(self) -> _Float32:
        """Largest magnitude of each piece, [n_pieces]; NaN where it has one. Leaves magnitudes in the tile."""
        np.abs(self.values, out=self.values)
        return np.maximum.reduce(self.values, 1, out=self._results)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """What one float32 pass tells of every row; arrays [n]."""

    mean: _Float64
    mean_square: _Float64
    largest: _Float64
    n_values: int

    def fill(self, columns: _Columns) -> tuple[_Int64, _Int64]:
        """Fill `columns`; return the rows float32 could not sum, and those whose mean hides their spread."""
        variance = self.mean_square - self.mean**2
        results = {
            "l2_norm": np.sqrt(self.mean_square * self.n_values),
            "mean": self.mean,
            "std": np.sqrt(np.maximum(variance, 0.0)),
            "abs_max": self.largest,
        }
        for name in columns.keys() & results.keys():
            columns[name][:] = results[name]
        # A row with a NaN fails every comparison, so it is not safe.
        large_enough = (self.mean_square >= _SMALLEST_SAFE_SQUARE) | (self.largest == 0)
        safe = (self.largest <= _LARGEST_SAFE) & large_enough
        cancelled = safe & (variance < _CANCELLATION * self.mean_square)
        return np.flatnonzero(~safe), np.flatnonzero(cancelled)


def _parts(n_values: int) -> list[tuple[slice, int]]:
    """Cut the columns of a row into parts that are converted at a time, each with the width it is summed by."""
    if n_values <= _PIECE_VALUES:
        return [(slice(0, n_values), n_values)]
    whole = n_values // _PIECE_VALUES * _PIECE_VALUES
    starts = range(0, whole, _COPY_VALUES)
    parts = [(slice(start, min(start + _COPY_VALUES, whole)), _PIECE_VALUES) for start in starts]
    return [*parts, (slice(whole, n_values), n_values - whole)] if whole < n_values else parts


def _over_pieces(partial: _Float32, n: int) -> _Float64:
    sums: _Float64 = partial.reshape(n, -1).sum(1, dtype=np.float64)
    return sums


def _exact(x: torch.Tensor, rows: _Int64, columns: _Columns) -> None:
    """Fill `columns` for `rows` of `x` in float64, over finite values, scaled by a power of two."""
    n_rows = max(1, _COPY_VALUES // x.shape[1])
    for start in range(0, len(rows), n_rows):
        some = rows[start : start + n_rows]
        results = _exact_tile(x[torch.from_numpy(some)].to(torch.float64).numpy())
        for name, column in columns.items():
            column[some] = results[name]


def _exact_tile(values: _Float64) -> _Columns:
    finite = np.isfinite(values)
    n_finite = finite.sum(1)
    values = np.where(finite, values, 0.0)
    largest = np.abs(values).max(1)
    # ldexp twice: 2**-exponent itself is out of range for the smallest numbers.
    exponent = np.frexp(largest)[1]
    half = exponent // 2
    scaled = np.ldexp(np.ldexp(values, -half[:, None]), -(exponent - half)[:, None])
    with np.errstate(all="ignore"):
        mean = scaled.sum(1) / n_finite
        deviation = np.where(finite, scaled - mean[:, None], 0.0)
        return {
            "l2_norm": np.ldexp(np.sqrt((scaled**2).sum(1)), exponent),
            "mean": np.ldexp(mean, exponent),
            "std": np.ldexp(np.sqrt((deviation**2).sum(1) / n_finite), exponent),
            "abs_max": largest,
            "n_nonfinite": (values.shape[1] - n_finite).astype(np.float64),
        }
