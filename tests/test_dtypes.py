"""Element types: what each is on disk, in NumPy, in Arrow and in torch."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from strapfmt.dtypes import DTYPES, dtype_of_torch, get_dtype
from strapfmt.errors import ArgumentError


@pytest.mark.parametrize("name", DTYPES)
def test_storage_has_the_size_of_the_torch_type(name: str) -> None:
    dtype = get_dtype(name)
    assert dtype.item_bytes == dtype.torch.itemsize == dtype.arrow.bit_width // 8
    assert dtype.arrow.to_pandas_dtype() == dtype.numpy
    assert dtype.is_floating == dtype.torch.is_floating_point
    assert dtype_of_torch(dtype.torch) is dtype


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("float16", pa.float16()),
        ("float32", pa.float32()),
        ("bfloat16", pa.uint16()),
        ("float8_e4m3fn", pa.uint8()),
        ("bool", pa.uint8()),
        ("uint64", pa.uint64()),
    ],
)
def test_arrow_numbers_where_arrow_has_the_type_else_bits(name: str, storage: pa.DataType) -> None:
    assert get_dtype(name).arrow == storage


def test_bits_of_bfloat16_are_those_of_torch() -> None:
    values = torch.tensor([1.0, -2.5, float("nan"), float("inf")], dtype=torch.bfloat16)
    raw = values.view(torch.uint16).numpy()
    assert raw.dtype == get_dtype("bfloat16").numpy
    assert torch.equal(torch.from_numpy(raw).view(torch.bfloat16)[:2], values[:2])
    assert raw.tolist()[:2] == [0x3F80, 0xC020]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_type_that_cannot_be_stored_names_those_that_can(dtype: torch.dtype) -> None:
    with pytest.raises(ArgumentError, match=r"expected one of float64, float32, .*complex"):
        dtype_of_torch(dtype)


def test_numpy_storage_is_little_endian() -> None:
    assert all(np.dtype(dtype.storage).newbyteorder("<") == dtype.numpy for dtype in DTYPES.values())
