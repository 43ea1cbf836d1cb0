"""`capture`: one session, from the check of every argument to the closed dataset."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch

from strapfmt import spec
from strapfmt.arguments import as_integer
from strapfmt.claim import check_writable
from strapfmt.errors import ArgumentError, CaptureError, DrainError, SiteNeverFiredError
from strapfmt.paths import target_path
from strapfmt.writer import COMMIT_INTERVAL_S
from strapfmt_capture.accounts import CaptureReport, Estimate, SiteAccount, estimate
from strapfmt_capture.arguments import (
    as_flag,
    check_appended,
    check_model,
    check_tokenizer,
    tags_text,
)
from strapfmt_capture.channels import channels_of, facts_of
from strapfmt_capture.compiled import check_not_compiled, original
from strapfmt_capture.device_ring import GPU_RING_BYTES
from strapfmt_capture.drain import Progress
from strapfmt_capture.engine import DrainKind, Engine, Mode, Options
from strapfmt_capture.gradients import with_gradients, without_gradient
from strapfmt_capture.groups import Group, find_group, first_does, own_rank
from strapfmt_capture.hookpoints import GRADIENT_SUFFIX
from strapfmt_capture.hooks import OnFull, Tap
from strapfmt_capture.live import CaptureStats
from strapfmt_capture.parallel import whole_points
from strapfmt_capture.recording import Recording
from strapfmt_capture.ring import RING_BYTES
from strapfmt_capture.selection import Positions, Selection, TokenColumns
from strapfmt_capture.sites import as_patterns, describe, remarks, resolve, row_modules
from strapfmt_capture.statistics import check_statistics
from strapfmt_capture.stopping import Stop
from strapfmt_capture.wrappers import unwrapped

__all__ = ["Capture", "Mode", "PatternSource", "capture"]

PatternSource = Literal["model", "recompute"]


def capture(
    model: Any,
    path: str | Path,
    *,
    sites: str | Iterable[str],
    tokenizer: Any = None,
    attn_pattern: PatternSource = "model",
    backward: bool = False,
    top_k_logits: int | None = None,
    codec: str = "none",
    on_full: OnFull = "block",
    spill_path: str | Path | None = None,
    drain: DrainKind = "thread",
    stats: bool | Collection[str] = True,
    phases: str | Collection[str] | None = None,
    every: int = 1,
    positions: Positions | None = None,
    where: Callable[[TokenColumns], Any] | None = None,
    max_rows: int | None = None,
    channels: Any = None,
    stop_at_layer: int | None = None,
    tags: Mapping[str, Any] | None = None,
    mode: Mode = "create",
    overwrite: bool = False,
    rank: int | None = None,
    tp_group: Any = None,
    host_ring_bytes: int = RING_BYTES,
    gpu_ring_bytes: int = GPU_RING_BYTES,
    batch_bytes: int = spec.BATCH_TARGET_BYTES,
    shard_bytes: int = spec.SHARD_TARGET_BYTES,
    commit_interval_s: float = COMMIT_INTERVAL_S,
    min_free_bytes: int | None = 0,
    progress: bool | None = None,
    quiet: bool = False,
) -> Capture:
    """Capture the activations of a model into a dataset, for as long as the result is entered.

    Everything is checked here, before anything is attached to the model or created on disk::

        with strapfmt.capture(model, "run.strap", sites=["blocks.*.resid_post"], tokenizer=tok) as cap:
            model.generate(**inputs, max_new_tokens=32)
        print(cap.report)

    Parameters
    ----------
    model : torch.nn.Module, or an nnsight model
        Any module; sites and rows of Hugging Face language models, causal or encoder-decoder, and of TransformerLens
        models are known by uniform names. Its outputs and exceptions stay as they are, and its hooks are gone
        afterwards.
    path : path
        The dataset, a directory whose name ends in `.strap`.
    sites : str or iterable of str
        Site names and module paths, with wildcards; `strapfmt.sites(model)` lists them. One that ends in a wildcard
        alone (`blocks.0.*`) leaves out `expert_out` and recomputed patterns, for which parts of the model run twice.
    tokenizer : object, optional
        Turns token ids into text for the `tokens` and `sequences` tables; what it cannot decode is stored as null.
    attn_pattern : {"model", "recompute"}
        Where attention patterns come from: "model" takes those that the model computes, which eager attention alone
        does; "recompute" computes them from queries, keys and masks where the model does not (sdpa, flash attention),
        which takes the time and memory of eager attention at the blocks asked for and gives its values up to rounding.
    backward : bool
        Also store the gradient of a loss with respect to the values of each site, as `<site>.grad`, in the same rows,
        when `backward()` comes to them inside the `with` block, once for each pass. Gradients that come out of the
        order of the passes are kept in memory until their turn. What is computed beside the model (rotated queries and
        keys, recomputed patterns, `expert_out`, `ssm_state`, the largest logits) has none.
    top_k_logits : int, optional
        Of `logits`, store the largest of each token only, found where the model runs: `logits.top_values` (`[k]`, as
        the model gives them) and `logits.top_ids` (`[k]`, int64). None: `logits` whole.
    codec : str
        "none", "lz4" or "zstd".
    on_full : {"block", "drop", "raise", "spill"}
        What happens when writing cannot keep up and the ring is full as a forward pass begins: the model waits, the
        values of the whole pass are not stored (its tokens are, marked dropped), `RingFullError` is raised, or the
        whole pass goes to a file in `spill_path`, from which it comes into the dataset later, in its place.
    spill_path : path, optional
        A directory, best on another disk; for `on_full="spill"` only. When it is full the model waits.
    drain : {"thread", "process"}
        Where statistics are computed and files written: in a thread of this process, or in a process of its own that
        maps the same memory and runs where the model leaves a core idle. A process takes about two seconds to start.
    stats : bool or collection of str
        Statistics stored with every row: all, none, or some of `strapfmt.spec.STATISTICS`; of the elements that are
        stored.
    phases : {"prefill", "decode", "encode"} or collection of them, optional
        Store values of these passes only. This and the next four choose rows, the same at every site, before anything
        is copied; the `tokens` table has all tokens, and `cap.report` counts what was left out.
    every : int
        Store values of the first, the (n+1)th, ... of the passes of which `phases`, `positions` and `where` leave a
        row.
    positions : slice, int, collection of int, or "last", optional
        Store values of tokens at these positions of their sequence, as an index into the sequence as it is after the
        pass, padding left out: `slice(0, 4)`, `[0, -1]`; "last" is -1, the last token of each sequence in the pass.
    where : callable, optional
        Store values of tokens of which this says so: it is given the tokens of each pass, with arrays `position`,
        `token_id`, `token`, `is_special`, `sequence_id`, `batch_index` and `row`, and returns bool `[n_rows]`.
    max_rows : int, optional
        Store so many rows of each site and no more; the model goes on. The pass that reaches it is cut to the row.
    channels : slice, collection of int, or mapping of names to either, optional
        Store these elements of the last dimension, at every site or at the sites that a name, with wildcards, matches
        (the first name that does). Shapes are those of what is stored; `options.channels` of the session in the
        manifest says which elements it is.
    stop_at_layer : int, optional
        End every pass before this block, which saves its time and that of all that follows. What a call returns then
        raises `StoppedPassError` when it is asked for logits or anything else.
    tags : mapping, optional
        JSON values kept with every sequence; `Capture.tagged` gives more to some.
    mode : {"create", "overwrite", "append"}
        "create" refuses a dataset that exists, "overwrite" replaces it, "append" goes on behind what is committed.
    overwrite : bool
        The same as `mode="overwrite"`.
    rank : int, optional
        This process's number among several that write one dataset. None: that of the environment variable `RANK`,
        which torchrun sets, or of `torch.distributed`; without either, the only writer.
    tp_group : DeviceMesh or ProcessGroup, optional
        The processes that run the same passes on parts of one model. Their values are made whole, which all of them
        take part in, and the first of them writes. None: those over which the model's parameters (DTensors) are split.
    host_ring_bytes : int
        Host memory between the model and the writer.
    gpu_ring_bytes : int
        Memory on each GPU that holds values until they have been copied to the host's ring. Taken with the first value
        on that GPU.
    batch_bytes, shard_bytes : int
        Target size of a record batch and of a shard.
    commit_interval_s : float
        How much a crash may lose: a commit follows the first step that ends so long after the last one.
    min_free_bytes : int, optional
        What must stay free on the disk. Before a pass that might not fit above it, with all that is still to be
        written, `DiskSpaceError` is raised, and everything captured so far is committed. 0 stops just before the disk
        is full; None never looks, and a full disk is then a `DrainError` that costs what came since the last commit.
    progress : bool, optional
        Show a line on the standard error stream; None: if it is a terminal.
    quiet : bool
        Leave out the line printed at the end.

    Returns
    -------
    Capture
        A context manager, to be entered once.

    Raises
    ------
    SiteNotFoundError
        If a name matches nothing; it names near misses.
    DatasetExistsError, DatasetNotFoundError
        As `mode` and `overwrite` demand.
    CompiledModelError
        If the model is compiled and split by tensor parallelism.
    CaptureError
        In the other processes of a tensor-parallel group, if the one that writes could not begin.
    ArgumentError
        If another argument is wrong, a site comes after `stop_at_layer`, or no site has a gradient for `backward`.
    """
    if mode not in ("create", "overwrite", "append"):
        raise ArgumentError(f"mode: expected 'create', 'overwrite' or 'append', got {mode!r}")
    if as_flag("overwrite", overwrite) and mode == "append":
        raise ArgumentError("overwrite=True replaces the dataset and mode='append' keeps it: choose one")
    options = Options(
        codec=codec,
        on_full=on_full,
        spill_path=None if spill_path is None else os.path.abspath(spill_path),
        drain=drain,
        stats=check_statistics(stats),
        mode="overwrite" if overwrite else mode,
        rank=own_rank() if rank is None else rank,
        host_ring_bytes=host_ring_bytes,
        gpu_ring_bytes=gpu_ring_bytes,
        batch_bytes=batch_bytes,
        shard_bytes=shard_bytes,
        commit_interval_s=commit_interval_s,
        min_free_bytes=min_free_bytes,
        top_k_logits=top_k_logits,
        backward=as_flag("backward", backward),
        stop_at_layer=stop_at_layer,
        selection=Selection.of(
            phases=phases, every=every, positions=positions, max_rows=max_rows, where=where
        ),
    )
    if attn_pattern not in ("model", "recompute"):
        raise ArgumentError(f"attn_pattern: expected 'model' or 'recompute', got {attn_pattern!r}")
    model = unwrapped(model)
    check_model(model)
    check_tokenizer(tokenizer)
    tags_text(tags)
    model = original(model)
    group = find_group(model, tp_group)
    if group is not None:
        check_not_compiled(model)
    path = target_path(path)
    first_does(group, partial(check_writable, path, rank=options.rank, mode=options.mode))
    return _kind(group)(
        model,
        path,
        sites,
        options,
        channels=channels,
        attn_pattern=attn_pattern,
        tokenizer=tokenizer,
        tags=tags,
        progress=progress,
        quiet=quiet,
        group=group,
    )


class Capture:
    """A capture session, made by `capture`.

    Attributes
    ----------
    path : Path
        The dataset.
    statistics : tuple of str
        Those that are stored.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        path: Path,
        sites: str | Iterable[str],
        options: Options,
        *,
        channels: Any,
        attn_pattern: PatternSource,
        tokenizer: Any,
        tags: Mapping[str, Any] | None,
        progress: bool | None,
        quiet: bool,
        group: Group | None = None,
    ) -> None:
        self.path, self.statistics = path, options.stats
        self._place = (
            path.absolute()
        )  # for the writer: the process may change its directory before it is entered
        self._model, self._options, self._tokenizer, self._tags = model, options, tokenizer, tags
        patterns = as_patterns(sites)
        recompute = attn_pattern == "recompute"
        points = resolve(model, patterns, top_k_logits=options.top_k_logits, recompute_patterns=recompute)
        self._points, self._group = whole_points(model, points, group), group
        self._remarks = remarks(model, patterns, recompute_patterns=recompute)
        self._channels = channels_of(channels, self._points)
        stop = options.stop_at_layer
        if options.backward:
            self._add_gradients()
        self._stop = None if stop is None else Stop(model, self._points, stop)
        if group is not None:
            group.check_alike([point.site for point in points])
        if options.mode == "append":
            first_does(group, self._check_appended)
        self._row_modules = row_modules(model)
        self._show_progress, self._quiet = progress, quiet
        self._state = "ready"
        self._engine: Engine | None = None

    def __enter__(self) -> Self:
        if self._engine is not None:
            raise CaptureError(f"{self.path}: a capture is entered once; make another with mode='append'")
        if self._group is not None:
            check_not_compiled(self._model)
        first_does(self._group, self._begin)
        self._state = "running"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is None:
            raise CaptureError(f"{self.path}: this capture was not entered; use it in a with statement")
        problem: CaptureError | None = None
        self._state = "failed"
        try:
            self._engine.close(error)
            self._state = "closed"
        except DrainError as failure:
            problem = failure
        except CaptureError as failure:  # of an account that does not balance
            self._state, problem = "closed", failure
        if error is not None:
            _add_note(error, f"strapfmt: {problem or self.report.summary()}")
            return
        if not self._quiet:
            sys.stderr.write(f"strapfmt: {self.report.summary()}\n")
        problem = problem or self._never_fired()
        if problem is not None:
            raise problem

    def _add_gradients(self) -> None:
        if self._options.stop_at_layer is not None:
            raise ArgumentError(
                "backward=True: expected passes that end in a loss, but stop_at_layer ends them before; leave one out"
            )
        if self._group is not None:
            raise ArgumentError(
                "backward=True: expected a model that one process has whole, but this one is split over several "
                "(tp_group), and so are its gradients; capture it without them, or in one process"
            )
        if left_out := without_gradient(self._points):
            more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
            self._remarks.append(
                f"{left_out[0]!r}{more}: no gradients, as these values are computed beside the model"
            )
        self._points = with_gradients(self._points)
        self._channels |= {
            site + GRADIENT_SUFFIX: channels
            for site, channels in self._channels.items()
            if site not in left_out
        }

    @property
    def report(self) -> CaptureReport:
        """The account so far, or at the end."""
        hooks = self._engine.hooks if self._engine else None
        drain = self._engine.drain if self._engine else None
        rings = self._engine.rings if self._engine else None
        taps = hooks.taps if hooks else [Tap(point=point, is_head=False) for point in self._points]
        return CaptureReport(
            path=self.path,
            state=self._state,
            sites=tuple(_account(tap, drain.progress if drain else Progress()) for tap in taps),
            n_tokens=hooks.steps.n_tokens if hooks else 0,
            n_steps=hooks.steps.n_steps if hooks else 0,
            n_dropped_steps=hooks.steps.n_dropped_steps if hooks else 0,
            n_abandoned_steps=hooks.steps.n_abandoned_steps if hooks else 0,
            n_paused_passes=hooks.steps.n_paused_passes if hooks else 0,
            n_bytes=drain.progress.n_bytes if drain else 0,
            stall_s=rings.stall_s if rings else 0.0,
            peak_fill=rings.peak_fill if rings else 0.0,
            notes=(*self._remarks, *(_notes(self._engine) if self._engine else ())),
        )

    def tagged(self, tags: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> AbstractContextManager[None]:
        """Give tags to the sequences that begin inside a `with` block, over those of the capture.

        Sequences that branch off (beams, copies of a cache) have the tags of those they come from, those of
        a decoder the tags of the encoder's.

        The tag `"key"` names a piece of work, for `done`: the passes inside are committed together, when the block
        has ended, so that a crash leaves all of them or none. If it ends in an exception, or a pass in it was dropped,
        what was captured stays, and `row_events` says `unfinished` of the first row of its sequences.

        Parameters
        ----------
        tags : mapping, or list of mappings
            JSON values, for all sequences or for each in batch order. Blocks may be nested: the inner one counts.

        Raises
        ------
        ArgumentError
            If `tags` is something else.
        CaptureError
            If it is entered inside a forward pass, or the capture is not running. Inside the block, by a pass in which
            another number of sequences begins than the list has, and by one of a model that is given no tokens.
        """
        return self._running("tagged()").steering.tagged(tags)

    def done(self, key: object) -> bool:
        """Say whether sequences with the tag `"key": key` are in the dataset, whole and committed.

        In this session or an earlier one, by this rank or another as far as it had committed when this was first
        asked. Sequences of a pass that was dropped or abandoned do not count, nor those of a `tagged` block that was
        not carried out. What was captured just now counts from its commit on (`commit_interval_s`).

        Parameters
        ----------
        key : str, int, or another JSON value

        Raises
        ------
        ArgumentError
            If JSON cannot hold the key.
        CaptureError
            If the capture was not entered.
        """
        if self._engine is None:
            raise CaptureError(f"{self.path}: done() reads what the capture has open; enter it first")
        return first_does(self._group, partial(self._engine.steering.done, key))

    def mark(self, name: str, /, **attributes: Any) -> None:
        """Note that the run has reached a point: `cap.mark("phase", name="warm-up")`.

        It is kept with the step under way (the next one, between passes) and the time, committed like everything
        else, and read from `Dataset.marks` or the table `marks` in SQL.

        Parameters
        ----------
        name : str
        **attributes
            JSON values.

        Raises
        ------
        ArgumentError
            If JSON cannot hold it, or the marks of this capture exceed 8 MiB.
        CaptureError
            If the capture is not running.
        """
        self._running("mark()").steering.mark(name, attributes)

    def pause(self) -> None:
        """Record no forward passes until `resume`, nor gradients; passes run as without capture, and are counted.

        Sequences whose cache grows meanwhile go on afterwards at the right positions; `parent_row` of their next row
        is null.

        Raises
        ------
        CaptureError
            If it is called inside a forward pass, or the capture is not running.
        """
        self._running("pause()").hooks.steps.pause()

    def resume(self) -> None:
        """Record forward passes again.

        Raises
        ------
        CaptureError
            If it is called inside a forward pass, or the capture is not running.
        """
        self._running("resume()").hooks.steps.resume()

    def paused(self) -> AbstractContextManager[None]:
        """Pause for the length of a `with` block; one that is paused already stays so."""
        return self._running("paused()").steering.paused()

    @property
    def stats(self) -> CaptureStats:
        """Figures of this moment, at any time and from any thread: `print(cap.stats)`."""
        return self._engine.stats(self._state) if self._engine else CaptureStats(state=self._state)

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record a pass that a CUDA graph will repeat, and store nothing of it.

        ::

            with cap.recording() as recorded, torch.cuda.graph(graph):
                model(**static_inputs)
            with recorded.replay(**static_inputs):
                graph.replay()

        Replays run no Python, so that one outside of `recorded.replay` stores nothing and cannot be noticed.

        Raises
        ------
        CaptureError
            If the capture is not running, or a recording is under way.
        """
        hooks = self._running("recording()").hooks
        with hooks.recording() as values:
            yield Recording(self._model, hooks, values)

    def estimate(self, n_tokens: int) -> Estimate:
        """Estimate the bytes that storing the values of `n_tokens` tokens takes, before any codec."""
        n_tokens = as_integer("n_tokens", n_tokens, least=0)
        known = self._engine.specs if self._engine else {}
        infos = [
            self._channels[info.site].listed(info) if info.site in self._channels else info
            for info in describe(self._model, self._points)
        ]
        return estimate(n_tokens, infos, known, self.statistics)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}: {len(self._points)} sites, {self._state})"

    def _running(self, what: str) -> Engine:
        if self._engine is None or self._state != "running":
            raise CaptureError(
                f"{self.path}: {what} is for a capture that runs, and this one is {self._state}; call it inside the "
                "with block"
            )
        return self._engine

    def _check_appended(self) -> None:
        options, channels = self._options, facts_of(self._channels)
        check_appended(self.path, options.rank, self._points, options.codec, options.stats, channels)

    def _begin(self) -> None:
        self._engine = Engine(
            self._model,
            self._place,
            self._points,
            self._row_modules,
            self._options,
            channels=self._channels,
            stop=self._stop,
            tokenizer=self._tokenizer,
            tags=self._tags,
            progress=self._show_progress,
            group=self._group,
        )

    def _never_fired(self) -> SiteNeverFiredError | None:
        assert self._engine is not None
        taps = self._engine.hooks.taps
        silent = [tap.point.site for tap in taps if not tap.n_calls and tap.gradients is None]
        if not silent:
            return self._no_gradients(taps)
        n_steps, n_paused = self._engine.hooks.steps.n_steps, self._engine.hooks.steps.n_paused_passes
        if n_steps == 0 and n_paused:
            why = f"all {n_paused} forward passes ran while the capture was paused"
        elif n_steps == 0:
            why = (
                f"no forward pass of {type(self._model).__name__} ran inside the with block (calling .forward() "
                "directly runs no hooks)"
            )
        else:
            n_abandoned = self._engine.hooks.steps.n_abandoned_steps
            why = f"the modules were not called in {n_steps - n_abandoned} forward passes"
            if n_abandoned:
                why += f", and {n_abandoned} more ended in an error before or at these sites"
        return SiteNeverFiredError(silent, f"{why}; the dataset is closed: {self.report.summary()}")

    def _no_gradients(self, taps: Sequence[Tap]) -> SiteNeverFiredError | None:
        """Say of which sites values came, but no gradient."""
        silent = {
            tap.point.site: tap.gradients.counts
            for tap in taps
            if tap.gradients is not None and tap.gradients.counts and not tap.n_calls
        }
        if not silent:
            return None
        counts = sum(silent.values(), Counter[str]())
        reasons = {
            "off": "were made with gradients off (torch.no_grad, generate())",
            "constant": "require no gradient (of a frozen model, give it inputs_embeds that do)",
            "awaited": "waited for a backward() inside the with block, of a loss that depends on them",
        }
        why = ", ".join(f"{counts[kind]} {reason}" for kind, reason in reasons.items() if counts[kind])
        return SiteNeverFiredError(
            list(silent), f"of {counts.total()} values {why}; the dataset is closed: {self.report.summary()}"
        )


def _kind(group: Group | None) -> type[Capture]:
    if group is None or group.is_first:
        return Capture
    from strapfmt_capture.following import Follower  # which is a Capture

    return Follower


def _account(tap: Tap, progress: Progress) -> SiteAccount:
    known = tap.layout.spec if tap.layout is not None else None
    return SiteAccount(
        name=tap.point.site,
        module_path=tap.point.module_path,
        dtype=known.dtype if known else None,
        shape=known.shape if known else None,
        row_space=known.row_space if known else None,
        expected=tap.expected,
        written=progress.written.get(tap.point.site, 0),
        dropped=tap.dropped + progress.lost.get(tap.point.site, 0),
        filtered=tap.filtered,
        n_missed=tap.n_missed,
    )


def _notes(engine: Engine) -> list[str]:
    notes = []
    copied = engine.hooks.devices.difference(engine.rings.devices)
    elsewhere = sorted(str(device) for device in copied if device.type != "cpu")
    if elsewhere:
        notes.append(
            f"values on {', '.join(elsewhere)} came to host memory by plain copies, one a site and pass, for which the "
            "device waits"
        )
    if engine.rings.is_pinned is False:
        notes.append(
            "the ring in host memory could not be locked for the GPU, so copies to it are slower; allow more locked "
            "memory (ulimit -l) or lower host_ring_bytes"
        )
    whole = [
        tap.point.of_value.site
        for tap in engine.hooks.taps
        if tap.gradients and tap.gradients.is_whole_numbers
    ]
    if whole:
        notes.append(f"no gradients of whole numbers: {', '.join(whole)}")
    points = [
        tap.point for tap in engine.hooks.taps if tap.layout is not None and tap.layout.ndim is not None
    ]
    if own := [point.site for point in points if point.is_uniform]:
        notes.append(
            f"{len(own)} site(s) such as {own[0]!r} number their own rows, as the model is given no tokens under a "
            "name that is known (input_ids, ...): which token a row belongs to is not stored"
        )
    if engine.hooks.is_at_limit:
        notes.append("max_rows was reached: what the model has run since then has no values")
    if engine.drain.space.note is not None:
        notes.append(engine.drain.space.note)
    if engine.tokenizer is not None and engine.tokenizer.note is not None:
        notes.append(engine.tokenizer.note)
    return notes


def _add_note(error: BaseException, note: str) -> None:
    if not isinstance(error, DrainError):
        error.add_note(note)
