"""Decoders: the models of a known architecture that lie inside a model, and the head that belongs to each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from strapfmt_capture.architectures import ARCHITECTURES, HEADS, Architecture
from strapfmt_capture.wrappers import is_lens

__all__ = ["Decoder", "child", "find_decoder", "find_decoders", "join", "named_decoders", "output_head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A stack of blocks of a known architecture, found inside a model (below a wrapper, or beside a vision tower).

    Attributes
    ----------
    path : str
        Path of the module that owns the blocks.
    module : torch.nn.Module
        That module; it carries the Hugging Face `config`.
    architecture : Architecture
        Its record.
    head, language_model : str or None
        Paths of the head and of the module that owns it, for a model that has one.
    stack : {"", "encoder", "decoder"}
        Which of the two it is in an encoder-decoder model; its sites' names begin with that.
    """

    path: str
    module: torch.nn.Module
    architecture: Architecture
    head: str | None
    language_model: str | None
    stack: str = ""

    @property
    def config(self) -> Any:
        """The Hugging Face config of the decoder."""
        return self.module.config

    @property
    def attention(self) -> str | None:
        """The attention implementation in use: `"eager"`, `"sdpa"`, ..."""
        name = getattr(self.config, "_attn_implementation", None)
        return name if isinstance(name, str) else None

    def below(self, path: str) -> str:
        """Return the path in the model of what is at `path` below this decoder."""
        return join(self.path, path)

    @property
    def is_eager(self) -> bool:
        """Whether attention patterns are computed at all."""
        return self.attention in ("eager", None)


def find_decoder(model: torch.nn.Module) -> Decoder | None:
    """Return the first decoder in `model` whose `config.model_type` is in the table, or None."""
    return next(find_decoders(model), None)


def named_decoders(model: torch.nn.Module) -> list[Decoder]:
    """Return what the uniform names are about: the first decoder in `model`, or the first encoder and decoder of one.

    Empty for a model of no known architecture.
    """
    decoders = list(find_decoders(model))
    if not decoders or not decoders[0].stack:
        return decoders[:1]
    first = {decoder.stack: decoder for decoder in reversed(decoders)}
    return [first[stack] for stack in ("encoder", "decoder") if stack in first]


def find_decoders(model: torch.nn.Module) -> Iterator[Decoder]:
    """Yield the decoders in `model` whose `config.model_type` is in the table, each once.

    A TransformerLens model has none: its blocks answer to other names.
    """
    if is_lens(model):
        return
    seen: list[torch.nn.Module] = []  # their blocks, which a wrapper (PEFT) passes off as its own
    for path, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
        blocks = None if architecture is None else child(module, architecture.blocks)
        if architecture is None or not isinstance(blocks, torch.nn.ModuleList):
            continue
        if any(blocks is each for each in seen):
            continue
        seen.append(blocks)
        stack = _stack(module, architecture)
        if architecture.encoder is not None and not _attends_to_encoder(module):
            architecture = architecture.encoder
        head = None if stack == "encoder" else _find_head(model, path)
        owner = None if head is None else head.rpartition(".")[0]
        yield Decoder(
            path=path, module=module, architecture=architecture, head=head, language_model=owner, stack=stack
        )


def output_head(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return what a Hugging Face model says its head is, None if it has none or does not say."""
    head: object = None
    with suppress(AttributeError, NotImplementedError):  # not every Hugging Face model has one
        head = model.get_output_embeddings()  # type: ignore[operator]
    return head if isinstance(head, torch.nn.Module) else None


def child(module: torch.nn.Module, path: str) -> torch.nn.Module | None:
    """The module at `path` below `module`, or None."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, torch.nn.Module) else None


def join(*parts: str) -> str:
    """Paths, one below the other; an empty one is the module itself."""
    return ".".join(part for part in parts if part)


def _find_head(model: torch.nn.Module, decoder_path: str) -> str | None:
    """Path of the head, which hangs on the decoder or on one of the modules around it, the nearest first."""
    segments = decoder_path.split(".") if decoder_path else []
    for length in range(len(segments), -1, -1):
        owner = ".".join(segments[:length])
        for name in HEADS:
            if child(model, join(owner, name)) is not None:
                return join(owner, name)
    return None


def _stack(module: torch.nn.Module, architecture: Architecture) -> str:
    """Which stack of an encoder-decoder model this is, "" if it was made to be alone."""
    if architecture.encoder is None or not getattr(module.config, "is_encoder_decoder", False):
        return ""
    return "decoder" if _attends_to_encoder(module) else "encoder"


def _attends_to_encoder(module: torch.nn.Module) -> bool:
    takes = "encoder_hidden_states" in inspect.signature(module.forward).parameters
    return takes and bool(getattr(module, "is_decoder", True))  # both stacks of T5 are of one class
