"""Files of a benchmark: which there are, and that they are on disk. Needs the standard library only."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["files_below", "n_bytes_below", "sync"]


def files_below(path: Path) -> list[Path]:
    """Return the plain files of a dataset, which may be one file."""
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def n_bytes_below(path: Path) -> int:
    """Return the bytes of those files."""
    return sum(file.stat().st_size for file in files_below(path))


def sync(path: Path) -> None:
    """Make a file, or all below a directory, durable: files first, then the names."""
    directories = [path.parent] if path.is_file() else [path, *(p for p in path.rglob("*") if p.is_dir())]
    for place in (*files_below(path), *directories):
        fd = os.open(place, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
