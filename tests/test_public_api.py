"""The names `strapfmt` offers, and that importing it stays light."""

import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import strapfmt
from strapfmt import errors

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = [
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
FUNCTIONS = ["capture", "create", "open", "repair", "sites", "verify"]


def test_public_names_are_exactly_these():
    assert strapfmt.__all__ == PUBLIC
    assert dir(strapfmt) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there(name):
    assert getattr(strapfmt, name) is not None


def test_every_exception_is_public():
    assert {name for name in errors.__all__ if name.endswith("Error")} <= set(PUBLIC)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'captrue'"):
        strapfmt.captrue  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_stay_functions_after_modules_of_their_name_are_imported(name):
    for module in ("strapfmt.verify", "strapfmt.repair", "strapfmt.dataset"):
        importlib.import_module(module)
    assert not isinstance(getattr(strapfmt, name), type(sys))
    assert callable(getattr(strapfmt, name))


def test_no_module_is_called_capture():
    assert importlib.util.find_spec("strapfmt.capture") is None


def test_importing_loads_neither_torch_nor_duckdb():
    heavy = "{'torch', 'duckdb', 'transformers', 'pyarrow', 'pandas', 'polars'}"
    code = f"import sys, strapfmt; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_opening_a_dataset_loads_no_torch(tmp_path):
    code = f"""
import sys, strapfmt
from strapfmt.writer import DatasetWriter
DatasetWriter({str(tmp_path / "a.strap")!r}).close()
with strapfmt.open({str(tmp_path / "a.strap")!r}) as ds:
    ds.sql("select * from tokens"), repr(ds)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


def test_the_distribution_takes_its_version_from_the_package():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["hatch"]["version"]["path"] == "strapfmt/__init__.py"
    assert re.fullmatch(r"\d+\.\d+\.\d+", strapfmt.__version__)
