"""Capturing compiled models: whole and in parts, compiled before and meanwhile, and never in silence."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compiler import n_breaks, n_graphs
from models import tiny_model
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from transformers import StaticCache
from transformers.generation import CompileConfig

import strapfmt
from strapfmt.errors import CaptureError, CompiledModelError, SiteNeverFiredError
from strapfmt.reader import Reader

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
N_BLOCKS, WIDTH, N_TOKENS = 2, 8, 50
SITES = ["blocks.*", "blocks.*.mlp", "blocks.*.mlp:in", "head"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]
# What PyTorch remarks of a float32 model, and of a graph in which our error has struck first.
IGNORED = pytest.mark.filterwarnings("ignore:TensorFloat32", "ignore:The CUDA Graph is empty")


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.mlp(x))


class Small(torch.nn.Module):
    """A language model that compiles in a moment."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = torch.nn.Embedding(N_TOKENS, WIDTH)
            self.blocks = torch.nn.ModuleList(Block() for _ in range(N_BLOCKS))
            self.head = torch.nn.Linear(WIDTH, N_TOKENS)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def by_hand(*inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every site of `SITES`, one row a token, computed without hooks."""
    model, parts = Small(), []
    for ids in inputs:
        found = {}
        x = model.embed(ids).reshape(-1, WIDTH)
        for number, block in enumerate(model.blocks):
            found[f"blocks.{number}.mlp:in"], found[f"blocks.{number}.mlp"] = x, block.mlp(x)
            x = found[f"blocks.{number}"] = x + torch.relu(block.mlp(x))
        found["head"] = model.head(x)
        parts.append(found)
    return {site: torch.cat([part[site] for part in parts]).detach() for site in parts[0]}


def capture(model: Any, path: Path, sites: Any = SITES, **options: Any) -> Any:
    return strapfmt.capture(model, path, sites=sites, quiet=True, **options)


def check(path: Path, *inputs: torch.Tensor) -> None:
    """Whether a dataset holds the passes over these inputs, each token once and every site at each."""
    reader, wanted = Reader(path), by_hand(*inputs)
    ids = reader.tokens.to_arrow(["token_id"])["token_id"].to_pylist()
    assert ids == torch.cat([each.reshape(-1) for each in inputs]).tolist()
    assert set(reader.sites) == set(wanted)
    for name, site in reader.sites.items():
        assert site.rows.tolist() == list(range(len(ids)))
        assert torch.allclose(site.take(site.rows), wanted[name], atol=1e-5), name
    assert set(reader.steps.to_arrow()["status"].to_pylist()) == {"complete"}


def whole(model: Small, **options: Any) -> Any:
    return torch.compile(model, **options)


def in_place(model: Small, **options: Any) -> Any:
    model.compile(**options)
    return model


def its_forward(model: Small, **options: Any) -> Any:
    model.forward = torch.compile(model.forward, **options)  # type: ignore[method-assign]
    return model


def its_blocks(model: Small, **options: Any) -> Any:
    for block in model.blocks:
        block.compile(**options)
    return model


def its_blocks_wrapped(model: Small, **options: Any) -> Any:
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, **options)  # type: ignore[assignment]
    return model


def around(model: Small, **options: Any) -> Any:
    return torch.compile(lambda input_ids: model(input_ids=input_ids) * 2, **options)


def its_call(model: Small, **options: Any) -> Any:
    return torch.compile(model.__call__, **options)


Compile = Callable[..., Any]
KNOWN: list[Compile] = [whole, in_place, its_forward, its_blocks, its_blocks_wrapped]
UNKNOWN: list[Compile] = [around, its_call]


@pytest.mark.parametrize("compile_", KNOWN)
def test_what_was_compiled_before_is_captured_in_whole_graphs(compile_: Compile, tmp_path: Path) -> None:
    model, path = Small(), tmp_path / "x.strap"
    run = compile_(model, backend="eager", fullgraph=True)
    output = run(input_ids=IDS)  # compiled code without hooks is there already
    before = n_graphs()
    with capture(model, path) as cap:
        for shift in range(4):
            assert torch.equal(run(input_ids=IDS + shift), Small()(IDS + shift))
            assert n_graphs() == 2 * before  # once more, with the sites, and then no more
    check(path, *(IDS + shift for shift in range(4)))
    assert [site.n_missed for site in cap.report.sites] == [0] * len(cap.report.sites)
    assert torch.equal(run(input_ids=IDS), output)
    assert n_graphs() == 3 * before  # and without them again
    assert not any(tap.staged for tap in cap._engine.hooks.taps)


@pytest.mark.parametrize("compile_", [*KNOWN, *UNKNOWN])
@pytest.mark.parametrize("is_before", [True, False])
def test_without_fullgraph_everything_is_captured(compile_: Compile, is_before: bool, tmp_path: Path) -> None:
    model, path = Small(), tmp_path / "x.strap"
    run = None
    if is_before:
        run = compile_(model, backend="eager")
        run(input_ids=IDS)
    with capture(model, path) as cap:
        run = compile_(model, backend="eager") if run is None else run
        run(input_ids=IDS)
        n_after = n_graphs()
        run(input_ids=IDS + 1)
        run(input_ids=IDS + 2)
        assert n_graphs() == n_after
    check(path, *(IDS + shift for shift in range(3)))
    assert [site.n_missed for site in cap.report.sites] == [0] * len(cap.report.sites)


@pytest.mark.parametrize(
    ("compile_", "is_before"), [*((each, False) for each in KNOWN), *((each, True) for each in UNKNOWN)]
)
def test_a_full_graph_in_which_a_pass_would_begin_is_refused(
    compile_: Compile, is_before: bool, tmp_path: Path
) -> None:
    model = Small()
    run = None
    if is_before:
        run = compile_(model, backend="eager", fullgraph=True)
        run(input_ids=IDS)

    def compile_and_run() -> None:
        (compile_(model, backend="eager", fullgraph=True) if run is None else run)(input_ids=IDS)

    refused = pytest.raises(
        torch._dynamo.exc.Unsupported, match=r"strapfmt: a pass .* begins and ends outside"
    )
    with refused, capture(model, tmp_path / "x.strap"):
        compile_and_run()


@pytest.mark.parametrize("compile_", [whole, in_place])
def test_code_that_another_model_of_the_class_has_compiled_is_not_taken(
    compile_: Compile, tmp_path: Path
) -> None:
    model, other, path = Small(), Small(), tmp_path / "x.strap"
    run = compile_(model, backend="eager", fullgraph=True)
    run_other = compile_(other, backend="eager", fullgraph=True)
    with capture(model, path):
        for shift in range(3):
            run_other(input_ids=IDS)
            run(input_ids=IDS + shift)
            assert n_graphs() == 2
    check(path, *(IDS + shift for shift in range(3)))


@pytest.mark.parametrize("compile_", [its_blocks, its_blocks_wrapped])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("is_before", [True, False])
def test_one_of_several_layers_of_one_class_is_captured(
    compile_: Compile, number: int, is_before: bool, tmp_path: Path
) -> None:
    model, path, site = Small(), tmp_path / "x.strap", f"blocks.{number}.mlp"
    if is_before:
        compile_(model, backend="eager")
    with capture(model, path, site) as cap:
        if not is_before:
            compile_(model, backend="eager")
        model(input_ids=IDS)
        model(input_ids=IDS + 1)
    assert cap.report.sites[0].n_missed == 0
    reader = Reader(path)[site]
    assert torch.allclose(reader.take(reader.rows), by_hand(IDS, IDS + 1)[site], atol=1e-6)


@pytest.mark.parametrize("order", ["there, here", "here, there"])
@pytest.mark.parametrize("number", [0, 1])
def test_layers_that_another_thread_compiles_first_are_captured(
    order: str, number: int, tmp_path: Path
) -> None:
    model, path, site = its_blocks(Small(), backend="eager"), tmp_path / "x.strap", f"blocks.{number}.mlp"
    before = torch._dynamo.config.skip_nnmodule_hook_guards
    with capture(model, path, site) as cap:
        for place in order.split(", "):
            run = partial(model, input_ids=IDS)
            if place == "here":
                run()
            else:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(torch.no_grad()(run)).result()
    assert cap.report.sites[0].n_missed == 0
    reader = Reader(path)[site]
    assert torch.allclose(reader.take(reader.rows), by_hand(IDS, IDS)[site], atol=1e-6)
    assert torch._dynamo.config.skip_nnmodule_hook_guards is before


def test_captures_that_end_in_any_order_and_thread_leave_the_compiler_as_it_was(tmp_path: Path) -> None:
    model, other = Small(), Small()
    assert torch._dynamo.config.skip_nnmodule_hook_guards
    first, second = capture(model, tmp_path / "a.strap"), capture(other, tmp_path / "b.strap")
    for cap in (first, second):
        cap.__enter__()
    model(input_ids=IDS)
    other(input_ids=IDS)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(first.__exit__, None, None, None).result()
    assert not torch._dynamo.config.skip_nnmodule_hook_guards
    second.__exit__(None, None, None)
    assert torch._dynamo.config.skip_nnmodule_hook_guards
    check(tmp_path / "a.strap", IDS)
    check(tmp_path / "b.strap", IDS)


def test_a_setting_of_this_thread_against_hooks_is_changed_for_the_capture(tmp_path: Path) -> None:
    model, path, site = its_blocks(Small(), backend="eager"), tmp_path / "x.strap", "blocks.1.mlp"
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        with capture(model, path, site):
            model(input_ids=IDS)
        assert torch._dynamo.config.skip_nnmodule_hook_guards
    reader = Reader(path)[site]
    assert torch.allclose(reader.take(reader.rows), by_hand(IDS)[site], atol=1e-6)


def test_the_wrapper_can_be_given_as_well_as_the_model(tmp_path: Path) -> None:
    compiled = torch.compile(Small(), backend="eager", fullgraph=True)
    path = tmp_path / "x.strap"
    with capture(compiled, path):
        compiled(IDS)
        compiled._orig_mod(IDS + 1)  # not compiled: its own hooks
    check(path, IDS, IDS + 1)


def test_batches_of_many_sizes_take_one_more_graph(tmp_path: Path) -> None:
    model, path = Small(), tmp_path / "x.strap"
    run = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    inputs = [torch.randint(0, N_TOKENS, shape) for shape in ((2, 3), (3, 5), (4, 2), (2, 9))]
    with capture(model, path):
        for ids in inputs:
            run(ids)
    check(path, *inputs)
    assert n_graphs() == 1


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_generated_code_gives_the_values_it_computes(mode: str | None, tmp_path: Path) -> None:
    model, path = Small(), tmp_path / "x.strap"
    run = torch.compile(model, fullgraph=True, mode=mode)
    with capture(model, path):
        outputs = torch.cat([run(IDS + shift).reshape(-1, N_TOKENS) for shift in range(2)])
    check(path, IDS, IDS + 1)
    site = Reader(path)["head"]
    assert torch.equal(site.take(site.rows), outputs)


def test_a_value_that_is_changed_in_place_later_is_stored_as_it_was(tmp_path: Path) -> None:
    class Changing(Small):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.blocks[1](self.blocks[0](self.embed(input_ids)))
            y = self.head(x)
            x.zero_()
            return y.mul_(3)

    for backend in ("eager", "inductor"):
        model, path = Changing(), tmp_path / f"{backend}.strap"
        run = torch.compile(model, backend=backend, fullgraph=True)
        with capture(model, path):
            run(IDS)
        check(path, IDS)


def test_gradients_are_those_without_a_capture(tmp_path: Path) -> None:
    def gradients(run: Any, model: Small) -> list[torch.Tensor]:
        model.zero_grad()
        run(IDS).square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]

    with torch.enable_grad():
        model, path = Small(), tmp_path / "x.strap"
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        wanted = gradients(run, model)
        with capture(model, path):
            found = gradients(run, model)
    check(path, IDS)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# Dynamo looks at the gradient of every tensor it meets.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_compiled_blocks_stores_the_first_pass_only(
    use_reentrant: bool, tmp_path: Path
) -> None:
    class Repeated(Small):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(input_ids)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=use_reentrant)
            return self.head(x)

    with torch.enable_grad():
        model, path = Repeated(), tmp_path / "x.strap"
        its_blocks(model, backend="aot_eager")
        with capture(model, path):
            for shift in range(2):
                model(IDS + shift).square().mean().backward()
    check(path, IDS, IDS + 1)
    reference = Repeated()
    with torch.enable_grad():
        for shift in range(2):
            reference(IDS + shift).square().mean().backward()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)  # type: ignore[arg-type]


def test_a_site_that_fires_twice_in_one_graph_is_refused_or_has_rows_of_its_own(tmp_path: Path) -> None:
    class Twice(Small):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.blocks[0](self.blocks[0](self.embed(input_ids))))

    model = Twice()
    run = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(CaptureError, match="fired twice"), capture(model, tmp_path / "x.strap", "blocks.0"):
        run(IDS)
    steps = Reader(tmp_path / "x.strap").steps.to_arrow()
    assert steps["status"].to_pylist() == ["abandoned"]

    plain = torch.nn.Sequential(torch.nn.Linear(4, 4))
    twice = torch.compile(torch.nn.Sequential(plain, plain), backend="eager", fullgraph=True)
    x = torch.randn(3, 4)
    with capture(twice, tmp_path / "own.strap", "0.0"):
        twice(x)
        twice(x + 1)
    site = Reader(tmp_path / "own.strap")["0.0"]
    wanted = [plain(x), plain(plain(x)), plain(x + 1), plain(plain(x + 1))]
    assert torch.allclose(site.take(own_rows=np.arange(12)), torch.cat(wanted))


def test_a_pass_that_fails_inside_a_graph_is_abandoned_and_the_next_one_is_right(tmp_path: Path) -> None:
    model, path = Small(), tmp_path / "x.strap"
    run = torch.compile(model, backend="eager", fullgraph=True)
    with capture(model, path):
        run(IDS)
        with pytest.raises(IndexError):
            run(IDS + N_TOKENS)
        run(IDS + 1)
    steps = Reader(path).steps.to_arrow()
    assert steps["status"].to_pylist() == ["complete", "abandoned", "complete"]
    site, wanted = Reader(path)["head"], by_hand(IDS, IDS + 1)["head"]
    kept = [row for row in site.rows.tolist() if row < 8 or row >= 16]
    assert torch.allclose(site.take(kept), wanted, atol=1e-6)


def test_a_compiled_part_that_is_called_by_itself_is_refused(tmp_path: Path) -> None:
    model = its_blocks(Small(), backend="eager")
    with (
        pytest.raises(CaptureError, match="fired outside a forward pass"),
        capture(model, tmp_path / "x.strap"),
    ):
        model.blocks[0](torch.zeros(1, 2, WIDTH))


def test_two_captures_of_one_compiled_model_each_have_their_sites(tmp_path: Path) -> None:
    model = Small()
    run = torch.compile(model, backend="eager", fullgraph=True)
    with capture(model, tmp_path / "a.strap"):
        run(IDS)
        with capture(model, tmp_path / "b.strap", "head"):
            run(IDS + 1)
        run(IDS + 2)
    check(tmp_path / "a.strap", IDS, IDS + 1, IDS + 2)
    site = Reader(tmp_path / "b.strap")["head"]
    assert torch.allclose(site.take(site.rows), by_hand(IDS + 1)["head"], atol=1e-6)


def test_a_site_that_a_graph_does_not_reach_is_counted_and_told(tmp_path: Path) -> None:
    class Skipping(Small):
        def forward(self, input_ids: torch.Tensor, skip: bool = True) -> torch.Tensor:
            x = self.embed(input_ids)
            return self.head(x if skip else self.blocks[0](x))

    model = Skipping()
    run = torch.compile(model, backend="eager", fullgraph=True)
    with capture(model, tmp_path / "a.strap", ["head", "blocks.0"]) as cap:
        run(IDS, skip=False)
        run(IDS)
    assert {site.name: site.n_missed for site in cap.report.sites} == {"head": 0, "blocks.0": 1}
    with pytest.raises(SiteNeverFiredError), capture(model, tmp_path / "b.strap", "blocks.0"):
        run(IDS)


def test_no_rows_are_lost_where_compiling_gives_up(tmp_path: Path) -> None:
    class Breaking(Small):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0](self.embed(input_ids))
            torch._dynamo.graph_break()
            return self.head(self.blocks[1](x))

    inputs = [torch.randint(0, N_TOKENS, (1, n)) for n in range(2, 8)]
    with torch._dynamo.config.patch(recompile_limit=2):
        for compile_ in (whole, in_place, its_forward):
            model, path = Breaking(), tmp_path / f"{compile_.__name__}.strap"
            run = compile_(model, backend="eager", dynamic=False)
            with capture(model, path):
                for ids in inputs:
                    run(input_ids=ids)
            check(path, *inputs)


def test_a_full_ring_drops_passes_of_a_compiled_model_whole(tmp_path: Path) -> None:
    model, path = Small(), tmp_path / "x.strap"
    run = torch.compile(model, backend="eager", fullgraph=True)
    with capture(model, path, on_full="drop", host_ring_bytes=1 << 16) as cap:
        for shift in range(30):
            run((IDS + shift) % N_TOKENS)
    for site in cap.report.sites:
        assert site.expected == 30 * 8 == site.written + site.dropped


def test_copies_and_parts_of_a_captured_model_are_free_of_the_capture(tmp_path: Path) -> None:
    model = in_place(Small(), backend="eager")
    compiled = model._compiled_call_impl
    with capture(model, tmp_path / "x.strap"):
        assert model._compiled_call_impl is not compiled
        copied = copy.deepcopy(model)
        model(IDS)
    assert model._compiled_call_impl is compiled
    assert copied._compiled_call_impl is None
    assert torch.allclose(copied(IDS), Small()(IDS))
    check(tmp_path / "x.strap", IDS)
    gc.collect()


class Shifting(torch.nn.Module):
    """Gives the language model in it tokens of its own making."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.lm(input_ids=input_ids + 1, use_cache=False).logits


def test_tokens_that_a_wrapper_changes_inside_a_graph_are_refused(tmp_path: Path) -> None:
    lm = tiny_model("gpt2", num_hidden_layers=1)
    run = torch.compile(Shifting(lm), backend="eager", fullgraph=True)
    with (
        pytest.raises(CompiledModelError, match="other tokens than the call around it"),
        capture(run, tmp_path / "x.strap", "blocks.0.resid_post"),
    ):
        run(IDS)
    outside = Shifting(lm)  # the language model compiled itself: its tokens are known
    lm.compile(backend="eager", fullgraph=True)
    with capture(outside, tmp_path / "y.strap", "blocks.0.resid_post"):
        outside(IDS)
    ids = Reader(tmp_path / "y.strap").tokens.to_arrow(["token_id"])["token_id"].to_pylist()
    assert ids == (IDS + 1).reshape(-1).tolist()


def test_two_streams_of_tokens_in_one_graph_are_refused(tmp_path: Path) -> None:
    model = tiny_model("t5")
    model.compile(backend="eager")
    refused = pytest.raises(CompiledModelError, match="each by itself")
    with refused, capture(model, tmp_path / "x.strap", "encoder.block.0"):
        model(input_ids=IDS, decoder_input_ids=IDS)


@pytest.mark.parametrize("is_before", [True, False])
def test_an_encoder_and_a_decoder_have_graphs_of_their_own(is_before: bool, tmp_path: Path) -> None:
    def run(model: torch.nn.Module, path: Path, compile_: bool = False) -> Reader:
        with capture(model, path, ["encoder.block.0", "decoder.block.0"]):
            if compile_:
                model.compile(backend="eager")  # cut at its encoder and its decoder
            model(input_ids=IDS, decoder_input_ids=IDS)
        return Reader(path)

    wanted = run(tiny_model("t5"), tmp_path / "e.strap")
    model = tiny_model("t5")
    if is_before:
        model.encoder.compile(backend="eager", fullgraph=True)
        model.decoder.compile(backend="eager", fullgraph=True)
    reader = run(model, tmp_path / "c.strap", compile_=not is_before)
    columns = ["row", "token_id", "sequence_id", "position", "phase"]
    assert set(reader.steps.to_arrow()["status"].to_pylist()) == {"complete"}
    assert reader.tokens.to_arrow(columns).equals(wanted.tokens.to_arrow(columns))
    for name, site in reader.sites.items():
        assert site.rows.tolist() == wanted[name].rows.tolist()
        assert torch.allclose(site.take(site.rows), wanted[name].take(wanted[name].rows), atol=1e-6)


def test_passes_are_paused_and_end_early_in_whole_graphs(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    run = torch.compile(model, backend="eager", fullgraph=True)
    with capture(model, tmp_path / "x.strap", "blocks.0.resid_post", stop_at_layer=1) as cap:
        run(input_ids=IDS, use_cache=False)
        with cap.paused():
            run(input_ids=IDS, use_cache=False)
            run(input_ids=IDS, use_cache=False)
        run(input_ids=IDS + 1, use_cache=False)
    assert n_graphs() == 2
    assert cap.report.n_steps == cap.report.n_paused_passes == 2
    site = Reader(tmp_path / "x.strap")["blocks.0.resid_post"]
    wanted = [tiny_model("gpt2")(ids, output_hidden_states=True).hidden_states[1] for ids in (IDS, IDS + 1)]
    assert torch.allclose(site.take(site.rows), torch.cat(wanted).flatten(0, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("family", "sites", "options"),
    [
        ("llama", ["blocks.0.q", "blocks.0.v", "blocks.0.z"], {}),
        ("llama", ["blocks.0.q", "blocks.0.rot_q", "blocks.0.rot_k"], {}),
        ("llama", "blocks.0.attn_pattern", {"attn_pattern": "recompute"}),
        ("mixtral", ["blocks.0.expert_ids", "blocks.0.expert_out", "blocks.0.resid_post"], {}),
        ("gpt2", ["logits.top_values", "logits.top_ids"], {"top_k_logits": 3}),
    ],
)
def test_what_is_computed_for_a_site_is_the_same_compiled(
    family: str, sites: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    def run(model: Any, call: Any, path: Path) -> Reader:
        with capture(model, path, sites, **options) as cap:
            for shift in range(2):
                call(input_ids=IDS + shift, use_cache=False)
        assert not any(site.n_missed for site in cap.report.sites)
        return Reader(path)

    model = tiny_model(family, num_hidden_layers=1)
    wanted = run(model, model, tmp_path / "e.strap")
    reader = run(model, torch.compile(model, backend="eager", fullgraph=True), tmp_path / "c.strap")
    assert n_breaks() == 0
    assert set(reader.sites) == set(wanted.sites)
    for name, site in reader.sites.items():
        assert site.rows.tolist() == wanted[name].rows.tolist()
        if site.is_ragged:
            tables = [each.to_arrow() for each in (site, wanted[name])]
            assert tables[0]["shape"].equals(tables[1]["shape"])
            values = [table["activation"].combine_chunks().flatten().to_numpy().copy() for table in tables]
            pairs = [(torch.from_numpy(values[0]), torch.from_numpy(values[1]))]
        else:
            pairs = [(site.take(site.rows), wanted[name].take(site.rows))]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs), name


UNIFORM = ["blocks.*.resid_pre", "blocks.*.attn_out", "blocks.*.resid_post", "final_norm", "logits"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_models_of_hugging_face_give_the_same_compiled_and_not(family: str, tmp_path: Path) -> None:
    model = tiny_model(family, num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=16)

    def run(path: Path, call: Any, cache: StaticCache) -> Reader:
        with capture(model, path, UNIFORM):
            call(input_ids=IDS, past_key_values=cache)
            for shift in range(5):
                call(input_ids=IDS[:, :1] + shift, past_key_values=cache)
        return Reader(path)

    eager = run(tmp_path / "e.strap", model, StaticCache(config=model.config, max_cache_len=16))
    reader = run(tmp_path / "c.strap", compiled, cache)
    assert n_graphs() == 2  # the prompt, and decoding
    assert n_breaks() == 0
    assert set(reader.sites) == set(eager.sites)
    for name, site in reader.sites.items():
        assert torch.allclose(site.take(site.rows), eager[name].take(eager[name].rows), atol=1e-6), name
    columns = ["token_id", "sequence_id", "position", "parent_row", "phase"]
    assert reader.tokens.to_arrow(columns).equals(eager.tokens.to_arrow(columns))


def test_the_cache_that_a_compiled_model_returns_is_followed(tmp_path: Path) -> None:
    model, path = tiny_model("llama", num_hidden_layers=1), tmp_path / "x.strap"
    model.compile(backend="eager", fullgraph=True)
    with capture(model, path, "blocks.0.resid_post"):
        cache = model(input_ids=IDS).past_key_values
        model(input_ids=IDS[:, :1], past_key_values=cache)
    tokens = Reader(path).tokens.to_arrow(["sequence_id", "position"])
    assert tokens["sequence_id"].to_pylist() == [0] * 4 + [1] * 4 + [0, 1]
    assert tokens["position"].to_pylist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 4]


def test_generate_that_compiles_its_decoding_is_captured(tmp_path: Path) -> None:
    model, path = tiny_model("llama", num_hidden_layers=1), tmp_path / "x.strap"
    config = CompileConfig(fullgraph=False, backend="eager", mode=None)
    config._compile_all_devices = True  # as it does by itself on a GPU
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "cache_implementation": "static"}
    with capture(model, path, ["blocks.0.resid_post", "logits"]) as cap:
        ids = model.generate(IDS, do_sample=False, compile_config=config, **options)
    assert n_graphs() > 0
    assert torch.equal(ids, model.generate(IDS, do_sample=False, disable_compile=True, **options))
    reader = Reader(path)
    tokens = reader.tokens.to_arrow(["token_id", "sequence_id", "position"])
    found = np.full(ids.shape, -1)
    found[tokens["sequence_id"].to_numpy(), tokens["position"].to_numpy()] = tokens["token_id"].to_numpy()
    assert (found[:, :-1] == ids[:, :-1].numpy()).all()
    assert [site.n_missed for site in cap.report.sites] == [0, 0]
    full = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    site = reader["blocks.0.resid_post"]
    rows = model.model.norm(site.take(site.rows))
    where = [torch.tensor(tokens[name].to_pylist()) for name in ("sequence_id", "position")]
    assert torch.allclose(rows, full[where[0], where[1]], atol=1e-5)


def test_a_recorded_pass_is_stored_at_each_replay_only(tmp_path: Path) -> None:
    model, path = Small(), tmp_path / "x.strap"
    run = torch.compile(model, backend="eager", fullgraph=True)
    inputs = [IDS, IDS + 1, IDS + 2]
    for call in (model, run):
        with capture(model, path, overwrite=True) as cap:
            with cap.recording() as recorded:
                call(IDS)
                with pytest.raises(CaptureError, match="under way"), cap.recording():
                    pass
            assert cap.report.n_steps == 0
            assert repr(recorded).startswith("Recording(7 values: blocks.0")
            for ids in inputs:
                with recorded.replay(input_ids=ids):
                    wanted = by_hand(ids)  # what a graph does by itself: write into the same memory
                    for tap, x in recorded._values:
                        x.copy_(wanted[tap.point.site].view_as(x))
            call(IDS + 3)
        check(path, *inputs, IDS + 3)
        assert [site.n_missed for site in cap.report.sites] == [0] * 7
    with pytest.raises(CaptureError, match="inside the with block"), recorded.replay(input_ids=IDS):
        pass
    with pytest.raises(CaptureError, match="inside the with block"), cap.recording():
        pass


def test_a_recording_is_refused_inside_a_graph_and_waits_for_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small()
    with capture(model, tmp_path / "x.strap") as cap:
        monkeypatch.setattr("strapfmt_capture.hooks.is_graph_made", lambda: True)
        monkeypatch.setattr(cap._engine.rings, "settle", lambda: pytest.fail("waited"))
        with (
            pytest.raises(CaptureError, match="under way already; enter it before the graph"),
            cap.recording(),
        ):
            pass
        monkeypatch.undo()
        with cap.recording():
            pass
        model(IDS)


def test_a_replay_that_fails_is_an_abandoned_pass(tmp_path: Path) -> None:
    model, path = Small(), tmp_path / "x.strap"

    def fail() -> None:
        raise ValueError("launch failed")

    with capture(model, path) as cap:
        with cap.recording() as recorded:
            model(IDS)
        with pytest.raises(ValueError, match="launch failed"), recorded.replay(input_ids=IDS):
            fail()
        model(IDS + 1)
    steps = Reader(path).steps.to_arrow()
    assert steps["status"].to_pylist() == ["abandoned", "complete"]
    assert Reader(path)["head"].rows.tolist() == list(range(8, 16))


@pytest.mark.gpu
@IGNORED
def test_reduce_overhead_on_a_gpu_skips_no_graph_and_stores_every_row(tmp_path: Path) -> None:
    model, path = Small().cuda(), tmp_path / "x.strap"
    run = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    inputs = [(IDS + shift) % N_TOKENS for shift in range(20)]
    with capture(model, path):
        for ids in inputs:
            torch.compiler.cudagraph_mark_step_begin()
            run(ids.cuda())
    assert counters["inductor"]["cudagraph_skips"] == 0
    check(path, *inputs)


@pytest.mark.gpu
@IGNORED
def test_regions_with_graphs_of_their_own_on_a_gpu(tmp_path: Path) -> None:
    model, path = Small().cuda(), tmp_path / "x.strap"
    its_blocks(model, mode="reduce-overhead", fullgraph=True)
    inputs = [(IDS + shift) % N_TOKENS for shift in range(20)]
    with capture(model, path):
        for ids in inputs:
            torch.compiler.cudagraph_mark_step_begin()  # or each block is a pass to PyTorch, and frees the one before
            model(ids.cuda())
    assert counters["inductor"]["cudagraph_skips"] == 0
    check(path, *inputs)


@pytest.mark.gpu
@IGNORED
def test_replays_of_a_cuda_graph_are_stored(tmp_path: Path) -> None:
    model, path = Small().cuda(), tmp_path / "x.strap"
    static, graph = IDS.cuda(), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        model(static)  # warm
    torch.cuda.current_stream().wait_stream(side)
    inputs = [(IDS + shift) % N_TOKENS for shift in range(20)]
    with capture(model, path) as cap:
        model(static)  # the mover has something to do
        whole = torch.cuda.graph(graph, capture_error_mode="thread_local")
        with cap.recording() as recorded, whole:
            model(static)
        for ids in inputs:
            static.copy_(ids)
            with recorded.replay(input_ids=static):
                graph.replay()
    check(path, IDS, *inputs)


@pytest.mark.gpu
@IGNORED
def test_a_cuda_graph_made_without_a_recording_is_refused(tmp_path: Path) -> None:
    model, static = Small().cuda(), IDS.cuda()
    model(static)
    refused = pytest.raises(CompiledModelError, match=r"cap\.recording")
    with refused, capture(model, tmp_path / "x.strap"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(static)
