"""The drain: one thread that takes what hooks left in the ring, computes statistics, and hands it to the writer."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from strapfmt.errors import DrainError
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter
from strapfmt_capture.disk_space import DiskSpace
from strapfmt_capture.ring import Ring
from strapfmt_capture.rows import Column, Step
from strapfmt_capture.statistics import Columns, RowStatistics
from strapfmt_capture.turn import Piece, Values, compute_statistics, pieces_of

__all__ = ["Annotation", "Boundary", "Drain", "Events", "Item", "StepEnd", "StepStart"]

_TURN_SHARE = 8
_TURN_BYTES = 16 << 20
_PATIENCE_S = 2.0


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


Item = SiteSpec | StepStart | Values | StepEnd | Events | Boundary | Annotation


class Drain:
    """Empties a ring into a writer, in a thread of its own.

    The first failure ends it: the ring is aborted, so that nobody waits for it, and the failure is kept for `check` and
    `finish`.

    Parameters
    ----------
    ring : Ring
    writer : DatasetWriter
        The drain's own from `start` on, but for `reserve`; it closes or aborts it.
    space : DiskSpace
        Told in every turn what there is to write.

    Attributes
    ----------
    space : DiskSpace
    n_rows, n_bytes : int
        Handed to the writer so far, over all sites.
    written : dict of str to int
        Rows handed to the writer, by site.
    """

    def __init__(self, ring: Ring[Item], writer: DatasetWriter, space: DiskSpace) -> None:
        self._ring, self._writer, self.space = ring, writer, space
        self._statistics = RowStatistics()
        self._failure: BaseException | None = None
        self._provenance: Mapping[str, Any] = {}
        self._turn_bytes = min(_TURN_BYTES, ring.n_bytes // _TURN_SHARE)
        self._thread = threading.Thread(target=self._run, name="strapfmt-drain", daemon=True)
        #: The next free row behind the last step that ended.
        self._next_row = writer.reserve("row", 0)
        #: By site: the last call that hooks counted, and its number in the dataset.
        self._calls: dict[str, tuple[int, int]] = {}
        self.n_rows, self.n_bytes, self._pass_bytes = 0, 0, 0
        self.written: dict[str, int] = {}

    # For the thread that runs the model.

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether it has stopped because of a failure."""
        return self._failure is not None

    def check(self) -> None:
        """Raise what has stopped the drain, if anything has.

        Raises
        ------
        DrainError
            With the failure as its cause.
        """
        if self._failure is not None:
            raise DrainError(
                f"{self._writer.path}: writing failed after {self.n_rows} rows, and what was captured since the last "
                f"commit is lost ({type(self._failure).__name__}: {self._failure}); what was committed before can be "
                "read where it is, and mode='append' goes on behind it"
            ) from self._failure

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs, which it may still do after `abort` if the disk hangs."""
        return self._thread.is_alive()

    @property
    def n_committed_steps(self) -> int:
        """Steps of this session that are durable, of those that have ended."""
        return self._writer.n_committed_steps

    def finish(self, provenance: Mapping[str, Any] | None = None) -> None:
        """Write what is left, close the writer, and end the thread.

        Raises
        ------
        DrainError
            If anything failed on the way.
        """
        self._provenance = provenance or {}
        self._ring.close()
        try:
            self._thread.join()
        except BaseException:
            self.abort()
            raise
        self.check()

    def abort(self) -> None:
        """End the thread without writing any more; the last commit stays. A disk that hangs is not waited for."""
        self._ring.abort()
        self._thread.join(_PATIENCE_S)

    # Inside the thread.

    def _run(self) -> None:
        try:
            self._drain()
            if self._ring.is_aborted:
                self._writer.abort()
            else:
                self._writer.close(provenance=self._provenance)
        except BaseException as error:  # noqa: BLE001 - raised where the user waits, by check()
            self._failure = error
            self._ring.abort()
            self._writer.abort()

    def _drain(self) -> None:
        """Take turns: while the writer's own thread writes one turn, the statistics of the next are computed."""
        written = 0
        self._look()
        while True:
            items = self._ring.take(self._turn_bytes, wait=False)
            if not items:
                self._writer.wait()
                self._look()
                self._ring.release(written)
                items = self._ring.take(self._turn_bytes)
                if not items:
                    return
            position = self._ring.position
            values = [item for item in items if isinstance(item, Values)]
            statistics = compute_statistics(values, self._ring, self._statistics)
            self._writer.wait()
            self._look()
            self._ring.release(written)
            self._write(items, statistics)
            written = position

    def _look(self) -> None:
        """Look at the disk before ring memory is released: what it holds counts as waiting until it is on the disk."""
        self.space.look(n_bytes=self.n_bytes, n_rows=self.n_rows, n_sites=len(self.written))

    def _count_passes(self, items: Sequence[Item]) -> None:
        for item in items:
            if isinstance(item, Values):
                self._pass_bytes += item.n_bytes
            elif isinstance(item, StepEnd):
                self.space.passed(self._pass_bytes)
                self._pass_bytes = 0

    def _write(self, items: Sequence[Item], statistics: Columns) -> None:
        """Hand everything over; a commit, if it is due, comes behind the last step that is complete."""
        ends = [
            place
            for place, item in enumerate(items)
            if isinstance(item, Boundary) or (isinstance(item, StepEnd) and item.is_whole)
        ]
        n_whole = ends[-1] + 1 if ends else 0
        self._write_items(items[:n_whole], statistics)
        if any(isinstance(item, Boundary) and item.is_urgent for item in items[:n_whole]):
            self._writer.commit()
        elif n_whole:
            self._writer.end_step()
        self._write_items(items[n_whole:], statistics)
        self._count_passes(items)

    def _write_items(self, items: Sequence[Item], statistics: Columns) -> None:
        for item in items:
            if isinstance(item, StepStart):
                self._write_rows(item.step)
            elif isinstance(item, SiteSpec):
                self._writer.add_site(item)
            elif isinstance(item, Events):
                self._writer.write_table("row_events", item.columns)
            elif isinstance(item, Annotation):
                self._writer.mark(item.record)
        for piece in pieces_of([item for item in items if isinstance(item, Values)]):
            self._write_piece(piece, statistics)
        for item in items:
            if isinstance(item, StepEnd):
                self._write_end(item)

    def _write_rows(self, step: Step) -> None:
        if len(step.rows):
            self._writer.write_table("tokens", step.tokens)
        if step.sequences is not None:
            self._writer.write_table("sequences", step.sequences)
        if step.events is not None:
            self._writer.write_table("row_events", step.events)

    def _write_piece(self, piece: Piece, statistics: Columns) -> None:
        name, n_rows, values = piece.spec.name, piece.n_rows, piece.stored(self._ring)
        columns = piece.columns()
        if "call" in columns:
            columns["call"] = self._numbered(name, columns["call"])
        self._writer.write(name, values, statistics=piece.statistics(statistics), **columns)
        self._writer.count(name, expected=n_rows)
        self.written[name] = self.written.get(name, 0) + n_rows
        self.n_rows += n_rows
        self.n_bytes += values.nbytes

    def _numbered(self, site: str, calls: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number calls that stored something, on behind earlier sessions; hooks count every call of their session."""
        last, number = self._calls.get(site) or (-1, self._writer.first_call(site) - 1)
        numbers: npt.NDArray[np.int64] = number + np.cumsum(np.diff(calls, prepend=last) != 0)
        self._calls[site] = int(calls[-1]), int(numbers[-1])
        return numbers

    def _write_end(self, end: StepEnd) -> None:
        step = end.step
        if len(step.rows):
            self._next_row = int(step.rows[-1]) + 1
        for name, n_rows in end.dropped.items():
            self._writer.count(name, expected=n_rows, dropped=n_rows)
        if end.status == "abandoned" and len(step.rows):
            n_rows = len(step.rows)
            columns = {"row": step.rows, "step": np.full(n_rows, step.step), "event": ["abandoned"] * n_rows}
            self._writer.write_table("row_events", {**columns, "detail": [end.reason] * n_rows})
        self._writer.write_table("steps", _step_columns(end, self._next_row))


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
