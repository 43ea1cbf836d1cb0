"""What the manifest says of where a dataset came from."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch

from strapfmt.arrowfile import digest

__all__ = ["describe_model", "describe_tokenizer", "describe_versions"]

_PACKAGES = ("strapfmt", "torch", "transformers", "pyarrow", "numpy")


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    """Return class, name, revision, config hash, dtypes and devices of a model, as far as it tells them.

    `n_parameters` is left out where a lazy layer does not know its own yet.
    `config_hash` is the xxh3-128 of the config's own JSON, so that two datasets of one model can be told by it.
    """
    config = getattr(model, "config", None)
    parameters = list(model.parameters())
    described: dict[str, Any] = {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "dtypes": _names(str(parameter.dtype).removeprefix("torch.") for parameter in parameters),
        "devices": _names(str(parameter.device) for parameter in parameters),
        "training": model.training,
    }
    if not any(map(torch.nn.parameter.is_lazy, parameters)):  # those have no size before the first pass
        described["n_parameters"] = sum(parameter.numel() for parameter in parameters)
    for key, name in (("name", "_name_or_path"), ("revision", "_commit_hash"), ("model_type", "model_type")):
        value = getattr(config, name, None)
        if isinstance(value, str) and value:
            described[key] = value
    to_json = getattr(config, "to_json_string", None)
    if callable(to_json):
        described["config_hash"] = digest(str(to_json()).encode()).hex()
    return described


def describe_tokenizer(tokenizer: Any) -> dict[str, Any] | None:
    """Return class, name and vocabulary size of a tokenizer, None for none."""
    if tokenizer is None:
        return None
    described: dict[str, Any] = {"class": type(tokenizer).__name__}
    name, size = getattr(tokenizer, "name_or_path", None), getattr(tokenizer, "vocab_size", None)
    if isinstance(name, str) and name:
        described["name"] = name
    if isinstance(size, int):
        described["vocab_size"] = size
    return described


def describe_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that made the dataset, of those that are loaded."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        if package in sys.modules:
            try:
                versions[package] = metadata.version(package)
            except metadata.PackageNotFoundError:  # run from a checkout
                versions[package] = str(getattr(sys.modules[package], "__version__", "unknown"))
    return versions


def _names(values: Iterable[str]) -> list[str]:
    return sorted(set(values))
