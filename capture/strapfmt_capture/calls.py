"""A call of a row module under way: which frame it is and what it was given; and the step that it becomes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from strapfmt_capture.inputs import Inputs, named_arguments, read_inputs
from strapfmt_capture.items import StepEnd
from strapfmt_capture.passes import Step
from strapfmt_capture.placement import Placement

__all__ = ["Call", "Counts", "OpenStep", "call_of", "is_on_stack", "kept_of", "positions_of"]


@dataclass(slots=True, kw_only=True)
class OpenStep:
    """A step that has begun; `whole` are the rows of a tensor that begins with the sizes of the `batch`.

    `chosen` are the positions at which the head computes, None if it computes all. `stored` are those of `whole` that
    are wanted, None if nothing of the step is. `takes_all`: all rows of a whole tensor are stored. `index` and
    `cuts` are what was sent to a device for one value and serves the next ones.
    """

    step: Step
    batch: tuple[int, ...]
    whole: Placement
    chosen: npt.NDArray[np.int64] | None
    stored: Placement | None
    is_dropped: bool = False
    takes_all: bool = False
    dropped: dict[str, int] = field(default_factory=dict)
    index: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    cuts: dict[Any, Any] = field(default_factory=dict)


class Counts(NamedTuple):
    """Steps that have begun, some of them without an end yet, and their tokens; replaced as a whole."""

    n_steps: int = 0
    n_tokens: int = 0
    n_dropped_steps: int = 0
    n_abandoned_steps: int = 0


@dataclass(slots=True, kw_only=True)
class Call:
    """A call under way: its own frame, that of the language model in it, what that is given and has returned.

    `kept` is what the head is told to compute, `whole_kept` what the outermost call was told. `is_full`: its step is
    dropped, as the ring has no space for it. `counts` are those that include the step; `is_started` says that its
    beginning was handed over, `end` what is to be said of its end.
    """

    frame: FrameType
    model_frame: FrameType
    exception: BaseException | None
    module: torch.nn.Module
    inputs: Inputs | None
    kept: Any
    whole_kept: Any
    started_ns: int
    started_s: float
    output: Any = None
    is_full: bool = False
    # What has been said of its step: where an interrupt cuts that off, the same is said again.
    counts: Counts | None = None
    is_started: bool = False
    end: StepEnd | None = None
    #: The last answer of `chosen`, and what it was for.
    _chosen: tuple[Any, int, npt.NDArray[np.int64] | None] | None = None

    def chosen(self, n_query: int) -> npt.NDArray[np.int64] | None:
        """Return the positions at which the head computes, None if it computes all.

        On a GPU what it is told is waited for, once a step.
        """
        known = self._chosen
        if known is None or known[0] is not self.kept or known[1] != n_query:
            known = self._chosen = self.kept, n_query, positions_of(self.kept, n_query)
        return known[2]


def call_of(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    frame: FrameType,
    model_frame: FrameType,
    exception: BaseException | None,
) -> Call:
    """Describe a call that begins now; `frame` is its own, `model_frame` that of the language model in it."""
    given = named_arguments(module, args, kwargs)
    kept = kept_of(given)
    return Call(
        frame=frame,
        model_frame=model_frame,
        exception=exception,
        module=module,
        inputs=read_inputs(module, given),
        kept=kept,
        whole_kept=kept,
        started_ns=time.time_ns(),
        started_s=time.perf_counter(),
    )


def is_on_stack(wanted: FrameType, frame: FrameType | None) -> bool:
    """Whether a frame is among `frame` and those that have called it."""
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None


def kept_of(given: Mapping[str, Any]) -> Any:
    """Return what the head is told to compute, as Hugging Face calls it now and did before."""
    kept = given.get("logits_to_keep")
    return given.get("num_logits_to_keep") if kept is None else kept


def positions_of(kept: Any, n_query: int) -> npt.NDArray[np.int64] | None:
    """Return the positions that `logits_to_keep` means, None if it means all of them or nothing that is known."""
    if isinstance(kept, int):
        if kept == 0 or kept >= n_query:
            return None
        kept = slice(-kept, None)
    if not isinstance(kept, (slice, list, torch.Tensor)):
        return None
    chosen = kept.cpu().numpy() if isinstance(kept, torch.Tensor) else kept
    try:
        positions: npt.NDArray[np.int64] = np.arange(n_query)[chosen].reshape(-1)
    except IndexError:  # the model is about to say so itself
        return None
    return None if np.array_equal(positions, np.arange(n_query)) else positions
