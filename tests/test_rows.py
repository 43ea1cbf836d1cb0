"""Rows: which token of which sequence every place of a forward pass is, however the model is driven.

`Recorder` attaches a tracker by plain hooks and keeps beside each step what the model was really given, and the value
of one site; the oracles below are written from those, from the tokens `generate` returns, and from nothing else.
"""

from __future__ import annotations

import copy
import gc
import json
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from models import BOS, EOS, FAMILIES, PAD, VOCAB_SIZE, tiny_model, tiny_tokenizer
from transformers import DynamicCache, PreTrainedModel, StaticCache

import strapfmt
from strapfmt.errors import CaptureError
from strapfmt_capture.inputs import named_arguments, read_inputs
from strapfmt_capture.passes import Step, token_columns
from strapfmt_capture.rows import RowTracker
from strapfmt_capture.sites import row_modules


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Recorder:
    """A tracker on a model, every step it made, the tokens it was about, and the stream entering block 1."""

    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        self.counters: dict[str, int] = {"row": 0, "step": 0, "sequence": 0}
        self.tracker = RowTracker(reserve=self._reserve, **options)
        self.steps: list[Step] = []
        self.inputs: list[dict[str, Any]] = []
        self.values: list[torch.Tensor] = []
        self._late: list[Any] = []
        self._depth = 0
        self._handles: list[Any] = []
        for module in row_modules(model):
            self._handles += [
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def _reserve(self, kind: str, n: int) -> int:
        assert n > 0
        first = self.counters[kind]
        self.counters[kind] += n
        return first

    def _enter(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth == 1:
            self.steps.append(
                self.tracker.begin(module, read_inputs(module, named_arguments(module, args, kwargs)))
            )
            self.inputs.append(
                {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
            )

    def _leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.tracker.returned(output)
        if self._depth == 0 and getattr(output, "logits", None) is not None:
            self.values.append(output.logits.detach().clone())

    def close(self) -> None:
        self.tracker.close()
        for handle in self._handles:
            handle.remove()

    def rows(self) -> list[dict[str, Any]]:
        """Every row of the `tokens` table as a dict."""
        return as_table(token_columns(self.steps)).to_pylist()

    def sequences(self) -> dict[int, dict[str, Any]]:
        """The `sequences` table by `sequence_id`."""
        tables = [as_table(step.sequences) for step in self.steps if step.sequences is not None]
        return {row["sequence_id"]: row for table in tables for row in table.to_pylist()}

    def events(self) -> list[dict[str, Any]]:
        """The `row_events` table, with what came after the last step."""
        self._late.append(self.tracker.take_events())
        found = [*(step.events for step in self.steps), *self._late]
        return [row for columns in found if columns is not None for row in as_table(columns).to_pylist()]


def as_table(columns: Any) -> pa.Table:
    return pa.table(
        {
            name: column if isinstance(column, pa.Array) else pa.array(column)
            for name, column in columns.items()
        }
    )


def begin(tracker: RowTracker, module: torch.nn.Module, given: dict[str, Any]) -> Step:
    """Begin a pass of a module that is given these arguments."""
    return tracker.begin(module, read_inputs(module, given))


@contextmanager
def recording(model: torch.nn.Module, **options: Any) -> Iterator[Recorder]:
    recorder = Recorder(model, **options)
    try:
        yield recorder
    finally:
        recorder.close()


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def padded(sequences: list[list[int]], side: str = "left") -> dict[str, torch.Tensor]:
    width = max(map(len, sequences))
    ids, mask = [], []
    for sequence in sequences:
        pad = width - len(sequence)
        ids.append([PAD] * pad + sequence if side == "left" else sequence + [PAD] * pad)
        mask.append([0] * pad + [1] * len(sequence) if side == "left" else [1] * len(sequence) + [0] * pad)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], n: int = 5, **options: Any) -> Any:
    options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, **options}
    return model.generate(**inputs, **options)


def flat_ids(recorder: Recorder, number: int) -> list[int]:
    """Token ids of a step's rows, from what the model was given and the step's own selection."""
    step, ids = recorder.steps[number], recorder.inputs[number]["input_ids"].reshape(-1)
    return ids.tolist() if step.selected is None else ids[step.selected].tolist()


def chains(rows: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """For every row, the rows from the first token of its history to itself."""
    by_row: dict[int, dict[str, Any]] = {row["row"]: row for row in rows}
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        parent = row["parent_row"]
        found[row["row"]] = [*(found[parent] if parent is not None else []), by_row[row["row"]]]
    return found


def check_invariants(recorder: Recorder) -> None:
    """What holds for any way of driving a model with a cache."""
    rows = recorder.rows()
    assert [row["row"] for row in rows] == list(range(len(rows)))
    rejected = {event["row"] for event in recorder.events()}
    kept = [(row["sequence_id"], row["position"]) for row in rows if row["row"] not in rejected]
    assert len(set(kept)) == len(kept)
    for row, chain in chains(rows).items():
        assert [link["position"] for link in chain] == list(range(len(chain))), row
    sequences = recorder.sequences()
    assert {row["sequence_id"] for row in rows} <= set(sequences)
    for number, step in enumerate(recorder.steps):
        assert step.rows.dtype == np.int64
        assert step.selected is None or step.selected.dtype == np.int64
        table = as_table(token_columns([step]))
        assert table.to_pylist() == [row for row in rows if row["step"] == step.step]
        assert table["row"].to_pylist() == step.rows.tolist()
        assert set(table["step"].to_pylist()) <= {step.step}
        if recorder.inputs[number].get("input_ids") is not None:
            assert table["token_id"].to_pylist() == flat_ids(recorder, number)


def tokens_of(recorder: Recorder) -> dict[int, list[int]]:
    """Token ids of each sequence by position."""
    found: dict[int, dict[int, int]] = {}
    for row in recorder.rows():
        found.setdefault(row["sequence_id"], {})[row["position"]] = row["token_id"]
    return {sequence: [ids[position] for position in range(len(ids))] for sequence, ids in found.items()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_no_row_and_positions_do_not_count_it(side: str) -> None:
    sequences = prompts(3, 7, 1)
    model = tiny_model("llama")
    with recording(model) as recorder:
        model(**padded(sequences, side))
    (step,) = recorder.steps
    assert (step.phase, step.n_sequences, step.n_query) == ("prefill", 3, 7)
    assert tokens_of(recorder) == dict(enumerate(sequences))
    assert [row["batch_index"] for row in recorder.rows()] == [0] * 3 + [1] * 7 + [2]
    real = padded(sequences, side)["attention_mask"].reshape(-1)
    assert step.selected is not None
    assert step.selected.tolist() == real.nonzero().flatten().tolist()
    check_invariants(recorder)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_numbers_every_token_the_model_processed(family: str) -> None:
    sequences = prompts(3, 7, 5)
    inputs = padded(sequences)
    model = tiny_model(family)
    with recording(model) as recorder:
        output = generate(model, inputs, 5)
    expected = [s + new for s, new in zip(sequences, output[:, 7:-1].tolist(), strict=True)]
    assert tokens_of(recorder) == dict(enumerate(expected))
    assert [step.phase for step in recorder.steps] == ["prefill"] + ["decode"] * 4
    assert len(recorder.sequences()) == 3
    check_invariants(recorder)


def test_right_padded_prompts_go_on_where_their_tokens_end() -> None:
    sequences = prompts(3, 6)
    model = tiny_model("gpt2")
    with recording(model) as recorder:
        output = generate(model, padded(sequences, "right"), 4)
    expected = [s + new for s, new in zip(sequences, output[:, 6:-1].tolist(), strict=True)]
    assert tokens_of(recorder) == dict(enumerate(expected))
    check_invariants(recorder)


def test_an_unpadded_batch_selects_everything_without_a_mask() -> None:
    ids = torch.tensor(prompts(4, 4))
    model = tiny_model("llama")
    with recording(model) as recorder:
        model(ids)  # positionally, as people do
    (step,) = recorder.steps
    assert step.selected is None
    assert step.rows.tolist() == list(range(8))
    assert as_table(token_columns([step]))["token_id"].to_pylist() == ids.reshape(-1).tolist()


def test_a_single_row_of_ids_is_one_sequence() -> None:
    class Model(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens

    model = Model()
    with recording(model) as recorder:
        model(torch.tensor([5, 6, 7]))
    assert tokens_of(recorder) == {0: [5, 6, 7]}


def test_forward_passes_without_a_cache_are_new_sequences() -> None:
    model = tiny_model("llama")
    with recording(model) as recorder:
        for seed in range(3):
            model(**padded(prompts(4, 2, seed=seed)))
        model(torch.tensor(prompts(1, seed=9)))
    assert tokens_of(recorder) == dict(
        enumerate([*prompts(4, 2), *prompts(4, 2, seed=1), *prompts(4, 2, seed=2), *prompts(1, seed=9)])
    )
    assert [row["first_step"] for row in recorder.sequences().values()] == [0, 0, 1, 1, 2, 2, 3]


def test_calling_the_base_model_directly_makes_the_same_rows() -> None:
    model = tiny_model("qwen2")
    with recording(model) as recorder:
        model.model(**padded(prompts(3, 2)))
    assert tokens_of(recorder) == dict(enumerate(prompts(3, 2)))


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("gemma2", "eager"),
        ("gemma3_text", "sdpa"),
        ("gemma3_text", "eager"),
    ],
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_static_cache_with_its_four_dimensional_mask(family: str, attention: str, side: str) -> None:
    sequences = prompts(3, 11, 5)  # longer than the sliding window of 8
    model = tiny_model(family, attn_implementation=attention)
    with recording(model) as recorder:
        output = generate(model, padded(sequences, side), 4, cache_implementation="static")
    masks = [inputs["attention_mask"] for inputs in recorder.inputs]
    masks = [next(iter(mask.values())) if isinstance(mask, dict) else mask for mask in masks]
    assert masks[0].ndim == 4
    assert masks[0].is_floating_point() == (attention == "eager")
    expected = [s + new for s, new in zip(sequences, output[:, 11:-1].tolist(), strict=True)]
    assert tokens_of(recorder) == dict(enumerate(expected))
    check_invariants(recorder)


def test_a_mask_that_lets_padding_attend_to_everything() -> None:
    mask = torch.tensor(
        [[[0, 0, 0], [0, 1, 0], [0, 1, 1]], [[1, 0, 0], [1, 1, 0], [1, 1, 1]]], dtype=torch.bool
    )
    mask[0, 0] = True  # what some versions do to keep a softmax of nothing finite
    model = tiny_model("llama", attn_implementation="eager")
    additive = torch.zeros(2, 1, 3, 3).masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
    for given in (mask[:, None], additive):
        with recording(model) as recorder:
            begin(
                recorder.tracker,
                model,
                {"input_ids": torch.tensor([[PAD, 5, 6], [7, 8, 9]]), "attention_mask": given},
            )
            step = begin(
                recorder.tracker,
                model,
                {"input_ids": torch.tensor([[PAD, 5, 6], [7, 8, 9]]), "attention_mask": given},
            )
        assert step.selected is not None
        assert step.selected.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_sliding_window_cache_counts_what_it_has_dropped(family: str) -> None:
    sequences = prompts(3, 6)
    model = tiny_model(family, sliding_window=4)
    with recording(model) as recorder:
        output = generate(model, padded(sequences), 8)
    expected = [s + new for s, new in zip(sequences, output[:, 6:-1].tolist(), strict=True)]
    assert tokens_of(recorder) == dict(enumerate(expected))
    check_invariants(recorder)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
def test_chunked_prefill_is_one_sequence(cache_implementation: str) -> None:
    sequences = prompts(4, 10)
    model = tiny_model("llama")
    with recording(model) as recorder:
        output = generate(
            model, padded(sequences), 3, prefill_chunk_size=3, cache_implementation=cache_implementation
        )
    expected = [s + new for s, new in zip(sequences, output[:, 10:-1].tolist(), strict=True)]
    assert [step.n_query for step in recorder.steps] == [3, 3, 3, 1, 1, 1]
    assert tokens_of(recorder) == dict(enumerate(expected))
    assert recorder.steps[0].selected is not None
    assert len(recorder.steps[0].rows) == 3
    check_invariants(recorder)


def test_a_manual_loop_over_one_cache_object() -> None:
    model = tiny_model("llama")
    ids = torch.tensor(prompts(9, 9))
    cache = DynamicCache(config=model.config)
    with recording(model) as recorder:
        for part in ids.split([4, 1, 2, 2], dim=1):
            model(input_ids=part, past_key_values=cache)
    assert tokens_of(recorder) == dict(enumerate(ids.tolist()))
    assert [step.phase for step in recorder.steps] == ["prefill", "decode", "prefill", "prefill"]
    check_invariants(recorder)


def test_a_loop_over_the_cache_the_model_returned() -> None:
    model = tiny_model("gpt2")
    ids = torch.tensor(prompts(5, 5))
    with recording(model) as recorder:
        first = model(ids[:, :3])
        other = model(ids[:, 2:])  # as wide: what comes next must not be taken for its continuation
        model(ids[:, 3:4], past_key_values=first.past_key_values)
        model(ids[:, 4:], past_key_values=first.past_key_values)
        model(ids[:, :1], past_key_values=other[1], return_dict=False)
    a, b = ids.tolist()
    assert tokens_of(recorder) == {0: a, 1: b, 2: [*a[2:], a[0]], 3: [*b[2:], b[0]]}
    assert not model._forward_hooks
    check_invariants(recorder)


def test_a_conversation_goes_on_with_the_cache_of_the_last_turn() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    (question,), (again,) = prompts(4), prompts(3, seed=1)
    with recording(model) as recorder:
        answer = generate(model, {"input_ids": torch.tensor([question])}, 3, past_key_values=cache)
        turn = {"input_ids": torch.cat([answer, torch.tensor([again])], dim=1)}
        final = generate(model, turn, 2, past_key_values=cache)
    assert tokens_of(recorder) == {0: final[0, :-1].tolist()}
    check_invariants(recorder)


def test_a_cache_that_was_filled_before_anybody_watched() -> None:
    model = tiny_model("llama")
    inputs = padded(prompts(2, 5))
    cache = DynamicCache(config=model.config)
    model(**inputs, past_key_values=cache)
    with recording(model) as recorder:
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], dim=1)
        model(input_ids=torch.tensor(prompts(2, 2)), attention_mask=mask, past_key_values=cache)
        cache.crop(-1)
        model(input_ids=torch.tensor([[9], [9]]), past_key_values=cache)
    rows = recorder.rows()
    assert [row["position"] for row in rows] == [2, 3, 5, 6, 3, 6]
    assert [row["parent_row"] for row in rows] == [None, 0, None, 2, 0, 2]
    assert [event["row"] for event in recorder.events()] == [1, 3]


def test_a_cache_is_known_by_itself_and_not_by_its_address() -> None:
    model = tiny_model("llama")
    ids = torch.tensor(prompts(3))
    with recording(model) as recorder:
        for _ in range(20):
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache)
            model(ids[:, :1], past_key_values=cache)
            del cache
    assert len(recorder.sequences()) == 20
    assert all(row["position"] < 4 for row in recorder.rows())


def test_a_cache_that_grew_while_nobody_watched() -> None:
    class Cache:
        length = 0

        def get_seq_length(self) -> int:
            return self.length

    cache, model = Cache(), torch.nn.Identity()
    with recording(model) as recorder:
        begin(recorder.tracker, model, {"input_ids": torch.tensor([[5, 6]]), "past_key_values": cache})
        cache.length = 5
        step = begin(recorder.tracker, model, {"input_ids": torch.tensor([[7]]), "past_key_values": cache})
    (row,) = as_table(token_columns([step])).to_pylist()
    assert (row["sequence_id"], row["position"], row["parent_row"]) == (0, 5, None)


def test_a_prompt_of_one_token_is_a_prefill() -> None:
    model = tiny_model("llama")
    with recording(model) as recorder:
        generate(model, {"input_ids": torch.tensor([[BOS]])}, 2)
    assert [step.phase for step in recorder.steps] == ["prefill", "decode"]


def test_a_cache_that_is_reset_holds_new_sequences() -> None:
    model = tiny_model("llama")
    ids = torch.tensor(prompts(3))
    cache = StaticCache(config=model.config, max_cache_len=16)
    with recording(model) as recorder:
        model(ids, past_key_values=cache)
        cache.reset()
        model(ids, past_key_values=cache)
    assert tokens_of(recorder) == {0: ids[0].tolist(), 1: ids[0].tolist()}
    assert recorder.events() == []


def test_a_cache_of_another_batch_size_holds_new_sequences() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    with recording(model) as recorder:
        model(torch.tensor(prompts(3)), past_key_values=cache)
        begin(recorder.tracker, model, {"input_ids": torch.tensor([[5], [6]]), "past_key_values": cache})
    assert sorted(recorder.sequences()) == [0]
    assert recorder.counters["sequence"] == 3


def test_generation_without_a_cache_processes_the_prefix_again() -> None:
    sequences = prompts(3, 5)
    model = tiny_model("llama")
    with recording(model) as recorder:
        output = generate(model, padded(sequences), 4, use_cache=False)
        model(torch.tensor(prompts(5, 5, seed=3)))
    assert [len(step.rows) for step in recorder.steps] == [8, 10, 12, 14, 10]
    for number, step in enumerate(recorder.steps[:4]):
        expected = [s + new for s, new in zip(sequences, output[:, 5 : 5 + number].tolist(), strict=True)]
        table = as_table(token_columns([step]))
        assert table["sequence_id"].to_pylist() == [0] * len(expected[0]) + [1] * len(expected[1])
        assert table["position"].to_pylist() == [*range(len(expected[0])), *range(len(expected[1]))]
        assert table["token_id"].to_pylist() == [*expected[0], *expected[1]]
        parents = table["parent_row"].to_pylist()
        assert parents[0] is None
        assert parents[1] == step.rows[0]
    assert set(as_table(token_columns([recorder.steps[4]]))["sequence_id"].to_pylist()) == {2, 3}


def test_a_pass_that_only_looks_like_the_last_one_and_a_token_is_new() -> None:
    model = tiny_model("llama")
    ids, mask = torch.tensor([[PAD, 5, 6]]), torch.tensor([[0, 1, 1]])
    longer = torch.tensor([[PAD, 5, 6, 7]])
    for given in ([0, 1, 1, 0], [1, 1, 1, 1]):  # the new place is padding; the first place was
        with recording(model) as recorder:
            model(ids, attention_mask=mask)
            model(longer, attention_mask=torch.tensor([given]))
        assert len(recorder.sequences()) == 2
    with recording(model) as recorder:  # the sequence has gone on elsewhere, with the cache of its first pass
        first = model(ids, attention_mask=mask)
        model(torch.tensor([[8]]), past_key_values=first.past_key_values)
        model(longer, attention_mask=torch.tensor([[0, 1, 1, 1]]))
    assert tokens_of(recorder) == {0: [5, 6, 8], 1: [5, 6, 7]}


def test_embeddings_have_rows_without_token_ids() -> None:
    model = tiny_model("llama")
    inputs = padded(prompts(3, 2))
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with recording(model, tokenizer=tiny_tokenizer()) as recorder:
        generate(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, 3)
    rows = recorder.rows()
    assert [row["token_id"] for row in rows[:5]] == [None] * 5
    assert [row["token"] for row in rows[:5]] == [None] * 5
    assert all(row["token_id"] is not None for row in rows[5:])
    assert recorder.sequences()[0]["n_prompt_tokens"] == 3
    assert recorder.sequences()[0]["prompt_token_ids"] is None
    check_invariants(recorder)


def test_sampling_several_sequences_from_one_prompt() -> None:
    sequences = prompts(4, 2)
    model = tiny_model("llama")
    torch.manual_seed(0)
    with recording(model) as recorder:
        output = generate(model, padded(sequences), 5, do_sample=True, num_return_sequences=3)
    prompt = [s for s in sequences for _ in range(3)]
    expected = [s + new for s, new in zip(prompt, output[:, 4:-1].tolist(), strict=True)]
    assert tokens_of(recorder) == dict(enumerate(expected))
    assert len({tuple(e) for e in expected}) > 2
    check_invariants(recorder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_beam_search_follows_the_hypothesis(family: str, use_cache: bool) -> None:
    sequences = prompts(4, 6)
    model = tiny_model(family)
    with recording(model) as recorder:
        output = generate(
            model,
            padded(sequences),
            7,
            num_beams=3,
            num_return_sequences=3,
            return_dict_in_generate=True,
            output_scores=True,
            use_cache=use_cache,
        )
    rows = recorder.rows()
    histories = {tuple(link["token_id"] for link in chain) for chain in chains(rows).values()}
    hypotheses = [sequences[i // 3] + new[:-1] for i, new in enumerate(output.sequences[:, 6:].tolist())]
    for hypothesis in hypotheses:
        assert tuple(hypothesis) in histories
    # Hypotheses really did change places, or this would be no test.
    assert any(len(set(beam[beam >= 0].tolist())) > 1 for beam in output.beam_indices)
    # Each pass's rows stand for what the model was given: the chain is the whole input so far.
    given: list[list[int]] = [[] for _ in range(6)]
    by_row = chains(rows)
    for step in recorder.steps:
        last = {row["batch_index"]: row["row"] for row in as_table(token_columns([step])).to_pylist()}
        for slot, row in last.items():
            given[slot] = [link["token_id"] for link in by_row[row]]
        assert all(len(ids) == len(given[0]) + (2 if slot > 2 else 0) for slot, ids in enumerate(given))
    for sequence_id, sequence in recorder.sequences().items():
        parent = sequence["parent_sequence_id"]
        if parent is None:
            assert sequence["prompt_token_ids"] in sequences
            continue
        own = [row for row in rows if row["sequence_id"] == sequence_id]
        first = own[0] if use_cache else next(r for r in own if r["position"] == sequence["fork_position"])
        assert first["position"] == sequence["fork_position"]
        assert first["step"] == sequence["first_step"]
        if use_cache:
            assert next(r for r in rows if r["row"] == first["parent_row"])["sequence_id"] == parent
        assert sequence["n_prompt_tokens"] == recorder.sequences()[parent]["n_prompt_tokens"]
    assert any(s["parent_sequence_id"] is not None for s in recorder.sequences().values())
    if use_cache:
        check_invariants(recorder)


def test_activations_stitched_along_the_chain_are_those_of_a_plain_pass() -> None:
    sequences = prompts(5)
    model = tiny_model("llama")
    with recording(model) as recorder:
        output = generate(model, padded(sequences), 8, num_beams=4, logits_to_keep=0)
    flat = torch.cat(
        [
            values[:, -step.n_query :].reshape(-1, VOCAB_SIZE)
            for step, values in zip(recorder.steps[1:], recorder.values[1:], strict=True)
        ]
    )
    first = len(recorder.steps[0].rows)
    by_tokens = {
        tuple(link["token_id"] for link in chain): chain for chain in chains(recorder.rows()).values()
    }
    chain = by_tokens[tuple(output[0, :-1].tolist())]
    stitched = torch.stack([flat[link["row"] - first] for link in chain[5:]])
    plain = model(output[:, :-1]).logits[0, 5:]
    torch.testing.assert_close(stitched, plain, atol=1e-5, rtol=0)
    slots = {link["batch_index"] for link in chain[5:]}
    assert len(slots) > 1  # stitching by place in the batch would be wrong here


def test_rejected_drafts_are_marked_and_leave_the_history() -> None:
    model = tiny_model("llama")
    (prompt,) = prompts(6)
    inputs = {
        "input_ids": torch.tensor([prompt * 2])
    }  # repetitive, so that the lookup finds something to propose
    with recording(model) as recorder:
        output = generate(model, inputs, 12, prompt_lookup_num_tokens=4)
    rows, rejected = recorder.rows(), {event["row"] for event in recorder.events()}
    assert rejected, "nothing was proposed: no test"
    kept = [row for row in rows if row["row"] not in rejected]
    ids = [row["token_id"] for row in sorted(kept, key=lambda row: row["position"])]
    assert ids == output[0, : len(ids)].tolist()
    assert len(ids) >= output.shape[1] - 1
    assert {row["sequence_id"] for row in rows} == {0}
    assert not rejected & {link["row"] for link in chains(rows)[kept[-1]["row"]]}
    for event in recorder.events():
        step = next(row["step"] for row in rows if row["row"] == event["row"])
        assert event["event"] == "rejected"
        assert event["step"] == step
    check_invariants(recorder)


def test_a_long_history_can_be_cut_anywhere() -> None:
    class Cache:
        length = 0

        def get_seq_length(self) -> int:
            return self.length

    cache, module = Cache(), torch.nn.Identity()
    with recording(module) as recorder:
        for _ in range(5):  # longer than the room a history starts with
            ids = torch.full((2, 50), 7)
            begin(recorder.tracker, module, {"input_ids": ids, "past_key_values": cache})
            cache.length += 50
        cache.length = 20
        step = begin(
            recorder.tracker, module, {"input_ids": torch.tensor([[8], [9]]), "past_key_values": cache}
        )
    assert as_table(token_columns([step]))["parent_row"].to_pylist() == [19, 69]
    assert as_table(token_columns([step]))["position"].to_pylist() == [20, 20]
    assert step.events is not None
    assert set(step.events["row"]) == {*range(20, 50), *range(70, 500)}


def test_a_crop_after_the_last_pass_is_not_lost() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    with recording(model) as recorder:
        model(torch.tensor(prompts(4, 4)), past_key_values=cache)
        cache.crop(-1)
        del cache
        events = recorder.tracker.take_events()
    assert events is not None
    assert list(events["row"]) == [3, 7]
    assert list(events["step"]) == [0, 0]
    assert recorder.tracker.take_events() is None


def test_cropping_padding_takes_no_tokens() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    with recording(model) as recorder:
        model(**padded(prompts(2, 5), "right"), past_key_values=cache)
        cache.crop(-2)
        model(torch.tensor([[7], [8]]), past_key_values=cache)
    assert [event["row"] for event in recorder.events()] == [5, 6]
    assert [(row["position"], row["parent_row"]) for row in recorder.rows()[-2:]] == [(2, 1), (3, 4)]


def test_a_crop_takes_what_branches_share_from_all_of_them() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    with recording(model) as recorder:
        model(torch.tensor(prompts(3)), past_key_values=cache)
        cache.batch_repeat_interleave(2)
        model(torch.tensor([[7], [8]]), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([1]))
        cache.crop(-2)
    assert [event["row"] for event in recorder.events()] == [2, 4]


def test_a_cache_cut_behind_our_back_is_noticed() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    ids = torch.tensor(prompts(4))
    with recording(model) as recorder:
        model(ids, past_key_values=cache)
        for layer in cache.layers:
            layer.crop(-2)
        model(ids[:, :1], past_key_values=cache)
    assert [event["row"] for event in recorder.events()] == [2, 3]
    assert recorder.rows()[-1]["position"] == 2
    assert recorder.rows()[-1]["parent_row"] == 1


def test_a_pass_that_failed_leaves_no_trace_in_the_history() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    ids = torch.tensor(prompts(4))
    with recording(model) as recorder:
        model(ids, past_key_values=cache)
        with pytest.raises(IndexError):
            model(torch.tensor([[VOCAB_SIZE + 5]]), past_key_values=cache)
        with pytest.raises(IndexError):
            model(torch.tensor([[VOCAB_SIZE + 5]]))
        model(ids[:, :1], past_key_values=cache)
    last = recorder.rows()[-1]
    assert (last["position"], last["parent_row"], last["sequence_id"]) == (4, 3, 0)
    assert not model._forward_hooks


def test_copies_of_a_prompt_cache_branch() -> None:
    model = tiny_model("llama")
    ids = torch.tensor(prompts(4))
    cache = DynamicCache(config=model.config)
    with recording(model) as recorder:
        model(ids, past_key_values=cache)
        for token in (7, 8):
            branch = copy.deepcopy(cache)
            model(torch.tensor([[token, token]]), past_key_values=branch)
            branch.crop(-1)
            model(torch.tensor([[token + 10]]), past_key_values=branch)
        model(torch.tensor([[9]]), past_key_values=cache)
    by_last = {chain[-1]["token_id"]: chain for chain in chains(recorder.rows()).values()}
    for last, middle in ((17, [7]), (18, [8]), (9, [])):
        expected = [*ids[0].tolist(), *middle, last]
        assert [link["token_id"] for link in by_last[last]] == expected
    assert [by_last[last][-1]["sequence_id"] for last in (17, 18, 9)] == [1, 2, 0]
    branched = [recorder.sequences()[i] for i in (1, 2)]
    assert [(s["parent_sequence_id"], s["fork_position"]) for s in branched] == [(0, 4), (0, 4)]
    assert [event["row"] for event in recorder.events()] == [5, 8]
    check_invariants(recorder)


def test_cropping_a_copy_rejects_nothing_the_original_still_has() -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    with recording(model) as recorder:
        model(torch.tensor(prompts(6)), past_key_values=cache)
        branch = copy.deepcopy(cache)
        branch.crop(-3)
        model(torch.tensor([[7]]), past_key_values=branch)
        assert recorder.events() == []
        branch.crop(-1)
    assert (recorder.rows()[-1]["position"], recorder.rows()[-1]["parent_row"]) == (3, 2)
    assert recorder.sequences()[1]["fork_position"] == 3
    assert [event["row"] for event in recorder.events()] == [6]


@pytest.mark.parametrize("selection", [torch.tensor([1, 1, 0]), torch.tensor([True, False])])
def test_selecting_and_repeating_the_batch_of_a_cache(selection: torch.Tensor) -> None:
    model = tiny_model("llama")
    cache = DynamicCache(config=model.config)
    ids = torch.tensor(prompts(3, 3))
    with recording(model) as recorder:
        model(ids, past_key_values=cache)
        cache.batch_select_indices(selection)
        cache.batch_repeat_interleave(2)
        parents = selection.nonzero().flatten() if selection.dtype == torch.bool else selection
        parents = parents.repeat_interleave(2)
        new = torch.arange(10, 10 + len(parents))[:, None]
        model(new, past_key_values=cache)
    histories = chains(recorder.rows())
    last = recorder.steps[-1].rows.tolist()
    found = [[link["token_id"] for link in histories[row]] for row in last]
    assert found == [[*ids[parent].tolist(), int(token)] for parent, token in zip(parents, new, strict=True)]
    assert len(set(as_table(token_columns([recorder.steps[-1]]))["sequence_id"].to_pylist())) == len(last)
    check_invariants(recorder)


def test_packed_sequences_are_told_apart_by_their_positions() -> None:
    model = tiny_model("llama")
    a, b, c, d = prompts(3, 2, 1, 4)
    ids = torch.tensor([a + b, c + d])
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    with recording(model) as recorder:
        model(input_ids=ids, position_ids=positions, use_cache=False)
    assert tokens_of(recorder) == {0: a, 1: b, 2: c, 3: d}
    assert [s["batch_index"] for s in recorder.sequences().values()] == [0, 0, 1, 1]
    assert [s["prompt_token_ids"] for s in recorder.sequences().values()] == [a, b, c, d]
    check_invariants(recorder)


@pytest.mark.parametrize("positions", [[0, 1, 2, 0, 1], [0, 2, 4, 6, 8]], ids=["packed", "interpolated"])
def test_positions_pack_nothing_where_the_model_makes_a_cache(positions: list[int]) -> None:
    (ids,) = prompts(5)
    model = tiny_model("llama", attn_implementation="eager")
    with recording(model) as recorder:
        first = model(
            input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), output_attentions=True
        )
        model(input_ids=torch.tensor([[7]]), past_key_values=first.past_key_values)
    assert all(
        bool((layer[0, :, 3, 0] > 0).all()) for layer in first.attentions
    )  # the oracle: it is one sequence
    assert tokens_of(recorder) == {0: [*ids, 7]}


def test_what_packs_a_row_is_the_model_s_own_rule() -> None:
    (ids,) = prompts(5)
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    for use_cache in (False, True):
        model = tiny_model("llama", attn_implementation="eager", use_cache=use_cache)
        with recording(model) as recorder:
            output = model(input_ids=torch.tensor([ids]), position_ids=positions, output_attentions=True)
        is_packed = not bool((output.attentions[0][0, :, 3, 0] > 0).any())
        assert (len(recorder.sequences()) == 2) == is_packed == (not use_cache)


def test_packed_sequences_are_told_apart_by_their_offsets() -> None:
    a, b = prompts(3, 2)
    model = tiny_model("llama")
    tracker = Recorder(model).tracker
    step = begin(
        tracker, model, {"input_ids": torch.tensor([a + b]), "cu_seq_lens_q": torch.tensor([0, 3, 5])}
    )
    assert as_table(token_columns([step]))["sequence_id"].to_pylist() == [0, 0, 0, 1, 1]


def test_positions_that_go_on_from_elsewhere_are_one_sequence() -> None:
    model = tiny_model("llama")
    with recording(model) as recorder:
        model(input_ids=torch.tensor(prompts(3, 3)), position_ids=torch.tensor([[5, 6, 7]]))
    assert tokens_of(recorder) == dict(enumerate(prompts(3, 3)))


def test_text_specials_prompts_and_tags() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama")
    ids = [BOS, *tokenizer.encode("the cat"), EOS]
    with recording(model, tokenizer=tokenizer, tags={"split": "tést", "n": 1}) as recorder:
        model(**padded([ids, tokenizer.encode("ab")]))
    rows = recorder.rows()
    assert [row["token"] for row in rows] == ["<bos>", "the", " ", "c", "a", "t", "<eos>", "a", "b"]
    assert [row["is_special"] for row in rows] == [True] + [False] * 5 + [True] + [False] * 2
    first, second = recorder.sequences().values()
    assert first["prompt"] == "<bos>the cat<eos>"
    assert second["prompt"] == "ab"
    assert first["prompt_token_ids"] == ids
    assert json.loads(first["tags"]) == {"split": "tést", "n": 1}


def test_tokens_without_a_text_have_none() -> None:
    tracker = Recorder(torch.nn.Identity(), tokenizer=tiny_tokenizer()).tracker
    step = begin(tracker, torch.nn.Identity(), {"input_ids": torch.tensor([[5, -200]])})
    assert step.tokens is not None
    assert step.tokens.texts == ["b", None]


def test_without_a_tokenizer_text_is_null_and_tags_are_an_empty_object() -> None:
    model = tiny_model("llama")
    with recording(model) as recorder:
        model(torch.tensor(prompts(2)))
    assert {row["token"] for row in recorder.rows()} == {None}
    assert {row["is_special"] for row in recorder.rows()} == {None}
    assert recorder.sequences()[0]["prompt"] is None
    assert recorder.sequences()[0]["tags"] == "{}"


def test_a_model_that_is_given_no_tokens_numbers_no_rows() -> None:
    model = torch.nn.Linear(3, 4)
    with recording(model) as recorder:
        model(torch.randn(5, 3))
    (step,) = recorder.steps
    assert not step.is_language
    assert step.tokens is None
    assert step.rows.size == 0
    assert step.sequences is None
    assert recorder.counters == {"row": 0, "step": 1, "sequence": 0}


def test_a_batch_of_nothing_but_padding_has_no_rows() -> None:
    tracker = Recorder(torch.nn.Identity()).tracker
    inputs = {"input_ids": torch.tensor([[PAD, PAD]]), "attention_mask": torch.zeros(1, 2, dtype=torch.long)}
    step = begin(tracker, torch.nn.Identity(), inputs)
    assert step.is_language
    assert step.rows.size == 0
    assert as_table(token_columns([step])).num_rows == 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"past_key_values": ((torch.zeros(1, 1, 2, 2),) * 2,)}, "DynamicCache"),
        ({"attention_mask": object()}, "attention_mask"),
        ({"attention_mask": torch.ones(1, 1)}, "attention_mask"),
        ({"block_table": torch.zeros(1)}, "continuous batching"),
    ],
)
def test_what_cannot_be_followed_is_refused(inputs: dict[str, Any], message: str) -> None:
    tracker = Recorder(torch.nn.Identity()).tracker
    with pytest.raises(CaptureError, match=message):
        begin(tracker, torch.nn.Identity(), {"input_ids": torch.tensor([[5, 6]]), **inputs})


def test_closing_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    with recording(model):
        model(torch.tensor(prompts(3, 3)))
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_watched_cache_dies_with_its_last_reference() -> None:
    model = tiny_model("llama")
    gc.collect()
    gc.disable()
    try:
        with recording(model) as recorder:
            cache = DynamicCache(config=model.config)
            model(torch.tensor(prompts(3)), past_key_values=cache)
            reference = weakref.ref(cache)
            recorder.inputs.clear()
            del cache
            assert reference() is None  # at once, not when a collector comes by: it may hold gigabytes
    finally:
        gc.enable()


def test_two_trackers_on_one_cache_come_off_in_any_order() -> None:
    model = tiny_model("llama")
    for first_off in (0, 1):
        cache = DynamicCache(config=model.config)
        recorders = [Recorder(model), Recorder(model)]
        model(torch.tensor(prompts(3, 3)), past_key_values=cache)
        branch = copy.deepcopy(cache)
        branch.reorder_cache(torch.tensor([1, 0]))
        model(torch.tensor([[7], [8]]), past_key_values=branch)
        for recorder in recorders:
            assert [row["parent_row"] for row in recorder.rows()[-2:]] == [5, 2]
        recorders[first_off].close()
        cache.crop(-1)
        recorders[1 - first_off].close()
        cache.crop(0)
        assert recorders[first_off].events() == []
        assert [event["row"] for event in recorders[1 - first_off].events()] == [2, 5]
        assert type(cache) is type(branch) is DynamicCache
        assert set(vars(cache)) == set(vars(branch)) == set(vars(DynamicCache(config=model.config)))


def test_outputs_are_the_same_with_and_without_a_tracker() -> None:
    model = tiny_model("gemma3_text")
    inputs = padded(prompts(3, 6))
    plain = generate(model, inputs, 6, num_beams=3)
    with recording(model):
        watched = generate(model, inputs, 6, num_beams=3)
    assert torch.equal(plain, watched)


def test_a_decode_step_costs_little() -> None:
    tracker = Recorder(torch.nn.Identity(), tokenizer=tiny_tokenizer()).tracker

    class Cache:
        length = 0

        def get_seq_length(self) -> int:
            return self.length

    cache, module = Cache(), torch.nn.Identity()
    ids, position = torch.full((16, 1), 7), torch.zeros(16, 1, dtype=torch.long)
    mask = torch.ones(16, 2000, dtype=torch.long)
    best = float("inf")
    for _ in range(300):
        kwargs = {"input_ids": ids, "attention_mask": mask[:, : cache.length + 1], "past_key_values": cache}
        start = time.perf_counter()
        begin(tracker, module, {**kwargs, "position_ids": position})
        best = min(best, time.perf_counter() - start)
        cache.length += 1
    assert best < 1e-3, f"{best * 1e6:.0f} us"  # about 80 us; the bound only catches what is not vectorised


def test_a_pass_inside_a_transform_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {"input_ids": torch.full((2, 1), 5), "use_cache": False}
        return torch.func.functional_call(model, weights, (), inputs).logits.sum()

    with (
        pytest.raises(CaptureError, match=r"outside of torch\.func transforms"),
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.mlp_out", quiet=True),
    ):
        torch.func.grad(loss)(weights)
