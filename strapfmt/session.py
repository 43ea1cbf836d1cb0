"""One session of a writer: its entry in the manifest, and the sites and tables with which it goes on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from strapfmt import spec
from strapfmt.arrowfile import MessageEncoder
from strapfmt.codecs import get_codec
from strapfmt.commit import Disk, IoThread, Publisher, check_open_files
from strapfmt.errors import ArgumentError
from strapfmt.json_fields import plain_json
from strapfmt.layout import body_alignment, plan_layout
from strapfmt.manifest import Counts, Manifest, SiteEntry, file_slug
from strapfmt.row_buffer import BufferPool
from strapfmt.schema import TABLE_SCHEMAS, SiteSpec, site_schema, with_session
from strapfmt.series import ShardSeries
from strapfmt.site_writer import SiteWriter, TableWriter

__all__ = ["Session"]

_POOL_BYTES = 64 << 20


class Session:
    """Goes on behind what a rank has committed, in new shards.

    Parameters
    ----------
    before : Manifest
        What earlier sessions committed.
    root : Path
        The rank's directory.
    disk, io, publisher : Disk, IoThread, Publisher
    facts : mapping
        Provenance, JSON-ready.
    batch_bytes, shard_bytes : int
        As for `DatasetWriter`.
    """

    def __init__(
        self,
        before: Manifest,
        *,
        root: Path,
        disk: Disk,
        io: IoThread,
        publisher: Publisher,
        facts: Mapping[str, Any],
        batch_bytes: int,
        shard_bytes: int,
    ) -> None:
        self._rank = before.rank
        self._earlier, self._number = before.sessions, len(before.sessions)
        self._entry = {**facts, "started_ns": time.time_ns(), "counters": dict(before.counters)}
        self._sites = {entry.spec.name: entry for entry in before.sites}
        self._tables = {entry.name: entry for entry in before.tables}
        #: Sites that lie in the manifest or will.
        self._names = set(self._sites)
        self._n_opened = 0
        self._batch_bytes, self._pool = batch_bytes, BufferPool(_POOL_BYTES)
        self._make_series = partial(
            ShardSeries,
            disk=disk,
            io=io,
            publisher=publisher,
            root=root,
            shard_bytes=shard_bytes,
            session=self._number,
        )

    @property
    def entries(self) -> tuple[Mapping[str, Any], ...]:
        """The sessions of the rank as the manifest lists them, this one last."""
        return (*self._earlier, self._entry)

    def mark(self, record: Mapping[str, Any]) -> None:
        """Add a record to the marks of the session."""
        marks = [*self._entry.get("marks", ()), plain_json(record, "mark")]
        self._entry = {**self._entry, "marks": marks}

    def end(self, facts: Mapping[str, Any]) -> None:
        """Say that the session ends now, and what became known only then."""
        self._entry = {**facts, **self._entry, "ended_ns": time.time_ns()}

    def open_site(self, site: SiteSpec) -> SiteWriter:
        """Open a site behind its rows of earlier sessions.

        Raises
        ------
        ArgumentError
            If a dataset cannot hold so many sites, or this process cannot open so many files.
        """
        self._check_room(site.name)
        entry = self._sites.get(site.name)
        encoder = self._encoder(site_schema(site), site.codec)
        layout = entry.layout if entry else plan_layout(site, encoder.header_bytes(), self._batch_bytes)
        series = self._make_series(
            directory=f"{spec.SITES_DIRECTORY}/{file_slug(site.name)}",
            encoder=encoder,
            codec=site.codec,
            alignment=body_alignment(site, layout),
            done=entry.shards if entry else (),
        )
        self._names.add(site.name)
        self._n_opened += 1
        return SiteWriter(
            site,
            layout,
            series,
            counts=entry.counts if entry else Counts(),
            last_row=_last_row(entry),
            batch_bytes=self._batch_bytes,
            pool=self._pool,
        )

    def open_table(self, name: str) -> TableWriter:
        """Open a table behind its rows of earlier sessions."""
        entry = self._tables.get(name)
        series = self._make_series(
            directory=f"{spec.TABLES_DIRECTORY}/{name}",
            encoder=self._encoder(TABLE_SCHEMAS[name], "none"),
            done=entry.shards if entry else (),
        )
        return TableWriter(name, series, rank=self._rank, counters=self._entry["counters"])

    def _encoder(self, schema: pa.Schema, codec: str) -> MessageEncoder:
        return MessageEncoder(with_session(schema, self._number), get_codec(codec))

    def _check_room(self, name: str) -> None:
        """Refuse a site too many while that costs nothing; found at a commit, it would end the writer."""
        if name not in self._names and len(self._names) >= spec.MAX_SITES:
            raise ArgumentError(
                f"site {name!r}: a dataset holds at most {spec.MAX_SITES} sites; write others to another dataset"
            )
        check_open_files(self._n_opened + len(TABLE_SCHEMAS) + 1, f"site {name!r}")


def _last_row(entry: SiteEntry | None) -> int:
    return -1 if entry is None else max((shard.last_row or 0 for shard in entry.shards), default=-1)
