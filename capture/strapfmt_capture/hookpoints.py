"""Hook points: the modules of a model that hold the uniform sites, and how a value is read there."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from strapfmt.errors import ArgumentError, CaptureError
from strapfmt_capture.architectures import ARCHITECTURES, HEADS, Architecture
from strapfmt_capture.computed import Computation, TopK, expert_out, ssm_state

__all__ = [
    "EAGER_ADVICE",
    "TOP_SITES",
    "Decoder",
    "HookPoint",
    "find_decoder",
    "find_decoders",
    "hook_points",
    "named_decoders",
]

#: What `logits` are stored as where the largest only are wanted.
TOP_SITES = ("logits.top_values", "logits.top_ids")

EAGER_ADVICE = (
    'the attention pattern exists only with eager attention: load the model with attn_implementation="eager"'
)
_CACHE_ADVICE = "states are read from the cache: call the model with use_cache=True, in eval mode"


@dataclass(frozen=True, slots=True, kw_only=True)
class HookPoint:
    """Where the values of one site are taken.

    Attributes
    ----------
    site : str
        The stored name.
    module_path : str
        The module, as in `model.named_modules()`; empty for the model itself.
    where : str
        `"in"` or `"out"`.
    index : int or None
        The element of a tuple output; None takes a tensor itself, or the first tensor of a tuple or mapping that
        is no scalar.
    kwarg : str or None
        The name of the value among keyword arguments (`in`) or in a mapping output (`out`), where it has one.
    heads_first : bool
        The module gives `[sequence, head, query, key]`; `read` turns it to `[sequence, query, head, key]`.
    is_flat : bool
        The module gives the tokens of all sequences in one dimension, `[n_sequences * n_query, *]`.
    is_last : bool
        There is one value a sequence, `[n_sequences, 1, *]`, which belongs to the last place of the pass.
    compute : callable or None
        Makes the value, where the module does not return it: see `computed`.
    advice : str
        What to do where there is no tensor.
    """

    site: str
    module_path: str
    where: str
    index: int | None = None
    kwarg: str | None = None
    heads_first: bool = False
    is_flat: bool = False
    is_last: bool = False
    compute: Computation | None = None
    advice: str = "take a module inside it, or around it, that has a tensor"

    @property
    def hook_point(self) -> str:
        """The place in words: `"model.layers.3:out"`."""
        return f"{self.module_path}:{self.where}"

    @property
    def is_uniform(self) -> bool:
        """Whether the site has a name of its own, the same in every architecture, and not its module's."""
        return self.site not in (self.module_path, self.hook_point)

    def read(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any = None,
        module: torch.nn.Module | None = None,
    ) -> torch.Tensor:
        """Return the tensor of this site from the arguments and the output of one call of the module.

        Parameters
        ----------
        args, kwargs, output
            Of the call. Of an output, `kwargs` are needed only for what is computed.
        module : torch.nn.Module, optional
            The module that was called; needed for what is computed.

        Returns
        -------
        torch.Tensor
            The module's own tensor (or a view of it), not a copy, unless it is computed: the model may still change it
            in place.

        Raises
        ------
        CaptureError
            If there is no tensor at this place in this call.
        """
        value = self._input(args, kwargs) if self.where == "in" else self._output(output)
        if self.compute is not None:
            assert module is not None
            value = self.compute(value, module, args, kwargs)
        if not isinstance(value, torch.Tensor):
            returned = f"returned {_kind(output)}"
            called = f"was called with {_kind(args)} and {_kind(kwargs)}"
            is_of_call = self.where == "in" or self.compute is not None
            raise CaptureError(self._complaint(called if is_of_call else returned))
        return value.transpose(1, 2) if self.heads_first else value

    def _input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.kwarg is not None and self.kwarg in kwargs:
            return kwargs[self.kwarg]
        return _first_tensor((*args, *kwargs.values()))

    def _output(self, output: Any) -> Any:
        if isinstance(output, Mapping):
            return output.get(self.kwarg) if self.kwarg is not None else _first_tensor(tuple(output.values()))
        if not isinstance(output, (tuple, list)):
            return output
        if self.index is None:
            return _first_tensor(output)
        return output[self.index] if self.index < len(output) else None

    def _complaint(self, found: str) -> str:
        return f"site {self.site!r} at {self.hook_point}: expected a tensor, but the module {found}; {self.advice}"


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
        return _join(self.path, path)

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
    """Yield the decoders in `model` whose `config.model_type` is in the table, each once."""
    seen: list[torch.nn.Module] = []  # their blocks, which a wrapper (PEFT) passes off as its own
    for path, module in model.named_modules():
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
        blocks = None if architecture is None else _child(module, architecture.blocks)
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


def hook_points(model: torch.nn.Module, *, top_k_logits: int | None = None) -> dict[str, HookPoint]:
    """Return the hook point of every uniform site of `model`, in the order a forward pass reaches them.

    The sites, the same in every architecture (`N` is the block, counted from 0):

    - `embed`: output of the token embedding, before anything is added; a pass that gets `inputs_embeds` has
      none.
    - `blocks.N.resid_pre`, `blocks.N.resid_post`: the residual stream entering and leaving a block. The last
      `resid_post` is *before* the final norm, unlike `hidden_states[-1]` of Hugging Face.
    - `blocks.N.resid_mid`: the stream between attention and MLP; absent where the two run in parallel.
    - `blocks.N.attn_out`, `blocks.N.mlp_out`: what is added to the stream, so after a norm that follows the
      attention or the MLP (Gemma 2 and 3, OLMo 2).
    - `blocks.N.attn_pattern`: attention probabilities, `(heads, keys)` per token; eager attention only.
    - `blocks.N.mixer_out`: what a state-space module adds to the stream.
    - `blocks.N.ssm_state`: its recurrent state after the pass, in the row of the last token of each sequence.
    - `blocks.N.router_logits`: `(experts,)` per token, before any softmax.
    - `blocks.N.expert_weights`, `blocks.N.expert_ids`: `(k,)` per token, which experts it is sent to and what their
      outputs are multiplied by.
    - `blocks.N.expert_out`: `(k, d_model)` per token, the output of each of them before that, in the order of
      `expert_ids`; computed once more, see `computed.expert_out`.
    - `final_norm`: output of the norm after the last block.
    - `logits`: what the model returns, after soft-capping or scaling where there is any.
    - `logits.top_values`, `logits.top_ids`: `(top_k_logits,)` per token, only where that is given.

    In an encoder-decoder model all but `logits` begin with `encoder.` or `decoder.`, and the decoder has
    `decoder.blocks.N.cross_attn_out`, which comes between `attn_out` and `resid_mid`.

    Empty for a model of no known architecture, where module paths are the sites.

    Raises
    ------
    ArgumentError
        If `top_k_logits` is more than the vocabulary has.
    """
    points = {point.site: point for decoder in named_decoders(model) for point in _uniform(decoder)}
    if top_k_logits is not None and "logits" in points:
        decoder = named_decoders(model)[-1]
        points |= {point.site: point for point in _largest(points["logits"], decoder, top_k_logits)}
    return points


def _uniform(decoder: Decoder) -> Iterator[HookPoint]:
    """Hook points of the uniform sites that this decoder really has."""
    architecture, module = decoder.architecture, decoder.module

    def point(site: str, path: str, where: str = "out", **options: Any) -> HookPoint:
        name = _join(decoder.stack, site)
        return HookPoint(site=name, module_path=_join(decoder.path, path), where=where, **options)

    if _child(module, architecture.embed) is not None:
        yield point("embed", architecture.embed)
    blocks = _child(module, architecture.blocks)
    assert isinstance(blocks, torch.nn.ModuleList)
    for number, block in enumerate(blocks):
        name, path = f"blocks.{number}", _join(architecture.blocks, str(number))
        yield point(f"{name}.resid_pre", path, "in", kwarg="hidden_states")
        if _child(block, architecture.attn) is not None:
            attn_out = architecture.attn_out or architecture.attn
            yield point(
                f"{name}.attn_pattern",
                _join(path, architecture.attn),
                index=architecture.attn_pattern_index,
                heads_first=True,
                advice=EAGER_ADVICE,
            )
            yield point(f"{name}.attn_out", _join(path, attn_out))
        if decoder.stack == "decoder" and architecture.cross_attn_out:
            yield point(f"{name}.cross_attn_out", _join(path, architecture.cross_attn_out))
        if _child(block, architecture.mixer) is not None:
            mixer = _join(path, architecture.mixer)
            yield point(f"{name}.ssm_state", mixer, is_last=True, compute=ssm_state, advice=_CACHE_ADVICE)
            yield point(f"{name}.mixer_out", mixer)
        if architecture.resid_mid and architecture.resid_mid_if(decoder.config):
            yield point(f"{name}.resid_mid", _join(path, architecture.resid_mid), "in")
        if _child(block, architecture.router) is not None:
            router, experts = _join(path, architecture.router), _join(path, architecture.experts)
            for index, what in enumerate(("router_logits", "expert_weights", "expert_ids")):
                yield point(f"{name}.{what}", router, index=index, is_flat=True)
            yield point(f"{name}.expert_out", experts, is_flat=True, compute=expert_out)
        if _child(block, architecture.mlp_out) is not None:
            yield point(f"{name}.mlp_out", _join(path, architecture.mlp_out))
        yield point(f"{name}.resid_post", path)
    if _child(module, architecture.final_norm) is not None:
        yield point("final_norm", architecture.final_norm)
    if decoder.head is not None and decoder.language_model is not None:
        whole = architecture.logits_after_head(decoder.config)
        path = decoder.language_model if whole else decoder.head
        yield HookPoint(site="logits", module_path=path, where="out", kwarg="logits" if whole else None)


def _largest(logits: HookPoint, decoder: Decoder, k: int) -> Iterator[HookPoint]:
    """Hook points of the largest logits only."""
    if k > decoder.config.vocab_size:
        raise ArgumentError(
            f"top_k_logits: expected at most {decoder.config.vocab_size}, the size of the vocabulary; got {k}"
        )
    values, ids = TOP_SITES
    yield replace(logits, site=values, compute=TopK(k, "values"))
    yield replace(logits, site=ids, compute=TopK(k, "ids"))


def _stack(module: torch.nn.Module, architecture: Architecture) -> str:
    """Which stack of an encoder-decoder model this is, "" if it was made to be alone."""
    if architecture.encoder is None or not getattr(module.config, "is_encoder_decoder", False):
        return ""
    return "decoder" if _attends_to_encoder(module) else "encoder"


def _attends_to_encoder(module: torch.nn.Module) -> bool:
    takes = "encoder_hidden_states" in inspect.signature(module.forward).parameters
    return takes and bool(getattr(module, "is_decoder", True))  # both stacks of T5 are of one class


def _first_tensor(values: Sequence[Any]) -> Any:
    """The first tensor that can hold activations; a scalar is a loss."""
    return next((value for value in values if isinstance(value, torch.Tensor) and value.ndim), None)


def _kind(value: Any) -> str:
    """What a value is, in words, with what a tuple or a mapping holds."""
    name = type(value).__name__
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key!r}: {type(each).__name__}" for key, each in value.items())
    elif isinstance(value, (tuple, list)):
        inside = ", ".join(type(each).__name__ for each in value)
    else:
        return "None" if value is None else f"a {name}"
    return f"a {name} of {inside or 'nothing'}"


def _child(module: torch.nn.Module, path: str) -> torch.nn.Module | None:
    """The module at `path` below `module`, or None."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if isinstance(found, torch.nn.Module) else None


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _find_head(model: torch.nn.Module, decoder_path: str) -> str | None:
    """Path of the head, which hangs on the decoder or on one of the modules around it, the nearest first."""
    segments = decoder_path.split(".") if decoder_path else []
    for length in range(len(segments), -1, -1):
        owner = ".".join(segments[:length])
        for name in HEADS:
            if _child(model, _join(owner, name)) is not None:
                return _join(owner, name)
    return None
