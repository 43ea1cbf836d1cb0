"""Failures behind the model's thread: told by one process to another as JSON, and raised where the user waits."""

from __future__ import annotations

import builtins
import json
from typing import Any

from strapfmt import errors

__all__ = ["described", "revived", "stopped"]


def described(error: BaseException) -> dict[str, Any]:
    """Return an exception as JSON-ready values; facts that JSON cannot hold are left out."""
    return {
        "type": type(error).__name__,
        "text": str(error),
        "args": list(error.args) if all(map(_is_plain, error.args)) else [str(error)],
        "facts": {name: value for name, value in vars(error).items() if _is_plain(value)},
    }


def revived(description: dict[str, Any]) -> Exception:
    """Return the exception that was described; one of an unknown type becomes a RuntimeError that names it."""
    name = description["type"]
    kind = getattr(errors, name, None) or getattr(builtins, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Exception):
        return RuntimeError(f"{name}: {description['text']}")
    error = kind.__new__(kind, *description["args"])
    # Not the type's own: it may make the text from other arguments.
    (OSError if isinstance(error, OSError) else Exception).__init__(error, *description["args"])
    vars(error).update(description["facts"])
    return error


def stopped(what: str, failure: BaseException) -> errors.DrainError:
    """Return what is raised where the user waits, after a failure has kept the rest from being written.

    Parameters
    ----------
    what : str
        What has failed, as the beginning of a sentence.
    failure : BaseException
        Its cause.
    """
    return errors.DrainError(
        f"{what}, and what was captured since the last commit is lost ({type(failure).__name__}: {failure}); what was "
        "committed before can be read where it is, mode='append' goes on behind it, and `strapfmt repair` finds what "
        "else is whole"
    )


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
