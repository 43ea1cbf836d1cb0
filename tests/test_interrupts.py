"""An interrupt at any line of what a capture does in the model's thread: what is left is true, and it goes on."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupts import Interrupted, interrupt_at
from models import tiny_model
from transformers import DynamicCache, PreTrainedModel

import strapfmt
from strapfmt.reader import Reader
from strapfmt_capture.rings import Rings

PATIENCE_S = 20.0
SITES = ["embed", "blocks.0.resid_post", "blocks.0.mlp_out"]


class Script:
    """Passes whose tokens are all different, and what is known of each: its position and its embedding."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.n_tokens = 0
        self.positions: dict[int, int] = {}

    def run(self, cache: DynamicCache, n_sequences: int, n_query: int) -> None:
        n = n_sequences * n_query
        ids = torch.arange(self.n_tokens, self.n_tokens + n).reshape(n_sequences, n_query)
        self.n_tokens += n
        assert self.n_tokens <= self.model.config.vocab_size
        past = cache.get_seq_length()
        self.positions |= {token: past + place for row in ids.tolist() for place, token in enumerate(row)}
        with torch.no_grad():
            self.model(ids, past_key_values=cache)

    def cache(self, kind: str) -> DynamicCache:
        """A cache of two sequences, but for a new one, which is empty."""
        cache = DynamicCache(config=self.model.config)
        if kind != "new":
            self.run(cache, 2, 3)
        if kind == "copied":
            return copy.deepcopy(cache)
        if kind == "reordered":
            cache.reorder_cache(torch.tensor([0, 0]))
        return cache


@pytest.mark.parametrize(
    ("kind", "n_query"), [("new", 1), ("new", 3), ("grown", 1), ("grown", 3), ("copied", 1), ("reordered", 1)]
)
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_an_interrupt_at_any_line_of_a_pass(tmp_path: Path, kind: str, n_query: int, stride: int) -> None:
    model = tiny_model("llama", vocab_size=1 << 15)
    script = Script(model)
    n_clean, line, was_interrupted = 0, 0, True
    cap: Any = strapfmt.capture(model, tmp_path / "0.strap", sites=SITES, quiet=True, host_ring_bytes=1 << 20)
    with cap:
        while was_interrupted:
            line += stride
            cache = script.cache(kind)
            was_interrupted = interrupt_at(
                line, partial(script.run, cache, 2, n_query), within="/strapfmt_capture/"
            )
            script.run(cache, 2, 1)
            n_clean += 1 + (kind != "new")
    assert line > 300
    reader = Reader(tmp_path / "0.strap", verify="always")
    assert reader.report.is_clean
    steps = reader.steps.to_arrow().to_pylist()
    tokens = reader.tokens.to_arrow().to_pylist()
    by_row = {token["row"]: token for token in tokens}
    assert len(by_row) == len(tokens)
    assert len({step["step"] for step in steps}) == len(steps)
    assert Counter(token["step"] for token in tokens) == {step["step"]: step["n_rows"] for step in steps}
    sequences = {each["sequence_id"]: each for each in reader.sequences.to_arrow().to_pylist()}
    assert {token["sequence_id"] for token in tokens} == set(sequences)
    # Rows are those of the tokens that were given.
    assert all(script.positions[token["token_id"]] == token["position"] for token in tokens)
    for token in tokens:
        before = by_row.get(token["parent_row"])
        if token["position"]:
            assert before is not None
            assert before["position"] == token["position"] - 1
            sequence = sequences[token["sequence_id"]]
            is_fork = token["position"] == sequence["fork_position"]
            assert before["sequence_id"] == sequence["parent_sequence_id" if is_fork else "sequence_id"]
    # Complete steps are complete, and all that were not interrupted are so.
    complete = {step["step"] for step in steps if step["status"] == "complete"}
    rows = {token["row"] for token in tokens if token["step"] in complete}
    assert len(complete) >= n_clean
    for name in SITES:
        assert rows <= set(reader[name].rows.tolist()) <= set(by_row)
    embedded = model.get_input_embeddings().weight.detach()
    ids = [by_row[row]["token_id"] for row in reader["embed"].rows.tolist()]
    assert torch.equal(reader["embed"].tensor(), embedded[ids])
    # The account agrees.
    report = cap.report
    n_abandoned = sum(step["status"] == "abandoned" for step in steps)
    assert (report.n_steps, report.n_tokens, report.n_abandoned_steps) == (
        len(steps),
        len(tokens),
        n_abandoned,
    )
    for site in report.sites:
        assert site.expected == site.written + site.dropped
        assert site.written == reader[site.name].n_rows


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 11])
def test_a_key_whose_block_was_interrupted_is_not_done(tmp_path: Path, stride: int) -> None:
    model, path = tiny_model("llama", vocab_size=1 << 15), tmp_path / "0.strap"
    script = Script(model)
    line, was_interrupted, done = 0, True, set()
    with strapfmt.capture(model, path, sites=SITES, quiet=True, host_ring_bytes=1 << 20) as cap:
        while was_interrupted:
            line += stride
            with suppress(Interrupted), cap.tagged({"key": line}):
                was_interrupted = interrupt_at(
                    line, partial(script.run, script.cache("new"), 2, 3), within="/strapfmt_capture/"
                )
                if was_interrupted:
                    raise Interrupted
            script.run(script.cache("new"), 1, 2)
            if not was_interrupted:
                done.add(line)
    assert line > 300
    with strapfmt.capture(model, path, sites=SITES, quiet=True, mode="append") as cap:
        script.run(script.cache("new"), 1, 2)
        assert {key for key in range(1, line + 1) if cap.done(key)} == done != set()


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_an_interrupt_in_a_pass_that_is_dropped_leaves_an_account_that_balances(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    model = tiny_model("llama", vocab_size=1 << 15)
    script = Script(model)
    line, was_interrupted = 0, True
    with strapfmt.capture(model, tmp_path / "0.strap", sites=SITES, quiet=True, on_full="drop") as cap:
        script.run(script.cache("new"), 2, 3)
        monkeypatch.setattr(Rings, "fill", property(lambda _: 1.0))
        while was_interrupted:
            line += stride
            cache = script.cache("new")
            was_interrupted = interrupt_at(
                line, partial(script.run, cache, 2, 3), within="/strapfmt_capture/"
            )
            script.run(cache, 2, 1)
    assert line > 300
    tokens = Reader(tmp_path / "0.strap").tokens.to_arrow().to_pylist()
    n_dropped = sum(token["dropped"] for token in tokens)
    assert all(site.written == 6 < site.dropped for site in cap.report.sites)
    assert all(site.expected == site.written + site.dropped for site in cap.report.sites)
    assert max(site.dropped for site in cap.report.sites) <= n_dropped


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.parametrize("has_pass", [False, True])
def test_an_interrupt_at_any_line_of_tagged_leaves_no_block_open(
    tmp_path: Path, has_pass: bool, stride: int
) -> None:
    model = tiny_model("llama")
    ids = torch.arange(5, 9)[None]
    n_lines, line, was_interrupted = 0, 0, True
    cap: Any = strapfmt.capture(
        model, tmp_path / "0.strap", sites=SITES, quiet=True, commit_interval_s=0.0, tags={"run": 1}
    )

    def tag() -> None:
        with cap.tagged({"key": line}):
            if has_pass:
                trace = sys.gettrace()
                sys.settrace(None)  # lines of the pass are those of another test
                model(ids, use_cache=False)
                sys.settrace(trace)

    with cap, torch.no_grad():
        while was_interrupted:
            line += stride
            was_interrupted = interrupt_at(line, tag, within="/strapfmt_capture/")
            n_lines += was_interrupted
            model(ids, use_cache=False)
            until = time.monotonic() + PATIENCE_S
            while cap.stats.n_committed_steps < cap.stats.n_steps:
                assert time.monotonic() < until
                time.sleep(0.001)
        assert cap.done(line) == has_pass
    assert n_lines > 20 // stride
    with strapfmt.open(tmp_path / "0.strap", verify="always") as found:
        tags = [json.loads(text) for text in found.sequences.to_arrow(["tags"])["tags"].to_pylist()]
    plain = [each for each in tags if each == {"run": 1}]
    # One after each block, and of the passes in a block all have its key.
    assert len(plain) == n_lines + 1
    keys = [each["key"] for each in tags if each != {"run": 1}]
    assert keys == sorted(set(keys))
    assert (keys[-1:] == [line]) == has_pass
