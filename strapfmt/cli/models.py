"""Owns how the command line loads a Hugging Face model and runs prompts through it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strapfmt.cli.output import notes, printable
from strapfmt.errors import ArgumentError
from strapfmt.extras import require

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DEMO_MODEL", "Generation", "LanguageModel", "load"]

DEMO_MODEL = Path(__file__).resolve().parents[1] / "demo_model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How prompts are continued; `max_new_tokens=0` runs one forward pass and generates nothing."""

    batch_size: int = 8
    max_new_tokens: int = 32
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("batch_size", 1), ("max_new_tokens", 0), ("num_beams", 1)):
            if getattr(self, name) < low:
                raise ArgumentError(f"{name}: expected >= {low}, got {getattr(self, name)}")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ArgumentError("temperature: expected > 0; top_p: expected > 0 and <= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageModel:
    """A model in evaluation mode with its tokenizer, which pads on the left."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def n_parameters(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def max_tokens(self) -> int:
        """The longest sequence that its config allows."""
        return getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize

    def n_tokens(self, text: str) -> int:
        """Return how many tokens a text has."""
        return len(self.tokenizer(text)["input_ids"])

    def count_tokens(self, prompts: Sequence[str], generation: Generation) -> list[int]:
        """Return how many tokens each prompt has with what may be generated after it, padding not counted.

        Raises
        ------
        ArgumentError
            If a prompt has no token, or more than the model takes, or cannot be padded.
        """
        if len(prompts) > 1 and generation.batch_size > 1 and self.tokenizer.pad_token is None:
            raise ArgumentError(f"the tokenizer of {self.name} has no padding token: use --batch-size 1")
        counts = [self.n_tokens(prompt) for prompt in prompts]
        for number, count in enumerate(counts):
            if count < 1:
                raise ArgumentError(f"prompt {number}: expected at least 1 token, got none")
            if count + generation.max_new_tokens > self.max_tokens:
                raise ArgumentError(
                    f"prompt {number}: its {count} tokens and {generation.max_new_tokens} new ones are more than "
                    f"the {self.max_tokens} tokens that {self.name} takes"
                )
        return [count + generation.max_new_tokens for count in counts]

    def run(self, prompts: Sequence[str], generation: Generation) -> Iterator[tuple[str, str]]:
        """Run prompts in batches and yield `(prompt, continuation)` for each."""
        import torch

        torch.manual_seed(generation.seed)
        for start in range(0, len(prompts), generation.batch_size):
            batch = prompts[start : start + generation.batch_size]
            inputs = self._tokenize(batch)
            with torch.no_grad():
                if generation.max_new_tokens == 0:
                    self.model(**inputs)
                    yield from ((prompt, "") for prompt in batch)
                else:
                    output = self.model.generate(**inputs, **self._arguments(generation))  # type: ignore[operator]
                    new = output[:, inputs["input_ids"].shape[1] :]
                    yield from zip(
                        batch, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
                    )

    def _tokenize(self, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=len(prompts) > 1)
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}

    def _arguments(self, generation: Generation) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "max_new_tokens": generation.max_new_tokens,
            "do_sample": generation.do_sample,
            "num_beams": generation.num_beams,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        if generation.do_sample:
            arguments |= {"temperature": generation.temperature, "top_p": generation.top_p}
        return arguments


def load(
    name: str, *, revision: str | None = None, dtype: str = "auto", device: str = "auto"
) -> LanguageModel:
    """Load a causal language model and its tokenizer with transformers.

    Parameters
    ----------
    name : str
        `demo` for the model that comes with strapfmt, a folder, or a name on the Hugging Face hub.
    revision : str, optional
        Branch, tag or commit on the hub.
    dtype : str
        A torch dtype, or `auto` for the one that the weights are stored in.
    device : str
        A torch device, or `auto` for a GPU where there is one.

    Raises
    ------
    ArgumentError
        If there is no such model, dtype or device.
    MissingExtraError
        If transformers is not installed.
    """
    require("transformers", "hf", "running a language model")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if name == "demo" or not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if name != "demo" and not Path(name).is_dir():
        # Its log has two lines for each of many retries, and the error at the end says the same.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        notes().print(f"loading {printable(name)}; HF_HUB_OFFLINE=1 keeps to what is on this machine")
    where = str(DEMO_MODEL) if name == "demo" else name
    model_dtype, model_device = _dtype(dtype), _device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(where, revision=revision, dtype=model_dtype)
        model.to(model_device)  # type: ignore[arg-type]
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ArgumentError(f"cannot load the model {name!r}: {_first_line(error)}") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    return LanguageModel(name=name, model=model, tokenizer=tokenizer)


def _dtype(name: str) -> torch.dtype | str:
    import torch

    found = getattr(torch, name, None)
    if name != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ArgumentError(f"dtype: expected auto, float32, bfloat16, float16 or float64; got {name!r}")
    return "auto" if name == "auto" else found  # type: ignore[return-value]


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(f"cannot use the device {name!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
