"""The drain: takes what hooks left in the ring, computes statistics, and hands it to the writer; wherever it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter
from strapfmt_capture.intake import Intake, Source, Turn
from strapfmt_capture.items import Annotation, Boundary, Finish, Item, StepEnd
from strapfmt_capture.spill import SpillFile
from strapfmt_capture.statistics import Columns, RowStatistics
from strapfmt_capture.step_tables import StepTables
from strapfmt_capture.turn import (
    Block,
    Piece,
    Values,
    compute_statistics,
    pieces_of,
    statistics_of,
    values_of,
)

__all__ = ["Drain", "Progress"]


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
        self._intake = Intake(source, spill, specs)
        self._max_bytes, self._on_turn = max_bytes, on_turn
        self._tables, self._statistics = StepTables(writer), RowStatistics()
        #: By site: the last call that hooks counted, and its number in the dataset.
        self._calls: dict[str, tuple[int, int]] = {}
        self._pass_bytes = self._released = 0
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
        written = Turn([], 0, 0)
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
            written = Turn([], turn.position, turn.spilled)

    def _release(self, turn: Turn) -> None:
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
        self._tables.begin(items)
        for item in items:
            if isinstance(item, SiteSpec):
                self._writer.add_site(item)
            elif isinstance(item, Annotation):
                self._writer.mark(item.record)
        pieces = list(pieces_of(values))
        for piece, columns in zip(pieces, statistics_of(pieces, statistics), strict=True):
            self._write_piece(piece, columns)
        self._tables.end(items)
        for item in items:
            if isinstance(item, Finish):
                self._finish = item

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

    def _end(self) -> None:
        if self._finish is None:
            self._leave()
        else:
            self._close(self._finish)

    def _close(self, finish: Finish) -> None:
        """Count what an interrupt has kept from the ring, and close the dataset."""
        dropped = self._tables.dropped
        for name, n_rows in finish.seen.items():
            n_lost = n_rows - self._progress.written.get(name, 0) - dropped.by_site.get(name, 0)
            if n_lost > 0 and self._tables.n_abandoned:
                self._progress.lost[name] = n_lost
                self._writer.count(name, expected=n_lost, dropped=n_lost)
        dropped.add_lost(self._progress.lost)
        outcome = finish.facts.get("outcome", {})
        self._writer.close(provenance={**finish.facts, "outcome": {**outcome, "dropped": dropped.to_list()}})
        self._tell()

    def _leave(self) -> None:
        """Commit what is there, for a process that has ended without a word."""
        self._tables.abandon("the process that ran the model has ended")
        self._writer.commit()


def _parts(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Cut what is taken at a time behind the last step that is complete."""
    ends = [place for place, item in enumerate(items) if _may_be_committed(item)]
    n_whole = ends[-1] + 1 if ends else 0
    return list(items[:n_whole]), list(items[n_whole:])


def _may_be_committed(item: Item) -> bool:
    """Whether everything up to here is whole."""
    return isinstance(item, Boundary) or (isinstance(item, StepEnd) and item.is_whole)
