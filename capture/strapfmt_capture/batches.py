"""The sequences of one forward pass, as runs of consecutive tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from strapfmt_capture.histories import PADDING, Branching, History
from strapfmt_capture.inputs import Inputs
from strapfmt_capture.passes import Tokens

__all__ = ["Batch", "Uncached"]

_Int64 = NDArray[np.int64]


@dataclass(slots=True, kw_only=True)
class Batch:
    """The sequences of one pass: runs of consecutive tokens, one per slot unless sequences are packed.

    `real` is `[n_sequences, n_query]`, None without padding; the arrays have one entry per run: its slot, its number
    of tokens, its sequence, the position of its first token and the row before that (negative for none). `counts` may
    be None for runs of `n_query` each. `tags` are those of sequences that begin, None if all go on; `sources` the
    encoder's sequences they attend to, -1 where unknown. `branching` is what the history is
    to be told of sequences that branch, `fork_positions` where each slot would do so.
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
    branching: Branching | None = None
    fork_positions: _Int64 | None = None

    def tokens(self, n_query: int) -> Tokens:
        """Describe the tokens of the pass, as far as the batch knows them."""
        counts = self.counts
        if n_query == 1 and self.real is None:  # one row per run
            counts = None
        elif counts is None:
            counts = np.full(len(self.slots), n_query)
        return Tokens(
            slots=self.slots,
            sequence_ids=self.sequence_ids,
            positions=self.positions,
            previous=self.previous,
            counts=counts,
        )


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
