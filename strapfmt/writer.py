"""Writes one rank of a dataset: sites and tables go in, commits come out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

import numpy.typing as npt

from strapfmt import spec
from strapfmt.arguments import as_integer
from strapfmt.claim import claim_rank
from strapfmt.commit import Disk, IoThread, Publisher
from strapfmt.counters import Counters
from strapfmt.errors import ArgumentError, SiteNotFoundError, WriterClosedError
from strapfmt.json_fields import plain_json
from strapfmt.manifest_writer import ManifestWriter, next_manifest
from strapfmt.paths import target_path
from strapfmt.report import SiteCount, WriteSummary
from strapfmt.row_checks import check_columns, check_values
from strapfmt.schema import TABLE_SCHEMAS, SiteSpec
from strapfmt.series import ShardSeries
from strapfmt.session import Session
from strapfmt.site_writer import SiteWriter, TableWriter

__all__ = ["COMMIT_INTERVAL_S", "DatasetWriter"]

Array = npt.NDArray[Any]

COMMIT_INTERVAL_S = 10.0
_QUEUE_BYTES = 64 << 20


class DatasetWriter:
    """Writes one rank of a dataset; all methods but `reserve` belong to one thread.

    Parameters
    ----------
    path : path
        The dataset's directory, whose name ends in `.strap`, or a link to one: what the link leads to is written, or
        overwritten, and the link stays.
    rank : int, optional
        This writer's place among several that write the same dataset. None: the only writer, at rank 0.
    mode : {"create", "overwrite", "append"}
        "create" refuses a rank that exists, "overwrite" replaces it (the whole dataset for an only writer), "append"
        goes on behind what is committed, in new shards.
    batch_bytes, shard_bytes : int
        Target size of a record batch, and the size at which a shard is sealed.
    commit_interval_s : float
        `end_step` commits when this long has passed since the last commit. What is not committed is lost in a crash.
    provenance : mapping, optional
        JSON-ready facts about this session, kept in the manifest.
    disk : Disk, optional
        Where bytes go; tests pass one that fails.

    Raises
    ------
    DatasetExistsError, DatasetNotFoundError
        As `mode` demands.
    WriterConflictError
        If another writer holds this rank.
    WriteError
        If the system refuses (a full disk, no permission); its errno is kept. A new rank is then gone again.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        rank: int | None = None,
        mode: Literal["create", "overwrite", "append"] = "create",
        batch_bytes: int = spec.BATCH_TARGET_BYTES,
        shard_bytes: int = spec.SHARD_TARGET_BYTES,
        commit_interval_s: float = COMMIT_INTERVAL_S,
        provenance: Mapping[str, Any] | None = None,
        disk: Disk | None = None,
    ) -> None:
        if batch_bytes < 1 or shard_bytes < 1 or commit_interval_s < 0:
            raise ArgumentError(
                "batch_bytes and shard_bytes: expected >= 1; commit_interval_s: expected >= 0"
            )
        facts = plain_json(provenance or {}, "provenance")
        self.path, self.rank = target_path(path), rank or 0
        self._commit_interval_s = commit_interval_s
        self._sites: dict[str, SiteWriter] = {}
        self._tables: dict[str, TableWriter] = {}
        self._n_bytes = 0
        self._closed, self._is_torn = "", False
        self._process = os.getpid()
        self._disk, self._io = disk or Disk(), IoThread(_QUEUE_BYTES)
        self._claim = claim_rank(self._disk, self.path, rank, mode)
        self._publisher = Publisher(self._disk, self._claim.check)
        self._manifest = self._claim.manifest
        self._n_steps_before = self._manifest.n_rows_of_table("steps")
        self._specs = {entry.spec.name: entry.spec for entry in self._manifest.sites}
        self._counters = Counters(self.rank, self._manifest.counters)
        try:
            self._begin(facts, batch_bytes, shard_bytes)
        except BaseException:
            self.abort()
            raise

    # What a caller uses.

    @property
    def sites(self) -> Mapping[str, SiteSpec]:
        """The sites declared in this session or before; a view that grows with them."""
        return MappingProxyType(self._specs)

    def reserve(self, kind: Literal["row", "step", "sequence"], n: int) -> int:
        """Return the first of `n` new consecutive ids: `rank << 40 | counter`. Safe from any thread."""
        return self._counters.reserve(kind, n)

    def skip_to(self, counters: Mapping[str, int]) -> None:
        """Never reserve a number below these (by kind, without the rank's bits), as they are used elsewhere."""
        self._counters.skip_to(counters)

    def add_site(self, site: SiteSpec) -> None:
        """Declare a site; again with an equal spec is nothing.

        Raises
        ------
        ArgumentError
            If the name is taken by a different spec, or this version cannot store it.
        """
        self._check_open()
        site.check_known()
        known = self._specs.get(site.name)
        if known is not None and known != site:
            raise ArgumentError(f"site {site.name!r} is declared as {known}; got {site}")
        if site.name not in self._sites:
            self._sites[site.name] = self._session.open_site(site)
            self._specs[site.name] = site

    def write(
        self,
        site: str,
        values: Array,
        *,
        rows: Array | None = None,
        shapes: Array | None = None,
        statistics: Mapping[str, Array] | None = None,
        token_row: Array | None = None,
        call: int | Array | None = None,
    ) -> None:
        """Add rows to a site.

        Parameters
        ----------
        site : str
            A declared site.
        values : ndarray [n_rows, *shape], C-contiguous, of the storage type
            BORROWED until `wait` returns: a thread writes it. For a ragged site: [n_values], all rows one behind the
            other.
        rows : int64 [n_rows], strictly increasing and above all before
            Needed for `row_space` "tokens". A site with its own row space numbers its rows itself, without a gap; rows
            given keep the numbers they had elsewhere.
        shapes : int32 [n_rows, ndim], for ragged sites only
        statistics : {name: [n_rows]}, exactly those of the spec
        token_row : int64 [n_rows], -1 for unknown; for `row_space` "own" only
        call : int or int64 [n_rows], for `row_space` "own" only

        Raises
        ------
        ArgumentError
            If an array is not as described. Nothing of the call is written then.
        WriteError
            If writing failed before.
        """
        self._check_open()
        writer = self._declared(site)
        n_rows = check_values(writer.site, values, shapes)
        columns = check_columns(
            writer.site, n_rows, rows, statistics, token_row, call, writer.last_row, self.rank
        )
        if n_rows == 0:
            return
        with self._undivided():
            self._n_bytes += values.nbytes
            writer.write(values, columns, shapes, self._flush_tables)

    def write_table(self, name: str, columns: Mapping[str, Any]) -> None:
        """Add rows to `tokens`, `sequences`, `steps` or `row_events`: one sequence or array a column, copied.

        Raises
        ------
        ArgumentError
            If a column is not as its table says, or if ids are not of this rank or (but for `row_events`) go back.
        """
        self._check_open()
        if name not in TABLE_SCHEMAS:
            raise ArgumentError(f"table: expected one of {', '.join(TABLE_SCHEMAS)}; got {name!r}")
        self._table(name).write(columns)

    def count(self, site: str, *, expected: int = 0, dropped: int = 0) -> None:
        """Add to a site's counters in the manifest."""
        writer = self._declared(site)
        expected = as_integer(f"site {site!r}: expected", expected, least=0)
        dropped = as_integer(f"site {site!r}: dropped", dropped, least=0)
        writer.expected += expected
        writer.dropped += dropped

    @property
    def counters(self) -> Mapping[str, int]:
        """The next number of each kind, without the rank's bits."""
        return self._counters.numbers

    @property
    def committed_s(self) -> float:
        """When the last commit became durable, in seconds of `time.monotonic`. Safe from any thread."""
        return self._manifests.done_s

    def first_call(self, site: str) -> int:
        """Return a number above every `call` of earlier sessions, as far as each of those has rows."""
        return self._declared(site).first_call

    def mark(self, record: Mapping[str, Any]) -> None:
        """Add a JSON-ready record to the `marks` of this session in the manifest, from the next commit on."""
        self._check_open()
        self._session.mark(record)

    @property
    def n_committed_steps(self) -> int:
        """Rows that this session has added to `steps` and that are durable. Safe from any thread."""
        return self._manifests.n_steps - self._n_steps_before

    def wait(self) -> None:
        """Block until every borrowed buffer has been handed to the system and may be reused."""
        self._check_open()
        self._io.wait()

    def end_step(self) -> None:
        """Say that a step is complete; commits in the background when the interval has passed."""
        self._check_open()
        if time.monotonic() - self._last_commit >= self._commit_interval_s and self._manifests.is_idle:
            self._commit()

    def commit(self) -> None:
        """Make everything so far durable; returns when it is. Call it between steps."""
        self._check_open()
        self._commit()
        self._io.wait()

    def close(self, *, provenance: Mapping[str, Any] | None = None) -> None:
        """Seal every shard, commit a last time and give the rank back. Safe to call twice.

        Parameters
        ----------
        provenance : mapping, optional
            Facts known only at the end, added to the session's.
        """
        if self._closed:
            return
        facts = plain_json(provenance or {}, "provenance")
        try:
            self._check_open()
            self._session.end(facts)
            self._commit(sealing=True)
            self._io.wait()
        except BaseException:
            self.abort()
            raise
        self._end("closed")

    def abort(self) -> None:
        """Stop without committing anything more: what no commit covers is given up, one that has begun is finished.

        Never raises, and is safe to call twice. An exception that a signal raises while it waits passes on; the rank is
        then given back as soon as the disk has answered.
        """
        self._end("aborted")

    def summary(self) -> WriteSummary:
        """Return what was written so far."""
        sites = {
            name: SiteCount(expected=writer.expected, written=writer.written, dropped=writer.dropped)
            for name, writer in self._sites.items()
        }
        return WriteSummary(
            path=self.path,
            n_rows=sum(count.written for count in sites.values()),
            n_bytes=self._n_bytes,
            n_commits=self._manifest.commit,
            sites=sites,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    # Sites, tables and commits.

    def _begin(self, facts: Mapping[str, Any], batch_bytes: int, shard_bytes: int) -> None:
        """Begin a session; its first commit makes a new rank a dataset."""
        self._manifests = ManifestWriter(self._claim.root, self._io, self._publisher)
        self._session = Session(
            self._manifest,
            root=self._claim.root,
            disk=self._disk,
            io=self._io,
            publisher=self._publisher,
            facts=facts,
            batch_bytes=batch_bytes,
            shard_bytes=shard_bytes,
        )
        self._io.submit(self._make_directories)
        self._commit()
        self._io.wait()

    def _declared(self, site: str) -> SiteWriter:
        if site not in self._sites:
            raise SiteNotFoundError(site, self._sites, "this writer (declare it with add_site)")
        return self._sites[site]

    def _make_directories(self) -> None:
        for name in (spec.SITES_DIRECTORY, spec.TABLES_DIRECTORY):
            if not (self._claim.root / name).exists():
                self._disk.mkdir(self._claim.root / name)
        for directory in (self.path, self.path.parent):
            self._disk.sync_directory(directory)

    def _table(self, name: str) -> TableWriter:
        if name not in self._tables:
            self._tables[name] = self._session.open_table(name)
        return self._tables[name]

    def _all_series(self) -> list[ShardSeries]:
        return [
            *(table.series for table in self._tables.values()),
            *(site.series for site in self._sites.values()),
        ]

    def _flush_tables(self) -> None:
        for table in self._tables.values():
            table.flush()

    def _commit(self, *, sealing: bool = False) -> None:
        with self._undivided():
            number = self._manifest.commit + 1
            tables = [table.seal() if sealing else table.commit(number) for table in self._tables.values()]
            sites = [site.seal() if sealing else site.commit(number) for site in self._sites.values()]
            self._manifest = next_manifest(
                self._manifest,
                counters=self._counters.numbers,
                sessions=self._session.entries,
                sites=sites,
                tables=tables,
                is_clean=sealing,
            )
            self._manifests.commit(self._manifest, self._all_series())
            self._last_commit = time.monotonic()

    def _check_open(self) -> None:
        if self._closed:
            raise WriterClosedError(f"{self.path}: this writer was {self._closed}")
        if os.getpid() != self._process:
            raise WriterClosedError(
                f"{self.path}: this writer belongs to process {self._process}, of which this one is a fork; open "
                "another with its own rank= here"
            )
        self._io.check()
        if self._is_torn:
            raise WriterClosedError(
                f"{self.path}: an earlier call was interrupted half way; the last commit stays readable, go on with "
                "abort() and mode='append'"
            )

    @contextmanager
    def _undivided(self) -> Iterator[None]:
        """Accept nothing more once what happens inside was cut short, by a signal or a failure."""
        self._is_torn = True
        yield
        self._is_torn = False

    def _end(self, how: str) -> None:
        self._closed = self._closed or how
        if os.getpid() == self._process:
            self._io.stop(self._let_go)
        else:
            self._let_go()

    def _let_go(self) -> None:
        """Close what is open and give the rank back, when no job runs any more: each whatever becomes of the others."""
        with suppress(OSError), ExitStack() as stack:
            stack.callback(self._claim.release)
            for series in self._all_series():
                stack.callback(series.close)
            stack.callback(self._publisher.close)
