"""A capture as its user holds it: entered, steered, asked, and closed."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch

from strapfmt.arguments import as_integer
from strapfmt.errors import ArgumentError, CaptureError, DrainError
from strapfmt.text import shown_path
from strapfmt_capture.accounts import CaptureReport, Estimate, estimate
from strapfmt_capture.arguments import check_appended
from strapfmt_capture.channels import channels_of, facts_of
from strapfmt_capture.compiled import check_not_compiled, is_compiled
from strapfmt_capture.engine import Engine, Options
from strapfmt_capture.gradients import compiled_error, with_gradients, without_gradient
from strapfmt_capture.groups import Group, first_does
from strapfmt_capture.hookpoints import GRADIENT_SUFFIX
from strapfmt_capture.live import CaptureStats
from strapfmt_capture.parallel import whole_points
from strapfmt_capture.recording import Recording
from strapfmt_capture.reports import empty_report, report_of, silence_of
from strapfmt_capture.sites import as_patterns, describe, remarks, resolve, row_modules
from strapfmt_capture.stopping import Stop

__all__ = ["Capture", "PatternSource"]

PatternSource = Literal["model", "recompute"]


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
        self._check_channels()
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
        if self._options.backward and is_compiled(self._model):  # since the capture was made
            raise compiled_error()
        first_does(self._group, self._begin)
        atexit.register(self._close_at_exit)
        self._state = "running"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is None:
            raise CaptureError(f"{self.path}: this capture was not entered; use it in a with statement")
        atexit.unregister(self._close_at_exit)
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
        problem = problem or silence_of(self._engine, self.report, type(self._model).__name__)
        if problem is not None:
            raise problem

    def _close_at_exit(self) -> None:
        """Close a capture that the program has left open as it ends: nothing that was captured is lost."""
        if self._engine is None or os.getpid() != self._engine.hooks.steps.process:
            return
        why = "the capture was still open when the program ended, and is closed now; enter it by a with statement"
        sys.stderr.write(f"strapfmt: {shown_path(self.path)}: {why}\n")
        try:
            self.__exit__(None, None, None)
        except CaptureError as problem:
            sys.stderr.write(f"strapfmt: {problem}\n")

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
        if self._engine is None:
            return empty_report(self.path, self._state, self._points, self._remarks)
        return report_of(self._engine, self.path, self._state, self._remarks)

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
            If it is called inside a forward pass, the capture is not running, or a recording is under way.
        """
        hooks = self._running("recording()").hooks
        with hooks.recording() as values:
            yield Recording(self._model, hooks, values)

    def estimate(self, n_tokens: int) -> Estimate:
        """Estimate the bytes that storing the values of `n_tokens` tokens takes, before any codec.

        `n_tokens` are those that are stored: what `phases`, `every`, `positions`, `where` and `max_rows` leave out
        takes nothing.
        """
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

    def _check_channels(self) -> None:
        """Refuse channels that a site does not have, if its shape is known before it fires."""
        for info in describe(self._model, self._points) if self._channels else ():
            channels = self._channels.get(info.site)
            problem = channels.problem(info.shape) if channels and info.shape else None
            if problem is not None:
                raise ArgumentError(f"channels: site {info.site!r}: {problem}")

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


def _add_note(error: BaseException, note: str) -> None:
    if not isinstance(error, DrainError):
        error.add_note(note)
