"""Which tokens a forward pass is about, when it is one, and what became of its sites."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model, tiny_tokenizer
from torch._subclasses.fake_tensor import FakeTensorMode

import strapfmt
from strapfmt.errors import CaptureError
from strapfmt.reader import Reader
from strapfmt_capture import calls

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


class Around(torch.nn.Module):
    """A module around a language model, that calls it in a way of its own."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.lm = tiny_model("llama")
        self.value = torch.nn.Linear(32, 1)
        self._call = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self, *args, **kwargs)


def token_ids(path: Path) -> list[int | None]:
    return Reader(path).tokens.to_arrow(["token_id"])["token_id"].to_pylist()


def captured(tmp_path: Path, model: torch.nn.Module, sites: str | list[str], *calls: Any) -> Path:
    """Capture calls of a model, each given as its keyword arguments."""
    path = tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites=sites, quiet=True):
        for inputs in calls:
            model(**inputs)
    return path


def test_tokens_are_those_that_the_model_inside_a_wrapper_is_given(tmp_path: Path) -> None:
    def shifted(self: Around, input_ids: torch.Tensor) -> Any:
        return self.lm(torch.cat([torch.ones_like(input_ids[:, :1]), input_ids[:, :-1]], 1))

    model = Around(shifted)
    path = captured(tmp_path, model, "embed", {"input_ids": IDS})
    assert token_ids(path) == [1, 5, 6, 7, 1, 9, 10, 11]
    assert torch.equal(Reader(path)["embed"].tensor(), model.lm.model.embed_tokens.weight[token_ids(path)])


@pytest.mark.parametrize(
    "call",
    [
        lambda self, x, mask: self.lm(x, attention_mask=mask),
        lambda self, x, mask: self.lm(input_ids=x, attention_mask=mask).logits,
        lambda self, x, mask: self.lm(input_ids=x, attention_mask=mask),
    ],
)
def test_a_wrapper_may_call_its_tokens_as_it_likes(tmp_path: Path, call: Callable[..., Any]) -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    path = captured(tmp_path, Around(call), "blocks.1.resid_post", {"x": IDS, "mask": mask})
    assert token_ids(path) == [7, 8, 9, 10, 11, 12]
    site = Reader(path)["blocks.1.resid_post"]
    assert (site.row_space, site.rows.tolist()) == ("tokens", list(range(6)))


def test_soft_prompts_are_rows_without_a_token(tmp_path: Path) -> None:
    def prompted(self: Around, input_ids: torch.Tensor) -> Any:
        embedded = self.lm.get_input_embeddings()(input_ids)
        return self.lm(inputs_embeds=torch.cat([torch.zeros(len(input_ids), 3, 32), embedded], 1))

    path = captured(tmp_path, Around(prompted), "blocks.0.resid_post", {"input_ids": IDS})
    assert token_ids(path) == [None] * 14
    assert Reader(path)["blocks.0.resid_post"].rows.tolist() == list(range(14))


def test_embeddings_of_the_tokens_themselves_keep_their_ids(tmp_path: Path) -> None:
    def embedded(self: Around, input_ids: torch.Tensor) -> Any:
        return self.lm(inputs_embeds=self.lm.get_input_embeddings()(input_ids))

    path = captured(tmp_path, Around(embedded), "blocks.0.resid_post", {"input_ids": IDS})
    assert token_ids(path) == IDS.flatten().tolist()


def test_a_cache_that_a_wrapper_keeps_is_followed(tmp_path: Path) -> None:
    def remembers(self: Around, input_ids: torch.Tensor) -> Any:
        output = self.lm(input_ids, past_key_values=getattr(self, "cache", None))
        self.cache = output.past_key_values
        return output

    calls = [{"input_ids": IDS[:, i : i + 1]} for i in range(4)]
    path = captured(tmp_path, Around(remembers), "blocks.0.resid_post", *calls)
    table = Reader(path).tokens.to_arrow(["sequence_id", "position"]).to_pylist()
    assert [(row["sequence_id"], row["position"]) for row in table] == [
        (s, p) for p in range(4) for s in range(2)
    ]


def test_modules_of_the_wrapper_belong_to_the_same_step(tmp_path: Path) -> None:
    def valued(self: Around, input_ids: torch.Tensor) -> Any:
        return self.value(self.lm(input_ids, output_hidden_states=True).hidden_states[-1])

    path = captured(tmp_path, Around(valued), ["value", "blocks.0.resid_post"], {"input_ids": IDS})
    with strapfmt.open(path) as ds:
        assert ds["value"].rows.tolist() == ds["blocks.0.resid_post"].rows.tolist() == list(range(8))
        assert len(ds.steps) == 1


def test_a_model_that_is_called_again_makes_another_step(tmp_path: Path) -> None:
    def twice(self: Around, input_ids: torch.Tensor) -> Any:
        return self.value(self.lm(input_ids).logits[..., :32]), self.lm(input_ids[:1]).logits

    path = captured(tmp_path, Around(twice), ["value", "blocks.0.resid_post"], {"input_ids": IDS})
    with strapfmt.open(path) as ds:
        assert token_ids(path) == [*IDS.flatten().tolist(), *IDS[0].tolist()]
        assert ds["blocks.0.resid_post"].rows.tolist() == list(range(12))
        assert ds["value"].rows.tolist() == list(range(8))
        assert [step["status"] for step in ds.steps.to_arrow().to_pylist()] == ["complete"] * 2


def test_another_model_inside_has_no_steps(tmp_path: Path) -> None:
    def drafted(self: Around, input_ids: torch.Tensor) -> Any:
        self.draft(input_ids[:, :2])
        return self.lm(input_ids)

    model = Around(drafted)
    model.draft = tiny_model("gpt2")
    path = captured(tmp_path, model, "lm.model.layers.0", {"input_ids": IDS})
    assert token_ids(path) == IDS.flatten().tolist()
    assert len(Reader(path).steps) == 1


def test_other_tokens_after_a_site_has_fired_are_refused(tmp_path: Path) -> None:
    def late(self: Around, input_ids: torch.Tensor) -> Any:
        self.value(torch.zeros(*input_ids.shape, 32))
        return self.lm(input_ids[:, 1:])

    with pytest.raises(CaptureError, match="given other tokens than the call around it"):
        captured(tmp_path, Around(late), ["value", "blocks.0.resid_post"], {"input_ids": IDS})


def test_a_uniform_site_is_never_silently_rows_of_its_own(tmp_path: Path) -> None:
    def headed(self: Around, input_ids: torch.Tensor) -> Any:
        return self.lm.lm_head(self.lm.model(input_ids)[0][:, :2])

    said = r"site 'logits' at lm\.lm_head:out: expected one row a token, \[2, 4, \*\]; found \[2, 2, 101\]"
    with pytest.raises(CaptureError, match=said):
        captured(tmp_path, Around(headed), "logits", {"input_ids": IDS})
    (tmp_path / "own").mkdir()
    path = captured(tmp_path / "own", Around(headed), "lm.lm_head", {"input_ids": IDS})
    assert Reader(path)["lm.lm_head"].row_space == "own"


@pytest.mark.parametrize(
    ("kept", "rows"), [(slice(0, 2), [0, 1, 4, 5]), ([0, 2], [0, 2, 4, 6]), (2, [2, 3, 6, 7]), (0, range(8))]
)
def test_kept_logits_are_rows_of_the_positions_that_were_asked_for(
    tmp_path: Path, kept: Any, rows: list[int]
) -> None:
    path = captured(tmp_path, tiny_model("llama"), "logits", {"input_ids": IDS, "logits_to_keep": kept})
    assert Reader(path)["logits"].rows.tolist() == list(rows)


@pytest.mark.parametrize("min_free_bytes", [None, 0])
def test_kept_positions_are_asked_of_the_device_once_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, min_free_bytes: int | None
) -> None:
    asked: list[int] = []
    positions_of = calls.positions_of
    monkeypatch.setattr(calls, "positions_of", lambda *given: (asked.append(0), positions_of(*given))[1])
    model, path = tiny_model("llama"), tmp_path / "x.strap"
    options: dict[str, Any] = {
        "where": lambda tokens: tokens.position > 0,
        "min_free_bytes": min_free_bytes,
    }
    with strapfmt.capture(model, path, sites="logits", quiet=True, **options):
        for kept in ([1, 2], [0, 2], [0, 3]):
            model(IDS, logits_to_keep=torch.tensor(kept))
    assert len(asked) == 3
    assert Reader(path)["logits"].rows.tolist() == [1, 2, 5, 6, 10, 14, 19, 23]


def test_prompts_that_are_others_and_a_token_stay_apart(tmp_path: Path) -> None:
    texts = ["cat", "cats", "cat "]
    tokenizer, model, path = tiny_tokenizer(), tiny_model("llama"), tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="embed", tokenizer=tokenizer, quiet=True):
        for text in texts:
            model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
    assert Reader(path).sequences.to_arrow(["prompt"])["prompt"].to_pylist() == texts


class Headed(torch.nn.Module):
    """Gives values with heads before tokens, as the query norm of some models does."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = torch.nn.Identity()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        n, q = input_ids.shape
        values = (100 * input_ids[:, None, :, None] + torch.arange(4)[:, None, None]).float()
        return self.heads(values.expand(n, 4, q, 3))


def test_heads_before_tokens_are_rows_of_tokens(tmp_path: Path) -> None:
    path = captured(tmp_path, Headed(), "heads", {"input_ids": IDS[:, :3]}, {"input_ids": IDS})
    site = Reader(path)["heads"]
    assert (site.shape, site.row_space) == ((4, 3), "tokens")
    ids = torch.tensor(token_ids(path))
    assert torch.equal(site.tensor()[..., 0], (100 * ids[:, None] + torch.arange(4)).float())


def test_as_many_heads_as_tokens_at_first_are_refused_and_not_guessed(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="tokens and heads cannot be told apart"):
        captured(tmp_path, Headed(), "heads", {"input_ids": IDS})


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3"])
def test_query_norms_are_rows_of_tokens_through_generation(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    inner = next(name for name, _ in model.named_modules() if name.endswith("0.self_attn.q_norm"))
    given: list[torch.Tensor] = []
    model.get_submodule(inner).register_forward_hook(lambda _, args, output: given.append(output.clone()))
    path = tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites=inner, quiet=True):
        model.generate(IDS[:, :3], max_new_tokens=3, do_sample=False, eos_token_id=None)
    turned = [x.transpose(1, 2) if x.shape[1] == 4 and x.shape[2] != 4 else x for x in given]
    expected = torch.cat([x.flatten(0, 1) for x in turned])
    assert torch.equal(Reader(path)[inner].tensor(), expected)


class Sometimes(torch.nn.Module):
    """Skips a part every other time, as layer drop does."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.part, self.n = torch.nn.Embedding(20, 4), torch.nn.Identity(), 0

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        self.n += 1
        x = self.always(input_ids)
        return self.part(x) if self.n % 2 else x


def test_steps_in_which_a_site_did_not_fire_are_counted_and_told(tmp_path: Path) -> None:
    model = Sometimes()
    with strapfmt.capture(model, tmp_path / "x.strap", sites=["always", "part"], quiet=True) as cap:
        for _ in range(5):
            model(IDS)
    assert {site.name: site.n_missed for site in cap.report.sites} == {"always": 0, "part": 2}
    assert "'part' did not fire in 2 of 5 passes" in str(cap.report)
    outcome = Reader(tmp_path / "x.strap").report.ranks[0].sessions[-1]["outcome"]
    assert outcome["missed_steps"] == {"part": 2}


def test_uniform_sites_without_tokens_number_their_rows_and_the_report_says_so(tmp_path: Path) -> None:
    model = Around(lambda self, x: self.lm.lm_head(x))
    with strapfmt.capture(model, tmp_path / "x.strap", sites="logits", quiet=True) as cap:
        model(x=torch.zeros(2, 4, 32))
    assert Reader(tmp_path / "x.strap")["logits"].row_space == "own"
    assert "such as 'logits' number their own rows" in "".join(cap.report.notes)


# Copies of the model, and backward.


def test_a_copy_made_inside_works_afterwards_without_hooks_that_do_anything(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.resid_post", quiet=True):
        model(IDS)
        twin = copy.deepcopy(model)
        stored = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    whole = model(IDS).logits
    assert torch.equal(twin(IDS).logits, whole)
    assert torch.equal(stored(IDS).logits, whole)
    assert len(Reader(tmp_path / "x.strap").tokens) == 8


def test_a_model_can_be_saved_inside(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(model, tmp_path / "x.strap", sites="embed", quiet=True):
        model(IDS)
        torch.save(model, tmp_path / "model.pt")
    stored = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(stored(IDS).logits, model(IDS).logits)


def test_a_pass_made_by_a_hook_in_backward_is_a_pass(tmp_path: Path) -> None:
    model, inner = tiny_model("llama"), tiny_model("llama", seed=1)
    with torch.enable_grad(), strapfmt.capture(inner, tmp_path / "x.strap", sites="embed", quiet=True):
        logits = model(IDS).logits
        logits.register_hook(lambda gradient: inner(IDS) and None)
        logits.sum().backward()
    assert token_ids(tmp_path / "x.strap") == IDS.flatten().tolist()


@pytest.mark.parametrize("lowest", [-1e4, -1e9, torch.finfo(torch.float32).min, float("-inf")])
def test_masks_made_by_hand_say_what_is_padding(tmp_path: Path, lowest: float) -> None:
    is_real = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    allowed = is_real[:, None, None, :] & torch.ones(4, 4).tril().bool()
    allowed |= (
        torch.eye(4).bool() & ~is_real[:, None, :, None]
    )  # padding attends to itself, so nothing is empty
    mask = torch.zeros(2, 1, 4, 4).masked_fill(~allowed, lowest)
    path = captured(tmp_path, tiny_model("llama"), "embed", {"input_ids": IDS, "attention_mask": mask})
    rows = Reader(path).tokens.to_arrow(["batch_index", "token_id"]).to_pylist()
    assert [row["token_id"] for row in rows if row["batch_index"] == 1] == [9, 10, 11, 12]


def test_values_that_are_not_there_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model("llama")

    def total(scale: torch.Tensor) -> torch.Tensor:
        embeddings = model.get_input_embeddings()(IDS) * scale
        return model(inputs_embeds=embeddings).logits.sum()

    with (
        pytest.raises(CaptureError, match=r"site 'blocks\.0\.resid_post'.*expected a plain dense tensor"),
        torch.enable_grad(),
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.resid_post", quiet=True),
    ):
        torch.func.grad(total)(torch.tensor(1.0))
    with (
        pytest.raises(CaptureError, match="token ids: expected a plain tensor with values"),
        strapfmt.capture(model, tmp_path / "y.strap", sites="embed", quiet=True),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        model(torch.ones(2, 3, dtype=torch.int64))
