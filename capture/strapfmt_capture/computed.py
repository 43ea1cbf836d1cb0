"""Values that no module returns, made from one of its calls: outputs of single experts, states, the largest logits."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

__all__ = ["Computation", "TopK", "expert_out", "is_computing", "ssm_state"]

# Given what was read as of any site, the module, its arguments and keyword arguments; None where there is no value.
Computation: TypeAlias = Callable[
    [Any, torch.nn.Module, tuple[Any, ...], Mapping[str, Any]], torch.Tensor | None
]


class _Thread(threading.local):
    """What a thread is doing, in a form that a compiler follows."""

    def __init__(self) -> None:
        self.is_computing = False


_thread = _Thread()


def is_computing() -> bool:
    """Whether this thread is inside a computation, whose calls of modules are no calls of the model's."""
    return _thread.is_computing


def expert_out(
    value: Any, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.Tensor | None:
    """Compute what each chosen expert gives for each token, before it is weighted.

    The experts' module is run once more by its own `forward`, on every pair of token and expert as if it were a token
    of that expert alone with weight 1: whatever implementation it uses is given the same rows for each expert, in the
    same order, and makes the same bits of them (but that a sum may turn -0 into 0).

    Parameters
    ----------
    value : object
        Not used: the weighted sum, which the module returns.
    module : torch.nn.Module
        Takes `hidden_states [n, d_model]`, `top_k_index [n, k]` and `top_k_weights [n, k]`.
    args, kwargs
        Of its call.

    Returns
    -------
    torch.Tensor [n, k, d_model] or None
        A new tensor, of the type that the module returns; in the order of `top_k_index`.
    """
    hidden, index, weights = inspect.signature(module.forward).bind(*args, **kwargs).args[:3]
    n, k = index.shape
    # The plain implementation goes through its tokens choice by choice, the others token by token.
    config = getattr(module, "config", None)
    is_plain = getattr(config, "_experts_implementation", "eager") == "eager"
    repeated = hidden.repeat(k, 1) if is_plain else hidden.repeat_interleave(k, dim=0)
    index = (index.T if is_plain else index).reshape(-1, 1)
    try:  # an interrupt may come behind any call
        _thread.is_computing = True
        with torch.no_grad():
            out: torch.Tensor = module.forward(repeated, index, weights.new_ones(n * k, 1))
    finally:
        _thread.is_computing = False
    d_model = out.shape[-1]
    return out.reshape(k, n, d_model).transpose(0, 1) if is_plain else out.reshape(n, k, d_model)


def ssm_state(
    value: Any, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.Tensor | None:
    """Take the recurrent state of a mixer after its call out of the cache that it was given.

    Returns
    -------
    torch.Tensor [n_sequences, 1, *state] or None
        A view into the cache, which the next pass changes; None without a cache.
    """
    given = (*args, *kwargs.values())
    cache: Any = next((each for each in given if hasattr(each, "update_recurrent_state")), None)
    state: torch.Tensor | None = None
    if hasattr(cache, "get_recurrent_state"):
        state = cache.get_recurrent_state(module.layer_idx)
    elif cache is not None:  # of transformers up to 5.17 at least
        state = cache.layers[module.layer_idx].recurrent_states[0]
    return None if state is None else state.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class TopK:
    """The `k` largest of the last dimension, or where they are, the largest first, as `torch.topk` gives them."""

    k: int
    what: Literal["values", "ids"]

    def __call__(
        self, value: Any, module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """Return `[*, k]` of `value [*, n]`: its own dtype, or int64."""
        if not isinstance(value, torch.Tensor):
            return None
        values, ids = torch.topk(value.detach(), self.k, dim=-1)
        return values if self.what == "values" else ids
