"""Checks every byte of a dataset against its checksums, and Arrow's own validation, and lists all that is wrong."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from strapfmt import spec
from strapfmt.errors import FormatError, StrapfmtError
from strapfmt.manifest import ROLES
from strapfmt.paths import absolute_path
from strapfmt.reader import Reader
from strapfmt.report import VerifyReport
from strapfmt.shard_reader import ShardReader
from strapfmt.text import visible

__all__ = ["verify"]

#: What errors advise to those who met them while reading, which is what is done here.
_ADVICE = "; `strapfmt verify` lists all damage"
_OURS = re.compile(r"\d{6}(\.c\d+)?(\.arrow|\.arrow\.open|\.tail\.arrow|\.idx)(\.tmp)?|manifest\.json\.tmp")


def verify(path: str | Path, *, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Check a whole dataset; damage is reported, not raised.

    Parameters
    ----------
    path : path
    progress : callable, optional
        Called with the bytes checked so far and in all.

    Raises
    ------
    DatasetNotFoundError
        If there is no dataset.
    """
    path = absolute_path(path)
    try:
        reader = Reader(path)
    except FormatError as error:
        found = tuple(error.problems)
        return VerifyReport(path=path, problems=found, notes=(), n_bytes=0, n_rows=0, is_clean=False)
    with reader:
        shards = list(reader.shards())
        total = sum(map(_n_bytes, shards))
        problems: list[str] = []
        done, checked = 0, _Checked()
        for shard in shards:
            for number, problem in enumerate(_check(shard, checked)):
                problems.append(problem.removesuffix(_ADVICE))
                if number >= 20:
                    problems.append(f"{shard.place}: more problems are not listed")
                    break
            shard.release()
            done += _n_bytes(shard)
            if progress is not None:
                progress(done, total)
        problems += [f"{site.name!r}: {site.problem}" for site in reader.sites.values() if site.problem]
        notes = [*_states(reader), *_strays(reader)]
        is_clean = reader.report.is_clean
    return VerifyReport(
        path=path,
        problems=tuple(problems),
        notes=tuple(notes),
        n_bytes=checked.n_bytes,
        n_rows=checked.n_rows,
        is_clean=is_clean,
    )


@dataclass(slots=True)
class _Checked:
    """How much was looked at, damaged or not: bytes compared with checksums, and rows of sites that were read."""

    n_bytes: int = 0
    n_rows: int = 0


def _n_bytes(shard: ShardReader) -> int:
    """Return the bytes of a shard's files that this version knows, as the manifest counts them."""
    return sum(part.n_bytes for part in shard.shard.parts if part.role in ROLES)


def _check(shard: ShardReader, checked: _Checked) -> Iterator[str]:
    """Yield every problem of a shard; count what was checked."""
    try:
        shard.check_files()
    except StrapfmtError as error:
        yield str(error)
        return
    yield from _lengths(shard)
    batches = shard.index.batches
    n_batch_bytes = batches["header_bytes"].astype(int) + batches["body_bytes"].astype(int)
    checked.n_bytes += _n_bytes(shard) - int(n_batch_bytes.sum())
    last_row = -1
    for number in range(shard.n_batches):
        checked.n_bytes += int(n_batch_bytes[number])
        try:
            batch = shard.batch(number, verify=True)
        except StrapfmtError as error:
            yield str(error)
            continue
        if shard.shard.first_row is None:
            continue
        checked.n_rows += batch.num_rows
        rows = batch.column("row").to_numpy()
        start = int(batches["first_ordinal"][number])
        if not (rows == shard.rows_between(start, start + len(rows))).all():
            yield f"{shard.place_of(number)}: the column `row` is not what the index says"
        if len(rows) and (rows[0] <= last_row or (rows[1:] <= rows[:-1]).any()):
            yield f"{shard.place_of(number)}: expected strictly increasing rows"
        last_row = int(rows[-1]) if len(rows) else last_row


def _lengths(shard: ShardReader) -> Iterator[str]:
    """Yield the files that are longer than what their checksums cover, as only an open one may be."""
    for part in shard.shard.parts:
        path = shard.root / part.file
        may_grow = part.role == "data" and not shard.shard.is_sealed
        if part.role in ROLES and not may_grow and path.exists() and path.stat().st_size != part.n_bytes:
            yield f"{path}: expected {part.n_bytes} bytes, got {path.stat().st_size}"


def _states(reader: Reader) -> Iterator[str]:
    for rank, manifest in reader.manifests.items():
        if manifest.is_clean:
            continue
        what = (
            f"this is commit {manifest.commit}"
            if manifest.files()
            else "nothing is committed but its beginning"
        )
        yield (
            f"rank {rank}: not closed (a writer is at work, or it crashed); {what}, `strapfmt repair` also rescues "
            "what lies complete behind it"
        )
    for rank in reader.uncommitted_ranks:
        yield f"rank {rank}: nothing committed yet"


def _strays(reader: Reader) -> Iterator[str]:
    """Say which files below the ranks no manifest names: one note for what writers leave behind, one for each other."""
    for rank, manifest in reader.manifests.items():
        root = reader.path / spec.RANK_DIRECTORY.format(rank=rank)
        named = manifest.files() | {spec.MANIFEST_NAME, spec.LOCK_NAME}
        found = [Path(directory, file) for directory, _, files in os.walk(root) for file in files]
        strays = sorted(full for full in found if str(full.relative_to(root)) not in named)
        left = [full for full in strays if _OURS.fullmatch(full.name) and stat.S_ISREG(full.lstat().st_mode)]
        if left:
            yield (
                f"rank {rank}: {len(left):,} file(s) of earlier or unfinished commits, such as "
                f"{visible(str(left[0]))}; readers ignore them"
            )
        for full in strays:
            if full not in left:
                kind = "file" if stat.S_ISREG(full.lstat().st_mode) else "special file"
                yield f"{visible(str(full))}: a {kind} that no manifest names; readers ignore it"
