"""Which keys a dataset holds: tags named `key` of sequences that are committed whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from strapfmt import spec
from strapfmt.errors import ArgumentError, DatasetChangedError
from strapfmt.json_fields import refuse_constant
from strapfmt.manifest import Manifest
from strapfmt.ranks import read_manifests
from strapfmt.schema import TABLE_SCHEMAS
from strapfmt.shard_reader import ShardReader

__all__ = ["KEY", "UNFINISHED", "key_text", "read_done_keys"]

#: The tag that names what a sequence was made of.
KEY = "key"
#: The event of rows whose sequence began in a block of passes that was not carried out to its end.
UNFINISHED = "unfinished"
_ATTEMPTS = 20


def key_text(key: object) -> str:
    """Return a key as the JSON text by which keys are compared.

    Raises
    ------
    ArgumentError
        If JSON cannot hold it.
    """
    try:
        return json.dumps(key, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"key: expected a JSON value such as a text or a number: {error}") from error


def read_done_keys(path: Path) -> set[str]:
    """Return the keys of the sequences that a dataset holds whole, as `key_text` writes them; of all its ranks.

    A sequence that has no tokens, that split off another, whose first pass is not complete, or whose block of passes
    was not finished does not count.

    Raises
    ------
    FormatError, DatasetNotFoundError
    """
    for attempt in range(_ATTEMPTS):
        try:
            manifests, _ = read_manifests(path)
            ranks = [_read_rank(path, rank, manifest) for rank, manifest in manifests.items()]
            return set().union(*ranks)
        except DatasetChangedError:  # another rank's writer has moved on
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


def _read_rank(path: Path, rank: int, manifest: Manifest) -> set[str]:
    root = path / spec.RANK_DIRECTORY.format(rank=rank)
    steps = _read(root, manifest, "steps", ["step", "first_row", "status"])
    events = _read(root, manifest, "row_events", ["row", "event"])
    numbers, statuses = steps["step"].to_numpy(), np.array(steps["status"].to_pylist(), object)
    is_whole = statuses == "complete"
    is_unfinished = np.array(events["event"].to_pylist(), object) == UNFINISHED
    rows = events["row"].to_numpy()[is_unfinished]
    places = np.searchsorted(steps["first_row"].to_numpy(), rows, "right") - 1
    is_whole[places[places >= 0]] = False
    whole = set(numbers[is_whole].tolist())
    return {key for step, key in _keys(root, manifest) if step in whole}


def _keys(root: Path, manifest: Manifest) -> Iterator[tuple[int, str]]:
    """Yield the first step and the key of every sequence that has a key."""
    names = ["first_step", "parent_sequence_id", "n_prompt_tokens", "tags"]
    columns = [_read(root, manifest, "sequences", names)[name].to_pylist() for name in names]
    for step, parent, n_tokens, text in zip(*columns, strict=True):
        if parent is None and n_tokens and f'"{KEY}"' in text:
            tags = _parsed(text)
            if KEY in tags:
                yield step, key_text(tags[KEY])


def _parsed(text: str) -> Mapping[str, Any]:
    """Return what another program may have written as tags."""
    try:
        tags = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return {}
    return tags if isinstance(tags, dict) else {}


def _read(root: Path, manifest: Manifest, name: str, columns: list[str]) -> pa.Table:
    schema = TABLE_SCHEMAS[name]
    readers = [
        ShardReader(root, shard, schema=lambda: schema)
        for entry in manifest.tables
        if entry.name == name
        for shard in entry.shards
    ]
    batches = [reader.batch(i, verify=True) for reader in readers for i in range(reader.n_batches)]
    return pa.Table.from_batches(batches, schema).select(columns)
