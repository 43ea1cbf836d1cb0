"""Stored element types: name, Arrow type, NumPy type and torch type of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from strapfmt.errors import ArgumentError

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "DType", "dtype_of_torch", "get_dtype"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DType:
    """One stored element type.

    Attributes
    ----------
    name : str
        The name in the manifest; also the attribute of `torch` that holds the type.
    storage : str
        The NumPy name of the numbers on disk. It differs from `name` where Arrow has no such type: the bits of a
        bfloat16 are stored as uint16, those of a float8 as uint8, and a bool as one uint8 each.
    is_floating : bool
        Whether statistics look for NaN and infinities.
    """

    name: str
    storage: str
    is_floating: bool

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return self.numpy.itemsize

    @property
    def numpy(self) -> np.dtype[np.generic]:
        """The storage type in NumPy."""
        return np.dtype(self.storage)

    @property
    def arrow(self) -> pa.DataType:
        """The storage type in Arrow."""
        return pa.from_numpy_dtype(self.numpy)

    @property
    def torch(self) -> torch.dtype:
        """The element type in torch (imports torch)."""
        import torch

        dtype = getattr(torch, self.name, None)
        if not isinstance(dtype, torch.dtype):
            raise ArgumentError(
                f"this PyTorch ({torch.__version__}) has no dtype {self.name!r}; install a newer one"
            )
        return dtype


def _floating(name: str, storage: str | None = None) -> DType:
    return DType(name=name, storage=storage or name, is_floating=True)


def _integer(name: str, storage: str | None = None) -> DType:
    return DType(name=name, storage=storage or name, is_floating=False)


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        _floating("float64"),
        _floating("float32"),
        _floating("float16"),
        _floating("bfloat16", "uint16"),
        _floating("float8_e4m3fn", "uint8"),
        _floating("float8_e5m2", "uint8"),
        _floating("float8_e4m3fnuz", "uint8"),
        _floating("float8_e5m2fnuz", "uint8"),
        _integer("int8"),
        _integer("int16"),
        _integer("int32"),
        _integer("int64"),
        _integer("uint8"),
        _integer("uint16"),
        _integer("uint32"),
        _integer("uint64"),
        _integer("bool", "uint8"),
    )
}


def get_dtype(name: str) -> DType:
    """Return the stored type called `name`.

    Raises
    ------
    ArgumentError
        If there is none.
    """
    if name not in DTYPES:
        raise ArgumentError(f"dtype: expected one of {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def dtype_of_torch(dtype: torch.dtype) -> DType:
    """Return the stored type of a torch dtype.

    Raises
    ------
    ArgumentError
        If format 1 cannot hold it (complex and quantised types).
    """
    return get_dtype(str(dtype).removeprefix("torch."))
