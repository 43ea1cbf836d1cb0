"""Queries, keys, values, heads and inner layers of every architecture, against its own modules called by hand."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ENCODERS, FAMILIES, N_LAYERS, tiny_model, tiny_tokenizer
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask

import strapfmt
from strapfmt.errors import CaptureError, SiteNotFoundError
from strapfmt.reader import Reader
from strapfmt_capture import decoders
from strapfmt_capture.architectures import ARCHITECTURES, Architecture
from strapfmt_capture.heads import Heads, rotated
from strapfmt_capture.hookpoints import hook_points

# Architectures whose attention calls no function by way of the table of transformers.
OWN_WAY = ("bloom", "falcon", "gptj")
NO_ROTARY = ("gpt2", "opt", "bloom", "jamba", *ENCODERS)
NO_ATTENTION = ("mamba", "mamba2", "falcon_mamba")
ATTENDING = [family for family in (*FAMILIES, *ENCODERS) if family not in NO_ATTENTION]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in ATTENDING),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"multi_query": False, "new_decoder_architecture": False}),
    ("falcon", {"alibi": True}),
    ("phi", {"qk_layernorm": True}),
    ("stablelm", {"qk_layernorm": True}),
    ("cohere", {"use_qk_norm": True}),
    ("olmo", {"clip_qkv": 0.05}),
    ("olmoe", {"clip_qkv": 0.5}),
    ("phi3", {"partial_rotary_factor": 0.5, "num_key_value_heads": 1}),
    ("smollm3", {"no_rope_layers": [1, 0]}),
    (
        "gpt_neox",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
    ),
]


def batch(side: str = "left") -> dict[str, torch.Tensor]:
    """Two sequences, one of them padded; five places, which is not the number of heads."""
    texts = ["the c", "abcde"]
    return dict(
        tiny_tokenizer()(
            texts, return_tensors="pt", padding=True, padding_side=side, return_token_type_ids=False
        )
    )


class Passes:
    """What modules were called with and gave, pass by pass, by hooks of our own."""

    def __init__(self) -> None:
        self.inputs: dict[torch.nn.Module, list[torch.Tensor]] = {}
        self.attended: dict[torch.nn.Module, list[dict[str, torch.Tensor]]] = {}

    @contextmanager
    def recorded(self, *modules: torch.nn.Module) -> Iterator[None]:
        with ExitStack() as handles:
            for module in modules:
                handle = module.register_forward_pre_hook(self._keep, with_kwargs=True)
                handles.callback(handle.remove)
            yield

    def _keep(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self.inputs.setdefault(module, []).append(x.clone())

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention of our own, which keeps all it sees, and tells the model no pattern."""
        n_repeat = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(n_repeat, 1).transpose(2, 3) * scaling
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        pattern = (scores if mask is None else scores + mask).softmax(-1)
        z = (pattern @ value.repeat_interleave(n_repeat, 1)).transpose(1, 2).contiguous()
        n = query.shape[2]  # the keys and values of this pass are the last of those in the cache
        kept = {
            "q": query.transpose(1, 2).clone(),
            "k": key[:, :, -n:].transpose(1, 2).clone(),
            "v": value[:, :, -n:].transpose(1, 2).clone(),
            "z": z.clone(),
            "pattern": pattern.clone(),
        }
        self.attended.setdefault(module, []).append(kept)
        return z, None


@pytest.fixture
def passes() -> Iterator[Passes]:
    passes = Passes()
    AttentionInterface.register("ours", passes.attend)
    AttentionMaskInterface.register("ours", eager_mask)
    yield passes
    del AttentionInterface._global_mapping["ours"]
    del AttentionMaskInterface._global_mapping["ours"]


def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any) -> Any:
    """Prefill and two decode passes on a cache; one pass of an encoder."""
    if model.config.model_type in ENCODERS:
        with torch.no_grad():
            return model(**inputs)
    return model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, **options)


def rows_of(values: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """Values of all passes, `[n_sequences, n_query, *]` each, as rows of tokens."""
    return torch.cat([values[0][mask.bool()], *(value.flatten(0, 1) for value in values[1:])])


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def blocks_of(model: torch.nn.Module) -> Any:
    decoder = decoders.find_decoder(model)
    assert decoder is not None
    return decoder.module.get_submodule(decoder.architecture.blocks)


def attentions_of(model: torch.nn.Module) -> dict[int, Any]:
    """The attention modules, by layer: Jamba has them in some blocks only."""
    path = ARCHITECTURES[model.config.model_type].attn
    found = {layer: decoders.child(block, path) for layer, block in enumerate(blocks_of(model))}
    return {layer: attn for layer, attn in found.items() if attn is not None}


def projections_of(family: str, attn: Any) -> list[torch.nn.Module]:
    names = {
        "gpt2": ["c_attn"],
        "phi3": ["qkv_proj"],
        "distilbert": ["q_lin", "k_lin", "v_lin"],
        "bert": ["query", "key", "value"],
        "roberta": ["query", "key", "value"],
        **{name: ["query_key_value"] for name in ("gpt_neox", "bloom", "falcon")},
    }
    return [getattr(attn, name) for name in names.get(family, ["q_proj", "k_proj", "v_proj"])]


def by_hand(family: str, attn: Any, x: torch.Tensor, config: Any) -> list[torch.Tensor]:
    """q, k and v `[n_sequences, n_query, heads, d_head]` from what goes into the projections."""
    n, s = x.shape[:2]
    heads = config.num_attention_heads
    d = getattr(config, "head_dim", None) or config.hidden_size // heads
    outputs = [projection(x) for projection in projections_of(family, attn)]
    if family == "gpt2":
        return [part.view(n, s, heads, d) for part in outputs[0].split(config.hidden_size, 2)]
    if family == "gpt_neox":
        return list(outputs[0].view(n, s, heads, 3 * d).chunk(3, dim=-1))
    if family == "bloom":
        return [part.transpose(1, 2) for part in attn._reshape(outputs[0])]
    if family == "falcon":
        q, k, v = attn._split_heads(outputs[0])
        repeats = heads // config.num_kv_heads if config.new_decoder_architecture else 1
        return [q, k[:, :, ::repeats], v[:, :, ::repeats]]  # its split repeats them for each query
    if family == "phi3":
        ends = [heads * d, (heads + config.num_key_value_heads) * d]
        q, k, v = outputs[0][..., : ends[0]], outputs[0][..., ends[0] : ends[1]], outputs[0][..., ends[1] :]
        return [part.view(n, s, -1, d) for part in (q, k, v)]
    if family in ("olmo2", "olmoe"):
        outputs = [attn.q_norm(outputs[0]), attn.k_norm(outputs[1]), outputs[2]]
    if family in ("olmo", "olmoe") and config.clip_qkv:
        outputs = [part.clamp(-config.clip_qkv, config.clip_qkv) for part in outputs]
    q, k, v = (part.view(n, s, -1, d) for part in outputs)
    if family in ("qwen3", "qwen3_moe") or (family == "cohere" and config.use_qk_norm):
        q, k = attn.q_norm(q), attn.k_norm(k)
    if family == "gemma3_text":
        q, k = attn.q_norm(q.transpose(1, 2)).transpose(1, 2), attn.k_norm(k.transpose(1, 2)).transpose(1, 2)
    if family in ("phi", "stablelm") and config.qk_layernorm:
        q = attn.q_layernorm(q.transpose(1, 2)).transpose(1, 2)
        k = attn.k_layernorm(k.transpose(1, 2)).transpose(1, 2)
    return [q, k, v]


def captured(
    model: PreTrainedModel,
    path: Path,
    sites: str | list[str],
    inputs: dict[str, torch.Tensor],
    **options: Any,
) -> Reader:
    with strapfmt.capture(model, path, sites=sites, stats=False, quiet=True, **options):
        run(model, inputs)
    return Reader(path)


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_heads_are_what_the_attention_is_made_of(
    family: str, overrides: dict[str, Any], passes: Passes, tmp_path: Path
) -> None:
    implementation = "eager" if family in OWN_WAY else "ours"
    model, inputs = tiny_model(family, attn_implementation=implementation, **overrides), batch()
    sites = [f"blocks.*.{name}" for name in ("q", "k", "v", "z")]
    attentions = attentions_of(model)
    first = {layer: projections_of(family, attn)[0] for layer, attn in attentions.items()}
    assert first
    with passes.recorded(*first.values()):
        reader = captured(model, tmp_path / "x.strap", sites, inputs)
    mask = inputs["attention_mask"]
    for layer, attn in attentions.items():
        with torch.no_grad():
            parts = [by_hand(family, attn, x, model.config) for x in passes.inputs[first[layer]]]
        assert len(parts) == (1 if family in ENCODERS else 3)
        for number, name in enumerate("qkv"):
            found = reader[f"blocks.{layer}.{name}"].tensor()
            assert_same_bits(found, rows_of([part[number] for part in parts], mask))
        z = reader[f"blocks.{layer}.z"].tensor()
        if family in OWN_WAY:
            continue
        kept = passes.attended[attn]
        assert_same_bits(z, rows_of([each["z"] for each in kept], mask))
        assert_same_bits(reader[f"blocks.{layer}.v"].tensor(), rows_of([each["v"] for each in kept], mask))


@pytest.mark.parametrize(("family", "overrides"), VARIANTS)
def test_rotated_heads_are_those_that_attention_sees(
    family: str, overrides: dict[str, Any], passes: Passes, tmp_path: Path
) -> None:
    implementation = "eager" if family in OWN_WAY else "ours"
    model, inputs = tiny_model(family, attn_implementation=implementation, **overrides), batch()
    if family in NO_ROTARY or overrides.get("alibi"):
        assert not [site for site in hook_points(model) if ".rot_" in site]
        with pytest.raises(SiteNotFoundError):
            strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.rot_q")
        return
    sites = ["blocks.*.rot_?", "blocks.*.q"]
    path, mask = tmp_path / "x.strap", inputs["attention_mask"]
    with strapfmt.capture(model, path, sites=sites, stats=False, quiet=True):
        out = run(model, inputs, return_dict_in_generate=True)
    reader = Reader(path)
    real = torch.nn.functional.pad(mask.bool(), (0, 2), value=True)
    for layer, attn in attentions_of(model).items():
        rot_q, rot_k = (reader[f"blocks.{layer}.{name}"].tensor() for name in ("rot_q", "rot_k"))
        if family not in OWN_WAY:
            kept = passes.attended[attn]
            assert_same_bits(rot_q, rows_of([each["q"] for each in kept], mask))
            assert_same_bits(rot_k, rows_of([each["k"] for each in kept], mask))
        keys = out.past_key_values.layers[layer].keys.transpose(1, 2)
        if keys.shape[1] == real.shape[1]:  # no window
            n = mask.shape[1]
            if family == "falcon" and model.config.new_decoder_architecture:
                keys = keys[:, :, :: model.config.num_attention_heads // model.config.num_kv_heads]
            assert_same_bits(rot_k, rows_of([keys[:, :n], keys[:, n : n + 1], keys[:, n + 1 :]], mask))
        is_plain = family == "smollm3" and not attn.use_rope
        assert torch.equal(rot_q, reader[f"blocks.{layer}.q"].tensor()) == is_plain


@pytest.mark.parametrize("overrides", [{}, {"new_decoder_architecture": True, "num_kv_heads": 2}])
def test_the_queries_of_falcon_are_rotated_by_its_own_function(
    overrides: dict[str, Any], tmp_path: Path
) -> None:
    model, inputs = tiny_model("falcon", **overrides), batch()
    reader = captured(model, tmp_path / "x.strap", ["blocks.0.rot_q", "blocks.0.q"], inputs)
    rotate = importlib.import_module(type(model).__module__).apply_rotary_pos_emb
    positions = torch.tensor(reader.tokens.to_arrow(["position"])["position"].to_pylist())
    q = reader["blocks.0.q"].tensor()[None].transpose(1, 2)
    with torch.no_grad():
        cos, sin = model.transformer.rotary_emb(q, positions[None])
        expected, _ = rotate(q, q, cos, sin)
    assert_same_bits(reader["blocks.0.rot_q"].tensor(), expected[0].transpose(0, 1))


@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_the_queries_of_gptj_are_rotated_in_pairs(rotary_dim: int, tmp_path: Path) -> None:
    model, inputs = tiny_model("gptj", rotary_dim=rotary_dim), batch()
    reader = captured(model, tmp_path / "x.strap", ["blocks.1.rot_q", "blocks.1.q"], inputs)
    positions = torch.tensor(reader.tokens.to_arrow(["position"])["position"].to_pylist())
    q, found = reader["blocks.1.q"].tensor(), reader["blocks.1.rot_q"].tensor()
    angle = (positions[:, None] / 10000 ** (torch.arange(0, rotary_dim, 2) / rotary_dim))[:, None]
    expected = q.clone()
    even, odd = q[..., :rotary_dim:2], q[..., 1:rotary_dim:2]
    expected[..., :rotary_dim:2] = even * angle.cos() - odd * angle.sin()
    expected[..., 1:rotary_dim:2] = odd * angle.cos() + even * angle.sin()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert_same_bits(found[..., rotary_dim:], q[..., rotary_dim:])


Inner = Callable[[Any, torch.Tensor], torch.Tensor]
_GATED: Inner = lambda mlp, x: mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)  # noqa: E731
# The module below a block whose input the inner layer is made of, and how.
INNER: dict[str, tuple[str, Inner]] = {
    **dict.fromkeys(FAMILIES, ("mlp", _GATED)),
    "jamba": ("feed_forward", _GATED),
    "gpt2": ("mlp", lambda mlp, x: mlp.act(mlp.c_fc(x))),
    "gpt_neox": ("mlp", lambda mlp, x: mlp.act(mlp.dense_h_to_4h(x))),
    "phi": ("mlp", lambda mlp, x: mlp.activation_fn(mlp.fc1(x))),
    "phi3": (
        "mlp",
        lambda mlp, x: (
            mlp.gate_up_proj(x).chunk(2, -1)[1] * mlp.activation_fn(mlp.gate_up_proj(x).chunk(2, -1)[0])
        ),
    ),
    "opt": ("fc1", lambda fc1, x: torch.relu(fc1(x))),
    "falcon": ("mlp", lambda mlp, x: mlp.act(mlp.dense_h_to_4h(x))),
    "bloom": ("mlp", lambda mlp, x: mlp.gelu_impl(mlp.dense_h_to_4h(x))),
    "gptj": ("mlp", lambda mlp, x: mlp.act(mlp.fc_in(x))),
    "starcoder2": ("mlp", lambda mlp, x: mlp.act(mlp.c_fc(x))),
    "bert": ("intermediate", lambda module, x: module.intermediate_act_fn(module.dense(x))),
    "roberta": ("intermediate", lambda module, x: module.intermediate_act_fn(module.dense(x))),
    "distilbert": ("ffn", lambda ffn, x: ffn.activation(ffn.lin1(x))),
}


@pytest.mark.parametrize("family", ATTENDING)
def test_the_inner_layer_is_what_is_projected_down(family: str, passes: Passes, tmp_path: Path) -> None:
    model, inputs = tiny_model(family), batch()
    if family in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"):  # experts have inner layers each
        assert not [site for site in hook_points(model) if "mlp_inner" in site]
        return
    path, inner = INNER[family]
    sites = [site for site in hook_points(model) if site.endswith(".mlp_inner")]
    modules = {int(site.split(".")[1]): blocks_of(model)[int(site.split(".")[1])] for site in sites}
    modules = {layer: block.get_submodule(path) for layer, block in modules.items()}
    assert len(modules) == (1 if family == "jamba" else N_LAYERS)  # one block of Jamba's is one of experts
    with passes.recorded(*modules.values()):
        reader = captured(model, tmp_path / "x.strap", "blocks.*.mlp_inner", inputs)
    for layer, module in modules.items():
        with torch.no_grad():
            values = [inner(module, x) for x in passes.inputs[module]]
        values = [value if value.ndim == 3 else value.unflatten(0, (2, -1)) for value in values]
        found = reader[f"blocks.{layer}.mlp_inner"].tensor()
        assert_same_bits(found, rows_of(values, inputs["attention_mask"]))


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_stream_of_an_encoder_is_what_its_parts_read(family: str, side: str, tmp_path: Path) -> None:
    model, inputs = tiny_model(family, attn_implementation="eager"), batch(side)
    reader = captured(model, tmp_path / "x.strap", "**", inputs)
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, output_attentions=True)
    real = inputs["attention_mask"].bool()
    stored = {name: reader[name].tensor() for name in reader.names if "pattern" not in name}
    assert not {"logits", "final_norm"} & set(reader.names)
    for layer, block in enumerate(blocks_of(model)):
        at = {
            name.split(".")[2]: value for name, value in stored.items() if name.startswith(f"blocks.{layer}.")
        }
        assert_same_bits(at["resid_pre"], output.hidden_states[layer][real])
        assert_same_bits(at["resid_post"], output.hidden_states[layer + 1][real])
        norms = (
            (block.sa_layer_norm, block.output_layer_norm)
            if family == "distilbert"
            else (block.attention.output.LayerNorm, block.output.LayerNorm)
        )
        with torch.no_grad():
            assert_same_bits(at["resid_mid"], norms[0](at["attn_out"] + at["resid_pre"]))
            assert_same_bits(at["resid_post"], norms[1](at["mlp_out"] + at["resid_mid"]))
        # Attention goes both ways: the first token attends to the last.
        first = reader[f"blocks.{layer}.attn_pattern"].to_arrow(["activation", "shape"]).to_pylist()[0]
        pattern = torch.tensor(first["activation"]).reshape(first["shape"])
        n_real = int(real[0].sum())
        assert pattern.shape == (4, n_real)
        assert bool((pattern > 0).all())
        assert_same_bits(pattern, output.attentions[layer][0][:, real[0]][:, 0][:, real[0]])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2", "gemma3_text", "falcon"])
def test_as_many_places_as_heads_are_no_riddle(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    ids = torch.randint(4, 100, (2, model.config.num_attention_heads))
    path = tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="blocks.0.*", stats=False, quiet=True), torch.no_grad():
        model(input_ids=ids)
    with (
        strapfmt.capture(model, tmp_path / "y.strap", sites="blocks.0.*", stats=False, quiet=True),
        torch.no_grad(),
    ):
        model(input_ids=torch.nn.functional.pad(ids, (0, 1), value=5))
    n = model.config.num_attention_heads
    for name in Reader(path).names:
        longer = Reader(tmp_path / "y.strap")[name].tensor().unflatten(0, (2, n + 1))[:, :n].flatten(0, 1)
        torch.testing.assert_close(Reader(path)[name].tensor(), longer, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_rotated_keys_do_not_depend_on_the_cache(family: str, cache: str, tmp_path: Path) -> None:
    model, inputs = tiny_model(family), batch()
    for name, options in (("x", {"cache_implementation": cache}), ("y", {"use_cache": False})):
        path = tmp_path / f"{name}.strap"
        with strapfmt.capture(model, path, sites="blocks.*.rot_k", stats=False, quiet=True):
            run(model, inputs, disable_compile=True, **options)
    with_cache, without = (Reader(tmp_path / f"{name}.strap") for name in "xy")
    for layer in range(N_LAYERS):
        found, expected = (each[f"blocks.{layer}.rot_k"] for each in (with_cache, without))
        assert len(found) > 8
        n = int(inputs["attention_mask"].sum())
        torch.testing.assert_close(found.tensor()[:n], expected.tensor()[:n])


def test_the_positions_of_a_pass_are_not_kept(tmp_path: Path) -> None:
    model, inputs = tiny_model("llama"), batch()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.rot_q", quiet=True) as cap:
        run(model, inputs)
        assert cap._engine is not None
        assert [tap.attention for tap in cap._engine.hooks.taps] == [None, None]
    assert not model.model.layers[0].self_attn._forward_pre_hooks


def test_a_projection_called_outside_its_attention_is_told(tmp_path: Path) -> None:
    class Odd(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor) -> Any:
            x = self.model.get_input_embeddings()(input_ids)
            return self.model.model.layers[0].self_attn.q_proj(x)

    odd = Odd(tiny_model("llama"))
    capture = strapfmt.capture(odd, tmp_path / "x.strap", sites="blocks.0.rot_q", quiet=True)
    with pytest.raises(CaptureError, match="outside its attention"), capture:
        odd(input_ids=batch()["input_ids"])


def test_gradients_and_models_copied_meanwhile_are_left_alone(tmp_path: Path) -> None:
    model, inputs = tiny_model("qwen3"), batch()
    expected = model(**inputs).logits
    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.*", quiet=True):
        output = model(**inputs).logits
        copied, stored = deepcopy(model), pickle.loads(pickle.dumps(model))  # noqa: S301
    output.sum().backward()
    assert torch.equal(output, expected)
    for other in (copied, stored):
        with torch.no_grad():
            assert torch.equal(other(**inputs).logits, expected)
    assert not Reader(tmp_path / "x.strap")["blocks.0.rot_q"].tensor().requires_grad


class OwnAttention(torch.nn.Module):
    """Fused, keys and values first, and rotated by a function that this file has under the usual name."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.kvq, self.out = torch.nn.Linear(12, 36), torch.nn.Linear(12, 12)

    def forward(
        self, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[Any, Any]:
        k, v, q = self.kvq(x).view(*x.shape[:2], 3, 3, 4).unbind(2)
        q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *position_embeddings)
        pattern = (q @ k.transpose(2, 3)).softmax(-1)
        return self.out((pattern @ v.transpose(1, 2)).transpose(1, 2).flatten(2)), pattern


def apply_rotary_pos_emb(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.mul_(cos).add_(sin), k.mul_(cos).add_(sin)  # in place, as some kernels do


class OwnBlock(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.mixing, self.up, self.down = (
            OwnAttention(config),
            torch.nn.Linear(12, 20),
            torch.nn.Linear(20, 12),
        )

    def forward(self, x: torch.Tensor, angles: Any) -> torch.Tensor:
        x = x + self.mixing(x, position_embeddings=angles)[0]
        return x + self.down(torch.relu(self.up(x)))


class OwnModel(torch.nn.Module):
    """An architecture that nobody has heard of."""

    class config:
        model_type, num_attention_heads, hidden_size, vocab_size = "own", 3, 12, 30

    def __init__(self) -> None:
        super().__init__()
        self.table, self.trunk = torch.nn.Embedding(30, 12), torch.nn.ModuleList([OwnBlock(self.config)])

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        place = (torch.arange(x.shape[1])[:, None] / 7).expand(-1, 4)
        for block in self.trunk:
            x = block(x, (place.cos(), place.sin()))
        return x


def _keys_first(x: torch.Tensor, part: int, sizes: Any) -> torch.Tensor:
    order = (2, 0, 1)  # q, k, v among the parts
    return x.unflatten(-1, (3, sizes.n_heads, sizes.d_head))[..., order[part], :, :]


def test_a_record_teaches_an_architecture_all_sites(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, ids = OwnModel().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(SiteNotFoundError, match="'own' is unknown"):
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.q")
    fused = "mixing.kvq"
    record = Architecture(
        embed="table",
        blocks="trunk",
        final_norm="",
        attn="mixing",
        mlp_out="down",
        mlp_inner="down",
        resid_mid="up",
        heads=Heads(q=fused, k=fused, v=fused, z="mixing.out", layout=_keys_first, rotary=rotated),
    )
    monkeypatch.setitem(ARCHITECTURES, "own", record)
    with strapfmt.capture(model, tmp_path / "x.strap", sites="**", quiet=True), torch.no_grad():
        output = model(input_ids=ids)
    reader, block = Reader(tmp_path / "x.strap"), model.trunk[0]
    assert {info.site: info.shape for info in strapfmt.sites(model).uniform} == {
        "embed": (12,),
        **{
            f"blocks.0.{name}": (12,)
            for name in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
        },
        **{f"blocks.0.{name}": (3, 4) for name in ("q", "k", "v", "rot_q", "rot_k", "z")},
        "blocks.0.attn_pattern": (3, -1),
        "blocks.0.mlp_inner": (20,),
    }
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids), output)
        k, v, q = block.mixing.kvq(model.table(ids)).view(2, 3, 3, 3, 4).unbind(2)
        place = torch.arange(3)[:, None, None] / 7
        rot_q, rot_k = (part.clone().mul_(place.cos()).add_(place.sin()) for part in (q, k))
        z = torch.einsum("nqhk,nkhd->nqhd", torch.einsum("nqhd,nkhd->nqhk", rot_q, rot_k).softmax(-1), v)
        mid = reader["blocks.0.resid_mid"].tensor()
    for name, expected in {"q": q, "k": k, "v": v, "rot_q": rot_q, "rot_k": rot_k}.items():
        assert_same_bits(reader[f"blocks.0.{name}"].tensor(), expected.flatten(0, 1))
    torch.testing.assert_close(reader["blocks.0.z"].tensor(), z.flatten(0, 1))
    assert_same_bits(reader["blocks.0.mlp_inner"].tensor(), torch.relu(block.up(mid)).detach())


def test_an_attention_that_rotates_in_another_way_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    record = ARCHITECTURES["gpt2"]
    assert record.heads is not None
    heads = Heads(q="attn.c_attn", k="attn.c_attn", v="attn.c_attn", z="attn.c_proj", rotary=rotated)
    monkeypatch.setitem(
        ARCHITECTURES,
        "gpt2",
        Architecture(embed="wte", blocks="h", final_norm="ln_f", attn="attn", mlp_out="mlp", heads=heads),
    )
    model = tiny_model("gpt2", num_attention_heads=4)
    capture = strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.rot_q", quiet=True)
    with pytest.raises(CaptureError, match=r"rotates in another way \(no 'position_embeddings'\)"), capture:
        run(model, batch())
