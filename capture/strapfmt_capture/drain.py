"""The drain: one thread that takes what hooks left in the ring, computes statistics, and hands it to the writer."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.dtypes import dtype_of_torch
from strapfmt.errors import DrainError
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter
from strapfmt_capture.ring import Ring
from strapfmt_capture.rows import Column, Step
from strapfmt_capture.statistics import Columns, RowStatistics

__all__ = ["Drain", "Events", "Item", "StepEnd", "StepStart", "Values"]

_TURN_SHARE = 8
_TURN_BYTES = 16 << 20
# Values of one site that arrive in pieces smaller than this are written together.
_PIECE_BYTES = 256 << 10
_PATIENCE_S = 2.0

_Int64 = npt.NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Values:
    """Rows of one site, in the ring from position `start`; `shape` is that of each row."""

    spec: SiteSpec
    dtype: torch.dtype
    shape: tuple[int, ...]
    n_rows: int
    start: int
    stop: int
    rows: _Int64 | None
    token_row: _Int64 | None
    call: int


@dataclass(slots=True, kw_only=True)
class StepStart:
    """A step begins. Its tokens go first, so that whatever is rescued after a crash has them."""

    step: Step


@dataclass(slots=True, kw_only=True)
class StepEnd:
    """A step is over; `dropped` counts the rows that each site should have stored in it and did not."""

    step: Step
    started_ns: int
    duration_s: float
    status: str
    reason: str | None
    dropped: dict[str, int]


@dataclass(slots=True, kw_only=True)
class Events:
    """Columns of `row_events` that belong to no step."""

    columns: dict[str, Column]


Item = SiteSpec | StepStart | Values | StepEnd | Events


class Drain:
    """Empties a ring into a writer, in a thread of its own.

    The first failure ends it: the ring is aborted, so that nobody waits for it, and the failure is kept for `check` and
    `finish`.

    Parameters
    ----------
    ring : Ring
    writer : DatasetWriter
        The drain's own from `start` on, but for `reserve`; it closes or aborts it.

    Attributes
    ----------
    n_rows, n_bytes : int
        Handed to the writer so far, over all sites.
    written : dict of str to int
        Rows handed to the writer, by site.
    """

    def __init__(self, ring: Ring[Item], writer: DatasetWriter) -> None:
        self._ring, self._writer = ring, writer
        self._statistics = RowStatistics()
        self._failure: BaseException | None = None
        self._provenance: Mapping[str, Any] = {}
        self._turn_bytes = min(_TURN_BYTES, ring.n_bytes // _TURN_SHARE)
        self._thread = threading.Thread(target=self._run, name="strapfmt-drain", daemon=True)
        self.n_rows, self.n_bytes = 0, 0
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
                "read, and mode='append' goes on behind it"
            ) from self._failure

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
        while True:
            items = self._ring.take(self._turn_bytes, wait=False)
            if not items:
                self._writer.wait()
                self._ring.release(written)
                items = self._ring.take(self._turn_bytes)
                if not items:
                    return
            position = self._ring.position
            statistics = self._compute(items)
            self._writer.wait()
            self._ring.release(written)
            self._write(items, statistics)
            written = position

    def _compute(self, items: Sequence[Item]) -> dict[int, Columns]:
        """Statistics of all values, by their start; neighbours in memory that are alike are computed as one tensor."""
        found: dict[int, Columns] = {}
        values_ = [item for item in items if isinstance(item, Values) and item.spec.statistics]
        for run in _runs(values_, self._ring.n_bytes):
            first, n_rows = run[0], sum(values.n_rows for values in run)
            x = self._ring.view(first.start, first.dtype, (n_rows, *first.shape))
            columns = self._statistics(x, first.spec.statistics)
            at = 0
            for values in run:
                found[values.start] = {k: column[at : at + values.n_rows] for k, column in columns.items()}
                at += values.n_rows
        return found

    def _write(self, items: Sequence[Item], statistics: Mapping[int, Columns]) -> None:
        """Hand everything over; a commit, if it is due, comes behind the last step that is complete."""
        ends = [place for place, item in enumerate(items) if isinstance(item, StepEnd)]
        n_whole = ends[-1] + 1 if ends else 0
        self._write_items(items[:n_whole], statistics)
        if n_whole:
            self._writer.end_step()
        self._write_items(items[n_whole:], statistics)

    def _write_items(self, items: Sequence[Item], statistics: Mapping[int, Columns]) -> None:
        by_site: dict[str, list[Values]] = {}
        for item in items:
            if isinstance(item, Values):
                by_site.setdefault(item.spec.name, []).append(item)
            elif isinstance(item, StepStart):
                self._write_rows(item.step)
            elif isinstance(item, SiteSpec):
                self._writer.add_site(item)
            elif isinstance(item, Events):
                self._writer.write_table("row_events", item.columns)
        for values in by_site.values():
            for piece in _pieces(values):
                self._write_values(piece, statistics)
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

    def _write_values(self, piece: Sequence[Values], statistics: Mapping[int, Columns]) -> None:
        spec, n_rows = piece[0].spec, sum(values.n_rows for values in piece)
        arrays = [self._array(values) for values in piece]
        columns = [statistics[values.start] for values in piece] if spec.statistics else []
        is_own = spec.row_space == "own"
        self._writer.write(
            spec.name,
            arrays[0] if len(arrays) == 1 else np.concatenate(arrays),
            rows=None
            if is_own
            else np.concatenate([values.rows for values in piece if values.rows is not None]),
            shapes=_shapes(piece) if spec.is_ragged else None,
            statistics={name: np.concatenate([part[name] for part in columns]) for name in spec.statistics},
            token_row=np.concatenate([_token_rows(values) for values in piece]) if is_own else None,
            call=np.repeat([values.call for values in piece], [v.n_rows for v in piece]) if is_own else None,
        )
        self._writer.count(spec.name, expected=n_rows)
        self.written[spec.name] = self.written.get(spec.name, 0) + n_rows
        self.n_rows += n_rows
        self.n_bytes += sum(array.nbytes for array in arrays)

    def _array(self, values: Values) -> npt.NDArray[Any]:
        """The ring's own memory as the writer wants it."""
        storage: torch.dtype = getattr(torch, dtype_of_torch(values.dtype).storage)
        shape = (values.n_rows, *values.shape)
        array: npt.NDArray[Any] = self._ring.view(values.start, storage, shape).numpy()
        return array.reshape(-1) if values.spec.is_ragged else array

    def _write_end(self, end: StepEnd) -> None:
        step = end.step
        for name, n_rows in end.dropped.items():
            self._writer.count(name, expected=n_rows, dropped=n_rows)
        if end.status == "abandoned" and len(step.rows):
            n_rows = len(step.rows)
            columns = {"row": step.rows, "step": np.full(n_rows, step.step), "event": ["abandoned"] * n_rows}
            self._writer.write_table("row_events", {**columns, "detail": [end.reason] * n_rows})
        self._writer.write_table("steps", _step_columns(end))


def _step_columns(end: StepEnd) -> dict[str, list[Any]]:
    step = end.step
    return {
        "step": [step.step],
        "phase": [step.phase],
        "n_sequences": [step.n_sequences],
        "n_query": [step.n_query],
        "n_rows": [len(step.rows)],
        "first_row": [int(step.rows[0]) if len(step.rows) else -1],
        "started_ns": [end.started_ns],
        "duration_s": [end.duration_s],
        "status": [end.status],
        "reason": [end.reason],
    }


def _runs(values: Sequence[Values], ring_bytes: int) -> Iterator[list[Values]]:
    """Group values that lie one behind the other in memory, without a gap, and have rows of one kind."""
    run: list[Values] = []
    for one in values:
        if run and not (_follows(run[-1], one) and one.start % ring_bytes):
            yield run
            run = []
        run.append(one)
    if run:
        yield run


def _follows(last: Values, one: Values) -> bool:
    is_next = one.start == last.start + last.n_rows * math.prod(last.shape) * last.dtype.itemsize
    return is_next and (one.dtype, one.shape, one.spec.statistics) == (
        last.dtype,
        last.shape,
        last.spec.statistics,
    )


def _pieces(values: Sequence[Values]) -> Iterator[list[Values]]:
    """Group what one site has given so that small pieces are written together and large ones are not copied."""
    small: list[Values] = []
    for one in values:
        if one.stop - one.start < _PIECE_BYTES:
            small.append(one)
            continue
        if small:
            yield small
            small = []
        yield [one]
    if small:
        yield small


def _shapes(piece: Sequence[Values]) -> npt.NDArray[np.int32]:
    shapes = np.array([values.shape for values in piece], np.int32)
    return np.repeat(shapes, [values.n_rows for values in piece], axis=0)


def _token_rows(values: Values) -> _Int64:
    return np.full(values.n_rows, -1, np.int64) if values.token_row is None else values.token_row
