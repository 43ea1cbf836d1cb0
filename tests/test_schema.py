"""What a site's description takes, and what it refuses before anything is stored."""

from typing import Any

import numpy as np
import pytest

from strapfmt.errors import ArgumentError
from strapfmt.schema import SiteSpec, read_site, site_schema

FIELDS: dict[str, Any] = {"name": "a", "dtype": "float32", "shape": (3,)}


@pytest.mark.parametrize("field", ["name", "dtype", "row_space", "codec", "module_path", "hook_point"])
@pytest.mark.parametrize("value", [None, 3, b"x", ["x"], "\ud800"], ids=repr)
def test_texts_are_texts(field: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"{field}: expected text"):
        SiteSpec(**{**FIELDS, field: value})


@pytest.mark.parametrize("shape", [None, 3, "34", (3.0,), (True,), (None,), ("3",), np.array([3])], ids=repr)
def test_a_shape_is_a_tuple_of_whole_numbers(shape: Any) -> None:
    with pytest.raises(ArgumentError, match="shape: expected a tuple of whole numbers"):
        SiteSpec(**{**FIELDS, "shape": shape})


@pytest.mark.parametrize("shape", [(np.int64(3), np.uint8(4)), [3, 4], (3, 4)], ids=repr)
def test_sizes_of_any_integer_type_are_taken(shape: Any) -> None:
    site = SiteSpec(**{**FIELDS, "shape": shape})
    assert site == SiteSpec(**{**FIELDS, "shape": (3, 4)})
    assert all(type(size) is int for size in site.shape)
    assert read_site(site_schema(site)) == site


@pytest.mark.parametrize("statistics", [None, "mean", ["mean"], (1,), ("std", "mean"), ("mode",)], ids=repr)
def test_statistics_are_some_of_the_five_in_their_order(statistics: Any) -> None:
    with pytest.raises(ArgumentError, match="statistics: expected a"):
        SiteSpec(**{**FIELDS, "statistics": statistics})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": ""}, "name: expected 1 to 1024 bytes"),
        ({"name": "a\0b"}, "without NUL"),
        ({"name": "π" * 513}, "name: expected 1 to 1024 bytes"),
        ({"shape": (0,)}, "sizes >= 1"),
        ({"shape": (1,) * 9}, "at most 8 dimensions"),
        ({"shape": (1 << 16, 1 << 15)}, "values in a row"),
        ({"row_space": "both"}, "one of tokens, own"),
    ],
)
def test_every_other_limit_is_named(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ArgumentError, match=problem):
        SiteSpec(**{**FIELDS, **change})
