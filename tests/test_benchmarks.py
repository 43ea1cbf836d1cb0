"""Every benchmark runs, on tiny sizes: their numbers mean nothing here, but what they read is checked."""

import json
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.__main__ import QUESTIONS, main
from benchmarks.measure import Case, Report, Settings, in_rounds
from benchmarks.tables import tables


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_benchmark_answers_its_question(tmp_path: Path, question: str) -> None:
    options = ["--quick", "--rounds", "1", "--no-peers", "--directory", str(tmp_path / "data")]
    main([question, *options, "--results", str(tmp_path)])
    result = json.loads((tmp_path / f"{question}.json").read_text())
    assert result["question"] == question
    assert {"cpu", "cores", "kernel", "filesystem"} <= result["machine"].keys()
    assert {"strapfmt", "torch", "pyarrow"} <= result["versions"].keys()
    measured = [row for row in result["rows"] if "failure" not in row]
    assert all(row["ratio"] > 0 and len(row["seconds"]) >= 1 for row in measured)
    assert not list((tmp_path / "data").iterdir()), "scratch files are gone"


def test_every_benchmark_is_listed() -> None:
    folder = Path(__file__).parents[1] / "benchmarks"
    shared = {
        "__init__",
        "__main__",
        "files",
        "formats",
        "gpu",
        "measure",
        "models",
        "stored",
        "tables",
        "workloads",
    }
    assert {file.stem for file in folder.glob("*.py")} - shared == set(QUESTIONS)


def test_the_page_shows_the_stored_results() -> None:
    page = (Path(__file__).parents[1] / "docs" / "performance.md").read_text()
    at = 0
    for table in tables():
        at = page.find(table, at)
        assert at >= 0, f"run `python -m benchmarks.tables`; not on the page, or not in this order:\n{table}"


def test_the_gpu_benchmark_runs_on_any_device(tmp_path: Path) -> None:
    options = ["--quick", "--device", "cpu", "--no-tests", "--mode", "eager", "--memory", str(tmp_path)]
    places = ["--disk", str(tmp_path / "disk"), "--results", str(tmp_path / "gpu.json")]
    with pytest.raises(SystemExit) as exit_:
        gpu.main([*options, *places])
    assert exit_.value.code == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["is_quick"]
    assert [row for row in result["rows"] if "failed" in row] == []
    captured = [row for row in result["rows"] if "rows_seen" in row]
    assert len(captured) == 5
    assert all(row["rows_seen"] == row["rows_stored"] > 0 for row in captured)
    assert result["not_measured"] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "gpu.json"]


def test_ratios_are_paired_by_round() -> None:
    report = Report("", {})
    report.add("g", {"a": [1.0, 4.0, 1.0], "b": [2.0, 8.0, 2.0]}, reference="a")
    assert [row["ratio"] for row in report.rows] == [1.0, 2.0]
    report.add("g", {"a": [1.0, 4.0, 1.0], "b": [2.0, 8.0, 2.0]}, reference="a", is_rate=True, n_bytes=10**9)
    assert report.rows[-1]["ratio"] == 0.5
    assert report.rows[-1]["gb_per_s"] == 0.5


def test_the_order_rotates_and_the_quickest_of_repeats_counts() -> None:
    order: list[str] = []
    times = iter([3.0, 2.0, 5.0])
    cases = {
        "a": Case(run=lambda: order.append("a") or 1.0),
        "b": Case(run=lambda: order.append("b") or next(times, 4.0), repeats=3),
    }
    seconds = in_rounds(cases, Settings(rounds=2), warm_up=False)
    assert order == ["a", "b", "b", "b", "b", "b", "b", "a"]
    assert seconds == {"a": [1.0, 1.0], "b": [2.0, 4.0]}
