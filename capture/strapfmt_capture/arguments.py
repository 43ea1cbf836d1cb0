"""Checks of what `capture` and `create` are called with, made before anything on disk is touched."""

from __future__ import annotations

import json
import numbers
import operator
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from strapfmt import spec
from strapfmt.errors import ArgumentError
from strapfmt.manifest import Manifest

__all__ = [
    "as_integer",
    "as_seconds",
    "check_appended",
    "check_model",
    "check_tokenizer",
    "stored_manifest",
    "tags_text",
]


def as_integer(name: str, value: object, least: int) -> int:
    """Return a whole number of any integer type as `int`.

    Raises
    ------
    ArgumentError
        If it is something else, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise ArgumentError(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return operator.index(value)


def as_seconds(name: str, value: object) -> float:
    """Return a number that is not negative as `float`; infinity is one.

    Raises
    ------
    ArgumentError
        If it is something else.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not float(value) >= 0:
        raise ArgumentError(f"{name}: expected a number of seconds of at least 0, got {value!r}")
    return float(value)


def check_model(model: object) -> None:
    """Refuse what is no module."""
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {_shown(model)}")


def check_tokenizer(tokenizer: object) -> None:
    """Refuse what cannot turn token ids into text."""
    if tokenizer is None or (
        not isinstance(tokenizer, type) and callable(getattr(tokenizer, "decode", None))
    ):
        return
    advice = ""
    if isinstance(tokenizer, str):
        advice = f"; load it first: transformers.AutoTokenizer.from_pretrained({tokenizer!r})"
    raise ArgumentError(
        f"tokenizer: expected an object with decode(token_ids), got {_shown(tokenizer)}{advice}"
    )


def tags_text(tags: object) -> str:
    """Return tags as the JSON text that is stored with every sequence.

    Raises
    ------
    ArgumentError
        If they are no mapping, or hold what JSON or UTF-8 cannot.
    """
    if tags is None:
        return "{}"
    if not isinstance(tags, Mapping):
        raise ArgumentError(f"tags: expected a mapping of names to JSON values, got {_shown(tags)}")
    try:
        text = json.dumps(dict(tags), ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"tags: expected JSON values: {error}") from error
    return text


def stored_manifest(path: Path, rank: int) -> Manifest | None:
    """Return what a rank of a dataset has committed, None if there is nothing.

    Raises
    ------
    FormatError
        If the manifest is damaged.
    """
    file = path / spec.RANK_DIRECTORY.format(rank=rank) / spec.MANIFEST_NAME
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        return None
    return Manifest.decode(data, str(file))


def check_appended(
    path: Path, rank: int | None, sites: Iterable[str], codec: str, statistics: tuple[str, ...]
) -> None:
    """Refuse to go on at sites of a dataset in another way than they began.

    Raises
    ------
    ArgumentError
        Naming the option, the site, and what the dataset has.
    """
    manifest = stored_manifest(path, rank or 0)
    stored = {} if manifest is None else {entry.spec.name: entry.spec for entry in manifest.sites}
    for name in sites:
        known = stored.get(name)
        if known is None:
            continue
        if known.codec != codec:
            raise ArgumentError(f"codec: the dataset has {known.codec!r} for site {name!r}, got {codec!r}")
        if known.statistics != statistics:
            raise ArgumentError(
                f"stats: the dataset has {list(known.statistics)} for site {name!r}, got {list(statistics)}"
            )


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
