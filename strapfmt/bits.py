"""Views of tensors as the integers of the same size, for types that some kernel lacks (float8, bfloat16 in NumPy)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy.typing as npt

if TYPE_CHECKING:
    import torch

__all__ = ["as_integers", "as_numpy", "integers_of_size"]


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of `tensor` as integers of its item size."""
    return tensor.view(integers_of_size(tensor.element_size()))


def integers_of_size(item_bytes: int) -> torch.dtype:
    """Return the integer type of an item size for which torch has all kernels."""
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[item_bytes]


def as_numpy(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return the bits of a CPU tensor as unsigned integers, in an array that aliases it."""
    import torch

    sizes = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}
    return tensor.view(sizes[tensor.element_size()]).numpy()
