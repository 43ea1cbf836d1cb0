"""Tensors that a caller hands over, as rows of one site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.dtypes import dtype_of_torch
from strapfmt.errors import ArgumentError
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
        if isinstance(values, (torch.Tensor, np.ndarray)):
            x = _tensor(site, values)
            if x.ndim == 0 or shape is not None:
                raise ArgumentError(
                    f"site {site!r}: expected a tensor [n, *shape] (shape= is for lists), got {list(x.shape)}"
                )
            dtype = dtype_of_torch(x.dtype).name
            return cls(n=len(x), dtype=dtype, shape=tuple(x.shape[1:]), tensors=[x], shapes=None)
        tensors = [_tensor(site, value) for value in values]
        kinds = {(x.dtype, x.ndim) for x in tensors}
        if len(kinds) != 1:
            found = sorted(f"{x.dtype} with {x.ndim} dimensions" for x in tensors) or ["none"]
            raise ArgumentError(
                f"site {site!r}: expected tensors of one dtype and number of dimensions, got {', '.join(found[:4])}"
            )
        ((kind, ndim),) = kinds
        shapes = np.array([x.shape for x in tensors], np.int32).reshape(len(tensors), ndim)
        dtype = dtype_of_torch(kind).name
        return cls(n=len(tensors), dtype=dtype, shape=shape or (-1,) * ndim, tensors=tensors, shapes=shapes)

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


def _tensor(site: str, values: Tensor) -> torch.Tensor:
    """Return a contiguous tensor in host memory."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().contiguous()
    native = np.ascontiguousarray(values, values.dtype.newbyteorder("=")).reshape(values.shape)
    try:
        return torch.from_numpy(native if native.flags.writeable else native.copy())
    except TypeError as error:
        raise ArgumentError(f"site {site!r}: {error}") from error


def _bits(x: torch.Tensor) -> npt.NDArray[Any]:
    bits: npt.NDArray[Any] = x.view(getattr(torch, dtype_of_torch(x.dtype).storage)).numpy()
    return bits
