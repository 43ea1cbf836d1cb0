"""Recomputed attention patterns are those of eager attention, and watching a model leaves no trace."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ENCODERS, FAMILIES, tiny_model, tiny_tokenizer
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import strapfmt
from strapfmt.errors import ArgumentError, CaptureError
from strapfmt.reader import Reader
from strapfmt_capture import cuts
from strapfmt_capture.attention import _entries, watched
from strapfmt_capture.sites import resolve

OWN_WAY = ("bloom", "falcon", "gptj")
NO_ATTENTION = ("mamba", "mamba2", "falcon_mamba")
TEXTS = ["the cat sat", "a longer text than that", "x"]
# Gemma 2 caps its scores, which sdpa of transformers refuses.
SDPA: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in (*FAMILIES, *ENCODERS) if family not in (*OWN_WAY, *NO_ATTENTION, "gemma2")),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("mistral", {"sliding_window": 4}),
    ("phi3", {"sliding_window": 4}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
]


def batch(side: str = "left", texts: list[str] = TEXTS) -> dict[str, torch.Tensor]:
    return dict(
        tiny_tokenizer()(
            texts, return_tensors="pt", padding=True, padding_side=side, return_token_type_ids=False
        )
    )


def run(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options: Any) -> None:
    if model.config.model_type in ENCODERS:
        with torch.no_grad():
            model(**inputs)
    else:
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, **options}
        model.generate(**inputs, **options)


def patterns(path: Path, name: str) -> list[torch.Tensor]:
    columns = Reader(path)[name].to_arrow(["activation", "shape"])
    return [
        torch.tensor(values.as_py()).reshape(shape.as_py())
        for values, shape in zip(columns["activation"], columns["shape"], strict=True)
    ]


def assert_same_patterns(found: Path, expected: Path) -> None:
    names = Reader(expected).names
    assert names == Reader(found).names != []
    for name in names:
        here, there = patterns(found, name), patterns(expected, name)
        assert len(here) == len(there) > 10
        for one, other in zip(here, there, strict=True):
            torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-4)
            assert torch.equal(one == 0, other == 0)  # the same keys are seen


def capture_both(
    family: str, implementation: str, tmp_path: Path, inputs: dict[str, torch.Tensor], **options: Any
) -> tuple[Path, Path]:
    """Patterns of one model, recomputed and by eager attention."""
    overrides = options.pop("overrides", {})
    paths = tmp_path / "found.strap", tmp_path / "expected.strap"
    for path, name in zip(paths, (implementation, "eager"), strict=True):
        model = tiny_model(family, attn_implementation="eager", **overrides)
        model.config._attn_implementation = name  # as it is, without a look for a package of that name
        with strapfmt.capture(
            model, path, sites="blocks.*.attn_pattern", attn_pattern="recompute", stats=False, quiet=True
        ):
            run(model, inputs, **options)
    return paths


@pytest.mark.parametrize(("family", "overrides"), SDPA)
def test_recomputed_patterns_are_those_of_eager_attention(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    assert_same_patterns(*capture_both(family, "sdpa", tmp_path, batch(), overrides=overrides))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}]
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_recomputed_patterns_follow_any_cache(
    family: str, options: dict[str, Any], side: str, tmp_path: Path
) -> None:
    # No padding as long as the window: what eager attention and sdpa make of a token that sees nothing differs.
    inputs = batch(side, ["the cat sat", "abcdefghijk", "the ca"])
    assert_same_patterns(*capture_both(family, "sdpa", tmp_path, inputs, disable_compile=True, **options))


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_recomputed_patterns_of_a_batch_without_padding_need_no_mask(cache: str, tmp_path: Path) -> None:
    inputs = batch(texts=["the cats", "abcdef"])
    assert bool(inputs["attention_mask"].all())
    paths = capture_both("qwen3", "sdpa", tmp_path, inputs, cache_implementation=cache, disable_compile=True)
    assert_same_patterns(*paths)


def capture_patterns(model: Any, path: Path) -> Any:
    return strapfmt.capture(model, path, sites="blocks.*.attn_pattern", attn_pattern="recompute", quiet=True)


def test_packed_sequences_do_not_see_each_other(tmp_path: Path) -> None:
    paths = []
    for name in ("sdpa", "eager"):
        model = tiny_model("llama", attn_implementation=name)
        paths.append(tmp_path / f"{name}.strap")
        with capture_patterns(model, paths[-1]), torch.no_grad():
            model(
                input_ids=torch.arange(5, 20)[None],
                position_ids=torch.tensor([[*range(7), *range(8)]]),
                use_cache=False,
            )
    assert_same_patterns(*paths)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_patterns_of_packed_sequences_are_those_of_each_by_itself(attention: str, tmp_path: Path) -> None:
    model = tiny_model("llama", attn_implementation=attention)
    ids = torch.arange(5, 19).reshape(2, 7)
    lengths = [[3, 4], [7]]  # in each row of the batch
    with capture_patterns(model, tmp_path / "packed.strap"), torch.no_grad():
        positions = torch.tensor([[place for n in row for place in range(n)] for row in lengths])
        model(input_ids=ids, position_ids=positions, use_cache=False)
    with capture_patterns(model, tmp_path / "alone.strap"), torch.no_grad():
        for row, each in zip(ids, lengths, strict=True):
            for part in row.split(each):
                model(input_ids=part[None], use_cache=False)
    assert_same_patterns(tmp_path / "packed.strap", tmp_path / "alone.strap")


class Flash:
    """Flash attention by its contract (a 2-D mask or none, causal from the end, window, cap), token by token."""

    def __init__(self) -> None:
        self.masks: list[Any] = []

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        self.masks.append(mask)
        n, heads, n_query, width = query.shape
        shift = key.shape[2] - n_query
        out = torch.zeros(n, n_query, heads, width)
        for b in range(n):
            for i in range(n_query):
                seen = [j for j in range(i + shift + 1) if mask is None or bool(mask[b, j])]
                seen = [j for j in seen if sliding_window is None or i + shift - j < sliding_window]
                for h in range(heads if seen else 0):
                    group = h * key.shape[1] // heads
                    scores = key[b, group, seen] @ query[b, h, i] * scaling
                    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
                    out[b, i, h] = scores.softmax(0) @ value[b, group, seen]
        return out, None


@pytest.fixture
def flash() -> Iterator[Flash]:
    flash = Flash()
    AttentionInterface.register("flash_by_hand", flash)
    AttentionMaskInterface.register("flash_by_hand", flash_attention_mask)
    yield flash
    del AttentionInterface._global_mapping["flash_by_hand"]
    del AttentionMaskInterface._global_mapping["flash_by_hand"]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {}),
        ("gemma2", {"attn_logit_softcapping": 0.5, "sliding_window": 4}),
        ("gemma3_text", {"sliding_window": 4}),
        ("mistral", {"sliding_window": 4}),
    ],
)
@pytest.mark.parametrize("texts", [TEXTS, ["the cats", "abcdef"]])
def test_patterns_of_flash_attention_are_recomputed(
    family: str, overrides: dict[str, Any], texts: list[str], flash: Flash, tmp_path: Path
) -> None:
    paths = capture_both(family, "flash_by_hand", tmp_path, batch(texts=texts), overrides=overrides)
    assert_same_patterns(*paths)
    assert any(mask is not None for mask in flash.masks) == (texts is TEXTS)
    assert all(mask is None or mask.ndim == 2 for mask in flash.masks)


@pytest.mark.parametrize("positions", [[*range(3), *range(4)], [0, *range(6)]])
def test_packed_sequences_of_flash_attention_are_refused(
    positions: list[int], flash: Flash, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_by_hand"
    capture = strapfmt.capture(
        model, tmp_path / "x.strap", sites="**.attn_pattern", attn_pattern="recompute", quiet=True
    )
    with pytest.raises(CaptureError, match="several sequences are packed into one"), capture:
        model(
            input_ids=torch.arange(5, 12)[None],
            position_ids=torch.tensor([positions]),
            use_cache=False,
        )


def test_packing_that_cannot_be_asked_in_a_cuda_graph_is_refused_with_a_reason(
    flash: Flash, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_by_hand"
    monkeypatch.setattr("strapfmt_capture.attention.is_graph_made", lambda: True)
    options: dict[str, Any] = {"attn_pattern": "recompute", "quiet": True}
    with (
        pytest.raises(CaptureError, match="cannot be asked in a CUDA graph"),
        strapfmt.capture(model, tmp_path / "x.strap", sites="**.attn_pattern", **options) as cap,
        cap.recording(),
    ):
        model(input_ids=torch.arange(5, 12)[None], position_ids=torch.arange(7)[None], use_cache=False)


def test_what_layers_have_in_common_of_padding_is_sent_to_a_device_once_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", attn_implementation="eager")
    sent: list[int] = []
    send = cuts.sent

    def noted(index: Any, device: torch.device) -> torch.Tensor:
        sent.append(len(index))
        return send(index, device)

    monkeypatch.setattr(cuts, "sent", noted)
    inputs = batch(texts=["the cat sat", "abcdefgh"])
    n_real = inputs["attention_mask"].sum(1).tolist()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="**.attn_pattern", quiet=True):
        model(**inputs)
        model(**inputs)
    short, long = sorted(n_real)
    assert long > short  # two layers of two sequences, of which one is padded: its queries, keys and padding
    assert sorted(sent) == sorted(2 * [short, short, long - short, long])


def test_padding_of_one_sequence_is_not_taken_for_packing(flash: Flash, tmp_path: Path) -> None:
    inputs = {name: x[:1] for name, x in batch().items()}
    assert not inputs["attention_mask"].all()
    assert_same_patterns(*capture_both("llama", "flash_by_hand", tmp_path, inputs))


def test_what_cannot_be_recomputed_is_told(tmp_path: Path) -> None:
    seen: list[Any] = []
    model = tiny_model("llama", attn_implementation="sdpa")
    attn = model.model.layers[0].self_attn
    with watched(attn, seen.append), torch.no_grad():
        model(**batch())
    (call,) = seen
    assert call.pattern().shape == (3, 4, 23, 23)
    for name in ("s_aux", "position_bias", "cu_seq_lens_q"):
        odd = type(call)(**{field: getattr(call, field) for field in call.__slots__} | {"options": {name: 1}})
        with pytest.raises(CaptureError, match=rf"LlamaAttention.*{name}.*eager"):
            odd.pattern()
    for name, mask in (("flex_attention", object()), ("mine", None)):
        fields = {field: getattr(call, field) for field in call.__slots__}
        with pytest.raises(CaptureError, match="is given a mask of type"):
            type(call)(**fields | {"implementation": name, "mask": mask}).pattern()


@pytest.mark.parametrize("family", OWN_WAY)
def test_attention_that_goes_its_own_way_is_refused_before_anything_happens(
    family: str, tmp_path: Path
) -> None:
    model = tiny_model(family)
    if model.config._attn_implementation == "eager":
        assert resolve(model, "**.attn_pattern", recompute_patterns=True)[0].where == "out"
        model.config._attn_implementation = "sdpa"
    with pytest.raises(CaptureError, match=r"calls no function of the ALL_ATTENTION_FUNCTIONS.*eager"):
        strapfmt.capture(model, tmp_path / "x.strap", sites="**.attn_pattern", attn_pattern="recompute")
    assert not (tmp_path / "x.strap").exists()


def test_patterns_are_recomputed_on_request_only(tmp_path: Path) -> None:
    model = tiny_model("llama", attn_implementation="sdpa")
    with pytest.raises(CaptureError, match='attn_implementation="eager"'):
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.attn_pattern")
    with pytest.raises(ArgumentError, match="attn_pattern: expected 'model' or 'recompute', got 'eager'"):
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.attn_pattern", attn_pattern="eager")  # type: ignore[arg-type]
    cap = strapfmt.capture(
        model, tmp_path / "x.strap", sites="blocks.0.attn_*", attn_pattern="recompute", quiet=True
    )
    assert any("computed from queries, keys and masks, as 'sdpa'" in note for note in cap.report.notes)
    eager = tiny_model("llama", attn_implementation="eager")
    points = resolve(eager, "blocks.0.attn_pattern", recompute_patterns=True)
    assert points == resolve(eager, "blocks.0.attn_pattern")
    again = strapfmt.capture(eager, tmp_path / "y.strap", sites="blocks.0.*", attn_pattern="recompute")
    assert again.report.notes == ()


def test_a_dataset_says_how_its_patterns_were_made(tmp_path: Path) -> None:
    hook_points = []
    for path in capture_both("llama", "sdpa", tmp_path, batch()):
        hook_points.append(Reader(path)["blocks.0.attn_pattern"].spec.hook_point)
    assert hook_points == ["model.layers.0.self_attn:attention", "model.layers.0.self_attn:out"]
    model = tiny_model("llama", attn_implementation="eager")
    with pytest.raises(ArgumentError, match="hook_point"):
        strapfmt.capture(model, tmp_path / "found.strap", sites="blocks.*.attn_pattern", mode="append")


def attention_table() -> dict[str, Any]:
    return dict(ALL_ATTENTION_FUNCTIONS)


def test_nothing_is_changed_by_watching(tmp_path: Path) -> None:
    model, inputs = tiny_model("llama", attn_implementation="sdpa"), batch()
    before, local = attention_table(), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    with torch.no_grad():
        expected = model(**inputs).logits
    with (
        strapfmt.capture(
            model, tmp_path / "x.strap", sites="**.attn_pattern", attn_pattern="recompute", quiet=True
        ),
        torch.no_grad(),
    ):
        assert attention_table() != before
        assert all(layer.self_attn.config is model.config for layer in model.model.layers)
        assert torch.equal(model(**inputs).logits, expected)
        copied, stored = deepcopy(model), pickle.loads(pickle.dumps(model))  # noqa: S301
    assert (attention_table(), ALL_ATTENTION_FUNCTIONS._local_mapping, _entries) == (before, local, {})
    for other in (model, copied, stored):
        with torch.no_grad():
            assert torch.equal(other(**inputs).logits, expected)


def test_an_exception_inside_leaves_nothing_behind(tmp_path: Path) -> None:
    model, before = tiny_model("llama", attn_implementation="sdpa"), attention_table()
    with (
        pytest.raises(ZeroDivisionError),
        strapfmt.capture(
            model, tmp_path / "x.strap", sites="**.attn_pattern", attn_pattern="recompute", quiet=True
        ),
    ):
        _ = 1 / 0
    assert (attention_table(), _entries) == (before, {})


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_watchers_may_overlap(first_ends_first: bool) -> None:
    model, other = (tiny_model("llama", attn_implementation="sdpa") for _ in range(2))
    attn, before = model.model.layers[1].self_attn, attention_table()
    seen: dict[str, list[Any]] = {"first": [], "second": []}
    contexts = {name: watched(attn, calls.append) for name, calls in seen.items()}

    def counts() -> tuple[int, int]:
        with torch.no_grad():
            model(**batch())
            other(**batch())  # is not watched
        return len(seen["first"]), len(seen["second"])

    contexts["first"].__enter__()
    assert counts() == (1, 0)
    contexts["second"].__enter__()
    assert counts() == (2, 1)
    order = ("first", "second") if first_ends_first else ("second", "first")
    contexts[order[0]].__exit__(None, None, None)
    assert counts() == ((2, 2) if first_ends_first else (3, 1))
    contexts[order[1]].__exit__(None, None, None)
    assert counts() == ((2, 2) if first_ends_first else (3, 1))
    assert (attention_table(), _entries) == (before, {})


def test_a_function_that_somebody_else_registers_meanwhile_stays() -> None:
    model = tiny_model("llama", attn_implementation="sdpa")
    before, seen = attention_table(), []

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return before["sdpa"](*args, **kwargs)

    try:
        with watched(model.model.layers[0].self_attn, seen.append):
            ALL_ATTENTION_FUNCTIONS["sdpa"] = theirs
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is theirs
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert (attention_table(), seen) == (before, [])


def test_a_switch_of_the_implementation_is_counted(tmp_path: Path) -> None:
    model, inputs = tiny_model("llama", attn_implementation="sdpa"), batch()
    with (
        strapfmt.capture(
            model, tmp_path / "x.strap", sites="**.attn_pattern", attn_pattern="recompute", quiet=True
        ) as cap,
        torch.no_grad(),
    ):
        model(**inputs)
        model.set_attn_implementation("eager")
        model(**inputs)
    n_tokens = int(inputs["attention_mask"].sum())
    assert [(site.n_missed, site.written) for site in cap.report.sites] == [(1, n_tokens)] * 2


def test_the_pattern_is_of_the_dtype_of_the_model(tmp_path: Path) -> None:
    for name in ("sdpa", "eager"):
        model = tiny_model("llama", attn_implementation=name, dtype=torch.bfloat16)
        path = tmp_path / f"{name}.strap"
        with strapfmt.capture(
            model, path, sites="blocks.0.attn_pattern", attn_pattern="recompute", stats=False, quiet=True
        ):
            run(model, batch())
        assert Reader(path)["blocks.0.attn_pattern"].spec.dtype == "bfloat16"
