"""Parquet for LLM activations: capture them from a PyTorch model, query them in SQL, train on them.

::

    with strapfmt.capture(model, "run.strap", sites=["blocks.*.resid_post"], tokenizer=tokenizer):
        model.generate(**inputs, max_new_tokens=32)

    ds = strapfmt.open("run.strap")
    ds.sql('select token, avg(l2_norm) from tokens join "blocks.3.resid_post" using (row) group by token')
    for batch in ds.loader("blocks.3.resid_post", batch_size=4096, shuffle=True):
        ...

Importing this package loads neither PyTorch nor DuckDB; each name below loads what it needs when first used.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from strapfmt.errors import (
    ArgumentError,
    CaptureError,
    CompiledModelError,
    CorruptError,
    DatasetChangedError,
    DatasetClosedError,
    DatasetExistsError,
    DatasetNotFoundError,
    DiskSpaceError,
    DrainError,
    FormatError,
    MissingExtraError,
    OrdinalNotFoundError,
    QueryError,
    RingFullError,
    RowNotFoundError,
    SiteNeverFiredError,
    SiteNotFoundError,
    StoppedPassError,
    StrapfmtError,
    UnsupportedError,
    ViewError,
    WriteError,
    WriterClosedError,
    WriterConflictError,
)

if TYPE_CHECKING:
    from strapfmt.dataset import Dataset as Dataset
    from strapfmt.dataset import open as open  # noqa: A004 - strapfmt.open("run.strap") is how it is written
    from strapfmt.repair import repair as repair
    from strapfmt.verify import verify as verify
    from strapfmt_capture import capture as capture
    from strapfmt_capture import create as create
    from strapfmt_capture.sites import list_sites as sites

__all__ = [
    "ArgumentError",
    "CaptureError",
    "CompiledModelError",
    "CorruptError",
    "Dataset",
    "DatasetChangedError",
    "DatasetClosedError",
    "DatasetExistsError",
    "DatasetNotFoundError",
    "DiskSpaceError",
    "DrainError",
    "FormatError",
    "MissingExtraError",
    "OrdinalNotFoundError",
    "QueryError",
    "RingFullError",
    "RowNotFoundError",
    "SiteNeverFiredError",
    "SiteNotFoundError",
    "StoppedPassError",
    "StrapfmtError",
    "UnsupportedError",
    "ViewError",
    "WriteError",
    "WriterClosedError",
    "WriterConflictError",
    "__version__",
    "capture",
    "create",
    "open",
    "repair",
    "sites",
    "verify",
]

__version__ = "0.1.0"

_MODULES = {
    "Dataset": "strapfmt.dataset",
    "capture": "strapfmt_capture",
    "create": "strapfmt_capture",
    "open": "strapfmt.dataset",
    "repair": "strapfmt.repair",
    "sites": "strapfmt_capture",
    "verify": "strapfmt.verify",
}


class _Package(ModuleType):
    """Keeps `strapfmt.verify` and `strapfmt.repair` functions, which importing the modules so called would replace."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
