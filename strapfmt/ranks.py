"""Which ranks a dataset has, and the manifest of each: what its writer has committed."""

from __future__ import annotations

import re
from pathlib import Path

from strapfmt import spec
from strapfmt.errors import CorruptError, DatasetNotFoundError
from strapfmt.manifest import Manifest
from strapfmt.mapped import read_file

__all__ = ["read_manifests"]

_RANK_NAME = re.compile(r"rank-[0-9]{5,7}")


def read_manifests(path: Path) -> tuple[dict[int, Manifest], list[int]]:
    """Return the manifests by rank, and the ranks that have not committed anything yet."""
    if not path.is_dir():
        raise DatasetNotFoundError(f"{path}: no such directory; expected a dataset NAME{spec.DATASET_SUFFIX}")
    manifests, pending = {}, []
    for directory in sorted(path.iterdir()):
        if not _RANK_NAME.fullmatch(directory.name):
            continue
        rank = int(directory.name[5:])
        if directory.is_symlink() or directory.name != spec.RANK_DIRECTORY.format(rank=rank):
            raise CorruptError(
                f"{directory}: expected a plain directory {spec.RANK_DIRECTORY.format(rank=rank)!r}"
            )
        name = f"{directory.name}/{spec.MANIFEST_NAME}"
        try:
            data = read_file(path, name, spec.MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            pending.append(rank)
            continue
        manifest = Manifest.decode(data, str(path / name))
        if manifest.rank != rank:
            raise CorruptError(
                f"{path / name}: rank: expected {rank} as the directory says, got {manifest.rank}"
            )
        manifests[rank] = manifest
    if not manifests:
        why = f"rank {pending[0]} has not committed yet" if pending else "no rank-NNNNN directory in it"
        raise DatasetNotFoundError(f"{path}: no strapfmt dataset: {why}")
    return dict(sorted(manifests.items())), pending
