"""Imports point down the table of layers, heavy packages load only where they are needed."""

import ast
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"strapfmt": ROOT / "strapfmt", "strapfmt_capture": ROOT / "capture" / "strapfmt_capture"}

# A unit is a module of strapfmt/, one of its folders, or all of strapfmt_capture. It may import the units
# of the lines above its own, and no other unit of its own line.
LAYERS: list[set[str]] = [
    {"spec", "errors", "text"},
    {"dtypes", "codecs", "extras", "batches", "bits", "paths", "json_fields", "arguments"},
    {"schema", "arrowfile", "records"},
    {"manifest", "index"},
    {"layout", "commit", "counters", "mapped", "report", "row_checks", "row_buffer"},
    {"ranks", "shard", "shard_files", "claim", "salvage", "unfinished", "marks"},
    {"shard_reader", "series"},
    {"site_writer", "sharded", "addresses", "table"},
    {"arrow_rows", "session", "manifest_writer"},
    {"site"},
    {"writer", "sequence", "sites_view", "state"},
    {"reader"},
    {"query", "loader", "verify", "rescue", "testing", "done_keys"},
    {"repair"},
    {"dataset"},
    {"strapfmt_capture"},
    {"analysis", "interop"},
    {"strapfmt"},
    {"cli", "server", "instrumentation"},
    {"__main__"},
]

# What a line above would allow and the design does not.
WRITING = {"shard", "series", "site_writer", "session", "manifest_writer", "writer", "commit"}
READING = {
    "mapped",
    "ranks",
    "shard_files",
    "shard_reader",
    "addresses",
    "sharded",
    "arrow_rows",
    "site",
    "sites_view",
    "state",
    "sequence",
    "reader",
    "query",
    "loader",
    "dataset",
}
FORBIDDEN: dict[str, set[str]] = {
    **dict.fromkeys(READING, WRITING),
    **dict.fromkeys(WRITING, READING),
    "strapfmt_capture": READING | {"verify", "repair"},
}

# Names in annotations that would be an import upwards if they were loaded.
ONLY_ANNOTATED = {("sequence", "reader")}

EVERYWHERE = set().union(*LAYERS)
STDLIB_ONLY = {"spec", "errors", "text", "extras", "json_fields", "records"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowed:
    """Which units may import a package: when they are loaded, or only inside functions."""

    at_top: set[str]
    inside: set[str]


THIRD_PARTY: dict[str, Allowed] = {
    "numpy": Allowed(at_top=EVERYWHERE - STDLIB_ONLY, inside=set()),
    "pyarrow": Allowed(at_top=EVERYWHERE - STDLIB_ONLY, inside=set()),
    "xxhash": Allowed(at_top={"arrowfile"}, inside=set()),
    "torch": Allowed(
        at_top={"loader", "strapfmt_capture", "analysis"},
        inside={
            "dtypes",
            "bits",
            "shard_reader",
            "addresses",
            "site",
            "sequence",
            "reader",
            "query",
            "dataset",
            "testing",
        }
        | {"strapfmt", "cli"},
    ),
    # Inside functions only: a process that runs no SQL, such as a worker of a DataLoader, never loads it.
    "duckdb": Allowed(at_top=set(), inside={"query"}),
    "pandas": Allowed(at_top=set(), inside={"query", "reader"}),
    "polars": Allowed(at_top=set(), inside={"query", "reader"}),
    # At the top of strapfmt_capture.trainer only, whose class extends one of it; nothing imports that module.
    "transformers": Allowed(at_top={"strapfmt_capture"}, inside={"cli"}),
    "rich": Allowed(at_top={"cli"}, inside={"strapfmt_capture"}),
    "typer": Allowed(at_top={"cli"}, inside=set()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One imported module: where, what, and whether it happens when the importing module is loaded."""

    path: Path
    line: int
    unit: str
    module: str
    is_at_top: bool

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} ({self.unit}) imports {self.module}"


class _Finder(ast.NodeVisitor):
    def __init__(self, path: Path, unit: str) -> None:
        self.path, self.unit, self.depth, self.found = path, unit, 0, list[Import]()

    def _nested(self, node: ast.AST) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _nested

    def visit_If(self, node: ast.If) -> None:
        is_typing = ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        (self._nested if is_typing else self.generic_visit)(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"{self.path}:{node.lineno}: imports are written in full"
        if node.module in PACKAGES:
            for alias in node.names:
                self._add(node, f"{node.module}.{alias.name}")
        else:
            self._add(node, node.module or "")

    def _add(self, node: ast.stmt, module: str) -> None:
        self.found.append(
            Import(path=self.path, line=node.lineno, unit=self.unit, module=module, is_at_top=self.depth == 0)
        )


def unit_of_file(path: Path) -> str:
    """Name the unit that a source file belongs to."""
    if PACKAGES["strapfmt_capture"] in path.parents:
        return "strapfmt_capture"
    place = path.relative_to(PACKAGES["strapfmt"])
    if place.name == "__init__.py" and len(place.parts) == 1:
        return "strapfmt"
    return place.parts[0].removesuffix(".py")


def unit_of_module(module: str) -> str | None:
    """Name the unit that an imported name belongs to, None for a package that is not ours."""
    package, _, rest = module.partition(".")
    if package == "strapfmt_capture":
        return package
    if package != "strapfmt":
        return None
    first = rest.partition(".")[0]
    is_module = (PACKAGES["strapfmt"] / f"{first}.py").exists() or (PACKAGES["strapfmt"] / first).is_dir()
    return first if first and is_module else "strapfmt"


def layer_of(unit: str) -> int:
    """Return the line of `LAYERS` that holds a unit."""
    return next(number for number, units in enumerate(LAYERS) if unit in units)


def imports_of(path: Path) -> list[Import]:
    """Return every import of a source file, those inside functions too."""
    finder = _Finder(path, unit_of_file(path))
    finder.visit(ast.parse(path.read_bytes(), filename=str(path)))
    return finder.found


SOURCES = sorted(path for package in PACKAGES.values() for path in package.rglob("*.py"))
IMPORTS = [found for path in SOURCES for found in imports_of(path)]


def is_breach(found: Import) -> bool:
    """Say whether an import breaks the table."""
    target = unit_of_module(found.module)
    if target is None:
        return _is_foreign_breach(found)
    if target == found.unit or (found.unit == "strapfmt" and not found.is_at_top):
        return False
    if not found.is_at_top and (found.unit, target) in ONLY_ANNOTATED:
        return False
    return layer_of(target) >= layer_of(found.unit) or target in FORBIDDEN.get(found.unit, set())


def _is_foreign_breach(found: Import) -> bool:
    package = found.module.partition(".")[0]
    if package in sys.stdlib_module_names:
        return False
    allowed = THIRD_PARTY.get(package, Allowed(at_top=set(), inside=set()))
    return found.unit not in (allowed.at_top if found.is_at_top else allowed.at_top | allowed.inside)


def test_every_unit_has_one_line_in_the_table() -> None:
    units = [unit for line in LAYERS for unit in line]
    assert len(units) == len(set(units))
    assert {unit_of_file(path) for path in SOURCES} <= set(units)


def test_imports_point_down_the_table() -> None:
    assert [str(found) for found in IMPORTS if is_breach(found)] == []


@pytest.mark.parametrize(
    ("unit", "module", "is_at_top", "breach"),
    [
        ("shard", "strapfmt.writer", True, True),
        ("shard", "strapfmt.writer", False, True),
        ("reader", "strapfmt.writer", True, True),
        ("writer", "strapfmt.reader", False, True),
        ("dtypes", "strapfmt.codecs", True, True),
        ("shard", "strapfmt.manifest", True, False),
        ("writer", "torch", False, True),
        ("reader", "torch", True, True),
        ("reader", "torch", False, False),
        ("reader", "duckdb", False, True),
        ("errors", "numpy", True, True),
        ("strapfmt_capture", "strapfmt.reader", False, True),
        ("cli", "requests", False, True),
    ],
)
def test_table_refuses_what_it_should(unit: str, module: str, is_at_top: bool, breach: bool) -> None:
    found = Import(path=ROOT / "x.py", line=1, unit=unit, module=module, is_at_top=is_at_top)
    assert is_breach(found) is breach


def test_finder_tells_top_level_from_inside_functions(tmp_path: Path) -> None:
    source = PACKAGES["strapfmt"] / "dtypes.py"
    torch = [found for found in imports_of(source) if found.module == "torch"]
    assert torch
    assert not any(found.is_at_top for found in torch)
    assert (
        any(found.is_at_top and found.module == "strapfmt.errors.ArgumentError" for found in IMPORTS) is False
    )
    assert any(found.is_at_top and found.module == "strapfmt.errors" for found in imports_of(source))


def test_nothing_in_strapfmt_is_a_module_named_capture() -> None:
    assert [path for path in SOURCES if path.stem == "capture" or path.parent.name == "capture"] == []


def test_no_two_classes_of_the_capture_package_have_one_name() -> None:
    places: dict[str, list[str]] = {}
    for path in PACKAGES["strapfmt_capture"].rglob("*.py"):
        for node in ast.parse(path.read_bytes()).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path.name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_only_the_trainer_callback_imports_transformers_at_its_top() -> None:
    found = {each.path.name for each in IMPORTS if each.is_at_top and each.module.startswith("transformers")}
    assert found == {"trainer.py"}
    assert [str(each) for each in IMPORTS if each.module.startswith("strapfmt_capture.trainer")] == []


@pytest.mark.parametrize("statement", ["import strapfmt", "import strapfmt.cli", "import strapfmt.writer"])
def test_import_loads_no_heavy_package(statement: str) -> None:
    heavy = ["torch", "duckdb", "transformers", "pandas", "polars"]
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_path()
    )
    assert ran.stdout == "[]\n"


def _path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'capture'}"}
