"""The tables that steps fill, written by the drain: tokens, sequences, steps, and what became known of rows later."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from strapfmt.schema import TABLE_SCHEMAS
from strapfmt.writer import DatasetWriter
from strapfmt_capture.dropped import DroppedRows
from strapfmt_capture.items import Events, Item, StepEnd, StepStart
from strapfmt_capture.passes import Step, joined, token_columns

__all__ = ["StepTables"]


class StepTables:
    """Writes what items say of steps, each table once for all of them, and counts what was dropped with them.

    Parameters
    ----------
    writer : DatasetWriter

    Attributes
    ----------
    dropped : DroppedRows
    n_abandoned : int
        Steps that ended before they were whole.
    """

    def __init__(self, writer: DatasetWriter) -> None:
        self._writer = writer
        self.dropped, self.n_abandoned = DroppedRows(), 0
        #: The next free row behind the last step that ended.
        self._next_row = writer.reserve("row", 0)
        #: The step under way.
        self._open: Step | None = None

    def begin(self, items: Sequence[Item]) -> None:
        """Write what steps begin with, and events; before their values."""
        steps = [item.step for item in items if isinstance(item, StepStart)]
        if any(len(step.rows) for step in steps):
            self._writer.write_table("tokens", token_columns(steps))
        self._write("sequences", [step.sequences for step in steps if step.sequences is not None])
        events = [step.events for step in steps if step.events is not None]
        self._write("row_events", events + [item.columns for item in items if isinstance(item, Events)])

    def end(self, items: Sequence[Item]) -> None:
        """Write how steps ended; behind their values."""
        for item in items:
            if isinstance(item, StepStart):
                self._open = item.step
            elif isinstance(item, StepEnd):
                self._open = None
        self._write_ends([item for item in items if isinstance(item, StepEnd)])

    def abandon(self, reason: str) -> None:
        """End the step under way, if there is one: nothing more of it will come."""
        if self._open is not None:
            end = StepEnd(
                step=self._open,
                started_ns=time.time_ns(),
                duration_s=0.0,
                status="abandoned",
                reason=reason,
                dropped={},
            )
            self._write_ends([end])

    def _write_ends(self, ends: Sequence[StepEnd]) -> None:
        rows: list[dict[str, Any]] = []
        for end in ends:
            step = end.step
            if len(step.rows):
                self._next_row = int(step.rows[-1]) + 1
            for name, n_rows in end.dropped.items():
                self._writer.count(name, expected=n_rows, dropped=n_rows)
            self.dropped.add(end)
            if end.status == "abandoned":
                self.n_abandoned += 1
                self._write_abandoned(end)
            rows.append(_step_columns(end, self._next_row))
        self._write("steps", rows)

    def _write_abandoned(self, end: StepEnd) -> None:
        n_rows = len(end.step.rows)
        if n_rows:
            columns = {
                "row": end.step.rows,
                "step": np.full(n_rows, end.step.step),
                "event": ["abandoned"] * n_rows,
                "detail": [end.reason] * n_rows,
            }
            self._writer.write_table("row_events", columns)

    def _write(self, name: str, parts: Sequence[Mapping[str, Any]]) -> None:
        if parts:
            self._writer.write_table(name, _merged(name, parts))


def _merged(table: str, parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the columns of several steps as those of one."""
    if len(parts) == 1:
        return parts[0]
    return {
        field.name: joined([part[field.name] for part in parts], field.type) for field in TABLE_SCHEMAS[table]
    }


def _step_columns(end: StepEnd, next_row: int) -> dict[str, list[Any]]:
    step = end.step
    return {
        "step": [step.step],
        "phase": [step.phase],
        "n_sequences": [step.n_sequences],
        "n_query": [step.n_query],
        "n_rows": [len(step.rows)],
        "first_row": [int(step.rows[0]) if len(step.rows) else next_row],
        "started_ns": [end.started_ns],
        "duration_s": [end.duration_s],
        "status": [end.status],
        "reason": [end.reason],
    }
