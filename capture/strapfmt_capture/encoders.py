"""Encoder-decoder models: which of a model's modules are its encoder and decoder, and which sequence one attends to."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from strapfmt.errors import CaptureError

__all__ = ["Encoded", "Stacks", "first_tensor", "stacks_of", "vectors_of"]

_Int64 = NDArray[np.int64]
_Texts = NDArray[np.object_]
# Encoder passes whose sequences are still known when a decoder begins.
_REMEMBERED_PASSES = 64


@dataclass(frozen=True, slots=True)
class Stacks:
    """The encoders and decoders of the encoder-decoder models in a model."""

    encoders: tuple[torch.nn.Module, ...] = ()
    decoders: tuple[torch.nn.Module, ...] = ()

    def inside_encoders(self) -> frozenset[torch.nn.Module]:
        """All modules of the encoders."""
        return frozenset(module for encoder in self.encoders for module in encoder.modules())


def stacks_of(model: torch.nn.Module) -> Stacks:
    """Find the encoders and decoders in `model`; there are none in a model of one stack.

    Raises
    ------
    CaptureError
        For an encoder-decoder model that does not tell which of its modules is the encoder.
    """
    encoders, decoders = [], []
    for module in model.modules():
        may_be = module is model or hasattr(module, "get_encoder")
        if not may_be or "decoder_input_ids" not in inspect.signature(module.forward).parameters:
            continue
        encoder, decoder = _part(module, "get_encoder"), _part(module, "get_decoder")
        if encoder is None or decoder is None:
            raise CaptureError(
                f"{type(module).__name__} is an encoder-decoder model, and its get_encoder() and get_decoder() do not "
                "return the modules whose tokens have to be told apart; capture one of them alone"
            )
        encoders.append(encoder)
        decoders.append(decoder)
    return Stacks(tuple(dict.fromkeys(encoders)), tuple(dict.fromkeys(decoders)))


class Encoded:
    """Knows the sequences of the last encoder passes by what the encoder made of them.

    A decoder is given the encoder's output, often a copy of it with rows repeated (beams). Attention in the encoder
    makes every vector depend on all of its sequence, so the first and the last one tell sequences apart.
    """

    def __init__(self) -> None:
        self._passes: deque[tuple[torch.Tensor, _Int64, _Texts]] = deque(maxlen=_REMEMBERED_PASSES)

    def remember(self, vectors: torch.Tensor, sequence_ids: _Int64, tags: _Texts) -> None:
        """Remember that these sequences `[n_sequences]`, with these tags, were encoded with these `vectors_of`."""
        self._passes.append((vectors, sequence_ids.copy(), tags.copy()))

    def sequences_of(self, vectors: torch.Tensor) -> tuple[_Int64, _Texts | None]:
        """Return the sequences `[n]` that were encoded with these `vectors_of`, -1 where that is not known.

        Of sequences with equal text in one pass the k-th is meant by the k-th group of rows. Beside them their tags, if
        all are known.
        """
        found = np.full(len(vectors), -1, np.int64)
        texts = np.empty(len(vectors), object)
        for known, sequence_ids, tags in reversed(self._passes):
            if known.shape[1:] != vectors.shape[1:] or known.device != vectors.device:
                continue
            is_same = (known[None] == vectors[:, None]).all(-1).cpu().numpy()
            n_repeats, rest = divmod(len(vectors), len(known))
            in_order = np.repeat(np.arange(len(known)), n_repeats)
            if not rest and is_same[np.arange(len(vectors)), in_order].all():
                return sequence_ids[in_order], tags[in_order]
            missing = (found < 0) & is_same.any(axis=1)
            places = is_same[missing].argmax(axis=1)
            found[missing], texts[missing] = sequence_ids[places], tags[places]
            if (found >= 0).all():
                return found, texts
        return found, None


def vectors_of(states: Any, n_sequences: int) -> torch.Tensor | None:
    """Return the bytes of the first and the last vector of each sequence, a copy on the same device.

    Parameters
    ----------
    states : torch.Tensor [n_sequences, n_query, width]
        What an encoder has made.

    Returns
    -------
    torch.Tensor [n_sequences, n_bytes] of uint8, or None
        None if `states` is something else, or empty.
    """
    if not isinstance(states, torch.Tensor) or states.ndim != 3 or not states.numel():
        return None
    if len(states) != n_sequences:
        return None
    return states.detach()[:, [0, -1]].flatten(1).view(torch.uint8)


def first_tensor(output: Any) -> torch.Tensor | None:
    """Return the first tensor of what a model returned, as Hugging Face's `last_hidden_state` is."""
    values = output.values() if isinstance(output, Mapping) else output
    if isinstance(values, torch.Tensor):
        return values
    return next((value for value in values or () if isinstance(value, torch.Tensor)), None)


def _part(module: torch.nn.Module, name: str) -> torch.nn.Module | None:
    get = getattr(module, name, None)
    part = get() if callable(get) else None
    return part if isinstance(part, torch.nn.Module) and part is not module else None
