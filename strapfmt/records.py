"""Reads records that come by the thousand from untrusted JSON, by tables of checks; only what is wrong gets words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from strapfmt.json_fields import Fields

__all__ = ["BOOLEAN", "TEXT", "Check", "array", "checked", "text_like", "whole"]

Json = Any


@dataclass(frozen=True, slots=True)
class Check:
    """What a field must be, in words and as a function, and what stands in for it where it is not.

    The function must refuse None, which stands for a field that is missing.
    """

    what: str
    accepts: Callable[[Json], bool]
    default: Json


def checked(value: Json, checks: Mapping[str, Check], path: str, problems: list[str]) -> dict[str, Json]:
    """Return the fields of a record, and note every one that is wrong with its path."""
    if _is_right(value, checks):
        return {key: value[key] for key in checks}
    fields = Fields(value, path, problems)
    return {key: fields.get(key, check.what, check.accepts, check.default) for key, check in checks.items()}


def _is_right(value: Json, checks: Mapping[str, Check]) -> bool:
    if not isinstance(value, dict):
        return False
    for key, check in checks.items():  # noqa: SIM110 - a generator would double what opening costs
        if not check.accepts(value.get(key)):
            return False
    return True


def whole(low: int = 0, high: int = 1 << 62) -> Check:
    """Return the check of an integer of `low..high`."""
    return Check(f"int {low}..{high}", lambda v: type(v) is int and low <= v <= high, low)


def text_like(pattern: re.Pattern[str]) -> Check:
    """Return the check of a text."""
    what = f"text like {pattern.pattern}"
    return Check(what, lambda v: type(v) is str and pattern.fullmatch(v) is not None, "")


def array(limit: int) -> Check:
    """Return the check of an array of at most `limit` entries."""
    return Check(f"an array of at most {limit}", lambda v: type(v) is list and len(v) <= limit, [])


TEXT = Check("text", lambda v: type(v) is str, "")
BOOLEAN = Check("true or false", lambda v: type(v) is bool, False)
