"""Tiny random-weight Hugging Face models of each family, and a tiny real tokenizer, for all tests of capture."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS = 0, 1, 2
VOCAB_SIZE = 101
N_LAYERS = 2
D_MODEL = 32

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_GATED: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MAMBA: dict[str, Any] = {"state_size": 8, "expand": 2, "conv_kernel": 4, "time_step_rank": 4}

_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": _GATED,
    "mistral": {**_GATED, "sliding_window": None},
    "mixtral": {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": _GATED,
    "qwen2_moe": {**_GATED, **_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": {**_GATED, "head_dim": 8},
    "qwen3_moe": {**_GATED, **_EXPERTS, "head_dim": 8},
    "gemma": {**_GATED, "head_dim": 8},
    "gemma2": {**_GATED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {**_GATED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "gpt_neox": {"intermediate_size": 48},
    "phi": {**_GATED, "num_key_value_heads": 4},
    "phi3": {**_GATED, "sliding_window": None},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": D_MODEL},
    "falcon": {},
    "bloom": {},
    "gptj": {"rotary_dim": 4},
    "stablelm": _GATED,
    "cohere": _GATED,
    "olmo": _GATED,
    "olmo2": _GATED,
    "starcoder2": _GATED,
    "smollm3": _GATED,
    "olmoe": {**_GATED, "num_experts": 4, "num_experts_per_tok": 2},
    "mamba": _MAMBA,
    "mamba2": {**_MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4},
    "falcon_mamba": _MAMBA,
    "jamba": {
        **_GATED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": True,
    },
}
FAMILIES: list[str] = list(_FAMILIES)

_STACKS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": D_MODEL,
    "encoder_layers": N_LAYERS,
    "decoder_layers": N_LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
}
_ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": _STACKS,
    "marian": {**_STACKS, "decoder_vocab_size": VOCAB_SIZE},
    "mbart": _STACKS,
    "pegasus": _STACKS,
    "t5": {
        "vocab_size": VOCAB_SIZE,
        "d_model": D_MODEL,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": N_LAYERS,
        "num_heads": 4,
        "pad_token_id": PAD,
        "eos_token_id": EOS,
        "decoder_start_token_id": BOS,
    },
    "whisper": {**_STACKS, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 64},
}
ENCODER_DECODERS: list[str] = list(_ENCODER_DECODERS)
_ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {"intermediate_size": 48},
    "roberta": {"intermediate_size": 48},
    "distilbert": {"hidden_dim": 48},
}
ENCODERS: list[str] = list(_ENCODERS)


def tiny_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Build a language model of `family` (causal, encoder-decoder, or an encoder without a head) with random weights.

    It is in `eval` mode.

    Two layers, width 32, 101 tokens (the vocabulary of `tiny_tokenizer`), about 30,000 parameters.

    Parameters
    ----------
    family : str
        One of `FAMILIES`, `ENCODERS` or `ENCODER_DECODERS`.
    seed : int
        The weights follow from it alone; the global random state is left as it was.
    dtype : torch.dtype
        Of the weights.
    **overrides
        Config entries; `attn_implementation` is understood as well.
    """
    attn_implementation = overrides.pop("attn_implementation", None)
    kind: Any = AutoModelForCausalLM
    options = {**_BASE, **_FAMILIES.get(family, {})}
    if family in _ENCODERS:
        kind, options = AutoModel, {**_BASE, **_ENCODERS[family]}
    elif family in _ENCODER_DECODERS:
        kind = AutoModelForSpeechSeq2Seq if family == "whisper" else AutoModelForSeq2SeqLM
        options = _ENCODER_DECODERS[family]
    config = AutoConfig.for_model(family, **{**options, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind.from_config(config, attn_implementation=attn_implementation)
        with torch.no_grad():
            for parameter in model.parameters():  # norms off 1, biases off 0: no two places hold equal values
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    if family not in _ENCODERS:
        model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def hidden_states(model: PreTrainedModel, ids: torch.Tensor, output: Any) -> tuple[torch.Tensor, ...]:
    """Return what enters every block, then what the final norm gives.

    That is `output.hidden_states`, but for state-space models, which begin with what leaves the first block.
    """
    states: tuple[torch.Tensor, ...] = output.hidden_states
    if "mamba" not in model.config.model_type:
        return states
    return (model.get_input_embeddings()(ids), *states[:-2], states[-1])


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of 101 tokens: one per printable character, an unknown one, pad, bos and eos (0, 1, 2)."""
    vocabulary = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<unk>": 3}
    for character in string.ascii_letters + string.digits + string.punctuation + " \n":
        vocabulary[character] = len(vocabulary)
    vocabulary["the"] = len(vocabulary)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("the|."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    assert len(vocabulary) == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
