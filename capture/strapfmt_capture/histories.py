"""What lies behind each sequence of a batch: the rows a cache holds, followed through everything done to it."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import copy, deepcopy
from functools import lru_cache, wraps
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["PADDING", "CacheWatcher", "History", "cache_length"]

# What a place of a cache holds if not a row.
PADDING, UNKNOWN = -1, -2
_FIRST_CAPACITY = 64
# Methods of a Hugging Face Cache that move, repeat or remove what it holds.
_WATCHED = ("reorder_cache", "crop", "batch_select_indices", "batch_repeat_interleave")

_Int64 = NDArray[np.int64]


class History:
    """The rows behind a batch, in the layout of its key-value cache: `n_sequences` slots of `length` places.

    The arrays that are attributes are exchanged, not changed: steps keep those of their time. What changes together is
    exchanged by one statement, which an interrupt cannot cut in two.

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
        length = self._put(np.full((len(self), length - self.length), UNKNOWN, np.int64))
        last_row, n_tokens = np.full(len(self), UNKNOWN, np.int64), n_tokens.copy()
        self.length, self.last_row, self.n_tokens = length, last_row, n_tokens

    def truncate(self, length: int) -> _Int64:
        """Shrink to `length` places; return the row ids that are lost, sorted, less those the copied cache has."""
        removed = self._cells[:, length : self.length]
        own = removed[:, max(self._own_from - length, 0) :]
        rejected = np.unique(own[own >= 0])
        n_tokens = self.n_tokens - (removed != PADDING).sum(axis=1)
        own_from, last_row = min(self._own_from, length), self.last_row.copy()
        for slot in range(len(self)):
            places = np.flatnonzero(self._cells[slot, :length] != PADDING)
            last_row[slot] = self._cells[slot, places[-1]] if places.size else PADDING
        self.length, self.last_row, self.n_tokens, self._own_from = length, last_row, n_tokens, own_from
        return rejected

    def select(self, slots: _Int64) -> None:
        """Fill the slots anew with copies of the slots numbered in `slots`, as a reordered cache does."""
        self.sequence_ids, self.n_prompt = self.sequence_ids[slots], self.n_prompt[slots]
        self.tags = self.tags[slots]
        self.n_tokens, self.last_row = self.n_tokens[slots], self.last_row[slots]
        self._cells = self._cells[slots]
        self._lines = [self._lines[slot] for slot in slots.tolist()]

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

    def settle(self, next_sequence: Callable[[int], int]) -> list[tuple[int, int]]:
        """Give every slot a sequence of its own, now that its next token is known to come.

        Of several slots with one sequence the first keeps it. One that was cut behind the place where its sequence
        had branched off branches anew, from the sequence of the token that is now its last.

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
        slots = []
        for slot, (sequence, n_tokens) in enumerate(
            zip(self.sequence_ids.tolist(), self.n_tokens.tolist(), strict=True)
        ):
            if self.is_copy or sequence in seen or n_tokens < self._lines[slot][-1][0]:
                slots.append(slot)
            seen.add(sequence)
        self.is_copy = False
        if not slots:
            return []
        first = next_sequence(len(slots))
        self.sequence_ids = self.sequence_ids.copy()
        return [(slot, self._branch(slot, first + number)) for number, slot in enumerate(slots)]

    def _branch(self, slot: int, sequence: int) -> int:
        """Let a slot go on as another sequence; return the one that its last token is of."""
        n_tokens = int(self.n_tokens[slot])
        line = tuple(each for each in self._lines[slot] if each[0] < n_tokens)
        self._lines[slot] = (*line, (n_tokens, sequence))
        parent = line[-1][1] if line else int(self.sequence_ids[slot])
        self.sequence_ids[slot] = sequence
        return parent

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


class CacheWatcher:
    """Remembers the history behind each cache object, and follows what is done to the cache between passes.

    A watched cache is an instance of a subclass of its own class, which reports its changes, until it dies or the
    last watcher that follows it is closed; nothing is stored in it. It is held weakly: watching keeps no memory of
    the model alive. A cache whose class cannot be subclassed or exchanged (one written in C, say) is remembered all
    the same: its length then tells of a crop before the next pass, and nothing tells of a reordering.

    Code that asks `type(cache) is DynamicCache`, not `isinstance`, can tell. transformers 5.23 does so where `generate`
    chooses to compile (on CUDA, for a model with nothing but linear attention) and where assisted generation refuses a
    `StaticCache`; both look at a cache that an earlier call has filled.

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
            reference = _reference(cache, lambda _: self._forget(key))
        else:
            reference = self._entries[key][0]
        self._entries[key] = reference, history
        _active[id(self)] = self
        _follow(cache)

    def close(self) -> None:
        """Forget every cache; one that no other watcher follows is of its own class again."""
        caches = [reference() for reference, _ in list(self._entries.values())]
        self._entries.clear()
        _active.pop(id(self), None)
        for cache in caches:
            if all(watcher.find(cache) is None for watcher in list(_active.values())):
                _unfollow(cache)

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

    def copied(self, cache: Any, copied: Any) -> None:
        """Follow a deep copy of a watched cache."""
        history = self.find(cache)
        if history is not None and self.find(copied) is None:
            self.watch(copied, history.copy())

    def _forget(self, key: int) -> None:
        self._entries.pop(key, None)
        if not self._entries:
            _active.pop(id(self), None)


# By id: every watcher that remembers a cache which is still alive, and every cache that is inside a watched method.
_active: dict[int, CacheWatcher] = {}
_changing: set[int] = set()
# Where the class of a followed cache keeps the cache's own class.
_ORIGINAL = "_strapfmt_original"
# Goes past a `__class__` or a `__setattr__` of the cache's own.
_set_class = vars(object)["__class__"].__set__


def _follow(cache: object) -> None:
    if not _is_followed(cache):
        with suppress(TypeError):  # a class that allows no subclass, or an object that keeps its class
            _set_class(cache, _followed_class(type(cache)))  # type: ignore[arg-type] # classes are hashable


def _unfollow(cache: Any) -> None:
    if _is_followed(cache):
        _set_class(cache, _original(cache))


def _is_followed(cache: Any) -> bool:
    return _ORIGINAL in vars(type(cache))


def _original(cache: Any) -> Any:
    return getattr(type(cache), _ORIGINAL)


@contextmanager
def _of_its_own_class(cache: Any) -> Iterator[None]:
    followed = type(cache)
    _set_class(cache, _original(cache))
    try:
        yield
    finally:
        _set_class(cache, followed)


@lru_cache(maxsize=64)
def _followed_class(original: type) -> type:
    """Make the subclass of `original` whose instances report what is done to them.

    Whatever makes another object out of a followed cache is done by the cache's own class, so that the result is of
    that class, here and wherever it is unpickled.
    """
    namespace = {
        "__slots__": (),  # or the layout would differ, and no cache could become one
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__class__": property(_original),  # pickle compares it with the class that it is to store
        "__init__": _init,
        "__copy__": _copy,
        "__deepcopy__": _deepcopy,
        "__reduce_ex__": _reduce,
        _ORIGINAL: original,
    }
    for name in _WATCHED:
        if callable(getattr(original, name, None)):
            namespace[name] = _reporting(original, name)
    return types.new_class(original.__name__, (original,), {}, lambda body: body.update(namespace))


def _reporting(original: type, name: str) -> Callable[..., Any]:
    @wraps(getattr(original, name))
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(original, name)
        if id(self) in _changing:  # part of a change that is reported as a whole
            return method(self, *args, **kwargs)
        _changing.add(id(self))
        try:
            result = method(self, *args, **kwargs)
        finally:
            _changing.remove(id(self))
        argument = next(iter((*args, *kwargs.values())), None)
        for watcher in list(_active.values()):
            watcher.changed(self, name, argument)
        return result

    return call


def _init(self: Any, *args: Any, **kwargs: Any) -> None:
    _unfollow(self)  # `type(cache)(...)` asks for another cache of that kind
    self.__init__(*args, **kwargs)


def _copy(self: Any) -> Any:
    with _of_its_own_class(self):
        return copy(self)


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    with _of_its_own_class(self):
        copied = deepcopy(self, memo)
    for watcher in list(_active.values()):
        watcher.copied(self, copied)
    return copied


def _reduce(self: Any, protocol: Any) -> Any:
    with _of_its_own_class(self):
        return self.__reduce_ex__(protocol)


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
