"""Channels: the elements of a row that were asked for, in their order, with statistics of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model
from stored import statistics_of
from transformers import PreTrainedModel

import strapfmt
from strapfmt.errors import ArgumentError, CaptureError
from strapfmt.reader import Reader

SITES = ["blocks.*.resid_post", "model.layers.0.mlp.down_proj:in", "logits"]
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 10, 11, 12, 13]])
MASK = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def captured(path: Path, model: torch.nn.Module, **options: Any) -> Reader:
    with strapfmt.capture(model, path, **{"sites": SITES, "quiet": True, **options}):
        model(input_ids=IDS, attention_mask=MASK)
        model(input_ids=IDS[:1])
    return Reader(path)


@pytest.mark.parametrize(
    "index", [[3], [7, 0, 12], [-1, 2, -32], slice(4, 9), slice(None, None, 5), slice(-3, None), range(2, 30)]
)
@pytest.mark.parametrize("rows", [{}, {"positions": [0, -1]}])
@pytest.mark.parametrize("ring_bytes", [2048, 1 << 20])
def test_channels_are_those_of_the_whole_rows(
    index: Any, rows: dict[str, Any], ring_bytes: int, model: PreTrainedModel, tmp_path: Path
) -> None:
    everything = captured(tmp_path / "all.strap", model, **rows)
    found = captured(tmp_path / "x.strap", model, channels=index, host_ring_bytes=ring_bytes, **rows)
    for name in everything.names:
        whole = everything[name].tensor()
        numbers = list(range(whole.shape[1]))[index] if isinstance(index, slice) else list(index)
        expected = torch.stack([whole[:, number] for number in numbers], dim=1)
        assert found[name].rows.tolist() == everything[name].rows.tolist()
        assert found[name].shape == (len(numbers),)
        assert torch.equal(found[name].tensor(), expected)
        stored = found[name].to_arrow(["l2_norm", "n_nonfinite"])
        figures = statistics_of(expected)
        assert stored["l2_norm"].to_numpy() == pytest.approx(figures["l2_norm"], rel=1e-6)


def test_channels_by_site_the_first_name_that_matches_counts(model: PreTrainedModel, tmp_path: Path) -> None:
    named = {"blocks.1.resid_post": [1, 2], "blocks.*.resid_post": slice(0, 5), "logits": [100]}
    found = captured(tmp_path / "x.strap", model, channels=named)
    shapes = {name: found[name].shape for name in found.names}
    assert shapes == {
        "blocks.0.resid_post": (5,),
        "blocks.1.resid_post": (2,),
        "model.layers.0.mlp.down_proj:in": (48,),
        "logits": (1,),
    }
    manifest = json.loads((tmp_path / "x.strap/rank-00000/manifest.json").read_text())
    assert manifest["sessions"][0]["options"]["channels"] == {
        "blocks.0.resid_post": {"start": 0, "stop": 5, "step": None},
        "blocks.1.resid_post": [1, 2],
        "logits": [100],
    }


@pytest.mark.parametrize("width", [90, 128])
def test_channels_of_logits_are_those_of_the_head_whatever_the_vocabulary_is(
    width: int, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.set_output_embeddings(torch.nn.Linear(32, width, bias=False))
    assert model.config.vocab_size == 101
    assert next(info.shape for info in strapfmt.sites(model) if info.site == "logits") == (width,)
    options: dict[str, Any] = {"sites": ["logits", "blocks.0.resid_post"], "quiet": True}
    for channels in ([width], [-width - 1], slice(width, None)):
        with pytest.raises(ArgumentError, match=rf"'logits': .*expected some of the {width} elements"):
            strapfmt.capture(model, tmp_path / "x.strap", channels={"logits": channels}, **options)
    assert list(tmp_path.iterdir()) == []
    everything = captured(tmp_path / "all.strap", model)["logits"].tensor()
    found = captured(tmp_path / "x.strap", model, channels={"logits": [width - 1]})["logits"].tensor()
    assert torch.equal(found, everything[:, -1:])


def test_channels_of_heads_are_within_each_head(tmp_path: Path) -> None:
    """Queries are [n_sequences, heads, n_query, width] where a norm runs before they are transposed."""
    model = tiny_model("qwen3")
    site = "model.layers.0.self_attn.q_norm"
    everything = captured(tmp_path / "all.strap", model, sites=site)
    found = captured(tmp_path / "x.strap", model, sites=site, channels=[5, 1])
    assert found[site].shape == (4, 2)
    assert torch.equal(found[site].tensor(), everything[site].tensor()[:, :, [5, 1]])


def test_channels_of_rows_of_their_own(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8))
    x = torch.randn(2, 3, 4)
    with strapfmt.capture(network, tmp_path / "x.strap", sites="0", channels=[6, 2], quiet=True):
        network(x)
    assert torch.equal(Reader(tmp_path / "x.strap")["0"].tensor(), network(x).reshape(6, 8)[:, [6, 2]])


@pytest.mark.parametrize(
    ("channels", "said"),
    [
        ([], "channels: expected a slice or whole numbers, got none"),
        ([0.5], "channels: expected a whole number, got 0.5"),
        ("all", "channels: expected a whole number, got 'all'"),
        (slice(5, 0, -1), "channels: step of a slice"),
        ([3, 3], r"channels: expected each once, got \[3, 3\]"),
        (
            {"blocks.7.*": [0]},
            r"channels: expected names of sites of this capture \(blocks.0.resid_post, .*7",
        ),
        ({0: [0]}, "channels: expected names of sites of this capture"),
        ({"logits": None}, "channels: expected a whole number, got None"),
    ],
)
def test_wrong_channels_are_refused(channels: Any, said: str, model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=said):
        strapfmt.capture(model, tmp_path / "x.strap", sites=SITES, channels=channels)
    assert not (tmp_path / "x.strap").exists()


@pytest.mark.parametrize("channels", [[32], [-33], slice(32, None), [31, -1]])
def test_channels_that_a_site_does_not_have_are_refused(
    channels: Any, model: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=r"blocks.0.resid_post.*expected some of the 32 elements"):
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.resid_post", channels=channels)
    assert not (tmp_path / "x.strap").exists()


def test_rows_that_are_one_number_have_no_channels(tmp_path: Path) -> None:
    class Scores(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.inner(input_ids)

        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Hardtanh()

    model = Scores()
    with (
        pytest.raises(CaptureError, match=r"some of the 0 elements of the last dimension of a row, \[\]"),
        strapfmt.capture(model, tmp_path / "x.strap", sites="inner", channels=slice(0, 2), quiet=True),
    ):
        model(IDS)


def test_attention_patterns_have_no_channels(tmp_path: Path) -> None:
    model = tiny_model("llama", attn_implementation="eager")
    with pytest.raises(ArgumentError, match=r"blocks.0.attn_pattern.*as many elements as there are keys"):
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.*", channels=[0])


def test_other_channels_are_not_appended(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    captured(path, model, channels=[1, 2])
    for other in ([2, 1], None, slice(0, 2), {"blocks.0.resid_post": [1, 2]}):
        with pytest.raises(ArgumentError, match=r"channels: the dataset has .*1, 2"):
            strapfmt.capture(model, path, sites=SITES, channels=other, mode="append")
    assert len(captured(path, model, channels=[1, 2], mode="append")["logits"]) == 28


def test_an_estimate_counts_the_channels(model: PreTrainedModel, tmp_path: Path) -> None:
    whole = strapfmt.capture(model, tmp_path / "x.strap", sites="logits", stats=False).estimate(100)
    some = strapfmt.capture(
        model, tmp_path / "x.strap", sites="logits", stats=False, channels=slice(0, 11)
    ).estimate(100)
    assert whole.n_bytes - some.n_bytes == 100 * 4 * (101 - 11)
