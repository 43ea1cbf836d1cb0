"""strapfmt, what one writes without a library, and the limits of any capture by hooks: all in our own environment."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import strapfmt
from benchmarks import models
from benchmarks.models import resid_post
from benchmarks.peers.worker import Passes, Run, System, each, nothing, serve

__all__ = ["SYSTEMS"]

_PLACES = ("attn_out", "mlp_out", "resid_post")


@contextmanager
def _strapfmt(run: Run, **options: Any) -> Iterator[Passes]:
    sites = [f"blocks.*.{place}" for place in options.pop("places", ("resid_post",))]
    options |= {"sites": sites, "progress": False, "quiet": True}
    with strapfmt.capture(run.model, run.path / "run.strap", **options):
        yield each(lambda number, prompts: run.workload.run(run.model, prompts))


@contextmanager
def _hooks_and_save(run: Run) -> Iterator[Passes]:
    """Keep every block's output, and store it behind every batch."""
    held: dict[str, list[torch.Tensor]] = {site: [] for site in resid_post(run.n_layers)}

    def step(number: int, prompts: torch.Tensor) -> None:
        run.workload.run(run.model, prompts)
        torch.save({site: torch.cat(parts, 1) for site, parts in held.items()}, run.path / f"{number:05}.pt")
        for parts in held.values():
            parts.clear()

    with ExitStack() as handles:
        for site, block in zip(held, run.model.model.layers, strict=True):
            hook = partial(_keep, held[site])
            handles.callback(block.register_forward_hook(hook).remove)
        yield each(step)


def _keep(parts: list[torch.Tensor], module: object, args: object, output: torch.Tensor) -> None:
    parts.append(output.detach().cpu())


@contextmanager
def _output_hidden_states(run: Run) -> Iterator[Passes]:
    options: dict[str, Any] = {"output_hidden_states": True}
    if run.workload.phase == "decode":
        options["return_dict_in_generate"] = True

    def step(number: int, prompts: torch.Tensor) -> None:
        states = run.workload.run(run.model, prompts, **options).hidden_states
        steps = states if run.workload.phase == "decode" else [states]
        tensors = {
            site: torch.cat([held[layer + 1] for held in steps], 1)
            for layer, site in enumerate(resid_post(run.n_layers))
        }
        save_file(tensors, run.path / f"{number:05}.safetensors")

    yield each(step)


def _copy(run: Run, *, is_written: bool) -> Any:
    """Copy every block's output into memory that is there already, and perhaps write that memory at the end."""
    dtype = getattr(torch, run.workload.dtype)
    shape = (run.n_layers, run.workload.n_rows, run.d_model)
    return _copying(run, torch.zeros(shape, dtype=dtype), run.path / "values.raw" if is_written else None)


@contextmanager
def _copying(run: Run, memory: torch.Tensor, path: Path | None) -> Iterator[Passes]:
    ends = [0] * run.n_layers

    def hook(layer: int, module: object, args: object, output: torch.Tensor) -> None:
        start, n_rows = ends[layer], math.prod(output.shape[:-1])
        ends[layer] = start + n_rows
        memory[layer, start : start + n_rows].view(output.shape).copy_(output)

    with ExitStack() as handles:
        for layer, block in enumerate(run.model.model.layers):
            handles.callback(block.register_forward_hook(partial(hook, layer)).remove)
        yield each(lambda number, prompts: run.workload.run(run.model, prompts))
    if path is not None:
        _write(path, memory)


def _write(path: Path, memory: torch.Tensor) -> None:
    left = memoryview(memory.view(torch.uint8).numpy()).cast("B")
    fd = os.open(path, os.O_CREAT | os.O_WRONLY)
    while left:
        left = left[os.write(fd, left) :]
    os.close(fd)


def _load_compiled(source: Path, dtype: str) -> Any:
    model = models.load(source, dtype)
    model.compile()
    return model


def _ours(*, note: str = "", places: Sequence[str] = ("resid_post",), **options: Any) -> System:
    compiled: dict[str, Any] = {}
    if options.pop("is_compiled", False):
        compiled = {"load": _load_compiled, "load_base": _load_compiled, "is_slow": True}
    return System(
        session=partial(_strapfmt, places=places, **options),
        reader="strapfmt",
        places=tuple(places),
        is_durable=True,
        note=note,
        **compiled,
    )


SYSTEMS = {
    "no capture, again": System(session=nothing),
    "limit: copies by hooks": System(session=partial(_copy, is_written=False)),
    "limit: copies, one plain write": System(session=partial(_copy, is_written=True), reader="raw"),
    "strapfmt": _ours(),
    "strapfmt, no statistics": _ours(stats=False),
    "strapfmt, lz4": _ours(codec="lz4"),
    "strapfmt, zstd": _ours(codec="zstd"),
    "strapfmt, process": _ours(drain="process"),
    "strapfmt, compiled model": _ours(
        is_compiled=True, note="beside the same compiled model without capture"
    ),
    "strapfmt, three sites a block": _ours(places=_PLACES),
    "hooks, `torch.save`": System(session=_hooks_and_save, reader="torch"),
    "`output_hidden_states`, safetensors": System(
        session=_output_hidden_states,
        reader="safetensors",
        note="its last state lies behind the final norm: not the last block's residual stream",
    ),
}

if __name__ == "__main__":
    serve(SYSTEMS, ["strapfmt", "torch", "transformers", "safetensors"])
