"""Figures of a capture while it runs: one snapshot, for people and programs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from strapfmt.report import size_text
from strapfmt_capture.drain_home import DrainHome
from strapfmt_capture.dropped import INTERRUPTED, RING_FULL
from strapfmt_capture.hooks import Hooks
from strapfmt_capture.rings import Rings

__all__ = ["CaptureStats", "stats_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureStats:
    """A capture at one moment; what it counts is over all sites.

    Attributes
    ----------
    state : str
        "ready", "running", "closed", or "failed".
    n_steps, n_tokens : int
        Forward passes, and tokens they have processed.
    n_rows : int
        Rows that sites have produced: those written, dropped and pending.
    n_written : int
        Rows handed to the writer.
    n_dropped : dict of str to int
        Rows not stored, by reason.
    n_bytes : int
        Bytes of values handed to the writer, before any codec.
    bytes_per_s : float
        The same in a second, over the last five.
    fill, peak_fill : float
        Share of the ring in use, now and at most.
    stall_s : float
        How long the model has waited for space.
    n_spilled_steps, n_spilled_bytes, n_spill_pending_bytes : int
        Steps that went to `spill_path`, their bytes, and those that the dataset has not got yet.
    n_spills_refused : int
        How often `spill_path` was full.
    n_committed_steps : int
        Steps of this session that are durable: the first so many.
    commit_age_s : float
        How long ago the last commit became durable.
    """

    state: str
    n_steps: int = 0
    n_tokens: int = 0
    n_rows: int = 0
    n_written: int = 0
    n_dropped: Mapping[str, int] = field(default_factory=dict)
    n_bytes: int = 0
    bytes_per_s: float = 0.0
    fill: float = 0.0
    peak_fill: float = 0.0
    stall_s: float = 0.0
    n_spilled_steps: int = 0
    n_spilled_bytes: int = 0
    n_spill_pending_bytes: int = 0
    n_spills_refused: int = 0
    n_committed_steps: int = 0
    commit_age_s: float = 0.0

    @property
    def n_pending(self) -> int:
        """Rows between the model and the writer."""
        return self.n_rows - self.n_written - sum(self.n_dropped.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON-ready values."""
        return {**asdict(self), "n_pending": self.n_pending}

    def __str__(self) -> str:
        dropped = ", ".join(f"{n:,} dropped ({reason})" for reason, n in self.n_dropped.items() if n)
        lines = [
            f"{self.state}: {self.n_steps:,} steps, {self.n_tokens:,} tokens",
            f"{self.n_rows:,} rows: {self.n_written:,} written, {self.n_pending:,} pending, {dropped or '0 dropped'}",
            f"{size_text(self.n_bytes)} written, {self.bytes_per_s / 1e6:,.1f} MB/s; ring {self.fill:.0%} full (peak "
            f"{self.peak_fill:.0%}), the model waited {self.stall_s:.3f} s",
        ]
        if self.n_spilled_bytes:
            lines.append(
                f"{self.n_spilled_steps:,} steps spilled ({size_text(self.n_spilled_bytes)}, "
                f"{size_text(self.n_spill_pending_bytes)} pending); refused {self.n_spills_refused} times"
            )
        lines.append(f"{self.n_committed_steps:,} steps are durable, as of {self.commit_age_s:.1f} s ago")
        return "\n".join(lines)


def stats_of(hooks: Hooks, drain: DrainHome, rings: Rings, state: str) -> CaptureStats:
    """Return the figures of a capture that was entered."""
    # What is written is read before what was produced, so that never more is written than there was.
    progress = drain.progress
    n_written, n_lost = progress.n_rows, sum(progress.lost.values())
    spill = drain.spill
    return CaptureStats(
        state=state,
        n_steps=hooks.steps.counts.n_steps,
        n_tokens=hooks.steps.counts.n_tokens,
        n_rows=sum(tap.expected for tap in hooks.taps),
        n_written=n_written,
        n_dropped={RING_FULL: sum(tap.dropped for tap in hooks.taps), INTERRUPTED: n_lost},
        n_bytes=progress.n_bytes,
        bytes_per_s=drain.bytes_per_s,
        fill=rings.fill,
        peak_fill=rings.peak_fill,
        stall_s=rings.stall_s,
        n_spilled_steps=0 if spill is None else spill.n_steps,
        n_spilled_bytes=0 if spill is None else spill.file.end,
        n_spill_pending_bytes=drain.n_spill_pending_bytes,
        n_spills_refused=0 if spill is None else spill.n_refused,
        n_committed_steps=progress.n_committed_steps,
        commit_age_s=time.monotonic() - progress.committed_s,
    )
