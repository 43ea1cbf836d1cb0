"""The `with` block of capture: what is checked before, what is raised when, and that the model is left as it was."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_model, tiny_tokenizer
from torch.utils.checkpoint import checkpoint

import strapfmt
from strapfmt.errors import (
    ArgumentError,
    CaptureError,
    DatasetExistsError,
    DatasetNotFoundError,
    SiteNeverFiredError,
    SiteNotFoundError,
    WriterConflictError,
)
from strapfmt.reader import Reader
from strapfmt_capture.drain_home import ThreadDrain
from strapfmt_capture.hooks import Hooks
from strapfmt_capture.progress import ProgressLine

IDS = torch.tensor([[5, 6, 7, 8]])


class Layers(torch.nn.Module):
    """Three layers, and a place where a test can do anything in the middle of a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(4, 4) for _ in range(3))
        self.unused = torch.nn.Linear(4, 4)
        self.middle: Callable[[], None] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        self.middle()
        return self.third(x)


def hooks_of(model: torch.nn.Module) -> list[tuple[object, ...]]:
    """Everything that hooks leave in a module."""
    names = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_backward_hooks",
    )
    return [
        (tuple(sorted(vars(module))), *(tuple(getattr(module, name)) for name in names))
        for module in model.modules()
    ]


def call(model: torch.nn.Module, *inputs: torch.Tensor) -> None:
    """Run one pass for each input."""
    for x in inputs:
        model(x)


# What is checked before anything happens.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sites": "blocks.0.resid_pots"}, SiteNotFoundError, "did you mean 'blocks.0.resid_post'"),
        ({"sites": []}, ArgumentError, "sites: expected at least one"),
        ({"codec": "gzip"}, ArgumentError, "gzip"),
        (
            {"on_full": "wait"},
            ArgumentError,
            "on_full: expected one of block, drop, raise, spill; got 'wait'",
        ),
        ({"stats": ["median"]}, ArgumentError, "median"),
        ({"mode": "update"}, ArgumentError, "mode: expected 'create', 'overwrite' or 'append'"),
        ({"mode": "append", "overwrite": True}, ArgumentError, "choose one"),
        ({"mode": "append"}, DatasetNotFoundError, "no dataset to append to"),
        (
            {"host_ring_bytes": 1},
            ArgumentError,
            "host_ring_bytes: expected a whole number of at least 64, got 1",
        ),
        ({"commit_interval_s": -1.0}, ArgumentError, "commit_interval_s"),
        ({"overwrite": "no"}, ArgumentError, "overwrite: expected True or False, got 'no'"),
        ({"tags": {"a": object()}}, ArgumentError, "tags: expected JSON values"),
        ({"tags": {1: 1, "1": 2}}, ArgumentError, "tags: expected keys that are text, got 1; pass '1'"),
        ({"tags": {"a": [{"b": {None: 0}}]}}, ArgumentError, "tags: expected keys that are text, got None"),
        ({"rank": -1}, ArgumentError, "rank"),
    ],
)
def test_a_mistake_is_found_before_anything_is_attached_or_created(
    arguments: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = tiny_model("gpt2")
    before = hooks_of(model)
    with pytest.raises(error, match=re.escape(message)):
        strapfmt.capture(model, tmp_path / "x.strap", **{"sites": "blocks.0.resid_post", **arguments})
    assert hooks_of(model) == before
    assert list(tmp_path.iterdir()) == []


def test_nothing_happens_before_the_with_block(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    before = hooks_of(model)
    cap = strapfmt.capture(model, tmp_path / "x.strap", sites="logits")
    assert hooks_of(model) == before
    assert list(tmp_path.iterdir()) == []
    assert cap.report.state == "ready"
    assert "logits" in str(cap.report)


def test_an_existing_dataset_is_kept_replaced_or_continued(tmp_path: Path) -> None:
    model, path = tiny_model("gpt2"), tmp_path / "x.strap"

    def run(**arguments: Any) -> Reader:
        with strapfmt.capture(model, path, sites=["logits", "blocks.0.resid_pre"], quiet=True, **arguments):
            model(input_ids=IDS)
        return Reader(path)

    run()
    with pytest.raises(DatasetExistsError, match=r"overwrite=True.*mode='append'"):
        run()
    assert run(mode="append")["logits"].rows.tolist() == list(range(8))
    reader = run(mode="append")
    assert reader["logits"].rows.tolist() == list(range(12))
    assert reader.steps.to_arrow()["step"].to_pylist() == [0, 1, 2]
    assert reader.tokens.to_arrow()["sequence_id"].to_pylist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(reader.manifests[0].sessions) == 3
    assert run(overwrite=True)["logits"].n_rows == 4


def test_appending_keeps_what_a_site_holds(tmp_path: Path) -> None:
    model, path = Layers(), tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="first", quiet=True):
        model(torch.zeros(2, 4))
    wide = torch.nn.Sequential()
    wide.first = torch.nn.Linear(4, 9)
    with (
        pytest.raises(
            CaptureError, match=r"site 'first' at first:out: expected what the dataset already holds"
        ),
        strapfmt.capture(wide, path, sites="first", mode="append", quiet=True),
    ):
        wide(torch.zeros(2, 4))
    assert Reader(path)["first"].n_rows == 2


def test_appending_another_architecture_is_refused_at_once_and_says_what_differs(tmp_path: Path) -> None:
    model, path = tiny_model("gpt2"), tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="blocks.0.resid_post", quiet=True):
        model(input_ids=IDS)
    with pytest.raises(ArgumentError) as caught:
        strapfmt.capture(tiny_model("llama"), path, sites="blocks.0.resid_post", mode="append")
    assert str(caught.value) == (
        "hook_point: the dataset has 'transformer.h.0:out' for site 'blocks.0.resid_post', got "
        "'model.layers.0:out'; write into a dataset of its own"
    )


def test_a_site_keeps_its_row_space_when_appended_to(tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "x.strap"
    for ids in (IDS, IDS[:, :1]):
        with strapfmt.capture(
            model, path, sites="logits", mode="append" if path.exists() else "create", quiet=True
        ):
            model(input_ids=ids, logits_to_keep=1)
    assert Reader(path)["logits"].rows.tolist() == [3, 4]


class Either(torch.nn.Module):
    """Runs its head on hidden states that are given, or on those of tokens."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, states: torch.Tensor | None = None, input_ids: torch.Tensor | None = None) -> object:
        return self.model.lm_head(states) if input_ids is None else self.model(input_ids=input_ids)


def test_logits_declared_with_rows_of_their_own_keep_them_and_say_their_tokens(tmp_path: Path) -> None:
    model, path = Either(tiny_model("llama")), tmp_path / "x.strap"
    for inputs in ({"states": torch.zeros(1, 2, 32)}, {"input_ids": IDS}):
        with strapfmt.capture(
            model, path, sites="**.lm_head", mode="append" if path.exists() else "create", quiet=True
        ):
            model(**inputs)
    (site,) = Reader(path).sites.values()
    assert site.row_space == "own"
    assert site.to_arrow(["token_row"])["token_row"].to_pylist() == [None, None, 0, 1, 2, 3]


def test_a_second_writer_gets_a_clear_error(tmp_path: Path) -> None:
    model, path = tiny_model("gpt2"), tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="logits", quiet=True):
        before = hooks_of(model)
        with (
            pytest.raises(WriterConflictError),
            strapfmt.capture(model, path, sites="logits", mode="append", quiet=True),
        ):
            pass
        assert hooks_of(model) == before
        model(input_ids=IDS)
    assert Reader(path)["logits"].n_rows == 4


def test_ranks_write_one_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tiny_model("gpt2"), tmp_path / "x.strap"
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        with strapfmt.capture(model, path, sites="logits", quiet=True):
            model(input_ids=IDS)
    rows = Reader(path)["logits"].rows
    assert rows.tolist() == [0, 1, 2, 3, *((1 << 40) + np.arange(4)).tolist()]
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ArgumentError, match="RANK: expected a number, got 'first'"):
        strapfmt.capture(model, path, sites="logits")


# Sites that never fire.


def test_no_forward_pass_is_an_error_that_says_so(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with (
        pytest.raises(SiteNeverFiredError, match=r"logits; no forward pass of GPT2LMHeadModel ran") as caught,
        strapfmt.capture(model, tmp_path / "x.strap", sites="logits", quiet=True),
    ):
        pass
    assert caught.value.sites == ["logits"]
    assert Reader(tmp_path / "x.strap").report.is_clean


def test_a_site_that_never_fired_is_named_after_the_dataset_was_closed(tmp_path: Path) -> None:
    model = Layers()
    with (
        pytest.raises(
            SiteNeverFiredError, match=r"unused; .*not called in 2 forward passes.*4 rows of 2 sites"
        ),
        strapfmt.capture(model, tmp_path / "x.strap", sites=["first", "unused"], quiet=True),
    ):
        call(model, torch.zeros(2, 4), torch.zeros(2, 4))
    reader = Reader(tmp_path / "x.strap")
    assert reader.report.is_clean
    assert reader["first"].n_rows == 4


def test_a_site_that_never_fired_does_not_hide_the_users_own_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        strapfmt.capture(Layers(), tmp_path / "x.strap", sites="unused", quiet=True),
    ):
        raise ZeroDivisionError


# The model is left as it was.


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_outputs_and_random_numbers_are_the_same_with_and_without(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)

    def generate() -> Any:
        torch.manual_seed(3)
        return model.generate(
            IDS, max_new_tokens=8, do_sample=True, output_scores=True, return_dict_in_generate=True
        )

    before, expected = hooks_of(model), generate()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="**", tokenizer=tiny_tokenizer(), quiet=True):
        assert hooks_of(model) != before
        found = generate()
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        assert torch.equal(one, other)
    assert hooks_of(model) == before


def test_gradients_are_the_same_with_and_without(tmp_path: Path) -> None:
    model, x = Layers(), torch.randn(3, 4)
    model(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    with strapfmt.capture(model, tmp_path / "x.strap", sites=["first", "third:in"], quiet=True):
        model(x).sum().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Stop(Exception):
    pass


def fail(error: BaseException) -> Callable[..., None]:
    def middle(*args: object) -> None:
        raise error

    return middle


@pytest.mark.parametrize("error", [Stop("no"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_an_exception_in_the_model_passes_unchanged_and_the_rest_is_kept(
    error: BaseException, tmp_path: Path
) -> None:
    model = Layers()
    before = hooks_of(model)
    cap = strapfmt.capture(model, tmp_path / "x.strap", sites=["first", "third"], quiet=True)
    stopping = iter([lambda: None, fail(error)])
    model.middle = lambda: next(stopping)()
    with pytest.raises(type(error)) as caught, cap:
        call(model, torch.zeros(2, 4), torch.zeros(2, 4))
    assert caught.value is error
    assert "6 rows of 2 sites" in error.__notes__[0]
    assert hooks_of(model) == before
    reader = Reader(tmp_path / "x.strap")
    assert reader.report.is_clean
    assert (reader["first"].n_rows, reader["third"].n_rows) == (4, 2)
    steps = reader.steps.to_arrow().to_pylist()
    assert [step["status"] for step in steps] == ["complete", "abandoned"]
    assert type(error).__name__ in steps[1]["reason"]
    assert cap.report.n_abandoned_steps == 1


@pytest.mark.parametrize("error", [Stop("no"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_a_caught_exception_ends_its_step_only(error: BaseException, tmp_path: Path) -> None:
    model = Layers()
    with strapfmt.capture(model, tmp_path / "x.strap", sites=["first", "third"], quiet=True):
        for middle in (lambda: None, fail(error), lambda: None):
            model.middle = middle
            try:
                model(torch.zeros(2, 4))
            except (Stop, KeyboardInterrupt):
                model.middle = lambda: None
                model(torch.zeros(3, 4))
    reader = Reader(tmp_path / "x.strap")
    statuses = [step["status"] for step in reader.steps.to_arrow().to_pylist()]
    assert statuses == ["complete", "abandoned", "complete", "complete"]
    assert (reader["first"].n_rows, reader["third"].n_rows) == (9, 7)


def test_the_tokens_of_an_abandoned_step_are_marked(tmp_path: Path) -> None:
    model = tiny_model("llama")
    handle = model.model.layers[1].register_forward_hook(lambda *_: fail(Stop("half way"))())
    with (
        pytest.raises(Stop),
        strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.resid_post", quiet=True),
    ):
        model(input_ids=IDS)
    handle.remove()
    reader = Reader(tmp_path / "x.strap")
    events = reader.row_events.to_arrow().to_pylist()
    assert [(event["row"], event["event"], event["detail"]) for event in events] == [
        (row, "abandoned", "Stop: half way") for row in range(4)
    ]
    assert reader["blocks.0.resid_post"].n_rows == 4
    assert len(reader.tokens) == 4


def test_an_exception_between_passes_keeps_everything(tmp_path: Path) -> None:
    model = tiny_model("gpt2")

    def body() -> None:
        model(input_ids=IDS)
        raise Stop

    with pytest.raises(Stop) as caught, strapfmt.capture(model, tmp_path / "x.strap", sites="logits"):
        body()
    assert "4 rows of 1 sites" in caught.value.__notes__[0]
    reader = Reader(tmp_path / "x.strap")
    assert reader.steps.to_arrow()["status"].to_pylist() == ["complete"]
    assert reader["logits"].n_rows == 4


def test_a_pass_inside_an_exception_handler_is_complete(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with strapfmt.capture(model, tmp_path / "x.strap", sites="logits", quiet=True):
        try:
            raise Stop
        except Stop:
            model(input_ids=IDS)
    assert Reader(tmp_path / "x.strap").steps.to_arrow()["status"].to_pylist() == ["complete"]


def test_the_model_may_be_copied_inside(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with strapfmt.capture(model, tmp_path / "x.strap", sites="logits", quiet=True):
        copied = copy.deepcopy(model)
        copied.lm_head.weight.data.add_(1)  # another model: what it does belongs to no row of this one
        assert not torch.equal(copied(input_ids=IDS).logits, model(input_ids=IDS).logits)
    stored = Reader(tmp_path / "x.strap")
    assert len(stored.steps) == 1
    assert torch.equal(stored["logits"][:], model(input_ids=IDS).logits.detach().flatten(0, 1))


# Rows and sites that do not fit.


def test_a_part_called_directly_is_refused_with_advice(tmp_path: Path) -> None:
    model = Layers()
    with (
        pytest.raises(CaptureError, match=r"site 'first' at first:out fired outside a forward pass"),
        strapfmt.capture(model, tmp_path / "x.strap", sites="first", quiet=True),
    ):
        model.first(torch.zeros(2, 4))


def test_the_forward_method_called_directly_is_refused_with_advice(tmp_path: Path) -> None:
    model = Layers()
    with (
        pytest.raises(CaptureError, match=r"call that model itself \(not its forward method"),
        strapfmt.capture(model, tmp_path / "x.strap", sites="first", quiet=True),
    ):
        model.forward(torch.zeros(2, 4))


def test_the_base_model_may_be_called_directly(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.resid_post", quiet=True):
        hidden = model.model(input_ids=IDS, output_hidden_states=True).hidden_states[1]
    found = Reader(tmp_path / "x.strap")["blocks.0.resid_post"].tensor()
    assert torch.equal(found, hidden[0].detach())


class Checkpointed(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.third(checkpoint(lambda y: self.second(self.first(y)), x, use_reentrant=self.training))


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_repetition_of_gradient_checkpointing_is_ignored(reentrant: bool, tmp_path: Path) -> None:
    model = Checkpointed().train(reentrant)
    with strapfmt.capture(model, tmp_path / "x.strap", sites=["first", "third"], quiet=True):
        for _ in range(2):
            model(torch.randn(3, 4, requires_grad=True)).sum().backward()
    reader = Reader(tmp_path / "x.strap")
    assert (reader["first"].n_rows, reader["third"].n_rows) == (6, 6)
    assert len(reader.steps) == 2


def test_gradient_checkpointing_of_a_language_model(tmp_path: Path) -> None:
    model = tiny_model("llama").train()
    model.activation_checkpointing_enable()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.resid_post", quiet=True):
        for _ in range(2):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    reader = Reader(tmp_path / "x.strap")
    assert reader["blocks.0.resid_post"].rows.tolist() == list(range(8))
    assert len(reader.tokens) == 8


class Shared(torch.nn.Module):
    """Runs one layer twice, with token ids in front so that its rows are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.layer(self.embed(input_ids)))


def test_a_site_that_fires_twice_a_pass_is_refused(tmp_path: Path) -> None:
    model = Shared()
    with (
        pytest.raises(CaptureError, match=r"site 'layer' at layer:out fired twice in one forward pass"),
        strapfmt.capture(model, tmp_path / "x.strap", sites="layer", quiet=True),
    ):
        model(IDS)


class Repeated(Layers):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(self.first(x))


def test_a_site_with_rows_of_its_own_may_fire_often(tmp_path: Path) -> None:
    model = Repeated()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="first", quiet=True):
        model(torch.zeros(2, 4))
    assert Reader(tmp_path / "x.strap")["first"].to_arrow(["call"])["call"].to_pylist() == [0, 0, 1, 1]


def test_calls_go_on_behind_those_of_earlier_sessions(tmp_path: Path) -> None:
    model = Repeated()
    for mode in ("create", "append", "append"):
        with strapfmt.capture(model, tmp_path / "x.strap", sites="first", mode=mode, quiet=True):
            model(torch.zeros(2, 4))
            model(torch.zeros(0, 4))
            model(torch.zeros(1, 4))
    columns = Reader(tmp_path / "x.strap")["first"].to_arrow(["row", "call"]).to_pydict()
    assert columns["call"] == [first + call for first in (0, 6, 12) for call in (0, 0, 1, 1, 2, 3)]


def test_a_step_without_rows_names_the_next_free_one(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        rec.write("own", torch.zeros(2, 4))
        rec.end_step()
        rec.tokens(n=5)
        rec.end_step()
        rec.write("own", torch.zeros(2, 4))
    model = Layers()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="first", mode="append", quiet=True):
        for _ in range(2):
            model(torch.zeros(2, 4))
    steps = Reader(tmp_path / "x.strap").steps.to_arrow(["first_row", "n_rows"]).to_pydict()
    assert steps == {"first_row": [0, 0, 5, 5, 5], "n_rows": [0, 5, 0, 0, 0]}


class Changing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize(
    ("second", "found"),
    [
        (torch.zeros(2, 5), r"float32 \[2, 5\]"),
        (torch.zeros(2, 4, dtype=torch.float64), r"float64 \[2, 4\]"),
        (torch.zeros(2, 2, 4), r"float32 \[2, 2, 4\]"),
    ],
)
def test_a_call_of_another_kind_is_refused(second: torch.Tensor, found: str, tmp_path: Path) -> None:
    model = Changing()
    with (
        pytest.raises(CaptureError, match=rf"site 'inner' at inner:out: expected float32 .*, found {found}"),
        strapfmt.capture(model, tmp_path / "x.strap", sites="inner", quiet=True),
    ):
        call(model, torch.zeros(2, 4), second)
    assert Reader(tmp_path / "x.strap")["inner"].n_rows == 2


@pytest.mark.parametrize(
    ("value", "shape", "n_rows"),
    [
        (torch.tensor(1.0), (), 1),
        (torch.zeros(7), (7,), 1),
        (torch.zeros(3, 7), (7,), 3),
        (torch.zeros(2, 3, 7), (7,), 6),
        (torch.zeros(2, 3, 4, 5), (3, 4, 5), 2),
    ],
)
def test_rows_of_a_tensor_of_any_shape(
    value: torch.Tensor, shape: tuple[int, ...], n_rows: int, tmp_path: Path
) -> None:
    model = Changing()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="inner", quiet=True):
        model(value)
    site = Reader(tmp_path / "x.strap")["inner"]
    assert (site.shape, site.n_rows) == (shape, n_rows)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, 3, device="meta"), "expected a plain dense tensor"),
        (torch.eye(3).to_sparse(), "expected a plain dense tensor"),
        (torch.zeros(2, 0), "shape"),
    ],
)
def test_tensors_that_cannot_be_stored_are_refused(value: torch.Tensor, message: str, tmp_path: Path) -> None:
    model = Changing()
    with (
        pytest.raises(CaptureError, match=message) as caught,
        strapfmt.capture(model, tmp_path / "x.strap", sites="inner", quiet=True),
    ):
        model(value)
    assert "site 'inner' at inner:out" in str(caught.value)


def test_two_threads_at_once_are_refused(tmp_path: Path) -> None:
    model = Layers()
    refused: list[BaseException] = []

    def other() -> None:
        try:
            model(torch.zeros(2, 4))
        except CaptureError as error:
            refused.append(error)

    def middle() -> None:
        model.middle = lambda: None
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    model.middle = middle
    with strapfmt.capture(model, tmp_path / "x.strap", sites="third", quiet=True):
        model(torch.zeros(2, 4))
    assert "two threads" in str(refused[0])
    assert Reader(tmp_path / "x.strap")["third"].n_rows == 2


def test_another_thread_may_run_the_model_alone(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with strapfmt.capture(model, tmp_path / "x.strap", sites="logits", quiet=True):
        for _ in range(2):
            thread = threading.Thread(target=lambda: model(input_ids=IDS))
            thread.start()
            thread.join()
    assert Reader(tmp_path / "x.strap")["logits"].n_rows == 8


def test_a_forked_process_that_runs_the_model_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    model = Layers()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="first", quiet=True) as cap:
        model(torch.zeros(2, 4))
        child = os.fork()
        if child == 0:
            try:
                model(torch.zeros(2, 4))
            except CaptureError as error:
                cap.__exit__(None, None, None)
                os._exit(7 if "forked" in str(error) and not model.first._forward_hooks else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        model(torch.zeros(2, 4))
    assert Reader(tmp_path / "x.strap")["first"].n_rows == 4


def test_the_ring_is_given_back_at_the_end(tmp_path: Path) -> None:
    model = Layers()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="first", quiet=True) as cap:
        model(torch.zeros(2, 4))
        memory = weakref.ref(cap._engine.rings.host.memory.bytes)
        assert memory() is not None
    assert memory() is None
    assert cap.report.n_rows == 2


# Several captures.


def test_nested_captures_with_different_sites(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = hooks_of(model)
    with strapfmt.capture(model, tmp_path / "a.strap", sites="blocks.0.resid_post", quiet=True):
        with strapfmt.capture(
            model, tmp_path / "b.strap", sites=["blocks.1.resid_post", "logits"], quiet=True
        ):
            model.generate(IDS, max_new_tokens=3, do_sample=False)
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert hooks_of(model) == before
    outer, inner = Reader(tmp_path / "a.strap"), Reader(tmp_path / "b.strap")
    assert (outer["blocks.0.resid_post"].n_rows, inner["blocks.1.resid_post"].n_rows) == (6 + 5, 6)
    assert inner.tokens.to_arrow().equals(outer.tokens.to_arrow().slice(0, 6))


def test_a_capture_is_entered_once(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    cap = strapfmt.capture(model, tmp_path / "x.strap", sites="logits", quiet=True)
    with cap:
        model(input_ids=IDS)
    with pytest.raises(CaptureError, match="entered once"), cap:
        pass


# What it tells.


def test_one_line_is_printed_at_the_end_unless_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("gpt2")
    for name, quiet in (("a.strap", False), ("b.strap", True)):
        with strapfmt.capture(model, tmp_path / name, sites="**.resid_post", quiet=quiet):
            model(input_ids=IDS)
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert re.fullmatch(
        r"strapfmt: .*a\.strap: 8 rows of 2 sites from 4 tokens \(1\.0 KiB\), 0 dropped", line
    )


def test_the_report_is_live_and_complete(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    with strapfmt.capture(model, tmp_path / "x.strap", sites=["logits", "embed"], quiet=True) as cap:
        assert cap.report.state == "running"
        model(input_ids=IDS)
        assert [site.expected for site in cap.report.sites] == [4, 4]
    report = cap.report
    assert (report.state, report.n_rows, report.n_dropped, report.n_steps) == ("closed", 8, 0, 1)
    assert "logits" in str(report)
    assert "cuda" not in str(report)
    assert json.loads(json.dumps(report.to_dict()))["sites"][1]["written"] == 4


def test_estimates_before_and_inside_match_what_is_written(tmp_path: Path) -> None:
    model = tiny_model("gpt2", attn_implementation="eager")
    sites = ["blocks.*.resid_post", "blocks.0.attn_pattern"]
    cap = strapfmt.capture(model, tmp_path / "x.strap", sites=sites, quiet=True)
    before = cap.estimate(1000)
    assert before.sites["blocks.0.resid_post"] == 1000 * (32 * 4 + 8 + 5 * 4)
    assert before.sites["blocks.0.attn_pattern"] is None
    assert before.n_bytes == 2 * 1000 * 156 + 1000 * 64
    assert "367.2 KiB" in str(before)
    assert "1 sites whose size is not known yet" in str(before)
    with cap:
        model(input_ids=IDS)
        assert cap.estimate(1000) == before
    with pytest.raises(ArgumentError):
        cap.estimate(-1)


def test_an_estimate_inside_knows_sites_that_were_unknown(tmp_path: Path) -> None:
    model = Changing()
    with strapfmt.capture(model, tmp_path / "x.strap", sites="inner", stats=False, quiet=True) as cap:
        assert cap.estimate(10).sites == {"inner": None}
        model(torch.zeros(2, 4))
        assert cap.estimate(10).sites == {"inner": 10 * (16 + 24)}


def test_the_manifest_says_where_everything_came_from(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    sites = ["logits", "model.layers.0.mlp"]
    with strapfmt.capture(
        model,
        tmp_path / "x.strap",
        sites=sites,
        tokenizer=tokenizer,
        codec="lz4",
        tags={"run": 7},
        quiet=True,
    ):
        model(input_ids=IDS)
    reader = Reader(tmp_path / "x.strap")
    session = reader.manifests[0].sessions[0]
    assert session["tool"] == "strapfmt.capture"
    assert session["model"]["class"].endswith("LlamaForCausalLM")
    assert session["model"]["dtypes"] == ["float32"]
    assert session["model"]["devices"] == ["cpu"]
    assert len(session["model"]["config_hash"]) == 32
    assert session["tokenizer"]["vocab_size"] == tokenizer.vocab_size
    assert set(session["versions"]) == {"python", "strapfmt", "torch", "transformers", "pyarrow", "numpy"}
    assert session["options"]["codec"] == "lz4"
    assert session["sites"] == {"logits": "lm_head:out", "model.layers.0.mlp": "model.layers.0.mlp:out"}
    assert session["outcome"]["n_steps"] == 1
    assert reader["logits"].spec.module_path == "lm_head"
    assert json.loads(reader.sequences.to_arrow()["tags"][0].as_py()) == {"run": 7}


def test_statistics_can_be_left_out_or_chosen(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    for name, stats, columns in (
        ("a.strap", False, []),
        ("b.strap", ["abs_max", "l2_norm"], ["l2_norm", "abs_max"]),
    ):
        with strapfmt.capture(model, tmp_path / name, sites="logits", stats=stats, quiet=True) as cap:
            model(input_ids=IDS)
        assert list(cap.statistics) == columns
        assert Reader(tmp_path / name)["logits"].to_arrow().schema.names == ["activation", "row", *columns]


def test_the_progress_line_shows_rates_on_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    counts = (12_345, 67_000_000, 0.25, 3)
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        with ProgressLine(lambda: counts, stream=stream):
            pass
    assert file.getvalue() == ""
    assert "12,345 rows" in terminal.getvalue()
    assert re.search(r"MB/s +ring 25% +dropped 3", terminal.getvalue())


def test_the_progress_line_can_be_forced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("gpt2")
    with strapfmt.capture(model, tmp_path / "x.strap", sites="logits", progress=True, quiet=True):
        model(input_ids=IDS)
    assert "strapfmt:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"host_ring_bytes": 1 << 62}, "host_ring_bytes"),
        ({"host_ring_bytes": 1e6}, "host_ring_bytes"),
        ({"batch_bytes": "4MB"}, "batch_bytes"),
        ({"commit_interval_s": float("nan")}, "commit_interval_s"),
        ({"rank": "0"}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"sites": 3}, "sites"),
        ({"sites": [3]}, "sites"),
        ({"stats": 3}, "stats"),
        ({"model": None}, "model"),
        ({"path": None}, "path"),
        ({"tokenizer": "gpt2"}, "AutoTokenizer"),
        ({"tags": {"a": "\ud800"}}, "tags"),
        ({"tags": {"a": float("nan")}}, "tags"),
        ({"tags": [1]}, "tags"),
    ],
)
def test_a_wrong_argument_leaves_the_dataset_that_would_be_replaced(
    arguments: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model, path = tiny_model("gpt2"), tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="logits", quiet=True):
        model(input_ids=IDS)
    given = {"model": model, "path": path, "sites": "logits", "overwrite": True, "quiet": True, **arguments}
    with pytest.raises(ArgumentError, match=said), strapfmt.capture(**given):
        pass
    assert Reader(path)["logits"].n_rows == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_that_takes_no_hooks_leaves_the_dataset_that_would_be_replaced(tmp_path: Path) -> None:
    model, path = Layers(), tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="first", quiet=True):
        model(torch.zeros(2, 4))
    before = hooks_of(model)
    model.second = torch.jit.script(model.second)
    cap = strapfmt.capture(model, path, sites=["first", "second"], overwrite=True)
    with (
        pytest.raises(CaptureError, match="site 'second' at second:out: expected a module that takes hooks"),
        cap,
    ):
        pass
    assert hooks_of(model)[:2] == before[:2]
    assert Reader(path)["first"].n_rows == 2
    with strapfmt.capture(model, path, sites="first", overwrite=True, quiet=True):
        model(torch.zeros(3, 4))  # what surrounds it can be captured
    assert Reader(path)["first"].n_rows == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    for model in (
        torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 4))),
        torch.jit.trace(torch.nn.Linear(4, 4), torch.zeros(1, 4)),
    ):
        with pytest.raises(ArgumentError, match=r"model: .* of TorchScript, which runs no hooks"):
            strapfmt.capture(model, tmp_path / "x.strap", sites="0", overwrite=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", [(Hooks, "attached"), (ThreadDrain, "start")])
@pytest.mark.parametrize("rank", [None, 1])
def test_a_session_that_cannot_begin_leaves_nothing_behind(
    part: tuple[type, str], rank: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = Layers(), tmp_path / "x.strap"
    before = hooks_of(model)
    with monkeypatch.context() as patch:
        patch.setattr(*part, fail(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="can't start"):
            strapfmt.capture(model, path, sites="first", rank=rank).__enter__()
    assert list(tmp_path.iterdir()) == []
    assert hooks_of(model) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("strapfmt")]
    with strapfmt.capture(model, path, sites="first", rank=rank, quiet=True):
        model(torch.zeros(2, 4))
    assert Reader(path)["first"].n_rows == 2


def test_a_session_that_cannot_begin_leaves_other_ranks_and_what_it_would_append_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = Layers(), tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="first", rank=0, quiet=True):
        model(torch.zeros(2, 4))
    monkeypatch.setattr(Hooks, "attached", fail(RuntimeError("no")))
    for arguments in ({"rank": 1}, {"rank": 0, "mode": "append"}):
        with pytest.raises(RuntimeError, match="no"):
            strapfmt.capture(model, path, sites="first", **arguments).__enter__()
    assert [each.name for each in path.iterdir()] == ["rank-00000"]
    assert Reader(path)["first"].n_rows == 2


def test_layers_that_are_not_initialised_yet_are_captured(tmp_path: Path) -> None:
    model, path = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.ReLU()), tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites=["0", "0:in"], quiet=True) as cap:
        assert cap.estimate(10).sites["0:in"] is None
        model(torch.zeros(2, 4))
    reader = Reader(path)
    assert [reader[name].spec.shape for name in ("0", "0:in")] == [(3,), (4,)]
    assert "n_parameters" not in reader.manifests[0].sessions[0]["model"]


def test_attention_patterns_left_out_are_told(tmp_path: Path) -> None:
    model = tiny_model("llama", attn_implementation="sdpa")
    cap = strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.*")
    assert re.search(r"attention patterns were left out: .*eager.*; found 'sdpa'", str(cap.report))
    assert strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.0.resid_*").report.notes == ()


def test_appending_with_other_options_than_the_sites_have_is_refused_at_once(tmp_path: Path) -> None:
    model, path = tiny_model("gpt2"), tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="logits", codec="zstd", quiet=True):
        model(input_ids=IDS)
    with pytest.raises(ArgumentError, match=r"codec: the dataset has 'zstd' for site 'logits', got 'none'"):
        strapfmt.capture(model, path, sites="logits", mode="append")
    with pytest.raises(ArgumentError, match="stats: the dataset has"):
        strapfmt.capture(model, path, sites="logits", mode="append", codec="zstd", stats=False)
    strapfmt.capture(model, path, sites="embed", mode="append")  # a new site may differ


def test_small_mistakes_are_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="model: expected"):
        strapfmt.sites(None)  # type: ignore[arg-type]
    cap = strapfmt.capture(tiny_model("gpt2"), tmp_path / "x.strap", sites="logits")
    with pytest.raises(ArgumentError, match="n_tokens"):
        cap.estimate("1")  # type: ignore[arg-type]
    with pytest.raises(CaptureError, match="was not entered"):
        cap.__exit__(None, None, None)
