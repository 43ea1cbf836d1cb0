"""Malicious datasets with valid checksums: manifests, indexes and messages changed and hashed again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from strapfmt import spec
from strapfmt.arrowfile import digest
from strapfmt.index import ShardIndex

Json = Any


class Forger:
    """Edits a dataset of one rank so that every checksum still matches."""

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = path
        self.root = path / spec.RANK_DIRECTORY.format(rank=rank)

    @property
    def manifest(self) -> Json:
        return json.loads((self.root / spec.MANIFEST_NAME).read_bytes())

    def put_manifest(self, manifest: Json) -> None:
        manifest.pop("hash", None)
        self.put_manifest_text(json.dumps(manifest, separators=(",", ":")))

    def put_manifest_text(self, text: str) -> None:
        """Store JSON text that ends in a brace, with the hash filled in."""
        body = text.encode("utf-8", "surrogatepass")[:-1]
        data = body + b',"hash":"' + digest(body).hex().encode() + b'"}\n'
        (self.root / spec.MANIFEST_NAME).write_bytes(data)

    def edit(self, change: Callable[[Json], None]) -> None:
        """Change the manifest."""
        manifest = self.manifest
        change(manifest)
        self.put_manifest(manifest)

    def shard(self, kind: str = "sites", which: int = 0, number: int = 0) -> Json:
        return self.manifest[kind][which]["shards"][number]

    def index(self, kind: str = "sites", which: int = 0, number: int = 0) -> ShardIndex:
        file = self._part(self.shard(kind, which, number), "index")["file"]
        data = bytearray((self.root / file).read_bytes())
        return ShardIndex.decode(data, file)

    def put_index(
        self, index: ShardIndex | bytes, kind: str = "sites", which: int = 0, number: int = 0
    ) -> None:
        """Store an index, and in the manifest all that follows from it."""
        data = index if isinstance(index, bytes) else index.encode()

        def change(manifest: Json) -> None:
            shard = manifest[kind][which]["shards"][number]
            part = self._part(shard, "index")
            (self.root / part["file"]).write_bytes(data)
            part["n_bytes"], part["hash"] = len(data), digest(data).hex()
            if isinstance(index, ShardIndex):
                shard["n_rows"] = max(int(index.n_rows), 1)
                self._part(shard, "data")["hash"] = index.data_hash().hex()
                self._part(shard, "data")["n_bytes"] = min(index.data_end(), 1 << 62)
                if index.has_tail:
                    self._part(shard, "tail")["hash"] = index.data_hash(tail=True).hex()

        self.edit(change)

    def put_index_bytes(self, at: int, value: bytes, **where: Any) -> None:
        """Overwrite bytes of an index, and hash it again."""
        file = self._part(self.shard(**where), "index")["file"]
        data = bytearray((self.root / file).read_bytes()[:-16])
        data[at : at + len(value)] = value
        self.put_index(bytes(data) + digest(bytes(data)), **where)

    def edit_message(
        self, batch: int, change: Callable[[bytearray, bytearray], None], kind: str = "sites", which: int = 0
    ) -> None:
        """Change header and body of one record batch (their lengths must stay), and hash everything again."""
        index = self.index(kind, which)
        file = self.root / self._part(self.shard(kind, which), "data")["file"]
        data = bytearray(file.read_bytes())
        batches = index.batches.copy()
        start, middle = int(batches[batch]["offset"]), int(batches[batch]["header_bytes"])
        middle += start
        end = middle + int(batches[batch]["body_bytes"])
        header, body = data[start:middle], data[middle:end]
        change(header, body)
        assert len(header) == middle - start
        assert len(body) == end - middle
        data[start:end] = header + body
        file.write_bytes(data)
        batches["header_hash"][batch] = np.void(digest(bytes(header)))
        batches["body_hash"][batch] = np.void(digest(bytes(body)))
        self.put_index(replace(index, batches=batches), kind, which)

    def edit_prefix(self, change: Callable[[bytearray], None], kind: str = "sites", which: int = 0) -> None:
        """Change the magic and the schema message that begin a shard's data file, and hash everything again."""
        index = self.index(kind, which)
        file = self.root / self._part(self.shard(kind, which), "data")["file"]
        data = bytearray(file.read_bytes())
        prefix = data[: index.prefix_bytes]
        change(prefix)
        assert len(prefix) == index.prefix_bytes
        data[: len(prefix)] = prefix
        file.write_bytes(data)
        self.put_index(replace(index, prefix_hash=digest(bytes(prefix))), kind, which)

    @staticmethod
    def _part(shard: Json, role: str) -> Json:
        return next(part for part in shard["parts"] if part["role"] == role)


def leaves(value: Json, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every value in a JSON document, containers too."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, i))


def put(value: Json, path: tuple[str | int, ...], new: Json) -> None:
    """Replace the value at a path; `...` removes it."""
    for key in path[:-1]:
        value = value[key]
    if new is ...:
        del value[path[-1]]
    else:
        value[path[-1]] = new
