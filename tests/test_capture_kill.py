"""kill -9 in mid-capture: what is committed is whole steps, the same for every site, and every value is right."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import tiny_model

import strapfmt
from strapfmt.errors import DatasetNotFoundError
from strapfmt.report import RepairReport

N_KILLS = int(os.environ.get("STRAPFMT_N_KILLS", "200"))
SITES = ("blocks.0.resid_post", "blocks.1.mlp_out")


def inputs(k: int) -> torch.Tensor:
    """Token ids of forward pass `k`."""
    return torch.arange(k, k + 2 * (3 + k % 5)).remainder(90).add(3).view(2, -1)


def capture_until_killed(model: torch.nn.Module, path: Path, seed: int) -> None:
    """Capture forward passes for ever, in whatever way the seed says."""
    choose, model = random.Random(seed), tiny_model("llama")
    with (
        torch.no_grad(),
        strapfmt.capture(
            model,
            path,
            sites=SITES,
            commit_interval_s=choose.choice((0.0, 0.0, 0.01)),
            host_ring_bytes=choose.choice((1 << 14, 1 << 20)),
            batch_bytes=choose.choice((1 << 10, 1 << 13)),
            shard_bytes=choose.choice((1 << 13, 1 << 22)),
            quiet=True,
        ),
    ):
        for k in range(1 << 30):
            model(inputs(k))


def kill_many(directory: Path, n_kills: int, seed: int) -> dict[str, int]:
    """Kill `n_kills` captures, forked from one process that has imported everything, and check what each left."""
    here = Path(__file__).parent
    code = f"import test_capture_kill as t; t.victims({str(directory)!r}, {n_kills}, {seed})"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, here.parent / "capture")))
    }
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60 + 2 * n_kills)
    oracle = Oracle()
    found = {"nothing": 0, "committed": 0, "steps": 0, "rescued": 0}
    for trial in range(n_kills):
        check(directory / f"{trial}.strap", oracle, found)
    return found


def victims(directory: str, n_kills: int, seed: int) -> None:
    """Fork captures and kill each at a random moment; runs in a process of its own."""
    torch.set_num_threads(1)
    choose, model = random.Random(seed), tiny_model("llama")
    with torch.no_grad(), strapfmt.capture(model, Path(directory) / "warm.strap", sites=SITES, quiet=True):
        model(inputs(0))  # everything is imported and set up before the first fork
    for trial in range(n_kills):
        path = Path(directory) / f"{trial}.strap"
        child = os.fork()
        if child == 0:
            try:
                capture_until_killed(model, path, seed + trial)
            finally:
                os._exit(1)
        time.sleep(choose.uniform(0.05, 0.6 if trial % 2 else 1.2))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            raise SystemExit(f"trial {trial} ended by itself: {status}")


def check(path: Path, oracle: "Oracle", found: dict[str, int]) -> None:
    """Check one dataset that a killed capture left."""
    try:
        dataset = strapfmt.open(path, verify="always")
    except DatasetNotFoundError:
        found["nothing"] += 1
        return
    with dataset:
        steps = dataset.steps.to_arrow().to_pydict()
        assert steps["step"] == list(range(len(steps["step"])))
        assert set(steps["status"]) <= {"complete"}
        expected = [ids for k in steps["step"] for ids in inputs(k).flatten().tolist()]
        assert dataset.tokens.to_arrow().column("token_id").to_pylist() == expected
        found["committed" if expected else "nothing"] += 1
        found["steps"] += len(steps["step"])
        if expected:
            for name, values in oracle.rows(len(expected)).items():
                assert dataset[name].rows.tolist() == list(range(len(expected)))
                assert torch.equal(dataset[name].tensor(), values), f"{path}: {name}"
    assert strapfmt.verify(path).valid
    found["rescued"] += check_repair(path, oracle, len(expected))


def check_repair(path: Path, oracle: "Oracle", n_committed: int) -> int:
    """Check that repair keeps what is committed and rescues only right values beyond; return rows beyond."""
    out = path.with_name(f"repaired-{path.name}")
    report = strapfmt.repair(path, out)
    assert isinstance(report, RepairReport)
    assert report.is_complete, report
    with strapfmt.open(out, verify="always") as repaired:
        assert repaired.report.is_clean
        beyond = 0
        for name in repaired:
            rows = repaired[name].rows
            assert rows.tolist() == list(range(len(rows)))
            assert len(rows) >= n_committed
            assert torch.equal(repaired[name].tensor(), oracle.rows(len(rows))[name][: len(rows)]), (
                f"{out}: {name}"
            )
            beyond += len(rows) - n_committed
    return beyond


class Oracle:
    """What the sites give, pass after pass, computed with plain hooks."""

    def __init__(self) -> None:
        self.pieces: dict[str, list[torch.Tensor]] = {name: [] for name in SITES}
        self.model = tiny_model("llama")
        layers = self.model.model.layers
        for name, module in zip(SITES, (layers[0], layers[1].mlp), strict=True):
            module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
            self.pieces[name].append(output.flatten(0, 1))

        return hook

    def rows(self, n_rows: int) -> dict[str, torch.Tensor]:
        """Return the first `n_rows` rows of every site."""
        with torch.no_grad():
            while sum(map(len, self.pieces[SITES[0]])) < n_rows:
                self.model(inputs(len(self.pieces[SITES[0]])))
        return {name: torch.cat(values)[:n_rows] for name, values in self.pieces.items()}


def test_killed_captures_leave_whole_right_steps(tmp_path: Path) -> None:
    found = kill_many(tmp_path, 8, seed=0)
    assert found["committed"] > 0, found


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_killed_captures_leave_whole_right_steps(tmp_path: Path) -> None:
    found = kill_many(tmp_path, N_KILLS, seed=1)
    sys.stderr.write(f"{N_KILLS} captures killed: {json.dumps(found)}\n")
    assert found["committed"] > N_KILLS // 2, found
