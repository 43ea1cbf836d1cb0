"""`create`: writes tensors that came from anywhere into a dataset, by the rules of capture but without hooks."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from strapfmt import spec
from strapfmt.arguments import as_integer, as_seconds
from strapfmt.claim import rank_from_environment
from strapfmt.codecs import get_codec
from strapfmt.errors import ArgumentError, StrapfmtError
from strapfmt.report import WriteSummary
from strapfmt.schema import SiteSpec
from strapfmt.writer import COMMIT_INTERVAL_S, DatasetWriter
from strapfmt_capture.arguments import check_tokenizer, tags_text
from strapfmt_capture.given import GivenRows, Tensor
from strapfmt_capture.provenance import describe_tokenizer, describe_versions
from strapfmt_capture.recorder_step import RecorderStep
from strapfmt_capture.statistics import RowStatistics, check_statistics
from strapfmt_capture.token_rows import TokenBook, TokenRows, integers

__all__ = ["Recorder", "create"]

Integers: TypeAlias = npt.ArrayLike | torch.Tensor
_Int64: TypeAlias = npt.NDArray[np.int64]

_PATIENCE_S = 2.0

# The arguments of `Recorder.tokens`.
_DESCRIPTION = ("token_ids", "sequence_id", "position", "n", "phase", "tags")
_PHASES = ("prefill", "decode", "encode")


def create(
    path: str | Path,
    *,
    rank: int | None = None,
    mode: Literal["create", "overwrite", "append"] = "create",
    codec: str = "none",
    stats: bool | Collection[str] = True,
    tags: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    batch_bytes: int = spec.BATCH_TARGET_BYTES,
    shard_bytes: int = spec.SHARD_TARGET_BYTES,
    commit_interval_s: float = COMMIT_INTERVAL_S,
) -> Recorder:
    """Create a dataset to write tensors into.

    ::

        with strapfmt.create("made.strap") as rec:
            tokens = rec.tokens(token_ids=[5, 8, 2])
            rec.write("blocks.0.resid_post", hidden, tokens=tokens)  # [3, d]

    Parameters
    ----------
    path : path
        A directory whose name ends in `.strap`.
    rank : int, optional
        This process's number among several that write one dataset. None: that of the environment variable `RANK`,
        which torchrun sets; without it, the only writer.
    mode : {"create", "overwrite", "append"}
    codec : str
        "none", "lz4" or "zstd".
    stats : bool or collection of str
        Statistics stored with every row: all, none, or some of `strapfmt.spec.STATISTICS`.
    tags : mapping, optional
        JSON values kept with every sequence.
    tokenizer : object, optional
        Turns token ids into text.
    batch_bytes, shard_bytes : int
        Target size of a record batch and of a shard.
    commit_interval_s : float
        How much a crash may lose: a commit follows the first step that ends so long after the last one.

    Raises
    ------
    DatasetExistsError, DatasetNotFoundError
        As `mode` demands.
    ArgumentError
        If another argument is wrong.
    """
    statistics = check_statistics(stats)
    get_codec(codec)
    tags_text(tags)
    check_tokenizer(tokenizer)
    rank = rank_from_environment() if rank is None else as_integer("rank", rank, least=0)
    sizes = {"batch_bytes": batch_bytes, "shard_bytes": shard_bytes}
    sizes = {name: as_integer(name, n_bytes, least=1) for name, n_bytes in sizes.items()}
    provenance = {
        "tool": "strapfmt.create",
        "tokenizer": describe_tokenizer(tokenizer),
        "versions": describe_versions(),
        "options": {"codec": codec, "stats": statistics, "mode": mode},
    }
    writer = DatasetWriter(
        path,
        rank=rank,
        mode=mode,
        batch_bytes=sizes["batch_bytes"],
        shard_bytes=sizes["shard_bytes"],
        commit_interval_s=as_seconds("commit_interval_s", commit_interval_s, may_be_zero=True),
        provenance=provenance,
    )
    return Recorder(writer, codec=codec, statistics=statistics, tags=tags, tokenizer=tokenizer)


class Recorder:
    """Writes tensors into a dataset, in the thread that calls it; made by `create`, closed on exit.

    Rows and values belong to steps: a step begins with the first thing written and ends with `end_step`, which may
    commit. If the `with` block raises, what was written stays, and a step that was not ended is marked abandoned. A
    recorder that is dropped without `close` gives its rank back with a ResourceWarning, and what was committed stays.

    Parameters
    ----------
    writer : DatasetWriter
        The recorder's own from here on.
    codec : str
    statistics : tuple of str
    tags, tokenizer
        As in `create`.
    """

    def __init__(
        self,
        writer: DatasetWriter,
        *,
        codec: str,
        statistics: tuple[str, ...],
        tags: Mapping[str, Any] | None,
        tokenizer: Any,
    ) -> None:
        self.path = writer.path
        self._writer, self._codec, self._names = writer, codec, statistics
        n_sequences = writer.reserve("sequence", 0) & ((1 << spec.RANK_SHIFT) - 1)
        self._book = TokenBook(writer, n_sequences=n_sequences, tokenizer=tokenizer, tags=tags)
        self._statistics = RowStatistics()
        self._next_calls: dict[str, int] = {}
        self._step: RecorderStep | None = None
        self._forgotten = weakref.finalize(self, _release, writer)
        self._forgotten.atexit = False  # the end of the process releases everything by itself

    def tokens(
        self,
        token_ids: Integers | None = None,
        *,
        sequence_id: Integers | None = None,
        position: Integers | None = None,
        n: int | None = None,
        phase: str | Sequence[str] = "prefill",
        tags: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> TokenRows:
        """Describe tokens of the current step, to write values of them at any number of sites.

        Parameters
        ----------
        token_ids : int [n], optional
        sequence_id : int or int [n], optional
            The sequence of each token: numbers of your own choice, or those of an earlier result. None begins one
            sequence that holds all these tokens.
        position : int [n], optional
            Place of each token in its sequence. None goes on behind the last token of each.
        n : int, optional
            How many tokens there are, if nothing else says so.
        phase : {"prefill", "decode", "encode"}, or a sequence of them [n]
            Of all tokens, or of each.
        tags : mapping, optional
            By number, as in `sequence_id`, of sequences that begin here: JSON values kept with them, over those of the
            dataset.

        Returns
        -------
        TokenRows
            A part of it (`tokens[3:5]`, `tokens[mask]`) stands for a part of the tokens.

        Raises
        ------
        ArgumentError
            If the arrays do not fit together.
        """
        phases = [phase] if isinstance(phase, str) else list(phase)
        if strange := [each for each in phases if each not in _PHASES]:
            raise ArgumentError(f"phase: expected 'prefill', 'decode' or 'encode', got {strange[0]!r}")
        if tags and sequence_id is None:
            raise ArgumentError("tags: expected sequence_id beside them, which says whose they are")
        step = self._begin()
        rows = self._book.add(
            step=step.number,
            phase=phase if isinstance(phase, str) else phases,
            token_ids=token_ids,
            sequence_id=sequence_id,
            position=position,
            n=n,
            tags=tags or {},
        )
        step.phase = phases[0] if len(set(phases)) == 1 else "prefill"
        step.rows.append(rows)
        return rows

    def write(
        self,
        site: str,
        values: Tensor | Sequence[Tensor],
        *,
        tokens: TokenRows | Mapping[str, Any] | None = None,
        token_row: Integers | None = None,
        shape: tuple[int, ...] | None = None,
        module_path: str = "",
    ) -> TokenRows | None:
        """Write rows of a site; what it holds is decided by the first call.

        Parameters
        ----------
        site : str
        values : tensor or array [n, *shape], or a list of n tensors
            Copied before the call returns. A list makes a site whose rows differ in shape.
        tokens : TokenRows or mapping, optional
            One token a row, in ascending order: a result of `tokens`, or arguments for it. None: the site numbers
            its rows itself.
        token_row : int [n], optional
            For a site that numbers its rows itself: the row of the token each belongs to, -1 where there is none.
        shape : tuple of int, optional
            Of a row in a list, with -1 for dimensions that vary; by default all do.
        module_path : str
            Where in a model it was taken, if it was.

        Returns
        -------
        TokenRows or None
            The tokens, to be written at other sites too.

        Raises
        ------
        ArgumentError
            If something does not fit: the message names the site, what was expected and what was found.
        """
        rows = GivenRows.of(site, values, shape)
        self._check_tokens(site, tokens, rows.n)
        if tokens is not None and token_row is not None:
            raise ArgumentError(
                f"site {site!r}: token_row is for sites that number their own rows; leave out tokens"
            )
        places = _token_row(site, token_row, rows.n)
        self._book.check_rows(f"site {site!r}: token_row", places[places >= 0])
        declared = self._declared(site, rows, "own" if tokens is None else "tokens", module_path)
        self._begin()
        handle = self.tokens(**{**tokens, "n": rows.n}) if isinstance(tokens, Mapping) else tokens
        self._writer.add_site(declared)
        own: dict[str, Any] = {"rows": None if handle is None else handle.rows}
        if handle is None:
            call = self._next_calls.get(site, self._writer.first_call(site))
            own = {"token_row": places, "call": call}
            self._next_calls[site] = call + (rows.n > 0)
        self._writer.write(
            site,
            rows.stored(),
            shapes=rows.shapes if declared.is_ragged else None,
            statistics=rows.statistics(self._statistics, declared.statistics),
            **own,
        )
        self._writer.count(site, expected=rows.n)
        self._writer.wait()
        return handle

    def end_step(self) -> None:
        """Say that the step is complete: everything before can be committed together."""
        self._end("complete", None)
        self._writer.end_step()

    def commit(self) -> None:
        """End the step and make everything so far durable; returns when it is."""
        self._end("complete", None)
        self._writer.commit()

    def summary(self) -> WriteSummary:
        """Return what was written so far."""
        return self._writer.summary()

    def close(self) -> None:
        """End the step, seal and close the dataset. Safe to call twice."""
        self._end("complete", None)
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self._end("abandoned", f"{type(error).__name__}: {error}"[:500])
            self._close()
            error.add_note(f"strapfmt: {self.path} is closed; it holds what was written before")
        except (StrapfmtError, OSError) as problem:
            self._forgotten.detach()
            self._writer.abort()
            error.add_note(f"strapfmt: {problem}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}: {len(self._writer.sites)} sites)"

    def _close(self) -> None:
        self._forgotten.detach()  # the writer ends here, well or by its own abort
        self._writer.close()

    def _begin(self) -> RecorderStep:
        if self._step is None:
            self._step = RecorderStep(number=self._writer.reserve("step", 1))
        return self._step

    def _end(self, status: str, reason: str | None) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        self._writer.write_table("steps", step.columns(status, reason, self._writer.reserve("row", 0)))
        if status == "abandoned":
            for part in step.rows:
                n = len(part)
                columns = {"row": part.rows, "step": np.full(n, step.number), "event": ["abandoned"] * n}
                self._writer.write_table("row_events", {**columns, "detail": [reason] * n})

    def _check_tokens(self, site: str, tokens: TokenRows | Mapping[str, Any] | None, n: int) -> None:
        """Refuse what does not describe `n` tokens of this dataset."""
        if isinstance(tokens, TokenRows):
            self._book.check(site, tokens)
            if len(tokens) != n:
                raise ArgumentError(f"site {site!r}: expected one row a token, {len(tokens)}; got {n}")
        elif isinstance(tokens, Mapping):
            if unknown := [name for name in tokens if name not in _DESCRIPTION]:
                raise ArgumentError(
                    f"site {site!r}: tokens: expected some of {', '.join(_DESCRIPTION)}; got {unknown[0]!r}"
                )
            if tokens.get("n") is not None and as_integer("n", tokens["n"], least=0) != n:
                raise ArgumentError(f"site {site!r}: expected one row a token, {tokens['n']}; got {n}")
        elif tokens is not None:
            raise ArgumentError(
                f"site {site!r}: tokens: expected a result of tokens(), or a mapping of its arguments "
                f"(tokens={{'token_ids': [...]}}), got {type(tokens).__name__}"
            )

    def _declared(self, site: str, rows: GivenRows, row_space: str, module_path: str) -> SiteSpec:
        """What a site is, or begins to be; values that do not fit it are refused."""
        known = self._writer.sites.get(site)
        if known is None:
            return SiteSpec(
                name=site,
                dtype=rows.dtype,
                shape=rows.shape,
                row_space=row_space,
                codec=self._codec,
                statistics=self._names,
                module_path=module_path,
            )
        expected = (known.dtype, known.is_ragged or known.shape, known.row_space)
        found = (rows.dtype, rows.shapes is not None or rows.shape, row_space)
        fits = len(known.shape) == len(rows.shape) and (not known.is_ragged or rows.fit(known.shape))
        if expected != found or not fits:
            raise ArgumentError(
                f"site {site!r}: expected {known.dtype} rows of shape {known.shape} in row space "
                f"{known.row_space!r}, as written before; got {rows.dtype} {rows.shape} in {row_space!r}"
            )
        return known


def _release(writer: DatasetWriter) -> None:
    """Give back what a recorder held that nobody has closed, and say so; its last commit stays."""
    # In a thread, which is not waited for without end: the collector may run this anywhere, in the I/O thread too.
    thread = threading.Thread(target=writer.abort, name="strapfmt-release", daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)
    warnings.warn(
        f"{writer.path}: this recorder was dropped without close(), what was written since its last commit is lost; "
        "write inside `with strapfmt.create(...) as rec:`",
        ResourceWarning,
        stacklevel=2,
    )


def _token_row(site: str, token_row: Integers | None, n: int) -> _Int64:
    """Rows of tokens, counted from -1 for none."""
    if token_row is None:
        return np.full(n, -1, np.int64)
    rows = integers(f"site {site!r}: token_row", token_row, least=-1)
    if rows.shape != (n,):
        raise ArgumentError(f"site {site!r}: token_row: expected one a row, [{n}], got {list(rows.shape)}")
    return rows
