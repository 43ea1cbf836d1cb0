"""What a running capture consists of: writer, ring, drain, tracker and hooks, made and ended in the right order."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from strapfmt import spec
from strapfmt.codecs import get_codec
from strapfmt.errors import ArgumentError
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter
from strapfmt_capture.arguments import as_integer, as_seconds
from strapfmt_capture.drain import Drain, Item
from strapfmt_capture.hookpoints import HookPoint, hook_points
from strapfmt_capture.hooks import Hooks, OnFull
from strapfmt_capture.progress import ProgressLine
from strapfmt_capture.provenance import describe_model, describe_tokenizer, describe_versions
from strapfmt_capture.ring import Ring
from strapfmt_capture.rows import RowTracker

__all__ = ["Engine", "Mode", "Options"]

Mode = Literal["create", "overwrite", "append"]
_ON_FULL = ("block", "drop", "raise")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `capture` was asked for, checked."""

    codec: str
    on_full: OnFull
    stats: tuple[str, ...]
    mode: Mode
    rank: int | None
    ring_bytes: int
    batch_bytes: int
    shard_bytes: int
    commit_interval_s: float

    def __post_init__(self) -> None:
        get_codec(self.codec)
        if self.rank is not None:
            object.__setattr__(self, "rank", as_integer("rank", self.rank, 0))
        if self.on_full not in _ON_FULL:
            raise ArgumentError(f"on_full: expected one of {', '.join(_ON_FULL)}; got {self.on_full!r}")
        for name in ("ring_bytes", "batch_bytes", "shard_bytes"):
            object.__setattr__(self, name, as_integer(name, getattr(self, name), spec.ALIGNMENT_BYTES))
        object.__setattr__(self, "commit_interval_s", as_seconds("commit_interval_s", self.commit_interval_s))


class Engine:
    """What a running capture consists of; made on entry, closed on exit."""

    def __init__(
        self,
        model: torch.nn.Module,
        path: Path,
        points: Sequence[HookPoint],
        modules: Sequence[torch.nn.Module],
        options: Options,
        *,
        tokenizer: Any,
        tags: Mapping[str, Any] | None,
        progress: bool | None,
    ) -> None:
        #: First of all: with mode="overwrite" the writer removes what there was.
        self.ring: Ring[Item] = Ring(options.ring_bytes)
        self.writer = DatasetWriter(
            path,
            rank=options.rank,
            mode=options.mode,
            codec=options.codec,
            batch_bytes=options.batch_bytes,
            shard_bytes=options.shard_bytes,
            commit_interval_s=options.commit_interval_s,
            provenance={
                "tool": "strapfmt.capture",
                "model": describe_model(model),
                "tokenizer": describe_tokenizer(tokenizer),
                "versions": describe_versions(),
                "options": asdict(options),
                "sites": {point.site: point.hook_point for point in points},
            },
        )
        pa.array(
            [0]
        )  # pyarrow imports pandas, where there is one, at the first of these: not inside a forward pass
        self._attached = ExitStack()
        self._progress = ProgressLine(self._read_progress, show=progress)
        try:
            self.drain = Drain(self.ring, self.writer)
            self.tracker = RowTracker(reserve=self.writer.reserve, tokenizer=tokenizer, tags=tags)
            self._attached.callback(self.tracker.close)
            self.hooks = Hooks(
                points,
                heads=_head_paths(model),
                ring=self.ring,
                drain=self.drain,
                tracker=self.tracker,
                on_full=options.on_full,
                codec=options.codec,
                statistics=options.stats,
                known=self.writer.sites,
            )
            self._attached.enter_context(self.hooks.attached(model, modules))
            self._progress.__enter__()
        except BaseException:
            self._attached.close()
            self.writer.abort()
            raise
        self.drain.start()

    @property
    def specs(self) -> dict[str, SiteSpec]:
        """What the sites that have fired hold."""
        return {tap.point.site: tap.layout.spec for tap in self.hooks.taps if tap.layout is not None}

    def close(self, error: BaseException | None) -> None:
        """Take the hooks off, write what is left and close the dataset; raise DrainError if that fails."""
        if os.getpid() != self.hooks.steps.process:
            self._attached.close()  # the rest belongs to the process that this one was forked from
            return
        try:
            with self._attached:
                self.hooks.finish(error)
        except BaseException:
            self.drain.abort()
            raise
        else:
            self.drain.finish(self._outcome())
        finally:
            self._progress.__exit__(None, None, None)
            if not self.drain.is_alive:
                self.ring.free()

    def _outcome(self) -> dict[str, Any]:
        return {
            "outcome": {
                "n_steps": self.hooks.steps.n_steps,
                "n_dropped_steps": self.hooks.steps.n_dropped_steps,
                "n_abandoned_steps": self.hooks.steps.n_abandoned_steps,
                "devices": sorted(str(device) for device in self.hooks.devices),
                "stall_s": self.ring.stall_s,
                "peak_fill": self.ring.peak_bytes / self.ring.n_bytes,
            }
        }

    def _read_progress(self) -> tuple[int, int, float, int]:
        n_dropped = sum(tap.dropped for tap in self.hooks.taps)
        return self.drain.n_rows, self.drain.n_bytes, self.ring.fill, n_dropped


def _head_paths(model: torch.nn.Module) -> set[str]:
    """Paths of the modules that may compute the last positions only: the head, and what is known to return logits."""
    paths = {point.module_path for point in hook_points(model).values() if point.site == "logits"}
    head = None
    with suppress(AttributeError, NotImplementedError):  # not every Hugging Face model has one
        head = model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(head, torch.nn.Module):
        paths |= {path for path, module in model.named_modules() if module is head}
    return paths
