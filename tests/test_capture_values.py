"""What is captured is what the model computed, bit for bit, and every row is the token it says."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
import torch
from models import FAMILIES, hidden_states, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

import strapfmt
from strapfmt.reader import Reader

TEXTS = ["the cat", "a longer text", "x"]


def batch(side: str = "left", texts: list[str] = TEXTS) -> dict[str, torch.Tensor]:
    """A padded batch of token ids and their mask."""
    tokenizer = tiny_tokenizer()
    return dict(
        tokenizer(texts, return_tensors="pt", padding=True, padding_side=side, return_token_type_ids=False)
    )


@contextmanager
def recorded(module: torch.nn.Module, index: int = 0) -> Iterator[list[torch.Tensor]]:
    """Collect copies of a module's outputs (of a tuple, one element) by a hook of our own."""
    outputs: list[torch.Tensor] = []

    def hook(_: torch.nn.Module, args: object, output: object) -> None:
        outputs.append((output if isinstance(output, torch.Tensor) else output[index]).detach().clone())

    handle = module.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that NaN equals itself and -0 differs from 0."""
    return x.contiguous().view(torch.uint8)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize(
    ("family", "side"),
    [(family, "left") for family in FAMILIES]
    + [(family, "right") for family in ("gpt2", "llama", "bloom", "mixtral", "mamba", "jamba")],
)
def test_every_site_of_every_family_holds_what_the_model_computes(
    family: str, side: str, tmp_path: Path
) -> None:
    model, inputs = tiny_model(family), batch(side)
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
        states = hidden_states(model, inputs["input_ids"], expected)
    with (
        recorded(blocks_of(model)[-1]) as last_block,
        strapfmt.capture(model, tmp_path / "x.strap", sites="**", stats=False, quiet=True) as cap,
        torch.no_grad(),
    ):
        outputs = model(**inputs)
    assert_same_bits(outputs.logits, expected.logits)
    stored = inputs["attention_mask"].bool()
    reader = Reader(tmp_path / "x.strap")
    assert len(reader.tokens) == int(stored.sum())
    for layer, hidden in enumerate(states[:-1]):
        assert_same_bits(reader[f"blocks.{layer}.resid_pre"].tensor(), hidden[stored])
    assert_same_bits(reader["blocks.0.resid_post"].tensor(), states[1][stored])
    assert_same_bits(reader[f"blocks.{len(blocks_of(model)) - 1}.resid_post"].tensor(), last_block[0][stored])
    assert_same_bits(reader["logits"].tensor(), expected.logits[stored])
    rows = np.arange(int(stored.sum()))
    last = stored.flatten().cumsum(0).reshape(stored.shape)[stored[:, -1], -1].numpy() - 1
    for name in reader.names:
        expected_rows = last if name.endswith("ssm_state") else rows
        np.testing.assert_array_equal(reader[name].rows, expected_rows, err_msg=name)
    assert {site.written for site in cap.report.sites if "ssm" not in site.name} == {len(rows)}


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "qwen2", "qwen3", "gemma", "gpt_neox", "mixtral", "falcon", "mamba", "mamba2"]
)
def test_generation_stores_every_pass_and_every_row_is_its_token(family: str, tmp_path: Path) -> None:
    model, inputs = tiny_model(family), batch()
    sites = ["blocks.1.resid_post", "logits"]
    with (
        recorded(blocks_of(model)[1]) as outputs,
        strapfmt.capture(model, tmp_path / "x.strap", sites=sites, tokenizer=tiny_tokenizer(), quiet=True),
    ):
        generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    mask = inputs["attention_mask"].bool()
    reader = Reader(tmp_path / "x.strap")
    site = reader["blocks.1.resid_post"]
    assert_same_bits(
        site.tensor(), torch.cat([outputs[0][mask], *(output.flatten(0, 1) for output in outputs[1:])])
    )
    tokens = reader.tokens.to_arrow().to_pylist()
    assert [row["row"] for row in tokens] == site.rows.tolist()
    assert [row["phase"] for row in tokens].count("decode") == 4 * len(TEXTS)
    n_padding = (~mask).sum(1).tolist()
    for row in tokens:
        place = row["batch_index"]
        assert row["token_id"] == generated[place, n_padding[place] + row["position"]]
        assert row["sequence_id"] == place
    last = [
        max(row["row"] for row in tokens if (row["batch_index"], row["step"]) == (b, 0)) for b in range(3)
    ]
    decoded = [row["row"] for row in tokens if row["phase"] == "decode"]
    assert reader["logits"].row_space == "tokens"
    assert reader["logits"].rows.tolist() == last + decoded


def history(tokens: dict[int, dict[str, int]], row: int | None) -> list[int]:
    """Token ids of everything before a row and itself, by way of `parent_row`."""
    ids: list[int] = []
    while row is not None:
        ids.append(tokens[row]["token_id"])
        row = tokens[row]["parent_row"]
    return ids[::-1]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "prefill_chunk_size": 3},
        {"do_sample": False, "use_cache": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_row_holds_what_a_fresh_pass_over_its_history_computes(
    options: dict[str, object], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    texts = TEXTS if "prefill_chunk_size" not in options else ["the cat sat"]
    torch.manual_seed(0)
    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.1.resid_post", quiet=True):
        model.generate(**batch(texts=texts), max_new_tokens=4, **options)
    reader = Reader(tmp_path / "x.strap")
    site = reader["blocks.1.resid_post"]
    tokens = {row["row"]: row for row in reader.tokens.to_arrow().to_pylist()}
    assert len(tokens) > 10
    with recorded(blocks_of(model)[1]) as outputs, torch.no_grad():
        for row in site.rows.tolist()[::3]:
            ids = history(tokens, row)
            assert len(ids) == tokens[row]["position"] + 1
            outputs.clear()
            model(input_ids=torch.tensor([ids]))
            torch.testing.assert_close(site.take(np.array([row]))[0], outputs[0][0, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("grad", [True, False])
def test_values_keep_their_dtype_with_and_without_gradients(
    dtype: torch.dtype, grad: bool, tmp_path: Path
) -> None:
    model = tiny_model("gpt2", dtype=dtype)
    with (
        recorded(blocks_of(model)[0]) as outputs,
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.resid_post", quiet=True),
        torch.set_grad_enabled(grad),
    ):
        result = model(input_ids=torch.tensor([[5, 6, 7]]))
    assert result.logits.requires_grad is grad
    site = Reader(tmp_path / "x.strap")["blocks.0.resid_post"]
    assert_same_bits(site.tensor(), outputs[0][0])
    statistics = site.to_arrow(["l2_norm", "mean"])
    np.testing.assert_allclose(
        statistics["l2_norm"].to_numpy(), outputs[0][0].double().norm(dim=1).numpy(), rtol=1e-5
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_works_inside_any_gradient_mode(mode: type, tmp_path: Path) -> None:
    model, inputs = tiny_model("llama"), batch()
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states[1]
    with mode(), strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.resid_post", quiet=True):
        model(**inputs)
        model(**inputs)
    found = Reader(tmp_path / "x.strap")["blocks.0.resid_post"].tensor()
    assert_same_bits(found, torch.cat([expected[inputs["attention_mask"].bool()]] * 2))


class InPlace(torch.nn.Module):
    """Changes what its layers gave after their hooks have run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        seen = hidden.clone()
        hidden.mul_(0).add_(torch.nan)
        return self.second(seen)


def test_later_changes_in_place_do_not_reach_what_was_captured(tmp_path: Path) -> None:
    model, x = InPlace().eval(), torch.randn(5, 4)
    with (
        strapfmt.capture(model, tmp_path / "x.strap", sites=["first", "second:in"], quiet=True),
        torch.no_grad(),
    ):
        model(x)
    reader = Reader(tmp_path / "x.strap")
    assert_same_bits(reader["first"].tensor(), model.first(x).detach())
    assert_same_bits(reader["second:in"].tensor(), model.first(x).detach())


class Bits(torch.nn.Module):
    """Gives the values it was made with."""

    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values, self.inner = values, torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.values)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int16,
        torch.bool,
    ],
)
def test_every_bit_pattern_survives(dtype: torch.dtype, tmp_path: Path) -> None:
    patterns = torch.randint(0, 256, (64, 16 * dtype.itemsize), dtype=torch.uint8)
    values = (patterns & 1).bool() if dtype is torch.bool else patterns.view(dtype)
    model = Bits(values)
    with strapfmt.capture(model, tmp_path / "x.strap", sites="inner", quiet=True):
        model(torch.zeros(1))
    assert_same_bits(Reader(tmp_path / "x.strap")["inner"].tensor(), values)


def test_strided_outputs_arrive_in_order(tmp_path: Path) -> None:
    wide = torch.arange(2 * 3 * 12, dtype=torch.float32).reshape(2, 3, 12)
    model = Bits(wide[..., 4:8].transpose(0, 1))
    with strapfmt.capture(model, tmp_path / "x.strap", sites="inner", quiet=True):
        model(torch.zeros(1))
    expected = wide[..., 4:8].transpose(0, 1).reshape(6, 4)
    assert_same_bits(Reader(tmp_path / "x.strap")["inner"].tensor(), expected)


def patterns_of(path: Path, name: str) -> list[torch.Tensor]:
    """Read attention patterns row by row, [heads, keys]."""
    columns = Reader(path)[name].to_arrow(["activation", "shape"])
    return [
        torch.tensor(values.as_py()).reshape(shape.as_py())
        for values, shape in zip(columns["activation"], columns["shape"], strict=True)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
def test_attention_patterns_are_one_row_a_token_and_one_key_a_token(
    tmp_path: Path, side: str, cache: str
) -> None:
    model, inputs = tiny_model("llama", attn_implementation="eager"), batch(side)
    is_real = inputs["attention_mask"].bool()
    how: dict[str, Any] = {"use_cache": False} if cache == "none" else {"cache_implementation": cache}
    with (
        recorded(blocks_of(model)[1].self_attn, 1) as outputs,
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.1.attn_pattern", quiet=True),
    ):
        model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, **how)
    expected = []
    for output in outputs:
        n_query = output.shape[2]
        if cache == "none":
            is_real = torch.nn.functional.pad(
                inputs["attention_mask"].bool(), (0, n_query - inputs["attention_mask"].shape[1]), value=True
            )
        elif output is not outputs[0]:
            is_real = torch.nn.functional.pad(is_real, (0, 1), value=True)
        for pattern, real in zip(output, is_real, strict=True):
            queries = real[-n_query:]
            expected += [
                pattern[:, query, : len(real)][:, real] for query in queries.nonzero()[:, 0].tolist()
            ]
    found = patterns_of(tmp_path / "x.strap", "blocks.1.attn_pattern")
    assert len(found) == len(expected) == len(Reader(tmp_path / "x.strap").tokens)
    for here, there in zip(found, expected, strict=True):
        assert_same_bits(here, there.contiguous())
        torch.testing.assert_close(here.sum(-1), torch.ones(len(here)))
    positions = Reader(tmp_path / "x.strap").tokens.to_arrow(["position"])["position"].to_pylist()
    for pattern, position in zip(found, positions, strict=True):
        assert bool((pattern[:, : position + 1] > 0).all())
        assert not pattern[:, position + 1 :].any()


def test_patterns_of_a_sliding_window_hold_its_keys(tmp_path: Path) -> None:
    model, inputs = tiny_model("gemma2", attn_implementation="eager"), batch("left")
    with (
        recorded(blocks_of(model)[0].self_attn, 1) as outputs,
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.attn_pattern", quiet=True),
    ):
        model.generate(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=None)
    is_real = inputs["attention_mask"].bool()
    expected = []
    for output in outputs:
        is_real = is_real if output is outputs[0] else torch.nn.functional.pad(is_real, (0, 1), value=True)
        for pattern, real in zip(output, is_real, strict=True):
            window, queries = real[-output.shape[3] :], real[-output.shape[2] :]
            expected += [pattern[:, q][:, window] for q in queries.nonzero()[:, 0].tolist()]
    assert any(output.shape[3] < is_real.shape[1] for output in outputs[1:])
    found = patterns_of(tmp_path / "x.strap", "blocks.0.attn_pattern")
    for here, there in zip(found, expected, strict=True):
        assert_same_bits(here, there.contiguous())


def test_keys_that_a_token_attends_to_are_never_left_out(tmp_path: Path) -> None:
    model, inputs = tiny_model("llama", attn_implementation="eager"), batch("left")
    # As a model would that ignores the mask: every query attends to every key.
    blocks_of(model)[0].self_attn.register_forward_hook(
        lambda _, args, output: (output[0], torch.full_like(output[1], 0.25))
    )
    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.attn_pattern", quiet=True):
        model(**inputs)
    n_keys = inputs["input_ids"].shape[1]
    found = patterns_of(tmp_path / "x.strap", "blocks.0.attn_pattern")
    assert {pattern.shape[1] for pattern in found} == {n_keys}
    assert all(bool((pattern == 0.25).all()) for pattern in found)


def test_files_are_plain_arrow(tmp_path: Path) -> None:
    model, inputs = tiny_model("gpt2"), batch(texts=["the cat"])
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites="blocks.0.resid_post", tokenizer=tiny_tokenizer(), quiet=True
    ):
        hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
    shards = sorted((tmp_path / "x.strap" / "rank-00000").rglob("*.arrow"))
    tables = {path.parent.name: pa.ipc.open_file(path).read_all() for path in shards}
    (site,) = (table for table in tables.values() if "activation" in table.schema.names)
    values = site["activation"].combine_chunks()
    np.testing.assert_array_equal(values.values.to_numpy().reshape(len(site), -1), hidden[0].detach().numpy())
    assert tables["tokens"]["token"].to_pylist() == ["the", " ", "c", "a", "t"]
    assert tables["tokens"]["row"].to_pylist() == site["row"].to_pylist()
    assert tables["sequences"]["prompt"].to_pylist()[0].replace(" ", "") == "thecat"
    assert tables["steps"]["status"].to_pylist() == ["complete"]


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_every_codec_gives_the_same_values(codec: str, tmp_path: Path) -> None:
    model, inputs = tiny_model("llama"), batch()
    with (
        recorded(blocks_of(model)[1].mlp) as outputs,
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.mlp_out", codec=codec, quiet=True),
    ):
        model(**inputs)
    site = Reader(tmp_path / "x.strap")["blocks.1.mlp_out"]
    assert site.codec == codec
    assert_same_bits(site.tensor(), outputs[0][inputs["attention_mask"].bool()])


class Network(torch.nn.Module):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.head = torch.nn.Linear(5 * 6 * 6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).flatten(1))


def test_modules_that_are_no_language_models_make_their_own_rows(tmp_path: Path) -> None:
    model = Network().eval()
    images = [torch.randn(n, 3, 8, 8) for n in (2, 7, 1)]
    with strapfmt.capture(model, tmp_path / "x.strap", sites=["conv", "head"], quiet=True), torch.no_grad():
        for image in images:
            model(image)
    reader = Reader(tmp_path / "x.strap")
    with torch.no_grad():
        assert_same_bits(reader["conv"].tensor(), torch.cat([model.conv(image) for image in images]))
        assert_same_bits(reader["head"].tensor(), torch.cat([model(image) for image in images]))
    assert reader["conv"].row_space == "own"
    columns = reader["head"].to_arrow(["row", "token_row", "call"])
    assert columns["row"].to_pylist() == list(range(10))
    assert columns["call"].to_pylist() == [0] * 2 + [1] * 7 + [2]
    assert columns["token_row"].null_count == 10
    assert len(reader.tokens) == 0
    assert len(reader.steps) == 3


def test_flattened_batches_are_rows_of_tokens(tmp_path: Path) -> None:
    model, inputs = tiny_model("mixtral"), batch()
    gate = next(name for name, _ in model.named_modules() if name.endswith("0.mlp.gate"))
    with strapfmt.capture(model, tmp_path / "x.strap", sites=[gate + ":in", "logits"], quiet=True):
        model(**inputs)
    reader = Reader(tmp_path / "x.strap")
    assert reader[gate + ":in"].row_space == "tokens"
    assert reader[gate + ":in"].n_rows == int(inputs["attention_mask"].sum())


def test_right_padded_last_logits_belong_to_padding_and_are_left_out(tmp_path: Path) -> None:
    model, inputs = tiny_model("llama"), batch("right")
    with strapfmt.capture(model, tmp_path / "x.strap", sites="logits", quiet=True):
        last = model(**inputs, logits_to_keep=1).logits
    reader = Reader(tmp_path / "x.strap")
    complete = inputs["attention_mask"][:, -1].bool()
    assert int(complete.sum()) == 1
    assert_same_bits(reader["logits"].tensor(), last[complete, 0])
    place = int(complete.nonzero()[0, 0])
    assert reader["logits"].rows.tolist() == [
        max(row["row"] for row in reader.tokens.to_arrow().to_pylist() if row["batch_index"] == place)
    ]


class Holder(torch.nn.Module):
    """Passes everything on, as a wrapper around a language model does."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs, logits_to_keep=torch.tensor([1, 3]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [torch.int64, torch.bool])
@pytest.mark.parametrize("chosen", [[0, 2], [3, 0, 1], [-1, 1, 1]])
def test_logits_at_positions_the_caller_chose_are_rows_of_those_tokens(
    tmp_path: Path, chosen: list[int], kind: torch.dtype, side: str
) -> None:
    model, inputs = tiny_model("llama"), batch(side)
    is_real = inputs["attention_mask"].bool()
    n_query = is_real.shape[1]
    keep = torch.tensor(chosen)
    if kind is torch.bool:
        keep = torch.zeros(n_query, dtype=kind).index_fill(0, keep % n_query, True)
    with strapfmt.capture(model, tmp_path / "x.strap", sites=["logits"], quiet=True):
        model(**inputs)
        given = model(**inputs, logits_to_keep=keep).logits
    positions = torch.arange(n_query)[keep].tolist()
    places = sorted(set(positions))
    columns = [positions.index(place) for place in places]
    row_of = torch.full(is_real.shape, -1)
    row_of[is_real] = int(is_real.sum()) + torch.arange(int(is_real.sum()))
    with strapfmt.open(tmp_path / "x.strap") as ds:
        rows = ds["logits"].rows[int(is_real.sum()) :]
        assert rows.tolist() == row_of[:, places][is_real[:, places]].tolist()
        assert_same_bits(ds["logits"].take(rows), given[:, columns][is_real[:, places]])


def test_positions_chosen_inside_a_wrapper_are_seen(tmp_path: Path) -> None:
    model, ids = Holder(tiny_model("llama")), torch.tensor([[5, 6, 7, 8]])
    with strapfmt.capture(model, tmp_path / "x.strap", sites="**.lm_head", quiet=True):
        model(input_ids=ids)
    (site,) = strapfmt.open(tmp_path / "x.strap").sites.values()
    assert (site.row_space, site.rows.tolist()) == ("tokens", [1, 3])


def test_chosen_positions_that_do_not_exist_stay_the_error_of_the_model(tmp_path: Path) -> None:
    model, ids, keep = tiny_model("llama"), torch.tensor([[5, 6, 7]]), torch.tensor([9])
    with pytest.raises(IndexError) as bare:
        model(input_ids=ids, logits_to_keep=keep)
    with (
        pytest.raises(IndexError) as caught,
        strapfmt.capture(model, tmp_path / "x.strap", sites="logits", quiet=True),
    ):
        model(input_ids=ids, logits_to_keep=keep)
    assert str(caught.value) == str(bare.value)


@pytest.mark.parametrize("keep", [(0, 1), (1, 0)], ids=["whole first", "last first"])
def test_logits_are_rows_of_tokens_whichever_pass_comes_first(keep: tuple[int, int], tmp_path: Path) -> None:
    model, path, ids = tiny_model("llama"), tmp_path / "x.strap", torch.tensor([[5, 6, 7]])
    given: list[torch.Tensor] = []
    for rank, (first, second) in enumerate((keep, keep[::-1])):
        with strapfmt.capture(model, path, sites="logits", rank=rank, quiet=True):
            given += [model(input_ids=ids, logits_to_keep=n).logits.flatten(0, 1) for n in (first, second)]
    with strapfmt.open(path) as ds:
        expected = {0: [0, 1, 2], 1: [2]}
        local = [[n + 3 * i for i in range(2) for n in expected[order[i]]] for order in (keep, keep[::-1])]
        rows = local[0] + [(1 << 40) + n for n in local[1]]
        assert ds["logits"].row_space == "tokens"
        assert ds["logits"].rows.tolist() == rows
        assert_same_bits(ds["logits"].take(rows), torch.cat(given))
