"""Routers, single experts, recurrent states and the largest logits, against what is computed here by hand."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import VOCAB_SIZE, tiny_model
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.mamba import modeling_mamba

import strapfmt
from strapfmt.errors import ArgumentError, CaptureError
from strapfmt.reader import Reader
from strapfmt_capture.computed import ssm_state
from strapfmt_capture.sites import describe, hook_points, list_sites, resolve

# Two sequences of 3 and 7 tokens.
N_QUERY = 7
STARTS = (4, 0)


def padded(side: str = "left") -> dict[str, torch.Tensor]:
    ids = torch.randint(4, VOCAB_SIZE, (2, N_QUERY), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, : STARTS[0]] = 0
    else:
        mask[0, N_QUERY - STARTS[0] :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def generated(
    model: PreTrainedModel, path: Path, sites: Any, **options: Any
) -> tuple[Reader, list[torch.Tensor]]:
    """Capture a prefill with left padding and three passes of decoding; return the real places of each pass."""
    inputs = padded()
    with strapfmt.capture(model, path, sites=sites, quiet=True, **options):
        model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    return Reader(path), [inputs["attention_mask"].bool(), *[torch.ones(2, 1, dtype=torch.bool)] * 3]


def by_pass(values: torch.Tensor, real: list[torch.Tensor]) -> list[torch.Tensor]:
    """Split rows of tokens into those of each pass."""
    return list(values.split([int(each.sum()) for each in real]))


# Experts.

MOE = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "jamba"]
LAYER = 1  # Jamba's first block has no experts


def moe_of(model: PreTrainedModel) -> tuple[torch.nn.Module, torch.nn.Module, torch.nn.Module]:
    """Return the norm before the experts of a block, their router, and the experts."""
    block = model.model.layers[LAYER]
    if model.config.model_type == "jamba":
        return block.pre_ff_layernorm, block.feed_forward.router, block.feed_forward.experts
    return block.post_attention_layernorm, block.mlp.gate, block.mlp.experts


def routed(model: PreTrainedModel, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose experts for `hidden [n, d_model]`, as each architecture's paper and code do."""
    logits = functional.linear(hidden, moe_of(model)[1].weight)
    weights, ids = torch.softmax(logits.float(), dim=-1).topk(2, dim=-1)
    if model.config.model_type == "mixtral" or getattr(model.config, "norm_topk_prob", False):
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return logits, weights if model.config.model_type == "mixtral" else weights.to(hidden.dtype), ids


def by_each_pair(experts: Any, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Give `hidden` to the experts in `ids [n, k]`, each pair of token and expert by itself, without weights."""
    pairs, flat = hidden.repeat_interleave(ids.shape[1], dim=0)[..., None], ids.flatten()
    gate, up = torch.bmm(experts.gate_up_proj[flat], pairs)[..., 0].chunk(2, dim=-1)
    out = torch.bmm(experts.down_proj[flat], (experts.act_fn(gate) * up)[..., None])
    return out.reshape(*ids.shape, -1)


def by_each_expert(experts: Any, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Give `hidden` of a whole pass to the experts in `ids [n, k]` one after another, without weights."""
    out = hidden.new_zeros(*ids.shape, hidden.shape[-1])
    for expert in range(experts.num_experts):
        choice, token = torch.where((ids == expert).T)
        gate, up = functional.linear(hidden[token], experts.gate_up_proj[expert]).chunk(2, dim=-1)
        out[token, choice] = functional.linear(experts.act_fn(gate) * up, experts.down_proj[expert])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", MOE)
def test_experts_are_chosen_and_compute_as_stored(
    family: str, implementation: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model(family, dtype=dtype, experts_implementation=implementation)
    assert model.config._experts_implementation == implementation
    norm, _, experts = moe_of(model)
    by_hand = by_each_pair if implementation == "batched_mm" else by_each_expert
    inputs: list[
        torch.Tensor
    ] = []  # of whole passes, padding included: an expert gets all its tokens at once
    sums: list[torch.Tensor] = []
    handles = [
        norm.register_forward_hook(lambda _, args, out: inputs.append(out.detach().flatten(0, 1).clone())),
        experts.register_forward_hook(lambda _, args, out: sums.append(out.detach().clone())),
    ]
    reader, real = generated(model, tmp_path / "x.strap", [f"blocks.{LAYER}.*", "**.expert_out"])
    for handle in handles:
        handle.remove()
    found = {
        name: by_pass(reader[f"blocks.{LAYER}.{name}"].tensor(), real)
        for name in ("router_logits", "expert_weights", "expert_ids", "expert_out")
    }
    assert len(inputs) == len(sums) == len(real)
    for number, (hidden, total, stored) in enumerate(zip(inputs, sums, real, strict=True)):
        stored = stored.flatten()
        with torch.no_grad():
            logits, weights, ids = routed(model, hidden)
            out = by_hand(experts, hidden, ids)
        assert_same_bits(found["router_logits"][number], logits[stored])
        assert_same_bits(found["expert_weights"][number], weights[stored])
        assert_same_bits(found["expert_ids"][number], ids[stored])
        assert_same_bits(found["expert_out"][number], out[stored])
        weighted = found["expert_out"][number] * found["expert_weights"][number][..., None]
        if implementation == "eager":  # adds one expert after another, each sum in the type of the stream
            order = found["expert_ids"][number].argsort(dim=1)
            first, second = weighted.gather(1, order[..., None].expand_as(weighted)).to(dtype).unbind(1)
            assert_same_bits((first + second), total[stored])
        else:
            assert_same_bits(weighted.sum(1).to(dtype), total[stored])


def test_the_experts_of_a_model_have_all_been_chosen_in_these_tests() -> None:
    model = tiny_model("mixtral")
    with torch.no_grad():
        chosen = model(**padded(), output_router_logits=True).router_logits[LAYER].topk(2).indices
    assert len(set(chosen.flatten().tolist())) == 4


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_one_expert_a_token_is_no_second_dimension_of_tokens(first: str, tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_experts_per_tok=1)
    sizes = (5, 1) if first == "prefill" else (1, 5)
    sites = ["blocks.0.expert_*"]
    with strapfmt.capture(model, tmp_path / "x.strap", sites=sites, quiet=True), torch.no_grad():
        for n_query in sizes:
            model(padded()["input_ids"][:, -n_query:])
    reader = Reader(tmp_path / "x.strap")
    assert {site.row_space for site in reader.sites.values()} == {"tokens"}
    assert reader["blocks.0.expert_ids"].tensor().shape == (12, 1)
    assert reader["blocks.0.expert_out"].tensor().shape == (12, 1, 32)


def test_as_many_tokens_as_experts_a_token_are_no_heads(tmp_path: Path) -> None:
    model, ids = tiny_model("qwen3_moe"), padded()["input_ids"][:, -2:]
    with (
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.expert_*", quiet=True),
        torch.no_grad(),
    ):
        model(ids)
        model(ids.T)
    site = Reader(tmp_path / "x.strap")["blocks.0.expert_out"]
    assert (site.n_rows, site.tensor().shape) == (8, (8, 2, 32))


def test_what_is_computed_is_no_pass_of_the_model(tmp_path: Path) -> None:
    model, inputs = tiny_model("mixtral"), padded()
    inside = "model.layers.0.mlp.experts.act_fn"
    rows = {}
    for name, sites in {"alone": [inside], "both": [inside, "blocks.0.expert_out"]}.items():
        with strapfmt.capture(model, tmp_path / f"{name}.strap", sites=sites, quiet=True):
            model(**inputs)
        site = Reader(tmp_path / f"{name}.strap")[inside]
        rows[name] = site.n_rows
        assert site.row_space == "own"
    assert rows["alone"] == rows["both"] > 0


def test_experts_are_computed_within_a_pass_that_is_trained(tmp_path: Path) -> None:
    model, inputs = tiny_model("qwen2_moe").train(), padded()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.expert_*", quiet=True):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.layers[0].mlp.gate.weight.grad is not None
    assert Reader(tmp_path / "x.strap")["blocks.1.expert_out"].n_rows == 10


def test_a_block_without_experts_has_no_such_sites() -> None:
    sites = hook_points(tiny_model("qwen3_moe", mlp_only_layers=[0]))
    assert [name for name in sites if "expert" in name or "router" in name] == [
        f"blocks.1.{name}" for name in ("router_logits", "expert_weights", "expert_ids", "expert_out")
    ]


# States.

STATEFUL = ["mamba", "mamba2", "falcon_mamba", "jamba"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", STATEFUL)
def test_states_are_those_behind_each_pass(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = tiny_model(family, dtype=dtype), padded()
    with torch.no_grad():  # by hand, without any capture
        name = "past_key_values" if family == "jamba" else "cache_params"
        output = model(**inputs, use_cache=True)
        states, ids, mask = [], inputs["input_ids"], inputs["attention_mask"]
        for _ in range(4):
            cache = output[name]
            states.append(cache.layers[0].recurrent_states[0].clone())
            ids, mask = output.logits[:, -1:].argmax(-1), functional.pad(mask, (0, 1), value=1)
            attention_mask = mask if family == "jamba" else None
            output = model(input_ids=ids, attention_mask=attention_mask, use_cache=True, **{name: cache})
    reader, real = generated(model, tmp_path / "x.strap", ["blocks.0.ssm_state", "blocks.1.resid_post"])
    site = reader["blocks.0.ssm_state"]
    assert_same_bits(site.tensor(), torch.cat(states))
    assert site.row_space == "tokens"
    assert site.rows.tolist() == [2, 9, *range(10, 16)]
    assert reader["blocks.1.resid_post"].n_rows == sum(int(each.sum()) for each in real) == 16
    tokens = {row["row"]: row for row in reader.tokens.to_arrow().to_pylist()}
    assert [tokens[row]["position"] for row in site.rows.tolist()] == [2, 6, 3, 7, 4, 8, 5, 9]
    assert [tokens[row]["sequence_id"] for row in site.rows.tolist()] == [0, 1] * 4


@pytest.mark.parametrize(
    ("family", "modeling"), [("mamba", modeling_mamba), ("falcon_mamba", modeling_falcon_mamba)]
)
def test_a_state_is_what_the_recurrence_says(family: str, modeling: Any, tmp_path: Path) -> None:
    model, ids = tiny_model(family), padded()["input_ids"][1:]
    mixer = model.backbone.layers[1].mixer
    sites = ["blocks.1.ssm_state", "backbone.layers.1.mixer:in"]
    with strapfmt.capture(model, tmp_path / "x.strap", sites=sites, quiet=True), torch.no_grad():
        model(ids)
    reader = Reader(tmp_path / "x.strap")
    with torch.no_grad():
        x = mixer.in_proj(reader[sites[1]].tensor()).chunk(2, dim=-1)[0].T[None]
        x = modeling.causal_conv1d_fn(x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, activation="silu")[0].T
        step, b, _ = mixer.x_proj(x).split([4, 8, 8], dim=-1)
        if family == "falcon_mamba":
            step, b = (each * torch.rsqrt(each.pow(2).mean(-1, keepdim=True) + 1e-6) for each in (step, b))
        delta = functional.softplus(step @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
        state = torch.zeros(64, 8)
        for t in range(N_QUERY):
            decay = torch.exp(-torch.exp(mixer.A_log) * delta[t, :, None])
            state = decay * state + delta[t, :, None] * b[t] * x[t, :, None]
    torch.testing.assert_close(reader["blocks.1.ssm_state"].tensor()[0], state, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_states_follow_beams(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.1.ssm_state", quiet=True):
        model.generate(**padded(), max_new_tokens=5, num_beams=3, do_sample=False, eos_token_id=None)
    reader = Reader(tmp_path / "x.strap")
    site = reader["blocks.1.ssm_state"]
    tokens = {row["row"]: row for row in reader.tokens.to_arrow().to_pylist()}
    assert len(reader.sequences) > 6  # beams branched
    for row in site.rows.tolist()[::2]:
        ids, parent = [], row
        while parent is not None:
            ids.append(tokens[parent]["token_id"])
            parent = tokens[parent]["parent_row"]
        with torch.no_grad():
            cache = model(torch.tensor([ids[::-1]])).cache_params
        fresh = cache.layers[1].recurrent_states[0][0]
        torch.testing.assert_close(site.take(np.array([row]))[0], fresh, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("n_query", [1, 8, 64])
def test_a_pass_as_long_as_a_state_is_wide_is_no_heads(n_query: int, tmp_path: Path) -> None:
    model = tiny_model("mamba")
    ids = torch.randint(4, VOCAB_SIZE, (2, n_query))
    with (
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.ssm_state", quiet=True),
        torch.no_grad(),
    ):
        cache = model(ids).cache_params
    site = Reader(tmp_path / "x.strap")["blocks.0.ssm_state"]
    assert site.rows.tolist() == [n_query - 1, 2 * n_query - 1]
    assert_same_bits(site.tensor(), cache.layers[0].recurrent_states[0])


def test_a_state_behind_padding_belongs_to_no_token(tmp_path: Path) -> None:
    model = tiny_model("mamba")
    with (
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.ssm_state", quiet=True),
        torch.no_grad(),
    ):
        cache = model(**padded("right")).cache_params
    site = Reader(tmp_path / "x.strap")["blocks.0.ssm_state"]
    assert site.rows.tolist() == [9]
    assert_same_bits(site.tensor(), cache.layers[0].recurrent_states[0][1:])


def test_without_a_cache_there_is_no_state_and_the_error_says_so(tmp_path: Path) -> None:
    model = tiny_model("mamba")
    with (
        pytest.raises(CaptureError, match=r"blocks\.0\.ssm_state.*'cache_params': NoneType.*use_cache=True"),
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.*", quiet=True),
    ):
        model(**padded(), use_cache=False)


# The largest logits.


@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_logits_are_those_of_the_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, inputs = tiny_model(family, dtype=dtype), padded()
    with (
        strapfmt.capture(model, tmp_path / "x.strap", sites=["logits"], top_k_logits=5, quiet=True),
        torch.no_grad(),
    ):
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    reader = Reader(tmp_path / "x.strap")
    assert reader.names == ["logits.top_values", "logits.top_ids"]
    values, ids = logits.topk(5)
    assert_same_bits(reader["logits.top_values"].tensor(), values)
    assert_same_bits(reader["logits.top_ids"].tensor(), ids)
    assert reader["logits.top_ids"].rows.tolist() == list(range(10))


def test_the_largest_logits_of_generation_are_rows_of_their_tokens(tmp_path: Path) -> None:
    model = tiny_model("llama")
    reader, _ = generated(model, tmp_path / "top.strap", "logits.*", top_k_logits=3)
    whole, _ = generated(model, tmp_path / "whole.strap", "logits")
    assert reader["logits.top_ids"].rows.tolist() == whole["logits"].rows.tolist() == [2, 9, *range(10, 16)]
    values, ids = whole["logits"].tensor().topk(3)
    assert_same_bits(reader["logits.top_values"].tensor(), values)
    assert_same_bits(reader["logits.top_ids"].tensor(), ids)
    with torch.no_grad():
        output = model.generate(**padded(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert reader["logits.top_ids"].tensor()[:, 0].reshape(4, 2).T.tolist() == output[:, N_QUERY:].tolist()


def test_equal_logits_stay_beside_their_ids(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[::2] = 1.0
    with (
        strapfmt.capture(model, tmp_path / "x.strap", sites="logits", top_k_logits=VOCAB_SIZE, quiet=True),
        torch.no_grad(),
    ):
        logits = model(padded()["input_ids"]).logits.flatten(0, 1)
    reader = Reader(tmp_path / "x.strap")
    ids = reader["logits.top_ids"].tensor()
    assert_same_bits(reader["logits.top_values"].tensor(), logits.gather(1, ids))
    assert ids.sort(dim=1).values.tolist() == [list(range(VOCAB_SIZE))] * len(ids)


def test_one_of_the_two_may_be_stored_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    sites = ["logits.top_ids", "embed"]
    with strapfmt.capture(model, tmp_path / "x.strap", sites=sites, top_k_logits=2, quiet=True):
        model(**padded())
    assert Reader(tmp_path / "x.strap").names == ["embed", "logits.top_ids"]


@pytest.mark.parametrize(
    ("sites", "k", "problem"),
    [
        ("logits", 0, "top_k_logits: expected"),
        ("logits", True, "top_k_logits: expected"),
        ("logits", 1.5, "top_k_logits: expected"),
        ("logits", VOCAB_SIZE + 1, "expected at most 101, the size of the vocabulary; got 102"),
        ("embed", 3, "expected 'logits' among the sites"),
        ("lm_head", 3, "expected 'logits' among the sites"),
        ("logits.top_ids", None, "exists only with top_k_logits"),
    ],
)
def test_an_option_that_cannot_be_met_is_refused(sites: str, k: Any, problem: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=problem):
        strapfmt.capture(tiny_model("llama"), tmp_path / "x.strap", sites=sites, top_k_logits=k)
    assert not (tmp_path / "x.strap").exists()


def test_other_numbers_of_logits_are_not_appended(tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="logits", top_k_logits=2, quiet=True):
        model(**padded())
    with (
        pytest.raises(CaptureError, match=r"shape \[2\]|shape \(2,\)"),
        strapfmt.capture(model, path, sites="logits", top_k_logits=3, mode="append", quiet=True),
    ):
        model(**padded())


def test_a_wildcard_takes_the_largest_only_and_the_listing_says_their_size() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    points = resolve(model, "**", top_k_logits=4)
    assert [point.site for point in points if "logits" in point.site] == [
        "logits.top_values",
        "logits.top_ids",
    ]
    infos = {info.site: (info.shape, info.dtype, info.bytes_per_token) for info in describe(model, points)}
    assert infos["logits.top_values"] == ((4,), "bfloat16", 8)
    assert infos["logits.top_ids"] == ((4,), "int64", 32)
    assert "logits.top_ids" not in list_sites(model).names


def test_the_state_of_a_cache_that_does_not_give_it_by_layer_is_found() -> None:
    state = torch.arange(6.0).reshape(2, 3)
    cache = SimpleNamespace(
        layers=[None, SimpleNamespace(recurrent_states={0: state})], update_recurrent_state=None
    )
    mixer = torch.nn.Identity()
    mixer.layer_idx = 1
    found = ssm_state(state, mixer, (state,), {"cache_params": cache})
    assert found is not None
    assert torch.equal(found, state.unsqueeze(1))
    assert ssm_state(state, mixer, (state,), {"cache_params": None}) is None
