"""The sequences of one forward pass, as runs of consecutive tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from strapfmt_capture.histories import PADDING, History
from strapfmt_capture.inputs import Inputs

__all__ = ["Batch", "Uncached"]

_Int64 = NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Batch:
    """The sequences of one pass: runs of consecutive tokens, one per slot unless sequences are packed.

    `real` is `[n_sequences, n_query]`, None without padding; the arrays have one entry per run: its slot, its number
    of tokens, its sequence, the position of its first token and the row before that (negative for none). `counts` may
    be None for runs of `n_query` each. `tags` are those of sequences that begin, None if all go on; `sources` the
    encoder's sequences they attend to, -1 where unknown. Of sequences that branch: slot, parent and fork position.
    """

    history: History
    real: NDArray[np.bool_] | None
    slots: _Int64
    counts: _Int64 | None
    sequence_ids: _Int64
    positions: _Int64
    previous: _Int64
    tags: NDArray[np.object_] | None = None
    sources: _Int64 | None = None
    branched: Sequence[tuple[int, int, int]] = ()

    def columns(self, rows: _Int64, n_query: int) -> dict[str, NDArray[Any] | pa.Array]:
        """Who each row is: copies of `[n_rows]`."""
        if n_query == 1 and self.real is None:  # one row per run
            slots, sequences, positions = self.slots, self.sequence_ids, self.positions
            parents = self.previous.copy()  # the history goes on to change it, and Arrow may not copy
        else:
            counts = np.full(len(self.slots), n_query) if self.counts is None else self.counts
            offsets = np.cumsum(counts) - counts
            slots, sequences = np.repeat(self.slots, counts), np.repeat(self.sequence_ids, counts)
            positions = np.arange(len(rows)) + np.repeat(self.positions - offsets, counts)
            parents = rows - 1
            parents[offsets[counts > 0]] = self.previous[counts > 0]
        return {
            "batch_index": slots.astype(np.int32),
            "sequence_id": sequences.copy(),
            "position": positions.astype(np.int32),
            "parent_row": pa.array(parents, mask=parents < 0),
        }


@dataclass(slots=True)
class Uncached:
    """The last pass that had no cache, for the next one may repeat it with one more token (`use_cache=False`)."""

    history: History
    token_ids: _Int64
    real: NDArray[np.bool_] | None
    encoded: torch.Tensor | None

    def slots_of(self, inputs: Inputs, real: NDArray[np.bool_] | None) -> _Int64 | None:
        """The slot each sequence of a pass was in before, by its tokens; None if it is not the same ones."""
        n, q = self.token_ids.shape
        ids = inputs.token_ids
        if ids is None or ids.shape != (n, q + 1) or self.history.length != q:
            return None
        if real is not None and not real[:, -1].all():
            return None
        before = self._signed(self.token_ids, self.real)
        now = self._signed(ids, real)[:, :-1]
        slots = np.arange(n)
        moved = np.flatnonzero((before != now).any(axis=1))
        if moved.size:  # beam search
            known = {before[slot].tobytes(): slot for slot in reversed(range(n))}
            slots[moved] = [known.get(now[slot].tobytes(), -1) for slot in moved]
        if (slots < 0).any() or not self._attends_alike(inputs.encoded, slots):
            return None
        return slots

    def _attends_alike(self, encoded: torch.Tensor | None, slots: _Int64) -> bool:
        """Whether each slot attends to what the slot it was in before did."""
        if encoded is None or self.encoded is None:
            return encoded is self.encoded
        return encoded.shape == self.encoded.shape and torch.equal(encoded, self.encoded[slots])

    @staticmethod
    def _signed(ids: _Int64, real: NDArray[np.bool_] | None) -> _Int64:
        """Token ids, with padding of any kind as -1."""
        return ids if real is None else np.where(real, ids, PADDING)
