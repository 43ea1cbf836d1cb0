"""The arguments of a language model's forward pass, read as tokens: which there are, and which of them are real."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from strapfmt.errors import CaptureError
from strapfmt_capture.caches import cache_length
from strapfmt_capture.eager import has_values
from strapfmt_capture.encoders import vectors_of
from strapfmt_capture.wrappers import hidden_models, is_lens

__all__ = ["Inputs", "named_arguments", "read_inputs"]

# What models call their token ids, Hugging Face's name first.
_TOKEN_NAMES = ("input_ids", "idx", "tokens", "token_ids")
_CACHE_NAMES = ("past_key_values", "cache_params", "layer_past")
# TransformerLens's names: of tokens (or text, or embeddings), and before version 4 of a cache of its own.
_LENS_TOKENS, _LENS_CACHE = "input", "past_kv_cache"
# All that says which tokens a pass is about.
_NAMES = (*_TOKEN_NAMES, _LENS_TOKENS, *_CACHE_NAMES, "inputs_embeds", "attention_mask", "position_ids")
# What only a module that holds both an encoder and a decoder takes.
_DECODER_NAMES = ("decoder_input_ids", "decoder_inputs_embeds")
# What is added to a score is a bias above this, and below it an end to attention.
_NOT_ATTENDED = -9e3
# Of up to so many numbers a list is asked more quickly than an array.
_FEW = 64
_INT32 = np.iinfo(np.int32)
# Arguments that only a paged cache has: there the rows of one pass belong to many requests.
_PAGED_NAMES = ("block_table", "page_table", "write_index")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What one forward pass is asked to process.

    Attributes
    ----------
    n_sequences, n_query : int
        Width of the padded batch: `n_sequences * n_query` places, some of them padding.
    token_ids : ndarray of int64 [n_sequences, n_query] or None
        A view of the model's input where that lies in host memory; None for a pass given embeddings.
    cache : object or None
        What holds the past: a Hugging Face `Cache`, or anything with `get_seq_length`.
    past : int or None
        Places the cache held when the module was called; None without one, or if it does not say.
    """

    n_sequences: int
    n_query: int
    token_ids: NDArray[np.int64] | None
    cache: Any
    past: int | None
    mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    boundaries: torch.Tensor | None
    module: torch.nn.Module
    given: Mapping[str, Any]

    @property
    def encoded(self) -> torch.Tensor | None:
        """What a decoder is given of its encoder: `vectors_of` that, one for each sequence; None if nothing."""
        return vectors_of(self.given.get("encoder_hidden_states"), self.n_sequences)

    def is_read_from(self, given: Mapping[str, Any]) -> bool:
        """Whether another call is given the very same objects, so that reading them again would tell nothing new."""
        return all(given.get(name) is self.given.get(name) for name in _NAMES)

    def agrees_with(self, other: Inputs) -> bool:
        """Whether both are about the same tokens, as far as they say."""
        if (self.n_sequences, self.n_query) != (other.n_sequences, other.n_query):
            return False
        if self.token_ids is None or other.token_ids is None:
            return True
        return np.array_equal(self.token_ids, other.token_ids)

    def real(self, past: int) -> NDArray[np.bool_] | None:
        """Say which places hold a token and which hold padding.

        Parameters
        ----------
        past : int
            How many places the cache holds already.

        Returns
        -------
        ndarray of bool [n_sequences, n_query] or None
            None if there is no padding.

        Raises
        ------
        CaptureError
            If the mask has a shape that does not fit the batch.
        """
        if self.mask is None:
            return None
        if self.mask.ndim <= 2:
            flags = self._columns(self.mask.reshape(-1, self.mask.shape[-1]), past) != 0
        else:
            flags = self._attended_keys(past)
        real = flags.cpu().numpy()
        if real.all():
            return None
        return np.broadcast_to(real, (self.n_sequences, self.n_query))

    def n_past_tokens(self, past: int) -> NDArray[np.int64]:
        """Count the tokens in a past that was not watched: its places less its padding, as far as the mask tells."""
        mask = self.mask
        if mask is None or mask.shape[-1] < past + self.n_query:
            return np.full(self.n_sequences, past, np.int64)
        if mask.ndim <= 2:
            seen = mask.reshape(-1, mask.shape[-1])[:, :past] != 0
        else:
            seen = _attended(mask)[:, -1, :past]
        counts: NDArray[np.int64] = seen.sum(-1).cpu().numpy()
        return np.broadcast_to(counts, (self.n_sequences,)).astype(np.int64)

    def starts(self) -> NDArray[np.bool_] | None:
        """Say which places begin another sequence inside a packed row, by the rule Hugging Face applies.

        In a pass without a mask and a cache, not even one that the model makes, a row whose `position_ids` do not go
        up by one holds several sequences, which do not attend to each other; flash attention applies that with a cache
        of the model's as well. So does one with `cu_seq_lens_q`.

        Returns
        -------
        ndarray of bool [n_sequences, n_query] or None
            The first place of every row counts as a start; None if no row is packed.
        """
        if self.cache is not None or self.mask is not None or self.n_query < 2:
            return None
        starts = np.zeros((self.n_sequences, self.n_query), bool)
        if self.boundaries is not None and self.n_sequences == 1:
            starts[0, self.boundaries.cpu().numpy()[:-1]] = True
        elif self.position_ids is not None and self.position_ids.ndim == 2 and self._may_be_packed():
            positions = self.position_ids.cpu().numpy()
            starts[:, 1:] = np.diff(positions, axis=-1) != 1
        starts[:, 0] = True
        return starts if np.count_nonzero(starts) > self.n_sequences else None

    def _may_be_packed(self) -> bool:
        config = getattr(self.module, "config", None)
        if "flash" in str(getattr(config, "_attn_implementation", "")):
            return True
        makes_cache = self.given.get("use_cache")
        if makes_cache is None:
            makes_cache = getattr(config, "use_cache", False)
        is_checkpointing = self.module.training and getattr(self.module, "is_gradient_checkpointing", False)
        return not makes_cache or bool(is_checkpointing)

    def _columns(self, mask: torch.Tensor, past: int) -> torch.Tensor:
        """The part of a mask `[..., keys]` that is about the tokens of this pass.

        Keys are counted from the first token ever, except where a sliding window has dropped some; then the pass's own
        come last.
        """
        start = min(past, mask.shape[-1] - self.n_query)
        if start < 0:
            raise CaptureError(
                f"attention_mask: expected at least {self.n_query} columns for a pass over {self.n_query} places, got "
                f"shape {tuple(mask.shape)}"
            )
        return mask[..., start : start + self.n_query]

    def _attended_keys(self, past: int) -> torch.Tensor:
        """Places that some query attends to, which are the tokens.

        Queries of padding attend to nothing, or, where that would make a softmax of nothing, to everything; only the
        last query may attend to everything in earnest.
        """
        attended = _attended(self.mask)
        own = self._columns(attended, past)
        in_earnest = ~attended.all(-1, keepdim=True)
        in_earnest[:, -1] = True
        return (own & in_earnest).any(1)


def read_inputs(module: torch.nn.Module, given: Mapping[str, Any]) -> Inputs | None:
    """Find the tokens among the arguments of `module`.

    Parameters
    ----------
    module : torch.nn.Module
        The module that is called.
    given : mapping
        The call's arguments by their names.

    Returns
    -------
    Inputs or None
        None if the module is given no tokens, or those of two streams: an encoder-decoder model, whose encoder and
        decoder know better.

    Raises
    ------
    CaptureError
        For caches and masks that cannot be followed: tuples of tensors, block masks, paged batches.
    """
    is_lens_call = _LENS_TOKENS in given and is_lens(module) and not hidden_models(module)
    names = (*_TOKEN_NAMES, _LENS_TOKENS) if is_lens_call else _TOKEN_NAMES
    shaped = None if _has_two_streams(module, given) else _token_ids(given, names)
    if shaped is None:
        return None
    token_ids, n_sequences, n_query = shaped
    if any(given.get(name) is not None for name in _PAGED_NAMES):
        raise CaptureError(
            "cannot tell sequences apart under continuous batching (generate_batch): capture generate() instead"
        )
    if is_lens_call:
        _check_lens_call(module, given, n_sequences)
    cache = _cache(given)
    return Inputs(
        n_sequences=n_sequences,
        n_query=n_query,
        token_ids=None if token_ids is None else _int64(token_ids),
        cache=cache,
        past=None if cache is None else cache_length(cache),
        mask=_mask(given.get("attention_mask")),
        position_ids=given.get("position_ids"),
        boundaries=given.get("cu_seq_lens_q"),
        module=module,
        given=given,
    )


def named_arguments(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the arguments of a call of `module` by their names."""
    if not args:
        return kwargs
    return {**dict(zip(_parameter_names(type(_unwrapped(module)).forward), args, strict=False)), **kwargs}


def _has_two_streams(module: torch.nn.Module, given: Mapping[str, Any]) -> bool:
    takes = _parameter_names(type(_unwrapped(module)).forward)
    return any(name in takes or given.get(name) is not None for name in _DECODER_NAMES)


def _int64(token_ids: torch.Tensor) -> NDArray[np.int64]:
    """Token ids on the host, if they fit the int32 in which they are stored."""
    if not has_values(token_ids):
        raise CaptureError(
            f"token ids: expected a plain tensor with values, got a {type(token_ids).__name__} on {token_ids.device}; "
            "run the model outside of torch.func transforms and fake tensors"
        )
    try:
        ids: NDArray[np.int64] = token_ids.cpu().numpy()
    except RuntimeError as error:  # in a transform, where a copy of a plain tensor is none
        raise CaptureError(
            f"token ids: expected a tensor that can be read ({error}); run the model outside of torch.func transforms"
        ) from error
    if ids.dtype != np.int64:
        ids = ids.astype(np.int64)
    if ids.size > _FEW:
        lowest, highest = int(ids.min()), int(ids.max())
    else:
        numbers = ids.ravel().tolist() or [0]
        lowest, highest = min(numbers), max(numbers)
    if not (_INT32.min <= lowest and highest <= _INT32.max):
        raise CaptureError(
            f"token ids: expected numbers from {_INT32.min} to {_INT32.max}, in which they are stored; got "
            f"{lowest} to {highest}"
        )
    return ids


def _check_lens_call(module: torch.nn.Module, given: Mapping[str, Any], n_sequences: int) -> None:
    """Refuse what a `HookedTransformer` does with tokens that its arguments do not tell."""
    if given.get(_LENS_CACHE) is not None:
        raise CaptureError(
            f"{_LENS_CACHE}: a key-value cache of TransformerLens's own cannot be followed from one pass to the next; "
            "generate(..., use_past_kv_cache=False)"
        )
    side = getattr(getattr(module, "tokenizer", None), "padding_side", None)
    if side == "left" and n_sequences > 1 and given.get("attention_mask") is None:
        raise CaptureError(
            "input: with a tokenizer that pads on the left the model makes a mask of its own, and which tokens are "
            "padding is not known; pass attention_mask, or pad on the right"
        )


def _token_ids(
    given: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[torch.Tensor | None, int, int] | None:
    """Token ids `[n_sequences, n_query]` (None for embeddings) and their shape."""
    for name in names:
        ids = given.get(name)
        if isinstance(ids, torch.Tensor) and ids.ndim in (1, 2) and not ids.is_floating_point():
            ids = ids if ids.ndim == 2 else ids[None]
            return ids, ids.shape[0], ids.shape[1]
    embeddings = given.get("inputs_embeds")
    if isinstance(embeddings, torch.Tensor) and embeddings.ndim in (2, 3):
        return None, 1 if embeddings.ndim == 2 else embeddings.shape[0], embeddings.shape[-2]
    return None


def _cache(given: Mapping[str, Any]) -> Any:
    cache = next((given[name] for name in _CACHE_NAMES if given.get(name) is not None), None)
    if isinstance(cache, (tuple, list)):
        if all(layer is None for layer in cache):
            return None
        raise CaptureError(
            "past_key_values: expected a transformers Cache, got a tuple of tensors, which cannot be followed from one "
            "pass to the next; wrap it: DynamicCache(past_key_values)"
        )
    return cache


def _mask(mask: Any) -> torch.Tensor | None:
    if isinstance(
        mask, Mapping
    ):  # one per kind of layer; a sliding layer's mask may not reach back to all tokens
        mask = mask.get("full_attention", next((m for m in mask.values() if m is not None), None))
    if mask is None or isinstance(mask, torch.Tensor):
        return mask
    raise CaptureError(
        f"attention_mask: expected a tensor, got a {type(mask).__name__}, from which padding cannot be read; pass the "
        "2-D mask of the tokenizer, or use another attention implementation"
    )


def _attended(mask: torch.Tensor | None) -> torch.Tensor:
    """A mask of any kind as bool `[n_sequences, query, key]`, true where a query attends to a key."""
    assert mask is not None
    mask = mask[:, 0] if mask.ndim == 4 else mask
    if mask.is_floating_point():
        # Added to the scores: 0 or a bias where attended; -1e4, -1e9 or the lowest number where not.
        return mask > _NOT_ATTENDED
    return mask != 0


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The model inside wrappers that pass their arguments on (DataParallel and its kin)."""
    while _may_wrap(module):
        inner = getattr(module, "module", None)
        if not isinstance(inner, torch.nn.Module):
            break
        module = inner
    return module


def _may_wrap(module: torch.nn.Module) -> bool:
    """Whether it may have an attribute `module`: one that has none takes long to say so."""
    inside = module._modules
    return (
        "module" in inside
        or "_orig_mod" in inside
        or "module" in vars(module)
        or hasattr(type(module), "module")
    )


@lru_cache(maxsize=256)
def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(parameter.name for parameter in parameters if parameter.kind in positional)
