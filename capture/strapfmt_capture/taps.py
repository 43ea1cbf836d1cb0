"""What is known of each site while a capture runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from strapfmt.schema import SiteSpec
from strapfmt_capture.channels import Channels
from strapfmt_capture.gradients import Gradients
from strapfmt_capture.hookpoints import HookPoint
from strapfmt_capture.passes import Step
from strapfmt_capture.placement import Layout

__all__ = ["Fit", "Tap", "reached_rows"]

# Up to here a copy costs less than making a slot for it.
_SMALL_BYTES = 64 << 10


@dataclass(slots=True, kw_only=True)
class Tap:
    """One site: where it is taken, what it holds, and what became of its rows.

    Attributes
    ----------
    point : HookPoint
    is_head : bool
        Whether it may leave out all but the last positions.
    channels : Channels or None
        Which elements of its last dimension are stored.
    in_encoder : bool
        Whether it fires in the encoder of an encoder-decoder model.
    layout : Layout or None
        None until it has fired.
    n_calls : int
        How often it has fired.
    expected, dropped : int
        Rows it has produced that are wanted, and those not stored because the ring was full.
    filtered : int
        Rows it has produced that are not wanted; of gradients, those of values that are not.
    n_missed : int
        Complete steps in which it did not fire, of those that have tokens and are the encoder's, or not, like it.
    attention : module and mapping, or None
        Of a site that needs it: the attention module under way, and the positions it was given.
    gradient : Tap or None
        The site of its gradients, if they are stored.
    gradients : Gradients or None
        Of a site of gradients.
    """

    point: HookPoint
    is_head: bool
    channels: Channels | None = None
    in_encoder: bool = False
    layout: Layout | None = None
    n_calls: int = 0
    expected: int = 0
    dropped: int = 0
    filtered: int = 0
    n_missed: int = 0
    last_step: int = -1
    attention: tuple[torch.nn.Module, Mapping[str, Any]] | None = None
    gradient: Tap | None = None
    gradients: Gradients | None = None
    staged: tuple[torch.Tensor, ...] = ()
    is_plain: bool = False
    fit: Fit | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        # A copy of a hooked model takes taps along, with hooks that do nothing.
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A hooked model that is stored leaves them behind.
        return type(None), ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a tensor has to be like that is all rows of a batch at a site, and whether it is small."""

    batch: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    n_bytes: int
    spec: SiteSpec
    is_small: bool

    @classmethod
    def of(cls, tap: Tap, batch: tuple[int, ...]) -> Fit | None:
        """Return it, None as long as the site is not declared."""
        layout = tap.layout
        if layout is None:
            return None
        is_whole = layout.ndim is None and not layout.heads_first and not layout.spec.is_ragged
        shape = batch + layout.shape
        n_bytes = math.prod(shape) * layout.dtype.itemsize
        return cls(
            batch=batch,
            shape=shape,
            dtype=layout.dtype,
            n_bytes=n_bytes,
            spec=layout.spec,
            is_small=is_whole and 0 < n_bytes <= _SMALL_BYTES,
        )


def reached_rows(
    taps: Iterable[Tap], step: Step, chosen: npt.NDArray[np.int64] | None
) -> npt.NDArray[np.int64] | None:
    """Return which rows of a step, counted from 0, some of the sites has a value of; None if all or not known.

    Parameters
    ----------
    taps : iterable of Tap
    step : Step
    chosen : int64 [k] or None
        The positions at which the head computes; None: all.
    """
    if not step.is_language:
        return None
    reached: set[int] = set()
    for tap in taps:
        if tap.in_encoder != (step.phase == "encode"):
            continue
        if not tap.is_head or (chosen is None and not tap.point.is_last):
            return None
        reached |= {step.n_query - 1} if chosen is None or tap.point.is_last else set(chosen.tolist())
    places = np.arange(step.n_sequences * step.n_query) if step.selected is None else step.selected
    rows: npt.NDArray[np.int64] = np.flatnonzero(np.isin(places % max(step.n_query, 1), list(reached)))
    return rows
