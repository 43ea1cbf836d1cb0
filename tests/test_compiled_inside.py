"""Rotated heads, recomputed patterns and outputs of single experts, in whole graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiler import n_graphs
from models import tiny_model
from transformers import DynamicCache, StaticCache
from transformers.modeling_flash_attention_utils import _is_packed_sequence

import strapfmt
from strapfmt.reader import Reader

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
RECOMPUTE = {"attn_pattern": "recompute"}
ROTATED, EXPERTS = ["blocks.*.rot_q", "blocks.*.rot_k"], ["blocks.*.expert_ids", "blocks.*.expert_out"]
INSIDE: list[tuple[str, list[str], dict[str, Any], dict[str, Any]]] = [
    ("llama", [*ROTATED, "blocks.*.attn_pattern"], RECOMPUTE, {}),
    ("gemma2", [*ROTATED, "blocks.*.attn_pattern"], RECOMPUTE, {"attn_implementation": "eager"}),
    ("gptj", ROTATED, {}, {}),
    ("mixtral", EXPERTS, {}, {"experts_implementation": "grouped_mm"}),
    ("mixtral", EXPERTS, {}, {"experts_implementation": "batched_mm"}),
]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


def decode(call: Any, cache: Any) -> None:
    """Run a prompt and three steps."""
    call(input_ids=IDS, past_key_values=cache)
    for shift in range(3):
        call(input_ids=IDS[:, :1] + shift, past_key_values=cache)


def values(path: Path) -> dict[str, torch.Tensor]:
    """Every value of each site, in the order of rows."""
    found = {}
    for name, site in Reader(path).sites.items():
        if site.is_ragged:
            flat = site.to_arrow()["activation"].combine_chunks().flatten()
            found[name] = torch.from_numpy(flat.to_numpy().copy())
        else:
            found[name] = site.tensor()
    return found


def captured(model: Any, path: Path, sites: Any, run: Callable[[], None], **options: Any) -> dict[str, Any]:
    with strapfmt.capture(model, path, sites=sites, quiet=True, **options) as cap:
        run()
    assert not any(site.n_missed for site in cap.report.sites)
    assert set(Reader(path).steps.to_arrow()["status"].to_pylist()) == {"complete"}
    return values(path)


def assert_same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    assert all(len(x) and torch.equal(x, wanted[name]) for name, x in found.items())


@pytest.mark.parametrize(
    ("family", "sites", "options", "overrides", "backend"),
    [
        pytest.param(
            *case,
            backend,
            marks=pytest.mark.slow if number in (2, 4) or (number and backend == "aot_eager") else (),
        )
        for number, case in enumerate(INSIDE)
        for backend in ("eager", "aot_eager")
    ],
)
def test_a_prompt_and_decoding_take_as_many_graphs_as_without_and_give_the_same_bits(
    family: str,
    sites: list[str],
    options: dict[str, Any],
    overrides: dict[str, Any],
    backend: str,
    tmp_path: Path,
) -> None:
    model = tiny_model(family, num_hidden_layers=1, **overrides)

    def run(call: Any) -> None:
        decode(call, DynamicCache(config=model.config))

    wanted = captured(model, tmp_path / "e.strap", sites, lambda: run(model), **options)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    run(compiled)  # compiled code without the sites is there already
    n_without = n_graphs()
    found = captured(model, tmp_path / "c.strap", sites, lambda: run(compiled), **options)
    assert n_graphs() == 2 * n_without
    assert_same_bits(found, wanted)


@pytest.mark.parametrize(("family", "sites", "options", "overrides"), [INSIDE[0], INSIDE[3]])
def test_generated_code_with_a_static_cache_gives_the_same_values(
    family: str, sites: list[str], options: dict[str, Any], overrides: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(family, num_hidden_layers=1, **overrides)

    def run(call: Any) -> None:
        decode(call, StaticCache(config=model.config, max_cache_len=16))

    wanted = captured(model, tmp_path / "e.strap", sites, lambda: run(model), **options)
    compiled = torch.compile(model, fullgraph=True)
    found = captured(model, tmp_path / "c.strap", sites, lambda: run(compiled), **options)
    assert n_graphs() == 2
    assert set(found) == set(wanted)
    assert all(torch.allclose(x, wanted[name], atol=1e-5) for name, x in found.items())


def each_layer(model: Any) -> None:
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)


def each_layer_wrapped(model: Any) -> None:
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer, backend="eager", fullgraph=True)


def each_attention_wrapped(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn = torch.compile(layer.self_attn, backend="eager", fullgraph=True)


@pytest.mark.parametrize("compile_", [each_layer, each_layer_wrapped, each_attention_wrapped])
@pytest.mark.parametrize("layers", ["0", "1", "*"])
def test_layers_that_are_captured_alike_share_their_code_and_others_do_not(
    compile_: Callable[[Any], None], layers: str, tmp_path: Path
) -> None:
    sites = [f"blocks.{layers}.{name}" for name in ("rot_q", "attn_pattern")]
    found = []
    for name in ("e", "c"):
        model = tiny_model("llama", num_hidden_layers=3)
        if name == "c":
            compile_(model)

        def run(model: Any = model) -> None:
            for shift in range(3):
                model(input_ids=IDS + shift, use_cache=False)

        found.append(captured(model, tmp_path / f"{name}.strap", sites, run, **RECOMPUTE))
    assert n_graphs() == (1 if layers == "*" else 2)
    assert_same_bits(found[1], found[0])


def test_modules_inside_experts_do_not_fire_for_what_is_computed_once_more(tmp_path: Path) -> None:
    model = tiny_model("mixtral", num_hidden_layers=1, experts_implementation="grouped_mm")
    sites = [*EXPERTS, "model.layers.0.mlp.experts.act_fn"]
    run = torch.compile(model, backend="eager", fullgraph=True)
    wanted, found = (
        captured(
            model,
            tmp_path / f"{n}.strap",
            sites,
            lambda call=call: call(input_ids=IDS, use_cache=False),  # type: ignore[misc]
        )
        for n, call in enumerate((model, run))
    )
    assert_same_bits(found, wanted)


def test_a_pause_leaves_no_positions_behind(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    run = torch.compile(model, backend="eager", fullgraph=True)
    with strapfmt.capture(model, tmp_path / "x.strap", sites=ROTATED, quiet=True) as cap:
        for _ in range(2):
            run(input_ids=IDS, use_cache=False)
            with cap.paused():
                run(input_ids=IDS, use_cache=False)
    assert n_graphs() == 2
    assert [site.written for site in cap.report.sites] == [2 * IDS.numel()] * 2


def test_gradients_of_a_model_whose_inside_is_captured_are_those_without(tmp_path: Path) -> None:
    def gradients(run: Any, model: Any) -> list[torch.Tensor]:
        model.zero_grad()
        run(input_ids=IDS, use_cache=False).logits.square().mean().backward()
        return [each.grad.clone() for each in model.parameters() if each.grad is not None]

    for family, sites, options, overrides in (INSIDE[0], INSIDE[4]):
        with torch.enable_grad():
            model = tiny_model(family, num_hidden_layers=1, **overrides)
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
            wanted = gradients(run, model)
            with strapfmt.capture(model, tmp_path / f"{family}.strap", sites=sites, quiet=True, **options):
                found = gradients(run, model)
        assert wanted
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_experts_that_loop_over_what_was_chosen_are_no_graph_without_a_capture_either(
    tmp_path: Path,
) -> None:
    model = tiny_model("mixtral", num_hidden_layers=1, experts_implementation="eager")
    run = torch.compile(model, backend="eager", fullgraph=True)
    refused = pytest.raises(torch._dynamo.exc.UserError, match="data-dependent")
    with refused:
        run(input_ids=IDS, use_cache=False)
    with refused, strapfmt.capture(model, tmp_path / "x.strap", sites=EXPERTS, quiet=True):
        run(input_ids=IDS, use_cache=False)


def test_flash_attention_looks_for_packed_sequences_which_is_no_graph_without_a_capture_either() -> None:
    compiled = torch.compile(
        lambda positions: 1 if _is_packed_sequence(positions, 1) else 0, backend="eager", fullgraph=True
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Data-dependent branching"):
        compiled(torch.arange(4)[None])
