"""A pass recorded with a CUDA graph, and its repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from strapfmt_capture.hooks import Hooks
from strapfmt_capture.taps import Tap

__all__ = ["Recording"]


class Recording:
    """What the sites of one pass gave, in memory into which each replay of its CUDA graph writes anew.

    Made by `Capture.recording`.

    Parameters
    ----------
    model : torch.nn.Module
        The captured model.
    hooks : Hooks
    values : sequence of (Tap, torch.Tensor)
        Kept alive by this object, in the memory pool of the graph.
    """

    def __init__(
        self, model: torch.nn.Module, hooks: Hooks, values: Sequence[tuple[Tap, torch.Tensor]]
    ) -> None:
        self._model, self._hooks, self._values = model, hooks, values

    def replay(self, **inputs: Any) -> AbstractContextManager[None]:
        """Store what a replay inside the block computes, as one forward pass over `inputs`.

        The values are copied when the block ends, on the current stream, which must be that of the replay.

        Parameters
        ----------
        **inputs
            What the model would be called with, by name, holding what it holds for this pass: `input_ids`, and
            `attention_mask` and `past_key_values` where there are any.

        Raises
        ------
        CaptureError
            If the capture is over.
        """
        return self._hooks.replaying(self._model, self._values, inputs)

    def __repr__(self) -> str:
        sites = [tap.point.site for tap, _ in self._values]
        return f"{type(self).__name__}({len(sites)} values: {', '.join(sites[:3])})"
