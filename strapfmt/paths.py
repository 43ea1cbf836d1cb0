"""Paths as they were meant: absolute from the moment they are given, whatever the working directory becomes."""

from pathlib import Path

from strapfmt.errors import ArgumentError

__all__ = ["absolute_path"]


def absolute_path(path: str | Path) -> Path:
    """Return a dataset's path as it stays when the process changes its directory.

    Raises
    ------
    ArgumentError
        If it is no path.
    """
    try:
        return Path(path).absolute()
    except TypeError:
        raise ArgumentError(f"path: expected text or a Path, got {path!r}") from None
