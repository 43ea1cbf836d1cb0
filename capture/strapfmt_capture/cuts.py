"""Attention patterns of several sequences, cut into those of each: with its own keys, and no others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from strapfmt_capture.passes import Step
from strapfmt_capture.placement import Placement

__all__ = ["Cut", "cuts_of", "sent"]

_Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """One sequence's part of a ragged site.

    Attributes
    ----------
    placed : Placement
        Its rows.
    slot : int
        Its place in the batch.
    inside : int64 [n_tokens]
        Which of its queries.
    keys, others : int64 [n] or None
        Which keys, and which ones are left out; None for all, and none.
    """

    placed: Placement
    slot: int
    inside: torch.Tensor
    keys: torch.Tensor | None
    others: torch.Tensor | None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return a copy `[n_tokens, heads, keys]` of `x [n_sequences, n_query, heads, n_keys]`."""
        return self._at(x, self.keys)

    def attends_to_others(self, x: torch.Tensor) -> torch.Tensor:
        """Return whether anything of it is where keys are left out, bool [] on the device of `x`."""
        return self._at(x, self.others).any()

    def _at(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        part = x[self.slot]
        return (part if keys is None else part.index_select(-1, keys)).index_select(0, self.inside)


def cuts_of(x: torch.Tensor, placed: Placement, step: Step, known: dict[Any, Any]) -> list[Cut] | None:
    """Return how a ragged site is cut: each sequence's patterns with its own keys only; None: stored as it is.

    Others are padding, or belong to a sequence that is packed into the same row of the batch. They are left out
    if no token of the sequence attends to any of them, so that nothing is lost where a model does so in earnest.
    The host waits for the answer, once a value.

    Parameters
    ----------
    x : torch.Tensor
    placed : Placement
    step : Step
    known : dict
        Of this step: what other layers need as well.
    """
    if placed.rows is None or x.ndim != 4 or step.history is None:
        return None
    key = x.device, x.shape[-1]
    if key not in known or known[key][0] is not placed.rows:
        known[key] = placed.rows, _made(placed, step, x.shape[-1], x.device)
    cuts: list[Cut] | None = known[key][1]
    shortened = [cut for cut in cuts or () if cut.others is not None]
    if cuts is None or not shortened:
        return cuts
    attending = iter(torch.stack([cut.attends_to_others(x) for cut in shortened]).tolist())
    return [replace(cut, keys=None) if cut.others is not None and next(attending) else cut for cut in cuts]


def sent(index: _Int64, device: torch.device) -> torch.Tensor:
    """Return places as a tensor on `device`, for which a GPU's stream does not wait."""
    places = torch.from_numpy(index)
    return places.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else places.to(device)


def _made(placed: Placement, step: Step, n_keys: int, device: torch.device) -> list[Cut] | None:
    """Cut any value of a step at its sequences; None if every key is a token of each."""
    sequences = _sequences_of(step, n_keys)
    if sequences is None or placed.rows is None:
        return None
    places = np.arange(placed.n_rows) if placed.index is None else placed.index
    cuts = []
    for first, stop, real in sequences:
        chosen = np.flatnonzero((first <= places) & (places < stop))
        if not chosen.size:
            continue
        has_others = not real.all()
        cuts.append(
            Cut(
                placed=Placement(n_rows=len(chosen), index=None, rows=placed.rows[chosen]),
                slot=first // step.n_query,
                inside=sent(places[chosen] % step.n_query, device),
                keys=sent(np.flatnonzero(real), device) if has_others else None,
                others=sent(np.flatnonzero(~real), device) if has_others else None,
            )
        )
    return cuts


def _sequences_of(step: Step, n_keys: int) -> list[tuple[int, int, npt.NDArray[np.bool_]]] | None:
    """The sequences of a step: their first and last place in the flattened batch, and which keys are their tokens."""
    tokens = step.tokens
    if tokens is not None and tokens.counts is not None and len(tokens.slots) > step.n_sequences:  # packed
        stops = np.cumsum(tokens.counts)
        ranges = zip((stops - tokens.counts).tolist(), stops.tolist(), strict=True)
        places = np.arange(n_keys)
        return [
            (first, stop, (first <= place) & (place < stop))
            for first, stop in ranges
            for place in [places + first // step.n_query * step.n_query]
        ]
    keys = None if step.history is None else step.history.real_keys(n_keys)
    if keys is None:
        return None
    q = step.n_query
    return [(slot * q, (slot + 1) * q, real) for slot, real in enumerate(keys)]
