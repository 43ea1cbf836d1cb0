"""What filters store is what a capture of everything stores, filtered here in plain Python, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import tiny_model, tiny_tokenizer
from transformers import DynamicCache, PreTrainedModel

import strapfmt
from strapfmt.errors import ArgumentError, CaptureError, SiteNeverFiredError
from strapfmt.reader import Reader
from strapfmt_capture.selection import TokenColumns

SITES = ["blocks.*.resid_post", "logits"]
IDS = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14], [15, 16, 17, 18, 19]])
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])

Run = Callable[[PreTrainedModel], object]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def padded(model: PreTrainedModel) -> None:
    model(input_ids=IDS, attention_mask=LEFT)
    model(input_ids=IDS.flip(1), attention_mask=LEFT.flip(1))  # padding on the right


def generated(model: PreTrainedModel) -> None:
    """Prefill computes the last logits only; decode follows."""
    model.generate(input_ids=IDS, attention_mask=LEFT, max_new_tokens=4, do_sample=False)


def beams(model: PreTrainedModel) -> None:
    model.generate(input_ids=IDS[:2], max_new_tokens=3, num_beams=2, do_sample=False)


def in_pieces(model: PreTrainedModel) -> None:
    cache = DynamicCache(config=model.config)
    for start in (0, 2, 4):
        model(input_ids=IDS[:, start : start + 2], past_key_values=cache)


def shrinking(model: PreTrainedModel) -> None:
    """A batch that loses its sequences one by one."""
    cache = DynamicCache(config=model.config)
    model(input_ids=IDS, past_key_values=cache)
    for kept in ([0, 2], [1]):
        cache.batch_select_indices(torch.tensor(kept))
        model(input_ids=torch.full((len(kept), 1), 20), past_key_values=cache)


def packed(model: PreTrainedModel) -> None:
    places = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3, 4]])
    model(input_ids=IDS[:2].reshape(1, 10), position_ids=places, use_cache=False)


def uncached(model: PreTrainedModel) -> None:
    model.generate(input_ids=IDS[:2], max_new_tokens=3, use_cache=False, do_sample=False)


def some_logits(model: PreTrainedModel) -> None:
    model(input_ids=IDS, attention_mask=LEFT, logits_to_keep=torch.tensor([4, 0, 2]))


RUNS: list[Run] = [padded, generated, beams, in_pieces, shrinking, packed, uncached, some_logits]


def captured(path: Path, model: torch.nn.Module, run: Callable[[Any], object], **options: Any) -> Reader:
    options = {"sites": SITES, "tokenizer": tiny_tokenizer(), "quiet": True, **options}
    with strapfmt.capture(model, path, **options) as cap:
        run(model)
    for site in cap.report.sites:
        assert site.expected == site.written + site.dropped
    assert cap.report.n_filtered == sum(site.filtered for site in cap.report.sites)
    return Reader(path)


def expected_rows(tokens: list[dict[str, Any]], asked: dict[str, Any]) -> list[int]:
    """The rows that a selection leaves, one token after another."""
    phases = asked.get("phases", ("prefill", "decode"))
    positions = {"last": [-1]}.get(str(asked.get("positions")), asked.get("positions", slice(None)))
    rows: list[int] = []
    n_passes = 0
    for step in sorted({token["step"] for token in tokens}):
        of_step = [token for token in tokens if token["step"] == step]
        left = []
        for token in of_step:
            n = 1 + max(t["position"] for t in of_step if t["sequence_id"] == token["sequence_id"])
            places = list(range(n))
            if isinstance(positions, slice):
                is_at = token["position"] in places[positions]
            else:
                is_at = token["position"] in [places[p] for p in positions if -n <= p < n]
            if token["phase"] in phases and is_at and asked.get("told", lambda _: True)(token):
                left.append(token["row"])
        if left:
            n_passes += 1
            if n_passes % asked.get("every", 1) == 1 % asked.get("every", 1):
                rows += left
    return rows[: asked.get("max_rows")]


def assert_selected(everything: Reader, found: Reader, asked: dict[str, Any]) -> None:
    tokens = everything.tokens.to_arrow().to_pylist()
    assert found.tokens.to_arrow().to_pylist() == tokens
    wanted = expected_rows(tokens, asked)
    for name in everything.names:
        rows = [row for row in everything[name].rows.tolist() if row in set(wanted)]
        assert found[name].rows.tolist() == rows
        if rows:
            assert torch.equal(found[name].tensor(), everything[name].take(rows))
    (outcome,) = [session["outcome"] for session in sessions(found.path)]
    filtered = {
        name: len(everything[name].rows) - len(found[name].rows)
        for name in everything.names
        if len(everything[name].rows) > len(found[name].rows)
    }
    assert outcome.get("filtered_rows", {}) == filtered


def sessions(path: Path) -> list[dict[str, Any]]:
    return json.loads((Path(path) / "rank-00000" / "manifest.json").read_text())["sessions"]


def told_and_where(name: str) -> dict[str, Any]:
    """A predicate for the capture, and the same for one token as the table has it."""
    pairs: dict[str, tuple[Callable[[TokenColumns], Any], Callable[[dict[str, Any]], bool]]] = {
        "even": (lambda t: t.token_id % 2 == 0, lambda t: t["token_id"] % 2 == 0),
        "late": (lambda t: t.position >= 2, lambda t: t["position"] >= 2),
        "slot": (lambda t: t.batch_index == 1, lambda t: t["batch_index"] == 1),
        "text": (lambda t: t.token == "b", lambda t: t["token"] == "b"),
        "plain": (lambda t: ~t.is_special, lambda t: not t["is_special"]),
        "sequence": (lambda t: t.sequence_id != 1, lambda t: t["sequence_id"] != 1),
        "none": (lambda t: np.zeros(len(t), bool), lambda t: False),
        "tensor": (lambda t: torch.from_numpy(t.row.copy()) % 3 > 0, lambda t: t["row"] % 3 > 0),
    }
    where, told = pairs[name]
    return {"where": where, "told": told}


SELECTIONS: list[dict[str, Any]] = [
    {"phases": ["prefill"]},
    {"phases": ["decode"]},
    {"every": 2},
    {"positions": "last"},
    {"positions": [0, 3, -2]},
    {"positions": slice(1, 3)},
    {"positions": slice(-3, None, 2)},
    {"positions": slice(None, -1)},
    {"max_rows": 4},
    {"max_rows": 10**6},
    *(
        {**told_and_where(name)}
        for name in ("even", "late", "slot", "text", "plain", "sequence", "none", "tensor")
    ),
    {"phases": ["decode"], "every": 2, "max_rows": 3},
]


def asked_for(selection: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in selection.items() if name != "told"}


@pytest.mark.parametrize("run", RUNS)
def test_a_selection_stores_what_filtering_everything_would(
    run: Run, model: PreTrainedModel, tmp_path: Path
) -> None:
    everything = captured(tmp_path / "all.strap", model, run)
    for number, selection in enumerate(SELECTIONS):
        found = captured(tmp_path / f"{number}.strap", model, run, **asked_for(selection))
        assert_selected(everything, found, selection)


_ENDS = st.none() | st.integers(-7, 7)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    run=st.sampled_from(RUNS),
    phases=st.sampled_from([["prefill"], ["decode"], ["prefill", "decode"]]),
    every=st.integers(1, 3),
    positions=st.builds(slice, _ENDS, _ENDS, st.none() | st.integers(1, 3))
    | st.lists(st.integers(-7, 7), min_size=1, max_size=3),
    max_rows=st.none() | st.integers(1, 12),
    where=st.sampled_from(["even", "late", "slot", "plain"]),
    ring_bytes=st.sampled_from([2048, 1 << 20]),
)
def test_selections_combine(
    run: Run,
    phases: list[str],
    every: int,
    positions: Any,
    max_rows: int | None,
    where: str,
    ring_bytes: int,
    model: PreTrainedModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("combined")
    selection = {"phases": phases, "every": every, "positions": positions, **told_and_where(where)}
    selection |= {} if max_rows is None else {"max_rows": max_rows}
    everything = captured(folder / "all.strap", model, run)
    found = captured(folder / "some.strap", model, run, host_ring_bytes=ring_bytes, **asked_for(selection))
    assert_selected(everything, found, selection)


@pytest.mark.parametrize(("asked", "n"), [({"max_rows": 15}, 15), ({"max_rows": 5}, 5), ({"every": 2}, 12)])
def test_of_logits_alone_no_token_counts_that_has_none(
    asked: dict[str, Any], n: int, model: PreTrainedModel, tmp_path: Path
) -> None:
    def run() -> None:
        for _ in range(2):
            generated(model)

    with strapfmt.capture(model, tmp_path / "all.strap", sites="logits", quiet=True):
        run()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="logits", quiet=True, **asked) as cap:
        run()
    everything, found = Reader(tmp_path / "all.strap")["logits"], Reader(tmp_path / "x.strap")["logits"]
    assert len(everything) == 2 * 4 * 3
    kept = np.arange(24)[:n] if "max_rows" in asked else np.flatnonzero(np.arange(24) // 3 % 2 == 0)
    assert found.rows.tolist() == everything.rows[kept].tolist()
    assert torch.equal(found.tensor(), everything.tensor()[torch.from_numpy(kept)])
    assert (cap.report.sites[0].expected, cap.report.sites[0].filtered) == (n, 24 - n)
    assert any("max_rows was reached" in note for note in cap.report.notes) == ("max_rows" in asked)


def test_beside_other_sites_logits_have_rows_of_the_same_tokens(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    with strapfmt.capture(model, tmp_path / "x.strap", sites=SITES, quiet=True, max_rows=12):
        generated(model)
    found = Reader(tmp_path / "x.strap")
    assert found["blocks.0.resid_post"].rows.tolist() == list(range(12))
    last = [2, 7, 8]  # of prompts of 3, 5 and 1 tokens
    assert found["logits"].rows.tolist() == [*last, 9, 10, 11]


@pytest.mark.parametrize(("stack", "first"), [("encoder", 0), ("decoder", 15)])
def test_tokens_of_the_other_stack_do_not_count(stack: str, first: int, tmp_path: Path) -> None:
    t5 = tiny_model("t5")
    site = f"{stack}.blocks.0.resid_post"
    with strapfmt.capture(t5, tmp_path / "x.strap", sites=site, quiet=True, max_rows=4):
        t5.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert Reader(tmp_path / "x.strap")[site].rows.tolist() == list(range(first, first + 4))


def test_attention_patterns_are_selected(tmp_path: Path) -> None:
    model = tiny_model("llama", attn_implementation="eager")
    sites = ["blocks.0.attn_pattern", "blocks.0.resid_post"]
    everything = captured(tmp_path / "all.strap", model, generated, sites=sites)
    found = captured(tmp_path / "x.strap", model, generated, sites=sites, positions="last", every=2)
    wanted = expected_rows(everything.tokens.to_arrow().to_pylist(), {"positions": "last", "every": 2})
    columns = ["row", "activation", "shape"]
    rows = everything["blocks.0.attn_pattern"].to_arrow(columns).to_pylist()
    assert found["blocks.0.attn_pattern"].to_arrow(columns).to_pylist() == [
        row for row in rows if row["row"] in wanted
    ]
    assert found["blocks.0.resid_post"].rows.tolist() == wanted


def test_flattened_tokens_are_selected(tmp_path: Path) -> None:
    """OPT gives its second linear layer one row a token, without the batch."""
    model = tiny_model("opt")
    sites = ["blocks.0.mlp_out", "model.decoder.layers.1.fc1"]
    everything = captured(tmp_path / "all.strap", model, padded, sites=sites)
    found = captured(tmp_path / "x.strap", model, padded, sites=sites, positions=[1, -1])
    assert_selected(everything, found, {"positions": [1, -1]})


def test_all_columns_reach_the_predicate_and_cannot_be_written_to(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    seen: list[TokenColumns] = []

    def where(tokens: TokenColumns) -> Any:
        seen.append(tokens)
        return np.ones(len(tokens), bool)

    found = captured(tmp_path / "x.strap", model, generated, where=where)
    table = found.tokens.to_arrow().to_pylist()
    assert [tokens.phase for tokens in seen] == ["prefill"] + 3 * ["decode"]
    names = ("row", "sequence_id", "position", "batch_index", "token_id", "token", "is_special")
    for name in names:
        assert [x for tokens in seen for x in getattr(tokens, name).tolist()] == [t[name] for t in table]
        with pytest.raises(ValueError, match="read-only"):
            getattr(seen[0], name)[:] = 0


def test_what_a_pass_does_not_tell_is_none(model: PreTrainedModel, tmp_path: Path) -> None:
    seen: list[TokenColumns] = []

    def where(tokens: TokenColumns) -> Any:
        seen.append(tokens)
        return tokens.position == 0

    def run(model: PreTrainedModel) -> None:
        model(inputs_embeds=torch.randn(2, 3, 32))

    found = captured(tmp_path / "x.strap", model, run, where=where, tokenizer=None)
    assert (seen[0].token_id, seen[0].token, seen[0].is_special) == (None, None, None)
    assert found["logits"].rows.tolist() == [0, 3]


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (lambda t: t.nothing, r"the function raised AttributeError: .*nothing"),
        (lambda t: True, r"expected bool \[9\].*got bool \[\]"),
        (lambda t: t.position, r"expected bool \[9\].*got int32 \[9\]"),
        (lambda t: [True], r"expected bool \[9\].*got bool \[1\]"),
        (lambda t: None, r"expected bool \[9\].*got object"),
        (lambda t: t.position.fill(0), r"raised ValueError: .*read-only"),
    ],
)
def test_a_predicate_that_fails_is_told_and_its_pass_is_abandoned(
    where: Any, said: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    path, failing = tmp_path / "x.strap", iter([where])

    def fails_once(tokens: TokenColumns) -> Any:
        return next(failing, lambda tokens: tokens.position >= 0)(tokens)

    with strapfmt.capture(model, path, sites=SITES, where=fails_once, quiet=True):
        with pytest.raises(CaptureError, match=said):
            model(input_ids=IDS, attention_mask=LEFT)
        model(input_ids=IDS, attention_mask=LEFT)
    reader = Reader(path)
    assert reader.steps.to_arrow(["status"])["status"].to_pylist() == ["abandoned", "complete"]
    assert reader["logits"].rows.tolist() == list(range(9, 18))


def test_a_predicate_that_fails_beside_the_model_leaves_the_models_error(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    path = tmp_path / "x.strap"
    cap = strapfmt.capture(model, path, sites="logits", where=lambda tokens: None, quiet=True).__enter__()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    with pytest.raises(CaptureError, match="where: expected bool"):
        model(input_ids=IDS)
    with pytest.raises(SiteNeverFiredError):
        cap.__exit__(None, None, None)
    steps = Reader(path).steps.to_arrow(["status", "reason"]).to_pylist()
    assert [step["status"] for step in steps] == ["abandoned", "abandoned"]
    assert [step["reason"].split(":")[0] for step in steps] == ["IndexError", "CaptureError"]


def test_sites_with_rows_of_their_own(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
    batches = torch.randn(5, 6, 4)

    def run(network: torch.nn.Module) -> None:
        for batch in batches:
            network(batch)

    found = captured(
        tmp_path / "x.strap", network, run, sites=["0", "1"], every=2, max_rows=15, tokenizer=None
    )
    expected = network(batches[[0, 2, 4]].reshape(18, 4))[:15]
    assert torch.allclose(found["1"].tensor(), expected, atol=1e-6)
    assert len(found["0"]) == 15
    assert sessions(tmp_path / "x.strap")[0]["outcome"]["filtered_rows"] == {"0": 15, "1": 15}
    found = captured(tmp_path / "y.strap", network, run, sites="1", phases="decode", tokenizer=None)
    assert len(found["1"]) == 0  # a model without tokens never decodes


@pytest.mark.parametrize("options", [{"positions": "last"}, {"where": lambda t: t.position == 0}])
def test_choosing_tokens_of_a_site_that_has_none_is_refused(options: Any, tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(4, 8))
    with (
        pytest.raises(CaptureError, match=f"site '0' at 0:out: .*{next(iter(options))}= cannot choose"),
        strapfmt.capture(network, tmp_path / "x.strap", sites="0", quiet=True, **options),
    ):
        network(torch.randn(2, 4))


def test_a_pass_that_is_not_wanted_is_not_dropped(model: PreTrainedModel, tmp_path: Path) -> None:
    """The ring is full in every pass; only those of which something is wanted lose anything."""
    path = tmp_path / "x.strap"
    with strapfmt.capture(
        model, path, sites=SITES, phases="prefill", positions="last", on_full="drop", max_rows=9, quiet=True
    ) as cap:
        cap._engine.hooks.steps._rings = _FullRings(cap._engine.rings)
        generated(model)
    report = cap.report
    assert (report.n_steps, report.n_dropped_steps) == (4, 1)
    assert [(site.expected, site.dropped, site.written) for site in report.sites] == [(3, 3, 0)] * 3
    tokens = Reader(path).tokens.to_arrow(["dropped", "position", "phase", "sequence_id"]).to_pylist()
    lengths = {0: 3, 1: 5, 2: 1}
    for token in tokens:
        is_last = token["phase"] == "prefill" and token["position"] == lengths[token["sequence_id"]] - 1
        assert token["dropped"] is is_last


class _FullRings:
    """Rings that say they are full."""

    def __init__(self, rings: Any) -> None:
        self._rings = rings

    def __getattr__(self, name: str) -> Any:
        return 1.0 if name == "fill" else getattr(self._rings, name)


def test_rows_that_were_dropped_do_not_count_towards_max_rows(model: PreTrainedModel, tmp_path: Path) -> None:
    with strapfmt.capture(
        model, tmp_path / "x.strap", sites=SITES, max_rows=4, on_full="drop", quiet=True
    ) as cap:
        steps = cap._engine.hooks.steps
        rings, steps._rings = steps._rings, _FullRings(cap._engine.rings)
        model(input_ids=IDS[:1])
        steps._rings = rings
        model(input_ids=IDS[1:2])
    assert Reader(tmp_path / "x.strap")["logits"].rows.tolist() == [5, 6, 7, 8]
    assert [(site.written, site.dropped, site.filtered) for site in cap.report.sites] == [(4, 4, 2)] * 3
    assert any("max_rows was reached" in note for note in cap.report.notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"phases": "read"}, 'phases: expected some of "prefill", "decode" and "encode", got \'read\''),
        ({"phases": []}, "phases: expected"),
        ({"phases": 3}, "phases: expected"),
        ({"every": 0}, "every: expected a whole number of at least 1, got 0"),
        ({"every": True}, "every: expected"),
        ({"positions": "first"}, "positions: expected a slice, whole numbers, or \"last\"; got 'first'"),
        ({"positions": []}, "positions: expected a slice or whole numbers, got none"),
        ({"positions": [1.5]}, "positions: expected a whole number, got 1.5"),
        ({"positions": [True]}, "positions: expected a whole number"),
        ({"positions": True}, "positions: expected a whole number"),
        ({"positions": slice(0, 9, -1)}, "positions: step of a slice: expected a whole number of at least 1"),
        ({"positions": slice("a", None)}, "positions: expected a whole number, got 'a'"),
        ({"positions": {0: 1}}, "positions: expected a whole number"),
        ({"max_rows": 0}, "max_rows: expected a whole number of at least 1, got 0"),
        ({"where": "position > 3"}, "where: expected a function .*got 'position > 3'"),
    ],
)
def test_wrong_options_are_refused_before_anything_happens(
    options: dict[str, Any], said: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=said):
        strapfmt.capture(model, tmp_path / "x.strap", sites=SITES, **options)
    assert not (tmp_path / "x.strap").exists()


def test_the_manifest_says_what_was_asked_for(model: PreTrainedModel, tmp_path: Path) -> None:
    def is_first(tokens: TokenColumns) -> Any:
        return tokens.position == 0

    options = {
        "phases": "prefill",
        "every": 3,
        "positions": slice(0, None, 2),
        "max_rows": 7,
        "where": is_first,
    }
    captured(tmp_path / "x.strap", model, padded, **options)
    found = sessions(tmp_path / "x.strap")[0]["options"]
    assert {name: found[name] for name in options} == {
        "phases": ["prefill"],
        "every": 3,
        "positions": {"start": 0, "stop": None, "step": 2},
        "max_rows": 7,
        "where": is_first.__qualname__,
    }
    captured(tmp_path / "y.strap", model, padded, positions=np.array([-1]))
    found = sessions(tmp_path / "y.strap")[0]["options"]
    assert (found["positions"], "every" in found) == ([-1], False)


def test_the_report_tells_what_was_left_out(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites=SITES, positions="last", quiet=True) as cap:
        model(input_ids=IDS, attention_mask=LEFT)
    report = cap.report
    assert (report.n_rows, report.n_filtered, report.n_tokens) == (9, 18, 9)
    assert report.to_dict()["n_filtered"] == 18
    assert "18 not asked for" in report.summary()
    assert str(report).splitlines()[1].split() == [
        *("site", "shape", "dtype", "expected", "written", "dropped", "filtered")
    ]


@pytest.mark.parametrize(
    ("family", "sites"),
    [
        ("qwen3_moe", ["blocks.*.router_logits", "blocks.0.expert_*", "logits.top_*"]),
        ("mixtral", ["blocks.1.expert_out", "blocks.*.mlp_out", "logits"]),
        ("mamba", ["blocks.*.ssm_state", "blocks.*.mixer_out", "logits"]),
    ],
)
def test_values_that_no_module_returns_are_selected(family: str, sites: list[str], tmp_path: Path) -> None:
    model, selection = tiny_model(family), {"positions": [0, -1], **told_and_where("even")}
    everything = captured(tmp_path / "all.strap", model, generated, sites=sites, top_k_logits=3)
    found = captured(
        tmp_path / "x.strap", model, generated, sites=sites, top_k_logits=3, **asked_for(selection)
    )
    assert_selected(everything, found, selection)


def test_filters_that_leave_no_row_are_told(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(model, tmp_path / "x.strap", sites="embed", phases="decode", quiet=True) as cap:
        model(input_ids=IDS)
        assert "not asked for, which is all of them" in cap.report.summary()
    assert "0 rows of 1 sites" in cap.report.summary()
    with strapfmt.capture(model, tmp_path / "y.strap", sites="embed", positions=-1, quiet=True) as cap:
        model(input_ids=IDS)
        assert "which is all of them" not in cap.report.summary()
