"""Small datasets on disk for tests of what reads them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from strapfmt.schema import SiteSpec
from strapfmt.spec import STATISTICS
from strapfmt.writer import DatasetWriter

N_ROWS = 200
PLACES = ("resid_pre", "resid_post")


def stored_bits(values: torch.Tensor) -> np.ndarray:
    """The numbers the writer takes for a tensor."""
    name = str(values.dtype).removeprefix("torch.")
    if name == "bool" or name.startswith("float8"):
        return values.view(torch.uint8).numpy()
    return values.view(torch.uint16).numpy() if name == "bfloat16" else values.numpy()


def statistics_of(values: torch.Tensor) -> dict[str, np.ndarray]:
    """The statistics of every row, over its finite values."""
    flat = values.double().flatten(1)
    finite = torch.where(flat.isfinite(), flat, 0.0)
    figures = {
        "l2_norm": finite.norm(dim=1),
        "mean": finite.mean(dim=1),
        "std": finite.std(dim=1, correction=0),
        "abs_max": finite.abs().amax(dim=1),
        "n_nonfinite": (~flat.isfinite()).sum(dim=1),
    }
    return {
        name: figure.numpy().astype("int32" if name == "n_nonfinite" else "float32")
        for name, figure in figures.items()
    }


def token_columns(rows: np.ndarray, words: Sequence[str]) -> dict[str, object]:
    """A `tokens` table of sequences of 20 tokens each."""
    n = len(rows)
    at = np.arange(n)
    return {
        "row": rows,
        "step": np.zeros(n, np.int64),
        "phase": ["prefill"] * n,
        "batch_index": (at // 20).astype(np.int32),
        "sequence_id": at // 20,
        "position": (at % 20).astype(np.int32),
        "token_id": (at % len(words)).astype(np.int32),
        "token": [words[i % len(words)] for i in range(n)],
        "is_special": at % 20 == 0,
        "parent_row": [None if i % 20 == 0 else int(rows[i - 1]) for i in range(n)],
        "dropped": np.zeros(n, bool),
    }


def write_site(
    writer: DatasetWriter, name: str, values: torch.Tensor, rows: np.ndarray | None, **spec: object
) -> None:
    """Declare a site and write all its rows; `spec` goes into its SiteSpec, `token_row` and `call` to the writer."""
    own = {key: spec.pop(key) for key in ("token_row", "call") if key in spec}
    site = SiteSpec(
        name=name, dtype=str(values.dtype).removeprefix("torch."), shape=tuple(values.shape[1:]), **spec
    )
    writer.add_site(site)
    figures = statistics_of(values) if site.statistics else {}
    figures = {key: figure for key, figure in figures.items() if key in site.statistics}
    writer.write(name, stored_bits(values), rows=rows, statistics=figures, **own)
    writer.wait()


def write_dataset(
    path: Path,
    sites: Mapping[str, torch.Tensor],
    *,
    words: Sequence[str] = ("the", "cat", "sat", "on", "mat"),
    batch_bytes: int = 2048,
    shard_bytes: int = 1 << 30,
    rank: int = 0,
    mode: str = "create",
    **spec: object,
) -> np.ndarray:
    """Write sites that hold every token, and the tokens; return the row ids."""
    n = len(next(iter(sites.values())))
    writer = DatasetWriter(path, rank=rank, mode=mode, batch_bytes=batch_bytes, shard_bytes=shard_bytes)
    rows = np.arange(n) + writer.reserve("row", n)
    for name, values in sites.items():
        write_site(writer, name, values, rows, **spec)
    writer.write_table("tokens", token_columns(rows, words))
    writer.end_step()
    writer.close()
    return rows


def random_values(n: int, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def flip_byte_of(dataset: Path, site: str, part: float) -> None:
    """Change one byte of a site's data file, at this part of its length."""
    (file,) = (dataset / "rank-00000" / "sites" / site).glob("*.arrow")
    data = bytearray(file.read_bytes())
    data[int(len(data) * part)] ^= 1
    file.write_bytes(bytes(data))


assert tuple(statistics_of(torch.ones(1, 1))) == STATISTICS
