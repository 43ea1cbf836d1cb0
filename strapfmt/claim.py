"""Gives a writer its rank of a dataset: says whether it may have it, locks it, and finds what is there."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from pathlib import Path

from strapfmt import spec
from strapfmt.commit import Disk, Lock
from strapfmt.errors import (
    ArgumentError,
    DatasetExistsError,
    DatasetNotFoundError,
    UnsupportedError,
    WriterConflictError,
)
from strapfmt.manifest import Manifest
from strapfmt.mapped import read_file
from strapfmt.paths import absolute_path
from strapfmt.text import shown_path

__all__ = ["check_writable", "claim_rank", "discard_rank", "rank_from_environment"]


def claim_rank(disk: Disk, path: Path, rank: int | None, mode: str) -> tuple[Lock, Manifest]:
    """Lock a rank and return what is committed there; a new rank's manifest says commit -1.

    Parameters
    ----------
    disk : Disk
    path : Path
    rank : int or None
        None: the only writer, at rank 0.
    mode : {"create", "overwrite", "append"}

    Raises
    ------
    ArgumentError, DatasetExistsError, DatasetNotFoundError, WriterConflictError, UnsupportedError
    """
    check_writable(path, rank=rank, mode=mode)
    root = path / spec.RANK_DIRECTORY.format(rank=rank or 0)
    if mode == "overwrite":
        _remove(disk, path if rank is None else root, path)
    if mode == "append" and root.exists():
        lock = Lock(root)
        try:
            return lock, _read_manifest(root)
        except BaseException:
            lock.release()
            raise
    _make_directories(disk, path)
    try:
        disk.mkdir(root)
    except FileExistsError:
        Lock(root).release()
        raise DatasetExistsError(_exists_message(path, rank or 0)) from None
    now = time.time_ns()
    return _lock_new(root), Manifest(
        rank=rank or 0,
        writer_id=uuid.uuid4().hex,
        commit=-1,
        is_clean=False,
        created_ns=now,
        committed_ns=now,
    )


def discard_rank(path: Path, rank: int) -> None:
    """Delete a rank that was just made, for a session that could not begin, and the dataset if nothing else is in it.

    Raises
    ------
    WriterConflictError
        If a writer holds it.
    """
    _remove(Disk(), path / spec.RANK_DIRECTORY.format(rank=rank), path)
    with contextlib.suppress(OSError):  # other ranks are there
        path.rmdir()


def _make_directories(disk: Disk, path: Path) -> None:
    """Make the dataset's directory and those above it that are missing, durably."""
    for directory in reversed([each for each in (path, *path.parents) if not each.exists()]):
        with contextlib.suppress(FileExistsError):
            disk.mkdir(directory)
        disk.sync_directory(directory.parent)


def _lock_new(root: Path) -> Lock:
    """Lock a rank just made; somebody who found it taken may hold its lock for a moment, to say who has it."""
    for _ in range(40):
        with contextlib.suppress(WriterConflictError):
            return Lock(root)
        time.sleep(0.005)
    return Lock(root)


def _read_manifest(root: Path) -> Manifest:
    path = root / spec.MANIFEST_NAME
    try:
        manifest = Manifest.decode(read_file(root, spec.MANIFEST_NAME, spec.MAX_MANIFEST_BYTES), str(path))
    except FileNotFoundError:
        raise DatasetNotFoundError(
            f"{root}: nothing was ever committed here; mode='overwrite' starts again"
        ) from None
    if manifest.format_version > spec.FORMAT_VERSION:
        raise UnsupportedError(
            f"{path}: written by format version {manifest.format_version}, to which version {spec.FORMAT_VERSION} must "
            "not append, as it would lose what it does not know: install a newer strapfmt"
        )
    return manifest


def check_writable(path: str | Path, *, rank: int | None = None, mode: str = "create") -> Path:
    """Check, changing nothing, that a writer could be opened; return the path as it stays, absolute.

    Raises
    ------
    ArgumentError, DatasetExistsError, DatasetNotFoundError, WriterConflictError
    """
    path = absolute_path(path)
    if mode not in ("create", "overwrite", "append"):
        raise ArgumentError(f"mode: expected 'create', 'overwrite' or 'append'; got {mode!r}")
    if rank is not None and not 0 <= rank <= spec.MAX_RANK:
        raise ArgumentError(f"rank: expected 0..{spec.MAX_RANK}, got {rank}")
    if path.suffix != spec.DATASET_SUFFIX:
        raise ArgumentError(f"path: a dataset's name ends in {spec.DATASET_SUFFIX!r}; got {str(path)!r}")
    root = path / spec.RANK_DIRECTORY.format(rank=rank or 0)
    if mode == "append" and not (root / spec.MANIFEST_NAME).exists() and (rank is None or not path.is_dir()):
        raise DatasetNotFoundError(f"{path}: no dataset to append to; use mode='create'")
    _check_parents(path)
    _check_directory(path, mode)
    if mode == "create" and (root.exists() or (rank is None and path.exists() and any(path.iterdir()))):
        if (root / spec.LOCK_NAME).exists():
            Lock(root).release()
        raise DatasetExistsError(_exists_message(path, rank or 0))
    return path


def rank_from_environment() -> int | None:
    """Return the number of this process that torchrun gave it, None if it runs alone."""
    text = os.environ.get("RANK")
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ArgumentError(
            f"environment variable RANK: expected a number, got {text!r}; pass rank="
        ) from None


def _exists_message(path: Path, rank: int) -> str:
    """Return what to tell somebody who would create what exists."""
    return (
        f"{shown_path(path)}: rank {rank} of this dataset exists; overwrite=True (mode='overwrite') replaces it, "
        "mode='append' goes on behind it"
    )


def _check_parents(path: Path) -> None:
    """Refuse a place below something that is no directory."""
    nearest = next(parent for parent in path.parents if parent.exists())
    if not nearest.is_dir():
        raise ArgumentError(
            f"path: expected a place in a directory, but {nearest} is a file; got {str(path)!r}"
        )


def _check_directory(path: Path, mode: str) -> None:
    """Refuse to write into what is no dataset, and to delete what does not belong to one."""
    if not path.exists():
        return
    entries = list(path.iterdir()) if path.is_dir() else [path]
    others = [entry.name for entry in entries if not _is_rank(entry)]
    if len(others) == len(entries) > 0:
        raise DatasetExistsError(f"{path}: exists and is no strapfmt dataset; it is never overwritten")
    if others and mode == "overwrite":
        raise DatasetExistsError(
            f"{path}: {others[0]!r} in it is no part of the dataset; move it away to overwrite"
        )


def _is_rank(entry: Path) -> bool:
    return entry.name.startswith("rank-") and entry.is_dir() and not entry.is_symlink()


def _remove(disk: Disk, directory: Path, dataset: Path) -> None:
    """Move what is to be replaced out of the way in one step, then delete it."""
    if not directory.exists():
        return
    ranks = [directory] if directory != dataset else sorted(directory.glob("rank-*"))
    doomed = dataset.with_name(f"{dataset.name}.{uuid.uuid4().hex[:8]}{spec.TMP_SUFFIX}")
    with contextlib.ExitStack() as locks:
        for rank in ranks:
            locks.callback(Lock(rank).release)
        disk.rename(directory, doomed)
        for parent in {directory.parent, doomed.parent}:
            disk.sync_directory(parent)
    shutil.rmtree(doomed)
