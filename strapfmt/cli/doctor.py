"""The command `doctor`: what this machine can take, what fits it, and what to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from strapfmt.cli.app import JsonOption
from strapfmt.cli.output import console, notes, print_json
from strapfmt.cli.tables import ABSENT, count, print_table
from strapfmt.errors import ArgumentError
from strapfmt.extras import require
from strapfmt.report import size_text
from strapfmt.text import shown_path

if TYPE_CHECKING:
    from strapfmt_capture.machine import Machine

__all__ = ["doctor"]

_SITES = "blocks.*.resid_post"
_BF16_BYTES = 2
_MIN_FREE_BYTES = 20 << 30
_NETWORK = ("nfs", "cifs", "smb", "fuse", "9p", "lustre", "beegfs", "gpfs", "ceph")
_IN_MEMORY = ("tmpfs", "ramfs")


class _Load(NamedTuple):
    """Something to capture."""

    name: str
    sites: str
    token_bytes: int


#: Width and number of blocks of models that people capture.
_KNOWN = (
    ("GPT-2", 768, 12),
    ("Gemma 2 2B", 2_304, 26),
    ("Llama 3.1 8B", 4_096, 32),
    ("Qwen 3 32B", 5_120, 64),
    ("Llama 3.1 70B", 8_192, 80),
)


def doctor(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIRECTORY", help="Where datasets are to be written.", show_default=False),
    ] = Path(),
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Judge this model: 'demo', a folder, or a name on the Hugging Face hub. Only its config is read.",
            show_default=False,
        ),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Sites of it; repeat for more. [default: blocks.*.resid_post]",
            show_default=False,
        ),
    ] = None,
    size_mib: Annotated[
        int, typer.Option(metavar="N", min=8, help="MiB that each measurement of the disk writes.")
    ] = 256,
    as_json: JsonOption = False,
) -> None:
    """Measure what this machine can take, and say what fits.

    Disk, cores and GPUs are measured; then come the models and sites that fit, and what to change.

    It writes to DIRECTORY (default: here) and removes what it wrote. Other work on the machine makes its figures lower.
    """
    if sites and model is None:
        raise ArgumentError("--sites: expected --model NAME, whose sites they are")
    if not directory.is_dir():
        raise ArgumentError(f"{shown_path(directory)}: expected a directory that exists")
    loads = list(_known()) if model is None else list(_asked(model, sites or [_SITES]))
    from strapfmt_capture.machine import examine

    notes().print(f"measuring in {shown_path(directory.absolute())}, some seconds...", style="dim")
    machine = examine(directory.absolute(), n_bytes=size_mib << 20)
    advice = list(_advice(machine))
    if as_json:
        print_json(_document(machine, loads, advice))
    else:
        _show(machine, loads, advice)


def _known() -> Iterator[_Load]:
    for name, width, n_layers in _KNOWN:
        yield _Load(name, "one residual stream", width * _BF16_BYTES)
        yield _Load(name, f"all {n_layers}", width * _BF16_BYTES * n_layers)


def _asked(name: str, sites: list[str]) -> Iterator[_Load]:
    """The sites of a model, which is built without memory."""
    require("transformers", "hf", "loading models")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from strapfmt.cli.models import DEMO_MODEL
    from strapfmt_capture.sites import describe, resolve

    try:
        config = AutoConfig.from_pretrained(str(DEMO_MODEL) if name == "demo" else name)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"--model: {error}") from error
    dtype = getattr(config, "dtype", None) or torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    for pattern in sites:
        infos = describe(model, resolve(model, pattern))
        if unknown := [info.site for info in infos if info.bytes_per_token is None]:
            raise ArgumentError(
                f"--sites: the size of {unknown[0]!r} is not known before it is seen; leave it out"
            )
        yield _Load(name, f"{pattern} ({len(infos)})", sum(info.bytes_per_token or 0 for info in infos))


def _rate(machine: Machine) -> float:
    """Bytes a second that a capture can go on at."""
    pinned = [gpu.to_pinned or gpu.to_pageable or 0.0 for gpu in machine.gpus]
    return min([machine.rates.capture, *pinned])


def _document(machine: Machine, loads: list[_Load], advice: list[str]) -> dict[str, Any]:
    rate = _rate(machine)
    return {
        **asdict(machine),
        "directory": str(machine.directory),
        "fits": [
            {
                "model": load.name,
                "sites": load.sites,
                "bytes_per_token": load.token_bytes,
                "tokens_per_s": rate / load.token_bytes,
                "tokens_until_full": machine.limits.free_bytes // load.token_bytes,
            }
            for load in loads
        ],
        "advice": advice,
    }


def _show(machine: Machine, loads: list[_Load], advice: list[str]) -> None:
    limits, rates, out = machine.limits, machine.rates, console()
    out.print(
        f"{limits.n_cores} cores, {size_text(limits.memory_bytes)} of memory, {len(machine.gpus)} GPUs; "
        f"{size_text(limits.free_bytes)} free on {limits.filesystem}"
    )
    out.print()
    parts = [
        ("captured, durable, with statistics", rates.capture),
        ("without statistics", rates.capture_plain),
        *((f"with codec {name}", rate) for name, rate in rates.codecs.items()),
        ("plain file, durable", rates.disk),
        ("statistics, one core", rates.statistics),
        ("copy in memory, one core", rates.copy),
    ]
    for number, gpu in enumerate(machine.gpus):
        for what, rate in (("locked", gpu.to_pinned), ("other", gpu.to_pageable)):
            parts.append((f"GPU {number} to {what} host memory", rate or 0.0))
    print_table(("rate", "GB/s"), [(name, f"{rate / 1e9:.2f}" if rate else ABSENT) for name, rate in parts])
    out.print(f"a small file is durable after {rates.sync_s * 1e3:.1f} ms")
    out.print()
    rate = _rate(machine)
    print_table(
        ("model", "sites", "bytes/token", "tokens/s", "tokens until the disk is full"),
        [
            (
                load.name,
                load.sites,
                count(load.token_bytes),
                count(int(rate / load.token_bytes)),
                count(limits.free_bytes // load.token_bytes),
            )
            for load in loads
        ],
    )
    out.print()
    for line in advice or ["Nothing to change."]:
        out.print(f"- {line}" if advice else line)


def _advice(machine: Machine) -> Iterator[str]:
    if machine.limits.load > 0.7 * machine.limits.n_cores:
        yield f"other work was running (load {machine.limits.load:.1f}): measure again when it has ended"
    yield from _disk_advice(machine)
    limits, rates = machine.limits, machine.rates
    if rates.capture < 0.8 * rates.capture_plain:
        yield (
            f"statistics cost a part of the rate ({rates.capture / 1e9:.2f} GB/s with, "
            f"{rates.capture_plain / 1e9:.2f} without): pass stats=False, or fewer, where you need none"
        )
    if limits.n_cores < 2:
        yield "there is one core, which the model and the writer share: expect the model to slow down"
    if limits.open_files is not None and limits.open_files < 1_024:
        yield f"only {limits.open_files} files may be open, one a site is needed: raise it (ulimit -Hn)"
    for number, gpu in enumerate(machine.gpus):
        if gpu.to_pinned is None:
            yield (
                f"no memory can be locked for GPU {number}, so copies are slower: see whether memory is short, or the "
                "limit of a container low"
            )
        elif gpu.to_pinned < 4e9:
            yield (
                f"GPU {number} reaches host memory at {gpu.to_pinned / 1e9:.1f} GB/s: check its slot (lspci -vv, width "
                "and speed)"
            )


def _disk_advice(machine: Machine) -> Iterator[str]:
    limits, rates = machine.limits, machine.rates
    if limits.filesystem in _IN_MEMORY:
        yield "this directory is in memory: what is captured here is lost with the machine, and takes its memory"
    if limits.filesystem.startswith(_NETWORK):
        yield (
            f"this is a {limits.filesystem} file system: check that it honours locks (flock) and fsync, or capture to "
            "a local disk and move the dataset afterwards"
        )
    if limits.free_bytes < _MIN_FREE_BYTES:
        yield f"only {size_text(limits.free_bytes)} are free: capture to another disk, or fewer sites"
    if rates.disk < 0.5e9:
        yield f"the disk takes {rates.disk / 1e9:.2f} GB/s: use a local NVMe disk, or fewer sites"
        for name, rate in rates.codecs.items():
            if rate > 1.1 * rates.capture:
                yield (
                    f"codec {name} is quicker here, at {rate / 1e9:.2f} GB/s of random bfloat16 (real activations "
                    "compress better), though what it stores is slower to read"
                )
    if rates.sync_s > 0.1:
        yield f"making a file durable takes {rates.sync_s:.1f} s: raise commit_interval_s, so that commits are rare"
