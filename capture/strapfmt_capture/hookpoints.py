"""Hook points: the modules of a model that hold the uniform sites, and how a value is read there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from strapfmt.errors import ArgumentError, CaptureError
from strapfmt_capture.attention import AttentionCall
from strapfmt_capture.computed import Computation, TopK, expert_out, ssm_state
from strapfmt_capture.decoders import Decoder, child, join, named_decoders
from strapfmt_capture.heads import K, Q, Rotary, Split, V, separate
from strapfmt_capture.wrappers import LENS_SITES, hidden_models, is_lens, n_blocks

__all__ = [
    "EAGER_ADVICE",
    "GRADIENT_SUFFIX",
    "TOP_SITES",
    "HookPoint",
    "hook_points",
]

#: What `logits` are stored as where the largest only are wanted.
TOP_SITES = ("logits.top_values", "logits.top_ids")

#: What the site of the gradients of a site is called behind its name.
GRADIENT_SUFFIX = ".grad"

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
        `"in"`, `"out"`, or `"attention"`: computed from a call of the attention function by the module.
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
    split : Split or None
        How the value becomes heads.
    rotary : callable or None
        Rotates queries or keys once more, as the module at `attention_path` is about to do.
    attention_path : str or None
        The attention module, where `read` has to know what that was called with.
    whole : callable or None
        Makes one tensor of a value that is spread over processes: see `parallel`.
    is_costly : bool
        A part of the model is computed once more for it: `blocks.0.*` leaves it out, `blocks.*.expert_out` names it.
    is_gradient : bool
        The site holds the gradients of a loss with respect to the values of `of_value`.
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
    split: Split | None = None
    rotary: Rotary | None = None
    attention_path: str | None = None
    whole: Callable[[torch.Tensor], torch.Tensor] | None = field(default=None, compare=False, repr=False)
    is_costly: bool = False
    is_gradient: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the value is the output of the module as it is."""
        made = (self.compute, self.split, self.rotary, self.attention_path, self.whole)
        is_turned = self.heads_first or self.is_flat or self.is_last or self.is_gradient
        return self.where == "out" and not is_turned and all(part is None for part in made)

    @property
    def is_pattern(self) -> bool:
        """Whether the site is an attention pattern, whose last dimension varies."""
        return self.of_value.site.endswith(".attn_pattern") and self.is_uniform

    @property
    def hook_point(self) -> str:
        """The place in words: `"model.layers.3:out"`, with `:rotated` where that is done once more, or `:grad`."""
        what = ":grad" if self.is_gradient else ":rotated" if self.rotary else ""
        return f"{self.module_path}:{self.where}{what}"

    @property
    def is_uniform(self) -> bool:
        """Whether the site has a name of its own, the same in every architecture, and not its module's."""
        value = self.of_value
        return value.site not in (value.module_path, value.hook_point)

    @property
    def of_value(self) -> HookPoint:
        """The hook point itself; of a site of gradients, that of the values."""
        if not self.is_gradient:
            return self
        return replace(self, site=self.site.removesuffix(GRADIENT_SUFFIX), is_gradient=False)

    @property
    def has_gradient(self) -> bool:
        """Whether the model goes on with what is read here, but for its shape, so that a loss may depend on it."""
        is_read = self.compute is None and self.rotary is None and self.where != "attention"
        return is_read and (self.split is None or self.split.is_view)

    def read(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any = None,
        module: torch.nn.Module | None = None,
        attention: tuple[torch.nn.Module, Mapping[str, Any]] | None = None,
    ) -> torch.Tensor:
        """Return the tensor of this site from the arguments and the output of one call of the module.

        Parameters
        ----------
        args, kwargs, output
            Of the call; an `AttentionCall` is its own output. Of an output, `kwargs` are needed only for what is
            computed.
        module : torch.nn.Module, optional
            The module that was called; needed for what is computed.
        attention : module and mapping, optional
            The module at `attention_path`, and the keyword arguments of the call of it that is under way.

        Returns
        -------
        torch.Tensor
            The module's own tensor (or a view of it), not a copy: the model may still change it in place. A new tensor
            where it is computed, rotated, or in a layout of heads that allows no view.

        Raises
        ------
        CaptureError
            If there is no tensor at this place in this call.
        """
        value = self.found(args, kwargs, output)
        if self.whole is not None and isinstance(value, torch.Tensor):
            value = self.whole(value)
        if self.compute is not None:
            assert module is not None
            value = self.compute(value, module, args, kwargs)
        if not isinstance(value, torch.Tensor):
            returned = f"returned {_kind(output)}"
            called = f"was called with {_kind(args)} and {_kind(kwargs)}"
            is_of_call = self.where == "in" or self.compute is not None
            raise CaptureError(self._complaint(called if is_of_call else returned))
        value = self.shaped(value)
        return value if self.rotary is None else self._rotated(value, attention)

    def found(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any = None) -> Any:
        """Return what the module was given or gives at this place, as it is."""
        return self._input(args, kwargs) if self.where == "in" else self._output(output)

    def shaped(self, x: torch.Tensor) -> torch.Tensor:
        """Return what was found, or a gradient with respect to that, in the shape of the site."""
        x = x.transpose(1, 2) if self.heads_first else x
        return x if self.split is None else self.split(x)

    def _rotated(
        self, x: torch.Tensor, attention: tuple[torch.nn.Module, Mapping[str, Any]] | None
    ) -> torch.Tensor:
        assert self.rotary is not None
        if attention is None:
            raise CaptureError(self._complaint("was called outside its attention, which knows the positions"))
        module, given = attention
        try:
            return self.rotary(module, x.detach().transpose(1, 2), given).transpose(1, 2)
        except LookupError as error:
            found = f"is in a {type(module).__name__} that rotates in another way (no {error})"
            raise CaptureError(self._complaint(found)) from error

    def _input(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.kwarg is not None and self.kwarg in kwargs:
            return kwargs[self.kwarg]
        return _first_tensor((*args, *kwargs.values()))

    def _output(self, output: Any) -> Any:
        if isinstance(output, AttentionCall):
            return output.pattern()
        if isinstance(output, Mapping):
            return output.get(self.kwarg) if self.kwarg is not None else _first_tensor(tuple(output.values()))
        if not isinstance(output, (tuple, list)):
            return output
        if self.index is None:
            return _first_tensor(output)
        return output[self.index] if self.index < len(output) else None

    def _complaint(self, found: str) -> str:
        return f"site {self.site!r} at {self.hook_point}: expected a tensor, but the module {found}; {self.advice}"


def hook_points(
    model: torch.nn.Module, *, top_k_logits: int | None = None, recompute_patterns: bool = False
) -> dict[str, HookPoint]:
    """Return the hook point of every uniform site of `model`, in the order a forward pass reaches them.

    With `recompute_patterns`, attention patterns that the model does not compute are taken from the calls of its
    attention function.

    The sites, the same in every architecture (`N` is the block, counted from 0):

    - `embed`: output of the token embedding, before anything is added; a pass that gets `inputs_embeds` has
      none.
    - `blocks.N.resid_pre`, `blocks.N.resid_post`: the residual stream entering and leaving a block. The last
      `resid_post` is *before* the final norm, unlike `hidden_states[-1]` of Hugging Face.
    - `blocks.N.resid_mid`: the stream between attention and MLP; absent where the two run in parallel.
    - `blocks.N.attn_out`, `blocks.N.mlp_out`: what is added to the stream, so after a norm that follows the
      attention or the MLP (Gemma 2 and 3, OLMo 2).
    - `blocks.N.q`, `blocks.N.k`, `blocks.N.v`: queries `(heads, d_head)`, keys and values `(kv_heads, d_head)`, after
      the norm of q and k where a model has one, before their rotation, and before the scale that OPT puts on q.
    - `blocks.N.rot_q`, `blocks.N.rot_k`: queries and keys after the rotation; absent where there is none.
    - `blocks.N.attn_pattern`: attention probabilities, `(heads, keys)` per token; with eager attention, or recomputed.
    - `blocks.N.z`: what the heads give, `(heads, d_head)`, before the output projection.
    - `blocks.N.mlp_inner`: the MLP's inner layer after its nonlinearity (and its gate): what is projected down.
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

    A TransformerLens model has them where the library has hook points for them (`hook_resid_post`), which hold what
    `run_with_cache` returns. Empty for a model of no known architecture, where module paths are the sites.

    Raises
    ------
    ArgumentError
        If `top_k_logits` is more than the vocabulary has.
    """
    points = {point.site: point for point in _of_lens(model)} if is_lens(model) else {}
    points |= {
        point.site: point
        for decoder in named_decoders(model)
        for point in _uniform(decoder, is_recomputed=recompute_patterns and not decoder.is_eager)
    }
    if top_k_logits is not None and "logits" in points:
        config = model.cfg if is_lens(model) else named_decoders(model)[-1].config
        n_vocab = getattr(config, "d_vocab" if is_lens(model) else "vocab_size")
        points |= {point.site: point for point in _largest(points["logits"], n_vocab, top_k_logits)}
    return points


def _uniform(decoder: Decoder, *, is_recomputed: bool = False) -> Iterator[HookPoint]:
    """Hook points of the uniform sites that this decoder really has."""
    architecture, module = decoder.architecture, decoder.module

    def point(site: str, path: str, where: str = "out", **options: Any) -> HookPoint:
        name = join(decoder.stack, site)
        return HookPoint(site=name, module_path=join(decoder.path, path), where=where, **options)

    if child(module, architecture.embed) is not None:
        yield point("embed", architecture.embed)
    blocks = child(module, architecture.blocks)
    assert isinstance(blocks, torch.nn.ModuleList)
    for number, block in enumerate(blocks):
        name, path = f"blocks.{number}", join(architecture.blocks, str(number))
        yield point(f"{name}.resid_pre", path, "in", kwarg="hidden_states")
        if child(block, architecture.attn) is not None:
            attn, attn_out = join(path, architecture.attn), architecture.attn_out or architecture.attn
            for part, inner, options in _projections(decoder, block, join(decoder.path, attn)):
                yield point(f"{name}.{part}", join(path, inner), **options)
            how: dict[str, Any] = (
                {"where": "attention", "is_costly": True}
                if is_recomputed
                else {"index": architecture.attn_pattern_index}
            )
            yield point(f"{name}.attn_pattern", attn, heads_first=True, advice=EAGER_ADVICE, **how)
            heads = architecture.heads
            if heads is not None and child(block, heads.z) is not None:
                split = Split(part=Q, sizes=heads.sizes(decoder.config), layout=separate)
                yield point(f"{name}.z", join(path, heads.z), "in", split=split)
            yield point(f"{name}.attn_out", join(path, attn_out))
        if decoder.stack == "decoder" and architecture.cross_attn_out:
            yield point(f"{name}.cross_attn_out", join(path, architecture.cross_attn_out))
        if child(block, architecture.mixer) is not None:
            mixer = join(path, architecture.mixer)
            yield point(f"{name}.ssm_state", mixer, is_last=True, compute=ssm_state, advice=_CACHE_ADVICE)
            yield point(f"{name}.mixer_out", mixer)
        if architecture.resid_mid and architecture.resid_mid_if(decoder.config):
            yield point(f"{name}.resid_mid", join(path, architecture.resid_mid), "in")
        if child(block, architecture.router) is not None:
            router, experts = join(path, architecture.router), join(path, architecture.experts)
            for index, what in enumerate(("router_logits", "expert_weights", "expert_ids")):
                yield point(f"{name}.{what}", router, index=index, is_flat=True)
            yield point(f"{name}.expert_out", experts, is_flat=True, compute=expert_out, is_costly=True)
        if child(block, architecture.mlp_inner) is not None:
            yield point(f"{name}.mlp_inner", join(path, architecture.mlp_inner), "in")
        if child(block, architecture.mlp_out) is not None:
            yield point(f"{name}.mlp_out", join(path, architecture.mlp_out))
        yield point(f"{name}.resid_post", path)
    if child(module, architecture.final_norm) is not None:
        yield point("final_norm", architecture.final_norm)
    if decoder.head is not None and decoder.language_model is not None:
        whole = architecture.logits_after_head(decoder.config)
        path = decoder.language_model if whole else decoder.head
        yield HookPoint(site="logits", module_path=path, where="out", kwarg="logits" if whole else None)


def _of_lens(model: torch.nn.Module) -> Iterator[HookPoint]:
    """Hook points of a TransformerLens model, each a module of the library's own that returns what it is given."""
    paths = {"embed": "hook_embed"}
    for number in range(n_blocks(model)):
        paths |= {f"blocks.{number}.{site}": f"blocks.{number}.{name}" for site, name in LENS_SITES.items()}
    paths["final_norm"] = "ln_final"
    for site, path in paths.items():
        if child(model, path) is not None:
            is_pattern = site.endswith(".attn_pattern")
            yield HookPoint(site=site, module_path=path, where="out", heads_first=is_pattern)
    if hidden_models(model):
        yield HookPoint(site="logits", module_path="original_model", where="out", kwarg="logits")


def _largest(logits: HookPoint, n_vocab: int, k: int) -> Iterator[HookPoint]:
    """Hook points of the largest logits only."""
    if k > n_vocab:
        raise ArgumentError(f"top_k_logits: expected at most {n_vocab}, the size of the vocabulary; got {k}")
    values, ids = TOP_SITES
    yield replace(logits, site=values, compute=TopK(k, "values"))
    yield replace(logits, site=ids, compute=TopK(k, "ids"))


def _projections(
    decoder: Decoder, block: torch.nn.Module, attention_path: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Queries, keys and values of a block: name, path below the block, and how each is read."""
    heads = decoder.architecture.heads
    if heads is None or any(child(block, path) is None for path in (heads.q, heads.k, heads.v)):
        return
    sizes, layout = heads.sizes(decoder.config), heads.layout
    rotated = []
    for name, part, path, norm in (
        ("q", Q, heads.q, heads.q_norm),
        ("k", K, heads.k, heads.k_norm),
        ("v", V, heads.v, ""),
    ):
        has_norm = child(block, norm) is not None
        is_turned = has_norm and heads.is_turned_before_norm
        how = {"split": Split(part=part, sizes=sizes, layout=layout, is_turned=is_turned)}
        yield name, norm if has_norm else path, how
        if part != V and heads.rotary is not None and heads.rotary_if(decoder.config):
            turn = {"rotary": heads.rotary, "attention_path": attention_path}
            rotated.append((f"rot_{name}", norm if has_norm else path, {**how, **turn}))
    yield from rotated


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
