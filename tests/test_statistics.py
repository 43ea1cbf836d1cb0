"""Statistics of rows against the same in extended precision."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strapfmt.dtypes import DTYPES
from strapfmt.errors import ArgumentError
from strapfmt.spec import STATISTICS
from strapfmt_capture.statistics import RowStatistics, check_statistics

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def exact(row: torch.Tensor) -> dict[str, float]:
    """The statistics of one row, exact until the last square root (rationals know no overflow)."""
    values = row.flatten().tolist()
    if len(values) > 500:
        return extended(np.array(values, dtype=np.longdouble))
    finite = [Fraction(value) for value in values if math.isfinite(value)]
    n = len(finite)
    square = sum((value * value for value in finite), Fraction(0))
    mean = sum(finite, Fraction(0)) / n if n else None
    variance = sum(((value - mean) ** 2 for value in finite), Fraction(0)) / n if mean is not None else None
    return {
        "l2_norm": root(square),
        "mean": float32(mean) if mean is not None else math.nan,
        "std": root(variance) if variance is not None else math.nan,
        "abs_max": float32(max(map(abs, finite), default=Fraction(0))),
        "n_nonfinite": len(values) - n,
    }


def extended(values: np.ndarray) -> dict[str, float]:
    """The same for wide rows of ordinary numbers, in extended precision, which is quicker."""
    return {
        "l2_norm": float(np.sqrt(np.square(values).sum())),
        "mean": float(values.mean()),
        "std": float(values.std()),
        "abs_max": float(np.abs(values).max()),
        "n_nonfinite": 0,
    }


def float32(value: Fraction) -> float:
    limit = Fraction(float(np.finfo(np.float32).max)) * (1 + Fraction(1, 2**25))
    if abs(value) >= limit:
        return math.inf if value > 0 else -math.inf
    return float(value)


def root(square: Fraction) -> float:
    """Square root of a rational of any size, by scaling with an even power of two."""
    if not square:
        return 0.0
    shift = (square.numerator.bit_length() - square.denominator.bit_length()) // 2
    return float32(Fraction(math.sqrt(square / Fraction(4) ** shift)) * Fraction(2) ** shift)


def assert_exact(x: torch.Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = RowStatistics()(x)
    assert list(found) == list(STATISTICS)
    for i, row in enumerate(x):
        expected = exact(row)
        finite = [abs(value) for value in row.flatten().tolist() if math.isfinite(value)]
        assert found["n_nonfinite"][i] == expected["n_nonfinite"]
        for name in ("l2_norm", "std", "abs_max"):
            np.testing.assert_allclose(
                found[name][i], np.float32(expected[name]), rtol=2e-6, atol=1e-44, err_msg=name
            )
        slack = min(1e-6 * max(finite, default=0.0), 1e32)
        np.testing.assert_allclose(
            found["mean"][i], np.float32(expected["mean"]), rtol=2e-6, atol=slack + 1e-44
        )


EXTREMES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e38,
    -3e38,
    3e19,
    1e-19,
    1e-40,
    -1e-45,
    100.0,
    1e4,
    math.nan,
    math.inf,
    -math.inf,
]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(FLOATS), st.integers(1, 5), st.integers(1, 40))
def test_any_values_of_any_float_type_are_summed_exactly(
    data: st.DataObject, dtype: torch.dtype, n: int, d: int
) -> None:
    value = st.one_of(st.sampled_from(EXTREMES), st.floats(width=32, allow_nan=False, allow_infinity=False))
    rows = data.draw(st.lists(st.lists(value, min_size=d, max_size=d), min_size=n, max_size=n))
    assert_exact(torch.tensor(rows, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("n_values", [1, 31, 2_048, 4_096, 4_097, 50_257, 70_000])
@pytest.mark.parametrize("offset", [0.0, 0.7, -30.0, 1e4])
def test_rows_of_every_width_with_a_mean_of_any_size(n_values: int, offset: float) -> None:
    torch.manual_seed(n_values)
    n_rows = 20 if n_values < 5_000 else 2
    assert_exact((torch.randn(n_rows, n_values) + offset).bfloat16())
    assert_exact(torch.randn(n_rows, n_values) + offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_stored_type_has_statistics(dtype: str) -> None:
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    if kind.is_floating:
        x = torch.randn(9, 2, 33, dtype=torch.float64).to(kind.torch)
    else:
        low, high = (0, 2) if dtype == "bool" else (0, 100) if dtype.startswith("u") else (-100, 100)
        x = torch.randint(low, high, (9, 2, 33)).to(kind.torch)
    assert_exact(x)


@pytest.mark.parametrize("value", [2**62 + 1, -(2**63)])
def test_large_integers_do_not_overflow(value: int) -> None:
    assert_exact(torch.tensor([[value, value, 3], [value, 0, 0]]))


@pytest.mark.parametrize("value", [1e300, 1.7e308, -1e-300, 5e-324, 1e39])
def test_float64_beyond_float32_becomes_infinite_or_zero_without_a_warning(value: float) -> None:
    assert_exact(torch.tensor([[value, -value, value / 2], [0.0, 0.0, value]], dtype=torch.float64))


@pytest.mark.parametrize("value", [1e-40, 3e-23, 1e-12, 1.0, 7.3, 1e15, 1e19, 3e38])
def test_a_constant_row_has_no_deviation(value: float) -> None:
    found = RowStatistics()(torch.full((3, 1000), value))
    assert found["std"].tolist() == [0.0, 0.0, 0.0]
    np.testing.assert_allclose(found["mean"], np.float32(value), rtol=1e-6)


def test_a_row_without_finite_values_has_no_mean() -> None:
    found = RowStatistics()(torch.tensor([[math.nan, math.inf], [math.nan, 2.0]]))
    assert found["l2_norm"].tolist() == [0.0, 2.0]
    assert found["abs_max"].tolist() == [0.0, 2.0]
    assert found["n_nonfinite"].tolist() == [2, 1]
    assert np.isnan(found["mean"]).tolist() == [True, False]
    assert np.isnan(found["std"]).tolist() == [True, False]
    assert found["std"][1] == 0.0


def test_one_bad_value_changes_its_own_row_only() -> None:
    x = torch.randn(500, 300)
    clean = RowStatistics()(x)
    x[123, 7] = math.nan
    found = RowStatistics()(x)
    others = np.arange(500) != 123
    for name in STATISTICS:
        np.testing.assert_array_equal(found[name][others], clean[name][others])
    assert found["n_nonfinite"].sum() == 1


def test_types_and_names_are_those_asked_for() -> None:
    x = torch.randn(4, 8)
    everything = RowStatistics()(x)
    for name in STATISTICS:
        (found,) = RowStatistics()(x, [name]).values()
        assert found.dtype == (np.int32 if name == "n_nonfinite" else np.float32)
        np.testing.assert_array_equal(found, everything[name])
    assert RowStatistics()(x, ()) == {}


@pytest.mark.parametrize("shape", [(0, 8), (0,), (3, 0)])
def test_empty_rows(shape: tuple[int, ...]) -> None:
    found = RowStatistics()(torch.empty(shape))
    assert {len(column) for column in found.values()} == {shape[0]}
    assert np.isnan(found["mean"]).all()
    assert not found["n_nonfinite"].any()


def test_scalars_per_row_and_strided_rows() -> None:
    assert_exact(torch.arange(5.0))
    assert_exact(torch.randn(6, 40).t())


def test_scratch_is_not_shared_between_calls() -> None:
    statistics = RowStatistics()
    first = statistics(torch.ones(3, 5))
    statistics(torch.full((3, 5), 7.0))
    assert first["abs_max"].tolist() == [1.0, 1.0, 1.0]


def test_the_tensor_is_only_read() -> None:
    x = (torch.randn(50, 700) + 40).requires_grad_()
    before = x.detach().clone()
    RowStatistics()(x)
    assert torch.equal(x, before)


def test_another_default_dtype_changes_nothing() -> None:
    x = torch.randn(5, 9, dtype=torch.float32)
    expected = RowStatistics()(x)
    torch.set_default_dtype(torch.float64)
    try:
        found = RowStatistics()(x)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in STATISTICS:
        np.testing.assert_array_equal(found[name], expected[name])


def test_statistics_are_named_in_the_order_of_the_format() -> None:
    assert check_statistics(True) == STATISTICS
    assert check_statistics(False) == ()
    assert check_statistics(["abs_max", "l2_norm"]) == ("l2_norm", "abs_max")
    with pytest.raises(ArgumentError, match="got median"):
        check_statistics(["median"])
