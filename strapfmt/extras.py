"""Imports optional packages where they are used, with an error that names the extra to install."""

import importlib
from types import ModuleType

from strapfmt.errors import MissingExtraError

__all__ = ["require"]


def require(package: str, extra: str, purpose: str) -> ModuleType:
    """Import `package` and return it.

    Raises
    ------
    MissingExtraError
        If it is not installed; the message says `pip install 'strapfmt[extra]'`.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package.partition(".")[0]:
            raise
        raise MissingExtraError(package, extra, purpose) from error
