"""Paths as they were meant: absolute from the moment they are given, whatever the working directory becomes."""

import errno
import os
from pathlib import Path

from strapfmt.errors import ArgumentError

__all__ = ["absolute_path", "target_path"]


def absolute_path(path: str | Path) -> Path:
    """Return a dataset's path as it stays when the process changes its directory.

    Raises
    ------
    ArgumentError
        If it is no path, or none that the system can have.
    """
    try:
        absolute = Path(path).absolute()
    except TypeError:
        raise ArgumentError(f"path: expected text or a Path, got {path!r}") from None
    if problem := _why_impossible(absolute):
        raise ArgumentError(f"path: expected one that can exist, got {_cut(repr(str(path)))}: {problem}")
    return absolute


def target_path(path: str | Path) -> Path:
    """Return where a dataset is written: as `absolute_path`, with a link of that name followed to its end.

    Overwriting then replaces what the link leads to, and the link stays.

    Raises
    ------
    ArgumentError
        As for `absolute_path`; if links lead in a circle.
    """
    path = absolute_path(path)
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise ArgumentError(
            f"path: expected a link to a directory, got {str(path)!r}, which leads back to itself"
        )
    return target


def _why_impossible(path: Path) -> str | None:
    """Return why no file can have this path, by asking the system; None if one can."""
    try:
        os.lstat(path)
    except ValueError as error:  # a NUL, a surrogate
        return str(error)
    except OSError as error:
        return error.strerror if error.errno == errno.ENAMETOOLONG else None
    return None


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"
