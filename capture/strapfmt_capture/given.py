"""Tensors that a caller hands over, as rows of one site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from strapfmt import spec
from strapfmt.arguments import as_integer
from strapfmt.dtypes import dtype_of_torch
from strapfmt.errors import ArgumentError
from strapfmt_capture.eager import has_values
from strapfmt_capture.statistics import RowStatistics

__all__ = ["GivenRows", "Tensor"]

Tensor: TypeAlias = torch.Tensor | npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenRows:
    """The values of one call: one tensor of all rows, or one a row with their `shapes` [n, ndim]."""

    n: int
    dtype: str
    shape: tuple[int, ...]
    tensors: list[torch.Tensor]
    shapes: npt.NDArray[np.int32] | None

    @classmethod
    def of(cls, site: str, values: Tensor | Sequence[Tensor], shape: tuple[int, ...] | None) -> GivenRows:
        """Take a tensor [n, *shape], or a list of n tensors of which `shape` says what varies.

        Raises
        ------
        ArgumentError
            If they are no rows of one kind.
        """
        if not isinstance(site, str):
            raise ArgumentError(f"site: expected a name, got {site!r}")
        if isinstance(values, (torch.Tensor, np.ndarray)):
            x = _tensor(site, values)
            if x.ndim == 0 or shape is not None:
                raise ArgumentError(
                    f"site {site!r}: expected a tensor [n, *shape] (shape= is for lists), got {list(x.shape)}"
                )
            dtype = dtype_of_torch(x.dtype).name
            return cls(n=len(x), dtype=dtype, shape=tuple(x.shape[1:]), tensors=[x], shapes=None)
        if not isinstance(values, (list, tuple)):
            raise _no_tensor(site, values)
        tensors = [_tensor(site, value) for value in values]
        kinds = {(x.dtype, x.ndim) for x in tensors}
        if len(kinds) != 1:
            found = sorted(f"{x.dtype} with {x.ndim} dimensions" for x in tensors) or ["none"]
            raise ArgumentError(
                f"site {site!r}: expected tensors of one dtype and number of dimensions, got {', '.join(found[:4])}"
            )
        if wide := [x for x in tensors if max(x.numel(), *x.shape, 0) > spec.MAX_ROW_VALUES]:
            raise ArgumentError(
                f"site {site!r}: expected sizes, and values in a row, of at most {spec.MAX_ROW_VALUES}; got a row of "
                f"shape {list(wide[0].shape)}"
            )
        ((kind, ndim),) = kinds
        shapes = np.array([x.shape for x in tensors], np.int32).reshape(len(tensors), ndim)
        given = cls(
            n=len(tensors),
            dtype=dtype_of_torch(kind).name,
            shape=(-1,) * ndim if shape is None else _shape(site, shape),
            tensors=tensors,
            shapes=shapes,
        )
        if not given.fit(given.shape):
            raise ArgumentError(
                f"site {site!r}: expected rows of the shape {list(given.shape)} that was said, got "
                f"{sorted({tuple(x.shape) for x in tensors})[:4]}"
            )
        return given

    def fit(self, shape: tuple[int, ...]) -> bool:
        """Whether every row of a list has a shape, in which -1 stands for any size."""
        if self.shapes is None or self.shapes.shape[1] != len(shape):
            return False
        return bool(np.all((self.shapes == np.array(shape)) | (np.array(shape) < 0)))

    def stored(self) -> npt.NDArray[Any]:
        """The values as the writer wants them."""
        if self.shapes is None:
            return _bits(self.tensors[0])
        return np.concatenate([_bits(x).reshape(-1) for x in self.tensors])

    def statistics(self, compute: RowStatistics, names: tuple[str, ...]) -> dict[str, npt.NDArray[Any]]:
        """Statistics of every row."""
        if self.shapes is None:
            return compute(self.tensors[0], names)
        parts = [compute(x[None], names) for x in self.tensors]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}


def _shape(site: str, shape: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(shape, (tuple, list)):
        raise ArgumentError(f"site {site!r}: shape: expected a tuple of sizes, got {shape!r}")
    return tuple(as_integer(f"site {site!r}: shape", size, least=-1) for size in shape)


def _no_tensor(site: str, found: object) -> ArgumentError:
    return ArgumentError(
        f"site {site!r}: expected a tensor or array [n, *shape], or a list of them, got {type(found).__name__}"
    )


def _tensor(site: str, values: Tensor) -> torch.Tensor:
    """Return a contiguous tensor in host memory."""
    if isinstance(values, torch.Tensor):
        if not has_values(values):
            raise ArgumentError(
                f"site {site!r}: expected a plain dense tensor with values, got a {type(values).__name__} "
                f"({values.layout}, on {values.device})"
            )
        return values.detach().cpu().contiguous()
    if not isinstance(values, np.ndarray):
        raise _no_tensor(site, values)
    if isinstance(values, np.ma.MaskedArray):
        raise ArgumentError(
            f"site {site!r}: expected plain values, got a masked array; fill it first (.filled)"
        )
    native = np.ascontiguousarray(values, values.dtype.newbyteorder("=")).reshape(values.shape)
    try:
        return torch.from_numpy(native if native.flags.writeable else native.copy())
    except TypeError as error:
        raise ArgumentError(f"site {site!r}: {error}") from error


def _bits(x: torch.Tensor) -> npt.NDArray[Any]:
    bits: npt.NDArray[Any] = x.view(getattr(torch, dtype_of_torch(x.dtype).storage)).numpy()
    return bits
