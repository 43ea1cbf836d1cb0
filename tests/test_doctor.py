"""What `strapfmt doctor` measures is consistent, what it advises follows from it, and nothing stays on the disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model

from strapfmt.cli import doctor as doctor_module
from strapfmt.cli import main
from strapfmt_capture.machine import Gpu, Limits, Machine, Rates, examine

GOOD = Machine(
    directory=Path("/data"),
    limits=Limits(
        n_cores=8,
        load=0.1,
        memory_bytes=64 << 30,
        free_bytes=1 << 40,
        filesystem="ext4",
        open_files=4096,
        locked_bytes=None,
        may_idle=True,
    ),
    rates=Rates(
        copy=8e9,
        statistics=3e9,
        disk=2.5e9,
        capture=2.0e9,
        capture_plain=2.2e9,
        codecs={"lz4": 1e9, "zstd": 0.5e9},
        sync_s=0.001,
    ),
    gpus=(),
)


def with_limits(**changes: Any) -> Machine:
    return replace(GOOD, limits=replace(GOOD.limits, **changes))


def with_rates(**changes: Any) -> Machine:
    return replace(GOOD, rates=replace(GOOD.rates, **changes))


def with_gpu(to_pinned: float | None) -> Machine:
    gpu = Gpu(name="A", memory_bytes=1, free_bytes=1, to_pinned=to_pinned, to_pageable=3e9)
    return replace(GOOD, gpus=(gpu,))


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", *map(str, arguments)])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_a_machine_is_measured_and_nothing_stays(tmp_path: Path) -> None:
    machine = examine(tmp_path, n_bytes=8 << 20)
    assert list(tmp_path.iterdir()) == []
    assert machine.limits.n_cores >= 1
    assert machine.limits.memory_bytes > machine.limits.n_cores
    rates = machine.rates
    assert set(rates.codecs) == {"lz4", "zstd"}
    assert min(rates.copy, rates.statistics, rates.disk, rates.capture, *rates.codecs.values()) > 1e6
    assert rates.sync_s > 0
    assert len(machine.gpus) == torch.cuda.device_count()


def test_what_fits_follows_from_the_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--size-mib", 8, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    rate = out["rates"]["capture"]
    by_name = {(entry["model"], entry["sites"]): entry for entry in out["fits"]}
    llama = by_name["Llama 3.1 8B", "all 32"]
    assert llama["bytes_per_token"] == 32 * 4096 * 2
    assert llama["tokens_per_s"] == pytest.approx(rate / llama["bytes_per_token"])
    assert llama["tokens_until_full"] == out["limits"]["free_bytes"] // llama["bytes_per_token"]


def test_a_model_of_one_s_own_is_judged_by_its_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("llama", dtype=torch.float16).save_pretrained(tmp_path / "model")
    sites = ["--sites", "blocks.*.resid_post", "--sites", "logits"]
    assert run(tmp_path, "--model", tmp_path / "model", *sites, "--size-mib", 8, "--json") == 0
    fits = json.loads(capsys.readouterr().out)["fits"]
    assert [entry["bytes_per_token"] for entry in fits] == [2 * 32 * 2, 101 * 2]


def test_the_table_names_the_rate_and_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--size-mib", 8) == 0
    captured = capsys.readouterr()
    assert "captured, durable, with statistics" in captured.out
    assert "Llama 3.1 70B" in captured.out
    assert "measuring in" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "expected a directory that exists"),
        ([".", "--sites", "x"], "expected --model NAME"),
        ([".", "--model", "./nowhere"], "--model"),
        ([".", "--model", "demo", "--sites", "blocks.9.resid_post"], "no site 'blocks.9.resid_post'"),
        ([".", "--size-mib", "1"], "size-mib"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_measured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "measuring" not in captured.err


def test_a_good_machine_needs_nothing() -> None:
    assert list(doctor_module._advice(GOOD)) == []
    assert list(doctor_module._advice(with_gpu(50e9))) == []


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (with_limits(load=7.0), "other work was running (load 7.0)"),
        (with_limits(n_cores=1), "one core"),
        (with_limits(filesystem="tmpfs"), "in memory"),
        (with_limits(filesystem="nfs4"), "nfs4 file system"),
        (with_limits(free_bytes=1 << 30), "only 1.0 GiB are free"),
        (with_limits(open_files=256), "only 256 files"),
        (with_rates(disk=0.2e9), "local NVMe"),
        (with_rates(capture=0.4e9, disk=0.4e9), "codec lz4 is quicker here"),
        (with_rates(capture=1.0e9), "stats=False"),
        (with_rates(sync_s=0.5), "commit_interval_s"),
        (with_gpu(None), "no memory can be locked for GPU 0"),
        (with_gpu(2e9), "check its slot"),
    ],
)
def test_what_is_wrong_is_named(machine: Machine, words: str) -> None:
    assert any(words in line for line in doctor_module._advice(machine))
