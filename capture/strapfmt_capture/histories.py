"""What lies behind each sequence of a batch: the rows that its key-value cache holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["PADDING", "Branching", "History"]

# What a place of a cache holds if not a row.
PADDING, _UNKNOWN = -1, -2
_FIRST_CAPACITY = 64

_Int64 = NDArray[np.int64]


class Branching(NamedTuple):
    """Slots that go on as sequences of their own.

    Attributes
    ----------
    sequence_ids : ndarray of int64 [n_sequences]
        The sequence in each slot from then on.
    lines : list
        Of each slot, the sequences its tokens are of.
    parents : list of (int, int)
        The slots that get a new sequence, and the sequence each of them branches off.
    """

    sequence_ids: _Int64
    lines: list[tuple[tuple[int, int], ...]]
    parents: list[tuple[int, int]]


class History:
    """The rows behind a batch, in the layout of its key-value cache: `n_sequences` slots of `length` places.

    The arrays that are attributes are exchanged, not changed: steps keep those of their time. What changes together is
    exchanged without a call in between, so that no interrupt can come between.

    Parameters
    ----------
    sequence_ids : ndarray of int64 [n_sequences]
        The sequence in each slot.
    n_prompt : ndarray of int64 [n_sequences]
        Length of each one's prompt.
    tags : ndarray of object [n_sequences], optional
        Tags of each one, as JSON text.

    Attributes
    ----------
    length : int
        Places used in every slot, padding included.
    n_tokens : ndarray of int64 [n_sequences]
        Tokens in each slot: the position of the next one.
    last_row : ndarray of int64 [n_sequences]
        Row of the last token, or negative if there is none that is known.
    is_copy : bool
        Whether the slots are to go on as sequences of their own, because their cache is a copy.
    """

    __slots__ = (
        "_cells",
        "_has_padding",
        "_lines",
        "_own_from",
        "is_copy",
        "last_row",
        "length",
        "n_prompt",
        "n_tokens",
        "sequence_ids",
        "tags",
    )

    def __init__(
        self, sequence_ids: _Int64, n_prompt: _Int64, tags: NDArray[np.object_] | None = None
    ) -> None:
        n_sequences = len(sequence_ids)
        self.tags = np.full(n_sequences, "{}", object) if tags is None else tags
        self.sequence_ids, self.n_prompt = sequence_ids, n_prompt
        self.n_tokens = np.zeros(n_sequences, np.int64)
        self.last_row = np.full(n_sequences, PADDING, np.int64)
        self.is_copy = False
        self.length = 0
        self._has_padding = False
        self._own_from = 0  # places before this one are those of the copied cache
        # Of each slot, the sequences its tokens are of, oldest first: the first position of each, and its number.
        self._lines: list[tuple[tuple[int, int], ...]] = [((0, each),) for each in sequence_ids.tolist()]
        self._cells = np.empty((n_sequences, _FIRST_CAPACITY), np.int64)

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def append(self, rows: _Int64) -> None:
        """Add the rows of one pass.

        Parameters
        ----------
        rows : ndarray of int64 [n_sequences, n_query]
            Row ids, larger than all before; `PADDING` where there is no token. Copied.
        """
        length, last_row = self._put(rows), np.maximum(self.last_row, rows.max(axis=1))
        n_tokens = self.n_tokens + (rows >= 0).sum(axis=1)
        self._has_padding |= bool(rows.min(initial=0) == PADDING)
        self.length, self.last_row, self.n_tokens = length, last_row, n_tokens

    def append_tokens(self, rows: _Int64) -> None:
        """Add one token to every slot, as most passes do.

        Parameters
        ----------
        rows : ndarray of int64 [n_sequences]
            Row ids, larger than all before. Kept, not to be changed.
        """
        length, n_tokens = self.length + 1, self.n_tokens + 1
        if length > self._cells.shape[1]:
            self._grow(2 * length)
        self._cells[:, length - 1] = rows
        self.length, self.last_row, self.n_tokens = length, rows, n_tokens

    def extend_unknown(self, length: int, n_tokens: _Int64) -> None:
        """Grow to `length` places holding `n_tokens` in all, through passes that nobody watched."""
        length = self._put(np.full((len(self), length - self.length), _UNKNOWN, np.int64))
        last_row, n_tokens = np.full(len(self), _UNKNOWN, np.int64), n_tokens.copy()
        self.length, self.last_row, self.n_tokens = length, last_row, n_tokens

    def truncate(self, length: int, on_rejected: Callable[[_Int64], object]) -> None:
        """Shrink to `length` places; tell the row ids that are lost, sorted, less those the copied cache has."""
        removed = self._cells[:, length : self.length]
        own = removed[:, max(self._own_from - length, 0) :]
        rejected = np.unique(own[own >= 0])
        n_tokens = self.n_tokens - (removed != PADDING).sum(axis=1)
        own_from, last_row = min(self._own_from, length), self.last_row.copy()
        for slot in range(len(self)):
            places = np.flatnonzero(self._cells[slot, :length] != PADDING)
            last_row[slot] = self._cells[slot, places[-1]] if places.size else PADDING
        on_rejected(rejected)  # before, so that an interrupt loses none
        self.length, self.last_row, self.n_tokens, self._own_from = length, last_row, n_tokens, own_from

    def select(self, slots: _Int64) -> None:
        """Fill the slots anew with copies of the slots numbered in `slots`, as a reordered cache does."""
        ids, n_prompt, tags = self.sequence_ids[slots], self.n_prompt[slots], self.tags[slots]
        n_tokens, last_row = self.n_tokens[slots], self.last_row[slots]
        cells, lines = self._cells[slots], [self._lines[slot] for slot in slots.tolist()]
        self.sequence_ids, self.n_prompt, self.tags = ids, n_prompt, tags
        self.n_tokens, self.last_row, self._cells, self._lines = n_tokens, last_row, cells, lines

    def copy(self) -> History:
        """Return the history of a copied cache, whose continuations are sequences of their own."""
        copied = History(self.sequence_ids, self.n_prompt, self.tags)
        copied.length, copied._cells, copied._lines = self.length, self._cells, self._lines
        copied.n_tokens, copied.last_row = self.n_tokens, self.last_row
        copied.select(np.arange(len(self)))  # own arrays
        copied.is_copy, copied._own_from, copied._has_padding = True, self.length, self._has_padding
        return copied

    def real_keys(self, n_keys: int) -> NDArray[np.bool_] | None:
        """Say which of a cache's keys are tokens, and which are padding or places that are not used yet.

        Parameters
        ----------
        n_keys : int
            Keys that attention sees: all places, the last of them (a sliding window), or more (a static cache).

        Returns
        -------
        ndarray of bool [n_sequences, n_keys] or None
            None if all are tokens.
        """
        if not self._has_padding and n_keys <= self.length:
            return None
        real = np.zeros((len(self), n_keys), bool)
        real[:, : self.length] = self._cells[:, max(self.length - n_keys, 0) : self.length] != PADDING
        return real

    def branching(self, next_sequence: Callable[[int], int]) -> Branching | None:
        """Give every slot a sequence of its own, now that its next token is known to come.

        Of several slots with one sequence the first keeps it. One that was cut behind the place where its sequence
        had branched off branches anew, from the sequence of the token that is now its last.

        Parameters
        ----------
        next_sequence : callable
            Given a number, reserves as many sequence ids and returns the first.

        Returns
        -------
        Branching or None
            What is to be given to `branch` when the pass is known; None if every slot goes on as it is.
        """
        seen: set[int] = set()
        slots = []
        for slot, (sequence, n_tokens) in enumerate(
            zip(self.sequence_ids.tolist(), self.n_tokens.tolist(), strict=True)
        ):
            if self.is_copy or sequence in seen or n_tokens < self._lines[slot][-1][0]:
                slots.append(slot)
            seen.add(sequence)
        if not slots:
            return None
        first, found = next_sequence(len(slots)), Branching(self.sequence_ids.copy(), self._lines.copy(), [])
        for sequence, slot in enumerate(slots, first):
            n_tokens = int(self.n_tokens[slot])
            line = tuple(each for each in self._lines[slot] if each[0] < n_tokens)
            found.parents.append((slot, line[-1][1] if line else int(self.sequence_ids[slot])))
            found.lines[slot] = (*line, (n_tokens, sequence))
            found.sequence_ids[slot] = sequence
        return found

    def branch(self, found: Branching) -> None:
        """Let slots go on as other sequences."""
        self.sequence_ids, self._lines, self.is_copy = found.sequence_ids, found.lines, False

    def _put(self, cells: _Int64) -> int:
        """Write cells behind the last place; return the length that includes them."""
        length: int = self.length + cells.shape[1]
        if length > self._cells.shape[1]:
            self._grow(max(length, 2 * self._cells.shape[1]))
        self._cells[:, self.length : length] = cells
        return length

    def _grow(self, capacity: int) -> None:
        grown = np.empty((len(self), capacity), np.int64)
        grown[:, : self.length] = self._cells[:, : self.length]
        self._cells = grown
