"""The step of a recorder that has begun and not ended: what it becomes in the `steps` table."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from strapfmt_capture.token_rows import TokenRows

__all__ = ["RecorderStep"]


@dataclass(slots=True)
class RecorderStep:
    """A step under way."""

    number: int
    phase: str = "prefill"
    rows: list[TokenRows] = field(default_factory=list)
    started_ns: int = field(default_factory=time.time_ns)
    started_s: float = field(default_factory=time.perf_counter)

    def columns(self, status: str, reason: str | None, next_row: int) -> dict[str, list[Any]]:
        """Its row of the `steps` table; `next_row` is the next free row."""
        parts = [part for part in self.rows if len(part)]
        sequences = np.concatenate([part.sequence_id for part in parts]) if parts else np.empty(0, np.int64)
        counts = np.unique(sequences, return_counts=True)[1]
        return {
            "step": [self.number],
            "phase": [self.phase],
            "n_sequences": [len(counts)],
            "n_query": [int(counts.max(initial=0))],
            "n_rows": [len(sequences)],
            "first_row": [int(parts[0].rows[0]) if parts else next_row],
            "started_ns": [self.started_ns],
            "duration_s": [time.perf_counter() - self.started_s],
            "status": [status],
            "reason": [reason],
        }
