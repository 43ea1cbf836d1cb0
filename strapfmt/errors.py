"""Every exception strapfmt raises on purpose.

::

    StrapfmtError
    ├── FormatError (ValueError)              bytes on disk are not what the specification says
    │   ├── CorruptError                      a checksum, length or Arrow check failed
    │   └── UnsupportedError                  a newer version, an unknown codec that must be understood
    ├── DatasetExistsError (FileExistsError)  the path is taken
    ├── DatasetNotFoundError (FileNotFoundError)
    ├── DatasetChangedError (RuntimeError)    a live writer moved on: call refresh()
    ├── DatasetClosedError (RuntimeError)     read after `close()`
    ├── WriterConflictError (RuntimeError)    two writers claimed one rank
    ├── WriterClosedError (RuntimeError)      used after close or abort
    ├── WriteError (OSError)                  the disk refused; the cause is chained, its errno kept
    ├── SiteNotFoundError (LookupError)       no such site, with near misses
    ├── RowNotFoundError (LookupError)        a row id that this site does not hold
    ├── OrdinalNotFoundError (IndexError)     an ordinal beyond a site's rows
    ├── ViewError (ValueError)                a zero-copy view was demanded and cannot be given
    ├── ArgumentError (ValueError)            an argument is wrong
    ├── QueryError (ValueError)               SQL was refused or failed
    ├── MissingExtraError (ImportError)       an optional package is not installed
    └── CaptureError (RuntimeError)
        ├── SiteNeverFiredError               a requested site produced nothing
        ├── CompiledModelError                compiled code that cannot be followed
        ├── StoppedPassError (AttributeError) logits of a pass that `stop_at_layer` has ended were asked for
        ├── RingFullError                     `on_full="raise"` and the ring is full
        ├── DiskSpaceError (OSError)          stopped before the disk was full; all is committed
        └── DrainError                        the writing side failed; the cause is chained
"""

import difflib
import errno
from collections.abc import Iterable
from functools import partial
from typing import Any

__all__ = [
    "ArgumentError",
    "CaptureError",
    "CompiledModelError",
    "CorruptError",
    "DatasetChangedError",
    "DatasetClosedError",
    "DatasetExistsError",
    "DatasetNotFoundError",
    "DiskSpaceError",
    "DrainError",
    "FormatError",
    "MissingExtraError",
    "OrdinalNotFoundError",
    "QueryError",
    "RingFullError",
    "RowNotFoundError",
    "SiteNeverFiredError",
    "SiteNotFoundError",
    "StoppedPassError",
    "StrapfmtError",
    "UnsupportedError",
    "ViewError",
    "WriteError",
    "WriterClosedError",
    "WriterConflictError",
    "near_misses",
]


class StrapfmtError(Exception):
    """Root of everything raised on purpose."""


class FormatError(StrapfmtError, ValueError):
    """Bytes on disk do not follow the specification.

    Attributes
    ----------
    problems : list of str
        Every problem found, each with its place.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        self.problems = list(problems) or [message]
        super().__init__(message)


class CorruptError(FormatError):
    """A checksum, a length or Arrow's own validation failed."""


class UnsupportedError(FormatError):
    """Written by a newer format, or with a part this version must but cannot understand."""


class DatasetExistsError(StrapfmtError, FileExistsError):
    """Something is already stored at this path (or at this rank of it)."""


class DatasetNotFoundError(StrapfmtError, FileNotFoundError):
    """No dataset at this path."""


class DatasetChangedError(StrapfmtError, RuntimeError):
    """A file not opened yet was replaced, by a live writer or with the whole dataset: call `refresh()`."""


class DatasetClosedError(StrapfmtError, RuntimeError):
    """The dataset was closed before: open it again."""


class WriterConflictError(StrapfmtError, RuntimeError):
    """Another writer holds this rank of the dataset."""


class WriterClosedError(StrapfmtError, RuntimeError):
    """The writer was closed or aborted before."""


class WriteError(StrapfmtError, OSError):
    """Writing failed; nothing more is accepted. `outcome` says what is left, by default the last commit."""

    def __init__(self, cause: BaseException, outcome: str = "the last commit stays readable") -> None:
        message = f"writing stopped after a failure; {outcome}: {type(cause).__name__}: {cause}"
        if isinstance(cause, OSError) and cause.errno is not None:
            super().__init__(cause.errno, message)
        else:
            super().__init__(message)


class SiteNotFoundError(StrapfmtError, LookupError):
    """No such site; `near` holds the closest names, or those that are advised."""

    def __init__(
        self,
        site: str,
        stored: Iterable[str],
        where: str = "this dataset",
        near: Iterable[str] | None = None,
    ) -> None:
        self.site, self.stored = site, list(stored)
        self.near = near_misses(site, self.stored) if near is None else list(near)
        hint = f"; did you mean {', '.join(map(repr, self.near))}?" if self.near else "."
        shown = ", ".join(self.stored[:8]) + (
            f", ... ({len(self.stored)} in all)" if len(self.stored) > 8 else ""
        )
        super().__init__(f"no site {site!r} in {where}{hint} There are: {shown or 'none'}")


class RowNotFoundError(StrapfmtError, LookupError):
    """Row ids that a site does not hold; `missing` lists the first of them."""

    def __init__(self, site: str, missing: Iterable[int]) -> None:
        self.site, self.missing = site, list(missing)
        shown = ", ".join(map(str, self.missing[:5]))
        super().__init__(
            f"site {site!r} holds no row {shown}"
            f"{' ...' if len(self.missing) > 5 else ''} ({len(self.missing)} of the rows asked for are missing); "
            "take() wants row ids as in the `row` column, use site[i:j] for ordinals"
        )


class OrdinalNotFoundError(StrapfmtError, IndexError):
    """Ordinals that a site of `n_rows` rows does not have; `missing` lists the first of them."""

    def __init__(self, site: str, n_rows: int, missing: Iterable[int]) -> None:
        self.site, self.n_rows, self.missing = site, n_rows, list(missing)
        shown = ", ".join(map(str, self.missing[:5]))
        super().__init__(
            f"site {site!r} has {n_rows} rows, got ordinal {shown}{' ...' if len(self.missing) > 5 else ''}; ordinals "
            "count from 0, take() wants row ids as in the `row` column"
        )


class ViewError(StrapfmtError, ValueError):
    """A view without a copy was demanded, and the stored layout cannot give one."""


class ArgumentError(StrapfmtError, ValueError):
    """An argument is wrong; the message says what was expected."""


class QueryError(StrapfmtError, ValueError):
    """SQL was refused or failed."""


class MissingExtraError(StrapfmtError, ImportError):
    """An optional package is missing; the message names the extra to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'strapfmt[{extra}]'")


class CaptureError(StrapfmtError, RuntimeError):
    """Capturing failed."""


class SiteNeverFiredError(CaptureError):
    """A requested site produced no activation during the whole capture."""

    def __init__(self, sites: Iterable[str], why: str) -> None:
        self.sites = list(sites)
        super().__init__(f"requested but never produced: {', '.join(self.sites)}; {why}")


class CompiledModelError(CaptureError):
    """Compiled code, or a CUDA graph, runs the model in a way that cannot be stored right."""


class StoppedPassError(CaptureError, AttributeError):
    """What a forward pass would have returned was asked for, and `stop_at_layer` has ended it before that."""


class RingFullError(CaptureError):
    """The ring buffer is full and `on_full="raise"` was asked for."""


class DiskSpaceError(OSError, CaptureError):
    """The capture stopped before the disk was full; what was captured is committed when its block ends.

    Attributes
    ----------
    errno : int
        `ENOSPC`.
    free_bytes, needed_bytes, min_free_bytes : int
        What was free, what is still to be written (with one more pass), and what was to stay free.
    """

    def __init__(self, path: str, *, free_bytes: int, needed_bytes: int, min_free_bytes: int) -> None:
        self.path, self.free_bytes = path, free_bytes
        self.needed_bytes, self.min_free_bytes = needed_bytes, min_free_bytes
        super().__init__(
            errno.ENOSPC,
            f"{path}: {free_bytes} bytes are free on this disk, {needed_bytes} would be written with one more pass, "
            f"and min_free_bytes={min_free_bytes} are to stay free; capturing stops here and keeps everything before: "
            "free some space and go on with mode='append'",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        figures = {name: getattr(self, name) for name in ("free_bytes", "needed_bytes", "min_free_bytes")}
        return partial(type(self), **figures), (self.path,)


class DrainError(CaptureError):
    """The side that writes failed; the original exception is chained as the cause."""


def near_misses(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Return up to `n` of `known` that look most like `name`."""
    return difflib.get_close_matches(name, list(known), n=n, cutoff=0.5)
