"""Marks: annotations of a run, which its sessions keep in the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from strapfmt.errors import CorruptError
from strapfmt.manifest import Manifest
from strapfmt.records import TEXT, Check, checked, whole

__all__ = ["Mark", "marks_of", "table_of_marks"]

_FIELDS = {
    "name": TEXT,
    "step": whole(),
    "time_ns": whole(),
    "attributes": Check("an object", lambda value: type(value) is dict, {}),
}
_SCHEMA = pa.schema(
    {
        "rank": pa.int32(),
        "session": pa.int32(),
        "name": pa.utf8(),
        "step": pa.int64(),
        "time_ns": pa.int64(),
        "attributes": pa.utf8(),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A point that a run has reached.

    Attributes
    ----------
    rank, session : int
        Who made it.
    name : str
    step : int
        The step that was under way, or the next one.
    time_ns : int
        Unix time.
    attributes : dict
        JSON values.
    """

    rank: int
    session: int
    name: str
    step: int
    time_ns: int
    attributes: Mapping[str, Any]


def marks_of(manifests: Mapping[int, Manifest]) -> list[Mark]:
    """Return the marks of all ranks, by rank and in the order of their making.

    Raises
    ------
    CorruptError
        If something is no mark, naming it.
    """
    problems: list[str] = []
    marks = []
    for rank, manifest in manifests.items():
        for session, entry in enumerate(manifest.sessions):
            found, place = entry.get("marks", []), f"rank {rank}: sessions.{session}.marks"
            if not isinstance(found, list):
                problems.append(f"{place}: expected an array, got {type(found).__name__}")
                continue
            for number, value in enumerate(found):
                fields = checked(value, _FIELDS, f"{place}.{number}", problems)
                marks.append(Mark(rank=rank, session=session, **fields))
    if problems:
        raise CorruptError(problems[0], problems)
    return marks


def table_of_marks(marks: Iterable[Mark]) -> pa.Table:
    """Return marks as a table, their attributes as JSON text."""
    rows = [
        {name: getattr(mark, name) for name in _SCHEMA.names}
        | {"attributes": json.dumps(dict(mark.attributes))}
        for mark in marks
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)
