"""Rescues what lies on disk into a new dataset: the committed rows, and complete record batches beyond them.

Nothing is changed in place. Where a manifest or an index is damaged, the shards speak for themselves: each begins with
a schema that names its site and session, and each record batch carries hashes of its header and its body.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy.typing as npt

from strapfmt import spec
from strapfmt.errors import (
    ArgumentError,
    DatasetExistsError,
    DatasetNotFoundError,
    FormatError,
    StrapfmtError,
    WriteError,
    WriterConflictError,
)
from strapfmt.manifest import COUNTERS, Manifest, SiteEntry, TableEntry, file_slug
from strapfmt.mapped import read_file
from strapfmt.paths import absolute_path
from strapfmt.report import RepairReport, SiteRepair
from strapfmt.rescue import IdColumn, RescueTarget
from strapfmt.salvage import LINK, Stream, lost_files, open_streams, reading
from strapfmt.schema import TABLE_SCHEMAS, SiteSpec, read_site
from strapfmt.unfinished import UnfinishedSteps
from strapfmt.writer import DatasetWriter

__all__ = ["RepairReport", "SiteRepair", "repair"]

Array = npt.NDArray[Any]
_NO_LIMIT = 1 << 62


def repair(
    path: str | Path, out: str | Path, *, progress: Callable[[int, int], None] | None = None
) -> RepairReport:
    """Rescue a dataset into a new one at `out`.

    Row ids, sites, tables and provenance are kept. A step that a crash cut, of which only tokens are
    left, gets a row in `steps` with status "abandoned". The new dataset is closed cleanly.

    Parameters
    ----------
    path : path
        The damaged or unfinished dataset; it is only read.
    out : path
        A new dataset, outside `path`.
    progress : callable, optional
        Called with the bytes of data files read so far and in all.

    Returns
    -------
    RepairReport

    Raises
    ------
    DatasetNotFoundError
        If there is nothing to rescue at `path`.
    DatasetExistsError
        If `out` exists.
    ArgumentError
        If `out` lies inside `path`.
    WriteError
        If the new dataset cannot be written, as on a full disk. Nothing of it is left then.
    """
    path, out = absolute_path(path), absolute_path(out)
    ranks = _ranks(path)
    if path.resolve() in out.resolve().parents:
        raise ArgumentError(f"{out}: lies inside {path}, which is only read; choose a place outside of it")
    read = reading(path, progress)
    sole = None if ranks == [0] else ranks
    with _whole_or_gone(out):
        rescues = [_Rescue(path / spec.RANK_DIRECTORY.format(rank=rank), rank, read) for rank in ranks]
        for rescue in rescues:
            rank = rescue.rank if sole else None
            with DatasetWriter(out, rank=rank, provenance=rescue.provenance()) as writer:
                rescue.run(writer)
    return RepairReport(
        path=path,
        out=out,
        sites=tuple(site for rescue in rescues for site in rescue.sites),
        tables=tuple(table for rescue in rescues for table in rescue.tables),
        problems=tuple(problem for rescue in rescues for problem in rescue.problems),
        notes=tuple(note for rescue in rescues for note in rescue.notes),
    )


def _ranks(path: Path) -> list[int]:
    if not path.is_dir():
        raise DatasetNotFoundError(f"{path}: no such directory; expected a dataset NAME{spec.DATASET_SUFFIX}")
    names = [each.name for each in path.iterdir() if each.is_dir() and not each.is_symlink()]
    numbers = [int(name[5:]) for name in names if re.fullmatch("rank-[0-9]{5,7}", name)]
    ranks = sorted(number for number in numbers if spec.RANK_DIRECTORY.format(rank=number) in names)
    if not ranks:
        raise DatasetNotFoundError(f"{path}: no rank-NNNNN directory to rescue anything from")
    return ranks


@contextmanager
def _whole_or_gone(out: Path) -> Iterator[None]:
    """Remove what was made at `out`, and the directories above it, if what happens inside fails."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise DatasetExistsError(
            f"{out}: exists; what is rescued becomes a new dataset, choose another place"
        )
    made = [each for each in (out, *out.parents) if not os.path.lexists(each)]
    try:
        yield
    except (DatasetExistsError, WriterConflictError):
        raise  # somebody else has made it meanwhile
    except BaseException as error:
        for rank in out.glob("rank-*"):
            shutil.rmtree(rank, ignore_errors=True)
        for directory in made:
            with suppress(OSError):
                directory.rmdir()
        if isinstance(error, OSError) and (
            isinstance(error, WriteError) or not isinstance(error, StrapfmtError)
        ):
            cause = error.__cause__ if isinstance(error, WriteError) and error.__cause__ else error
            raise WriteError(cause, f"nothing is left at {out}") from error
        raise


class _Rescue:
    """The rescue of one rank."""

    def __init__(self, root: Path, rank: int, read: Callable[[int], None]) -> None:
        self.root, self.rank, self._read = root, rank, read
        self.sites: list[SiteRepair] = []
        self.tables: list[SiteRepair] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.manifest = self._read_manifest()
        self._unreadable: dict[str, str] = {}
        self._unfinished = UnfinishedSteps()

    def provenance(self) -> dict[str, Any]:
        """Return what the new session says of its origin."""
        before = [dict(session) for session in self.manifest.sessions] if self.manifest else []
        return {"repaired_from": str(self.root), "repaired_sessions": before}

    def run(self, writer: DatasetWriter) -> None:
        """Copy everything sound; the tokens come last, when it is known which steps are complete."""
        committed = self._committed()
        for kind, found in ((spec.SITES_DIRECTORY, self.sites), (spec.TABLES_DIRECTORY, self.tables)):
            for directory in sorted(
                {*self._directories(kind), *(d for d in committed if d.startswith(kind))}
            ):
                self._directory(directory, committed.get(directory), writer, found)
        self.notes += [f"{self.root / file}: {why}" for file, why in self._unreadable.items()]
        if not self._is_clean:
            self._account_for_unfinished(writer)
        for entry in self.manifest.sites if self.manifest else ():
            if entry.spec.name in writer.sites:
                writer.count(entry.spec.name, expected=entry.counts.expected, dropped=entry.counts.dropped)
        writer.skip_to(self._counters)

    @property
    def _is_clean(self) -> bool:
        """Whether the last session was closed, so that nothing was cut."""
        return self.manifest is not None and self.manifest.is_clean

    def _read_manifest(self) -> Manifest | None:
        try:
            data = read_file(self.root, spec.MANIFEST_NAME, spec.MAX_MANIFEST_BYTES)
            return Manifest.decode(data, str(self.root / spec.MANIFEST_NAME))
        except FormatError as error:
            why = str(error)
        except FileNotFoundError:
            if next(self.root.glob("*/*"), None) is None:
                self.notes.append(f"{self.root}: nothing was ever committed here")
                return None
            why = f"{self.root / spec.MANIFEST_NAME}: the file is gone"
        self.problems.append(
            f"{why}; nothing says what was committed, so the other files speak for themselves"
        )
        return None

    @property
    def _counters(self) -> dict[str, int]:
        return dict(self.manifest.counters) if self.manifest else dict.fromkeys(COUNTERS, 0)

    def _committed(self) -> dict[str, SiteEntry | TableEntry]:
        """Return what the manifest lists, by directory."""
        if self.manifest is None:
            return {}
        sites = {f"{spec.SITES_DIRECTORY}/{file_slug(e.spec.name)}": e for e in self.manifest.sites}
        return {**sites, **{f"{spec.TABLES_DIRECTORY}/{e.name}": e for e in self.manifest.tables}}

    def _directories(self, kind: str) -> list[str]:
        parent = self.root / kind
        if parent.is_symlink():
            self.problems.append(f"{parent}: {LINK}")
        entries = list(parent.iterdir()) if parent.is_dir() and not parent.is_symlink() else []
        return [f"{kind}/{entry.name}" for entry in entries if entry.is_dir()]

    def _directory(
        self,
        directory: str,
        entry: SiteEntry | TableEntry | None,
        writer: DatasetWriter,
        found: list[SiteRepair],
    ) -> None:
        """Copy one site or table: what the manifest lists in any case, another if there is anything of it."""
        streams = list(open_streams(self.root, directory, self._unreadable))
        kind, _, name = directory.rpartition("/")
        site = None
        if kind == spec.SITES_DIRECTORY:
            site = entry.spec if isinstance(entry, SiteEntry) else _site_of(streams, name)
            name = site.name if site else name
        elif not entry and name not in TABLE_SCHEMAS:
            if streams:
                self.notes.append(f"{self.root / directory}: neither a site nor a known table; left out")
            return
        if self.manifest:
            problems = list(self._missing(entry, streams))
        else:
            problems = list(lost_files(self.root, directory, streams, self._unreadable))
        if not entry and not streams and not problems:
            return
        n_committed = (entry.n_rows if entry else 0) if self.manifest else None
        account = SiteRepair(name=name, rank=self.rank, n_committed=n_committed, problems=problems)
        found.append(account)
        try:
            target = RescueTarget(writer, name, site, account, kind == spec.TABLES_DIRECTORY)
        except ArgumentError as error:
            if streams or account.n_committed:
                account.problems.append(f"{self.root / directory}: {error}")
            return
        self._copy(streams, target)

    def _copy(self, streams: list[Stream], target: RescueTarget) -> None:
        sound = []
        for stream in streams:
            refusal = target.refusal(stream)
            if refusal:
                target.account.problems.append(f"{self.root / stream.file}: {refusal}")
                self._read(len(stream.memory))
            else:
                sound.append(stream)
        for stream, limit in self._limited(sound, target.key):
            for found in stream.batches(target.account.problems):
                batch = target.fresh(found, limit, f"{self.root / stream.file}")
                if batch is None:
                    continue
                if target.site is None and target.name == "steps" and not self._is_clean:
                    batch = self._unfinished.judged(batch, target.account)
                target.write(batch)
                if target.site is None and target.name == "tokens":
                    self._unfinished.see(batch, target.account)
            self._read(len(stream.memory))
        account = target.account
        if account.n_rescued < (account.n_committed or 0) and not account.problems:
            account.problems.append(
                f"{target.name!r}: {(account.n_committed or 0) - account.n_rescued} committed rows have numbers that "
                "rows before them have, or that do not go up"
            )
        if target.site is None and target.name == "steps":
            self._unfinished.last_step = target.last
        elif target.site is not None and target.site.row_space == "tokens":
            self._unfinished.see_site(target.name, target.last)

    def _missing(self, entry: SiteEntry | TableEntry | None, streams: list[Stream]) -> Iterator[str]:
        """Yield a problem for each committed file that is gone or cannot be read."""
        there = {stream.file for stream in streams}
        for shard in entry.shards if entry else ():
            for part in shard.parts:
                sealed = part.file.removesuffix(spec.OPEN_SUFFIX) + spec.DATA_SUFFIX
                names = [part.file, sealed] if part.file.endswith(spec.OPEN_SUFFIX) else [part.file]
                if part.role not in ("data", "tail") or there & set(names):
                    continue
                why = [self._unreadable.pop(name) for name in names if name in self._unreadable]
                rows = "the last rows" if part.role == "tail" else "rows"
                yield (
                    f"{self.root / part.file}: {why[0] if why else 'the file is gone'}; {rows} of a shard of "
                    f"{shard.n_rows} committed ones were in it"
                )

    def _limited(self, streams: list[Stream], key: IdColumn) -> Iterator[tuple[Stream, int]]:
        """Yield each stream with the first id that belongs to a later session, which may have used numbers again."""
        sessions = self.manifest.sessions if self.manifest else ()
        firsts = [(s.session, s.first_id(key.column)) for s in streams if s.session > 0]
        for stream in streams:
            later = stream.session + 1
            limits = [first for session, first in firsts if session >= later and first is not None]
            if key.counter and later < len(sessions):
                next_free = _counters_of(sessions[later]).get(key.counter)
                if type(next_free) is int and 0 <= next_free <= 1 << spec.COUNTER_BITS:
                    limits.append((self.rank << spec.RANK_SHIFT) + next_free)
            yield stream, min(limits, default=_NO_LIMIT)

    def _account_for_unfinished(self, writer: DatasetWriter) -> None:
        """Say which tokens a crash left without what belongs to them, and give their steps a row."""
        if not self._unfinished.n_tokens:
            return
        steps = [account for account in self.tables if account.name == "steps"]
        is_sound = all(account.is_complete for account in steps)
        rows = self._unfinished.rows() if is_sound else None
        if rows:
            writer.write_table("steps", rows)
        self.notes.append(f"{self.root}: {self._unfinished.note(n_added=len(rows['step']) if rows else 0)}")


def _site_of(streams: list[Stream], slug: str) -> SiteSpec | None:
    """Return the site that the first file of a directory describes that is that directory's."""
    for stream in streams:
        with suppress(ArgumentError):
            site = read_site(stream.schema)
            if site and file_slug(site.name) == slug:
                return site
    return None


def _counters_of(session: Mapping[str, Any]) -> Mapping[str, Any]:
    counters = session.get("counters")
    return counters if isinstance(counters, dict) else {}
