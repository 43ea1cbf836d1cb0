"""Selection: which token rows of a pass are stored, decided once per pass and before anything is copied.

- `phases`, `positions` and `where` choose rows. `positions` is an index into the sequence as it is after the pass,
  padding left out: `slice(0, 4)` is its first four tokens, `-1` the last token of each sequence in the pass.
- `every=n` takes the first, the (n+1)th, ... of the passes in which those leave a row.
- `max_rows` is how many rows are stored; the pass that reaches it is cut there.

Tokens of which no site of the capture has a value are no rows: those of an encoder, for sites of the decoder, and of a
prompt all but the last, if there are logits only and the head computes no others. All sites of a pass store the same
rows, as far as they have them. A site that numbers its own rows stores them in passes of which a row is
stored, and its own first `max_rows`; which token each of them is is not known, so `positions` and `where` are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from strapfmt.arguments import as_integer, as_names
from strapfmt.errors import ArgumentError, CaptureError
from strapfmt_capture.arguments import as_index, index_facts
from strapfmt_capture.passes import Column, Step, token_columns
from strapfmt_capture.placement import Placement

__all__ = ["Positions", "Selection", "Selector", "TokenColumns"]

Positions: TypeAlias = int | slice | Collection[int] | Literal["last"]
_Bool = npt.NDArray[np.bool_]
_Int64 = npt.NDArray[np.int64]

_PHASES = ("prefill", "decode", "encode")
_COLUMNS: dict[str, type] = {
    "row": np.int64,
    "sequence_id": np.int64,
    "position": np.int32,
    "batch_index": np.int32,
    "token_id": np.int32,
    "token": object,
    "is_special": bool,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenColumns:
    """The tokens of one pass, as `where` sees them: arrays `[n_rows]` that cannot be written to.

    Attributes
    ----------
    step : int
    phase : str
        `"prefill"` or `"decode"`.
    row, sequence_id : int64
    position, batch_index : int32
    token_id : int32 or None
        None in a pass that is given embeddings.
    token : object (str or None), or None
        Text; None without a tokenizer, or token ids.
    is_special : bool or None
        None like `token`.
    """

    step: int
    phase: str
    row: npt.NDArray[Any]
    sequence_id: npt.NDArray[Any]
    position: npt.NDArray[Any]
    batch_index: npt.NDArray[Any]
    token_id: npt.NDArray[Any] | None
    token: npt.NDArray[Any] | None
    is_special: npt.NDArray[Any] | None

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def of(cls, step: Step) -> TokenColumns:
        """Describe the tokens of a step."""
        stored = token_columns([step])
        columns: dict[str, Any] = {name: _read_only(stored[name], dtype) for name, dtype in _COLUMNS.items()}
        return cls(step=step.step, phase=step.phase, **columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which rows `capture` was asked to store, checked; None stands for all."""

    phases: tuple[str, ...] | None
    every: int
    positions: slice | tuple[int, ...] | None
    max_rows: int | None
    where: Callable[[TokenColumns], Any] | None

    @classmethod
    def of(
        cls,
        *,
        phases: str | Collection[str] | None,
        every: int,
        positions: Positions | None,
        max_rows: int | None,
        where: Callable[[TokenColumns], Any] | None,
    ) -> Selection | None:
        """Check what `capture` was called with; None if every row is wanted.

        Raises
        ------
        ArgumentError
        """
        if where is not None and not callable(where):
            raise ArgumentError(
                f"where: expected a function of the tokens of a pass that returns a bool for each, got {where!r}"
            )
        selection = cls(
            phases=None if phases is None else _as_phases(phases),
            every=as_integer("every", every, least=1),
            positions=None if positions is None else _as_positions(positions),
            max_rows=None if max_rows is None else as_integer("max_rows", max_rows, least=1),
            where=where,
        )
        return selection if selection.facts else None

    @property
    def facts(self) -> dict[str, Any]:
        """What was asked for, JSON-ready; empty if that is every row."""
        where = self.where
        facts = {
            "phases": self.phases,
            "every": None if self.every == 1 else self.every,
            "positions": None if self.positions is None else index_facts(self.positions),
            "max_rows": self.max_rows,
            "where": None if where is None else getattr(where, "__qualname__", type(where).__qualname__),
        }
        return {name: value for name, value in facts.items() if value is not None}

    def check_own(self, site: str, hook_point: str) -> None:
        """Refuse to choose among the rows of a site that numbers its own.

        Raises
        ------
        CaptureError
        """
        for name in ("positions", "where"):
            if getattr(self, name) is not None:
                raise CaptureError(
                    f"site {site!r} at {hook_point}: its rows are its own, and which token each of them belongs to is "
                    f"not known, so {name}= cannot choose among them; leave out the site, or {name}="
                )


class Selector:
    """Decides for each pass of a session what is stored of it.

    Parameters
    ----------
    selection : Selection
    reached : callable
        `reached(step, chosen)` returns which rows of a step some site has a value of, None if all: `taps.reached_rows`.

    Attributes
    ----------
    selection : Selection
    n_rows : int
        Rows of tokens chosen so far.
    """

    def __init__(self, selection: Selection, reached: Callable[[Step, _Int64 | None], _Int64 | None]) -> None:
        self.selection = selection
        self._reached = reached
        self.n_rows = 0
        self._n_passes = 0

    def choose(
        self, step: Step, whole: Placement, *, chosen: _Int64 | None, is_full: bool
    ) -> Placement | None:
        """Return what of `whole`, all tokens of a step, is stored; None if nothing is stored of the pass.

        `chosen` are the positions at which the head computes, None if it computes all. Rows that the ring has no space
        for (`is_full`) do not count towards `max_rows`.

        Raises
        ------
        CaptureError
            If `where` raises, or returns something else than a bool for each row.
        """
        asked = self.selection
        is_over = step.is_language and self.n_left(self.n_rows) == 0
        if is_over or (asked.phases is not None and step.phase not in asked.phases):
            return None
        places = self._places(step, whole.n_rows, chosen)
        if step.is_language and not len(places):
            return None
        self._n_passes += 1
        if (self._n_passes - 1) % asked.every:
            return None
        places = places[: self.n_left(self.n_rows)]
        if not is_full:
            self.n_rows += len(places)
        return whole if len(places) == whole.n_rows else whole.at(places)

    def own(self, placed: Placement, n_stored: int) -> Placement:
        """Return what is stored of rows that a site numbers itself, of which it has stored `n_stored`."""
        n_left = self.n_left(n_stored)
        return placed if n_left is None or n_left >= placed.n_rows else placed.at(np.arange(n_left))

    def n_left(self, n_stored: int) -> int | None:
        """How many rows a site may still store; None if that is not limited."""
        limit = self.selection.max_rows
        return None if limit is None else max(limit - n_stored, 0)

    def _places(self, step: Step, n_rows: int, chosen: _Int64 | None) -> _Int64:
        """Which rows `positions` and `where` leave of those of a step that some site has a value of."""
        kept, reached = np.ones(n_rows, bool), self._reached(step, chosen)
        if reached is not None:
            kept = np.isin(np.arange(n_rows), reached)
        if n_rows and self.selection.positions is not None:
            kept &= _at_positions(step, self.selection.positions)
        if n_rows and self.selection.where is not None:
            kept &= _told(self.selection.where, step)
        return np.flatnonzero(kept)


def _as_phases(value: str | Collection[str]) -> tuple[str, ...]:
    names = as_names("phases", value)
    if not names or not set(names) <= set(_PHASES):
        raise ArgumentError(f'phases: expected some of "prefill", "decode" and "encode", got {value!r}')
    return tuple(phase for phase in _PHASES if phase in names)


def _as_positions(value: Positions) -> slice | tuple[int, ...]:
    if isinstance(value, str):
        if value != "last":
            raise ArgumentError(f'positions: expected a slice, whole numbers, or "last"; got {value!r}')
        return (-1,)
    return as_index("positions", value)


def _at_positions(step: Step, positions: slice | tuple[int, ...]) -> _Bool:
    """Which rows of a step lie at `positions` of their sequence, as long as it is now."""
    columns = token_columns([step])
    sequences, place = np.asarray(columns["sequence_id"]), np.asarray(columns["position"], np.int64)
    # The rows of a sequence follow one another, the last of them last.
    last = np.append(np.flatnonzero(np.diff(sequences)), len(place) - 1)
    length = np.repeat(place[last] + 1, np.diff(last, prepend=-1))
    if isinstance(positions, slice):
        start, stop = (
            None if end is None else np.maximum(end + length, 0) if end < 0 else np.full_like(length, end)
            for end in (positions.start, positions.stop)
        )
        start = np.zeros_like(length) if start is None else start
        kept: _Bool = (place >= start) & ((place - start) % (positions.step or 1) == 0)
        return kept if stop is None else kept & (place < stop)
    from_start = [each for each in positions if each >= 0]
    from_end = [each for each in positions if each < 0]
    return np.isin(place, from_start) | np.isin(place - length, from_end)


def _told(where: Callable[[TokenColumns], Any], step: Step) -> _Bool:
    """Which rows of a step `where` wants."""
    n_rows = len(step.rows)
    try:
        told = np.asarray(where(TokenColumns.of(step)))
    except Exception as error:
        raise CaptureError(
            f"where: expected a bool for each of the {n_rows} tokens of step {step.step}, but the function raised "
            f"{type(error).__name__}: {error}"
        ) from error
    if told.dtype != bool or told.shape != (n_rows,):
        raise CaptureError(
            f"where: expected bool [{n_rows}], one for each token of step {step.step}; got {told.dtype} "
            f"{list(told.shape)}"
        )
    return told


def _read_only(column: Column, dtype: type) -> npt.NDArray[Any] | None:
    if isinstance(column, pa.Array):  # of nulls: nothing is known
        return None
    view: npt.NDArray[Any] = np.asarray(column, dtype)[:]
    view.flags.writeable = False
    return view
