"""Rows of every way to drive a model, captured to disk and held against an oracle that knows nothing of strapfmt."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import EOS, N_LAYERS, PAD, tiny_model
from row_oracle import Spy, Stored, check_rows, real_places, without_cache
from test_rows import padded, prompts
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import strapfmt

SITE = f"blocks.{N_LAYERS - 1}.resid_post"
# gemma2: layers with and without a window of 8; mistral: all with one. Both are shorter than the texts.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},
    "gemma2": {},
    "mistral": {"sliding_window": 6},
}
# What makes random weights repeat themselves, and never end or write padding.
GREEDY = {"do_sample": False, "suppress_tokens": [PAD, EOS]}
SAMPLED = {"do_sample": True, "suppress_tokens": [PAD, EOS]}
Texts = list[list[int]]
Way = Callable[[PreTrainedModel], Texts]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def captured(
    model: PreTrainedModel, way: Way, folder: Path, site: str, block: torch.nn.Module
) -> tuple[Stored, Spy, Texts]:
    """Drive a model in some way, captured and watched; return what is stored, what was seen, and what it returned."""
    spy = Spy(model.get_input_embeddings(), block)
    try:
        with strapfmt.capture(model, folder / "rows.strap", sites=site, stats=False, quiet=True):
            returned = way(model)
    finally:
        spy.close()
    return Stored(folder / "rows.strap", site), spy, returned


def fed(ids: torch.Tensor) -> torch.Tensor:
    """Places that are no padding before a text; what a text that has ended is fed is processed like any token."""
    return real_places(ids) if ids.shape[1] > 1 else torch.ones_like(ids, dtype=torch.bool)


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param, **FAMILIES[request.param])


def block_of(model: PreTrainedModel) -> torch.nn.Module:
    blocks = model.transformer.h if model.config.model_type == "gpt2" else model.model.layers
    return blocks[-1]


def texts_of(ids: torch.Tensor) -> Texts:
    """Rows of ids without their padding."""
    return [[each for each in row if each != PAD] for row in ids.tolist()]


def generated(side: str = "left", lengths: tuple[int, ...] = (9, 4), n: int = 6, **options: Any) -> Way:
    def run(model: PreTrainedModel) -> Texts:
        inputs = padded(prompts(*lengths), side)
        return texts_of(model.generate(**inputs, max_new_tokens=n, **{**GREEDY, **options}))

    return run


def ended(**options: Any) -> Way:
    """Texts end early, while others in their batch go on; what follows an end is not a part of them."""
    ends = range(30, 101)

    def run(model: PreTrainedModel) -> Texts:
        lengths = (9, 4, 6)
        inputs = padded(prompts(*lengths))
        ids = model.generate(**inputs, max_new_tokens=10, eos_token_id=list(ends), **{**GREEDY, **options})
        texts = []
        for row, length in zip(ids.tolist(), lengths, strict=True):
            said = row[9:]
            n_said = next((place for place, each in enumerate(said, 1) if each in ends), len(said))
            texts.append(row[9 - length : 9 + n_said])
        return texts

    return run


def assisted(model: PreTrainedModel) -> Texts:
    family = model.config.model_type
    assistant = tiny_model(family, **FAMILIES[family])
    for parameter in assistant.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids = torch.tensor(prompts(5))
    return texts_of(model.generate(ids, assistant_model=assistant, max_new_tokens=12, **GREEDY))


def looked_up(model: PreTrainedModel) -> Texts:
    ids = torch.tensor([[7, 8, 9, 10, 7, 8, 9, 11, 7, 8]])
    return texts_of(model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=12, **GREEDY))


def by_own_code(model: PreTrainedModel) -> Texts:
    """`custom_generate`: a loop of the user's inside `generate`."""

    def loop(
        model: Any, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, **kwargs: Any
    ) -> torch.Tensor:
        cache, ids = DynamicCache(config=model.config), input_ids
        for _ in range(4):
            past = cache.get_seq_length()
            logits = model(ids[:, past:], past_key_values=cache).logits[:, -1]
            ids = torch.cat([ids, logits_processor(ids, logits).argmax(-1, keepdim=True)], dim=1)
        return ids

    ids = torch.tensor(prompts(7, 7))
    return texts_of(model.generate(ids, custom_generate=loop, max_new_tokens=4, **GREEDY))


def continued(model: PreTrainedModel) -> Texts:
    """A conversation: `generate` goes on with the cache of the turn before."""
    first = model.generate(torch.tensor(prompts(6)), max_new_tokens=4, return_dict_in_generate=True, **GREEDY)
    said = torch.cat([first.sequences, torch.tensor(prompts(5, seed=1))], dim=1)
    second = model.generate(said, past_key_values=first.past_key_values, max_new_tokens=4, **GREEDY)
    return [*texts_of(first.sequences), *texts_of(second)]


def looped(*, use_cache: bool = True) -> Way:
    """`model(...)` token by token, as a person would write it."""

    def run(model: PreTrainedModel) -> Texts:
        ids, cache = torch.tensor(prompts(7, 7)), None
        for _ in range(6):
            given = ids if cache is None else ids[:, -1:]
            output = model(given, past_key_values=cache, use_cache=use_cache)
            cache = output.past_key_values if use_cache else None
            logits = output.logits[:, -1].clone()
            logits[:, PAD] = float("-inf")
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        return texts_of(ids)

    return run


def shrinking(model: PreTrainedModel) -> Texts:
    """Texts that have ended leave the batch, and its cache."""
    ids, cache, done = torch.tensor(prompts(6, 6, 6)), DynamicCache(), []
    given = ids
    for drop in (None, 1, None, 0, None):
        logits = model(given, past_key_values=cache).logits[:, -1]
        ids = torch.cat([ids, logits[:, 3:].argmax(-1, keepdim=True) + 3], dim=1)
        if drop is not None:
            kept = [place for place in range(len(ids)) if place != drop]
            done.append(ids[drop].tolist())
            ids = ids[kept]
            cache.batch_select_indices(torch.tensor(kept))
        given = ids[:, -1:]
    return [*done, *ids.tolist()]


def branched(model: PreTrainedModel) -> Texts:
    """One prompt, read once; copies of its cache go on with different texts, one of them after a crop."""
    prompt, cache = prompts(8)[0], DynamicCache()
    model(torch.tensor([prompt]), past_key_values=cache)
    other, third = copy.deepcopy(cache), copy.deepcopy(cache)
    third.crop(-3)
    said = []
    for start, each in ((prompt, cache), (prompt, other), (prompt[:-3], third)):
        more = prompts(3, seed=len(said) + 5)[0]
        model(torch.tensor([more[:2]]), past_key_values=each)
        model(torch.tensor([more[2:]]), past_key_values=each)
        said.append([*start, *more, 4])
    return said


def repeated(model: PreTrainedModel) -> Texts:
    """What contrastive search does: every text is repeated, and one of each candidates' rows is chosen."""
    ids, cache = torch.tensor(prompts(6, 6)), DynamicCache()
    logits = model(ids, past_key_values=cache).logits[:, -1, 3:]
    for _ in range(3):
        candidates = logits.topk(3).indices.reshape(-1, 1) + 3
        cache.batch_repeat_interleave(3)
        logits = model(candidates, past_key_values=cache).logits[:, -1, 3:]
        chosen = torch.tensor([1, 5])
        cache.batch_select_indices(chosen)
        ids, logits = torch.cat([ids, candidates[chosen]], dim=1), logits[chosen]
    return [[*row, 4] for row in ids.tolist()]


def in_pieces(model: PreTrainedModel) -> Texts:
    """A padded batch read in pieces of three through one cache, the mask growing with them."""
    inputs, cache = padded(prompts(8, 5)), DynamicCache()
    for end in (3, 6, 8):
        mask = inputs["attention_mask"][:, :end]
        start = cache.get_seq_length()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]
        model(
            inputs["input_ids"][:, start:end],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
        )
    return [[*text, 4] for text in texts_of(inputs["input_ids"])]


def packed(model: PreTrainedModel) -> Texts:
    lengths = (5, 3, 6)
    said = prompts(*lengths)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    model(torch.tensor([[*said[0], *said[1], *said[2]]]), position_ids=positions, use_cache=False)
    return [[*text, 4] for text in said]


def several_calls(model: PreTrainedModel) -> Texts:
    said: Texts = []
    for seed, side in enumerate(("left", "right", "left")):
        inputs = padded(prompts(4, 7, seed=seed), side)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        model(**inputs, position_ids=positions)
        said += [[*text, 4] for text in prompts(4, 7, seed=seed)]
    return said


# Ways that take tokens out of a cache themselves.
SHORTENED: set[str] = set()

WAYS: dict[str, Way] = {
    "left": generated(),
    "right": generated("right", n=1),
    "sampled": generated(**SAMPLED),
    "several-returned": generated(num_return_sequences=3, **SAMPLED),
    "beams": generated(num_beams=4, num_return_sequences=2),
    "sampled-beams": generated(num_beams=3, **SAMPLED),
    "beams-without-cache": generated(num_beams=3, use_cache=False),
    "no-cache": generated(use_cache=False),
    "static": generated(cache_implementation="static"),
    "static-beams": generated(cache_implementation="static", num_beams=3),
    "chunked": generated(prefill_chunk_size=4, lengths=(11,)),
    "chunked-batch": generated(prefill_chunk_size=4, lengths=(11, 6)),
    "chunked-static": generated(prefill_chunk_size=4, lengths=(11,), cache_implementation="static"),
    "long": generated(n=20),
    "ended": ended(do_sample=True, suppress_tokens=[PAD]),
    "ended-beams": ended(num_beams=3, suppress_tokens=[PAD]),
    "assisted": assisted,
    "looked-up": looked_up,
    "custom": by_own_code,
    "continued": continued,
    "loop": looped(),
    "loop-without-cache": looped(use_cache=False),
    "shrinking": shrinking,
    "repeated": repeated,
    "branched": branched,
    "pieces": in_pieces,
    "packed": packed,
    "several": several_calls,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_row_is_the_token_that_its_history_says(
    model: PreTrainedModel, way: str, tmp_path: Path
) -> None:
    block = block_of(model)
    stored, spy, returned = captured(model, WAYS[way], tmp_path, SITE, block)
    plain = partial(without_cache, model, block)
    check_rows(stored, spy, plain, returned=returned, real=fed if way.startswith("ended") else real_places)
    if way in ("assisted", "looked-up"):
        # Drafts that are no part of the text were taken back, and nothing else was.
        kept = next(row for row in stored.chains if list(stored.text(row)) == returned[0][:-1])
        assert stored.rejected
        assert sorted(stored.rejected) == sorted(set(stored.chains) - set(stored.chains[kept]))
    else:
        assert bool(stored.rejected) == (way in SHORTENED)


Key = tuple[int, int, int]  # of a token: the pass it was read in, its place in the batch, and which one there


class Account:
    """Feeds, crops, reorders, selects, repeats and copies caches at random, and keeps account of it by hand.

    A slot of a cache is a list of places, each the key of a token or None for padding.
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self.model, self.rng = model, random.Random(seed)
        self.ids: dict[Key, int] = {}
        self.texts: dict[Key, tuple[int, ...]] = {}
        self.rejected: set[Key] = set()
        self.n_passes = 0
        self.caches: list[
            tuple[Any, list[list[Key | None]], int]
        ] = []  # cache, slots, places that were copied

    def begin(self) -> None:
        n, q = self.rng.randrange(1, 4), self.rng.choice([1, 3, 5])
        padding = [self.rng.randrange(0, q) if self.rng.random() < 0.5 else 0 for _ in range(n)]
        made = self.rng.random() < 0.5  # by the model
        self.feed(None if made else DynamicCache(), [[] for _ in range(n)], 0, q, padding)

    def feed(
        self, cache: Any, slots: list[list[Key | None]], n_copied: int, q: int, padding: list[int]
    ) -> None:
        given = torch.full((len(slots), q), PAD)
        for place, (slot, n_padding) in enumerate(zip(slots, padding, strict=True)):
            slot += [None] * n_padding
            for order in range(q - n_padding):
                key = self.n_passes, place, order
                slot.append(key)
                given[place, n_padding + order] = self.ids[key] = self.rng.randrange(4, 101)
                self.texts[key] = tuple(self.ids[each] for each in slot if each is not None)
        mask = torch.tensor([[int(each is not None) for each in slot] for slot in slots])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -q:]
        masks = {} if mask.all() else {"attention_mask": mask, "position_ids": positions}
        output = self.model(given, past_key_values=cache, **masks)
        self.n_passes += 1
        self.caches.append((output.past_key_values, slots, n_copied))

    def change(self) -> None:
        cache, slots, n_copied = self.caches.pop(self.rng.randrange(len(self.caches)))
        n, length = len(slots), len(slots[0])
        what = self.rng.choice(["feed", "feed", "feed", "crop", "reorder", "select", "repeat", "copy"])
        if what == "feed":
            self.feed(cache, slots, n_copied, self.rng.choice([1, 1, 2, 4]), [0] * n)
            return
        if what == "crop" and length > 1:
            kept = self.rng.randrange(1, length)
            cache.crop(kept - length)
            for slot in slots:  # what was copied, the first cache still has
                self.rejected.update(each for each in slot[max(kept, n_copied) :] if each is not None)
                del slot[kept:]
            n_copied = min(n_copied, kept)
        chosen = list(range(n))
        if what == "reorder":
            chosen = [self.rng.randrange(n) for _ in chosen]
            cache.reorder_cache(torch.tensor(chosen))
        elif what == "select":
            chosen = [self.rng.randrange(n) for _ in range(self.rng.randrange(1, 4))]
            cache.batch_select_indices(torch.tensor(chosen))
        elif what == "repeat" and n < 4:
            chosen = [slot for slot in chosen for _ in range(2)]
            cache.batch_repeat_interleave(2)
        elif what == "copy":
            self.caches.append((copy.deepcopy(cache), [[*slot] for slot in slots], length))
        self.caches.append((cache, [[*slots[slot]] for slot in chosen], n_copied))


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_done_to_caches(seed: int, tmp_path: Path) -> None:
    model = tiny_model(("llama", "gpt2")[seed % 2])
    block, account = block_of(model), Account(model, seed)

    def run(model: PreTrainedModel) -> Texts:
        for _ in range(25):
            if not account.caches or account.rng.random() < 0.1:
                account.begin()
            else:
                account.change()
        return []

    stored, spy, _ = captured(model, run, tmp_path, SITE, block)
    check_rows(stored, spy, partial(without_cache, model, block))
    found = {
        (step, place, order): row
        for step, places in stored.by_place().items()
        for place, rows in places.items()
        for order, row in enumerate(rows)
    }
    assert {key: stored.text(row) for key, row in found.items()} == account.texts
    assert sorted(stored.rejected) == sorted(found[key] for key in account.rejected)
    living = [token for row, token in stored.tokens.items() if row not in set(stored.rejected)]
    assert len({(token["sequence_id"], token["position"]) for token in living}) == len(living)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_quantized_cache_is_followed(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    way = generated(cache_implementation="quantized", cache_config={"backend": "fp8"}, **options)
    stored, spy, returned = captured(model, way, tmp_path, SITE, block_of(model))
    check_rows(stored, spy, None, returned=returned)  # the values are those of a rounded past


def test_a_model_that_drafts_for_itself_with_fewer_layers(tmp_path: Path) -> None:
    model, site = tiny_model("llama"), "blocks.0.resid_post"
    block = model.model.layers[0]

    def early(model: PreTrainedModel) -> Texts:
        ids = torch.tensor(prompts(5))
        return texts_of(model.generate(ids, assistant_early_exit=1, max_new_tokens=12, **GREEDY))

    stored, spy, returned = captured(model, early, tmp_path, site, block)
    check_rows(stored, spy, partial(without_cache, model, block), returned=returned)
    assert stored.rejected


STATEFUL: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "falcon_mamba": {"state_size": 4},
    "lfm2": {
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "layer_types": ["conv", "full_attention"],
    },
}


@pytest.mark.parametrize("way", ["left", "several-returned", "beams", "no-cache", "several"])
@pytest.mark.parametrize("family", STATEFUL)
def test_a_state_instead_of_keys_and_values_is_followed(family: str, way: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        family,
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=EOS,
        **STATEFUL[family],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    site = "model.layers.1" if family == "lfm2" else "backbone.layers.1"
    block = model.get_submodule(site)
    stored, spy, returned = captured(model, WAYS[way], tmp_path, site, block)
    check_rows(stored, spy, partial(without_cache, model, block), returned=returned)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_embeddings_are_rows_of_the_places_they_stand_for(
    model: PreTrainedModel, options: dict[str, Any], tmp_path: Path
) -> None:
    inputs = padded(prompts(9, 4))
    embed = model.get_input_embeddings()
    scale = embed.embed_scale.item() if hasattr(embed, "embed_scale") else 1.0
    given = {
        "inputs_embeds": embed.weight[inputs["input_ids"]] * scale,
        "attention_mask": inputs["attention_mask"],
    }
    block = block_of(model)

    def run(model: PreTrainedModel) -> Texts:
        return texts_of(model.generate(**given, max_new_tokens=6, **{**GREEDY, **options}))

    stored, spy, said = captured(model, run, tmp_path, SITE, block)
    first = [row for row, token in stored.tokens.items() if token["step"] == 0]
    assert all(stored.tokens[row]["token_id"] is None for row in first)
    # Who knows which tokens the embeddings are of can write them in; all else is then as for tokens.
    width = options.get("num_beams", 1)
    ids = inputs["input_ids"].repeat_interleave(width, 0)
    for row, token_id in zip(first, ids[ids != PAD].tolist(), strict=True):
        stored.tokens[row]["token_id"] = token_id
    spy.ids.insert(0, ids)
    texts = [[*prompt, *new] for prompt, new in zip(prompts(9, 4), said, strict=True)]
    check_rows(stored, spy, partial(without_cache, model, block), returned=texts)


def test_the_oracle_finds_a_wrong_history_a_wrong_place_and_a_wrong_value(tmp_path: Path) -> None:
    model = tiny_model("llama")
    block = block_of(model)
    stored, spy, returned = captured(model, WAYS["beams"], tmp_path, SITE, block)
    plain = partial(without_cache, model, block)
    check_rows(stored, spy, plain, returned=returned)
    first, second = next(
        (one, other)
        for one, other in itertools.combinations(stored.leaves(), 2)
        if len(stored.text(one)) == len(stored.text(other))
        and stored.text(one)[:-1] != stored.text(other)[:-1]
    )
    stored.chains[first], stored.chains[second] = (
        [*stored.chains[second][:-1], first],
        [*stored.chains[first][:-1], second],
    )
    with pytest.raises(AssertionError):
        check_rows(stored, spy, plain)

    stored = Stored(tmp_path / "rows.strap", SITE)
    stored.values[first], stored.values[second] = stored.values[second], stored.values[first]
    with pytest.raises(AssertionError):
        check_rows(stored, spy, plain)

    stored = Stored(tmp_path / "rows.strap", SITE)
    stored.tokens[first]["token_id"] += 1
    with pytest.raises(AssertionError):
        check_rows(stored, spy, plain)
    stored = Stored(tmp_path / "rows.strap", SITE)
    stored.tokens[first]["position"] += 1
    with pytest.raises(AssertionError):
        check_rows(stored, spy, plain)
    with pytest.raises(AssertionError):
        check_rows(Stored(tmp_path / "rows.strap", SITE), spy, plain, returned=[[5, 6, 7]])


class Picture(torch.nn.Module):
    """Given no tokens: a picture in patches, a vector of it, and a batch of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.cut = torch.nn.Conv2d(3, 8, 2, stride=2)
        self.mix = torch.nn.Linear(8, 5)
        self.sum_up = torch.nn.Linear(5, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        patches = self.cut(pixels).flatten(2).transpose(1, 2)
        return self.sum_up(self.mix(patches).mean(dim=1))


def test_leading_dimensions_of_what_is_no_text_are_rows(tmp_path: Path) -> None:
    network, pictures = Picture(), [torch.randn(n, 3, 4, 6) for n in (2, 3)]
    with strapfmt.capture(network, tmp_path / "p.strap", sites=["cut", "mix", "sum_up"], quiet=True):
        for each in pictures:
            network(each)
    with strapfmt.open(tmp_path / "p.strap") as stored:
        cut = [network.cut(each) for each in pictures]
        mixed = [network.mix(each.flatten(2).transpose(1, 2)) for each in cut]
        assert torch.equal(stored["cut"][:], torch.cat(cut))
        assert torch.equal(stored["mix"][:], torch.cat([each.reshape(-1, 5) for each in mixed]))
        assert torch.equal(stored["sum_up"][:], torch.cat([network.sum_up(each.mean(1)) for each in mixed]))
        assert len(stored.tokens) == 0
        calls = [call for batch in stored["mix"].scan(["call"]) for call in batch["call"].to_pylist()]
        assert calls == [0] * 12 + [1] * 18
