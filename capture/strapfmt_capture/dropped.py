"""An account of rows that were not stored: by reason, which rows of tokens, and how many at each site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from strapfmt_capture.items import StepEnd

__all__ = ["INTERRUPTED", "RING_FULL", "DroppedRows"]

RING_FULL = "the ring was full"
INTERRUPTED = "interrupted"
#: Ranges that a reason lists; the `tokens` and `steps` tables say the same of each row and step without a limit.
_MAX_RANGES = 1_000


class DroppedRows:
    """Counts what was dropped.

    Attributes
    ----------
    by_site : dict of str to int
        Rows dropped with whole steps.
    """

    def __init__(self) -> None:
        self.by_site: dict[str, int] = {}
        self._reasons: dict[str, _Reason] = {}

    def add(self, end: StepEnd) -> None:
        """Count a step, if it was dropped."""
        for name, n_rows in end.dropped.items():
            self.by_site[name] = self.by_site.get(name, 0) + n_rows
        if end.status != "dropped":
            return
        reason = self._reasons.setdefault(end.reason or "", _Reason())
        reason.n_steps += 1
        reason.count(end.dropped)
        if len(end.step.rows):
            reason.extend(int(end.step.rows[0]), int(end.step.rows[-1]) + 1)

    def add_lost(self, lost: Mapping[str, int]) -> None:
        """Count rows of sites that an interrupt has cut off."""
        if lost:
            self._reasons.setdefault(INTERRUPTED, _Reason()).count(lost)

    def to_list(self) -> list[dict[str, Any]]:
        """Return the account as the manifest holds it."""
        return [
            {
                "reason": name,
                "n_steps": reason.n_steps,
                "rows": reason.ranges,
                **({"n_ranges_left_out": reason.n_left_out} if reason.n_left_out else {}),
                "sites": reason.sites,
            }
            for name, reason in self._reasons.items()
        ]


@dataclass(slots=True)
class _Reason:
    """`ranges` are of rows of tokens, half-open."""

    n_steps: int = 0
    ranges: list[list[int]] = field(default_factory=list)
    n_left_out: int = 0
    sites: dict[str, int] = field(default_factory=dict)

    def count(self, rows: Mapping[str, int]) -> None:
        for name, n_rows in rows.items():
            self.sites[name] = self.sites.get(name, 0) + n_rows

    def extend(self, first: int, stop: int) -> None:
        if self.ranges and self.ranges[-1][1] == first and not self.n_left_out:
            self.ranges[-1][1] = stop
        elif len(self.ranges) < _MAX_RANGES:
            self.ranges.append([first, stop])
        else:
            self.n_left_out += 1
