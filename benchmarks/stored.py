"""What a capture has left on disk, and whether it is right: read by the file, compared with plain hooks."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

import strapfmt
from benchmarks import models
from benchmarks.models import Workload

__all__ = ["READERS", "Check", "Reference", "check", "reference"]

#: By site: [n_sequences, n_positions, d_model], or rows in no known order, [n, d_model].
Values = Mapping[str, torch.Tensor]

#: A row counts as right up to this distance from the true one, in parts of its length, by what is stored: another order
#: of additions, a rounding to float16, and a compiled model that rounds to bfloat16 elsewhere stay below it.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What there should be.

    Attributes
    ----------
    workload : Workload
    values : dict of str to torch.Tensor
        By site, [n_sequences, n_positions, d_model].
    tokens : torch.Tensor
        [n_sequences, n_positions].
    """

    workload: Workload
    values: Values
    tokens: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """How what is on disk compares with what should be there.

    Attributes
    ----------
    n_expected, n_rows : int
        Rows over all sites of the system, and those on disk.
    n_wrong : int
        Of those on disk.
    n_exact : int
        Those that are right to the last bit.
    error : float
        The largest distance of a row that is right from the true one, in parts of that one's length.
    """

    n_expected: int
    n_rows: int
    n_wrong: int
    n_exact: int
    error: float

    @property
    def verdict(self) -> str:
        """The values in a few words."""
        if not self.n_rows:
            return "none"
        if self.n_wrong:
            return f"{self.n_wrong:,} wrong"
        return "exact" if self.n_exact == self.n_rows else f"to {self.error:.0e}"


def reference(source: Path, workload: Workload) -> Reference:
    """Run the workload with plain hooks that clone; they are the only thing here that the systems do not share."""
    model = models.load(source, workload.dtype)
    held: dict[str, list[torch.Tensor]] = {}
    values: dict[str, list[torch.Tensor]] = {}
    tokens = []
    with ExitStack() as handles, torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            for place, module in (
                ("attn_out", block.self_attn),
                ("mlp_out", block.mlp),
                ("resid_post", block),
            ):
                hook = partial(_clone, held.setdefault(f"blocks.{layer}.{place}", []))
                handles.callback(module.register_forward_hook(hook).remove)
        for prompts in workload.batches(model.config.vocab_size):
            output = workload.run(model, prompts)
            tokens.append(prompts if workload.phase == "prefill" else output[:, : workload.n_positions])
            for site, parts in held.items():
                values.setdefault(site, []).append(torch.cat(parts, 1))
                parts.clear()
    joined = {site: torch.cat(parts) for site, parts in values.items()}
    return Reference(workload=workload, values=joined, tokens=torch.cat(tokens))


def _clone(parts: list[torch.Tensor], module: object, args: object, output: Any) -> None:
    parts.append((output[0] if isinstance(output, tuple) else output).detach().clone())


def check(path: Path, reader: str, sites: list[str], true: Reference) -> Check:
    """Read what `reader` reads below `path`, and compare every row of `sites`."""
    found = READERS[reader](path, true)
    n_rows = n_wrong = n_exact = 0
    error = 0.0
    for site in sites:
        if site not in found:
            continue
        stored, expected = found[site], true.values[site]
        n_rows += stored[..., 0].numel()
        if stored.shape != expected.shape:
            n_wrong += stored[..., 0].numel()
            continue
        distances = (stored.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
        is_right = distances <= _TOLERANCES[stored.dtype]
        n_wrong += int((~is_right).sum())
        n_exact += int((stored == expected).all(-1).sum()) if stored.dtype == expected.dtype else 0
        error = max(error, float(distances[is_right].max())) if is_right.any() else error
    n_expected = len(sites) * true.workload.n_rows
    return Check(n_expected=n_expected, n_rows=n_rows, n_wrong=n_wrong, n_exact=n_exact, error=error)


def _strapfmt(path: Path, true: Reference) -> Values:
    """Rows go where their token's sequence and position say; a wrong token makes its rows wrong."""
    with strapfmt.open(path / "run.strap") as dataset:
        columns = dataset.tokens.to_arrow(["row", "sequence_id", "position", "token_id"]).columns
        row, sequence, position, token = (column.to_numpy() for column in columns)
        order = np.lexsort((position, sequence))
        shape = tuple(true.tokens.shape)
        if len(row) != true.tokens.numel() or (token[order].reshape(shape) != true.tokens.numpy()).any():
            raise ValueError("the dataset's tokens are not those that the model was given")
        return {name: _placed(dataset[name], row[order], shape) for name in dataset.sites}


def _placed(site: Any, rows: npt.NDArray[np.int64], shape: tuple[int, ...]) -> torch.Tensor:
    if len(site) != len(rows):
        return site.tensor(copy=True)
    return site.take(rows).view(*shape, -1)


def _files(path: Path, suffix: str, read: Callable[[Path], Values]) -> Values:
    """Join files of one batch each."""
    parts = [read(file) for file in sorted(path.glob(f"*{suffix}"))]
    return {site: torch.cat([part[site] for part in parts]) for site in parts[0]} if parts else {}


def _safetensors(path: Path, true: Reference) -> Values:
    from safetensors.torch import load_file

    return _files(path, ".safetensors", load_file)


def _torch(path: Path, true: Reference) -> Values:
    return _files(path, ".pt", partial(torch.load, weights_only=True))


def _raw(path: Path, true: Reference) -> Values:
    """One matrix a block, rows in the order in which the passes gave them."""
    sites = [site for site in true.values if site.endswith("resid_post")]
    sample = true.values[sites[0]]
    data = torch.frombuffer(bytearray((path / "values.raw").read_bytes()), dtype=sample.dtype)
    by_site = data.view(len(sites), true.workload.n_rows, sample.shape[-1])
    return {
        site: _in_place(list(_steps(rows, true)), true) for site, rows in zip(sites, by_site, strict=True)
    }


def _sae_lens(path: Path, true: Reference) -> Values:
    """Hugging Face Arrow streams, a sequence a row, under the path of the module."""
    found: dict[str, list[torch.Tensor]] = {}
    for file in sorted((path / "cache").glob("*.arrow")):
        for batch in pa.ipc.open_stream(pa.memory_map(str(file))):
            for name in batch.schema.names:
                if name.startswith("model.layers."):
                    column = batch.column(name)
                    rows = column.storage if isinstance(column, pa.ExtensionArray) else column
                    flat = rows.flatten().flatten().to_numpy()
                    values = torch.from_numpy(flat.copy()).view(len(rows), true.tokens.shape[1], -1)
                    found.setdefault(f"blocks.{name.removeprefix('model.layers.')}.resid_post", []).append(
                        values
                    )
    return {site: torch.cat(parts) for site, parts in found.items()}


def _stream(codec: str, path: Path, true: Reference) -> Values:
    """STRAP-LLM's packets: the name's length and the data's, name, data; neither shape, dtype, nor order."""
    data, at = (path / "run.stream").read_bytes(), 0
    width = next(iter(true.values.values())).shape[-1]
    packets: dict[str, list[torch.Tensor]] = {}
    while at < len(data):
        n_name, n_data = struct.unpack_from("!HI", data, at)
        name = data[at + 6 : at + 6 + n_name].decode()
        at += 6 + n_name + n_data
        body = data[at - n_data : at]
        if codec != "none":
            body = pa.CompressedInputStream(pa.BufferReader(body), codec).read()
        if name.isdigit():
            rows = torch.frombuffer(bytearray(body), dtype=torch.float16).view(-1, width)
            packets.setdefault(f"blocks.{name}.resid_post", []).append(rows)
    return {site: _in_place(parts, true) for site, parts in packets.items()}


def _steps(rows: torch.Tensor, true: Reference) -> list[torch.Tensor]:
    """Split rows into those of each pass."""
    workload = true.workload
    decoding = [workload.n_sequences] * (workload.n_positions - workload.n_prompt)
    sizes = [workload.n_sequences * workload.n_prompt, *decoding] * workload.n_batches
    return list(torch.split(rows, sizes))


def _in_place(passes: list[torch.Tensor], true: Reference) -> torch.Tensor:
    """Put the rows of passes, in their order, where they belong; leave them as they are if passes are missing."""
    workload = true.workload
    n_steps = 1 + workload.n_positions - workload.n_prompt
    sizes = [len(rows) for rows in passes]
    if len(passes) != n_steps * workload.n_batches or sum(sizes) != workload.n_rows:
        return torch.cat(passes)
    batches = [passes[start : start + n_steps] for start in range(0, len(passes), n_steps)]
    blocks = [
        torch.cat([rows.view(workload.n_sequences, -1, rows.shape[-1]) for rows in batch], 1)
        for batch in batches
    ]
    if any(block.shape[1] != workload.n_positions for block in blocks):
        return torch.cat(passes)  # the passes came in another order
    return torch.cat(blocks)


#: By format: a path and the reference, whose values are not looked at, to what is stored.
READERS: dict[str, Callable[[Path, Reference], Values]] = {
    "strapfmt": _strapfmt,
    "safetensors": _safetensors,
    "torch": _torch,
    "raw": _raw,
    "sae_lens": _sae_lens,
    "stream, none": partial(_stream, "none"),
    "stream, lz4": partial(_stream, "lz4"),
}
