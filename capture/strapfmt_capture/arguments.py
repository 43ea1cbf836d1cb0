"""Checks of what `capture` and `create` are called with, made before anything on disk is touched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from strapfmt import spec
from strapfmt.arguments import as_integer
from strapfmt.errors import ArgumentError
from strapfmt.manifest import Manifest
from strapfmt_capture.hookpoints import HookPoint
from strapfmt_capture.texts import special_ids

__all__ = [
    "as_flag",
    "as_index",
    "check_appended",
    "check_model",
    "check_tokenizer",
    "index_facts",
    "stored_manifest",
    "tags_text",
]


def as_flag(name: str, value: object) -> bool:
    """Return True or False as it is; a text such as "no" would count as true.

    Raises
    ------
    ArgumentError
        If it is something else.
    """
    if not isinstance(value, bool):
        raise ArgumentError(f"{name}: expected True or False, got {value!r}")
    return value


def as_index(name: str, value: Any) -> slice | tuple[int, ...]:
    """Return a slice that goes forward, or whole numbers as a tuple; negative ones count from the end.

    Raises
    ------
    ArgumentError
        If it is something else, or names nothing.
    """
    if isinstance(value, slice):
        start, stop = (None if end is None else as_integer(name, end) for end in (value.start, value.stop))
        step = None if value.step is None else as_integer(f"{name}: step of a slice", value.step, least=1)
        return slice(start, stop, step)
    values = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(values, (int, float, str, Mapping)) or not isinstance(values, Iterable):
        return (as_integer(name, value),)
    numbers = tuple(as_integer(name, each) for each in values)
    if not numbers:
        raise ArgumentError(f"{name}: expected a slice or whole numbers, got none")
    return numbers


def index_facts(index: slice | tuple[int, ...]) -> dict[str, int | None] | list[int]:
    """Return what `as_index` gave, JSON-ready."""
    if isinstance(index, slice):
        return {"start": index.start, "stop": index.stop, "step": index.step}
    return list(index)


def check_model(model: object) -> None:
    """Refuse what is no module, and what runs without hooks."""
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {_shown(model)}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError(
            f"model: expected a module that runs in Python, got a {type(model).__name__} of TorchScript, which runs no "
            "hooks; pass the module that it was made of"
        )


def check_tokenizer(tokenizer: object) -> None:
    """Refuse what cannot turn token ids into text."""
    if tokenizer is None or (
        not isinstance(tokenizer, type) and callable(getattr(tokenizer, "decode", None))
    ):
        special_ids(tokenizer)
        return
    advice = ""
    if isinstance(tokenizer, str):
        advice = f"; load it first: transformers.AutoTokenizer.from_pretrained({tokenizer!r})"
    raise ArgumentError(
        f"tokenizer: expected an object with decode(token_ids), got {_shown(tokenizer)}{advice}"
    )


def tags_text(tags: object, what: str = "tags") -> str:
    """Return tags, or what else is like them, as the JSON text that is stored.

    Raises
    ------
    ArgumentError
        If they are no mapping, have keys that are no text, or hold what JSON or UTF-8 cannot.
    """
    if tags is None:
        return "{}"
    if not isinstance(tags, Mapping):
        raise ArgumentError(f"{what}: expected a mapping of names to JSON values, got {_shown(tags)}")
    try:
        text = json.dumps(dict(tags), ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"{what}: expected JSON values: {error}") from error
    _check_keys(tags, what)
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
    path: Path,
    rank: int | None,
    points: Iterable[HookPoint],
    codec: str,
    statistics: tuple[str, ...],
    channels: Mapping[str, Any],
) -> None:
    """Refuse to go on at sites of a dataset in another way than they began.

    Raises
    ------
    ArgumentError
        Naming the site and what differs: the option or the hook point, and what the dataset has.
    """
    manifest = stored_manifest(path, rank or 0)
    stored = {} if manifest is None else {entry.spec.name: entry.spec for entry in manifest.sites}
    for point in points:
        known = stored.get(point.site)
        if known is None:
            continue
        pairs = {
            "codec": (known.codec, codec),
            "stats": (list(known.statistics), list(statistics)),
            "hook_point": (known.hook_point, point.hook_point),
            "channels": (_stored_channels(manifest, point.site), channels.get(point.site)),
        }
        differing = [
            f"{field}: the dataset has {old!r} for site {point.site!r}, got {new!r}"
            for field, (old, new) in pairs.items()
            if old != new
        ]
        if differing:
            raise ArgumentError(f"{'; '.join(differing)}; write into a dataset of its own")


def _stored_channels(manifest: Manifest | None, site: str) -> Any:
    """What the last session that captured a site says of its channels; None for all of them."""
    for session in reversed(manifest.sessions if manifest else ()):
        sites, options = session.get("sites"), session.get("options")
        if isinstance(sites, Mapping) and site in sites and isinstance(options, Mapping):
            channels = options.get("channels")
            return channels.get(site) if isinstance(channels, Mapping) else None
    return None


def _check_keys(value: object, what: str) -> None:
    """Refuse keys that JSON would turn into text, where two of them may become one."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ArgumentError(f"{what}: expected keys that are text, got {key!r}; pass {str(key)!r}")
            _check_keys(inner, what)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _check_keys(inner, what)


def _shown(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"
