"""What lies behind each sequence of a batch: the rows a cache holds, followed through everything done to it."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from strapfmt.errors import CaptureError

__all__ = ["PADDING", "CacheWatcher", "History", "cache_length"]

# What a place of a cache holds if not a row.
PADDING, UNKNOWN = -1, -2
_FIRST_CAPACITY = 64
# Methods of a Hugging Face Cache that move, repeat or remove what it holds.
_WATCHED = ("reorder_cache", "crop", "batch_select_indices", "batch_repeat_interleave")

_Int64 = NDArray[np.int64]


class History:
    """The rows behind a batch, in the layout of its key-value cache: `n_sequences` slots of `length` places.

    Parameters
    ----------
    sequence_ids : ndarray of int64 [n_sequences]
        The sequence in each slot.
    n_prompt : ndarray of int64 [n_sequences]
        Length of each one's prompt.

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
        "_own_from",
        "is_copy",
        "last_row",
        "length",
        "n_prompt",
        "n_tokens",
        "sequence_ids",
    )

    def __init__(self, sequence_ids: _Int64, n_prompt: _Int64) -> None:
        n_sequences = len(sequence_ids)
        self.sequence_ids, self.n_prompt = sequence_ids, n_prompt
        self.n_tokens = np.zeros(n_sequences, np.int64)
        self.last_row = np.full(n_sequences, PADDING, np.int64)
        self.is_copy = False
        self.length = 0
        self._has_padding = False
        self._own_from = 0  # places before this one are those of the copied cache
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
        self._extend(rows)
        self._has_padding |= bool(rows.min(initial=0) == PADDING)
        np.maximum(self.last_row, rows.max(axis=1), out=self.last_row)
        if rows.shape[1] == 1 and rows.min() >= 0:
            self.n_tokens += 1
        else:
            self.n_tokens += (rows >= 0).sum(axis=1)

    def extend_unknown(self, length: int, n_tokens: _Int64) -> None:
        """Grow to `length` places holding `n_tokens` in all, through passes that nobody watched."""
        self._extend(np.full((len(self), length - self.length), UNKNOWN, np.int64))
        self.last_row[:] = UNKNOWN
        self.n_tokens = n_tokens.copy()

    def truncate(self, length: int) -> _Int64:
        """Shrink to `length` places; return the row ids that are lost, sorted, less those the copied cache has."""
        removed = self._cells[:, length : self.length]
        own = removed[:, max(self._own_from - length, 0) :]
        rejected = np.unique(own[own >= 0])
        self.n_tokens -= (removed != PADDING).sum(axis=1)
        self.length = length
        self._own_from = min(self._own_from, length)
        for slot in range(len(self)):
            places = np.flatnonzero(self._cells[slot, :length] != PADDING)
            self.last_row[slot] = self._cells[slot, places[-1]] if places.size else PADDING
        return rejected

    def select(self, slots: _Int64) -> None:
        """Fill the slots anew with copies of the slots numbered in `slots`, as a reordered cache does."""
        self.sequence_ids, self.n_prompt = self.sequence_ids[slots], self.n_prompt[slots]
        self.n_tokens, self.last_row = self.n_tokens[slots], self.last_row[slots]
        self._cells = self._cells[slots]

    def copy(self) -> History:
        """Return the history of a copied cache, whose continuations are sequences of their own."""
        copied = History(self.sequence_ids, self.n_prompt)
        copied.length, copied._cells = self.length, self._cells
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

    def settle(self, next_sequence: Callable[[int], int]) -> list[tuple[int, int]]:
        """Give every slot a sequence of its own, now that its next token is known to come.

        Of several slots with one sequence the first keeps it.

        Parameters
        ----------
        next_sequence : callable
            Given a number, reserves as many sequence ids and returns the first.

        Returns
        -------
        list of (int, int)
            The slots that got a new sequence, and the sequence each of them branched off.
        """
        seen: set[int] = set()
        branched = []
        for slot, sequence in enumerate(self.sequence_ids.tolist()):
            if self.is_copy or sequence in seen:
                branched.append((slot, sequence))
            seen.add(sequence)
        if branched:
            slots = [slot for slot, _ in branched]
            first = next_sequence(len(slots))
            self.sequence_ids[slots] = np.arange(first, first + len(slots))
            self.is_copy = False
        return branched

    def _extend(self, cells: _Int64) -> None:
        length = self.length + cells.shape[1]
        if length > self._cells.shape[1]:
            grown = np.empty((len(self), max(length, 2 * self._cells.shape[1])), np.int64)
            grown[:, : self.length] = self._cells[:, : self.length]
            self._cells = grown
        self._cells[:, self.length : length] = cells
        self.length = length


class CacheWatcher:
    """Remembers the history behind each cache object, and follows what is done to the cache between passes.

    A watched cache carries wrappers of its own methods as attributes until it dies or `close` is called. It is held
    weakly: watching keeps no memory of the model alive.

    Parameters
    ----------
    on_rejected : callable
        Called with the row ids (int64, sorted) that a crop took out of a history.
    """

    def __init__(self, on_rejected: Callable[[_Int64], None]) -> None:
        self._on_rejected = on_rejected
        self._entries: dict[int, tuple[Callable[[], Any], History]] = {}

    def find(self, cache: Any) -> History | None:
        """Return the history behind `cache`, or None if it is new."""
        reference, history = self._entries.get(id(cache), (None, None))
        return history if reference is not None and reference() is cache else None

    def watch(self, cache: Any, history: History) -> None:
        """Remember that `history` is behind `cache`, and follow it."""
        key = id(cache)
        if self.find(cache) is None:
            for name in _WATCHED:
                if callable(getattr(cache, name, None)):
                    _Wrapper(self, _reference(cache), name).attach(cache)
            self._entries[key] = (_reference(cache, lambda _: self._entries.pop(key, None)), history)
        else:
            self._entries[key] = (self._entries[key][0], history)

    def close(self) -> None:
        """Take every wrapper off again."""
        for reference, _ in list(self._entries.values()):
            cache = reference()
            if cache is not None:
                for name in _WATCHED:
                    wrapper = vars(cache).get(name)
                    if isinstance(wrapper, _Wrapper) and wrapper.watcher is self:
                        wrapper.detach(cache)
        self._entries.clear()

    def changed(self, cache: Any, name: str, argument: Any) -> None:
        """Follow one call of a watched method that has just succeeded."""
        history = self.find(cache)
        if history is None:
            return
        if name == "crop":
            length = cache_length(cache)
            if length is not None and length < history.length:
                self._on_rejected(history.truncate(length))
        elif name == "batch_repeat_interleave":
            history.select(np.repeat(np.arange(len(history)), int(argument)))
        else:
            history.select(_indices(argument))

    def copied(self, cache: Any, copy: Any) -> None:
        """Follow a deep copy of a watched cache; the copy brings its wrappers along."""
        history = self.find(cache)
        if history is not None and self.find(copy) is None:
            key = id(copy)
            self._entries[key] = (
                _reference(copy, lambda _: self._entries.pop(key, None)),
                history.copy(),
            )


class _Wrapper:
    """A cache's method, called first and then reported; an attribute of the cache that shadows the method."""

    __slots__ = ("_inner", "_name", "_reference", "watcher")

    def __init__(self, watcher: CacheWatcher, reference: Callable[[], Any], name: str) -> None:
        self.watcher, self._reference, self._name = watcher, reference, name
        # An attribute found in the place of this one: another watcher's.
        self._inner: Callable[..., Any] | None = None

    def attach(self, cache: Any) -> None:
        self._inner = vars(cache).get(self._name)
        setattr(cache, self._name, self)

    def detach(self, cache: Any) -> None:
        if self._inner is None:
            delattr(cache, self._name)
        else:
            setattr(cache, self._name, self._inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._reference()
        if cache is None:
            raise CaptureError(
                f"{self._name}: the cache this belongs to is gone; copy a cache that is being captured with "
                "copy.deepcopy, not copy.copy"
            )
        method = self._inner or types.MethodType(getattr(type(cache), self._name), cache)
        result = method(*args, **kwargs)
        self.watcher.changed(cache, self._name, next(iter((*args, *kwargs.values())), None))
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        cache = self._reference()
        copied = memo.get(id(cache))
        if copied is None:
            return self
        self.watcher.copied(cache, copied)
        wrapper = _Wrapper(self.watcher, _reference(copied), self._name)
        wrapper._inner = deepcopy(self._inner, memo)
        return wrapper

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._reference(), self._name)


def cache_length(cache: Any) -> int | None:
    """Places a cache holds, padding included, or None if it does not say (state-space models)."""
    get_length = getattr(cache, "get_seq_length", None)
    if get_length is None:
        return None
    try:
        return int(get_length())
    except ValueError:  # raised by a cache without attention layers
        return None


def _indices(argument: Any) -> _Int64:
    array = argument.cpu().numpy() if isinstance(argument, torch.Tensor) else np.asarray(argument)
    return np.flatnonzero(array) if array.dtype == bool else array.astype(np.int64, copy=False)


def _reference(cache: Any, on_death: Callable[[Any], Any] | None = None) -> Callable[[], Any]:
    try:
        return weakref.ref(cache, on_death)
    except TypeError:  # a class without weak references: keep it, so that its id stays its own
        return lambda: cache
