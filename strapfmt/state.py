"""One committed state of a dataset: the sites and tables that the manifests of all its ranks make up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

from strapfmt import spec
from strapfmt.errors import ArgumentError, UnsupportedError
from strapfmt.manifest import Manifest, Shard, SiteEntry
from strapfmt.schema import TABLE_SCHEMAS, SiteSpec, site_schema
from strapfmt.shard_reader import ShardReader
from strapfmt.site import Site
from strapfmt.table import TableView

__all__ = ["ShardReaders", "State", "entries_by_site"]

#: By rank, and by file and hash of each part.
ShardReaders: TypeAlias = dict[tuple[Any, ...], ShardReader]


class State:
    """What manifests say, as sites and tables over shards.

    Parameters
    ----------
    path : Path
        The dataset.
    manifests : mapping of int to Manifest
        By rank.
    earlier : ShardReaders
        Those of the state before, which are used on where a shard is the same.
    verify : bool
        Whether everything that reads a site compares hashes.
    reopen : callable
        Opens the dataset anew, for pickles.

    Attributes
    ----------
    shards : ShardReaders
    sites : dict of str to Site
        In the order they were declared.
    tables : dict of str to TableView
    """

    def __init__(
        self,
        path: Path,
        manifests: Mapping[int, Manifest],
        *,
        earlier: ShardReaders,
        verify: bool,
        reopen: Callable[[], Any],
    ) -> None:
        shards = _Shards(path, manifests, earlier)
        self.sites: dict[str, Site] = {}
        for name, entries in entries_by_site(manifests).items():
            self.sites[name] = site = _site(entries, shards, where=str(path), verify=verify)
            site.reopen = reopen
        self.tables = {
            name: TableView(name, schema, _of_table(name, manifests, shards), reopen)
            for name, schema in TABLE_SCHEMAS.items()
        }
        self.shards = shards.used

    def pin(self, later: tuple[type[Exception], ...]) -> None:
        """Map what a live writer may replace; a failure of the types `later` is raised when that is read."""
        for shard in self.shards.values():
            if not shard.shard.is_sealed:
                with contextlib.suppress(*later):
                    shard.pin()


def entries_by_site(manifests: Mapping[int, Manifest]) -> dict[str, dict[int, SiteEntry]]:
    """Return the entry of every rank that has one, by site in the order of declaration."""
    found: dict[str, dict[int, SiteEntry]] = {}
    for rank, manifest in manifests.items():
        for entry in manifest.sites:
            found.setdefault(entry.spec.name, {})[rank] = entry
    return found


class _Shards:
    """Readers of shards: the same one as long as the shard is the same."""

    def __init__(self, path: Path, manifests: Mapping[int, Manifest], earlier: ShardReaders) -> None:
        self._roots = {rank: path / spec.RANK_DIRECTORY.format(rank=rank) for rank in manifests}
        self._earlier = earlier
        self.used: ShardReaders = {}

    def of(
        self, rank: int, shards: Sequence[Shard], make: Callable[[Path, Shard], ShardReader]
    ) -> list[ShardReader]:
        return [self._reader(rank, shard, make) for shard in shards]

    def _reader(self, rank: int, shard: Shard, make: Callable[[Path, Shard], ShardReader]) -> ShardReader:
        key = (rank, *((part.file, part.hash) for part in shard.parts))
        self.used[key] = reader = self._earlier.get(key) or make(self._roots[rank], shard)
        return reader


def _site(entries: Mapping[int, SiteEntry], shards: _Shards, *, where: str, verify: bool) -> Site:
    """Return a site whose ranks hold these entries."""
    first = next(iter(entries.values()))
    problem = _problem(entries)
    readers: list[ShardReader] = []
    if not problem:
        try:
            readers = _of_site(entries, shards)
        except UnsupportedError as error:
            problem = str(error)
    return Site(first.spec, first.layout, readers, problem=problem, where=where, verify=verify)


def _of_site(entries: Mapping[int, SiteEntry], shards: _Shards) -> list[ShardReader]:
    schema = cache(partial(site_schema, next(iter(entries.values())).spec))
    readers: list[ShardReader] = []
    for rank, entry in entries.items():
        make = partial(ShardReader, schema=schema, site=entry.spec, layout=entry.layout)
        readers += shards.of(rank, entry.shards, make)
    return readers


def _of_table(name: str, manifests: Mapping[int, Manifest], shards: _Shards) -> list[ShardReader]:
    make = partial(ShardReader, schema=lambda: TABLE_SCHEMAS[name])
    return [
        reader
        for rank, manifest in manifests.items()
        for entry in manifest.tables
        if entry.name == name
        for reader in shards.of(rank, entry.shards, make)
    ]


def _problem(entries: Mapping[int, SiteEntry]) -> str:
    """Say why a site cannot be read; "" if it can."""
    first_rank, first = next(iter(entries.items()))
    problem = _unknown(first.spec)
    for rank, entry in entries.items():
        for field in ("dtype", "shape", "row_space", "statistics"):
            here, there = getattr(entry.spec, field), getattr(first.spec, field)
            if here != there:
                problem = (
                    f"its {field} is {there} in rank {first_rank} and {here} in rank {rank}, so the ranks are no one "
                    "tensor; open one rank's files with an Arrow reader, or capture again"
                )
        if entry.derived_from:
            problem = f"it is derived from {', '.join(entry.derived_from)}, which this version cannot compute"
    return problem


def _unknown(site: SiteSpec) -> str:
    try:
        site.check_known()
    except ArgumentError as error:
        return f"{error}: install a newer strapfmt"
    return ""
