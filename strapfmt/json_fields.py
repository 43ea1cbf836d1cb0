"""Reads untrusted JSON objects field by field and gathers every problem with its path."""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from strapfmt import spec
from strapfmt.errors import ArgumentError

__all__ = ["Fields", "plain_json", "refuse_constant", "unique_keys"]

Json = Any


def unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """Refuse JSON objects that name a key twice; an `object_pairs_hook`."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError(f"duplicate key in {sorted(key for key, _ in pairs)[:8]}")
    return result


def refuse_constant(name: str) -> Json:
    """Refuse NaN and infinities, which are no JSON; a `parse_constant`."""
    raise ValueError(f"{name} is not JSON")


def plain_json(value: Mapping[str, Json], what: str) -> dict[str, Json]:
    """Return a copy of what a caller wants stored as JSON, exactly as it will be read.

    Raises
    ------
    ArgumentError
        If JSON cannot hold it.
    """
    try:
        text = json.dumps(dict(value), allow_nan=False)
        if len(text) > spec.MAX_MANIFEST_BYTES // 8:
            raise ValueError(f"{len(text)} bytes are more than {spec.MAX_MANIFEST_BYTES // 8}")
        copy: dict[str, Json] = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{what}: expected JSON-ready values: {error}") from error
    return copy


class Fields:
    """Reads fields of a JSON object and gathers every problem with its path."""

    def __init__(self, value: Json, path: str, problems: list[str]) -> None:
        self.path, self.problems = path, problems
        self.value: dict[str, Json] = value if isinstance(value, dict) else {}
        if not isinstance(value, dict):
            problems.append(f"{path or 'manifest'}: expected an object, got {_show(value)}")

    def get(self, key: str, what: str, accept: Callable[[Json], bool], default: Json) -> Json:
        """Return a field that `accept` takes, else note the problem and return `default`."""
        value = self.value.get(key, _MISSING)
        if value is not _MISSING and accept(value):
            return value
        self.problems.append(f"{self.at(key)}: expected {what}, got {_show(value)}")
        return default

    def at(self, key: object) -> str:
        """Return the path of a field."""
        return f"{self.path}.{key}" if self.path else str(key)

    def integer(self, key: str, low: int = 0, high: int = 1 << 62) -> int:
        """Return an integer field of `low..high`."""
        what = f"int {low}..{high}"
        return int(self.get(key, what, lambda v: type(v) is int and low <= v <= high, low))

    def boolean(self, key: str) -> bool:
        """Return a true or false field."""
        return bool(self.get(key, "true or false", lambda v: isinstance(v, bool), False))

    def text(self, key: str, choices: tuple[str, ...] = (), pattern: re.Pattern[str] | None = None) -> str:
        """Return a text field, of `choices` or like `pattern` where given."""
        what = (
            f"one of {', '.join(choices)}"
            if choices
            else f"text like {pattern.pattern}"
            if pattern
            else "text"
        )
        default = choices[0] if choices else ""
        return str(
            self.get(
                key,
                what,
                lambda v: (
                    isinstance(v, str)
                    and (not choices or v in choices)
                    and (pattern is None or pattern.fullmatch(v) is not None)
                ),
                default,
            )
        )

    def array(self, key: str, limit: int = 1 << 24) -> list[Json]:
        """Return an array field of at most `limit` entries."""
        what = f"an array of at most {limit}"
        return list(self.get(key, what, lambda v: isinstance(v, list) and len(v) <= limit, []))

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a field that is an array of text."""
        return tuple(
            self.get(
                key, "an array of text", lambda v: isinstance(v, list) and all(type(x) is str for x in v), []
            )
        )

    def inner(self, key: str) -> "Fields":
        """Return a field that is an object."""
        return Fields(self.value.get(key, _MISSING), self.at(key), self.problems)


class _Missing:
    pass


_MISSING = _Missing()


def _show(value: Json) -> str:
    return "nothing" if value is _MISSING else repr(value)[:80]
