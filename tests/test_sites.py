"""Sites: every family's uniform names against what Hugging Face returns and against sums done by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from models import (
    D_MODEL,
    ENCODER_DECODERS,
    ENCODERS,
    FAMILIES,
    N_LAYERS,
    VOCAB_SIZE,
    hidden_states,
    tiny_model,
)
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from strapfmt.errors import ArgumentError, CaptureError, SiteNotFoundError
from strapfmt_capture.architectures import ARCHITECTURES, Architecture
from strapfmt_capture.hookpoints import HookPoint, hook_points
from strapfmt_capture.sites import list_sites, remarks, resolve, row_modules

# Architectures that have both forms of a block, in the form their family does not have by default.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("falcon", {"parallel_attn": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("stablelm", {"use_parallel_residual": True}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gpt2", {"tie_word_embeddings": False}),
]


def read(
    model: torch.nn.Module, points: list[HookPoint], *args: Any, **kwargs: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    """Run a model once with plain hooks; return copies of what each point read, and the output."""
    values: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    attention: dict[str, Any] = {}  # by path: the call under way

    def note(path: str) -> Any:
        return lambda module, args, kwargs: attention.update({path: (module, kwargs)})

    def hook(point: HookPoint) -> Any:
        def run(module: torch.nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
            assert point.site not in values, "fired twice"
            around = attention.get(point.attention_path or "")
            values[point.site] = point.read(args, kwargs, output, module, around).clone()

        return run

    handles = [
        modules[path].register_forward_pre_hook(note(path), with_kwargs=True)
        for path in {point.attention_path for point in points if point.attention_path}
    ]
    for point in points:
        module = modules[point.module_path]
        register = module.register_forward_pre_hook if point.where == "in" else module.register_forward_hook
        handles.append(register(hook(point), with_kwargs=True))  # type: ignore[operator]
    try:
        with torch.no_grad():
            output = model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return values, output


def some_ids(n_sequences: int = 2, n_query: int = 5) -> torch.Tensor:
    return torch.randint(4, VOCAB_SIZE, (n_sequences, n_query), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_uniform_sites_are_what_they_say(family: str, overrides: dict[str, Any]) -> None:
    model = tiny_model(family, attn_implementation="eager", **overrides)
    values, output = read(
        model,
        resolve(model, list(hook_points(model))),
        some_ids(),
        output_hidden_states=True,
        output_attentions=True,
    )
    assert set(values) == set(hook_points(model)), "a site never fired"
    states = hidden_states(model, some_ids(), output)
    stream, attentions = (2, 5, D_MODEL), iter(getattr(output, "attentions", ()))
    # hidden_states: the input of every block, and last the output of the final norm.
    for layer in range(N_LAYERS):
        at = {name: values.get(f"blocks.{layer}.{name}") for name in ("resid_pre", "resid_mid", "resid_post")}
        outs = {name: values.get(f"blocks.{layer}.{name}") for name in ("attn_out", "mixer_out", "mlp_out")}
        added = {name: out.reshape(stream) for name, out in outs.items() if out is not None}
        mixed = added["mixer_out"] if "mixer_out" in added else added["attn_out"]
        assert torch.equal(at["resid_pre"], states[layer])
        if layer + 1 < N_LAYERS:
            assert torch.equal(at["resid_post"], states[layer + 1])
        assert ("attn_out" in added) != ("mixer_out" in added)
        if "attn_out" in added:
            pattern = values[f"blocks.{layer}.attn_pattern"]
            assert torch.equal(pattern, next(attentions).transpose(1, 2))
            assert pattern.shape == (2, 5, 4, 5)
            torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 5, 4))
        if at["resid_mid"] is not None:
            middle = at["resid_mid"].reshape(stream)
            assert torch.equal(at["resid_pre"] + mixed, middle)
            assert torch.equal(middle + added["mlp_out"], at["resid_post"])
        elif "mlp_out" not in added:
            assert torch.equal(at["resid_pre"] + mixed, at["resid_post"])
        else:
            pre, attn, mlp = at["resid_pre"], mixed, added["mlp_out"]
            sums = [pre + attn + mlp, attn + mlp + pre]
            assert any(torch.equal(found, at["resid_post"]) for found in sums)
    assert torch.equal(values["final_norm"], states[-1])
    assert not torch.equal(values["final_norm"], values[f"blocks.{N_LAYERS - 1}.resid_post"])
    assert torch.equal(values["logits"], output.logits)
    weight = model.get_input_embeddings().weight
    scale = D_MODEL**0.5 if family.startswith("gemma") else 1.0
    torch.testing.assert_close(values["embed"], weight[some_ids()] * scale)


@pytest.mark.parametrize(
    ("family", "overrides", "exists"),
    [
        ("llama", {}, True),
        ("gpt2", {}, True),
        ("phi", {}, False),
        ("gptj", {}, False),
        ("cohere", {}, False),
        ("gpt_neox", {}, False),
        ("gpt_neox", {"use_parallel_residual": False}, True),
        ("stablelm", {}, True),
        ("stablelm", {"use_parallel_residual": True}, False),
        ("falcon", {}, False),
        ("falcon", {"parallel_attn": False}, True),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, False),
    ],
)
def test_the_middle_of_the_stream_exists_where_attention_and_mlp_take_turns(
    family: str, overrides: dict[str, Any], exists: bool
) -> None:
    assert ("blocks.1.resid_mid" in hook_points(tiny_model(family, **overrides))) == exists


def test_every_architecture_in_the_table_is_tested() -> None:
    assert set(ARCHITECTURES) == {*FAMILIES, *ENCODERS, *ENCODER_DECODERS}


def test_a_norm_after_the_block_leaves_out_the_middle_of_opt() -> None:
    model = tiny_model("opt", do_layer_norm_before=False)
    sites = hook_points(model)
    assert "blocks.0.resid_mid" not in sites
    assert "final_norm" not in sites
    values, output = read(model, resolve(model, "**"), some_ids(), output_hidden_states=True)
    assert torch.equal(values["blocks.0.resid_post"], output.hidden_states[1])


def test_layers_are_exactly_what_a_star_in_their_place_matches() -> None:
    model = tiny_model("llama", num_hidden_layers=12)
    assert [p.site for p in resolve(model, "blocks.*.resid_post")] == [
        f"blocks.{n}.resid_post" for n in range(12)
    ]
    assert [p.module_path for p in resolve(model, "model.layers.*")] == [
        f"model.layers.{n}" for n in range(12)
    ]
    assert [p.site for p in resolve(model, "model.layers.[012].mlp")] == [
        f"model.layers.{n}.mlp" for n in range(3)
    ]
    assert [p.site for p in resolve(model, "model.layers.?.self_attn.q_proj")] == [
        f"model.layers.{n}.self_attn.q_proj" for n in range(10)
    ]
    assert {p.site for p in resolve(model, "model.layers.3.**")} == {
        path
        for path, _ in model.named_modules()
        if path == "model.layers.3" or path.startswith("model.layers.3.")
    }
    assert [p.site for p in resolve(model, "blocks.1?.mlp_out")] == ["blocks.10.mlp_out", "blocks.11.mlp_out"]


def test_sites_come_in_model_order_once_each() -> None:
    model = tiny_model("llama")
    asked = [
        "lm_head",
        "model.layers.1.mlp",
        "logits",
        "blocks.1.*",
        "blocks.*.resid_post",
        "embed",
        "model.layers.0",
    ]
    assert [p.site for p in resolve(model, asked)] == [
        "embed",
        "blocks.0.resid_post",
        "blocks.1.resid_pre",
        "blocks.1.q",
        "blocks.1.k",
        "blocks.1.v",
        "blocks.1.rot_q",
        "blocks.1.rot_k",
        "blocks.1.z",
        "blocks.1.attn_out",
        "blocks.1.resid_mid",
        "blocks.1.mlp_inner",
        "blocks.1.mlp_out",
        "blocks.1.resid_post",
        "logits",
        "model.layers.0",
        "model.layers.1.mlp",
        "lm_head",
    ]
    assert resolve(model, ["embed", "embed"]) == resolve(model, "embed")


def test_a_module_path_is_its_output_or_its_input() -> None:
    model = tiny_model("llama")
    points = resolve(
        model,
        ["model.layers.*.mlp", "model.layers.*.mlp:in", "model.layers.0.self_attn:in", "model.norm:out"],
    )
    assert [(p.site, p.hook_point) for p in points] == [
        ("model.layers.0.self_attn:in", "model.layers.0.self_attn:in"),
        ("model.layers.0.mlp", "model.layers.0.mlp:out"),
        ("model.layers.0.mlp:in", "model.layers.0.mlp:in"),
        ("model.layers.1.mlp", "model.layers.1.mlp:out"),
        ("model.layers.1.mlp:in", "model.layers.1.mlp:in"),
        ("model.norm", "model.norm:out"),
    ]
    values, _ = read(model, [*points, *resolve(model, "blocks.0.*")], some_ids())
    layer = model.model.layers[0]
    assert torch.equal(values["model.layers.0.mlp"], values["blocks.0.mlp_out"])
    with torch.no_grad():  # self_attn gets its input by keyword, after which come tuples of tensors
        assert torch.equal(
            values["model.layers.0.self_attn:in"], layer.input_layernorm(values["blocks.0.resid_pre"])
        )
        assert torch.equal(
            values["model.layers.0.mlp:in"], layer.post_attention_layernorm(values["blocks.0.resid_mid"])
        )


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("blocks.*.resid_pots", "blocks.0.resid_post"),
        ("blocks.7.mlp_out", "blocks.1.mlp_out"),
        ("model.layers.9.mlp", "model.layers.1.mlp"),
        ("model.layers.0.mpl:in", "model.layers.0.mlp"),
        ("logit", "logits"),
    ],
)
def test_a_name_that_matches_nothing_names_near_misses(pattern: str, near: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(SiteNotFoundError, match="did you mean") as caught:
        resolve(model, ["embed", pattern])
    assert near in caught.value.near
    assert pattern in str(caught.value)
    assert "LlamaForCausalLM" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "wider"), [("blocks.0", "blocks.0.*"), ("blocks.*", "blocks.*.resid_post")]
)
def test_a_block_is_no_site_and_the_advice_names_those_in_it(pattern: str, wider: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(SiteNotFoundError, match=re.escape(f"did you mean '{pattern}.*'")) as caught:
        resolve(model, pattern)
    assert wider in str(caught.value)
    for name in caught.value.stored:
        assert resolve(tiny_model("llama", attn_implementation="eager"), name)


def test_the_side_of_a_module_is_in_or_out() -> None:
    with pytest.raises(SiteNotFoundError):
        resolve(tiny_model("llama"), "model.norm:input")


def test_a_parallel_block_has_no_middle_to_ask_for() -> None:
    with pytest.raises(SiteNotFoundError) as caught:
        resolve(tiny_model("gpt_neox"), "blocks.0.resid_mid")
    assert "blocks.0.resid_pre" in caught.value.near


def test_asking_for_nothing_is_refused() -> None:
    with pytest.raises(ArgumentError, match="resid_post"):
        resolve(tiny_model("llama"), [])


def test_attention_patterns_need_eager_attention() -> None:
    model = tiny_model("llama", attn_implementation="sdpa")
    for pattern in ("blocks.0.attn_pattern", "blocks.*.attn_pattern", "blocks.*.attn_p*"):
        with pytest.raises(CaptureError, match=r'attn_implementation="eager".*sdpa'):
            resolve(model, ["embed", pattern])
    assert not any("attn_pattern" in point.site for point in resolve(model, "blocks.*.*"))
    assert not any("attn_pattern" in name for name in list_sites(model).names)
    (point,) = resolve(tiny_model("llama", attn_implementation="eager"), "blocks.0.attn_pattern")
    with pytest.raises(CaptureError, match='attn_implementation="eager"'):  # switched off again later
        read(model, [point], some_ids())


def test_a_place_without_a_tensor_is_an_error_that_names_it() -> None:
    point = HookPoint(site="s", module_path="a.b", where="out")
    tensor = torch.zeros(1)
    for output, found in (
        (None, "returned None"),
        ((), "returned a tuple of nothing"),
        ((None,), "returned a tuple of NoneType"),
        (((tensor, tensor), {"a": tensor}), "returned a tuple of tuple, dict"),
        ({"hidden": None}, "returned a dict of 'hidden': NoneType"),
        ("text", "returned a str"),
    ):
        message = f"site 's' at a.b:out: expected a tensor, but the module {found};"
        with pytest.raises(CaptureError, match=re.escape(message)):
            point.read((), {}, output)
    with pytest.raises(
        CaptureError, match=r"a\.b:in: .* called with a tuple of nothing and a dict of 'flag': bool"
    ):
        HookPoint(site="s", module_path="a.b", where="in").read((), {"flag": True})
    with pytest.raises(CaptureError):
        HookPoint(site="s", module_path="a.b", where="out", index=3).read((), {}, (torch.zeros(1),))


def test_the_first_tensor_is_taken_from_what_a_module_returns() -> None:
    point = HookPoint(site="s", module_path="", where="out")
    tensor = torch.zeros(2)
    for output in (tensor, (tensor, None), [None, tensor, torch.ones(1)], {"a": None, "b": tensor}):
        assert point.read((), {}, output) is tensor


def test_a_model_outside_the_table_has_its_module_paths() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    points = resolve(model, ["0", "[12]", "0:in"])
    assert [p.site for p in points] == ["0", "0:in", "1", "2"]
    values, output = read(model, points, torch.ones(5, 3))
    assert torch.equal(values["2"], output)
    with pytest.raises(SiteNotFoundError, match="its sites are its module paths"):
        resolve(model, "blocks.0.resid_post")


def test_an_architecture_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    model.config.model_type = "mine"
    with pytest.raises(SiteNotFoundError, match="'mine' is unknown"):
        resolve(model, "blocks.0.resid_post")
    mine = Architecture(embed="wte", blocks="h", final_norm="ln_f", attn="attn", mlp_out="mlp")
    monkeypatch.setitem(ARCHITECTURES, "mine", mine)
    assert resolve(model, "blocks.0.resid_post")[0].hook_point == "transformer.h.0:out"


def test_a_base_model_and_a_wrapped_model_have_the_same_sites() -> None:
    class Wrapper(torch.nn.Module):  # as PEFT's
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.base_model = torch.nn.Module()
            self.base_model.model = model

        def forward(self, **kwargs: Any) -> Any:
            return self.base_model.model(**kwargs)

    model = tiny_model("gemma2", attn_implementation="eager")
    wrapped = Wrapper(model)
    assert list(hook_points(wrapped)) == list(hook_points(model))
    assert set(hook_points(model)) - set(hook_points(model.model)) == {"logits"}
    plain, _ = read(model, resolve(model, "**"), some_ids())
    inside, _ = read(wrapped, resolve(wrapped, "**"), input_ids=some_ids())
    base, _ = read(model.model, resolve(model.model, "**"), some_ids())
    for site, value in plain.items():
        assert torch.equal(inside[site], value)
        assert site == "logits" or torch.equal(base[site], value)
    assert hook_points(wrapped)["logits"].module_path == "base_model.model"
    assert row_modules(wrapped) == [wrapped, model, model.model]


def test_the_language_model_of_a_multi_modal_model_is_found() -> None:
    text = {**tiny_model("gemma3_text").config.to_dict(), "final_logit_softcapping": None}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=99,
        boi_token_index=98,
        eoi_token_index=97,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    values, output = read(model, resolve(model, "**"), input_ids=some_ids(), output_hidden_states=True)
    assert torch.equal(values["blocks.1.resid_pre"], output.hidden_states[1])
    assert torch.equal(values["logits"], output.logits)
    assert resolve(model, "model.vision_tower.**.fc1")[0].module_path.startswith("model.vision_tower")
    assert not any("vision" in type(module).__name__.lower() for module in row_modules(model))


def test_logits_are_the_models_own_whatever_form_its_output_has() -> None:
    model = tiny_model("gemma2")
    for options in (
        {},
        {"return_dict": False},
        {"labels": some_ids()},
        {"labels": some_ids(), "return_dict": False},
    ):
        values, output = read(model, resolve(model, "logits"), some_ids(), **options)
        logits = output.logits if options.get("return_dict", True) else output["labels" in options]
        assert torch.equal(values["logits"], logits)


@pytest.mark.parametrize("family", [*FAMILIES, *ENCODERS])
def test_the_listing_says_what_a_pass_really_gives(family: str) -> None:
    model = tiny_model(family, attn_implementation="eager", dtype=torch.bfloat16)
    listing = list_sites(model)
    ids = some_ids(1, 3)
    points = hook_points(model)
    values, _ = read(model, list(points.values()), ids)
    known = {info.site: info for info in listing}
    for site, value in values.items():
        info = known[site]
        assert info.shape is not None, site
        value = value[:, 0] if points[site].is_last else value
        row = value.reshape(3, *value.shape[2:]) if value.shape[:2] == (1, 3) else value
        assert [a for a, b in zip(row.shape[1:], info.shape, strict=True) if b not in (-1, a)] == [], site
        assert str(value.dtype) == f"torch.{info.dtype}"
        if -1 in info.shape:
            assert info.bytes_per_token is None
        else:
            assert info.bytes_per_token == row[0].numel() * row.element_size()


def test_the_listing_of_modules_is_right_where_it_says_something() -> None:
    for family in ("gpt2", "llama", "qwen3", "mixtral"):
        model = tiny_model(family)
        listing = list_sites(model)
        wanted = [info for info in listing.modules if info.shape is not None and "experts" not in info.site]
        assert len(wanted) > 10
        values, _ = read(model, resolve(model, [info.site for info in wanted]), some_ids(1, 3))
        for info in wanted:
            assert values[info.site].numel() == 3 * torch.Size(info.shape or ()).numel(), info.site


def test_the_listing_prints_as_a_table_with_the_layers_folded() -> None:
    text = repr(list_sites(tiny_model("gpt2", num_hidden_layers=12)))
    lines = [line.split() for line in text.splitlines()]
    assert ["blocks.*.resid_post", "transformer.h.*:out", "(32,)", "float32", "128", "12"] in lines
    assert ["transformer.h.*.mlp.c_fc", "(128,)", "float32", "512", "12"] in lines
    assert ["logits", "lm_head:out", f"({VOCAB_SIZE},)", "float32", "404", "1"] in lines
    assert text.count("resid_post") == 1


def test_the_listing_is_a_sequence() -> None:
    listing = list_sites(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout()))
    assert [info.site for info in listing] == listing.names == ["0", "1"]
    assert listing[0].shape == (4,)
    assert listing[0].bytes_per_token == 16
    assert listing[1].shape is None
    assert len(listing[:1]) == 1


def test_whatever_is_entered_first_can_begin_a_step() -> None:
    model = tiny_model("opt")
    assert row_modules(model) == [model, model.model, model.model.decoder]
    layer = torch.nn.Linear(2, 2)
    assert row_modules(layer) == [layer]


def test_an_encoder_and_a_decoder_can_begin_a_step_whatever_they_are_given() -> None:
    for family in ("t5", "whisper"):
        model = tiny_model(family)
        assert row_modules(model)[:3] == [model, model.get_encoder(), model.get_decoder()]
        assert row_modules(model.get_encoder()) == [model.get_encoder()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_one_decoder_gives_no_cause_for_remarks(family: str) -> None:
    assert remarks(tiny_model(family, attn_implementation="eager"), "**.resid_*") == []


def test_the_second_decoder_of_a_model_is_told() -> None:
    both = torch.nn.ModuleDict({"draft": tiny_model("gpt2"), "target": tiny_model("llama")})
    (said,) = remarks(both, "blocks.*.resid_post")
    assert "2 decoders" in said
    assert "the first, at 'draft.transformer'" in said
    assert "'target.model'" in said
    assert remarks(both, "target.model.layers.*") == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_compile_makes_of_a_model_or_a_layer_has_the_same_sites() -> None:
    model = tiny_model("llama")
    before = [(info.site, info.hook_point, info.shape) for info in list_sites(model)]
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    compiled: Any = torch.compile(model, backend="eager")
    assert [(info.site, info.hook_point, info.shape) for info in list_sites(compiled)] == before
    points = resolve(model, ["model.layers.*.mlp:in", "blocks.1.attn_out"])
    assert [point.module_path for point in points] == [
        "model.layers.1.self_attn",
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    ]


def kinds_of(points: list[HookPoint]) -> set[str]:
    return {point.site.rpartition(".")[2] for point in points}


@pytest.mark.parametrize("pattern", ["**", "blocks.*.*", "blocks.0.*", "blocks.**", "blocks.0.?*", "*.*.**"])
def test_a_wildcard_alone_leaves_out_what_is_computed_once_more(pattern: str) -> None:
    model = tiny_model("mixtral", attn_implementation="sdpa")
    kinds = kinds_of(resolve(model, pattern, recompute_patterns=True))
    assert {"resid_post", "router_logits", "expert_weights", "rot_q"} <= kinds
    assert not kinds & {"expert_out", "attn_pattern"}
    said = remarks(model, pattern, recompute_patterns=True)
    assert said == [
        "attn_pattern, expert_out left out, which cost a part of the model once more: "
        'ask for "blocks.*.attn_pattern" as well'
    ]


@pytest.mark.parametrize(
    "pattern", ["blocks.*.expert_out", "**.expert_out", "blocks.0.expert_*", "*.1.*_out"]
)
def test_what_is_computed_once_more_is_taken_by_its_name(pattern: str) -> None:
    model = tiny_model("mixtral", attn_implementation="sdpa")
    assert "expert_out" in kinds_of(resolve(model, pattern))
    assert remarks(model, pattern) == []


def test_a_costly_site_that_one_pattern_names_is_not_called_left_out() -> None:
    model = tiny_model("mixtral", attn_implementation="eager")
    asked = ["**", "blocks.*.expert_out"]
    assert "expert_out" in kinds_of(resolve(model, asked))
    assert remarks(model, asked) == []
    # Patterns of eager attention are there anyway.
    assert "attn_pattern" in kinds_of(resolve(model, "blocks.*.*"))
