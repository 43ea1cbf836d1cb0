"""Checks of what callers pass, shared by all that reads: whole numbers, lists of them, names, seconds."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from strapfmt.errors import ArgumentError

__all__ = ["array_of_tensor", "as_integer", "as_names", "as_seconds", "integers_of"]


def as_integer(name: str, value: Any, *, least: int | None = None) -> int:
    """Return a whole number of Python, NumPy or PyTorch (of one element) as `int`.

    Raises
    ------
    ArgumentError
        If it is something else, such as a bool, or below `least`.
    """
    try:
        number = None if "bool" in str(getattr(value, "dtype", type(value))) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" of at least {least}"
        raise ArgumentError(f"{name}: expected a whole number{bound}, got {_shown(value)}")
    return number


def as_seconds(name: str, value: Any, *, may_be_zero: bool = False) -> float:
    """Return a time as `float`, above 0 unless it `may_be_zero`; infinity is one.

    Raises
    ------
    ArgumentError
        If it is something else.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or math.isnan(value) or value < 0 or (value == 0 and not may_be_zero):
        bound = "of at least 0" if may_be_zero else "above 0"
        raise ArgumentError(f"{name}: expected a number of seconds {bound}, got {_shown(value)}")
    return float(value)


def as_names(what: str, value: Any) -> list[str]:
    """Return one name, or several, as a list.

    Raises
    ------
    ArgumentError
        If it is neither.
    """
    names = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    if not all(isinstance(name, str) for name in names):
        raise ArgumentError(f"{what}: expected a name or a list of names, got {_shown(value)}")
    return names


def integers_of(what: str, values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return a list, array or tensor of whole numbers as int64 [n].

    Raises
    ------
    ArgumentError
        If it is something else, or a number is beyond int64.
    """
    expected = f"{what}: expected integers [n]"
    try:
        array = np.asarray(array_of_tensor(what, values) if hasattr(values, "detach") else values)
    except (ValueError, TypeError) as error:
        raise ArgumentError(f"{expected}, got {_shown(values)}: {error}") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ArgumentError(f"{expected}, got {array.dtype} {list(array.shape)}")
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ArgumentError(f"{expected} that int64 holds, got {array.max()}")
    return array.astype(np.int64)


def array_of_tensor(what: str, tensor: Any) -> npt.NDArray[Any]:
    """Return the values of a tensor on any device; small floats, which NumPy lacks, become float32.

    Raises
    ------
    ArgumentError
        If it has no values, or values that NumPy lacks.
    """
    try:
        tensor = tensor.detach().cpu()
        if tensor.is_floating_point() and tensor.element_size() < 4:
            tensor = tensor.float()
        array: npt.NDArray[Any] = tensor.numpy()
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"{what}: expected a plain tensor, got {_shown(tensor)}: {error}") from None
    return array


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''}"
