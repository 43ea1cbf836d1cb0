"""Accounts of a dataset, for people and programs: what was written, is stored, was found wrong, was rescued."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from strapfmt.text import shown_path, table_of, with_shown_paths

__all__ = [
    "RankReport",
    "RepairReport",
    "Report",
    "SiteCount",
    "SiteRepair",
    "SiteReport",
    "VerifyReport",
    "WriteSummary",
    "shape_text",
    "size_text",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteCount:
    """Rows of one site that should have been, were, and were not written because the ring was full."""

    expected: int
    written: int
    dropped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteSummary:
    """What a writer has done so far.

    Attributes
    ----------
    path : Path
    n_rows : int
        Rows written, summed over sites.
    n_bytes : int
        Bytes of activations handed over, before any codec.
    n_commits : int
    sites : dict of str to SiteCount
    """

    path: Path
    n_rows: int
    n_bytes: int
    n_commits: int
    sites: dict[str, SiteCount]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """One writer's account; `is_clean` is False while it runs and after a crash."""

    rank: int
    is_clean: bool
    commit: int
    committed_ns: int
    sessions: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport:
    """One site's account; `n_bytes` are those of its files."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_rows: int
    n_bytes: int
    expected: int
    written: int
    dropped: int
    n_unverified_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A dataset's account; `str()` of it is for people, `to_dict()` for programs.

    Attributes
    ----------
    path : Path
    ranks : tuple of RankReport
    sites : tuple of SiteReport
    n_tokens, n_sequences, n_steps : int
    uncommitted_ranks : tuple of int
        Ranks that exist and have committed nothing yet.
    """

    path: Path
    ranks: tuple[RankReport, ...]
    sites: tuple[SiteReport, ...]
    n_tokens: int
    n_sequences: int
    n_steps: int
    uncommitted_ranks: tuple[int, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Whether every writer closed."""
        return all(rank.is_clean for rank in self.ranks) and not self.uncommitted_ranks

    @property
    def n_dropped(self) -> int:
        """Rows lost to a full ring, over all sites."""
        return sum(site.dropped for site in self.sites)

    @property
    def n_unverified_bytes(self) -> int:
        """Bytes whose checksums this reader has not compared."""
        return sum(site.n_unverified_bytes for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON-ready values."""
        values = asdict(self)
        values["path"] = str(self.path)
        return values | {
            "is_clean": self.is_clean,
            "n_dropped": self.n_dropped,
            "n_unverified_bytes": self.n_unverified_bytes,
        }

    def __str__(self) -> str:
        n_bytes = sum(site.n_bytes for site in self.sites)
        lines = [
            f"{shown_path(self.path)}: {self.n_tokens:,} tokens in {self.n_sequences:,} sequences and "
            f"{self.n_steps:,} steps, {len(self.sites):,} sites, {size_text(n_bytes)}"
        ]
        lines += [_rank_line(rank) for rank in self.ranks]
        lines += [f"rank {rank}: nothing committed yet" for rank in self.uncommitted_ranks]
        rows = [
            (
                site.name,
                shape_text(site.shape),
                site.dtype,
                f"{site.n_rows:,}",
                f"{site.expected:,}",
                f"{site.dropped:,}",
                size_text(site.n_bytes),
            )
            for site in self.sites
        ]
        lines.append(table_of(("site", "shape", "dtype", "rows", "expected", "dropped", "size"), rows))
        if self.n_unverified_bytes:
            lines.append(
                f"not verified by this reader: {size_text(self.n_unverified_bytes)} (`verify` checks all)"
            )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What `verify` found.

    Attributes
    ----------
    path : Path
    problems : tuple of str
        Everything wrong, each with its file and what was expected. Empty for a sound dataset.
    notes : tuple of str
        What is no damage but worth knowing: a writer that did not close, files that no manifest names.
    n_bytes : int
        Bytes that were compared with their checksums; those of files that could not be opened are left out.
    n_rows : int
        Rows of sites that were read; those of record batches that could not be are left out.
    is_clean : bool
        Whether every writer closed. Not so while one is at work, and after a crash: what is committed may be valid, and
        less than was to be written, or nothing.
    """

    path: Path
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    n_bytes: int
    n_rows: int
    is_clean: bool

    @property
    def valid(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON-ready values."""
        return {
            "path": str(self.path),
            "valid": self.valid,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "n_bytes": self.n_bytes,
            "n_rows": self.n_rows,
            "is_clean": self.is_clean,
        }

    def __str__(self) -> str:
        place = shown_path(self.path)
        lines = [f"{place}: {self._verdict()}; {self.n_rows:,} rows, {size_text(self.n_bytes)} checked"]
        lines += [f"  problem: {with_shown_paths(problem)}" for problem in self.problems]
        lines += [f"  note: {with_shown_paths(note)}" for note in self.notes]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.valid:
            return f"{len(self.problems)} problem(s)"
        if self.is_clean:
            return "valid"
        return "valid, but not closed" if self.n_bytes else "valid, but nothing is committed"


@dataclass(slots=True)
class SiteRepair:
    """What became of one site or table of one rank.

    Attributes
    ----------
    name : str
    rank : int
    n_committed : int or None
        Rows that the manifest had committed, None where no manifest could be used.
    n_rescued : int
        Rows in the new dataset.
    problems : list of str
        What could not be rescued, and why.
    """

    name: str
    rank: int
    n_committed: int | None = 0
    n_rescued: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether every row known to be committed was rescued, and no file was found wrong."""
        return self.n_rescued >= (self.n_committed or 0) and not self.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What `repair` did.

    Attributes
    ----------
    path, out : Path
    sites, tables : tuple of SiteRepair
    problems : tuple of str
        What is wrong with a whole rank, such as a manifest that cannot be used.
    notes : tuple of str
        What is no damage but worth knowing.
    """

    path: Path
    out: Path
    sites: tuple[SiteRepair, ...]
    tables: tuple[SiteRepair, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every committed row was rescued, and no file was found wrong."""
        return not self.problems and all(entry.is_complete for entry in (*self.sites, *self.tables))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON-ready values."""
        shown = [
            {
                "name": entry.name,
                "rank": entry.rank,
                "n_committed": entry.n_committed,
                "n_rescued": entry.n_rescued,
                "problems": entry.problems,
            }
            for entry in (*self.sites, *self.tables)
        ]
        return {
            "path": str(self.path),
            "out": str(self.out),
            "is_complete": self.is_complete,
            "entries": shown,
            "problems": list(self.problems),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        entries = (*self.tables, *self.sites)
        rows = [
            (
                entry.name,
                str(entry.rank),
                "?" if entry.n_committed is None else f"{entry.n_committed:,}",
                f"{entry.n_rescued:,}",
                f"{len(entry.problems):,}",
            )
            for entry in entries
        ]
        problems = [*self.problems, *(problem for entry in entries for problem in entry.problems)]
        lines = [
            f"{shown_path(self.path)} -> {shown_path(self.out)}",
            table_of(("name", "rank", "committed", "rescued", "problems"), rows),
            *(f"  problem: {with_shown_paths(problem)}" for problem in problems),
            *(f"  note: {with_shown_paths(note)}" for note in self.notes),
        ]
        return "\n".join(lines)


def _rank_line(rank: RankReport) -> str:
    state = "closed cleanly" if rank.is_clean else "NOT closed: a writer is at work, or it crashed"
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(rank.committed_ns / 1e9))
    return f"rank {rank.rank}: {state}; commit {rank.commit}, {when}"


def size_text(n_bytes: float) -> str:
    """Return a size for people, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n_bytes) < 1024 or unit == "TiB":
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    raise AssertionError("the last unit always fits")


def shape_text(shape: tuple[int, ...]) -> str:
    """Return a row's shape for people: `8x64`, `8x?` where a size varies, `scalar`."""
    return "x".join("?" if size < 0 else str(size) for size in shape) or "scalar"
