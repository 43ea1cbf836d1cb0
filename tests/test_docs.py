"""The code in README.md and docs/ runs as a reader would run it, and the links lead somewhere.

Fences of a page, in order, in one namespace and one directory:

- `python`: runs. `python raises NAME`: has to raise that exception. `python no-run REASON`: does not run here.
- `console`: lines that begin with `$ strapfmt` run (in this process); other lines are for people.
- `text` right after one of these, with only a sentence between: what it printed or raised, numbers aside.
  A line `...` stands for any lines.

Pages in docs/how-to/ begin where docs/quickstart.md ends: with its names, and a copy of its files.
"""

import contextlib
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import strapfmt
from strapfmt.cli import main

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "docs" / "quickstart.md"
HOW_TO = sorted((ROOT / "docs" / "how-to").glob("*.md"))
# docs/cli.md is test_cli.py's; design notes show code that was weighed, not code to run.
ON_THEIR_OWN = [ROOT / "README.md", *(p for p in sorted((ROOT / "docs").glob("*.md")) if p.name != "cli.md")]
LINKED = [ROOT / "README.md", ROOT / "CHANGELOG.md"] + [
    path for folder in ("docs", "spec") for path in sorted((ROOT / folder).rglob("*.md"))
]

_FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?P<target>[^)\s]+)\)")
_WITHOUT_CODE = re.compile(r"^```.*?^```$|^(?: {4}|\t).*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_RULE = re.compile(r"([─═╌])\1+")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block of a page, and the output that the page shows for it."""

    place: str
    line: int
    kind: str
    options: tuple[str, ...]
    code: str
    shown: str | None


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page that run, in order."""
    text = page.read_text("utf-8")
    found = list(_FENCE.finditer(text))
    for number, fence in enumerate(found):
        kind, *options = fence["info"].split() or [""]
        if kind not in ("python", "console") or options[:1] == ["no-run"]:
            continue
        following = found[number + 1] if number + 1 < len(found) else None
        between = text[fence.end() : following.start()].strip() if following else ""
        is_shown = following is not None and following["info"] == "text" and "\n\n" not in between
        line = text.count("\n", 0, fence.start()) + 2
        yield Block(
            place=f"{page.relative_to(ROOT)}:{line}",
            line=line,
            kind=kind,
            options=tuple(options),
            code=fence["body"],
            shown=following["body"] if is_shown and following else None,
        )


def run(page: Path, namespace: dict[str, Any]) -> None:
    """Run every block of a page in the current directory, and compare what it shows."""
    for block in blocks(page):
        printed = console(block) if block.kind == "console" else python(block, namespace)
        if block.shown is not None:
            assert agrees(block.shown, printed), f"{block.place} shows\n{block.shown}\nand printed\n{printed}"


def python(block: Block, namespace: dict[str, Any]) -> str:
    """Run a Python block; return what it printed, or the exception it was to raise."""
    code = compile("\n" * (block.line - 1) + block.code, str(ROOT / block.place.partition(":")[0]), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if block.options[:1] == ("raises",):
            with pytest.raises(getattr(strapfmt, block.options[1])) as raised:
                exec(code, namespace)  # noqa: S102 - documentation is code of ours
            return f"{type(raised.value).__module__}.{type(raised.value).__name__}: {raised.value}"
        exec(code, namespace)  # noqa: S102
    return printed.getvalue()


def console(block: Block) -> str:
    """Run the strapfmt commands of a console block; return what they printed."""
    printed = io.StringIO()
    for line in block.code.splitlines():
        if not line.startswith("$ strapfmt "):
            continue
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as ended:
            main(shlex.split(line, comments=True)[2:])
        expected = int(block.options[1]) if block.options[:1] == ("exits",) else 0
        assert ended.value.code == expected, f"{block.place}: {line}\n{printed.getvalue()}"
    return printed.getvalue()


def agrees(shown: str, printed: str) -> bool:
    """Say whether two outputs are the same but for numbers, spacing, and lines that `...` stands for."""
    expected, found = _comparable(shown), _comparable(printed)
    pattern = "".join(r"(?:.*\n)*?" if line == "..." else re.escape(line) + r"\n" for line in expected)
    return re.fullmatch(pattern, "".join(line + "\n" for line in found)) is not None


def _comparable(text: str) -> list[str]:
    lines = (" ".join(_RULE.sub(r"\1", _NUMBER.sub("0", line)).split()) for line in text.splitlines())
    return [line for line in lines if line]


def name_of(page: Path) -> str:
    """Name a page in the list of tests."""
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Run the quickstart once; give the names and the files that it leaves."""
    folder, namespace = tmp_path_factory.mktemp("quickstart"), dict[str, Any]()
    with contextlib.chdir(folder):
        run(QUICKSTART, namespace)
    return namespace, folder


def test_quickstart_runs(quickstart: tuple[dict[str, Any], Path]) -> None:
    namespace, folder = quickstart
    assert {"model", "tokenizer"} <= set(namespace)
    assert strapfmt.verify(folder / "run.strap").valid


@pytest.mark.parametrize("page", HOW_TO, ids=name_of)
def test_how_to_runs_after_the_quickstart(
    page: Path, quickstart: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    namespace, folder = quickstart
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with contextlib.chdir(tmp_path):
        run(page, dict(namespace))
    assert not namespace["model"]._forward_pre_hooks


@pytest.mark.parametrize("page", [page for page in ON_THEIR_OWN if page != QUICKSTART], ids=name_of)
def test_page_runs_on_its_own(page: Path, tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        run(page, {})


def test_every_how_to_has_code_that_runs_and_stands_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    assert HOW_TO
    assert [page.name for page in HOW_TO if f"](how-to/{page.name})" not in index] == []
    assert [page.name for page in HOW_TO if not any(blocks(page))] == []


def test_every_public_name_is_documented() -> None:
    text = "".join(page.read_text("utf-8") for page in [*ON_THEIR_OWN, *HOW_TO])
    named = set(re.findall(r"strapfmt\.(\w+)|`(\w+Error)`", text))
    names = {name for pair in named for name in pair} | {"Dataset", "__version__"}  # what open() returns
    assert sorted(set(strapfmt.__all__) - names) == []


def test_block_that_does_not_run_says_why() -> None:
    pages = [*ON_THEIR_OWN, *HOW_TO]
    infos = [fence["info"].split() for page in pages for fence in _FENCE.finditer(page.read_text("utf-8"))]
    kinds = {"python", "console", "text", "bash", "js", ""}
    assert [info for info in infos if info and info[0] not in kinds] == []
    assert [info for info in infos if info[1:2] == ["no-run"] and len(info) < 4] == []


@pytest.mark.parametrize(
    ("shown", "printed", "expected"),
    [
        ("rows  4,096\n", "rows 17\n", True),
        ("first\n...\nlast\n", "first\nx\ny\nlast\n", True),
        ("first\n...\n", "first\n", True),
        ("site  rows\n", "site  bytes\n", False),
        ("first\nlast\n", "first\nx\nlast\n", False),
        ("only\n", "", False),
    ],
)
def test_output_is_compared_but_for_numbers(shown: str, printed: str, expected: bool) -> None:
    assert agrees(shown, printed) is expected


# Links.


def links(page: Path) -> list[str]:
    """Return the targets of the links of a page that lead into this repository."""
    prose = _WITHOUT_CODE.sub("", page.read_text("utf-8"))
    targets = [found["target"] for found in _LINK.finditer(prose)]
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """Return the anchors that a Markdown page has: its headings in lower case, punctuation left out."""
    text = _FENCE.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        if not goal.exists() or (anchor and goal.suffix == ".md" and anchor not in anchors(goal)):
            broken.append(target)
    assert broken == []


def test_readme_links_to_the_documentation() -> None:
    targets = {target.partition("#")[0] for target in links(ROOT / "README.md")}
    assert {"docs/README.md", "docs/quickstart.md", "spec/strapfmt-1.md", "CHANGELOG.md"} <= targets
