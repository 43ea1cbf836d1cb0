"""What goes through the ring from the model's thread to the drain, in the order in which it happened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from strapfmt.schema import SiteSpec
from strapfmt_capture.passes import Column, Step
from strapfmt_capture.turn import Block, Values

__all__ = ["Annotation", "Boundary", "Events", "Finish", "Item", "Spilled", "StepEnd", "StepStart"]


@dataclass(slots=True, kw_only=True)
class StepStart:
    """A step begins. Its tokens go first, so that whatever is rescued after a crash has them."""

    step: Step


@dataclass(slots=True, kw_only=True)
class StepEnd:
    """A step is over; `dropped` counts the rows that each site should have stored in it and did not.

    `is_whole`: everything up to here may be committed. Not so inside a block whose steps are committed together.
    """

    step: Step
    started_ns: int
    duration_s: float
    status: str
    reason: str | None
    dropped: dict[str, int]
    is_whole: bool = True


@dataclass(slots=True, kw_only=True)
class Events:
    """Columns of `row_events` that belong to no step."""

    columns: dict[str, Column]


@dataclass(slots=True, kw_only=True)
class Boundary:
    """No step is under way, and everything up to here may be committed; `is_urgent`: it must be, at once."""

    is_urgent: bool = False


@dataclass(slots=True, kw_only=True)
class Annotation:
    """An annotation of the session, JSON-ready."""

    record: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spilled:
    """Items that lie in the spill file instead, from one position of it to another."""

    start: int
    stop: int


@dataclass(slots=True, kw_only=True)
class Finish:
    """The end: facts for the manifest, and how many rows each site has produced, dropped ones included."""

    facts: Mapping[str, Any]
    seen: Mapping[str, int]


Item: TypeAlias = (
    SiteSpec | StepStart | Values | Block | StepEnd | Events | Boundary | Annotation | Spilled | Finish
)
