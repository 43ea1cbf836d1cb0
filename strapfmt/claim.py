"""Says whether a writer may have a path, before anything is touched."""

from __future__ import annotations

from pathlib import Path

from strapfmt import spec
from strapfmt.errors import ArgumentError, DatasetExistsError, DatasetNotFoundError

__all__ = ["check_writable", "exists_message"]


def check_writable(path: str | Path, *, rank: int | None = None, mode: str = "create") -> None:
    """Check, touching nothing, that a writer could be opened.

    Raises
    ------
    ArgumentError, DatasetExistsError, DatasetNotFoundError
    """
    path = Path(path)
    if mode not in ("create", "overwrite", "append"):
        raise ArgumentError(f"mode: expected 'create', 'overwrite' or 'append'; got {mode!r}")
    if rank is not None and not 0 <= rank <= spec.MAX_RANK:
        raise ArgumentError(f"rank: expected 0..{spec.MAX_RANK}, got {rank}")
    if path.suffix != spec.DATASET_SUFFIX:
        raise ArgumentError(f"path: a dataset's name ends in {spec.DATASET_SUFFIX!r}; got {str(path)!r}")
    root = path / spec.RANK_DIRECTORY.format(rank=rank or 0)
    if mode == "append" and not (root / spec.MANIFEST_NAME).exists() and (rank is None or not path.is_dir()):
        raise DatasetNotFoundError(f"{path}: no dataset to append to; use mode='create'")
    if path.exists() and not _is_dataset(path):
        raise DatasetExistsError(f"{path}: exists and is no strapfmt dataset; it is never overwritten")
    if mode == "create" and (root.exists() or (rank is None and path.exists() and any(path.iterdir()))):
        raise DatasetExistsError(exists_message(path, rank or 0))


def exists_message(path: Path, rank: int) -> str:
    """Return what to tell somebody who would create what exists."""
    return (
        f"{path}: rank {rank} of this dataset exists; overwrite=True (mode='overwrite') replaces it, "
        "mode='append' goes on behind it"
    )


def _is_dataset(path: Path) -> bool:
    return path.is_dir() and all(
        entry.name.startswith("rank-") and entry.is_dir() for entry in path.iterdir()
    )
