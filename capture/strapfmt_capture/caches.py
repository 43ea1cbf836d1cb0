"""The caches that a model keeps between passes: the history behind each, followed through everything done to it."""

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

from strapfmt_capture.histories import History

__all__ = ["CacheWatcher", "cache_length"]

# Methods of a Hugging Face Cache that move, repeat or remove what it holds.
_WATCHED = ("reorder_cache", "crop", "batch_select_indices", "batch_repeat_interleave")

_Int64 = NDArray[np.int64]


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
                history.truncate(length, self._on_rejected)
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
