"""Where Hugging Face architectures hold the uniform sites: one frozen record per `config.model_type`.

To teach strapfmt another model, add a record::

    from strapfmt_capture.architectures import ARCHITECTURES, Architecture
    from strapfmt_capture.heads import Heads, rotated
    ARCHITECTURES["my_model"] = Architecture(
        embed="embed_tokens", blocks="layers", final_norm="norm",
        attn="self_attn", mlp_out="mlp", resid_mid="post_attention_layernorm", mlp_inner="mlp.down_proj",
        heads=Heads(
            q="self_attn.q_proj", k="self_attn.k_proj", v="self_attn.v_proj", z="self_attn.o_proj", rotary=rotated,
        ),
    )

What a record leaves out, and what a block does not have, is no site.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from strapfmt_capture.heads import (
    Heads,
    clipped,
    concatenated,
    grouped,
    rotated,
    rotated_by_position,
)

__all__ = ["ARCHITECTURES", "HEADS", "Architecture"]

# Names a language-model head has, next to the decoder or above it.
HEADS = ("lm_head", "embed_out", "proj_out")


def _always(config: Any) -> bool:
    return True


def _never(config: Any) -> bool:
    return False


def _nothing(config: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Where the sites of one decoder, or of an encoder, are.

    `embed`, `blocks` and `final_norm` are paths below the decoder, the module that owns the list of blocks
    (`model` in Llama, `transformer` in GPT-2); the other paths are below one block. The residual stream itself
    is the input (`resid_pre`) and the output (`resid_post`) of a block in every architecture, so it needs no
    entry.

    Attributes
    ----------
    embed : str
        The token embedding. Its output is what the model adds positions to; Gemma's includes the scale.
    blocks : str
        The `ModuleList` of blocks.
    final_norm : str
        The norm after the last block; it may be absent in a model.
    attn : str
        The attention module; its second output is the attention pattern. Empty where no block has one.
    attn_out, mlp_out : str
        The module whose output is **added to the residual stream**: the norm after the attention or the MLP
        where there is one (Gemma 2 and 3, OLMo 2), a linear layer where the module itself adds the stream
        (BLOOM), the module itself elsewhere. An empty `attn_out` means `attn`. Where a model drops out between
        the module and the sum without a module of its own for it (OPT, Phi), training shows the value before
        the dropout. An empty `mlp_out` means that no block has an MLP.
    mlp_inner : str
        The module whose *input* is the MLP's inner layer, after its nonlinearity: the projection down.
    heads : Heads or None
        Where queries, keys, values and the outputs of heads are.
    mixer : str
        The state-space module, in blocks that have one in place of attention; its output is added to the stream.
    router, experts : str
        In blocks that send tokens to some of many experts: the module that returns `(logits, weights, ids)` of the
        choice, its rows flattened, and the one that takes `(hidden_states, ids, weights)` and returns the weighted sum.
    resid_mid : str
        The module whose *input* is the stream between attention and MLP; empty where the two run in parallel.
    resid_mid_if : callable
        Whether a config has the sequential form, for architectures that have both.
    logits_after_head : callable
        Whether a config changes the head's output (soft-capping, a scale), so that `logits` is read from the
        output of the language model instead of the output of its head.
    in_float32 : callable
        The sites (without `blocks.N.`) that are float32 whatever the type of the weights; what enters the first block
        is what the embedding gives. For listings only.
    cross_attn_out : str
        In the decoder of an encoder-decoder model, the module whose output is what attention to the encoder adds to
        the stream.
    attn_pattern_index : int
        Where the attention pattern is among the outputs of `attn`.
    encoder : Architecture, optional
        The record of the encoder, in an encoder-decoder model; all else is then about its decoder. The names of both
        begin with `encoder.` and `decoder.`.
    """

    embed: str
    blocks: str
    final_norm: str
    attn: str = ""
    attn_out: str = ""
    mlp_out: str = ""
    mlp_inner: str = ""
    heads: Heads | None = None
    mixer: str = ""
    router: str = ""
    experts: str = ""
    resid_mid: str = ""
    resid_mid_if: Callable[[Any], bool] = _always
    logits_after_head: Callable[[Any], bool] = _never
    in_float32: Callable[[Any], tuple[str, ...]] = _nothing
    cross_attn_out: str = ""
    attn_pattern_index: int = 1
    encoder: Architecture | None = None


def _soft_capped(config: Any) -> bool:
    return getattr(config, "final_logit_softcapping", None) is not None


def _float32_of_mamba(config: Any) -> tuple[str, ...]:
    stream = ("resid_pre", "resid_post", "final_norm") if config.residual_in_fp32 else ()
    return (*stream, "ssm_state", "logits")


def _falcon_kv_heads(config: Any) -> int:
    if config.new_decoder_architecture:
        return int(config.num_kv_heads)
    return 1 if config.multi_query else int(config.num_attention_heads)


_LLAMA_HEADS = Heads(
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    q_norm="self_attn.q_norm",
    k_norm="self_attn.k_norm",
    z="self_attn.o_proj",
    rotary=rotated,
)
_PHI_HEADS = replace(
    _LLAMA_HEADS,
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    is_turned_before_norm=True,
    z="self_attn.dense",
)


def _fused(path: str, *, z: str, **options: Any) -> Heads:
    return Heads(q=path, k=path, v=path, z=z, **options)


_LLAMA = Architecture(
    embed="embed_tokens",
    blocks="layers",
    final_norm="norm",
    attn="self_attn",
    mlp_out="mlp",
    mlp_inner="mlp.down_proj",
    heads=_LLAMA_HEADS,
    resid_mid="post_attention_layernorm",
)
_GEMMA2 = replace(
    _LLAMA,
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    resid_mid="pre_feedforward_layernorm",
    logits_after_head=_soft_capped,
)
_MOE = replace(_LLAMA, router="mlp.gate", experts="mlp.experts")
_MAMBA = Architecture(
    embed="embeddings",
    blocks="layers",
    final_norm="norm_f",
    mixer="mixer",
    logits_after_head=_always,
    in_float32=_float32_of_mamba,
)
# Post-norm, as in BART: there is no module whose input is the stream between attention and MLP.
_BART_STACK = Architecture(
    embed="embed_tokens", blocks="layers", final_norm="layer_norm", attn="self_attn", mlp_out="fc2"
)
_BART = replace(
    _BART_STACK, cross_attn_out="encoder_attn", logits_after_head=_always, encoder=_BART_STACK
)  # a bias is added to what the head returns
_MBART_STACK = replace(_BART_STACK, resid_mid="final_layer_norm")
_MBART = replace(_BART, resid_mid="final_layer_norm", encoder=_MBART_STACK)
_T5_ENCODER = Architecture(
    embed="embed_tokens",
    blocks="block",
    final_norm="final_layer_norm",
    attn="layer.0.SelfAttention",
    attn_out="layer.0.dropout",
    mlp_out="layer.1.dropout",
    resid_mid="layer.1",
    attn_pattern_index=2,
)
_T5 = replace(
    _T5_ENCODER,
    mlp_out="layer.2.dropout",
    resid_mid="layer.2",
    cross_attn_out="layer.1.dropout",
    encoder=_T5_ENCODER,
)
_BERT = Architecture(
    embed="embeddings.word_embeddings",
    blocks="encoder.layer",
    final_norm="",
    attn="attention.self",
    attn_out="attention.output.dropout",
    mlp_out="output.dropout",
    mlp_inner="output.dense",
    heads=Heads(
        q="attention.self.query", k="attention.self.key", v="attention.self.value", z="attention.output.dense"
    ),
    resid_mid="intermediate",
)

ARCHITECTURES: dict[str, Architecture] = {
    "bart": _BART,
    "bert": _BERT,
    "bloom": Architecture(
        embed="word_embeddings",
        blocks="h",
        final_norm="ln_f",
        attn="self_attention",
        attn_out="self_attention.dense",
        mlp_out="mlp.dense_4h_to_h",
        mlp_inner="mlp.dense_4h_to_h",
        heads=_fused("self_attention.query_key_value", z="self_attention.dense", layout=grouped),
        resid_mid="post_attention_layernorm",
    ),
    "cohere": replace(_LLAMA, resid_mid="", logits_after_head=_always),
    "distilbert": Architecture(
        embed="embeddings.word_embeddings",
        blocks="transformer.layer",
        final_norm="",
        attn="attention",
        mlp_out="ffn",
        mlp_inner="ffn.lin2",
        heads=Heads(q="attention.q_lin", k="attention.k_lin", v="attention.v_lin", z="attention.out_lin"),
        resid_mid="ffn",
    ),
    "falcon": Architecture(
        embed="word_embeddings",
        blocks="h",
        final_norm="ln_f",
        attn="self_attention",
        mlp_out="mlp",
        mlp_inner="mlp.dense_4h_to_h",
        heads=_fused(
            "self_attention.query_key_value",
            z="self_attention.dense",
            layout=grouped,
            rotary=rotated,
            rotary_if=lambda config: not config.alibi,
            n_kv_heads=_falcon_kv_heads,
        ),
        resid_mid="post_attention_layernorm",
        resid_mid_if=lambda config: not (config.parallel_attn or config.new_decoder_architecture),
    ),
    "falcon_mamba": _MAMBA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": replace(_GEMMA2, heads=replace(_LLAMA_HEADS, is_turned_before_norm=True)),
    "gpt2": Architecture(
        embed="wte",
        blocks="h",
        final_norm="ln_f",
        attn="attn",
        mlp_out="mlp",
        mlp_inner="mlp.c_proj",
        heads=_fused("attn.c_attn", z="attn.c_proj", layout=concatenated),
        resid_mid="ln_2",
    ),
    "gpt_neox": Architecture(
        embed="embed_in",
        blocks="layers",
        final_norm="final_layer_norm",
        attn="attention",
        attn_out="post_attention_dropout",
        mlp_out="post_mlp_dropout",
        mlp_inner="mlp.dense_4h_to_h",
        heads=_fused("attention.query_key_value", z="attention.dense", layout=grouped, rotary=rotated),
        resid_mid="post_attention_layernorm",
        resid_mid_if=lambda config: not config.use_parallel_residual,
    ),
    "gptj": Architecture(
        embed="wte",
        blocks="h",
        final_norm="ln_f",
        attn="attn",
        mlp_out="mlp",
        mlp_inner="mlp.fc_out",
        heads=Heads(
            q="attn.q_proj", k="attn.k_proj", v="attn.v_proj", z="attn.out_proj", rotary=rotated_by_position
        ),
    ),
    "jamba": replace(
        _LLAMA,
        final_norm="final_layernorm",
        mlp_out="feed_forward",
        mlp_inner="feed_forward.down_proj",
        heads=replace(_LLAMA_HEADS, rotary=None),
        mixer="mamba",
        router="feed_forward.router",
        experts="feed_forward.experts",
        resid_mid="pre_ff_layernorm",
        in_float32=lambda config: ("ssm_state",),
    ),
    "llama": _LLAMA,
    "mamba": _MAMBA,
    "mamba2": _MAMBA,
    "marian": _BART,
    "mbart": _MBART,
    "mistral": _LLAMA,
    "mixtral": replace(_MOE, in_float32=lambda config: ("expert_weights",)),
    "olmo": replace(_LLAMA, heads=replace(_LLAMA_HEADS, layout=clipped)),
    "olmo2": replace(
        _LLAMA, attn_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm", resid_mid="mlp"
    ),
    "olmoe": replace(_MOE, heads=replace(_LLAMA_HEADS, layout=clipped)),
    "opt": Architecture(
        embed="embed_tokens",
        blocks="layers",
        final_norm="final_layer_norm",
        attn="self_attn",
        mlp_out="fc2",
        mlp_inner="fc2",
        heads=replace(_LLAMA_HEADS, z="self_attn.out_proj", rotary=None),
        resid_mid="final_layer_norm",
        resid_mid_if=lambda config: config.do_layer_norm_before,
    ),
    "pegasus": _MBART,
    "phi": replace(_LLAMA, final_norm="final_layernorm", mlp_inner="mlp.fc2", heads=_PHI_HEADS, resid_mid=""),
    "phi3": replace(
        _LLAMA,
        attn_out="resid_attn_dropout",
        mlp_out="resid_mlp_dropout",
        heads=_fused("self_attn.qkv_proj", z="self_attn.o_proj", layout=concatenated, rotary=rotated),
    ),
    "qwen2": _LLAMA,
    "qwen2_moe": _MOE,
    "qwen3": _LLAMA,
    "qwen3_moe": _MOE,
    "roberta": _BERT,
    "smollm3": _LLAMA,
    "stablelm": replace(
        _LLAMA,
        mlp_out="dropout",
        heads=replace(_PHI_HEADS, z="self_attn.o_proj"),
        resid_mid_if=lambda config: not config.use_parallel_residual,
    ),
    "starcoder2": replace(_LLAMA, mlp_inner="mlp.c_proj"),
    "t5": _T5,
    "whisper": replace(_MBART, logits_after_head=_never),
}
