"""Capture in several processes that PyTorch has split work or a model over, with gloo on CPU.

Values are compared with those of one process and a whole model, taken by plain hooks.
"""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import tiny_model
from torch import nn

import strapfmt
from strapfmt.errors import ArgumentError, CaptureError, DatasetExistsError

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["models", "strapfmt", "strapfmt_capture", "torch.distributed.tensor.parallel"]
)
ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 60
UNEVEN = 49  # the inner width of an MLP that two processes cannot halve; PyTorch's own plans want it even

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="PyTorch was built without gloo")

PROMPTS = torch.randint(5, 101, (4, 7), generator=torch.Generator().manual_seed(1))


def tiny_llama(width: int = 48) -> Any:
    """Return a whole model, whose MLPs have this inner width."""
    return tiny_model("llama", attn_implementation="eager", intermediate_size=width)


def in_process(action: Callable[[Path], Any], rank: int, n: int, directory: Path, results: Any) -> None:
    """Run an action as torchrun would, and send what it returns."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(n)}
    options: Any = {"init_method": f"file://{directory}/store", "timeout": timedelta(seconds=TIMEOUT_S)}
    try:
        dist.init_process_group("gloo", rank=rank, world_size=n, **options)
        results.put((rank, action(directory)))
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - shown by the test
        results.put((rank, RuntimeError(traceback.format_exc())))


def run(action: Callable[[Path], Any], directory: Path, n: int = 2) -> list[Any]:
    """Return what an action returns in each of `n` processes."""
    results = PROCESSES.Queue()
    processes = [
        PROCESSES.Process(target=in_process, args=(action, rank, n, directory, results), daemon=True)
        for rank in range(n)
    ]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=2 * TIMEOUT_S) for _ in processes)
        for process in processes:
            process.join(TIMEOUT_S)
    finally:
        for process in processes:
            process.kill()
    for rank, result in found.items():
        if isinstance(result, RuntimeError):
            pytest.fail(f"rank {rank}: {result}")
    return [found[rank] for rank in range(n)]


def oracle(
    model: nn.Module, paths: Sequence[str], prompts: Sequence[torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return, by path, what a whole model gives, one row a token."""
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in paths}

    def note(path: str, value: Any) -> None:
        index = 1 if path.endswith("self_attn") else 0
        value = value[index] if isinstance(value, tuple) else value
        value = value.transpose(1, 2) if path.endswith("self_attn") else value
        seen[path].append(value.detach().flatten(0, 1).clone())

    handles = []
    for path in paths:
        name, _, where = path.partition(":")
        module = model.get_submodule(name)
        if where == "in":
            handles.append(module.register_forward_pre_hook(lambda m, a, path=path: note(path, a)))
        else:
            handles.append(module.register_forward_hook(lambda m, a, o, path=path: note(path, o)))
    for ids in prompts:
        model(ids)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(values) for path, values in seen.items()}


# Data parallel.

STREAM = {
    "blocks.0.resid_post": "model.layers.0",
    "blocks.1.mlp_out": "model.layers.1.mlp",
    "logits": "lm_head",
}


def check_stream(
    path: Path, prompts: Mapping[int, Sequence[torch.Tensor]], sites: Mapping[str, str], width: int = 48
) -> None:
    """Compare each rank's rows with what a whole model gives for its prompts."""
    with strapfmt.open(path) as dataset:
        assert dataset.ranks == list(prompts)
        for rank, own in prompts.items():
            expected = oracle(tiny_llama(width), list(sites.values()), own)
            tokens = torch.cat([ids.flatten() for ids in own])
            is_own = f"row >> 40 = {rank}"
            found = dataset.sql(f"SELECT token_id FROM tokens WHERE {is_own} ORDER BY row").fetchall()
            assert [token for (token,) in found] == tokens.tolist()
            rows = [
                row
                for (row,) in dataset.sql(f"SELECT row FROM tokens WHERE {is_own} ORDER BY row").fetchall()
            ]
            for site, module in sites.items():
                values = dataset[site].take(rows)
                torch.testing.assert_close(values, expected[module], rtol=1e-4, atol=1e-5)


SCRIPT = """
    import torch
    import torch.distributed as dist
    import strapfmt

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    x = torch.full((2, 3), float(dist.get_rank()))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU()))
    with strapfmt.capture(model, "all.strap", sites="module.0:in", quiet=True):
        model(x)
        model(x + 10)
    dist.destroy_process_group()
"""


def test_torchrun_gives_each_process_a_rank(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    paths = os.pathsep.join(str(ROOT / name) for name in ("", "capture"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "script.py",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with strapfmt.open(tmp_path / "all.strap") as dataset:
        assert dataset.ranks == [0, 1]
        assert dataset["module.0:in"][:][:, 0].tolist() == [0, 0, 10, 10, 1, 1, 11, 11]


class Stage(nn.Module):
    """One block of two, which sends what it gives to the next process, or has it from the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(dist.get_rank()): nn.Linear(3, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if dist.get_rank() == 1:
            dist.recv(x, 0)
        for block in self.blocks.values():
            x = block(x)
        if dist.get_rank() == 0:
            dist.send(x.detach(), 1)
        return x


def run_stages(directory: Path) -> None:
    """Run a pipeline; the ranks are those of torch.distributed where there is no RANK."""
    del os.environ["RANK"]
    stage = Stage()
    with strapfmt.capture(stage, directory / "a.strap", sites=["blocks.*", "blocks.*:in"], quiet=True):
        for _ in range(2):
            stage(torch.rand(2, 3))


def test_each_stage_of_a_pipeline_has_the_sites_that_it_has(tmp_path: Path) -> None:
    run(run_stages, tmp_path)
    with strapfmt.open(tmp_path / "a.strap") as dataset:
        assert set(dataset) == {"blocks.0", "blocks.0:in", "blocks.1", "blocks.1:in"}
        assert torch.equal(dataset["blocks.0"][:], dataset["blocks.1:in"][:])
        assert (dataset["blocks.0"].rows >> 40 == 0).all()
        assert (dataset["blocks.1"].rows >> 40 == 1).all()


def train(directory: Path, wrap: Callable[[nn.Module], nn.Module], name: str) -> float:
    model = wrap(tiny_llama())
    path, rank = directory / f"{name}.strap", dist.get_rank()
    with strapfmt.capture(model, path, sites=list(STREAM), quiet=True) as cap:
        for ids in PROMPTS.split(2):
            model(ids[rank : rank + 1]).logits.sum().backward()
    assert cap.report.n_rows == 3 * 14
    assert cap.report.n_tokens == 14
    gradient: Any = next(iter(model.parameters())).grad
    gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return float(gradient.norm())


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer)
    return fully_shard(model)


def train_each_way(directory: Path) -> list[float]:
    wrapped = nn.parallel.DistributedDataParallel
    return [
        train(directory, wrapped, "ddp"),
        train(directory, lambda model: wrapped(model, find_unused_parameters=True), "unused"),
        train(directory, sharded, "fsdp"),
    ]


def test_models_in_ddp_and_fsdp_are_trained_while_they_are_captured(tmp_path: Path) -> None:
    gradients = run(train_each_way, tmp_path)
    alone = tiny_llama()
    (alone(PROMPTS).logits.sum() / 2).backward()  # the mean over two processes
    expected = float(next(alone.parameters()).grad.norm())
    assert gradients == [pytest.approx([expected] * 3, rel=1e-4)] * 2
    prompts = {rank: [PROMPTS[rank : rank + 1], PROMPTS[2 + rank : 3 + rank]] for rank in range(2)}
    for name in ("ddp", "unused", "fsdp"):
        check_stream(tmp_path / f"{name}.strap", prompts, STREAM)


def n_tokens(path: Path) -> dict[int, int]:
    """Return how many tokens each rank has committed."""
    with strapfmt.open(path) as dataset:
        return dict(dataset.sql("SELECT row >> 40, count(*) FROM tokens GROUP BY ALL").fetchall())


def write_badly(directory: Path) -> None:
    """Overwrite at different times; end at different times, one with an error; then crash."""
    rank, model = dist.get_rank(), tiny_llama()
    for _ in range(2):
        time.sleep(0.3 * rank)
        with strapfmt.capture(
            model, directory / "a.strap", sites="blocks.0.resid_post", mode="overwrite", quiet=True
        ):
            model(PROMPTS[rank : rank + 1])
    with strapfmt.capture(
        model, directory / "b.strap", sites="blocks.0.resid_post", rank=5 - rank, quiet=True
    ):
        model(PROMPTS[rank : rank + 1])
        copy.deepcopy(model)(PROMPTS)
        pickle.loads(pickle.dumps(model))(PROMPTS)  # noqa: S301
    dist.barrier()
    if rank == 1:
        with pytest.raises(DatasetExistsError, match="rank 5"):
            strapfmt.capture(model, directory / "b.strap", sites="blocks.0.resid_post", rank=5)
    cap = strapfmt.capture(
        model, directory / "c.strap", sites="blocks.0.resid_post", commit_interval_s=0, quiet=True
    )
    with cap:
        model(PROMPTS[rank : rank + 1])
        model(PROMPTS[rank : rank + 1])
        dist.barrier()
        if rank == 1:
            while not n_tokens(directory / "c.strap").get(1):
                time.sleep(0.01)
            os.kill(os.getpid(), 9)


def test_ranks_start_end_and_die_on_their_own(tmp_path: Path) -> None:
    results = PROCESSES.Queue()
    processes = [
        PROCESSES.Process(target=in_process, args=(write_badly, rank, 2, tmp_path, results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(2 * TIMEOUT_S)
    assert [process.exitcode for process in processes] == [0, -9]
    check_stream(
        tmp_path / "a.strap",
        {rank: [PROMPTS[rank : rank + 1]] for rank in range(2)},
        {"blocks.0.resid_post": "model.layers.0"},
    )
    with strapfmt.open(tmp_path / "b.strap") as dataset:
        assert dataset.ranks == [4, 5]
    with strapfmt.open(tmp_path / "c.strap") as dataset:
        assert dataset.ranks == [0, 1]
        assert not dataset.report.is_clean
    assert n_tokens(tmp_path / "c.strap") in ({0: 14, 1: 7}, {0: 14, 1: 14})


# Tensor parallel.

PARTS = {
    "blocks.0.resid_post": "model.layers.0",
    "blocks.0.attn_pattern": "model.layers.0.self_attn",
    "blocks.1.attn_out": "model.layers.1.self_attn.o_proj",
    "blocks.1.mlp_out": "model.layers.1.mlp",
    "logits": "lm_head",
    "embed": "model.embed_tokens",
    "model.layers.0.self_attn.q_proj": "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj": "model.layers.0.self_attn.v_proj",
    "model.layers.0.self_attn.o_proj:in": "model.layers.0.self_attn.o_proj:in",
    "model.layers.1.mlp.up_proj": "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.down_proj": "model.layers.1.mlp.down_proj",
    "model.layers.1.mlp.down_proj:in": "model.layers.1.mlp.down_proj:in",
}
SPREAD = {
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.v_proj",
    "model.layers.0.self_attn.o_proj:in",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.down_proj:in",
    "blocks.0.attn_pattern",
}


def by_torch(mesh: Any, **lm_head: Any) -> nn.Module:
    """Return a model that `parallelize_module` has split."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {"model.embed_tokens": RowwiseParallel(input_layouts=_replicate())}
    for layer in ("model.layers.0", "model.layers.1"):
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            plan[f"{layer}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            plan[f"{layer}.{name}"] = RowwiseParallel()
    plan["lm_head"] = ColwiseParallel(output_layouts=_replicate(), **lm_head)
    return parallelize_module(tiny_llama(), mesh, plan)


def _replicate() -> Any:
    from torch.distributed.tensor import Replicate

    return Replicate()


def by_transformers(tp_size: int) -> nn.Module:
    """Return a model of uneven width, split by the plan of transformers, as `from_pretrained` does."""
    from transformers.distributed import DistributedConfig

    model = tiny_llama(UNEVEN)
    config, _, mesh = model.prepare_distribute_model(DistributedConfig(tp_size=tp_size))
    return model.maybe_distribute_model(model, config, mesh)


def capture_parts(model: nn.Module, path: Path, prompts: Sequence[torch.Tensor]) -> tuple[int, str]:
    """Capture a prompt of one token, which tells parts of patterns from copies by nothing, and others."""
    with strapfmt.capture(model, path, sites=list(PARTS), quiet=True) as cap:
        for number, ids in enumerate(prompts):
            with torch.set_grad_enabled(number % 2 == 1):
                model(ids)
    dist.barrier()
    return cap.report.n_rows, str(cap.report)


def torch_parts(directory: Path) -> tuple[int, str]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    return capture_parts(by_torch(mesh), directory / "a.strap", [PROMPTS[:1, :1], PROMPTS[:2], PROMPTS[2:]])


def transformers_parts(directory: Path) -> tuple[int, str]:
    return capture_parts(
        by_transformers(2), directory / "a.strap", [PROMPTS[:1, :1], PROMPTS[:2], PROMPTS[2:]]
    )


@pytest.mark.parametrize(("action", "width"), [(torch_parts, 48), (transformers_parts, UNEVEN)])
def test_parts_of_a_model_are_put_together_and_written_once(action: Any, width: int, tmp_path: Path) -> None:
    (n_rows, _), (n_rows_of_other, report) = run(action, tmp_path)
    assert n_rows == len(PARTS) * 29
    assert n_rows_of_other == 0
    assert "rank 0 writes for this process" in report
    check_parts(tmp_path / "a.strap", {0: [PROMPTS[:1, :1], PROMPTS[:2], PROMPTS[2:]]}, width)


def check_parts(path: Path, prompts: Mapping[int, Sequence[torch.Tensor]], width: int = 48) -> None:
    ragged = "blocks.0.attn_pattern"
    check_stream(path, prompts, {site: module for site, module in PARTS.items() if site != ragged}, width)
    with strapfmt.open(path) as dataset:
        assert dataset.report.is_clean
        model = tiny_llama(width)
        patterns = [
            row
            for own in prompts.values()
            for ids in own
            for row in oracle(model, [PARTS[ragged]], [ids])[PARTS[ragged]]
        ]
        stored = dataset[ragged].to_arrow().to_pylist()
        for found, expected in zip(stored, patterns, strict=True):
            values = torch.tensor(found["activation"]).reshape(found["shape"])
            torch.testing.assert_close(values, expected[..., : values.shape[-1]], rtol=1e-4, atol=1e-5)
            assert not expected[..., values.shape[-1] :].any()
        for manifest in dataset.manifests.values():
            assert set(manifest.sessions[0]["outcome"]["placements"]) == SPREAD


def in_two_groups(directory: Path) -> int:
    """Two groups of two, each with prompts of its own; the second group names its group itself."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model, prompts = by_torch(mesh["tp"]), PROMPTS.split(2)[dist.get_rank() // 2]
    given = mesh["tp"] if dist.get_rank() < 2 else mesh.get_group("tp")
    with strapfmt.capture(model, directory / "a.strap", sites=list(PARTS), tp_group=given, quiet=True) as cap:
        model(prompts)
    with strapfmt.capture(model, directory / "a.strap", sites=list(PARTS), mode="append", quiet=True):
        model(prompts)
    return cap.report.n_tokens


def test_each_tensor_parallel_group_has_one_writer(tmp_path: Path) -> None:
    assert run(in_two_groups, tmp_path, 4) == [14, 0, 14, 0]
    one, two = PROMPTS.split(2)
    check_parts(tmp_path / "a.strap", {0: [one, one], 2: [two, two]})


def sharded_twice(directory: Path) -> int:
    """FSDP around tensor parallelism: the group is found by the mesh of two dimensions."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    from torch.distributed.fsdp import fully_shard

    model = by_torch(mesh["tp"])
    for layer in model.get_submodule("model.layers").children():
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    return capture_parts(model, directory / "a.strap", [PROMPTS])[0]


def test_tensor_parallel_inside_fsdp(tmp_path: Path) -> None:
    assert run(sharded_twice, tmp_path) == [len(PARTS) * 28, 0]
    check_parts(tmp_path / "a.strap", {0: [PROMPTS]})


def generate(directory: Path) -> list[int]:
    model = by_transformers(2)
    with strapfmt.capture(
        model, directory / "a.strap", sites=["logits", "blocks.0.resid_post"], top_k_logits=3, quiet=True
    ):
        out = model.generate(PROMPTS[:1], max_new_tokens=5, do_sample=False)
    return out[0].tolist()


def test_generation_and_the_largest_logits(tmp_path: Path) -> None:
    one, other = run(generate, tmp_path)
    assert one == other
    alone = tiny_llama(UNEVEN)
    expected = alone(torch.tensor([one])).logits[0]
    with strapfmt.open(tmp_path / "a.strap") as dataset:
        assert dataset.ranks == [0]
        assert len(dataset["blocks.0.resid_post"]) == len(one) - 1
        rows = dataset["logits.top_ids"].rows
        positions = [
            position for (position,) in dataset.sql("SELECT position FROM tokens ORDER BY row").fetchall()
        ]
        for row, ids in zip(rows, dataset["logits.top_ids"][:], strict=True):
            assert ids.tolist() == expected[positions[row]].topk(3).indices.tolist()


def steer(directory: Path) -> list[bool]:
    """Pauses, keys that are done and passes that stop early, at sites that take every process."""
    model = by_torch(dist.device_mesh.init_device_mesh("cpu", (2,)))
    sites, path = "model.layers.0.mlp.up_proj", directory / "a.strap"
    with strapfmt.capture(
        model, path, sites=sites, every=2, stop_at_layer=1, commit_interval_s=0, quiet=True
    ) as cap:
        with cap.tagged({"key": "a"}):
            model(PROMPTS[:1])
        cap.mark("phase", name="next")
        with cap.paused():
            model(PROMPTS[1:2])
        cap.pause()
        model(PROMPTS[1:2])
        cap.resume()
        model(PROMPTS[2:3])
        model(PROMPTS[3:])
    with strapfmt.capture(model, path, sites=sites, mode="append", quiet=True) as cap:
        done = [cap.done(key) for key in "ab"]
        model(PROMPTS[1:2])
        return done


def test_processes_pause_stop_and_skip_alike(tmp_path: Path) -> None:
    assert run(steer, tmp_path) == [[True, False]] * 2
    expected = oracle(tiny_llama(), ["model.layers.0.mlp.up_proj"], [PROMPTS[[0, 3, 1]]])
    with strapfmt.open(tmp_path / "a.strap") as dataset:
        values = dataset["model.layers.0.mlp.up_proj"][:]
        torch.testing.assert_close(values, *expected.values(), rtol=1e-4, atol=1e-5)
        assert dataset.tokens.to_arrow()["token_id"].to_pylist() == PROMPTS[[0, 2, 3, 1]].flatten().tolist()


HEADS = ["q", "k", "v", "rot_q", "rot_k", "z", "mlp_inner", "attn_pattern"]


def capture_heads(directory: Path, *, split: bool = True) -> None:
    """Capture what is inside attention, of models with a norm of queries and keys and without."""
    from transformers.distributed import DistributedConfig

    for family in ("llama", "qwen3"):
        for recompute in (False, True):
            model = tiny_model(family, attn_implementation="sdpa" if recompute else "eager")
            if split:
                config, _, mesh = model.prepare_distribute_model(DistributedConfig(tp_size=2))
                model = model.maybe_distribute_model(model, config, mesh)
            kind = f"{family}{'-sdpa' if recompute else ''}{'' if split else '-whole'}"
            with strapfmt.capture(
                model,
                directory / f"{kind}.strap",
                sites=[f"blocks.1.{site}" for site in HEADS],
                attn_pattern="recompute" if recompute else "model",
                quiet=True,
            ):
                model(PROMPTS)


def test_heads_of_all_processes_are_put_together(tmp_path: Path) -> None:
    """The whole model's values are checked in test_heads.py and test_attention.py."""
    run(capture_heads, tmp_path)
    capture_heads(tmp_path, split=False)
    for kind in ("llama", "llama-sdpa", "qwen3", "qwen3-sdpa"):
        with (
            strapfmt.open(tmp_path / f"{kind}.strap") as found,
            strapfmt.open(tmp_path / f"{kind}-whole.strap") as expected,
        ):
            assert set(found) == set(expected)
            for site in found:
                values, others = (data[site].to_arrow()["activation"] for data in (found, expected))
                pairs = zip(values.to_pylist(), others.to_pylist(), strict=True)
                assert all(one == pytest.approx(other, rel=1e-4, abs=1e-5) for one, other in pairs)


class Sum(nn.Module):
    """Half of a sum in each process, and the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.total = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        part = self.part(x * (1 + dist.get_rank()))
        total = part.clone()
        dist.all_reduce(total)
        return self.total(total)


def told(error: type[Exception], action: Callable[[], Any]) -> str:
    with pytest.raises(error) as caught:
        action()
    return f"{type(caught.value).__name__}: {caught.value}"


def refuse(directory: Path) -> list[str]:
    """What cannot be captured is refused in both processes, and neither waits for the other."""
    mesh, rank = dist.device_mesh.init_device_mesh("cpu", (2,)), dist.get_rank()

    def captured(model: nn.Module, sites: Any, name: str, **options: Any) -> None:
        with strapfmt.capture(model, directory / f"{name}.strap", sites=sites, quiet=True, **options):
            model(PROMPTS if isinstance(model, nn.Module) and hasattr(model, "config") else torch.ones(2, 3))

    def split_late() -> None:
        model = tiny_llama()
        with strapfmt.capture(
            model, directory / f"late{rank}.strap", sites="blocks.0.resid_post", quiet=True
        ):
            from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

            parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=_replicate())})
            model(PROMPTS)

    model = by_torch(mesh)
    captured(model, "blocks.0.resid_post", "there")
    dist.barrier()
    plain = Sum()
    with strapfmt.capture(plain, directory / "plain.strap", sites="total", tp_group=mesh, quiet=True):
        plain(torch.ones(2, 3))
        for other in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):  # noqa: S301
            assert other(torch.ones(2, 3)).tolist() == [[3.0] * 3] * 2
    in_the_way = directory / "file"
    if rank == 0:
        in_the_way.write_text("")
    dist.barrier()
    return [
        told(CaptureError, lambda: captured(model, "model.layers.0.mlp.act_fn", "part")),
        told(CaptureError, lambda: captured(plain, ["part", "total"], "sum", tp_group=mesh)),
        told(ArgumentError, lambda: captured(model, f"blocks.{rank}.resid_post", "other")),
        told(Exception, lambda: captured(model, "blocks.0.resid_post", "there")),
        told(Exception, lambda: captured(model, "blocks.1.resid_post", "file/a")),
        told(CaptureError, split_late),
        told(ArgumentError, lambda: captured(plain, "total", "mesh", tp_group="tp")),
        told(ArgumentError, lambda: captured(model, "blocks.0.resid_post", "gradients", backward=True)),
    ]


def test_what_cannot_be_captured_is_refused_in_every_process(tmp_path: Path) -> None:
    one, other = run(refuse, tmp_path)
    for texts in (one, other):
        part, half, sites, there, below, late, mesh, gradients = texts
        assert "'model.layers.0.mlp.act_fn'" in part
        assert "ranks 0, 1" in part
        assert "'part'" in half
        assert "of the same shape [2, 3]" in half
        assert "'blocks.0.resid_post' not in both of ranks 0 and 1" in sites
        assert "DatasetExistsError" in there
        assert "is a file" in below
        assert "was whole when its capture began" in late
        assert "expected a DeviceMesh or a ProcessGroup, got a str" in mesh
        assert "backward=True" in gradients
    assert other[3].startswith("CaptureError: rank 0, which writes for this process, failed:")
    with strapfmt.open(tmp_path / "plain.strap") as dataset:
        assert dataset["total"][:].tolist() == [[3.0] * 3] * 2
