"""The vLLM adapter, driven by a stand-in for vLLM's model runner: the same names, the same flattened batches.

The model computes over tokens of many requests at once, as vLLM's do, with the weights of a tiny Hugging Face model.
What that model makes of each request alone is the oracle. vLLM itself does not run here.
"""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import D_MODEL, tiny_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import strapfmt
from strapfmt.errors import ArgumentError, CaptureError, SiteNotFoundError
from strapfmt_capture.vllm import WorkerExtension, start, stop

N_HEADS, N_KEYS, D_HEAD = 4, 2, 8
MAX_LEN = 64


class Attention(torch.nn.Module):
    """Attention of flattened tokens to their own requests' caches, which the runner tells of by `batch`."""

    def __init__(self, source: torch.nn.Module, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.source, self.rotary = source, rotary
        self.caches: dict[str, list[torch.Tensor]] = {}
        self.batch: list[tuple[str, int, int]] = []

    def forward(self, positions: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        q = self.source.q_proj(x).view(len(x), N_HEADS, D_HEAD)
        k = self.source.k_proj(x).view(len(x), N_KEYS, D_HEAD)
        v = self.source.v_proj(x).view(len(x), N_KEYS, D_HEAD)
        cos, sin = self.rotary(x[None], positions[None])
        q, k = (
            part[0].transpose(0, 1)
            for part in apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        )
        for request, begin, end in self.batch:
            own = slice(begin, end)
            past = self.caches.get(request, [k[:0], v[:0]])
            keys, values = torch.cat([past[0], k[own]]), torch.cat([past[1], v[own]])
            self.caches[request] = [keys, values]
            n_past, n = len(past[0]), end - begin
            mask = torch.ones(n, n_past + n).tril(n_past).bool()
            mixed = torch.nn.functional.scaled_dot_product_attention(
                q[own].transpose(0, 1),
                keys.repeat_interleave(2, 1).transpose(0, 1),
                values.repeat_interleave(2, 1).transpose(0, 1),
                attn_mask=mask,
            )
            out[own] = mixed.transpose(0, 1).reshape(n, -1)
        return self.source.o_proj(out)


class Block(torch.nn.Module):
    """A block as vLLM has it: it returns what is to be added to the stream, and the stream."""

    def __init__(self, source: torch.nn.Module, rotary: torch.nn.Module) -> None:
        super().__init__()
        self.input_layernorm, self.mlp = source.input_layernorm, source.mlp
        self.post_attention_layernorm = source.post_attention_layernorm
        self.self_attn = Attention(source.self_attn, rotary)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stream = hidden_states if residual is None else hidden_states + residual
        stream = stream + self.self_attn(positions, self.input_layernorm(stream))
        return self.mlp(self.post_attention_layernorm(stream)), stream


class Decoder(torch.nn.Module):
    def __init__(self, source: torch.nn.Module) -> None:
        super().__init__()
        self.config, self.embed_tokens, self.norm = source.config, source.embed_tokens, source.norm
        self.layers = torch.nn.ModuleList(Block(layer, source.rotary_emb) for layer in source.layers)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        return self.norm(hidden + residual)


class Model(torch.nn.Module):
    def __init__(self, source: torch.nn.Module) -> None:
        super().__init__()
        self.config, self.model, self.lm_head = source.config, Decoder(source.model), source.lm_head

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Any = None,
    ) -> torch.Tensor:
        return self.model(input_ids, positions)


@dataclass
class SchedulerOutput:
    num_scheduled_tokens: dict[str, int]
    finished_req_ids: set[str] = field(default_factory=set)
    new: dict[str, list[int]] = field(default_factory=dict)


class Runner:
    """As much of vLLM's `GPUModelRunner` as the adapter reads; it samples the likeliest token."""

    def __init__(self, source: torch.nn.Module) -> None:
        self.model = Model(source)
        self.model_config, self.speculative_config = SimpleNamespace(enforce_eager=True), None
        self.texts: dict[str, list[int]] = {}
        self.input_batch = SimpleNamespace(req_ids=[], num_computed_tokens_cpu=np.zeros(8, np.int32))
        self.query_start_loc = SimpleNamespace(np=np.zeros(9, np.int32))
        self.computed: dict[str, int] = {}

    def get_model(self) -> torch.nn.Module:
        return self.model

    @torch.inference_mode()
    def warm_up(self) -> None:
        for layer in self.model.model.layers:
            layer.self_attn.batch = []
        self.model(input_ids=torch.zeros(8, dtype=torch.long), positions=torch.zeros(8, dtype=torch.long))

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None) -> None:
        for request in scheduler_output.finished_req_ids:
            self.forget(request)
            self.texts.pop(request)
        for request, prompt in scheduler_output.new.items():
            self.texts[request], self.computed[request] = list(prompt), 0
        counts = scheduler_output.num_scheduled_tokens
        if not counts:
            return
        batch = self.input_batch
        batch.req_ids = list(counts)
        starts = np.cumsum([0, *counts.values()])
        batch.num_computed_tokens_cpu[: len(counts)] = [self.computed[request] for request in counts]
        self.query_start_loc.np[: len(starts)] = starts
        self.query_start_loc.np[len(starts) :] = starts[-1]
        ids, positions = torch.zeros(-(-starts[-1] // 8) * 8, dtype=torch.int32), []
        for request, begin, end in zip(counts, starts[:-1], starts[1:], strict=True):
            first = self.computed[request]
            ids[begin:end] = torch.tensor(self.texts[request][first : first + end - begin])
            positions += range(first, first + end - begin)
        positions += [0] * (len(ids) - len(positions))
        for layer in self.model.model.layers:
            layer.self_attn.batch = [
                (request, int(begin), int(end))
                for request, begin, end in zip(counts, starts[:-1], starts[1:], strict=True)
            ]
        hidden = self.model(
            input_ids=ids, positions=torch.tensor(positions), intermediate_tensors=None, inputs_embeds=None
        )
        for i, request in enumerate(counts):
            self.computed[request] += counts[request]
            if self.computed[request] == len(self.texts[request]):
                logits = self.model.lm_head(hidden[starts[i + 1] - 1])
                self.texts[request].append(int(logits.argmax()))

    def forget(self, request: str) -> None:
        self.computed[request] = 0
        for layer in self.model.model.layers:
            layer.self_attn.caches.pop(request, None)


class Worker(WorkerExtension):
    def __init__(self, source: torch.nn.Module, **parallel: int) -> None:
        self.model_runner = Runner(source)
        self.rank = parallel.pop("rank", 0)
        sizes = {"pipeline_parallel_size": 1, "tensor_parallel_size": 1, "data_parallel_rank": 0}
        self.parallel_config = SimpleNamespace(**{**sizes, **parallel})


@pytest.fixture
def source() -> torch.nn.Module:
    return tiny_model("llama")


@pytest.fixture
def worker(source: torch.nn.Module) -> Worker:
    return Worker(source)


PLACES = {
    "embed": "model.embed_tokens",
    "blocks.0.attn_out": "model.layers.0.self_attn",
    "blocks.1.mlp_out": "model.layers.1.mlp",
    "blocks.0.resid_post": "model.layers.0",
    "blocks.1.resid_post": "model.layers.1",
    "final_norm": "model.norm",
}


def alone(source: torch.nn.Module, ids: list[int]) -> dict[str, torch.Tensor]:
    """What the Hugging Face model makes of one text at each site."""
    found: dict[str, torch.Tensor] = {}
    handles = [
        source.get_submodule(path).register_forward_hook(
            lambda module, args, output, site=site: found.update(
                {site: (output[0] if isinstance(output, tuple) else output)[0]}
            )
        )
        for site, path in PLACES.items()
    ]
    with torch.no_grad():
        source(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def rows_of(path: Path) -> list[tuple[Any, ...]]:
    return (
        strapfmt.open(path)
        .sql(
            "select s.tags->>'request_id', t.position, t.token_id, t.step, t.phase, t.batch_index "
            "from tokens t join sequences s using (sequence_id) order by t.row"
        )
        .fetchall()
    )


def check(path: Path, source: torch.nn.Module, texts: dict[str, list[int]], sites: Any = PLACES) -> None:
    dataset, rows = strapfmt.open(path), rows_of(path)
    expected = {request: alone(source, ids) for request, ids in texts.items()}
    for site in sites:
        wanted = torch.stack([expected[request][site][position] for request, position, *_ in rows])
        torch.testing.assert_close(torch.as_tensor(dataset[site][:]), wanted, atol=1e-5, rtol=1e-5)
    assert [token for _, _, token, *_ in rows] == [texts[row[0]][row[1]] for row in rows]
    assert strapfmt.verify(path).valid


def test_chunks_decodes_and_requests_that_come_and_go(
    worker: Worker, source: torch.nn.Module, tmp_path: Path
) -> None:
    runner, path = worker.model_runner, tmp_path / "a.strap"
    runner.warm_up()
    assert worker.start_strapfmt(str(path), sites=list(PLACES), commit_interval_s=0) is True
    runner.warm_up()
    texts: dict[str, list[int]] = {}
    run = runner.execute_model
    run(SchedulerOutput({"a": 5, "b": 3}, new={"a": [5, 6, 7, 8, 9], "b": [11, 12, 13, 14, 15, 16, 17]}))
    run(SchedulerOutput({"b": 4, "a": 1}))
    run(SchedulerOutput({"a": 1, "b": 1, "c": 2}, new={"c": [21, 22]}))
    texts["a"] = list(runner.texts["a"])
    run(SchedulerOutput({}))
    run(SchedulerOutput({"c": 1, "b": 1}, finished_req_ids={"a"}))
    texts |= {request: list(runner.texts[request]) for request in "bc"}
    told = worker.stop_strapfmt()
    assert told == {"path": str(path), "n_steps": 4, "n_tokens": 19, "n_rows": 19 * len(PLACES)}
    assert [(request, position, step, phase) for request, position, _, step, phase, _ in rows_of(path)] == [
        *(("a", p, 0, "prefill") for p in range(5)),
        *(("b", p, 0, "prefill") for p in range(3)),
        *(("b", p, 1, "prefill") for p in range(3, 7)),
        ("a", 5, 1, "decode"),
        ("a", 6, 2, "decode"),
        ("b", 7, 2, "decode"),
        ("c", 0, 2, "prefill"),
        ("c", 1, 2, "prefill"),
        ("c", 2, 3, "decode"),
        ("b", 8, 3, "decode"),
    ]
    check(path, source, texts)
    assert not runner.model._forward_pre_hooks
    assert "execute_model" not in vars(runner)
    assert worker.stop_strapfmt() is None


def test_name_of_a_finished_request_is_used_again(
    worker: Worker, source: torch.nn.Module, tmp_path: Path
) -> None:
    path, runner = tmp_path / "a.strap", worker.model_runner
    start(worker, path)
    runner.execute_model(SchedulerOutput({"0": 3}, new={"0": [5, 6, 7]}))
    runner.execute_model(SchedulerOutput({"0": 2}, finished_req_ids={"0"}, new={"0": [9, 8]}))
    stop(worker)
    found = strapfmt.open(path).sql("select sequence_id, position from tokens order by row").fetchall()
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_request_that_was_preempted_is_computed_again(
    worker: Worker, source: torch.nn.Module, tmp_path: Path
) -> None:
    path, runner = tmp_path / "a.strap", worker.model_runner
    start(worker, path, sites="blocks.*.resid_post")
    runner.execute_model(SchedulerOutput({"a": 3}, new={"a": [5, 6, 7]}))
    runner.forget("a")
    runner.execute_model(SchedulerOutput({"a": 4}))
    stop(worker)
    assert [row[1] for row in rows_of(path)] == [0, 1, 2, 0, 1, 2, 3]
    check(path, source, {"a": runner.texts["a"]}, ["blocks.0.resid_post", "blocks.1.resid_post"])


def test_modules_are_taken_by_path(worker: Worker, source: torch.nn.Module, tmp_path: Path) -> None:
    start(worker, tmp_path / "a.strap", sites=["model.layers.0.mlp", "model.layers.*.self_attn"], codec="lz4")
    worker.model_runner.execute_model(SchedulerOutput({"a": 3}, new={"a": [5, 6, 7]}))
    assert stop(worker)["n_rows"] == 9
    assert strapfmt.open(tmp_path / "a.strap")["model.layers.0.mlp"][:].shape == (3, D_MODEL)


def test_first_worker_of_a_tensor_parallel_group_writes(source: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "a.strap"
    workers = [
        Worker(source, rank=rank, tensor_parallel_size=2, data_parallel_rank=replica)
        for replica in range(2)
        for rank in range(2)
    ]
    assert [start(worker, path, sites="final_norm") for worker in workers] == [True, False, True, False]
    for worker in workers:
        worker.model_runner.execute_model(SchedulerOutput({"a": 3}, new={"a": [5, 6, 7]}))
    assert [stop(worker) is None for worker in workers] == [False, True, False, True]
    assert strapfmt.open(path)["final_norm"][:].shape == (6, D_MODEL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: setattr(w.model_runner.model_config, "enforce_eager", False), "enforce_eager=True"),
        (lambda w: setattr(w.model_runner, "speculative_config", object()), "speculative"),
        (lambda w: setattr(w.parallel_config, "pipeline_parallel_size", 2), "pipeline"),
        (lambda w: delattr(w.model_runner, "query_start_loc"), "VLLM_USE_V2_MODEL_RUNNER=0"),
        (lambda w: delattr(w.model_runner.input_batch, "req_ids"), r"without input_batch\.req_ids"),
    ],
)
def test_engines_whose_rows_cannot_be_known_are_refused(
    worker: Worker, tmp_path: Path, change: Any, message: str
) -> None:
    change(worker)
    with pytest.raises(CaptureError, match=message):
        start(worker, tmp_path / "a.strap")
    assert not (tmp_path / "a.strap").exists()
    assert stop(worker) is None


@pytest.mark.parametrize("sites", ["blocks.0.resid_pre", "logits", "blocks.*.*", "model.layers.0:in"])
def test_sites_that_vllm_has_elsewhere_are_refused(worker: Worker, tmp_path: Path, sites: str) -> None:
    with pytest.raises(ArgumentError, match="ask for a module by its path"):
        start(worker, tmp_path / "a.strap", sites=sites)
    with pytest.raises(SiteNotFoundError):
        start(worker, tmp_path / "a.strap", sites="blocks.9.resid_post")
    with pytest.raises(ArgumentError, match="mode='append'"):
        start(worker, tmp_path / "a.strap", mode="append")
    assert not (tmp_path / "a.strap").exists()


def test_one_capture_at_a_time(worker: Worker, tmp_path: Path) -> None:
    start(worker, tmp_path / "a.strap")
    with pytest.raises(CaptureError, match="stop it first"):
        start(worker, tmp_path / "b.strap")
    stop(worker)


def test_site_that_does_not_fire_ends_the_capture_with_an_error(worker: Worker, tmp_path: Path) -> None:
    runner = worker.model_runner
    start(worker, tmp_path / "a.strap", sites=["embed", "blocks.1.resid_post"])
    runner.execute_model(SchedulerOutput({"a": 3}, new={"a": [5, 6, 7]}))
    runner.model.model.layers = torch.nn.ModuleList([runner.model.model.layers[0]])
    with pytest.raises(CaptureError, match=r"blocks\.1\.resid_post did not fire.*CUDA graph"):
        runner.execute_model(SchedulerOutput({"a": 1}))
    assert not runner.model._forward_pre_hooks
    dataset = strapfmt.open(tmp_path / "a.strap")
    assert dataset.sql("select status from steps order by step").fetchall() == [("complete",), ("abandoned",)]


def test_module_that_is_given_some_of_the_tokens_is_an_error(worker: Worker, tmp_path: Path) -> None:
    start(worker, tmp_path / "a.strap", sites="lm_head")
    with pytest.raises(CaptureError, match=r"one row for each of the 3 tokens of the pass, got shape"):
        worker.model_runner.execute_model(SchedulerOutput({"a": 3}, new={"a": [5, 6, 7]}))


def test_failure_of_the_model_closes_the_dataset(worker: Worker, tmp_path: Path) -> None:
    runner = worker.model_runner
    start(worker, tmp_path / "a.strap", sites="embed")
    runner.execute_model(SchedulerOutput({"a": 3}, new={"a": [5, 6, 7]}))
    with pytest.raises(IndexError):
        runner.execute_model(SchedulerOutput({"b": 1}, new={"b": [10**6]}))
    assert strapfmt.verify(tmp_path / "a.strap").valid
    runner.execute_model(SchedulerOutput({"c": 1}, new={"c": [5]}))
    assert stop(worker) == {"path": str(tmp_path / "a.strap"), "n_steps": 2, "n_tokens": 4, "n_rows": 3}
