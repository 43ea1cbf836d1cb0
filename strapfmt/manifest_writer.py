"""Writes the manifest of a rank: makes each out of the one before, and publishes it behind all that it names."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from strapfmt import spec
from strapfmt.commit import IoThread, Publisher
from strapfmt.errors import ArgumentError
from strapfmt.manifest import COUNTERS, Manifest, SiteEntry, TableEntry
from strapfmt.series import ShardSeries

__all__ = ["ManifestWriter", "next_manifest"]

#: Files that a commit replaced stay so long for readers that have just read the manifest before.
_GRACE_S = 2.0


def next_manifest(
    last: Manifest,
    *,
    counters: Mapping[str, int],
    sessions: Sequence[Mapping[str, Any]],
    sites: Sequence[SiteEntry],
    tables: Sequence[TableEntry],
    is_clean: bool,
) -> Manifest:
    """Return the manifest of the commit after `last`, in which `sites` and `tables` are new or have changed."""
    return replace(
        last,
        commit=last.commit + 1,
        is_clean=is_clean,
        committed_ns=time.time_ns(),
        counters={kind: counters[kind] for kind in COUNTERS},
        sessions=tuple(sessions),
        sites=tuple({entry.spec.name: entry for entry in (*last.sites, *sites)}.values()),
        tables=tuple({entry.name: entry for entry in (*last.tables, *tables)}.values()),
    )


class ManifestWriter:
    """Publishes manifests in the background, one behind the other.

    Parameters
    ----------
    root : Path
        The rank's directory.
    io, publisher : IoThread, Publisher

    Attributes
    ----------
    n_steps : int
        Rows of the table `steps` in the last manifest that is durable.
    done_s : float
        When that became durable, in seconds of `time.monotonic`.
    """

    def __init__(self, root: Path, io: IoThread, publisher: Publisher) -> None:
        self._path, self._io, self._publisher = root / spec.MANIFEST_NAME, io, publisher
        self._n_begun = self._n_done = self.n_steps = 0
        self.done_s = time.monotonic()

    @property
    def is_idle(self) -> bool:
        """Whether every commit so far is durable."""
        return self._n_done == self._n_begun

    def commit(self, manifest: Manifest, series: Sequence[ShardSeries]) -> None:
        """Schedule the commit of what `series` have scheduled before; `IoThread.wait` returns when it is durable."""
        directories = [each.directory for each in series if each.take_changed()]
        superseded = [path for each in series for path in each.take_superseded()]
        data = manifest.encode()

        def job() -> None:
            # Here, so that a refusal is one of the disk's to the caller: nothing more is accepted.
            _check_limits(manifest, data, self._path)
            self._publisher.commit(self._path, data, directories)
            self._publisher.remove(superseded, after_s=0 if manifest.is_clean else _GRACE_S)
            self.n_steps = manifest.n_rows_of_table("steps")
            self.done_s = time.monotonic()
            self._n_done += 1

        self._n_begun += 1
        self._io.submit(job)


def _check_limits(manifest: Manifest, data: bytes, path: Path) -> None:
    """Refuse to publish what no reader would take."""
    n_shards = max(
        [0, *(len(site.shards) for site in manifest.sites), *(len(table.shards) for table in manifest.tables)]
    )
    for what, n, limit in (
        ("bytes", len(data), spec.MAX_MANIFEST_BYTES),
        ("sites", len(manifest.sites), spec.MAX_SITES),
        ("shards of one site or table", n_shards, spec.MAX_SHARDS),
    ):
        if n > limit:
            raise ArgumentError(
                f"{path}: expected at most {limit} {what}, got {n}; go on in another dataset, with larger shards "
                "(shard_bytes) or less provenance"
            )
