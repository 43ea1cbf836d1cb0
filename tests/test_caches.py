"""Following a cache: what is reported, and that the cache behaves and ends as if nobody had followed it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from models import tiny_model
from transformers import AutoConfig, DynamicCache, EncoderDecoderCache, StaticCache

import strapfmt
from strapfmt.reader import Reader
from strapfmt_capture.caches import CacheWatcher
from strapfmt_capture.histories import History
from strapfmt_capture.inputs import read_inputs
from strapfmt_capture.passes import Step, token_columns
from strapfmt_capture.rows import RowTracker

Reported = tuple[object, str, object]
CONFIG = AutoConfig.for_model(
    "llama", hidden_size=8, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2
)
KINDS = ["dynamic", "static", "encoder-decoder"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]])


class Watcher(CacheWatcher):
    """A watcher that notes what is reported of the caches it follows, and keeps the histories as they are."""

    def __init__(self) -> None:
        super().__init__(lambda rows: None)
        self.reported: list[Reported] = []

    def changed(self, cache: Any, name: str, argument: Any) -> None:
        if self.find(cache) is not None:
            self.reported.append((cache, name, argument))


@pytest.fixture
def watch() -> Iterator[Callable[..., Watcher]]:
    """Make a watcher of some caches, closed after the test."""
    made: list[Watcher] = []

    def watch(*caches: Any) -> Watcher:
        made.append(Watcher())
        for cache in caches:
            made[-1].watch(cache, history())
        return made[-1]

    yield watch
    for watcher in made:
        watcher.close()


def history() -> History:
    """Two sequences of four rows."""
    made = History(np.arange(2), np.full(2, 4))
    made.append(np.arange(8).reshape(2, 4))
    return made


def cache_of(kind: str) -> Any:
    """A cache of two sequences, four places each."""
    if kind == "encoder-decoder":
        return EncoderDecoderCache(cache_of("dynamic"), cache_of("dynamic"))
    if kind == "static":
        cache: Any = StaticCache(config=CONFIG, max_cache_len=8)
    else:
        cache = DynamicCache(config=CONFIG)
    for layer in range(2):
        keys = torch.arange(32.0).reshape(2, 1, 4, 4) + layer
        cache.update(keys, -keys, layer)
    return cache


def keys_of(cache: Any) -> list[torch.Tensor]:
    decoder = getattr(cache, "self_attention_cache", cache)
    return [layer.keys.clone() for layer in decoder.layers]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Doubler(DynamicCache):
    """A cache whose methods go through each other."""

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.batch_select_indices(torch.arange(2))
        self.reorder_cache(torch.arange(2))


class Slotted:
    """A cache without a `__dict__` and without weak references."""

    __slots__ = ("length",)

    def __init__(self, length: int = 4) -> None:
        self.length = length

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "length":
            raise AttributeError(name)
        object.__setattr__(self, name, value)

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, length: int) -> None:
        self.length = length


class _Final(type):
    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
        if bases:
            raise TypeError(f"{bases[0].__name__} is final")
        return super().__new__(mcs, name, bases, namespace)


class Final(metaclass=_Final):
    """A cache whose class refuses to be followed."""

    def __init__(self) -> None:
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, length: int) -> None:
        self.length = length


# What is reported.


@pytest.mark.parametrize("kind", ["dynamic", "encoder-decoder"])
def test_every_change_is_reported_to_every_watcher(kind: str, watch: Callable[..., Watcher]) -> None:
    cache, plain = cache_of(kind), cache_of(kind)
    watchers = [watch(cache), watch(cache), watch(cache_of(kind))]
    order = torch.tensor([1, 0])
    for each in (cache, plain):
        each.crop(-1)
        each.reorder_cache(beam_idx=order)
        each.batch_repeat_interleave(2)
        each.batch_select_indices(order)
    expected: list[Reported] = [
        (cache, "crop", -1),
        (cache, "reorder_cache", order),
        (cache, "batch_repeat_interleave", 2),
        (cache, "batch_select_indices", order),
    ]
    assert [watcher.reported for watcher in watchers] == [expected, expected, []]
    assert same(keys_of(cache), keys_of(plain))


def test_a_static_cache_is_reordered_and_reported(watch: Callable[..., Watcher]) -> None:
    cache = cache_of("static")
    watcher, keys, order = watch(cache), keys_of(cache), torch.tensor([1, 0])
    cache.reorder_cache(order)
    assert watcher.reported == [(cache, "reorder_cache", order)]
    assert same(keys_of(cache), [layer[order] for layer in keys])


def test_a_change_made_of_other_changes_is_reported_once(watch: Callable[..., Watcher]) -> None:
    cache = Doubler(config=CONFIG)
    cache.update(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4), 0)
    watcher = watch(cache)
    cache.crop(-1)
    assert watcher.reported == [(cache, "crop", -1)]
    cache.reorder_cache(torch.arange(2))
    assert [name for _, name, _ in watcher.reported] == ["crop", "reorder_cache"]


def test_a_part_that_is_followed_too_reports_for_itself(watch: Callable[..., Watcher]) -> None:
    whole = cache_of("encoder-decoder")
    watcher = watch(whole, whole.self_attention_cache)
    whole.crop(-1)
    assert watcher.reported == [(whole.self_attention_cache, "crop", -1), (whole, "crop", -1)]


def test_a_change_that_failed_is_not_reported(watch: Callable[..., Watcher]) -> None:
    cache, plain = cache_of("dynamic"), cache_of("dynamic")
    watcher = watch(cache)
    errors = []
    for each in (cache, plain):
        with pytest.raises(IndexError) as caught:
            each.reorder_cache(torch.tensor([5, 6]))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert watcher.reported == []
    cache.crop(-1)
    assert len(watcher.reported) == 1


def test_a_cache_with_slots_is_followed(watch: Callable[..., Watcher]) -> None:
    cache = Slotted()
    watcher = watch(cache)
    cache.crop(2)
    assert watcher.reported == [(cache, "crop", 2)]
    watcher.close()
    assert type(cache) is Slotted


def test_a_class_that_refuses_is_left_alone_and_known_by_its_length() -> None:
    cache, ids = Final(), {"row": 0, "step": 0, "sequence": 0}

    def reserve(kind: str, n: int) -> int:
        ids[kind] += n
        return ids[kind] - n

    def step(tokens: torch.Tensor) -> Step:
        module = torch.nn.Identity()
        return tracker.begin(module, read_inputs(module, {"input_ids": tokens, "past_key_values": cache}))

    tracker = RowTracker(reserve=reserve)
    step(IDS[:, :4])
    cache.length = 4
    cache.crop(2)
    assert type(cache) is Final
    assert tracker.take_events() is None
    after = step(IDS[:, :1])
    assert after.events is not None
    assert list(after.events["row"]) == [2, 3, 6, 7]
    assert pa.array(token_columns([after])["parent_row"]).to_pylist() == [1, 5]
    tracker.close()
    assert type(cache) is Final


# What a followed cache is to everybody else.


@pytest.mark.parametrize("kind", KINDS)
def test_a_followed_cache_looks_like_any_other(kind: str, watch: Callable[..., Watcher]) -> None:
    cache, plain = cache_of(kind), cache_of(kind)
    held = dict(vars(cache))
    watch(cache)
    assert isinstance(cache, type(plain))
    assert cache.__class__ is type(plain)
    assert vars(cache) == held
    assert (type(cache).__name__, type(cache).__qualname__) == (
        type(plain).__name__,
        type(plain).__qualname__,
    )
    assert (type(cache).__module__, type(cache).__doc__) == (type(plain).__module__, type(plain).__doc__)
    assert repr(cache) == repr(plain)
    assert cache.crop.__name__ == "crop"
    for name in ("is_compileable", "is_croppable", "is_initialized", "is_sliding"):
        if kind != "encoder-decoder" or name != "is_initialized":
            assert getattr(cache, name) == getattr(plain, name)


def test_another_cache_of_the_same_type_is_an_ordinary_one(watch: Callable[..., Watcher]) -> None:
    cache = cache_of("static")
    watch(cache)
    other = type(cache)(config=CONFIG, max_cache_len=4)
    assert type(other) is StaticCache
    assert other.get_max_length() == 4


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_and_saved_files_hold_the_class_of_the_library(
    kind: str, watch: Callable[..., Watcher]
) -> None:
    cache = cache_of(kind)
    watcher, own = watch(cache), cache_of(kind).__class__
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        stored = pickle.dumps(cache, protocol)
        assert b"strapfmt" not in stored
        loaded = pickle.loads(stored)  # noqa: S301 - our own bytes
        assert type(loaded) is own
        assert same(keys_of(loaded), keys_of(cache))
        assert watcher.find(loaded) is None
    file = io.BytesIO()
    torch.save({"cache": cache}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)["cache"]
    assert type(loaded) is own
    assert watcher.find(cache) is not None
    cache.reorder_cache(torch.tensor([1, 0]))
    assert len(watcher.reported) == 1


# Copies.


@pytest.mark.parametrize("kind", KINDS)
def test_a_shallow_copy_is_nobodys(kind: str, watch: Callable[..., Watcher]) -> None:
    cache = cache_of(kind)
    watcher = watch(cache)
    copied = copy.copy(cache)
    assert type(copied) is cache.__class__
    assert vars(copied) == vars(cache)
    assert watcher.find(copied) is None
    copied.reorder_cache(torch.tensor([1, 0]))
    assert watcher.reported == []
    cache.reorder_cache(torch.tensor([1, 0]))
    assert len(watcher.reported) == 1


def test_changing_a_shallow_copy_leaves_the_cache_it_was_made_of(watch: Callable[..., Watcher]) -> None:
    cache = cache_of("dynamic")
    watcher, keys = watch(cache), keys_of(cache)
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.crop(-3)
    assert (cache.get_seq_length(), branch.get_seq_length()) == (4, 1)
    assert same(keys_of(cache), keys)
    assert watcher.reported == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_deep_copy_is_followed_by_the_same_watchers(kind: str, watch: Callable[..., Watcher]) -> None:
    cache = cache_of(kind)
    watchers = [watch(cache), watch(cache), watch()]
    keys, copied = keys_of(cache), copy.deepcopy(cache)
    copied.reorder_cache(torch.tensor([1, 0]))
    assert same(keys_of(cache), keys)
    assert [len(watcher.reported) for watcher in watchers] == [1, 1, 0]
    for watcher in watchers[:2]:
        behind = watcher.find(copied)
        assert behind is not None
        assert behind is not watcher.find(cache)
        assert behind.is_copy
        assert (behind.length, len(behind)) == (4, 2)
    assert watchers[2].find(copied) is None
    for watcher in watchers:
        watcher.close()
    assert type(copied) is type(cache) is type(cache_of(kind))


def test_a_deep_copy_of_what_holds_the_cache_twice_has_one_copy(watch: Callable[..., Watcher]) -> None:
    cache = cache_of("dynamic")
    watcher = watch(cache)
    holder = copy.deepcopy({"list": [cache, cache], "whole": EncoderDecoderCache(cache, cache_of("dynamic"))})
    first, second = holder["list"]
    assert first is second is holder["whole"].self_attention_cache
    assert first is not cache
    assert watcher.find(first) is not None
    assert len(watcher._entries) == 2
    first.crop(-1)
    assert watcher.reported == [(first, "crop", -1)]
    watcher.close()
    assert type(first) is DynamicCache


def test_a_deep_copy_of_a_cache_that_leads_back_to_itself(watch: Callable[..., Watcher]) -> None:
    cache = cache_of("dynamic")
    cache.layers[0].owner = cache
    watcher = watch(cache)
    copied = copy.deepcopy(cache)
    assert copied.layers[0].owner is copied
    assert watcher.find(copied) is not None
    assert watcher.find(cache) is not None


def test_a_deep_copy_that_fails_leaves_the_cache_followed(watch: Callable[..., Watcher]) -> None:
    cache = cache_of("dynamic")
    cache.stream = (i for i in range(3))  # cannot be copied
    watcher = watch(cache)
    with pytest.raises(TypeError, match="generator"):
        copy.deepcopy(cache)
    with pytest.raises(TypeError, match="generator"):
        pickle.dumps(cache)
    cache.crop(-1)
    assert len(watcher.reported) == 1


def test_a_cache_that_copies_itself_its_own_way(watch: Callable[..., Watcher]) -> None:
    class Own(DynamicCache):
        def __copy__(self) -> Own:
            return type(self)(config=CONFIG)

        def __deepcopy__(self, memo: dict[int, Any]) -> Own:
            made = type(self)(config=CONFIG)
            made.mark = "own way"
            return made

    cache = Own(config=CONFIG)
    watcher = watch(cache)
    copied = copy.deepcopy(cache)
    assert copied.mark == "own way"
    assert watcher.find(copied) is not None
    assert type(copy.copy(cache)) is Own
    watcher.close()
    assert type(copied) is type(cache) is Own


# How it ends.


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_watcher_to_close_leaves_the_cache_as_it_was(
    kind: str, order: tuple[int, int], watch: Callable[..., Watcher]
) -> None:
    cache = cache_of(kind)
    own, held = type(cache), dict(vars(cache))
    watchers = [watch(cache), watch(cache)]
    watchers[order[0]].close()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert [len(watchers[i].reported) for i in order] == [0, 1]
    watchers[order[1]].close()
    assert type(cache) is own
    assert vars(cache) == held
    watchers[order[1]].close()  # once more does nothing
    cache.reorder_cache(torch.tensor([1, 0]))
    assert [len(watchers[i].reported) for i in order] == [0, 1]


def test_a_followed_cache_is_not_kept_and_not_remembered(watch: Callable[..., Watcher]) -> None:
    cache = cache_of("dynamic")
    watcher = watch(cache)
    gc.disable()
    try:
        references = [weakref.ref(cache), weakref.ref(copy.deepcopy(cache)), weakref.ref(copy.copy(cache))]
        del cache
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()
    assert not watcher._entries


def test_a_watcher_of_nothing_is_not_kept() -> None:
    watcher, cache = Watcher(), cache_of("dynamic")
    watcher.watch(cache, history())
    reference = weakref.ref(watcher)
    del cache, watcher  # never closed, but its cache is gone
    gc.collect()
    assert reference() is None


# Through `strapfmt.capture`, beside a model that nobody watches.


def forked(model: torch.nn.Module) -> list[torch.Tensor]:
    """Logits of a prompt, of a token after a shallow copy that was cropped, and of one after the whole prompt."""
    cache = DynamicCache(config=model.config)
    logits = [model(IDS, past_key_values=cache).logits]
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.crop(-3)
    for each in (branch, cache):
        logits.append(model(IDS[:, :1], past_key_values=each).logits)
    assert (branch.get_seq_length(), cache.get_seq_length()) == (4, 7)
    return logits


@torch.no_grad()
def test_a_shallow_copy_under_capture_gives_what_the_bare_model_gives(tmp_path: Path) -> None:
    model = tiny_model("llama")
    plain = forked(model)
    with strapfmt.capture(model, tmp_path / "x.strap", sites="logits", quiet=True):
        captured = forked(model)
    assert same(captured, plain)
    reader = Reader(tmp_path / "x.strap")
    assert reader.row_events.to_arrow().num_rows == 0  # nothing was taken out of a cache that capture knew
    tokens = reader.tokens.to_arrow().to_pylist()
    assert [row["parent_row"] for row in tokens[-2:]] == [5, 11]
    assert [row["position"] for row in tokens[-2:]] == [6, 6]


@torch.no_grad()
def test_captures_that_overlap_leave_the_cache_as_the_bare_model_does(tmp_path: Path) -> None:
    model = tiny_model("llama")

    def drive(cache: DynamicCache) -> list[torch.Tensor]:
        logits = [model(IDS, past_key_values=cache).logits]
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-2)
        return [*logits, model(IDS[:, :1], past_key_values=cache).logits]

    bare, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    plain = drive(bare)
    first, second = (
        strapfmt.capture(model, tmp_path / f"{name}.strap", sites="logits", quiet=True) for name in "ab"
    )
    first.__enter__()
    second.__enter__()
    captured = drive(cache)
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert same(captured, plain)
    assert type(cache) is DynamicCache
    assert set(vars(cache)) == set(vars(bare))
    assert same(keys_of(cache), keys_of(bare))
    for name in "ab":
        reader = Reader(tmp_path / f"{name}.strap")
        assert [row["parent_row"] for row in reader.tokens.to_arrow().to_pylist()[-2:]] == [9, 3]
        assert sorted(reader.row_events.to_arrow()["row"].to_pylist()) == [4, 5, 10, 11]


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_a_capture_that_failed_leaves_the_cache_as_it_was(implementation: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    cache: Any = (
        DynamicCache(config=model.config)
        if implementation == "dynamic"
        else StaticCache(config=model.config, max_cache_len=16)
    )
    own, held = type(cache), set(vars(cache))

    def fail() -> None:
        with strapfmt.capture(model, tmp_path / "x.strap", sites="logits", quiet=True):
            model(IDS, past_key_values=cache)
            raise KeyError("a mistake of the user's")

    with pytest.raises(KeyError):
        fail()
    assert type(cache) is own
    assert set(vars(cache)) == held
