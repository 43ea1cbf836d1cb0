"""Heads: where a block holds its queries, keys and values, and how a module's output becomes one vector per head."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "POSITIONS",
    "HeadSizes",
    "Heads",
    "K",
    "Q",
    "Rotary",
    "Split",
    "V",
    "clipped",
    "concatenated",
    "grouped",
    "namespace",
    "rotated",
    "rotated_by_position",
    "separate",
]

#: What a rotation may need of what an attention module is called with.
POSITIONS = ("position_embeddings", "position_ids")

# The parts of a projection.
Q, K, V = 0, 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSizes:
    """How many heads an attention has, and how wide they are; `clip` bounds q, k and v where a config asks for it."""

    n_heads: int
    n_kv_heads: int
    d_head: int
    clip: float | None = None


# A layout turns what a projection gives, its parts q, k and v numbered 0, 1, 2, into [*tokens, heads, d_head].
Layout = Callable[[torch.Tensor, int, HeadSizes], torch.Tensor]
# A rotation turns [n_sequences, heads, n_query, d_head], given the attention module and what that was called with.
Rotary = Callable[[torch.nn.Module, torch.Tensor, Mapping[str, Any]], torch.Tensor]


def separate(x: torch.Tensor, part: int, sizes: HeadSizes) -> torch.Tensor:
    """Split what holds one part only, `[*tokens, heads * d_head]`; leave a norm's `[*tokens, heads, d_head]` alone."""
    return x if x.ndim > 3 else x.reshape(*x.shape[:-1], -1, sizes.d_head)


def clipped(x: torch.Tensor, part: int, sizes: HeadSizes) -> torch.Tensor:
    """Split as `separate`, bounded as the model does it in place once its projections have returned (OLMo)."""
    x = separate(x, part, sizes)
    return x if sizes.clip is None else x.detach().clamp(-sizes.clip, sizes.clip)


def concatenated(x: torch.Tensor, part: int, sizes: HeadSizes) -> torch.Tensor:
    """Split `[*tokens, q of all heads | k of all | v of all]` (GPT-2, Phi-3)."""
    widths = [n * sizes.d_head for n in (sizes.n_heads, sizes.n_kv_heads, sizes.n_kv_heads)]
    return separate(torch.split(x, widths, dim=-1)[part], part, sizes)


def grouped(x: torch.Tensor, part: int, sizes: HeadSizes) -> torch.Tensor:
    """Split `[*tokens, groups x (some q | k | v)]`, a group being one head of k and v (GPT-NeoX, BLOOM, Falcon)."""
    n_queries = sizes.n_heads // sizes.n_kv_heads
    groups = x.reshape(*x.shape[:-1], sizes.n_kv_heads, n_queries + 2, sizes.d_head)
    return groups[..., :-2, :].flatten(-3, -2) if part == Q else groups[..., n_queries + part - 1, :]


def _n_kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _always(config: Any) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Where the heads of one block are. All paths are below the block.

    Attributes
    ----------
    q, k, v : str
        The modules whose output holds queries, keys and values; three times the same where one projection is all.
    q_norm, k_norm : str
        Norms after the projections, for the models that have them: what these give is q and k then.
    is_turned_before_norm : bool
        Whether the norms work on `[n_sequences, heads, n_query, d_head]`.
    z : str
        The module whose *input* is what the heads give: the output projection.
    layout : callable
        How heads lie in the output of a projection: `separate`, `concatenated`, `grouped`, `clipped`, or a function
        `(tensor, part, sizes)` that gives `[*tokens, heads, d_head]` of part 0, 1 or 2 (q, k, v).
    rotary : callable or None
        How q and k are rotated: `rotated` for models that call a function `apply_rotary_pos_emb` of their modelling
        file with `position_embeddings` that the attention module is given; None where there is no rotation.
    rotary_if : callable
        Whether a config has it, for architectures that have both forms.
    n_kv_heads : callable
        The number of key and value heads of a config.
    """

    q: str
    k: str
    v: str
    q_norm: str = ""
    k_norm: str = ""
    is_turned_before_norm: bool = False
    z: str
    layout: Layout = separate
    rotary: Rotary | None = None
    rotary_if: Callable[[Any], bool] = _always
    n_kv_heads: Callable[[Any], int] = _n_kv_heads

    def sizes(self, config: Any) -> HeadSizes:
        """Return the sizes that a Hugging Face config gives."""
        n_heads = config.num_attention_heads
        return HeadSizes(
            n_heads=n_heads,
            n_kv_heads=self.n_kv_heads(config),
            d_head=getattr(config, "head_dim", None) or config.hidden_size // n_heads,
            clip=getattr(config, "clip_qkv", None),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How one part becomes heads.

    Attributes
    ----------
    part : int
        0, 1, 2 for q, k, v.
    sizes : HeadSizes
    layout : callable
        As in `Heads`.
    is_turned : bool
        Whether heads come before tokens.
    """

    part: int
    sizes: HeadSizes
    layout: Layout
    is_turned: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """Of one token: heads and their width."""
        return (self.sizes.n_heads if self.part == Q else self.sizes.n_kv_heads, self.sizes.d_head)

    @property
    def is_view(self) -> bool:
        """Whether heads are the values given, and not bounded."""
        return self.layout is not clipped or self.sizes.clip is None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return `[*tokens, heads, d_head]`, a view where the layout allows one."""
        return x.transpose(1, 2) if self.is_turned else self.layout(x, self.part, self.sizes)


def rotated(attention: torch.nn.Module, x: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
    """Rotate by the function that the model's own file calls, and the angles that its attention was given.

    Where the angles are narrower than a head, the first places of it are rotated and the others are not.

    Raises
    ------
    LookupError
        If the attention was given no `position_embeddings`, or its file has no `apply_rotary_pos_emb`.
    """
    if not getattr(attention, "use_rope", True):  # SmolLM3 rotates in some layers only
        return x
    cos, sin = given["position_embeddings"]
    rotate = namespace(attention)["apply_rotary_pos_emb"]
    width = cos.shape[-1]
    # Copies, as some replacements of that function work in place; it wants keys as well, of which one head will do.
    first = x[..., :width].clone()
    turned, _ = rotate(first, first[:, :1].clone(), cos, sin)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), dim=-1)


def rotated_by_position(attention: Any, x: torch.Tensor, given: Mapping[str, Any]) -> torch.Tensor:
    """Rotate as GPT-J does, which looks its angles up by `position_ids`.

    Raises
    ------
    LookupError
        If the attention was given no `position_ids`, or its file has no `apply_rotary_pos_emb`.
    """
    positions = given["position_ids"]
    angles = attention._get_embed_positions(positions)
    index = positions.unsqueeze(-1).repeat(1, 1, angles.shape[-1])
    sin, cos = torch.gather(angles, 1, index).to(x.dtype).chunk(2, dim=-1)
    width = angles.shape[-1]
    tokens_first = x.transpose(1, 2)
    turned = namespace(attention)["apply_rotary_pos_emb"](tokens_first[..., :width].clone(), sin, cos)
    return torch.cat((turned, tokens_first[..., width:]), dim=-1).transpose(1, 2)


def namespace(module: torch.nn.Module) -> dict[str, Any]:
    """Return the global names that a module's `forward` sees: those of its modelling file, as they are now."""
    names: dict[str, Any] = inspect.unwrap(type(module).forward).__globals__
    return names
