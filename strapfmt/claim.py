"""Gives a writer its rank of a dataset: says whether it may have it, locks it, and finds what is there."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from strapfmt import spec
from strapfmt.commit import Disk, Lock
from strapfmt.errors import (
    ArgumentError,
    DatasetExistsError,
    DatasetNotFoundError,
    StrapfmtError,
    UnsupportedError,
    WriteError,
    WriterConflictError,
)
from strapfmt.manifest import Manifest
from strapfmt.mapped import read_file
from strapfmt.paths import target_path
from strapfmt.text import shown_path

__all__ = ["Claim", "check_writable", "claim_rank", "discard_rank", "rank_from_environment"]

_DIRECTORIES = (spec.SITES_DIRECTORY, spec.TABLES_DIRECTORY)
_UNPUBLISHED = spec.MANIFEST_NAME + spec.TMP_SUFFIX


class Claim:
    """A rank that one writer holds.

    Parameters
    ----------
    disk : Disk
    lock : Lock
    root : Path
        The rank's directory.
    manifest : Manifest
        What is committed there; that of a new rank says commit -1.
    made : sequence of Path
        Directories made for it, outermost first.
    """

    def __init__(
        self, disk: Disk, lock: Lock, root: Path, manifest: Manifest, made: Sequence[Path] = ()
    ) -> None:
        self._disk, self._lock, self._made = disk, lock, made
        self.root, self.manifest = root, manifest

    def check(self) -> None:
        """Raise `WriterConflictError` if the rank's directory is not the one that was claimed any more."""
        self._lock.check()

    def release(self) -> None:
        """Give the rank back; if nothing was ever committed, remove what was made for it. Safe to call twice."""
        if self._lock.is_held:
            with contextlib.suppress(OSError):
                self._remove_unused()
        self._lock.release()

    def _remove_unused(self) -> None:
        if not _is_unused(self.root):
            return
        for name in (_UNPUBLISHED, spec.LOCK_NAME):
            self._disk.unlink(self.root / name)
        inner = [self.root / name for name in _DIRECTORIES if (self.root / name).exists()]
        _remove_empty(self._disk, [*self._made, self.root, *inner])


def claim_rank(disk: Disk, path: Path, rank: int | None, mode: str) -> Claim:
    """Lock a rank and find what is committed there.

    Parameters
    ----------
    disk : Disk
    path : Path
        As `target_path` returns it.
    rank : int or None
        None: the only writer, at rank 0.
    mode : {"create", "overwrite", "append"}

    Raises
    ------
    ArgumentError, DatasetExistsError, DatasetNotFoundError, WriterConflictError, UnsupportedError
    WriteError
        If the system refuses; its errno is kept.
    """
    check_writable(path, rank=rank, mode=mode)
    root = _root(path, rank)
    with _refusals_told(path):
        if mode == "overwrite":
            _remove(disk, path if rank is None else root, path)
        if mode == "append" and root.exists():
            return _claim_committed(disk, root)
        return _claim_new(disk, path, root, rank or 0)


def _claim_committed(disk: Disk, root: Path) -> Claim:
    lock = Lock(root)
    with _released_on_failure(lock):
        return Claim(disk, lock, root, _read_manifest(root))


def _claim_new(disk: Disk, path: Path, root: Path, rank: int) -> Claim:
    """Make a rank, or take over the directory of a writer that ended before its first commit."""
    made: list[Path] = []
    try:
        _make_directories(disk, path, made)
        lock = _lock_new(disk, root)
    except BaseException:
        _remove_empty(disk, made)
        raise
    with _released_on_failure(lock):
        if not _is_unused(root):
            raise _exists_error(path, root, rank)
        return Claim(disk, lock, root, _new_manifest(rank), made)


@contextlib.contextmanager
def _released_on_failure(lock: Lock) -> Iterator[None]:
    try:
        yield
    except BaseException:
        lock.release()
        raise


def _new_manifest(rank: int) -> Manifest:
    now, writer_id = time.time_ns(), uuid.uuid4().hex
    return Manifest(
        rank=rank, writer_id=writer_id, commit=-1, is_clean=False, created_ns=now, committed_ns=now
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


def _make_directories(disk: Disk, path: Path, made: list[Path]) -> None:
    """Make the dataset's directory and those above it that are missing, durably; add them to `made`."""
    for directory in reversed([each for each in (path, *path.parents) if not each.exists()]):
        with contextlib.suppress(FileExistsError):
            disk.mkdir(directory)
            made.append(directory)
        disk.sync_directory(directory.parent)


def _lock_new(disk: Disk, root: Path) -> Lock:
    """Make a rank's directory, if it is not there, and lock it."""
    try:
        disk.mkdir(root)
    except FileExistsError:
        return Lock(root)
    try:
        return _lock_own(root)
    except BaseException:
        _remove_empty(disk, [root])
        raise


def _lock_own(root: Path) -> Lock:
    """Lock a rank just made; somebody who found it taken may hold its lock for a moment, to say who has it."""
    for _ in range(40):
        with contextlib.suppress(WriterConflictError):
            return Lock(root)
        time.sleep(0.005)
    return Lock(root)


def _remove_empty(disk: Disk, directories: Sequence[Path]) -> None:
    """Remove directories, innermost last in the list, as far as nothing is in them."""
    with contextlib.suppress(OSError):
        for directory in reversed(directories):
            disk.rmdir(directory)


def _is_unused(root: Path) -> bool:
    """Whether a rank's directory holds nothing but what a writer leaves that ended before its first commit."""
    return root.is_dir() and not root.is_symlink() and all(map(_is_leftover, root.iterdir()))


def _is_leftover(entry: Path) -> bool:
    if entry.name in _DIRECTORIES:
        return entry.is_dir() and not entry.is_symlink() and not any(entry.iterdir())
    return entry.name in (spec.LOCK_NAME, _UNPUBLISHED) and entry.is_file() and not entry.is_symlink()


def _read_manifest(root: Path) -> Manifest:
    path = root / spec.MANIFEST_NAME
    try:
        manifest = Manifest.decode(read_file(root, spec.MANIFEST_NAME, spec.MAX_MANIFEST_BYTES), str(path))
    except FileNotFoundError:
        raise _not_found_error(root) from None
    if manifest.format_version > spec.FORMAT_VERSION:
        raise UnsupportedError(
            f"{path}: written by format version {manifest.format_version}, to which version {spec.FORMAT_VERSION} must "
            "not append, as it would lose what it does not know: install a newer strapfmt"
        )
    return manifest


def check_writable(path: str | Path, *, rank: int | None = None, mode: str = "create") -> Path:
    """Check, changing nothing, that a writer could be opened; return where it would write, as `target_path` does.

    Raises
    ------
    ArgumentError, DatasetExistsError, DatasetNotFoundError, WriterConflictError
    WriteError
        If the system refuses to look; its errno is kept.
    """
    path = target_path(path)
    if mode not in ("create", "overwrite", "append"):
        raise ArgumentError(f"mode: expected 'create', 'overwrite' or 'append'; got {mode!r}")
    if rank is not None and not 0 <= rank <= spec.MAX_RANK:
        raise ArgumentError(f"rank: expected 0..{spec.MAX_RANK}, got {rank}")
    if path.suffix != spec.DATASET_SUFFIX:
        raise ArgumentError(f"path: a dataset's name ends in {spec.DATASET_SUFFIX!r}; got {str(path)!r}")
    with _refusals_told(path):
        if mode == "append":
            _check_committed(path, rank)
        _check_parents(path)
        _check_directory(path, mode)
        if mode == "create":
            _check_free(path, rank)
    return path


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


def _check_committed(path: Path, rank: int | None) -> None:
    root = _root(path, rank)
    if not (root / spec.MANIFEST_NAME).exists() and (rank is None or not path.is_dir()):
        raise _not_found_error(root)


def _check_free(path: Path, rank: int | None) -> None:
    root = _root(path, rank)
    others = [entry for entry in path.iterdir() if entry != root] if rank is None and path.exists() else []
    if not others and (_is_unused(root) or not root.exists()):
        return
    if (root / spec.LOCK_NAME).exists():
        with contextlib.suppress(OSError):
            Lock(root).release()
    raise _exists_error(path, root, rank or 0)


def _root(path: Path, rank: int | None) -> Path:
    return path / spec.RANK_DIRECTORY.format(rank=rank or 0)


@contextlib.contextmanager
def _refusals_told(path: Path) -> Iterator[None]:
    """Raise what the system refuses as an error of ours."""
    try:
        yield
    except StrapfmtError:
        raise
    except OSError as error:
        raise WriteError(error, f"{shown_path(path)} was not opened for writing") from error


def _exists_error(path: Path, root: Path, rank: int) -> DatasetExistsError:
    """Return what to tell somebody who would create what exists."""
    if root.exists() and not (root / spec.MANIFEST_NAME).exists() and not _is_unused(root):
        return DatasetExistsError(_lost_manifest(root))
    return DatasetExistsError(
        f"{shown_path(path)}: rank {rank} of this dataset exists; overwrite=True (mode='overwrite') replaces it, "
        "mode='append' goes on behind it"
    )


def _not_found_error(root: Path) -> DatasetNotFoundError:
    """Return what to tell somebody who would append to what is not there."""
    if not root.exists():
        return DatasetNotFoundError(f"{shown_path(root.parent)}: no dataset to append to; use mode='create'")
    if _is_unused(root):
        return DatasetNotFoundError(f"{shown_path(root)}: nothing was ever committed here; use mode='create'")
    return DatasetNotFoundError(_lost_manifest(root))


def _lost_manifest(root: Path) -> str:
    return (
        f"{shown_path(root)}: there are files, but no {spec.MANIFEST_NAME} that says what they are; `strapfmt repair` "
        "rescues what they hold, overwrite=True (mode='overwrite') removes them"
    )


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
