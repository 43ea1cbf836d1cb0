"""What a running capture consists of: writer, ring, drain, tracker and hooks, made and ended in the right order."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from strapfmt import spec
from strapfmt.arguments import as_integer, as_seconds
from strapfmt.claim import discard_rank
from strapfmt.codecs import get_codec
from strapfmt.errors import ArgumentError, CaptureError, WriterConflictError
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter
from strapfmt_capture.channels import Channels, facts_of
from strapfmt_capture.decoders import output_head
from strapfmt_capture.disk_space import DiskSpace
from strapfmt_capture.drain_home import DrainHome, ThreadDrain
from strapfmt_capture.drain_process import ProcessDrain
from strapfmt_capture.encoders import stacks_of
from strapfmt_capture.groups import Group
from strapfmt_capture.hookpoints import HookPoint, hook_points
from strapfmt_capture.hooks import Hooks
from strapfmt_capture.items import Finish, Item
from strapfmt_capture.live import CaptureStats, stats_of
from strapfmt_capture.parallel import placements_of
from strapfmt_capture.progress import ProgressLine
from strapfmt_capture.provenance import describe_model, describe_tokenizer, describe_versions
from strapfmt_capture.ring import LINGER_S, Ring
from strapfmt_capture.rings import Rings
from strapfmt_capture.rows import RowTracker
from strapfmt_capture.selection import Selection
from strapfmt_capture.steering import Steering
from strapfmt_capture.steps import OnFull
from strapfmt_capture.stopping import Stop
from strapfmt_capture.texts import ForgivingTokenizer

__all__ = ["DrainKind", "Engine", "Mode", "Options"]

DrainKind = Literal["thread", "process"]
Mode = Literal["create", "overwrite", "append"]
_ON_FULL = ("block", "drop", "raise", "spill")
_DRAINS = ("thread", "process")
_TURNS_A_COMMIT, _LEAST_LINGER_S = 4, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `capture` was asked for, checked."""

    codec: str
    on_full: OnFull
    spill_path: str | None
    drain: DrainKind
    stats: tuple[str, ...]
    mode: Mode
    rank: int | None
    host_ring_bytes: int
    gpu_ring_bytes: int
    batch_bytes: int
    shard_bytes: int
    commit_interval_s: float
    min_free_bytes: int | None = 0
    top_k_logits: int | None = None
    backward: bool = False
    stop_at_layer: int | None = None
    selection: Selection | None = None

    def __post_init__(self) -> None:
        get_codec(self.codec)
        if self.rank is not None:
            object.__setattr__(self, "rank", as_integer("rank", self.rank, least=0))
        if self.top_k_logits is not None:
            object.__setattr__(self, "top_k_logits", as_integer("top_k_logits", self.top_k_logits, least=1))
        if self.on_full not in _ON_FULL:
            raise ArgumentError(f"on_full: expected one of {', '.join(_ON_FULL)}; got {self.on_full!r}")
        if self.drain not in _DRAINS:
            raise ArgumentError(f"drain: expected one of {', '.join(_DRAINS)}; got {self.drain!r}")
        self._check_spill()
        for name in ("host_ring_bytes", "gpu_ring_bytes", "batch_bytes", "shard_bytes"):
            object.__setattr__(self, name, as_integer(name, getattr(self, name), least=spec.ALIGNMENT_BYTES))
        if self.min_free_bytes is not None:
            n_bytes = as_integer("min_free_bytes", self.min_free_bytes, least=0)
            object.__setattr__(self, "min_free_bytes", n_bytes)
        object.__setattr__(
            self,
            "commit_interval_s",
            as_seconds("commit_interval_s", self.commit_interval_s, may_be_zero=True),
        )

    def _check_spill(self) -> None:
        if (self.on_full == "spill") != (self.spill_path is not None):
            raise ArgumentError(
                'spill_path: expected a directory on another disk with on_full="spill", and None otherwise; got '
                f"{self.spill_path!r} with on_full={self.on_full!r}"
            )
        if self.spill_path is not None and not Path(self.spill_path).is_dir():
            raise ArgumentError(f"spill_path: expected a directory that exists, got {self.spill_path!r}")

    def facts(self, channels: Mapping[str, Channels]) -> dict[str, Any]:
        """What the manifest says of them; of filters, those that were asked for."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        selection = facts.pop("selection")
        facts |= selection.facts if selection else {}
        return facts | ({"channels": facts_of(channels)} if channels else {})


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
        channels: Mapping[str, Channels],
        stop: Stop | None,
        tokenizer: Any,
        tags: Mapping[str, Any] | None,
        progress: bool | None,
        group: Group | None = None,
    ) -> None:
        self._is_running = False
        self.rings = Rings(_make_ring(options), gpu_ring_bytes=options.gpu_ring_bytes)
        self.tokenizer = None if tokenizer is None else ForgivingTokenizer(tokenizer)
        encoders = stacks_of(model).inside_encoders()
        self.tracker = RowTracker(
            reserve=self._reserve, tokenizer=self.tokenizer, tags=tags, encoders=encoders
        )
        heads = _head_paths(model)
        _check_takes_hooks(model, points, modules)
        facts = {
            "tool": "strapfmt.capture",
            "model": describe_model(model),
            "tokenizer": describe_tokenizer(tokenizer),
            "versions": describe_versions(),
            "options": options.facts(channels),
            "sites": {point.site: point.hook_point for point in points},
            **({"tensor_parallel_ranks": list(group.ranks)} if group else {}),
        }
        # pyarrow imports pandas, where there is one, at the first of these: not inside a forward pass.
        pa.array([0])
        self._progress = ProgressLine(self._read_progress, show=progress)
        self._attached = ExitStack()
        with ExitStack() as undo:
            undo.enter_context(self._progress)
            # What can fail has been tried: with mode="overwrite" the writer removes what there was.
            self.drain = _open_drain(path, options, facts, self.rings.host)
            undo.callback(_give_up, self.drain, options.mode)
            self.rings.spill = self.drain.spill
            self._attached.callback(self.tracker.close)
            self.hooks = Hooks(
                points,
                heads=heads,
                rings=self.rings,
                drain=self.drain,
                tracker=self.tracker,
                on_full=options.on_full,
                codec=options.codec,
                statistics=options.stats,
                known=self.drain.sites,
                selection=options.selection,
                channels=channels,
            )
            self.steering = Steering(
                path, rings=self.rings, drain=self.drain, tracker=self.tracker, steps=self.hooks.steps
            )
            undo.push(self._attached)
            self._attached.enter_context(self.hooks.attached(model, modules))
            if stop is not None:
                self._attached.enter_context(stop.attached(model, modules))
            self.drain.start()
            self._is_running = True
            undo.pop_all()

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
            self.rings.finish()
            self.drain.settle_spill()  # what it counts is told with the outcome
        except BaseException:
            self.rings.abort()
            self.drain.abort()
            raise
        else:
            seen = {tap.point.site: tap.expected for tap in self.hooks.taps}
            self.drain.finish(Finish(facts=self._outcome(), seen=seen))
            self._check_account()
        finally:
            self._progress.__exit__(None, None, None)
            if not self.drain.is_alive:
                self.rings.free()

    def stats(self, state: str) -> CaptureStats:
        """Return figures of this moment."""
        has_failed = state == "running" and self.drain.failed
        return stats_of(self.hooks, self.drain, self.rings, "failed" if has_failed else state)

    def _check_account(self) -> None:
        """Raise if rows have got lost without a reason."""
        progress = self.drain.progress
        wrong = [
            f"{tap.point.site!r}: {tap.expected} rows seen, {written} written, {tap.dropped + lost} dropped"
            for tap in self.hooks.taps
            if tap.expected
            != (written := progress.written.get(tap.point.site, 0))
            + tap.dropped
            + (lost := progress.lost.get(tap.point.site, 0))
        ]
        if wrong:
            raise CaptureError(
                f"{self.drain.path}: the account of {len(wrong)} sites does not balance ({'; '.join(wrong[:3])}); the "
                "dataset is closed and what it holds is sound, but rows are missing or too many: report this"
            )

    def _outcome(self) -> dict[str, Any]:
        filtered = {tap.point.site: tap.filtered for tap in self.hooks.taps if tap.filtered}
        missed = {tap.point.site: tap.n_missed for tap in self.hooks.taps if tap.n_missed}
        placements = placements_of(tap.point for tap in self.hooks.taps)
        return {
            "outcome": {
                "n_steps": self.hooks.steps.counts.n_steps,
                "n_dropped_steps": self.hooks.steps.counts.n_dropped_steps,
                "n_abandoned_steps": self.hooks.steps.counts.n_abandoned_steps,
                **({"filtered_rows": filtered} if filtered else {}),
                "n_paused_passes": self.hooks.steps.n_paused_passes,
                **({"missed_steps": missed} if missed else {}),
                **({"stopped": self.drain.space.note} if self.drain.space.note else {}),
                **({"placements": placements} if placements else {}),
                "devices": sorted(str(device) for device in self.hooks.store.devices),
                **self._spilled(),
                "stall_s": self.rings.stall_s,
                "peak_fill": self.rings.peak_fill,
            }
        }

    def _spilled(self) -> dict[str, int]:
        spill = self.drain.spill
        if spill is None:
            return {}
        return {
            "n_spilled_steps": spill.n_steps,
            "n_spilled_bytes": spill.file.end,
            "n_spills_refused": spill.n_refused,
        }

    def _reserve(self, kind: Literal["row", "step", "sequence"], n: int) -> int:
        # The tracker is made before the drain, and asks for numbers in the first pass.
        return self.drain.reserve(kind, n)

    def _read_progress(self) -> tuple[int, int, float, int]:
        if not self._is_running:
            return 0, 0, 0.0, 0
        n_dropped = sum(tap.dropped for tap in self.hooks.taps)
        progress = self.drain.progress
        return progress.n_rows, progress.n_bytes, self.rings.fill, n_dropped


def _make_ring(options: Options) -> Ring[Item]:
    # Steps that are spilled go through a second ring: both together are what was asked for.
    n_bytes = options.host_ring_bytes // (1 if options.spill_path is None else 2)
    # No commit waits long for its turn.
    linger_s = min(max(options.commit_interval_s / _TURNS_A_COMMIT, _LEAST_LINGER_S), LINGER_S)
    return Ring(n_bytes, is_shared=options.drain == "process", linger_s=linger_s)


def _open_drain(path: Path, options: Options, provenance: Mapping[str, Any], ring: Ring[Item]) -> DrainHome:
    writer_options: dict[str, Any] = {
        "path": str(path),
        "rank": options.rank,
        "mode": options.mode,
        "batch_bytes": options.batch_bytes,
        "shard_bytes": options.shard_bytes,
        "commit_interval_s": options.commit_interval_s,
        "provenance": provenance,
    }
    space = DiskSpace(path, options.min_free_bytes, options.batch_bytes)
    spill_path = None if options.spill_path is None else Path(options.spill_path)
    if options.drain == "process":
        return ProcessDrain(ring, writer_options, space, spill_path)
    return ThreadDrain(ring, DatasetWriter(**writer_options), space, spill_path)


def _give_up(drain: DrainHome, mode: Mode) -> None:
    """End a session that could not begin; what its writer has made goes, what was there to append to stays."""
    drain.abort()
    if mode != "append":
        # What has kept the session from beginning is what is raised.
        with suppress(OSError, WriterConflictError):
            discard_rank(drain.path, drain.rank)


def _check_takes_hooks(
    model: torch.nn.Module, points: Sequence[HookPoint], modules: Sequence[torch.nn.Module]
) -> None:
    """Try what `Hooks.attached` will do, with hooks that do nothing.

    Raises
    ------
    CaptureError
        Naming what takes no hooks (TorchScript, for example), or a site whose module is gone.
    """
    place = type(model).__name__
    try:
        for module in modules:
            _try_hooks(module)
        for point in points:
            place = f"site {point.site!r} at {point.hook_point}"
            _try_hooks(model.get_submodule(point.module_path))
    except Exception as error:
        raise CaptureError(f"{place}: expected a module that takes hooks, leave it out: {error}") from error


def _try_hooks(module: torch.nn.Module) -> None:
    module.register_forward_pre_hook(_do_nothing, with_kwargs=True).remove()
    module.register_forward_hook(_do_nothing, with_kwargs=True, always_call=True).remove()


def _do_nothing(*args: Any) -> None:
    """Be a hook."""


def _head_paths(model: torch.nn.Module) -> set[str]:
    """Paths of the modules that may compute the last positions only: the head, and what is known to return logits."""
    paths = {point.module_path for point in hook_points(model).values() if point.site == "logits"}
    head = output_head(model)
    if head is not None:
        paths |= {path for path, module in model.named_modules() if module is head}
    return paths
