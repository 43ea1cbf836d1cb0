"""Opens a dataset: the union of its ranks' manifests, its tables, and its sites as tensors and Arrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from strapfmt.arguments import as_integer, as_names, integers_of
from strapfmt.errors import (
    ArgumentError,
    CorruptError,
    DatasetChangedError,
    DatasetClosedError,
)
from strapfmt.manifest import Manifest
from strapfmt.marks import Mark, marks_of
from strapfmt.paths import absolute_path
from strapfmt.ranks import read_manifests
from strapfmt.report import RankReport, Report, SiteReport
from strapfmt.sequence import SequenceView, Tokens
from strapfmt.shard_reader import ShardReader
from strapfmt.site import Site
from strapfmt.sites_view import SitesView
from strapfmt.state import State, entries_by_site
from strapfmt.table import TableView

if TYPE_CHECKING:
    import torch

__all__ = ["Reader", "TableView"]

Array = npt.NDArray[Any]
Verify = Literal["touch", "always"]
_ATTEMPTS = 20


class Reader:
    """One committed state of a dataset.

    Opening reads the manifests only; nothing grows with the bytes stored. `refresh` moves on to the last commit of
    writers still at work; sites and tables taken before stay as they were.

    Parameters
    ----------
    path : path
    verify : {"touch", "always"}
        "touch": `scan`, `to_arrow` and loaders compare the hash of each record batch when they first touch it;
        `take`, views and SQL check metadata only. "always": these compare hashes too.

    Raises
    ------
    DatasetNotFoundError, CorruptError, UnsupportedError
    """

    def __init__(self, path: str | Path, *, verify: Verify = "touch") -> None:
        if verify not in ("touch", "always"):
            raise ArgumentError(f"verify: expected 'touch' or 'always', got {verify!r}")
        #: Absolute, so that a change of directory means nothing.
        self.path, self.verify = absolute_path(path), verify
        self._is_closed = False
        self._state: State | None = None
        self.refresh()

    # State.

    def refresh(self) -> bool:
        """Move on to the last commit; return whether there was a newer one."""
        self._check_open()
        before, failed = getattr(self, "manifests", None), None
        for attempt in range(_ATTEMPTS):
            manifests, self._pending = read_manifests(self.path)
            if manifests == before:
                return False
            try:
                self._load(manifests, is_whole=manifests != failed)
                return True
            except DatasetChangedError:
                failed = manifests
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _load(self, manifests: dict[int, Manifest], *, is_whole: bool) -> None:
        """Make everything anew; not `is_whole`: no writer moved on, and yet files are missing."""
        state = State(
            self.path,
            manifests,
            earlier={} if self._state is None else self._state.shards,
            verify=self.verify == "always",
            reopen=self._reopening(),
        )
        state.pin((CorruptError,) if is_whole else (CorruptError, DatasetChangedError))
        self._state = state
        #: The manifest of each rank.
        self.manifests = manifests
        self._read_tokens: Tokens | None = None

    def close(self) -> None:
        """Let go of all maps; tensors and tables that were handed out keep theirs alive."""
        self._is_closed = True  # first, as another thread may be reading
        self._state = self._read_tokens = None

    def _check_open(self) -> None:
        if self._is_closed:
            raise self._closed_error()

    def _closed_error(self) -> DatasetClosedError:
        return DatasetClosedError(f"{self.path}: this dataset was closed; open it again")

    @property
    def _loaded(self) -> State:
        state = self._state
        if self._is_closed or state is None:
            raise self._closed_error()
        return state

    @property
    def _sites(self) -> dict[str, Site]:
        return self._loaded.sites

    @property
    def _tables(self) -> dict[str, TableView]:
        return self._loaded.tables

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Sites.

    @property
    def ranks(self) -> list[int]:
        """Ranks with a manifest."""
        return list(self.manifests)

    @property
    def uncommitted_ranks(self) -> list[int]:
        """Ranks whose writer has not committed anything yet."""
        return list(self._pending)

    def shards(self) -> Iterator[ShardReader]:
        """Yield every shard of every table and site, for what looks at files rather than rows."""
        yield from self._loaded.shards.values()

    @property
    def names(self) -> list[str]:
        """Names of the sites, in the order they were declared."""
        return list(self._sites)

    @property
    def sites(self) -> SitesView:
        """The sites by name."""
        return SitesView(self._sites)

    def __getitem__(self, name: str) -> Site:
        return self.sites[name]

    def __contains__(self, name: object) -> bool:
        return name in self._sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def tensors(
        self, names: str | Sequence[str], rows: npt.ArrayLike | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the same tokens of several sites.

        Parameters
        ----------
        names : str or sequence of str
            One site, or several, whose row space is that of the tokens.
        rows : int64 [n], optional
            Row ids. None: all rows that every one of the sites holds.

        Returns
        -------
        rows : int64 tensor [n]
        tensors : dict of str to tensor [n, *shape]
            Views (see `Site.tensor`) where a site is one contiguous body and all its rows are wanted, else copies.
        """
        import torch

        sites = [self[name] for name in as_names("names", names)]
        for site in sites:
            if site.row_space != "tokens":
                raise ArgumentError(
                    f"site {site.name!r} numbers its own rows; join it over its token_row in SQL"
                )
        if rows is None:
            wanted = _common([site.rows for site in sites])
        else:
            wanted = integers_of("rows", rows)
        tensors = {
            site.name: site.tensor() if np.array_equal(site.rows, wanted) else site.take(wanted)
            for site in sites
        }
        return torch.from_numpy(wanted.copy()), tensors

    def sequence(self, sequence_id: int) -> SequenceView:
        """Return the tokens of one sequence in order, following its history over beams and crops.

        Raises
        ------
        ArgumentError
            If there is no such sequence.
        """
        number = as_integer("sequence_id", sequence_id)
        tokens = self.tokens
        if self._read_tokens is None:
            self._read_tokens = Tokens(tokens.to_arrow())
        return SequenceView.of(self, self._read_tokens, number)

    # Tables.

    @property
    def tokens(self) -> TableView:
        """One row per token that a forward pass processed."""
        return self._tables["tokens"]

    @property
    def sequences(self) -> TableView:
        """One row per sequence: prompt and tags."""
        return self._tables["sequences"]

    @property
    def steps(self) -> TableView:
        """One row per forward pass: shape, time, status."""
        return self._tables["steps"]

    @property
    def row_events(self) -> TableView:
        """What became known of rows after they were written."""
        return self._tables["row_events"]

    @property
    def tables(self) -> dict[str, TableView]:
        """All tables by name."""
        return dict(self._tables)

    # Account.

    @property
    def marks(self) -> list[Mark]:
        """Annotations of the runs that wrote it, by rank and in the order of their making.

        Raises
        ------
        CorruptError
            If what a manifest holds as marks is something else.
        """
        self._check_open()
        return marks_of(self.manifests)

    @property
    def report(self) -> Report:
        """What is stored, what is missing, and what has not been verified."""
        ranks = tuple(
            RankReport(
                rank=rank,
                is_clean=manifest.is_clean,
                commit=manifest.commit,
                committed_ns=manifest.committed_ns,
                sessions=manifest.sessions,
            )
            for rank, manifest in self.manifests.items()
        )
        counts = {
            name: [entry.counts for entry in entries.values()]
            for name, entries in entries_by_site(self.manifests).items()
        }
        sites = tuple(
            SiteReport(
                name=site.name,
                dtype=site.dtype,
                shape=site.shape,
                n_rows=site.n_rows,
                n_bytes=site.n_bytes,
                expected=sum(count.expected for count in counts[site.name]),
                written=sum(count.written for count in counts[site.name]),
                dropped=sum(count.dropped for count in counts[site.name]),
                n_unverified_bytes=site.n_unverified_bytes,
            )
            for site in self._sites.values()
        )
        return Report(
            path=self.path,
            ranks=ranks,
            sites=sites,
            n_tokens=len(self.tokens),
            n_sequences=len(self.sequences),
            n_steps=len(self.steps),
            uncommitted_ranks=tuple(self._pending),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopening(), ()

    def _reopening(self) -> Callable[[], Self]:
        """Return what opens the same path anew, in another process too."""
        return partial(type(self), str(self.path), verify=self.verify)

    def __repr__(self) -> str:
        if self._is_closed:
            return f"{type(self).__name__}({str(self.path)!r}: closed)"
        return f"{type(self).__name__}({str(self.path)!r}: {len(self.tokens)} tokens, {len(self)} sites)"


def _common(arrays: Sequence[Array]) -> Array:
    common = arrays[0] if arrays else np.empty(0, np.int64)
    for array in arrays[1:]:
        if not np.array_equal(common, array):
            common = np.intersect1d(common, array, assume_unique=True)
    return common
