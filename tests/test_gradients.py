"""Gradients of a loss with respect to sites, against what autograd gives for the same tensors in a plain run."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from models import D_MODEL, N_LAYERS, VOCAB_SIZE, tiny_model
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

import strapfmt
from strapfmt.errors import ArgumentError, CaptureError, CompiledModelError, SiteNeverFiredError
from strapfmt.reader import Reader
from strapfmt_capture.device_ring import HostStreams
from strapfmt_capture.sites import resolve

RESID = "blocks.*.resid_post"
IDS = torch.randint(4, VOCAB_SIZE, (2, 6), generator=torch.Generator().manual_seed(5))


def loss_of(model: PreTrainedModel, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    """The cross entropy of the next token, computed here."""
    logits = model(input_ids=ids, use_cache=False, **inputs).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@contextmanager
def watched(
    places: dict[str, tuple[torch.nn.Module, str]], *, copies: bool = False
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Collect what is at each place; with `copies` the model goes on with one, so that nothing in place reaches it."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in places}
    handles = []

    def keep(name: str, x: torch.Tensor) -> torch.Tensor:
        x.retain_grad()
        seen[name].append(x)
        return x.clone() if copies else x

    def before(name: str) -> Callable[..., Any]:
        return lambda _, args: (keep(name, args[0]), *args[1:])

    def after(name: str) -> Callable[..., Any]:
        return lambda _, args, out: (
            (keep(name, out[0]), *out[1:]) if isinstance(out, tuple) else keep(name, out)
        )

    for name, (module, where) in places.items():
        if where == "in":
            handles.append(module.register_forward_pre_hook(before(name)))
        else:
            handles.append(module.register_forward_hook(after(name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def resid_places(model: PreTrainedModel) -> dict[str, tuple[torch.nn.Module, str]]:
    return {f"blocks.{i}.resid_post": (block, "out") for i, block in enumerate(model.base_model.layers)}


def gradients(seen: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Gradients of all passes, one row a token."""
    found = {}
    for name, tensors in seen.items():
        assert all(x.grad is not None for x in tensors)
        found[name] = torch.cat([x.grad.flatten(0, 1) for x in tensors if x.grad is not None])
    return found


def assert_stored(path: Path, expected: dict[str, torch.Tensor]) -> Reader:
    """Check gradients, and that they stand in the rows of their values."""
    reader = Reader(path)
    for site, values in expected.items():
        assert_same_bits(reader[f"{site}.grad"].tensor(), values)
        assert reader[f"{site}.grad"].rows.tolist() == reader[site].rows.tolist()
        assert reader[f"{site}.grad"].spec.hook_point == reader[site].spec.hook_point + ":grad"
    return reader


# What is at the sites.


def separate(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(len(x), -1, 8)


def gpt2_places(model: Any) -> dict[str, tuple[torch.nn.Module, str, Callable[[torch.Tensor], torch.Tensor]]]:
    found: dict[str, Any] = {}
    for i, block in enumerate(model.transformer.h):
        for part, name in enumerate("qkv"):
            cut = slice(part * D_MODEL, (part + 1) * D_MODEL)
            found[f"blocks.{i}.{name}"] = (block.attn.c_attn, "out", lambda x, cut=cut: separate(x[:, cut]))
        found[f"blocks.{i}.z"] = (block.attn.c_proj, "in", separate)
        found[f"blocks.{i}.mlp_inner"] = (block.mlp.c_proj, "in", lambda x: x)
    return found


def llama_places(
    model: Any,
) -> dict[str, tuple[torch.nn.Module, str, Callable[[torch.Tensor], torch.Tensor]]]:
    found: dict[str, Any] = {"embed": (model.model.embed_tokens, "out", lambda x: x)}
    for i, block in enumerate(model.model.layers):
        for name in "qkv":
            found[f"blocks.{i}.{name}"] = (getattr(block.self_attn, f"{name}_proj"), "out", separate)
        found[f"blocks.{i}.attn_out"] = (block.self_attn, "out", lambda x: x)
        found[f"blocks.{i}.mlp_out"] = (block.mlp, "out", lambda x: x)
        found[f"blocks.{i}.resid_mid"] = (block.post_attention_layernorm, "in", lambda x: x)
        found[f"blocks.{i}.resid_post"] = (block, "out", lambda x: x)
    return {**found, "final_norm": (model.model.norm, "out", lambda x: x), "logits": (model, "", lambda x: x)}


def neox_places(model: Any) -> dict[str, tuple[torch.nn.Module, str, Callable[[torch.Tensor], torch.Tensor]]]:
    found: dict[str, Any] = {}
    for i, block in enumerate(model.gpt_neox.layers):
        for part, name in enumerate("qkv"):
            of_part: Any = lambda x, part=part: x.reshape(len(x), 4, 3, 8)[:, :, part]  # noqa: E731
            found[f"blocks.{i}.{name}"] = (block.attention.query_key_value, "out", of_part)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "places"), [("gpt2", gpt2_places), ("llama", llama_places), ("gpt_neox", neox_places)]
)
def test_gradients_are_those_of_autograd(
    family: str, places: Callable[[Any], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model(family, dtype=dtype, attn_implementation="eager")
    wanted = {name: place for name, place in places(model).items() if place[1]}
    with watched({name: place[:2] for name, place in wanted.items()}) as seen:
        loss_of(model).backward()
    expected = {name: wanted[name][2](x) for name, x in gradients(seen).items()}
    model.zero_grad()
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites=[*expected, RESID], backward=True, quiet=True
    ) as cap:
        loss = loss_of(model)
        loss.backward()
    reader = assert_stored(tmp_path / "x.strap", expected)
    # The values are those of a capture without gradients, and so is the model.
    for name, x in seen.items():
        assert_same_bits(reader[name].tensor(), wanted[name][2](x[0].detach().flatten(0, 1)))
    assert all(site.expected == site.written == 12 for site in cap.report.sites)


def ragged(site: Any) -> list[torch.Tensor]:
    table = site.to_arrow(["activation", "shape"])
    return [
        torch.tensor(values.as_py()).reshape(shape.as_py())
        for values, shape in zip(table["activation"], table["shape"], strict=True)
    ]


def test_hidden_states_and_patterns_against_autograd_itself(tmp_path: Path) -> None:
    """Of tensors that the model returns, `torch.autograd.grad` knows the gradient without any hook."""
    model = tiny_model("llama", attn_implementation="eager")
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    inputs = {"attention_mask": mask, "output_hidden_states": True, "output_attentions": True}

    def run() -> tuple[torch.Tensor, Any]:
        output = model(input_ids=IDS, use_cache=False, **inputs)
        return output.logits[mask.bool()].float().logsumexp(-1).sum(), output

    loss, output = run()
    first, patterns = output.hidden_states[1], output.attentions
    expected, *of_patterns = torch.autograd.grad(loss, [first, *patterns])
    sites = ["blocks.0.resid_post", "blocks.*.attn_pattern"]
    with strapfmt.capture(model, tmp_path / "x.strap", sites=sites, backward=True, quiet=True):
        run()[0].backward()
    reader = assert_stored(tmp_path / "x.strap", {"blocks.0.resid_post": expected[mask.bool()]})
    assert reader["blocks.0.resid_post.grad"].rows.tolist() == list(range(10))
    for i, grad in enumerate(of_patterns):
        found, values = (reader[f"blocks.{i}.attn_pattern{what}"] for what in (".grad", ""))
        assert found.rows.tolist() == values.rows.tolist() == list(range(10))
        turned = grad.transpose(1, 2)
        whole = [*turned[0, 2:, :, 2:], *turned[1]]
        for gradient, pattern, one in zip(ragged(found), ragged(values), whole, strict=True):
            assert_same_bits(gradient, one)
            assert pattern.shape == one.shape


def test_a_value_that_is_changed_in_place_later_has_the_gradient_of_what_was_stored(tmp_path: Path) -> None:
    model = tiny_model("falcon", parallel_attn=True, new_decoder_architecture=False)
    places = {f"blocks.{i}.mlp_out": (block.mlp, "out") for i, block in enumerate(model.transformer.h)}
    with watched(places, copies=True) as seen:  # type: ignore[arg-type]
        loss_of(model).backward()
    expected = gradients(seen)
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites="blocks.*.mlp_out", backward=True, quiet=True
    ) as cap:
        loss_of(model).backward()
    reader = assert_stored(tmp_path / "x.strap", expected)
    assert_same_bits(reader["blocks.0.mlp_out"].tensor(), seen["blocks.0.mlp_out"][0].detach().flatten(0, 1))
    assert cap.report.notes == ()


def test_heads_first_values_and_mapping_outputs_are_shaped_like_their_values(tmp_path: Path) -> None:
    """Qwen3 norms its queries before it turns them; OPT's MLP sees tokens of all sequences in one dimension."""
    for family in ("qwen3", "gemma3_text", "opt", "phi", "mixtral", "gemma2", "bloom"):
        model = tiny_model(family, attn_implementation="eager")
        path = tmp_path / f"{family}.strap"
        with strapfmt.capture(model, path, sites="**", backward=True, quiet=True) as cap:
            loss_of(model).backward()
        reader = Reader(path)
        sites = [name for name in reader.sites if not name.endswith(".grad")]
        with_gradient = [site for site in sites if f"{site}.grad" in reader.sites]
        for site in with_gradient:
            assert reader[f"{site}.grad"].spec.shape == reader[site].spec.shape
            assert reader[f"{site}.grad"].rows.tolist() == reader[site].rows.tolist()
        without = {site.rpartition(".")[2] for site in sites} - {s.rpartition(".")[2] for s in with_gradient}
        assert without <= {"rot_q", "rot_k", "expert_ids", "router_logits"}, family
        assert "resid_post" not in without
        assert any("rot_q" in note for note in cap.report.notes) == ("rot_q" in without)


# Passes.


def test_a_training_loop_stores_each_pass(tmp_path: Path) -> None:
    def train(model: PreTrainedModel) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(4):
            loss_of(model, IDS.roll(step, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [each.detach().clone() for each in model.parameters()]

    plain = tiny_model("llama")
    with watched(resid_places(plain)) as seen:
        weights = train(plain)
    model = tiny_model("llama")
    with strapfmt.capture(
        model,
        tmp_path / "x.strap",
        sites=RESID,
        backward=True,
        quiet=True,
        commit_interval_s=0,
        min_free_bytes=None,
    ):
        found = train(model)
    reader = assert_stored(tmp_path / "x.strap", gradients(seen))
    assert reader.steps.to_arrow()["status"].to_pylist() == ["complete"] * 4
    for one, other in zip(found, weights, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("order", ["sum", "each", "reversed", "interleaved"])
def test_rows_increase_whatever_order_backward_takes(order: str, tmp_path: Path) -> None:
    def run(model: PreTrainedModel) -> None:
        if order == "interleaved":
            first, second = loss_of(model), loss_of(model, IDS.flip(1))
            first.backward()
            third = loss_of(model, IDS.roll(1))
            second.backward()
            third.backward()
            return
        losses = [loss_of(model, IDS.roll(i, 1)) for i in range(3)]
        if order == "sum":
            sum(losses, torch.zeros(())).backward()
        for loss in losses[:: -1 if order == "reversed" else 1] if order != "sum" else []:
            loss.backward()

    model = tiny_model("llama")
    with watched(resid_places(model)) as seen:
        run(model)
    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True) as cap:
        run(model)
    reader = assert_stored(tmp_path / "x.strap", gradients(seen))
    assert reader["blocks.0.resid_post.grad"].rows.tolist() == list(range(36))
    assert all(site.n_missed == 0 for site in cap.report.sites)


def test_a_pass_whose_graph_is_gone_holds_up_nobody(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True) as cap:
        loss = loss_of(model)  # never used
        del loss
        gc.collect()
        loss_of(model, IDS.flip(1)).backward()
        assert {site.expected for site in cap.report.sites if site.name.endswith(".grad")} == {12}
    reader = Reader(tmp_path / "x.strap")
    assert reader["blocks.1.resid_post.grad"].rows.tolist() == list(range(12, 24))
    assert {site.n_missed for site in cap.report.sites if site.name.endswith(".grad")} == {1}
    assert "'blocks.0.resid_post.grad' did not fire in 1 of 2 passes" in str(cap.report)


def test_gradients_kept_for_an_earlier_pass_are_stored_when_the_next_begins(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True) as cap:
        first, second = loss_of(model), loss_of(model)
        second.backward()
        assert {site.expected for site in cap.report.sites} == {24, 0}
        third = loss_of(model)
        assert {site.expected for site in cap.report.sites} == {36, 12}
        with pytest.raises(CaptureError, match=r"gradient of step 0 came after that of a later step"):
            first.backward()
        third.backward()
    assert Reader(tmp_path / "x.strap")["blocks.0.resid_post.grad"].rows.tolist() == list(range(12, 36))


def test_two_gradients_for_one_row_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True) as cap:
        loss = loss_of(model)
        with cap.paused():
            loss.backward(retain_graph=True)
        loss.backward(retain_graph=True)
        with pytest.raises(CaptureError, match=r"resid_post.grad.*backward\(\) came twice to step 0"):
            loss.backward(retain_graph=True)
        with cap.paused():
            loss.backward()
    assert Reader(tmp_path / "x.strap")["blocks.1.resid_post.grad"].n_rows == 12


def test_one_leaf_given_to_every_pass(tmp_path: Path) -> None:
    """An input that is optimised is the same tensor in every pass."""
    model = tiny_model("llama").requires_grad_(False)
    x = torch.randn(1, 4, D_MODEL, generator=torch.Generator().manual_seed(1)).requires_grad_()
    sites = ["blocks.0.resid_pre", "blocks.0.resid_post"]
    expected = []
    with strapfmt.capture(model, tmp_path / "x.strap", sites=sites, backward=True, quiet=True):
        for scale in (1, 2, 3):
            (model(inputs_embeds=x).logits.sum() * scale).backward()
            assert x.grad is not None
            expected.append(x.grad[0].clone())
            x.grad = None
        torch.save(x, io.BytesIO())
        model(inputs_embeds=x)
        both = model(inputs_embeds=x).logits.sum()
        with pytest.raises(CaptureError, match=r"one tensor was its value in step \d and in another"):
            both.backward()
    assert_stored_first(tmp_path / "x.strap", "blocks.0.resid_pre", torch.cat(expected))


def assert_stored_first(path: Path, site: str, expected: torch.Tensor) -> None:
    found = Reader(path)[f"{site}.grad"]
    assert_same_bits(found.tensor()[: len(expected)], expected)
    assert found.rows.tolist()[: len(expected)] == list(range(len(expected)))


# Checkpointing.


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("n_passes", [1, 2])
def test_gradient_checkpointing(reentrant: bool, n_passes: int, tmp_path: Path) -> None:
    model = tiny_model("llama").train()

    def run() -> None:
        for i in range(2):
            losses = [loss_of(model, IDS.roll(i + n, 1)) for n in range(n_passes)]
            sum(losses, torch.zeros(())).backward()

    sites = ["blocks.*.resid_pre", RESID, "blocks.*.mlp_inner", "blocks.*.q", "logits"]
    with strapfmt.capture(model, tmp_path / "plain.strap", sites=sites, backward=True, quiet=True):
        run()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    # The embeddings require gradients, so that reentrant checkpoints do.
    with strapfmt.capture(model, tmp_path / "x.strap", sites=sites, backward=True, quiet=True) as cap:
        run()
    plain, found = Reader(tmp_path / "plain.strap"), Reader(tmp_path / "x.strap")
    assert list(plain.sites) == list(found.sites)
    for site in plain.sites:
        assert_same_bits(found[site].tensor(), plain[site].tensor())
        assert found[site].rows.tolist() == plain[site].rows.tolist() == list(range(24 * n_passes))
    assert all(site.n_missed == 0 for site in cap.report.sites)


class Checkpointed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(checkpoint(lambda y: self.first(self.first(y).tanh()), x, use_reentrant=True))


def test_a_module_that_runs_twice_inside_a_checkpoint_has_its_gradients_in_order(tmp_path: Path) -> None:
    model = Checkpointed()
    x = torch.randn(3, 4, requires_grad=True)
    inner = model.first(x)
    outer = model.first(inner.tanh())
    expected = torch.autograd.grad(model.second(outer).square().sum(), [inner, outer])
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites=["first", "second"], backward=True, quiet=True
    ) as cap:
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        with pytest.raises(CaptureError, match="came twice"):
            loss.backward()
    reader = Reader(tmp_path / "x.strap")
    assert_same_bits(reader["first.grad"].tensor(), torch.cat(expected))
    assert reader["first.grad"].n_rows == reader["first"].n_rows
    assert all(site.n_missed == 0 for site in cap.report.sites)


# What is stored of it.


def test_filters_choose_the_rows_of_gradients_as_of_values(tmp_path: Path) -> None:
    model = tiny_model("llama")

    def run() -> None:
        for i in range(3):
            loss_of(model, IDS.roll(i, 1)).backward()

    with strapfmt.capture(model, tmp_path / "all.strap", sites=RESID, backward=True, quiet=True):
        run()
    options: dict[str, Any] = {"positions": [1, -1], "every": 2, "max_rows": 7, "channels": [3, 0, -1]}
    path = tmp_path / "some.strap"
    with strapfmt.capture(model, path, sites=RESID, backward=True, quiet=True, **options) as cap:
        run()
    found, whole = Reader(path), Reader(tmp_path / "all.strap")
    for site in found.sites:
        rows = found[site].rows.tolist()
        assert rows == [1, 5, 7, 11, 25, 29, 31]
        assert_same_bits(found[site].tensor(), whole[site].tensor()[rows][:, [3, 0, -1]])
    assert {site.expected for site in cap.report.sites} == {7}
    assert len({site.filtered for site in cap.report.sites}) == 1
    assert cap.report.sites[0].filtered > 0
    again = strapfmt.capture(model, path, sites=RESID, backward=True, quiet=True, mode="append", **options)
    with again:
        run()
    assert Reader(path)["blocks.0.resid_post.grad"].n_rows == 14


def test_a_model_may_be_copied_and_stored_inside(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True) as cap:
        before = copy.deepcopy(model)
        loss_of(model).backward()
        stored = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
        for twin in (before, copy.deepcopy(model), stored):
            loss_of(twin).backward()
    assert {site.written for site in cap.report.sites} == {IDS.numel()}


def test_a_pass_that_is_not_asked_for_has_no_gradients_and_that_is_no_fault(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True, phases="decode"
    ) as cap:
        loss_of(model).backward()
    assert {(site.expected, site.n_missed) for site in cap.report.sites} == {(0, 0)}


def test_autocast_keeps_the_dtype_of_each_value(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with (
        strapfmt.capture(
            model, tmp_path / "x.strap", sites=["blocks.0.mlp_out", RESID], backward=True, quiet=True
        ),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        loss_of(model).backward()
    reader = Reader(tmp_path / "x.strap")
    for site, dtype in {"blocks.0.mlp_out": "bfloat16", "blocks.0.resid_post": "float32"}.items():
        assert reader[site].spec.dtype == reader[f"{site}.grad"].spec.dtype == dtype


def test_a_loss_of_some_tokens_leaves_zeros_to_the_others(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(model, tmp_path / "x.strap", sites=[RESID], backward=True, quiet=True):
        model(input_ids=IDS).logits[0, 2].sum().backward()
    found = Reader(tmp_path / "x.strap")["blocks.0.resid_post.grad"].tensor()
    assert found[:3].ne(0).any(dim=1).all()
    assert not found[3:].any()


def test_a_site_that_the_loss_does_not_depend_on_is_told(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True) as cap:
        loss_of(model).backward()
        model(input_ids=IDS, output_hidden_states=True).hidden_states[1].sum().backward()
    missed = {site.name: site.n_missed for site in cap.report.sites}
    assert missed["blocks.1.resid_post.grad"] == 1
    assert sum(missed.values()) == 1
    manifest = json.loads((tmp_path / "x.strap" / "rank-00000" / "manifest.json").read_text())
    outcome = manifest["sessions"][0]["outcome"]
    assert outcome["missed_steps"] == {"blocks.1.resid_post.grad": 1}


def test_dropped_passes_have_no_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True, on_full="drop"
    ) as cap:
        loss_of(model).backward()
        monkeypatch.setattr(type(cap._engine.rings), "fill", property(lambda self: 1.0))  # type: ignore[union-attr]
        loss_of(model).backward()
        monkeypatch.undo()
        loss_of(model).backward()
    for site in cap.report.sites:
        assert (site.expected, site.written, site.dropped, site.n_missed) == (36, 24, 12, 0)
    reader = Reader(tmp_path / "x.strap")
    rows = [*range(12), *range(24, 36)]
    assert all(reader[site].rows.tolist() == rows for site in reader.sites)


# What cannot be.


def test_only_sites_that_the_model_goes_on_with_have_gradients(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(ArgumentError, match=r"'blocks.0.rot_q'.*has no gradient"):
        strapfmt.capture(model, tmp_path / "x.strap", sites=["blocks.*.rot_*"], backward=True)
    with pytest.raises(ArgumentError, match="stop_at_layer"):
        strapfmt.capture(
            model, tmp_path / "x.strap", sites="blocks.0.resid_post", backward=True, stop_at_layer=1
        )
    with pytest.raises(ArgumentError, match="backward: expected True or False"):
        strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=1)  # type: ignore[arg-type]
    assert not (tmp_path / "x.strap").exists()
    sites = ["blocks.0.rot_q", "blocks.*.expert_out", "blocks.0.expert_*", "logits", "blocks.0.resid_post"]
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites=sites, backward=True, quiet=True, top_k_logits=3
    ) as cap:
        loss_of(model).backward()
    stored = {name.removesuffix(".grad") for name in Reader(tmp_path / "x.strap").sites if ".grad" in name}
    assert stored == {"blocks.0.expert_weights", "blocks.0.resid_post"}
    assert "'blocks.0.rot_q' and 4 more: no gradients, as these values are computed beside the model" in (
        cap.report.notes
    )
    assert "no gradients of whole numbers: blocks.0.expert_ids" in cap.report.notes


def test_clipped_queries_have_no_gradient_and_others_of_the_family_do() -> None:
    for clip in (None, 0.5):
        points = resolve(tiny_model("olmo", clip_qkv=clip), "blocks.0.*")
        found = {point.site.rpartition(".")[2] for point in points if point.has_gradient}
        assert ({"q", "k", "v"} <= found) == (clip is None)
        assert "z" in found


def no_grad(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model(input_ids=IDS)


def generated(model: PreTrainedModel) -> None:
    model.generate(IDS, max_new_tokens=2, do_sample=False)


def frozen(model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    model(input_ids=IDS)


def unused(model: PreTrainedModel) -> None:
    model(input_ids=IDS)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (no_grad, "of 2 values 2 were made with gradients off"),
        (generated, "4 were made with gradients off"),
        (frozen, "2 require no gradient"),
        (unused, r"2 waited for a backward\(\) inside the with block"),
    ],
)
def test_no_gradient_at_all_is_an_error_that_says_why(
    run: Callable[[PreTrainedModel], None], why: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    with (
        pytest.raises(SiteNeverFiredError, match=why) as caught,
        strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True),
    ):
        run(model)
    assert [name.endswith(".grad") for name in caught.value.sites] == [True] * N_LAYERS
    assert Reader(tmp_path / "x.strap")["blocks.0.resid_post"].n_rows >= 12


def test_sites_without_a_gradient_beside_others_are_told(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True) as cap:
        loss_of(model).backward()
    assert any(
        "no gradient at 'blocks.0.resid_post.grad': of 1 values 1 require no" in each
        for each in cap.report.notes
    )
    reader = Reader(tmp_path / "x.strap")
    assert reader["blocks.1.resid_post.grad"].n_rows == 12
    assert "blocks.0.resid_post.grad" not in reader


def test_backward_after_the_end_records_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True):
        loss_of(model).backward()
        model.zero_grad()
        loss = loss_of(model)
    loss.backward()
    found = [each.grad for each in model.parameters()]
    model.zero_grad()
    loss_of(model).backward()
    for one, other in zip(found, model.parameters(), strict=True):
        assert one is not None
        assert other.grad is not None
        assert_same_bits(one, other.grad)
    assert Reader(tmp_path / "x.strap")["blocks.0.resid_post.grad"].n_rows == 12


def test_an_error_in_backward_is_the_models_own(tmp_path: Path) -> None:
    model = tiny_model("llama")

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("in backward")

    handle = model.model.layers[1].register_forward_pre_hook(lambda _, args: (Bad.apply(args[0]), *args[1:]))
    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True) as cap:
        with pytest.raises(ZeroDivisionError, match="in backward"):
            loss_of(model).backward()
        handle.remove()
        loss_of(model).backward()
    reader = Reader(tmp_path / "x.strap")
    assert reader["blocks.1.resid_post.grad"].rows.tolist() == list(range(24))
    assert reader["blocks.0.resid_post.grad"].rows.tolist() == list(range(12, 24))
    missed = {site.name: site.n_missed for site in cap.report.sites}
    assert missed["blocks.0.resid_post.grad"] == 1


def test_a_pass_that_fails_awaits_nothing(tmp_path: Path) -> None:
    model = tiny_model("llama")

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True) as cap:
        handle = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            loss_of(model)
        handle.remove()
        loss_of(model).backward()
    assert {site.name: site.n_missed for site in cap.report.sites if site.n_missed} == {}
    assert Reader(tmp_path / "x.strap")["blocks.0.resid_post.grad"].rows.tolist() == list(range(12, 24))


@pytest.mark.parametrize("ring_bytes", [1 << 12, 1 << 20])
def test_gradients_go_through_a_small_ring_and_a_drain_of_its_own(ring_bytes: int, tmp_path: Path) -> None:
    """Gradients of a pass are larger than the ring, and are stored after its step has ended."""
    model = tiny_model("llama")
    kinds: list[Any] = ["process", "thread"]
    for kind in kinds:
        options: dict[str, Any] = {"host_ring_bytes": ring_bytes, "drain": kind, "commit_interval_s": 0}
        with strapfmt.capture(
            model, tmp_path / f"{kind}.strap", sites="blocks.*.*", backward=True, quiet=True, **options
        ):
            for i in range(3):
                loss_of(model, IDS.roll(i, 1)).backward()
    one, other = (Reader(tmp_path / f"{kind}.strap") for kind in kinds)
    assert list(one.sites) == list(other.sites)
    for site in one.sites:
        assert_same_bits(one[site].tensor(), other[site].tensor())
        assert one[site].rows.tolist() == list(range(36))


def test_a_device_that_works_beside_the_host_gives_its_gradients(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Streams that look like a GPU's: gradients behind the last step are moved when the capture ends."""
    model = tiny_model("llama")
    with watched(resid_places(model)) as seen:
        loss_of(model).backward()
    monkeypatch.setattr("strapfmt_capture.rings.streams_of", lambda device: HostStreams())
    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True) as cap:
        loss_of(model).backward()
    assert cap._engine is not None
    assert cap._engine.rings.devices
    assert_stored(tmp_path / "x.strap", gradients(seen))


NO_GRADIENTS = "backward=True: expected a model that is not compiled"


def compile_part(model: Any, part: str) -> Any:
    """Compile a model, or a part of it, in one of the ways there are; return what is to be called."""
    if part == "wrapper":
        return torch.compile(model, backend="eager")
    if part == "model":
        model.compile(backend="eager")
    elif part == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif part == "layer":
        model.model.layers[0].compile(backend="eager")
    elif part == "wrapped layer":
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


@pytest.mark.parametrize("part", ["wrapper", "model", "forward", "layer", "wrapped layer"])
def test_compiled_models_have_no_gradients_to_store_and_are_refused_at_once(
    tmp_path: Path, part: str
) -> None:
    compiled = compile_part(tiny_model("llama"), part)
    with pytest.raises(CompiledModelError, match=NO_GRADIENTS):
        strapfmt.capture(compiled, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True)
    strapfmt.capture(compiled, tmp_path / "x.strap", sites=RESID, quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_compiled_before_the_block_is_entered_has_no_gradients_either(tmp_path: Path) -> None:
    model = tiny_model("llama")
    cap = strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True)
    compile_part(model, "layer")
    with pytest.raises(CompiledModelError, match=NO_GRADIENTS):
        cap.__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_was_compiled_beside_it_is_itself_not_compiled(tmp_path: Path) -> None:
    model = tiny_model("llama")
    compiled = compile_part(model, "wrapper")
    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True) as cap:
        loss_of(model).backward()
    assert cap.report.n_rows == 2 * N_LAYERS * IDS.numel()
    assert isinstance(compiled, torch.nn.Module)


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)
@pytest.mark.parametrize("part", ["wrapper", "model", "around"])
def test_models_that_are_found_compiled_in_a_pass_say_that_they_have_no_gradients(
    tmp_path: Path, part: str
) -> None:
    model: Any = tiny_model("llama")
    around: Any = torch.compile(lambda ids: model(ids).logits, backend="eager")
    wrapper = compile_part(model, "wrapper") if part == "wrapper" else None
    cap = strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True)

    def body() -> None:
        with cap:
            run = compile_part(model, part) if part == "model" else wrapper
            (around if part == "around" else run)(IDS)

    with pytest.raises(CompiledModelError, match=NO_GRADIENTS):
        body()


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)
@pytest.mark.parametrize("part", ["layer", "wrapped layer"])
def test_layers_that_are_compiled_inside_the_block_have_their_gradients(tmp_path: Path, part: str) -> None:
    model, reference = tiny_model("llama"), tiny_model("llama")
    with watched(resid_places(reference)) as seen:
        loss_of(reference).backward()
    with strapfmt.capture(model, tmp_path / "x.strap", sites=RESID, backward=True, quiet=True):
        loss_of(compile_part(model, part)).backward()
    assert_stored(tmp_path / "x.strap", gradients(seen))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)
@pytest.mark.parametrize("part", ["layer", "wrapped layer"])
def test_layers_that_are_compiled_inside_the_block_have_no_gradients_of_sites_in_them(
    tmp_path: Path, part: str
) -> None:
    model = tiny_model("llama")
    options: dict[str, Any] = {"sites": "blocks.*.mlp_out", "backward": True, "quiet": True}
    cap = strapfmt.capture(model, tmp_path / "x.strap", **options)

    def body() -> None:
        if part == "layer":
            model.model.layers[1].compile(backend="eager")
        else:
            compile_part(model, part)
        loss_of(model).backward()

    with pytest.raises(CompiledModelError, match=NO_GRADIENTS), cap:
        body()
    assert strapfmt.verify(tmp_path / "x.strap").valid
