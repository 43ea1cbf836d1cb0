"""Every benchmark runs, on tiny sizes: their numbers mean nothing here, but what they read is checked."""

import json
import math
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_costs
from benchmarks.__main__ import QUESTIONS, main
from benchmarks.gpu_plan import Plan, Results
from benchmarks.measure import Case, Report, Settings, in_rounds
from benchmarks.models import TINY, Shape
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
        "gpu_costs",
        "gpu_plan",
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


def run_on_the_host(tmp_path: Path, *options: str) -> tuple[dict[str, Any], int]:
    """Run the benchmark of GPUs without one; return the sections of its results, and its exit status."""
    places = [
        "--disk",
        str(tmp_path / "disk"),
        "--results",
        str(tmp_path / "gpu.json"),
        "--memory",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit) as exit_:
        gpu.main(["--quick", "--device", "cpu", *options, *places])
    return json.loads((tmp_path / "gpu.json").read_text())["sections"], int(exit_.value.code or 0)


def test_the_gpu_benchmark_runs_on_any_device_and_keeps_no_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    build_on = Shape.build_on

    def noted(*arguments: Any) -> Any:
        model = build_on(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Shape, "build_on", noted)
    sections, status = run_on_the_host(tmp_path, "--only", "limits", "--only", "figures", "--mode", "eager")
    assert status == 0
    assert set(sections["limits"]["found"]) == {"disk_gb_per_s", "memory_gb_per_s"}
    figures = sections["figures"]
    assert figures["is_quick"]
    assert {"failure", "not_reached"}.isdisjoint(figures)
    assert [row for row in figures["rows"] if "failure" in row] == []
    captured = [row for row in figures["rows"] if "rows_seen" in row]
    assert len(captured) == 5
    assert all(row["rows_seen"] == row["rows_stored"] > 0 for row in captured)
    assert all(row["values"].startswith("exact in") and not row["problems"] for row in captured)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "gpu.json"]
    assert [model() for model in models] == [None]


@contextmanager
def other_values(
    model: Any, layers: list[int], plain_hooks: Any = gpu_costs._plain_hooks
) -> Iterator[dict[int, list[torch.Tensor]]]:
    with plain_hooks(model, layers) as held:
        yield held
    for values in held.values():
        for value in values:
            value.add_(1)


def test_values_that_differ_are_seen_by_the_gpu_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(
        device=torch.device("cpu"),
        is_quick=True,
        until=math.inf,
        modes=("eager",),
        memory=tmp_path,
        disk=tmp_path,
    )
    work = gpu_costs.Work(phase="decode", n_sequences=2, n_tokens=3)
    model = TINY.build_on(plan.device, torch.bfloat16)
    with torch.no_grad(), gpu_costs._runner(plan, model, work) as run:
        assert gpu_costs._exact(plan, model, run) == {"values": "exact in 72 rows"}
        with gpu_costs._captured(model, tmp_path) as cap:
            run()
            run()
        assert "problems" not in gpu_costs._near(model, work, cap.path)
        of_layer_0 = model.model.layers[0].register_forward_hook(lambda *call: call[2] * 1.5)
        assert gpu_costs._near(model, work, cap.path)["problems"]
        of_layer_0.remove()
        monkeypatch.setattr(gpu_costs, "_plain_hooks", other_values)
        assert gpu_costs._exact(plan, model, run)["values"] == "72 of 72 rows differ"


def test_what_fails_or_is_not_reached_in_the_gpu_benchmark_is_a_result_and_the_rest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gpu.json").write_text('{"sections": {"tests": {"cases": []}}}')
    monkeypatch.setattr(gpu_costs, "_hook_cost", lambda plan: {}["no such key"])
    monkeypatch.setattr(gpu, "_disk_rate", lambda plan, directory: 1 / 0)
    sections, status = run_on_the_host(
        tmp_path, "--only", "limits", "--only", "figures", "--minutes", "0.3", "--mode", "CUDA graphs"
    )
    assert status == 1
    assert sections["tests"] == {"cases": []}  # of an earlier run
    assert sections["limits"]["found"]["disk_gb_per_s"] == "ZeroDivisionError: division by zero"
    assert sections["figures"]["rows"][0]["failure"] == "KeyError: 'no such key'"


def test_a_section_that_ends_early_leaves_what_it_had_found(tmp_path: Path) -> None:
    plan = Plan(
        device=torch.device("cpu"), is_quick=True, until=0.0, modes=(), memory=tmp_path, disk=tmp_path
    )
    results = Results(tmp_path / "gpu.json", plan)

    def interrupted() -> None:
        with results.section("figures") as section:
            results.measure(section, "a", -math.inf, lambda: {"x": 1.0})
            results.measure(section, "b", 60.0, lambda: {"x": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with results.section("limits"):
        raise ValueError("no disk\nat all")
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert [(row["case"], row["x"]) for row in found["figures"]["rows"]] == [("a", 1.0)]
    assert found["figures"]["not_reached"] == ["b"]
    assert found["figures"]["failure"] == "KeyboardInterrupt"
    assert found["limits"]["failure"] == "ValueError: no disk"
    (tmp_path / "gpu.json").write_text("cut o")
    assert Results(tmp_path / "gpu.json", plan).sections == {}


def test_what_a_section_of_the_gpu_benchmark_lacks_is_told_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    sections, status = run_on_the_host(tmp_path, "--only", "tests")
    assert status == 1
    assert sections["tests"]["failure"].startswith("RuntimeError: missing tokenizers (ModuleNotFoundError")


def gpu_tests(wrong: str, end: str) -> str:
    return GPU_TESTS.replace("WRONG", wrong).replace("ON_A_GPU", "pytest.mark.gpu").replace("END", end)


GPU_TESTS = """
import os
import pytest

@ON_A_GPU
def test_well():
    pass

WRONG
@ON_A_GPU
@pytest.mark.skipif(True, reason="needs two GPUs")
def test_two():
    pass

@ON_A_GPU
def test_end():
    END
"""


WRONG = """@ON_A_GPU
def test_wrong():
    assert 1 == 2, "not so"
"""


@pytest.mark.parametrize(
    ("end", "why"),
    [("pass", None), ("os._exit(3)", "it ended with 3, and left no report")],
)
def test_tests_on_a_gpu_that_end_the_process_leave_the_outcomes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, why: str | None
) -> None:
    monkeypatch.setattr(gpu, "_ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider")
    file = tmp_path / "test_some.py"
    file.write_text(gpu_tests(WRONG, end))
    cases = gpu._run_file(file, 100.0)
    outcomes = {case["test"]: case["outcome"] for case in cases}
    expected = {"well": "passed", "wrong": "failure", "two": "skipped"}
    assert outcomes | {f"test_some::test_{name}": outcome for name, outcome in expected.items()} == outcomes
    assert outcomes.get("test_some::test_end") == (None if why else "passed")
    assert [case.get("why") for case in cases if case["test"] == "test_some.py"] == ([why] if why else [])
    if why is None:
        assert "not so" in cases[1]["why"]


def test_an_exit_without_a_failed_test_is_an_error_though_one_was_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider")
    (tmp_path / "conftest.py").write_text("def pytest_sessionfinish(session):\n    session.exitstatus = 7\n")
    (tmp_path / "test_some.py").write_text(gpu_tests("", "pass"))
    cases = gpu._run_file(tmp_path / "test_some.py", 100.0)
    assert [case["outcome"] for case in cases] == ["passed", "skipped", "passed", "error"]
    assert cases[-1]["why"] == "it ended with 7"


def test_tests_on_a_gpu_that_take_too_long_leave_the_outcomes_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], *, stdout: Any, timeout: float, **options: Any) -> None:
        stdout.write("tests/test_some.py::test_well[a b] PASSED  [ 50%]\ntests/test_some.py::test_wrong ")
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    well, ended = gpu._run_file(tmp_path / "test_some.py", 8.0)
    assert well == {"test": "test_some::test_well[a b]", "outcome": "passed"}
    assert (ended["outcome"], ended["why"]) == ("error", "it was ended after 8 s, and left no report")
    assert ended["detail"].endswith("test_wrong ")


def test_all_files_with_tests_for_a_gpu_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(gpu, "_run_file", lambda file, timeout_s: seen.append(file.name) or [])
    sections, status = run_on_the_host(tmp_path, "--only", "tests")
    assert (seen, status) == (["test_compiled.py", "test_gpu.py"], 0)
    assert sections["tests"]["cases"] == []


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
