"""Models in the hands of other libraries: nnsight's wrappers, and TransformerLens models with hook points of their own.

They are told by what they have, not by their class, so that neither library is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch

from strapfmt.errors import ArgumentError

__all__ = ["LENS_SITES", "hidden_models", "is_lens", "lens_paths", "n_blocks", "unwrapped"]

#: Uniform sites of a block, in the order of a forward pass, and what TransformerLens calls them below `blocks.N`.
LENS_SITES = {
    "resid_pre": "hook_resid_pre",
    "attn_pattern": "attn.hook_pattern",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}


def unwrapped(model: Any) -> Any:
    """Return the module inside an nnsight model, anything else as it is.

    Raises
    ------
    ArgumentError
        If the weights are not loaded yet: loading them puts another module in place of this one.
    """
    if isinstance(model, (torch.nn.Module, type)):
        return model
    for name in ("_module", "_model"):  # nnsight's, and what it was before version 0.5
        inner = getattr(model, name, None)
        if isinstance(inner, torch.nn.Module):
            if any(parameter.is_meta for parameter in inner.parameters()):
                raise ArgumentError(
                    f"model: the weights of this {type(model).__name__} are not loaded yet, and the module that is "
                    "captured would not be the one that runs; load them first: model.dispatch()"
                )
            return inner
    return model


def is_lens(model: torch.nn.Module) -> bool:
    """Whether this is a TransformerLens model: hook points by name, and a config that speaks of a vocabulary."""
    return bool(_hook_names(model)) and hasattr(getattr(model, "cfg", None), "d_vocab")


def lens_paths(model: torch.nn.Module, asked: Iterable[str] = ()) -> list[str]:
    """Return hook points of a TransformerLens model by names that `named_modules` does not have.

    Those in its own list, and of its other names for them (`blocks.0.attn.hook_z`) the ones that are `asked` for.
    """
    if not is_lens(model):
        return []
    own = {path for path, _ in model.named_modules()}
    names = dict.fromkeys((*_hook_names(model), *asked))
    return [path for path in names if path not in own and _is_module(model, path)]


def n_blocks(model: torch.nn.Module) -> int:
    """Count the blocks of a TransformerLens model."""
    blocks = getattr(model, "blocks", None)
    return len(blocks) if isinstance(blocks, torch.nn.ModuleList) else 0


def hidden_models(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the model that a TransformerLens bridge calls, which is none of its submodules."""
    inner = getattr(model, "original_model", None) if is_lens(model) else None
    return [inner] if isinstance(inner, torch.nn.Module) else []


def _is_module(model: torch.nn.Module, path: str) -> bool:
    with suppress(AttributeError):
        return bool(path) and isinstance(model.get_submodule(path), torch.nn.Module)
    return False


def _hook_names(model: torch.nn.Module) -> tuple[str, ...]:
    names = getattr(model, "hook_dict", None)
    return tuple(names) if isinstance(names, dict) else ()
