"""The drain: takes what hooks left in the ring, computes statistics, and hands it to the writer; wherever it runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter
from strapfmt_capture.dropped import DroppedRows
from strapfmt_capture.items import (
    Annotation,
    Boundary,
    Events,
    Finish,
    Item,
    Spilled,
    StepEnd,
    StepStart,
)
from strapfmt_capture.messages import ItemReader
from strapfmt_capture.passes import Step, token_columns
from strapfmt_capture.spill import SpillFile
from strapfmt_capture.statistics import Columns, RowStatistics
from strapfmt_capture.turn import (
    Block,
    Piece,
    Values,
    compute_statistics,
    merged,
    pieces_of,
    statistics_of,
    values_of,
)

__all__ = ["Drain", "Progress", "Source", "turn_bytes"]

_TURN_SHARE = 8
_TURN_BYTES = 16 << 20


class Source(Protocol):
    """Where a drain takes items from: a `Ring`, or what arrives from one in another process."""

    @property
    def is_aborted(self) -> bool:
        """Whether nothing more is to be written."""

    @property
    def position(self) -> int:
        """Position behind everything taken so far, for `release`."""

    def take(self, max_bytes: int, *, wait: bool = True) -> list[Item]:
        """Take items in order; none, if `wait`, means that no more will come."""

    def abort(self) -> None:
        """Say that nothing more will be taken."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a drain is.

    Attributes
    ----------
    n_rows, n_bytes : int
        Handed to the writer so far, over all sites.
    written : dict of str to int
        Rows handed to the writer, by site.
    lost : dict of str to int
        Rows that an interrupt has kept from the ring, by site; known at the end.
    n_unspilled_bytes : int
        Bytes of the spill file that were read back and written.
    most_pass_bytes : int
        Values of the largest step.
    n_committed_steps : int
        Steps of this session that are durable, of those that have ended.
    committed_s : float
        When the last commit became durable, in seconds of `time.monotonic`.
    """

    n_rows: int = 0
    n_bytes: int = 0
    written: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    n_unspilled_bytes: int = 0
    most_pass_bytes: int = 0
    n_committed_steps: int = 0
    committed_s: float = field(default_factory=time.monotonic)


class Drain:
    """Empties a source into a writer, turn by turn.

    Parameters
    ----------
    source : Source
    writer : DatasetWriter
        The drain's own, but for `reserve`; it closes or aborts it.
    specs : dict of str to SiteSpec
        The sites that items have declared.
    spill : SpillFile, optional
        Where spilled items lie.
    max_bytes : int
        Bytes of values in a turn.
    on_turn : callable
        Called after every turn with the progress, and with the position before which slots may be given back.

    Attributes
    ----------
    failure : BaseException or None
        What has ended it too early.
    """

    def __init__(
        self,
        source: Source,
        writer: DatasetWriter,
        *,
        specs: dict[str, SiteSpec],
        spill: SpillFile | None,
        max_bytes: int,
        on_turn: Callable[[Progress, int], None],
    ) -> None:
        self._source, self._writer, self._spill = source, writer, spill
        self._intake = _Intake(source, spill, specs)
        self._max_bytes, self._on_turn = max_bytes, on_turn
        self._statistics, self._dropped = RowStatistics(), DroppedRows()
        #: The next free row behind the last step that ended.
        self._next_row = writer.reserve("row", 0)
        #: By site: the last call that hooks counted, and its number in the dataset.
        self._calls: dict[str, tuple[int, int]] = {}
        self._open: Step | None = None
        self._n_abandoned = self._pass_bytes = self._released = 0
        self._told_s = 0.0
        self._finish: Finish | None = None
        self._progress = Progress()
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Take turns until a `Finish` closes the dataset; without one, commit what there is, unless aborted."""
        try:
            self._drain()
            if not self._source.is_aborted:
                self._end()
            self._writer.abort()
        except BaseException as error:  # noqa: BLE001 - kept, and raised where the user waits
            self.failure = error
            self._source.abort()
            self._writer.abort()

    def progress(self) -> Progress:
        """Return how far it is, commits that became durable since the last turn included."""
        self._progress.n_committed_steps = self._writer.n_committed_steps
        self._progress.committed_s = self._writer.committed_s
        return self._progress

    def tell(self) -> None:
        """Call `on_turn` if a commit became durable since the last turn."""
        if self._writer.committed_s != self._told_s:
            self._tell()

    def _tell(self) -> None:
        progress = self.progress()
        self._told_s = progress.committed_s
        self._on_turn(progress, self._released)

    def _drain(self) -> None:
        """Take turns: while the writer's own thread writes one turn, the statistics of the next are computed."""
        written = _Turn([], 0, 0)
        while True:
            turn = self._intake.take(self._max_bytes, wait=False)
            if turn is None:
                self._writer.wait()
                self._release(written)
                turn = self._intake.take(self._max_bytes, wait=True)
                if turn is None:
                    return
            parts = [(items, values_of(items)) for items in _parts(turn.items)]
            statistics = compute_statistics([one for _, values in parts for one in values], self._statistics)
            self._writer.wait()
            self._release(written)
            self._write(parts, statistics)
            written = _Turn([], turn.position, turn.spilled)

    def _release(self, turn: _Turn) -> None:
        self._released = turn.position
        if self._spill is not None:
            self._spill.release(turn.spilled)
            self._progress.n_unspilled_bytes = turn.spilled
        self._tell()

    def _write(self, parts: Sequence[tuple[list[Item], list[Values]]], statistics: Columns) -> None:
        """Hand everything over; a commit, if it is due, comes behind the last step that is complete."""
        (whole, of_whole), (rest, of_rest) = parts
        self._write_items(whole, of_whole, statistics)
        if any(isinstance(item, Boundary) and item.is_urgent for item in whole):
            self._writer.commit()
        elif whole:
            self._writer.end_step()
        self._write_items(rest, of_rest, statistics)
        self._count_passes([*whole, *rest])

    def _count_passes(self, items: Sequence[Item]) -> None:
        progress = self._progress
        for item in items:
            if isinstance(item, Values | Block):
                self._pass_bytes += item.n_bytes
            elif isinstance(item, StepEnd):
                progress.most_pass_bytes = max(progress.most_pass_bytes, self._pass_bytes)
                self._pass_bytes = 0

    def _write_items(self, items: Sequence[Item], values: Sequence[Values], statistics: Columns) -> None:
        self._write_tables(items)
        for item in items:
            if isinstance(item, SiteSpec):
                self._writer.add_site(item)
            elif isinstance(item, Annotation):
                self._writer.mark(item.record)
        pieces = list(pieces_of(values))
        for piece, columns in zip(pieces, statistics_of(pieces, statistics), strict=True):
            self._write_piece(piece, columns)
        for item in items:
            if isinstance(item, StepStart):
                self._open = item.step
            elif isinstance(item, StepEnd):
                self._open = None
        self._write_ends([item for item in items if isinstance(item, StepEnd)])
        for item in items:
            if isinstance(item, Finish):
                self._finish = item

    def _write_tables(self, items: Sequence[Item]) -> None:
        """Write what steps begin with, each table once."""
        steps = [item.step for item in items if isinstance(item, StepStart)]
        if any(len(step.rows) for step in steps):
            self._writer.write_table("tokens", token_columns(steps))
        self._write_table("sequences", [step.sequences for step in steps if step.sequences is not None])
        events = [step.events for step in steps if step.events is not None]
        self._write_table("row_events", events + [item.columns for item in items if isinstance(item, Events)])

    def _write_table(self, name: str, parts: Sequence[dict[str, Any]]) -> None:
        if parts:
            self._writer.write_table(name, merged(name, parts))

    def _write_piece(self, piece: Piece, statistics: Columns) -> None:
        name, n_rows, values = piece.spec.name, piece.n_rows, piece.stored()
        columns = piece.columns()
        if "call" in columns:
            columns["call"] = self._numbered(name, columns["call"])
        self._writer.write(name, values, statistics=statistics, **columns)
        self._writer.count(name, expected=n_rows)
        progress = self._progress
        progress.written[name] = progress.written.get(name, 0) + n_rows
        progress.n_rows += n_rows
        progress.n_bytes += values.nbytes

    def _numbered(self, site: str, calls: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Number calls that stored something, on behind earlier sessions; hooks count every call of their session."""
        last, number = self._calls.get(site) or (-1, self._writer.first_call(site) - 1)
        numbers: npt.NDArray[np.int64] = number + np.cumsum(np.diff(calls, prepend=last) != 0)
        self._calls[site] = int(calls[-1]), int(numbers[-1])
        return numbers

    def _write_ends(self, ends: Sequence[StepEnd]) -> None:
        rows: list[dict[str, Any]] = []
        for end in ends:
            step = end.step
            if len(step.rows):
                self._next_row = int(step.rows[-1]) + 1
            for name, n_rows in end.dropped.items():
                self._writer.count(name, expected=n_rows, dropped=n_rows)
            self._dropped.add(end)
            if end.status == "abandoned":
                self._n_abandoned += 1
                self._write_abandoned(end)
            rows.append(_step_columns(end, self._next_row))
        self._write_table("steps", rows)

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

    def _end(self) -> None:
        if self._finish is None:
            self._leave()
        else:
            self._close(self._finish)

    def _close(self, finish: Finish) -> None:
        """Count what an interrupt has kept from the ring, and close the dataset."""
        dropped = self._dropped.by_site
        for name, n_rows in finish.seen.items():
            n_lost = n_rows - self._progress.written.get(name, 0) - dropped.get(name, 0)
            if n_lost > 0 and self._n_abandoned:
                self._progress.lost[name] = n_lost
                self._writer.count(name, expected=n_lost, dropped=n_lost)
        self._dropped.add_lost(self._progress.lost)
        outcome = finish.facts.get("outcome", {})
        self._writer.close(
            provenance={**finish.facts, "outcome": {**outcome, "dropped": self._dropped.to_list()}}
        )
        self._tell()

    def _leave(self) -> None:
        """Commit what is there, for a process that has ended without a word."""
        if self._open is not None:
            reason = "the process that ran the model has ended"
            end = StepEnd(
                step=self._open,
                started_ns=time.time_ns(),
                duration_s=0.0,
                status="abandoned",
                reason=reason,
                dropped={},
            )
            self._write_ends([end])
        self._writer.commit()


class _Turn(NamedTuple):
    """What is written together; `position` and `spilled` say which memory and which part of the spill file it is."""

    items: list[Item]
    position: int
    spilled: int


class _Intake:
    """Takes items from a source, and from the spill file where the source says so."""

    def __init__(self, source: Source, spill: SpillFile | None, specs: dict[str, SiteSpec]) -> None:
        self._source, self._spill, self._specs = source, spill, specs
        self._reader = ItemReader(specs)
        self._waiting: deque[Item] = deque()
        self._position = self._spilled = 0
        self._last_begun = self._last_ended = -1

    def take(self, max_bytes: int, *, wait: bool) -> _Turn | None:
        """Return what comes next, None if there is nothing yet or, after waiting, nothing any more."""
        if not self._waiting:
            self._waiting.extend(self._source.take(max_bytes, wait=wait))
            if not self._waiting:
                return None
        items = self._read_back() if isinstance(self._waiting[0], Spilled) else list(self._next())
        if not self._waiting:
            self._position = self._source.position
        return _Turn([item for item in items if not self._is_said_again(item)], self._position, self._spilled)

    def _is_said_again(self, item: Item) -> bool:
        """Whether this is the beginning or end of a step that was said before: an interrupt right behind does that."""
        if isinstance(item, StepStart):
            last, self._last_begun = self._last_begun, item.step.step
            return last == self._last_begun
        if isinstance(item, StepEnd):
            last, self._last_ended = self._last_ended, item.step.step
            return last == self._last_ended
        return False

    def _next(self) -> Iterator[Item]:
        """Take items up to the next that is spilled."""
        while self._waiting and not isinstance(self._waiting[0], Spilled):
            item = self._waiting.popleft()
            if isinstance(item, SiteSpec):
                self._specs[item.name] = item
            yield item

    def _read_back(self) -> list[Item]:
        """Read one record of the spill file."""
        spilled = self._waiting[0]
        assert isinstance(spilled, Spilled)
        assert self._spill is not None
        items, self._spilled = self._spill.read(max(spilled.start, self._spilled), self._reader)
        if self._spilled == spilled.stop:
            self._waiting.popleft()
        return items


def turn_bytes(ring_bytes: int) -> int:
    """Return how many bytes of values a turn has, so that two of them leave most of the ring to the hooks."""
    return min(_TURN_BYTES, ring_bytes // _TURN_SHARE)


def _parts(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Cut what is taken at a time behind the last step that is complete."""
    ends = [place for place, item in enumerate(items) if _may_be_committed(item)]
    n_whole = ends[-1] + 1 if ends else 0
    return list(items[:n_whole]), list(items[n_whole:])


def _may_be_committed(item: Item) -> bool:
    """Whether everything up to here is whole."""
    return isinstance(item, Boundary) or (isinstance(item, StepEnd) and item.is_whole)


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
