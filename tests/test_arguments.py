"""What callers pass: whole numbers, lists of them, names and seconds, and everything that is none."""

from typing import Any

import numpy as np
import pytest
import torch

from strapfmt.arguments import array_of_tensor, as_integer, as_names, as_seconds, integers_of
from strapfmt.errors import ArgumentError


@pytest.mark.parametrize(
    "value", [3, np.int8(3), np.uint64(3), torch.tensor(3), torch.tensor([3]), np.array(3)]
)
def test_whole_numbers_of_any_kind_are_ints(value: Any) -> None:
    assert as_integer("n", value, least=3) == 3
    assert type(as_integer("n", value)) is int


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        torch.tensor(True),
        3.0,
        np.float32(3),
        torch.tensor(3.0),
        "3",
        None,
        [3],
        torch.tensor([3, 4]),
    ],
)
def test_what_is_no_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="n: expected a whole number, got"):
        as_integer("n", value)


def test_a_number_below_the_least_is_refused() -> None:
    with pytest.raises(ArgumentError, match="n: expected a whole number of at least 1, got 0"):
        as_integer("n", 0, least=1)


@pytest.mark.parametrize(
    "values",
    [
        [3, 1],
        (3, 1),
        np.array([3, 1], np.uint8),
        torch.tensor([3, 1]),
        torch.tensor([3, 1], dtype=torch.int8),
    ],
)
def test_lists_of_whole_numbers_are_int64(values: Any) -> None:
    found = integers_of("rows", values)
    assert found.dtype == np.int64
    assert found.tolist() == [3, 1]


def test_no_numbers_are_none_of_any_kind() -> None:
    assert len(integers_of("rows", [])) == len(integers_of("rows", torch.empty(0))) == 0


def test_integers_are_a_copy() -> None:
    given = np.array([1, 2])
    integers_of("rows", given)[0] = 9
    assert given.tolist() == [1, 2]


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), True, "1", None, 1j])
def test_what_is_no_time_is_refused(value: Any) -> None:
    with pytest.raises(ArgumentError, match="t: expected a number of seconds above 0"):
        as_seconds("t", value)


def test_times_are_floats() -> None:
    assert [as_seconds("t", value) for value in (1, 0.5, np.float32(2), float("inf"))] == [
        1,
        0.5,
        2,
        float("inf"),
    ]


def test_one_name_is_a_list_of_names() -> None:
    assert as_names("names", "a") == as_names("names", ("a",)) == as_names("names", iter(["a"])) == ["a"]
    assert as_names("names", []) == []


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_small_floats_become_float32(kind: torch.dtype) -> None:
    tensor = torch.tensor([1.5, -2.0], requires_grad=True).to(kind)
    assert array_of_tensor("x", tensor).tolist() == [1.5, -2.0]


@pytest.mark.parametrize("tensor", [torch.empty(2, device="meta"), torch.ones(2).to_sparse()])
def test_tensors_without_plain_values_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(ArgumentError, match="x: expected a plain tensor"):
        array_of_tensor("x", tensor)
