"""What needs a CUDA device: values through the ring on it are right, in order, and nothing waits that need not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model

import strapfmt
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt_capture.items import Item
from strapfmt_capture.memory import Memory
from strapfmt_capture.ring import Ring
from strapfmt_capture.rings import Rings
from strapfmt_capture.turn import Values

pytestmark = pytest.mark.gpu

IDS = torch.arange(5, 29).reshape(2, 12)
NOWHERE = Memory(64)
SPEC = SiteSpec(name="s", dtype="int32", shape=(256,), row_space="own")


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    return {"input_ids": IDS.cuda(), "attention_mask": mask.cuda()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_on_a_gpu_are_those_the_model_computes(tmp_path: Path, dtype: torch.dtype) -> None:
    model, inputs = tiny_model("llama", dtype=dtype).cuda(), padded()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.resid_post", quiet=True) as cap:
        hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
    found = Reader(tmp_path / "x.strap")["blocks.0.resid_post"].tensor()
    assert torch.equal(found, hidden[inputs["attention_mask"].bool()].cpu())
    assert "plain copies" not in str(cap.report)


def test_rows_of_generation_on_a_gpu_are_those_on_the_host(tmp_path: Path) -> None:
    tables = []
    for device in ("cpu", "cuda"):
        model = tiny_model("llama", dtype=torch.float64).to(device)
        inputs = {name: value.to(device) for name, value in padded().items()}
        path = tmp_path / f"{device}.strap"
        with strapfmt.capture(model, path, sites=["blocks.*.*", "logits"], quiet=True):
            model.generate(**inputs, max_new_tokens=8, num_beams=3, do_sample=False)
        with strapfmt.open(path) as ds:
            tables.append((list(ds.sql("SELECT * FROM tokens")), ds["blocks.1.resid_post"].tensor().clone()))
    assert tables[0][0] == tables[1][0]
    torch.testing.assert_close(tables[0][1], tables[1][1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_keys_on_a_gpu_are_those_in_the_cache(
    tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    model, inputs = tiny_model(family, dtype=dtype).cuda(), padded()
    sites = ["blocks.1.rot_k", "blocks.1.v"]
    with strapfmt.capture(model, tmp_path / "x.strap", sites=sites, quiet=True), torch.no_grad():
        layer = model(**inputs, use_cache=True).past_key_values.layers[1]
    real, n = inputs["attention_mask"].bool().cpu(), layer.keys.shape[2]  # a window keeps its last places
    for name, stored in (("rot_k", layer.keys), ("v", layer.values)):
        found = Reader(tmp_path / "x.strap")[f"blocks.1.{name}"].tensor()
        rows = torch.full((2, 12, *found.shape[1:]), torch.nan, dtype=found.dtype)
        rows[real] = found
        assert torch.equal(rows[:, -n:][real[:, -n:]], stored.transpose(1, 2).cpu()[real[:, -n:]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patterns_on_a_gpu_are_recomputed(tmp_path: Path, dtype: torch.dtype) -> None:
    found = {}
    for name in ("sdpa", "eager"):
        model = tiny_model("llama", dtype=dtype, attn_implementation=name).cuda()
        path = tmp_path / f"{name}.strap"
        with strapfmt.capture(
            model, path, sites="blocks.0.attn_pattern", attn_pattern="recompute", quiet=True
        ):
            model(**padded())
        column = Reader(path)["blocks.0.attn_pattern"].to_arrow(["activation"])["activation"]
        values = [torch.tensor(row.values.to_numpy()) for row in column]
        found[name] = torch.cat(
            [each if dtype.itemsize == 4 else each.view(dtype) for each in values]
        ).float()
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(found["sdpa"], found["eager"], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_experts_on_a_gpu_have_the_bits_that_their_sum_is_made_of(
    tmp_path: Path, implementation: str
) -> None:
    model = tiny_model("qwen3_moe", dtype=torch.bfloat16, experts_implementation=implementation).cuda()
    if getattr(model.config, "_experts_implementation", None) != implementation:
        pytest.skip(f"this version of transformers does not run experts by {implementation!r}")
    inputs, sums = padded(), []
    handle = model.model.layers[0].mlp.experts.register_forward_hook(lambda _, args, out: sums.append(out))
    with (
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.expert_*", quiet=True),
        torch.no_grad(),
    ):
        model(**inputs)
    handle.remove()
    reader = Reader(tmp_path / "x.strap")
    out, weights = (reader[f"blocks.0.{name}"].tensor().cuda() for name in ("expert_out", "expert_weights"))
    weighted = out * weights[..., None]
    total = weighted[:, 0] + weighted[:, 1] if implementation == "eager" else weighted.sum(1)
    assert torch.equal(total, sums[0][inputs["attention_mask"].bool().flatten()])


@pytest.mark.parametrize("n_passes", [1, 3])
def test_gradients_on_a_gpu_are_those_of_autograd(tmp_path: Path, n_passes: int) -> None:
    model, inputs = tiny_model("llama", dtype=torch.bfloat16).cuda(), padded()
    real = inputs["attention_mask"].bool()
    sites = ["blocks.0.resid_post", "blocks.1.q", "blocks.1.mlp_inner"]
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    block = model.model.layers[0].register_forward_hook(keep)
    with strapfmt.capture(model, tmp_path / "x.strap", sites=sites, backward=True, quiet=True):
        for scale in (1.0, 2.0):
            losses = [
                model(**inputs).logits[real].float().logsumexp(-1).sum() * scale for _ in range(n_passes)
            ]
            sum(losses, torch.zeros((), device="cuda")).backward()
    block.remove()
    reader = Reader(tmp_path / "x.strap")
    expected = torch.cat([x.grad[real] for x in kept if x.grad is not None]).cpu()
    assert torch.equal(reader["blocks.0.resid_post.grad"].tensor(), expected)
    for site in sites:
        assert reader[f"{site}.grad"].rows.tolist() == reader[site].rows.tolist()
        assert reader[f"{site}.grad"].n_rows == 2 * n_passes * int(real.sum())


def test_states_and_the_largest_logits_on_a_gpu(tmp_path: Path) -> None:
    model, inputs = tiny_model("mamba").cuda(), padded()
    sites = ["blocks.*.ssm_state", "logits"]
    with (
        strapfmt.capture(model, tmp_path / "x.strap", sites=sites, top_k_logits=3, quiet=True),
        torch.no_grad(),
    ):
        output = model(**inputs)
    reader = Reader(tmp_path / "x.strap")
    state = output.cache_params.layers[1].recurrent_states[0]
    assert torch.equal(reader["blocks.1.ssm_state"].tensor(), state.cpu())
    values, ids = output.logits[inputs["attention_mask"].bool()].topk(3)
    assert torch.equal(reader["logits.top_values"].tensor(), values.cpu())
    assert torch.equal(reader["logits.top_ids"].tensor(), ids.cpu())


def test_a_ring_on_the_gpu_is_reused_a_hundred_thousand_times_without_a_torn_slot() -> None:
    rings = Rings(Ring[Item](8 << 20), gpu_ring_bytes=2 << 20)
    device = torch.device("cuda", torch.cuda.current_device())
    ring = rings.of(device)
    n_slots, n_rows = 100_000, 16
    pattern = torch.empty(n_rows, 256, dtype=torch.int32, device=device)
    n_checked, n_wrong = 0, 0

    def check() -> None:
        nonlocal n_checked, n_wrong
        for item in rings.host.take(4 << 20, wait=False):
            assert isinstance(item, Values)
            view = rings.host.view(item.start, torch.int32, (n_rows, 256))
            n_wrong += not bool((view == item.call).all())
            assert item.call == n_checked
            n_checked += 1
        rings.host.release(rings.host.position)

    for number in range(n_slots):
        if number % 1000 == 0:
            torch.cuda._sleep(5_000_000)  # the stream falls behind the host
        pattern.fill_(number)
        slot = ring.reserve(pattern.nbytes)
        assert slot is not None
        ring.copy_in(slot.start, pattern)
        values = Values(
            spec=SPEC,
            dtype=torch.int32,
            shape=(256,),
            n_rows=n_rows,
            memory=NOWHERE,  # the mover says where
            start=slot.start,
            rows=None,
            token_row=None,
            call=number,
        )
        rings.put(ring, values, slot)
        if number % 64 == 0:
            check()
    # The host's ring has to be emptied while the mover ends.
    rings.mark()
    while n_checked < n_slots:
        rings.host.press()  # or the last few would not be worth taking
        check()
    rings.finish()
    assert (n_checked, n_wrong) == (n_slots, 0)


def test_hooks_on_a_gpu_do_not_make_the_host_wait_for_it(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16).cuda()
    ids = IDS.cuda()
    waits: list[bool] = []

    def remember(module: torch.nn.Module, args: Any, output: Any) -> None:
        waits.append(event.query())

    event = torch.cuda.Event()

    def delay(module: torch.nn.Module, args: Any) -> None:
        torch.cuda._sleep(1_000_000_000)
        event.record()

    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.*", quiet=True):
        model(ids)  # declares sites and opens rings
        handle = model.model.layers[-1].register_forward_hook(remember)
        first = model.model.layers[0].register_forward_pre_hook(delay)
        model(ids)
        handle.remove()
        first.remove()
    assert waits == [False]  # the last block's hooks had run before the first block's kernels


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_two_gpus_is_captured_in_order(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    model = tiny_model("llama", dtype=torch.bfloat16)
    parts = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    model = dispatch_model(model, {**parts, "model.norm": 1, "lm_head": 1})
    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.resid_post", quiet=True):
        hidden = model(IDS.cuda(), output_hidden_states=True).hidden_states[1]
    found = Reader(tmp_path / "x.strap")["blocks.0.resid_post"].tensor()
    assert torch.equal(found, hidden.flatten(0, 1).cpu())
