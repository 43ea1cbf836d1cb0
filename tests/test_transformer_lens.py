"""Capture of TransformerLens models: values are those of `run_with_cache`. Runs where TransformerLens is installed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from captured import stored, tokens
from models import tiny_model, tiny_tokenizer

import strapfmt
from strapfmt.errors import ArgumentError, CaptureError, SiteNotFoundError
from strapfmt_capture import Capture

bridges = pytest.importorskip("transformer_lens.model_bridge", reason="pip install 'strapfmt[peers]'")
transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
CLASSES = {
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
PLACES = {
    "resid_pre": "hook_resid_pre",
    "attn_pattern": "attn.hook_pattern",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}


def bridge_of(model: torch.nn.Module, name: str, folder: Path) -> Any:
    model.config.architectures = [name]
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    return bridges.TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tokenizer)


@pytest.fixture
def bridge(tmp_path: Path) -> Any:
    return bridge_of(tiny_model("llama"), CLASSES["llama"], tmp_path)


def capture(model: Any, path: Path, sites: Any, **options: Any) -> Capture:
    return strapfmt.capture(model, path, sites=sites, quiet=True, **options)


def flat(x: torch.Tensor) -> torch.Tensor:
    return x.detach().flatten(0, 1)


@pytest.mark.parametrize("is_processed", [False, True], ids=["as it is", "compatibility mode"])
@pytest.mark.parametrize("family", CLASSES)
def test_every_uniform_site_is_what_run_with_cache_returns(
    family: str, is_processed: bool, tmp_path: Path
) -> None:
    model = bridge_of(tiny_model(family), CLASSES[family], tmp_path)
    if is_processed:
        model.enable_compatibility_mode()
    with capture(model, tmp_path / "a.strap", ["embed", "blocks.*.*", "final_norm", "logits"]) as cap:
        logits, cache = model.run_with_cache(IDS)
    expected = {"embed": cache["hook_embed"], "final_norm": cache["ln_final.hook_out"], "logits": logits}
    for layer in range(2):
        for place, name in PLACES.items():
            if f"blocks.{layer}.{name}" in cache:
                expected[f"blocks.{layer}.{place}"] = cache[f"blocks.{layer}.{name}"]
    found = {site.name for site in cap.report.sites}
    assert {site for site in found if "._" not in site and "hook" not in site} >= set(expected)
    assert ("blocks.0.resid_mid" in expected) is (family != "gpt_neox")
    dataset = strapfmt.open(cap.path)
    for site, value in expected.items():
        if site.endswith("attn_pattern"):
            expected_rows = [row.flatten().tolist() for row in flat(value.transpose(1, 2))]
            assert dataset[site].to_arrow()["activation"].to_pylist() == expected_rows, site
        else:
            assert torch.equal(stored(cap.path, site), flat(value)), site


def test_hook_points_are_found_by_the_names_of_the_library(bridge: Any, tmp_path: Path) -> None:
    names = [
        "blocks.0.hook_resid_post",
        "blocks.1.attn.hook_z",
        "blocks.*.ln1.hook_scale",
        "ln_final.hook_in",
    ]
    with capture(bridge, tmp_path / "a.strap", names) as cap:
        _, cache = bridge.run_with_cache(IDS)
    for name in (*names[:2], "blocks.0.ln1.hook_scale", "blocks.1.ln1.hook_scale", names[3]):
        value = cache[name].flatten(2)  # the cache splits what a projection gives into heads
        assert torch.equal(stored(cap.path, name), flat(value)), name
    with pytest.raises(SiteNotFoundError, match="hook_resid_pots"):
        capture(bridge, tmp_path / "b.strap", "blocks.0.hook_resid_pots")


def test_generation_goes_on_with_its_sequence(bridge: Any, tmp_path: Path) -> None:
    with capture(bridge, tmp_path / "a.strap", "blocks.1.resid_post") as cap:
        made = bridge.generate(IDS, max_new_tokens=3, stop_at_eos=False, do_sample=False, verbose=False)
        _, cache = bridge.run_with_cache(made[:, :-1])
    found = tokens(cap.path)
    assert [row[:4] for row in found[8:12]] == [
        (1, "decode", 0, 4),
        (1, "decode", 1, 4),
        (2, "decode", 0, 5),
        (2, "decode", 1, 5),
    ]
    for sequence in range(2):
        ids = [token for _, _, number, _, token in found if number == sequence]
        assert ids == made[sequence, :-1].tolist()
    values = stored(cap.path, "blocks.1.resid_post")
    expected = cache["blocks.1.hook_resid_post"]
    assert torch.allclose(values[8:10], expected[:, 4], atol=1e-5)
    assert torch.allclose(values[10:12], expected[:, 5], atol=1e-5)


def test_text_and_left_padding(bridge: Any, tmp_path: Path) -> None:
    with capture(bridge, tmp_path / "a.strap", "blocks.0.resid_post") as cap:
        bridge(["ab", "hello"], padding_side="left")
    short, long = bridge.to_tokens("ab")[0].tolist(), bridge.to_tokens("hello")[0].tolist()
    expected = [(0, p, token) for p, token in enumerate(short)]
    expected += [(1, p, token) for p, token in enumerate(long)]
    assert [(number, position, token) for _, _, number, position, token in tokens(cap.path)] == expected


def test_hooks_added_before_the_capture_count_and_later_ones_do_not(bridge: Any, tmp_path: Path) -> None:
    def zero(value: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.zeros_like(value)

    hooks = [("blocks.0.hook_resid_post", zero)]
    with bridge.hooks(fwd_hooks=hooks), capture(bridge, tmp_path / "a.strap", "blocks.*.resid_*") as cap:
        bridge(IDS)
    assert not stored(cap.path, "blocks.0.resid_post").any()
    with capture(bridge, tmp_path / "b.strap", ["blocks.*.resid_*", "blocks.0"]) as cap:
        bridge.run_with_hooks(IDS, fwd_hooks=hooks)
    assert stored(cap.path, "blocks.0.resid_post").any()
    assert not stored(cap.path, "blocks.0").any()
    assert not stored(cap.path, "blocks.1.resid_pre").any()


def test_largest_logits(bridge: Any, tmp_path: Path) -> None:
    with capture(bridge, tmp_path / "a.strap", "logits", top_k_logits=3) as cap:
        logits = bridge(IDS)
    values, ids = flat(logits).topk(3)
    assert torch.equal(stored(cap.path, "logits.top_values"), values)
    assert torch.equal(stored(cap.path, "logits.top_ids"), ids)
    with pytest.raises(ArgumentError, match="at most 101"):
        capture(bridge, tmp_path / "b.strap", "logits", top_k_logits=102)


def test_sites_are_listed(bridge: Any) -> None:
    found = {info.site: info.hook_point for info in strapfmt.sites(bridge).uniform}
    assert found["blocks.1.resid_post"] == "blocks.1.hook_resid_post:out"


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=101, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = bridge_of(
        transformers.T5ForConditionalGeneration(config).eval(), "T5ForConditionalGeneration", tmp_path
    )
    with pytest.raises(CaptureError, match="original_model"):
        capture(model, tmp_path / "a.strap", "encoder_blocks.0.hook_out")
