"""The benchmark of captures: what is measured is checked row by row, and what cannot be measured says so."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import strapfmt
from benchmarks.__main__ import main
from benchmarks.measure import Settings
from benchmarks.models import TINY, Workload, load, resid_post, save
from benchmarks.peers.environments import ENVIRONMENTS, python_of
from benchmarks.peers.process import PeerError, Process
from benchmarks.stored import Reference, check, reference
from benchmarks.tables import tables

PREFILL = Workload(phase="prefill", n_sequences=2, n_prompt=5, n_batches=2)
DECODE = Workload(phase="decode", n_sequences=3, n_prompt=4, n_batches=1, n_new=4)
SITES = resid_post(TINY.n_layers)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save(TINY, directory)
    return directory


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("results")
    options = ["--quick", "--rounds", "1", "--no-peers", "--directory", str(directory / "data")]
    main(["capture_overhead", *options, "--results", str(directory)])
    return json.loads((directory / "capture_overhead.json").read_text())


def test_all_rows_of_a_capture_are_there_and_exact(result: dict) -> None:
    ours = [row for row in result["rows"] if row["case"].startswith("strapfmt") and "failure" not in row]
    assert len(ours) >= 2 * 5, "two workloads, and five ways that need nothing special"
    for row in ours:
        n_positions = row["n_expected"] // (TINY.n_layers * (3 if "three" in row["case"] else 1))
        assert n_positions > 0
        assert (row["n_rows"], row["verdict"]) == (row["n_expected"], "exact"), row["case"]


def test_the_last_hidden_state_is_found_to_be_another_value(result: dict) -> None:
    rows = [row for row in result["rows"] if row["case"].startswith("`output_hidden_states`")]
    assert len(rows) == 2
    for row in rows:
        assert row["n_wrong"] == row["n_expected"] // TINY.n_layers


def test_every_pair_is_kept_with_its_times(result: dict) -> None:
    for row in result["rows"]:
        for pair in row.get("pairs", []):
            for times in pair.values():
                assert 0 < times["passes_s"] <= times["total_s"]
                assert 0 < times["thread_s"] <= times["cpu_s"] * 1.01 + 0.01


@pytest.mark.parametrize("workload", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_the_reference_is_what_the_model_computes(source: Path, workload: Workload) -> None:
    """A pass over whole sequences knows nothing of batches, steps and caches."""
    true = reference(source, workload)
    model = load(source, "float32")
    with torch.no_grad():
        states = model(true.tokens, output_hidden_states=True).hidden_states
    assert true.tokens.shape == (workload.n_batches * workload.n_sequences, workload.n_positions)
    assert torch.allclose(true.values[SITES[0]], states[1], atol=1e-6)


def _capture(source: Path, workload: Workload, path: Path) -> Reference:
    true, model = reference(source, workload), load(source, "float32")
    with (
        strapfmt.capture(model, path / "run.strap", sites=["blocks.*.resid_post"], quiet=True),
        torch.no_grad(),
    ):
        for prompts in workload.batches(TINY.d_vocab):
            workload.run(model, prompts)
    return true


@pytest.mark.parametrize("workload", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_a_row_that_differs_is_counted(source: Path, tmp_path: Path, workload: Workload) -> None:
    true = _capture(source, workload, tmp_path)
    found = check(tmp_path, "strapfmt", SITES, true)
    n_rows = len(SITES) * workload.n_rows
    assert (found.n_rows, found.n_expected, found.n_exact, found.n_wrong) == (n_rows, n_rows, n_rows, 0)
    true.values[SITES[1]][0, 1] += 1.0
    true.values[SITES[0]][1, 2] *= 1 + 1e-5
    found = check(tmp_path, "strapfmt", SITES, true)
    assert (found.n_rows, found.n_exact, found.n_wrong) == (n_rows, n_rows - 2, 1)
    assert found.error == pytest.approx(1e-5, rel=0.1)


def test_a_row_with_another_rows_token_is_refused(source: Path, tmp_path: Path) -> None:
    true = _capture(source, DECODE, tmp_path)
    true.tokens[2, 3] += 1
    with pytest.raises(ValueError, match="tokens"):
        check(tmp_path, "strapfmt", SITES, true)


def test_rows_that_are_missing_or_in_no_order_are_not_right(source: Path, tmp_path: Path) -> None:
    true = reference(source, PREFILL)
    file = tmp_path / "00000.safetensors"
    save_file({site: true.values[site].contiguous() for site in SITES}, file)
    assert check(tmp_path, "safetensors", SITES, true).verdict == "exact"
    assert check(tmp_path, "torch", SITES, true).verdict == "none"
    save_file({SITES[0]: true.values[SITES[0]][:3].contiguous()}, file)
    found = check(tmp_path, "safetensors", SITES, true)
    assert (found.n_rows, found.n_expected, found.verdict) == (15, 40, "15 wrong")
    save_file({site: true.values[site].flip(0).contiguous() for site in SITES}, file)
    assert check(tmp_path, "safetensors", SITES, true).n_wrong == 40


def test_values_that_are_not_numbers_are_wrong(source: Path, tmp_path: Path) -> None:
    true = reference(source, PREFILL)
    values = {site: true.values[site].clone() for site in SITES}
    values[SITES[0]][0, 0, 0] = torch.nan
    save_file(values, tmp_path / "00000.safetensors")
    assert check(tmp_path, "safetensors", SITES, true).n_wrong == 1


def test_a_worker_answers_with_the_last_line_of_its_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    request = {"system": "strapfmt", "path": str(tmp_path / "run"), "is_base_first": True}
    with Process(Path(sys.executable), "ours", source, tmp_path / "log") as process:
        with pytest.raises(PeerError, match=r"TypeError: .*unknown"):
            process.ask(workload={"unknown": 1}, **request)
        answer = process.ask(
            workload={"phase": "prefill", "n_sequences": 1, "n_prompt": 3, "n_batches": 1}, **request
        )
        assert set(answer) == {"base", "capture"}
    with pytest.raises(PeerError, match="no_such_peer"):
        Process(Path(sys.executable), "no_such_peer", source, tmp_path / "log")


def test_a_failure_has_a_row_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tables.QUESTIONS", ("capture_overhead",))
    measured = {
        "group": "g",
        "case": "a",
        "median_s": 1.0,
        "ratio": 1.01,
        "ratio_quartiles": [1.0, 1.02],
        **{f"{what}_ratio": 1.0 for what in ("thread", "cpu", "total")},
        "n_rows": 1_000,
        "n_expected": 2_000,
        "verdict": "1 wrong",
    }
    rows = [measured, {"group": "g", "case": "b", "failure": "failed: a|b"}]
    (tmp_path / "capture_overhead.json").write_text(json.dumps({"rows": rows}))
    (table,) = tables(tmp_path)
    _, _, first, second = table.splitlines()
    assert first.endswith(
        "| **+1.0 %** | +0.0 % to +2.0 % | +0.0 % | +0.0 % | +0.0 % | 1,000 of 2,000 | 1 wrong |"
    )
    assert second.startswith("| b | failed: a\\|b |")
    assert second.replace("\\|", "").count("|") == first.count("|")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_a_peer_leaves_what_its_row_says(source: Path, tmp_path: Path, name: str) -> None:
    """Runs where the environments have been made, by the benchmark itself."""
    python = python_of(name, Settings().peers_directory, is_made=False)
    if python is None:
        pytest.skip(f"no environment of {name} in {Settings().peers_directory}: run the benchmark once")
    true = reference(source, PREFILL)
    with Process(python, name, source, tmp_path / "log") as process:
        for number, (system, facts) in enumerate(process.systems.items()):
            path = tmp_path / str(number)
            path.mkdir()
            workload = {"phase": "prefill", "n_sequences": 2, "n_prompt": 5, "n_batches": 2}
            process.ask(system=system, workload=workload, path=str(path), is_base_first=True)
            found = check(path, facts["reader"], facts["sites"], true)
            assert found.n_wrong == 0
            assert found.n_rows in (0, found.n_expected)


def test_files_of_batches_are_joined_in_order(source: Path, tmp_path: Path) -> None:
    true = reference(source, PREFILL)
    for number, values in enumerate(torch.split(true.values[SITES[0]], 2)):
        save_file({SITES[0]: values.contiguous()}, tmp_path / f"{number:05}.safetensors")
    assert len(load_file(tmp_path / "00001.safetensors")[SITES[0]]) == 2
    assert check(tmp_path, "safetensors", SITES[:1], true).verdict == "exact"
