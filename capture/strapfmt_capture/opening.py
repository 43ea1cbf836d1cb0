"""`capture`: every argument checked, and a session made of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from strapfmt import spec
from strapfmt.claim import check_writable
from strapfmt.errors import ArgumentError
from strapfmt.paths import target_path
from strapfmt.writer import COMMIT_INTERVAL_S
from strapfmt_capture.arguments import (
    as_flag,
    check_model,
    check_tokenizer,
    tags_text,
)
from strapfmt_capture.compiled import check_not_compiled, is_compiled, original
from strapfmt_capture.device_ring import GPU_RING_BYTES
from strapfmt_capture.engine import DrainKind, Mode, Options
from strapfmt_capture.following import Follower
from strapfmt_capture.gradients import compiled_error
from strapfmt_capture.groups import Group, find_group, first_does, own_rank
from strapfmt_capture.ring import RING_BYTES
from strapfmt_capture.selection import Positions, Selection, TokenColumns
from strapfmt_capture.session import Capture, PatternSource
from strapfmt_capture.statistics import check_statistics
from strapfmt_capture.steps import OnFull
from strapfmt_capture.wrappers import unwrapped

__all__ = ["capture"]


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
        row that some site has a value of.
    positions : slice, int, collection of int, or "last", optional
        Store values of tokens at these positions of their sequence, as an index into the sequence as it is after the
        pass, padding left out: `slice(0, 4)`, `[0, -1]`; "last" is -1, the last token of each sequence in the pass.
    where : callable, optional
        Store values of tokens of which this says so: it is given the tokens of each pass, with arrays `position`,
        `token_id`, `token`, `is_special`, `sequence_id`, `batch_index` and `row`, and returns bool `[n_rows]`.
    max_rows : int, optional
        Store values of the first so many of the tokens that are left, and no more; the model goes on. The pass that
        reaches it is cut to the row. A token counts if some site has a value of it: with `logits` alone, `generate`
        stores so many rows of them, though it makes none of a prompt but of its last token. Beside other sites, whose
        rows are of every token, logits have fewer rows than these.
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
        written, `DiskSpaceError` is raised, and everything captured so far is committed. A pass is taken to be as large
        as the largest so far, or as its tokens make it at the sites that have fired before, if that is more: what the
        first pass takes, and sites that number their own rows, cannot be foreseen. 0 stops just before the disk is
        full; None never looks, and a full disk is then a `DrainError` that costs what came since the last commit.
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
        If the model is compiled, and `backward` is asked for or it is split by tensor parallelism; when the result is
        entered, if it has been compiled meanwhile.
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
    if options.backward and is_compiled(model):
        raise compiled_error()
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


def _kind(group: Group | None) -> type[Capture]:
    return Capture if group is None or group.is_first else Follower
