"""A pass that ends early: the same values, no later block, no logits, and a model that is as it was."""

from __future__ import annotations

import copy
import functools
import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, tiny_model
from transformers import DynamicCache, PreTrainedModel

import strapfmt
from strapfmt.errors import ArgumentError, CaptureError, StoppedPassError
from strapfmt.reader import Reader

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def state_of(model: torch.nn.Module) -> list[Any]:
    """All that attaching may change: attributes of every module, and its hooks."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return [
        (path, type(module), sorted(vars(module)), [list(getattr(module, name)) for name in hooks])
        for path, module in model.named_modules()
    ]


def blocks_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def sites_before(model: torch.nn.Module, layer: int) -> list[str]:
    later = tuple(f"blocks.{number}." for number in range(layer, 9))
    names = [info.site for info in strapfmt.sites(model).uniform]
    patterns = [name for name in names if name.endswith("attn_pattern")]  # ragged
    return [name for name in names if not name.startswith((*later, "final_norm", "logits", *patterns))]


@pytest.mark.parametrize(
    ("family", "layer"),
    [(family, 1) for family in FAMILIES]
    + [(family, layer) for family in ("opt", "gpt2") for layer in (0, 2)],
)
def test_values_are_the_same_and_nothing_after_them_runs(family: str, layer: int, tmp_path: Path) -> None:
    model = tiny_model(family)
    sites, before = sites_before(model, layer), state_of(model)
    with strapfmt.capture(model, tmp_path / "all.strap", sites=sites, quiet=True):
        expected = model(input_ids=IDS).logits
    ran = []
    later = [*blocks_of(model)[layer:], model.get_output_embeddings()]
    handles = [module.register_forward_pre_hook(lambda *_: ran.append(1)) for module in later]
    with strapfmt.capture(model, tmp_path / "x.strap", sites=sites, stop_at_layer=layer, quiet=True) as cap:
        output = model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    assert len(ran) == (layer < 2)  # the hook before the first block left out runs, and the block does not
    assert repr(output) == f"<forward pass that ended before block {layer}>"
    everything, found = Reader(tmp_path / "all.strap"), Reader(tmp_path / "x.strap")
    for site in sites:
        assert torch.equal(found[site].tensor(), everything[site].tensor())
    assert found.steps.to_arrow(["status"])["status"].to_pylist() == ["complete"]
    assert (cap.report.n_abandoned_steps, [site.n_missed for site in cap.report.sites]) == (
        0,
        [0] * len(sites),
    )
    assert state_of(model) == before
    assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(
    "take",
    [
        lambda output: output.logits,
        lambda output: output[0],
        lambda output: output["logits"],
        lambda output: list(output),
        lambda output: next(iter(output)),
        lambda output: (lambda *parts: parts)(*output),
        lambda output: len(output),
        lambda output: output.to_tuple(),
        lambda output: torch.as_tensor(output),
        lambda output: "logits" in output,
        lambda output: output.past_key_values,
    ],
)
def test_what_it_returns_holds_nothing(take: Any, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites="blocks.0.resid_post", stop_at_layer=1, quiet=True
    ):
        output = model(input_ids=IDS)
    with pytest.raises(StoppedPassError, match=r"ended before block 1.*stop_at_layer=1"):
        take(output)
    assert not hasattr(output, "logits")
    assert bool(output)
    assert repr(copy.deepcopy(output)) == repr(output)


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}, {"use_cache": False}],
)
def test_generating_is_an_error_that_says_why(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = state_of(model)
    with (
        pytest.raises(StoppedPassError, match=r"generate\(\) needs logits"),
        strapfmt.capture(
            model, tmp_path / "x.strap", sites="blocks.0.resid_post", stop_at_layer=1, quiet=True
        ),
    ):
        model.generate(input_ids=IDS[:1], max_new_tokens=3, **options)
    assert state_of(model) == before
    model.generate(input_ids=IDS[:1], max_new_tokens=3, **options)


def test_a_cache_goes_on(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="blocks.0.resid_post", stop_at_layer=1, quiet=True):
        cache = DynamicCache(config=model.config)
        model(input_ids=IDS[:, :3], past_key_values=cache)
        model(input_ids=IDS[:, 3:], past_key_values=cache)
    with strapfmt.capture(model, tmp_path / "all.strap", sites="blocks.0.resid_post", quiet=True):
        cache = DynamicCache(config=model.config)
        model(input_ids=IDS[:, :3], past_key_values=cache)
        model(input_ids=IDS[:, 3:], past_key_values=cache)
    found, expected = Reader(path), Reader(tmp_path / "all.strap")
    assert torch.equal(found["blocks.0.resid_post"].tensor(), expected["blocks.0.resid_post"].tensor())
    assert found.tokens.to_arrow().equals(expected.tokens.to_arrow())


def test_the_model_inside_may_be_called_itself(tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="blocks.0.resid_post", stop_at_layer=1, quiet=True):
        output = model.model(input_ids=IDS)
        model(input_ids=IDS)
    assert repr(output) == "<forward pass that ended before block 1>"
    assert len(Reader(path)["blocks.0.resid_post"]) == 16


def test_an_error_in_the_model_stays_what_it_is(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = state_of(model)
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites="blocks.0.resid_post", stop_at_layer=1, quiet=True
    ):
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10**6]]))
        model(input_ids=IDS)
    assert state_of(model) == before
    statuses = Reader(tmp_path / "x.strap").steps.to_arrow(["status"])["status"].to_pylist()
    assert statuses == ["abandoned", "complete"]


def test_a_forward_of_the_models_own_is_put_back(tmp_path: Path) -> None:
    """Accelerate puts one there."""
    model = tiny_model("llama")
    calls = []

    def forward(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return type(module).forward(module, *args, **kwargs)

    own = model.forward = functools.partial(forward, model)
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites="blocks.0.resid_post", stop_at_layer=1, quiet=True
    ):
        assert repr(model(input_ids=IDS)).startswith("<forward pass")
    assert model.forward is own
    assert calls == [1]


def test_signatures_copies_and_stored_models_are_those_of_the_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    signature, expected = inspect.signature(model.forward), model(input_ids=IDS).logits
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites="blocks.0.resid_post", stop_at_layer=1, quiet=True
    ):
        assert inspect.signature(model.forward) == signature
        duplicate, stored = copy.deepcopy(model), io.BytesIO()
        torch.save(model, stored)
        model(input_ids=IDS)
    stored.seek(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in (duplicate, torch.load(stored, weights_only=False)):
        assert torch.equal(other(input_ids=IDS).logits, expected)


def test_one_capture_at_a_time_ends_passes(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = state_of(model)

    def capture(name: str, layer: int | None) -> Any:
        return strapfmt.capture(
            model, tmp_path / name, sites="blocks.0.resid_post", stop_at_layer=layer, quiet=True
        )

    with capture("a.strap", None), capture("b.strap", 1):
        with pytest.raises(CaptureError, match="another capture of this model runs with stop_at_layer"):
            capture("c.strap", 2).__enter__()
        model(input_ids=IDS)
    assert state_of(model) == before
    assert not (tmp_path / "c.strap").exists()
    for name in ("a.strap", "b.strap"):
        assert len(Reader(tmp_path / name)["blocks.0.resid_post"]) == 8


@pytest.mark.parametrize(
    "site",
    [
        *(
            "blocks.1.resid_pre",
            "blocks.1.attn_out",
            "blocks.1.resid_post",
            "final_norm",
            "logits",
            "blocks.*.mlp_out",
        ),
        *("model.layers.1.mlp.up_proj", "lm_head:in", "model.norm", "model", "model.layers.1:in"),
    ],
)
def test_sites_that_come_later_are_refused(site: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ArgumentError, match="stop_at_layer=1: expected sites that the blocks before it make"):
        strapfmt.capture(model, tmp_path / "x.strap", sites=["embed", site], stop_at_layer=1)
    assert not (tmp_path / "x.strap").exists()


def test_sites_by_path_before_the_end_are_taken(tmp_path: Path) -> None:
    model = tiny_model("llama")
    sites = ["model.embed_tokens:in", "model.layers.0.mlp", "model.rotary_emb"]
    with strapfmt.capture(model, tmp_path / "x.strap", sites=sites, stop_at_layer=1, quiet=True):
        model(input_ids=IDS)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (3, "stop_at_layer: expected 0 to 2, the number of blocks; got 3"),
        (-1, "stop_at_layer: expected a whole number of at least 0, got -1"),
        ("1", "stop_at_layer: expected a whole number"),
        (True, "stop_at_layer: expected a whole number"),
    ],
)
def test_wrong_layers_are_refused(layer: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=said):
        strapfmt.capture(tiny_model("llama"), tmp_path / "x.strap", sites="embed", stop_at_layer=layer)


def test_a_model_whose_blocks_are_not_known_is_refused(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8))
    with pytest.raises(ArgumentError, match="expected a model whose blocks are known"):
        strapfmt.capture(network, tmp_path / "x.strap", sites="0", stop_at_layer=1)


def test_a_copy_made_inside_outlives_the_capture(tmp_path: Path) -> None:
    model: PreTrainedModel = tiny_model("llama")
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites="blocks.0.resid_post", stop_at_layer=1, quiet=True
    ):
        duplicate = copy.deepcopy(model)
        assert repr(model(input_ids=IDS)).startswith("<forward pass")
    assert torch.equal(duplicate(input_ids=IDS).logits, model(input_ids=IDS).logits)
