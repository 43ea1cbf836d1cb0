"""What a capture tells of itself: an estimate before, and an account during and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from strapfmt.report import shape_text, size_text
from strapfmt.schema import SiteSpec
from strapfmt.text import shown_path, table_of, visible
from strapfmt_capture.listing import SiteInfo

__all__ = ["CaptureReport", "Estimate", "SiteAccount", "estimate"]

# Of a row of `tokens` without its text; and of `row`, `token_row` and `call` beside a value.
_TOKEN_BYTES = 64
_ROW_BYTES, _OWN_ROW_BYTES = 8, 24
_STATISTIC_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes that capturing a number of tokens takes, before any codec.

    Attributes
    ----------
    n_tokens : int
    n_bytes : int
        Of all sites whose size is known, and the `tokens` table.
    sites : dict of str to int or None
        Bytes of each site; None where a row's size is not known before it is seen, or grows with the context.
    """

    n_tokens: int
    n_bytes: int
    sites: Mapping[str, int | None]

    def __str__(self) -> str:
        rows = [
            (name, "?" if n_bytes is None else size_text(n_bytes)) for name, n_bytes in self.sites.items()
        ]
        n_unknown = sum(n_bytes is None for n_bytes in self.sites.values())
        more = f", and {n_unknown} sites whose size is not known yet" if n_unknown else ""
        head = f"{self.n_tokens} tokens take {size_text(self.n_bytes)} before compression{more}"
        return f"{head}\n{table_of(('site', 'size'), rows)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteAccount:
    """One site: what it holds (None until it fires), what became of its rows, and the passes in which it had none.

    `filtered` rows are those that were not asked for; `expected` are the others.
    """

    name: str
    module_path: str
    dtype: str | None
    shape: tuple[int, ...] | None
    row_space: str | None
    expected: int
    written: int
    dropped: int
    filtered: int
    n_missed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureReport:
    """The account of a capture, so far or at its end; `str()` of it is for people, `to_dict()` for programs.

    Attributes
    ----------
    path : Path
    state : str
        "ready", "running", "closed", or "failed".
    sites : tuple of SiteAccount
    n_tokens, n_steps : int
    n_dropped_steps, n_abandoned_steps : int
        Steps not stored because the ring was full, and steps that ended in an exception.
    n_paused_passes : int
        Forward passes that ran while the capture was paused, which are no steps.
    n_bytes : int
        Bytes of values handed to the writer, before any codec.
    stall_s : float
        How long the model has waited for space in the ring.
    peak_fill : float
        Largest share of the ring in use at a time.
    notes : tuple of str
        What a reader of the account should know.
    """

    path: Path
    state: str
    sites: tuple[SiteAccount, ...]
    n_tokens: int = 0
    n_steps: int = 0
    n_dropped_steps: int = 0
    n_abandoned_steps: int = 0
    n_paused_passes: int = 0
    n_bytes: int = 0
    stall_s: float = 0.0
    peak_fill: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def n_rows(self) -> int:
        """Rows written, over all sites."""
        return sum(site.written for site in self.sites)

    @property
    def n_dropped(self) -> int:
        """Rows not stored because the ring was full, over all sites."""
        return sum(site.dropped for site in self.sites)

    @property
    def n_filtered(self) -> int:
        """Rows that were not asked for (`phases`, `every`, `positions`, `where`, `max_rows`), over all sites."""
        return sum(site.filtered for site in self.sites)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON-ready values."""
        totals = {"n_rows": self.n_rows, "n_dropped": self.n_dropped, "n_filtered": self.n_filtered}
        return {**asdict(self), "path": str(self.path), **totals}

    def summary(self) -> str:
        """Return one line: path, rows, and what was dropped and where."""
        line = (
            f"{shown_path(self.path)}: {self.n_rows} rows of {len(self.sites)} sites from {self.n_tokens} tokens "
            f"({size_text(self.n_bytes)}), {self.n_dropped} dropped"
        )
        if self.n_filtered:
            line += f", {self.n_filtered} not asked for"
            line += "" if any(site.expected for site in self.sites) else ", which is all of them"
        if self.state == "failed":
            line += "; writing FAILED, and only what was committed before is there"
        if self.n_dropped:
            where = [visible(site.name) for site in self.sites if site.dropped]
            more = f" and {len(where) - 3} more" if len(where) > 3 else ""
            line += f" in {self.n_dropped_steps} of {self.n_steps} steps (at {', '.join(where[:3])}{more})"
        return line + "".join(f"; {note}" for note in self._missed()[:1])

    def _missed(self) -> list[str]:
        """Say which sites did not fire in every pass; the most missing first."""
        missed = sorted((site for site in self.sites if site.n_missed), key=lambda site: -site.n_missed)
        return [
            f"{visible(site.name)!r} did not fire in {site.n_missed} of {self.n_steps} passes"
            for site in missed
        ]

    def __str__(self) -> str:
        counts = ("expected", "written", "dropped", *(("filtered",) if self.n_filtered else ()))
        rows = [
            (
                site.name,
                "not seen yet" if site.shape is None else shape_text(site.shape),
                site.dtype or "",
                *(str(getattr(site, count)) for count in counts),
            )
            for site in self.sites
        ]
        lines = [
            f"{self.summary()}; {self.state}",
            table_of(("site", "shape", "dtype", *counts), rows),
            f"{self.n_steps} steps, {self.n_dropped_steps} dropped, {self.n_abandoned_steps} abandoned"
            f"{f', {self.n_paused_passes} more passes while paused' if self.n_paused_passes else ''}; the model "
            f"waited {self.stall_s:.3f} s for the ring, whose peak was {self.peak_fill:.0%}",
        ]
        return "\n".join([*lines, *self._missed(), *self.notes])


def estimate(
    n_tokens: int, infos: Sequence[SiteInfo], known: Mapping[str, SiteSpec], statistics: tuple[str, ...]
) -> Estimate:
    """Estimate the bytes of `n_tokens` tokens; `known` says more of sites that have fired."""
    sites: dict[str, int | None] = {}
    for info in infos:
        spec = known.get(info.site)
        if spec is not None and not spec.is_ragged:
            row_bytes: int | None = spec.row_bytes
        else:
            row_bytes = None if spec is not None else info.bytes_per_token
        beside = _ROW_BYTES if spec is None or spec.row_space == "tokens" else _OWN_ROW_BYTES
        beside += _STATISTIC_BYTES * len(statistics)
        sites[info.site] = None if row_bytes is None else n_tokens * (row_bytes + beside)
    n_bytes = sum(size or 0 for size in sites.values()) + n_tokens * _TOKEN_BYTES
    return Estimate(n_tokens=n_tokens, n_bytes=n_bytes, sites=sites)
