"""Models of random weights, and what is run with them: the same in every process and environment that measures.

Needs torch and transformers only, so that the environment of any peer can load it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = ["EIGHT_B", "ONE_B", "SMALL", "TINY", "Shape", "Workload", "load", "resid_post", "save"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a Llama."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    d_vocab: int

    def build(self, *, seed: int = 0) -> Any:
        """Return a model of this shape whose weights follow from the seed, in float32 on the CPU."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.d_vocab,
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_kv_heads,
            max_position_embeddings=2_048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config).eval()
        for name, weights in model.named_parameters():
            if "norm" in name:  # all ones at first: a norm would then hardly change a state of length one
                torch.nn.init.uniform_(weights, 0.5, 1.5)
        return model

    def build_on(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Return a model of this shape with random weights, made where it is to run."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                return self.build()
        finally:
            torch.set_default_dtype(before)


#: What CPUs are measured with, and what a smoke test takes.
SMALL = Shape(n_layers=12, d_model=768, n_heads=12, n_kv_heads=12, d_mlp=2_048, d_vocab=32_000)
#: What GPUs are measured with: the shapes of Llama 3.2 1B and Llama 3.1 8B.
ONE_B = Shape(n_layers=16, d_model=2_048, n_heads=32, n_kv_heads=8, d_mlp=8_192, d_vocab=128_256)
EIGHT_B = Shape(n_layers=32, d_model=4_096, n_heads=32, n_kv_heads=8, d_mlp=14_336, d_vocab=128_256)
TINY = Shape(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_mlp=48, d_vocab=100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Forward passes over prompts of random tokens.

    Attributes
    ----------
    phase : {"prefill", "decode"}
        One pass a batch, or `generate` with the most likely token.
    n_sequences : int
        In a batch.
    n_prompt, n_new : int
        Tokens of a prompt, and tokens generated behind it.
    n_batches : int
    dtype : str
        Of the weights.
    """

    phase: Literal["prefill", "decode"]
    n_sequences: int
    n_prompt: int
    n_batches: int
    n_new: int = 0
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """What a group of results is called."""
        return f"{self.phase}, batch {self.n_sequences}" + (
            "" if self.dtype == "float32" else f", {self.dtype}"
        )

    @property
    def n_positions(self) -> int:
        """Positions of a sequence that go through the model; the last generated token does not."""
        return self.n_prompt + max(self.n_new - 1, 0)

    @property
    def n_rows(self) -> int:
        """Rows of a site."""
        return self.n_batches * self.n_sequences * self.n_positions

    def batches(self, d_vocab: int) -> list[torch.Tensor]:
        """Return the prompts, [n_sequences, n_prompt] each."""
        generator = torch.Generator().manual_seed(self.n_sequences)
        shape = (self.n_sequences, self.n_prompt)
        return [torch.randint(3, d_vocab, shape, generator=generator) for _ in range(self.n_batches)]

    def run(self, model: Any, prompts: torch.Tensor, **options: Any) -> Any:
        """Run one batch; return what the model, or its `generate`, returns."""
        if self.phase == "prefill":
            return model(input_ids=prompts, use_cache=False, **options)
        return model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=self.n_new,
            do_sample=False,
            pad_token_id=0,
            **options,
        )


def resid_post(n_layers: int) -> list[str]:
    """Return the names of the residual stream behind each block."""
    return [f"blocks.{layer}.resid_post" for layer in range(n_layers)]


def save(shape: Shape, directory: Path) -> None:
    """Write a Hugging Face directory: the model, and a tokenizer whose tokens are decimal numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shape.build().save_pretrained(directory)
    vocabulary = {str(number): number for number in range(shape.d_vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "0", "pad_token": "0", "bos_token": "1", "eos_token": "2"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(directory)


def load(directory: Path, dtype: str) -> Any:
    """Load that model, ready to be run."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
