"""Capture around nnsight traces: what is stored is what the trace itself saves. Runs where nnsight is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from captured import stored, tokens
from models import tiny_model, tiny_tokenizer

import strapfmt
from strapfmt.errors import ArgumentError, SiteNeverFiredError
from strapfmt_capture import Capture

nnsight = pytest.importorskip("nnsight", reason="pip install 'strapfmt[peers]'")

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
SITES = ["blocks.*.resid_pre", "blocks.*.attn_out", "blocks.*.resid_post", "logits"]


@pytest.fixture
def lm() -> Any:
    return nnsight.TransformersModel(tiny_model("llama"), tokenizer=tiny_tokenizer(), task="text-generation")


def capture(lm: Any, path: Path, **options: Any) -> Capture:
    return strapfmt.capture(lm, path, sites=SITES, tokenizer=lm.tokenizer, quiet=True, **options)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.detach().reshape(-1, x.shape[-1])


def test_rows_and_values_are_those_of_the_trace(lm: Any, tmp_path: Path) -> None:
    with capture(lm, tmp_path / "a.strap") as cap, lm.trace(IDS):
        first = lm.model.layers[0].output.save()
        second = lm.model.layers[1].output.save()
        logits = lm.lm_head.output.save()
    assert torch.equal(stored(cap.path, "blocks.0.resid_post"), flat(first))
    assert torch.equal(stored(cap.path, "blocks.1.resid_post"), flat(second))
    assert torch.equal(stored(cap.path, "logits"), flat(logits))
    expected = [(0, "prefill", s, p, int(IDS[s, p])) for s in range(2) for p in range(4)]
    assert tokens(cap.path) == expected


def test_outputs_changed_in_the_trace_are_stored_as_changed(lm: Any, tmp_path: Path) -> None:
    with capture(lm, tmp_path / "a.strap") as cap, lm.trace(IDS):
        before = lm.model.layers[0].output.clone().save()
        lm.model.layers[0].output = lm.model.layers[0].output * 2
        lm.model.layers[1].output[:] = 0
    assert torch.equal(stored(cap.path, "blocks.0.resid_post"), 2 * flat(before))
    assert torch.equal(stored(cap.path, "blocks.1.resid_pre"), 2 * flat(before))
    assert not stored(cap.path, "blocks.1.resid_post").any()


def test_inputs_changed_in_the_trace_are_stored_as_they_came(lm: Any, tmp_path: Path) -> None:
    with capture(lm, tmp_path / "a.strap") as cap, lm.trace(IDS):
        before = lm.model.layers[1].input.clone().save()
        lm.model.layers[1].input = lm.model.layers[1].input * 2
        after = lm.model.layers[1].output.save()
    assert torch.equal(stored(cap.path, "blocks.1.resid_pre"), flat(before))
    assert torch.equal(stored(cap.path, "blocks.1.resid_post"), flat(after))


def test_invokes_are_sequences_of_one_padded_batch(lm: Any, tmp_path: Path) -> None:
    with capture(lm, tmp_path / "a.strap") as cap, lm.trace() as tracer:
        with tracer.invoke("hello"):
            short = lm.model.layers[0].output.save()
        with tracer.invoke("the world"):
            long = lm.model.layers[0].output.save()
    found = [(sequence, position) for _, _, sequence, position, _ in tokens(cap.path)]
    assert found == [(0, p) for p in range(5)] + [(1, p) for p in range(7)]
    values = stored(cap.path, "blocks.0.resid_post")
    assert torch.equal(values[:5], flat(short[:, -5:]))
    assert torch.equal(values[5:], flat(long))


def test_generation_goes_on_with_its_sequence(lm: Any, tmp_path: Path) -> None:
    with capture(lm, tmp_path / "a.strap") as cap:  # noqa: SIM117
        with lm.generate("hello", max_new_tokens=3, min_new_tokens=3) as tracer:
            passes = nnsight.save([])
            for _ in tracer.iter[:3]:
                passes.append(lm.model.layers[0].output)
    assert [(step, phase, position) for step, phase, _, position, _ in tokens(cap.path)] == [
        *((0, "prefill", p) for p in range(5)),
        (1, "decode", 5),
        (2, "decode", 6),
    ]
    assert torch.equal(stored(cap.path, "blocks.0.resid_post"), torch.cat([flat(x) for x in passes]))


def test_capture_entered_inside_a_trace_ends_before_the_pass_and_says_so(lm: Any, tmp_path: Path) -> None:
    with pytest.raises(SiteNeverFiredError, match="logits"), lm.trace(IDS):  # noqa: SIM117
        with capture(lm, tmp_path / "a.strap"):
            lm.lm_head.output.save()


def test_model_without_its_weights_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    lm = nnsight.TransformersModel(
        str(tmp_path / "model"), tokenizer=tiny_tokenizer(), task="text-generation"
    )
    with pytest.raises(ArgumentError, match=r"not loaded yet.*dispatch\(\)"):
        capture(lm, tmp_path / "a.strap")
    assert not (tmp_path / "a.strap").exists()
    lm.dispatch()
    with capture(lm, tmp_path / "a.strap") as cap, lm.trace(IDS):
        value = lm.model.layers[0].output.save()
    assert torch.equal(stored(cap.path, "blocks.0.resid_post"), flat(value))


def test_sites_are_listed_through_the_wrapper(lm: Any) -> None:
    assert [info.site for info in strapfmt.sites(lm)] == [info.site for info in strapfmt.sites(lm._module)]
