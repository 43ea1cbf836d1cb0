"""Opens a dataset: the union of its ranks' manifests, its tables, and its sites as tensors and Arrow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import numpy.typing as npt

from strapfmt import spec
from strapfmt.arguments import as_integer, as_names, integers_of
from strapfmt.errors import (
    ArgumentError,
    CorruptError,
    DatasetChangedError,
    DatasetClosedError,
    UnsupportedError,
)
from strapfmt.manifest import Manifest, Shard, SiteEntry
from strapfmt.marks import Mark, marks_of
from strapfmt.paths import absolute_path
from strapfmt.ranks import read_manifests
from strapfmt.report import RankReport, Report, SiteReport
from strapfmt.schema import TABLE_SCHEMAS, SiteSpec, site_schema
from strapfmt.sequence import SequenceView, Tokens
from strapfmt.shard_reader import ShardReader
from strapfmt.site import Site
from strapfmt.sites_view import SitesView
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
        self._shards: dict[tuple[Any, ...], ShardReader] = {}
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
        before = self._shards
        self._shards = {}
        self._roots = {rank: self.path / spec.RANK_DIRECTORY.format(rank=rank) for rank in manifests}
        sites: dict[str, Site] = {}
        for name, entries in _by_site(manifests).items():
            sites[name] = self._load_site(entries, before)
        tables = {name: self._load_table(name, manifests, before) for name in TABLE_SCHEMAS}
        for shard in self._shards.values():
            if not shard.shard.is_sealed:
                later = (CorruptError,) if is_whole else (CorruptError, DatasetChangedError)
                with contextlib.suppress(*later):  # raised again when it is read
                    shard.pin()
        #: The manifest of each rank.
        self.manifests = manifests
        self._loaded_sites, self._loaded_tables = sites, tables
        self._read_tokens: Tokens | None = None

    def _load_site(
        self, entries: Mapping[int, SiteEntry], before: Mapping[tuple[Any, ...], ShardReader]
    ) -> Site:
        """Return a site whose ranks hold these entries."""
        first = next(iter(entries.values()))
        problem = _unknown(first.spec)
        for rank, entry in entries.items():
            for field in ("dtype", "shape", "row_space", "statistics"):
                here, there = getattr(entry.spec, field), getattr(first.spec, field)
                if here != there:
                    problem = (
                        f"its {field} is {there} in rank {next(iter(entries))} and {here} in rank {rank}, so the ranks "
                        f"are no one tensor; open one rank's files with an Arrow reader, or capture again"
                    )
            if entry.derived_from:
                problem = (
                    f"it is derived from {', '.join(entry.derived_from)}, which this version cannot compute"
                )
        shards: list[ShardReader] = []
        if not problem:
            try:
                shards = self._site_shards(entries, before)
            except UnsupportedError as error:
                problem = str(error)
        site = Site(
            first.spec,
            first.layout,
            shards,
            problem=problem,
            where=str(self.path),
            verify=self.verify == "always",
        )
        site.reopen = self._reopening()
        return site

    def _site_shards(
        self, entries: Mapping[int, SiteEntry], before: Mapping[tuple[Any, ...], ShardReader]
    ) -> list[ShardReader]:
        schema = cache(partial(site_schema, next(iter(entries.values())).spec))
        shards = []
        for rank, entry in entries.items():
            make = partial(ShardReader, schema=schema, site=entry.spec, layout=entry.layout)
            shards += [self._shard(rank, shard, before, make) for shard in entry.shards]
        return shards

    def _load_table(
        self, name: str, manifests: Mapping[int, Manifest], before: Mapping[tuple[Any, ...], ShardReader]
    ) -> TableView:
        schema = TABLE_SCHEMAS[name]
        shards = [
            self._shard(rank, shard, before, partial(ShardReader, schema=lambda: schema))
            for rank, manifest in manifests.items()
            for entry in manifest.tables
            if entry.name == name
            for shard in entry.shards
        ]
        return TableView(name, schema, shards, self._reopening())

    def _shard(
        self,
        rank: int,
        shard: Shard,
        before: Mapping[tuple[Any, ...], ShardReader],
        make: Callable[[Path, Shard], ShardReader],
    ) -> ShardReader:
        """Return the reader of a shard, the same one as long as the shard is the same."""
        key = (rank, *((part.file, part.hash) for part in shard.parts))
        reader = before.get(key) or make(self._roots[rank], shard)
        self._shards[key] = reader
        return reader

    def close(self) -> None:
        """Let go of all maps; tensors and tables that were handed out keep theirs alive."""
        self._shards = {}
        self._loaded_sites, self._loaded_tables, self._read_tokens = {}, {}, None
        self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise DatasetClosedError(f"{self.path}: this dataset was closed; open it again")

    @property
    def _sites(self) -> dict[str, Site]:
        self._check_open()
        return self._loaded_sites

    @property
    def _tables(self) -> dict[str, TableView]:
        self._check_open()
        return self._loaded_tables

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
        self._check_open()
        yield from self._shards.values()

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
            for name, entries in _by_site(self.manifests).items()
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


def _by_site(manifests: Mapping[int, Manifest]) -> dict[str, dict[int, SiteEntry]]:
    """Return the entry of every rank that has one, by site in the order of declaration."""
    found: dict[str, dict[int, SiteEntry]] = {}
    for rank, manifest in manifests.items():
        for entry in manifest.sites:
            found.setdefault(entry.spec.name, {})[rank] = entry
    return found


def _unknown(site: SiteSpec) -> str:
    try:
        site.check_known()
    except ArgumentError as error:
        return f"{error}: install a newer strapfmt"
    return ""


def _common(arrays: Sequence[Array]) -> Array:
    common = arrays[0] if arrays else np.empty(0, np.int64)
    for array in arrays[1:]:
        if not np.array_equal(common, array):
            common = np.intersect1d(common, array, assume_unique=True)
    return common
