"""One forward pass as it goes to the drain: what it is about, in few arrays, and the rows of `tokens` made of them.

The model's thread takes note of runs of tokens; whoever needs the columns makes them, for many passes at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING:
    from strapfmt_capture.histories import History

__all__ = ["Column", "Step", "Tokens", "joined", "token_columns"]

Column: TypeAlias = npt.NDArray[Any] | list[Any] | pa.Array
_Int64 = npt.NDArray[np.int64]
_Bool = npt.NDArray[np.bool_]


@dataclass(slots=True, kw_only=True)
class Tokens:
    """The tokens of a pass: runs of consecutive ones of one sequence. Arrays are not changed once they are here.

    Attributes
    ----------
    slots, sequence_ids, positions, previous : ndarray of int64 [n_runs]
        Of each run its place in the batch, its sequence, the position of its first token, and the row of the token
        before that (negative for none).
    counts : ndarray of int64 [n_runs] or None
        Tokens in each run; None for one.
    token_ids : ndarray of int32 [n_rows] or None
    texts : list of (str or None) [n_rows], or None
    is_special : list of bool [n_rows] or None
    dropped : ndarray of bool [n_rows] or None
        None if none is.
    """

    slots: _Int64
    sequence_ids: _Int64
    positions: _Int64
    previous: _Int64
    counts: _Int64 | None = None
    token_ids: npt.NDArray[np.int32] | None = None
    texts: list[str | None] | None = None
    is_special: list[bool] | None = None
    dropped: _Bool | None = None


@dataclass(slots=True, kw_only=True)
class Step:
    """One forward pass.

    Attributes
    ----------
    step : int
        Its number.
    phase : str
        `"decode"` when one token per sequence is added to a past, `"encode"` in the encoder of an encoder-decoder
        model, else `"prefill"`.
    n_sequences, n_query : int
        Width of the padded batch; 0 for a model that is given no tokens.
    selected : ndarray of int64 or None
        Places of the stored tokens in the flattened `[n_sequences * n_query]` batch, ascending; None if all are.
    rows : ndarray of int64 [n_rows]
        Row ids in that order.
    tokens : Tokens or None
        None if no tokens were found: sites number their own rows then.
    sequences : dict or None
        Columns of the `sequences` table for sequences that begin in this step.
    events : dict or None
        Columns of the `row_events` table for what has happened to earlier rows since the last step.
    history : History or None
        What lies behind each sequence, this pass included; as it is while the pass runs.
    """

    step: int
    phase: str
    n_sequences: int
    n_query: int
    selected: _Int64 | None
    rows: _Int64
    tokens: Tokens | None
    sequences: dict[str, Column] | None
    events: dict[str, Column] | None
    history: History | None = None

    @property
    def is_language(self) -> bool:
        """Whether tokens were found. If not, sites number their own rows."""
        return self.tokens is not None


def token_columns(steps: Sequence[Step]) -> dict[str, Column]:
    """Return the columns of the `tokens` table that several steps fill, one value a row."""
    parts = [(step, step.tokens) for step in steps if step.tokens is not None]
    rows = np.concatenate([step.rows for step, _ in parts])
    n_rows = [len(step.rows) for step, _ in parts]
    slots, sequences, positions, parents = _spread([tokens for _, tokens in parts], rows)

    def column(name: str, otherwise: Callable[[int], Column], kind: pa.DataType) -> Column:
        known = [(getattr(tokens, name), len(step.rows)) for step, tokens in parts]
        return joined([otherwise(n) if values is None else values for values, n in known], kind)

    return {
        "row": rows,
        "step": np.repeat(np.array([step.step for step, _ in parts], np.int64), n_rows),
        "phase": [step.phase for step, _ in parts for _ in range(len(step.rows))],
        "batch_index": slots.astype(np.int32),
        "sequence_id": sequences,
        "position": positions.astype(np.int32),
        "token_id": column("token_ids", partial(pa.nulls, type=pa.int32()), pa.int32()),
        "token": column("texts", partial(pa.nulls, type=pa.utf8()), pa.utf8()),
        "is_special": column("is_special", partial(pa.nulls, type=pa.bool_()), pa.bool_()),
        "parent_row": pa.array(parents, mask=parents < 0),
        "dropped": column("dropped", partial(np.zeros, dtype=bool), pa.bool_()),
    }


def joined(columns: Sequence[Any], kind: pa.DataType) -> Any:
    """Return columns of several steps as one, in the form they all have, or as an Arrow array of type `kind`."""
    if all(isinstance(column, np.ndarray) for column in columns):
        return np.concatenate(columns)
    if all(isinstance(column, list) for column in columns):
        return [value for column in columns for value in column]
    return pa.concat_arrays(
        [column if isinstance(column, pa.Array) else pa.array(column, kind) for column in columns]
    )


def _spread(parts: Sequence[Tokens], rows: _Int64) -> tuple[_Int64, _Int64, _Int64, _Int64]:
    """Slot, sequence, position and row before, of every row of the runs."""
    slots, sequences, positions, previous = (
        np.concatenate([getattr(tokens, name) for tokens in parts])
        for name in ("slots", "sequence_ids", "positions", "previous")
    )
    if all(tokens.counts is None for tokens in parts):
        return slots, sequences, positions, previous
    counts = np.concatenate(
        [np.ones(len(tokens.slots), np.int64) if tokens.counts is None else tokens.counts for tokens in parts]
    )
    offsets = np.cumsum(counts) - counts
    parents = rows - 1
    parents[offsets[counts > 0]] = previous[counts > 0]
    positions = np.arange(len(rows)) + np.repeat(positions - offsets, counts)
    return np.repeat(slots, counts), np.repeat(sequences, counts), positions, parents
