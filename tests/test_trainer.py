"""The Trainer callback: what it stores of a real training run on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model

import strapfmt
from strapfmt.errors import ArgumentError, CaptureError, DatasetExistsError

pytest.importorskip("accelerate", reason="the Trainer of transformers needs it: pip install accelerate")

from transformers import Trainer, TrainerCallback, TrainingArguments

from strapfmt_capture.trainer import CaptureCallback

N_TOKENS = 5
SITE = "blocks.1.resid_post"


def examples(n: int, seed: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 101, (n, N_TOKENS), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


class Watch:
    """An oracle: what every pass of a model was given, in which mode, and what the last block made of it."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.passes: list[tuple[bool, torch.Tensor, torch.Tensor]] = []
        self._ids: torch.Tensor | None = None
        model.register_forward_pre_hook(self.begin, with_kwargs=True)
        model.model.layers[1].register_forward_hook(self.end)

    def begin(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._ids = kwargs["input_ids"]

    def end(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        if self._ids is not None:
            self.passes.append((module.training, self._ids, output.detach().clone()))
        self._ids = None  # the repetition inside backward has no call of the model


def trainer_of(
    tmp_path: Path, callbacks: list[Any], model: torch.nn.Module | None = None, **options: Any
) -> Trainer:
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 5,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **options,
    }
    return Trainer(
        model or tiny_model("llama"),
        TrainingArguments(**arguments),
        train_dataset=examples(40, 0),
        eval_dataset=examples(6, 1),
        callbacks=callbacks,
    )


def check(path: Path, expected: list[tuple[bool, torch.Tensor, torch.Tensor]]) -> None:
    """Compare a dataset with the passes that it should hold, in order."""
    dataset = strapfmt.open(path)
    rows = dataset.sql("select step, token_id from tokens order by row").fetchall()
    assert rows == [
        (step, token) for step, (_, ids, _) in enumerate(expected) for token in ids.flatten().tolist()
    ]
    values = torch.cat([value.flatten(0, 1) for _, _, value in expected])
    assert torch.equal(torch.as_tensor(dataset[SITE][:]), values)
    assert strapfmt.verify(path).valid


def marks(path: Path) -> list[tuple[str, int, int]]:
    return [(mark.name, mark.step, mark.attributes["step"]) for mark in strapfmt.open(path).marks]


def test_every_nth_step_is_captured(tmp_path: Path) -> None:
    path, model = tmp_path / "a.strap", tiny_model("llama")
    callback = CaptureCallback(path, sites=SITE, every_n_steps=2, evaluation=False, quiet=True)
    watch = Watch(model)
    trainer_of(tmp_path, [callback], model).train()
    assert len(watch.passes) == 5
    check(path, watch.passes[::2])
    assert marks(path) == [("train_step", 0, 0), ("train_step", 1, 2), ("train_step", 2, 4)]
    assert callback.capture.report.state == "closed"
    assert callback.capture.report.n_paused_passes == 2
    assert not model.model.layers[0]._forward_hooks


def test_evaluations_are_captured_whole(tmp_path: Path) -> None:
    path, model = tmp_path / "a.strap", tiny_model("llama")
    watch = Watch(model)
    callback = CaptureCallback(path, sites=SITE, quiet=True)
    trainer_of(
        tmp_path, [callback], model, max_steps=4, eval_strategy="steps", eval_steps=2, eval_on_start=True
    ).train()
    assert [is_training for is_training, _, _ in watch.passes].count(False) == 9
    check(path, [each for each in watch.passes if not each[0]])
    assert marks(path) == [("evaluation", 0, 0), ("evaluation", 3, 2), ("evaluation", 6, 4)]


def test_several_evaluation_datasets_after_every_epoch(tmp_path: Path) -> None:
    path, model = tmp_path / "a.strap", tiny_model("llama")
    watch = Watch(model)
    callback = CaptureCallback(path, sites=SITE, every_n_steps=20, quiet=True)
    trainer = trainer_of(tmp_path, [callback], model, eval_strategy="epoch", max_steps=-1, num_train_epochs=2)
    trainer.eval_dataset = {"short": examples(2, 2), "long": examples(4, 3)}
    trainer.train()
    trained = [i for i, each in enumerate(watch.passes) if each[0]]
    kept = [each for i, each in enumerate(watch.passes) if not each[0] or trained.index(i) in (0, 20)]
    assert len(kept) == 2 + 2 * 3
    check(path, kept)
    assert marks(path) == [
        ("train_step", 0, 0),
        ("evaluation", 1, 20),
        ("train_step", 4, 20),
        ("evaluation", 5, 40),
    ]


def test_gradient_accumulation_and_checkpointing(tmp_path: Path) -> None:
    path, model = tmp_path / "a.strap", tiny_model("llama")
    model.activation_checkpointing_enable()
    watch = Watch(model)
    callback = CaptureCallback(path, sites=SITE, every_n_steps=2, quiet=True)
    trainer_of(
        tmp_path,
        [callback],
        model,
        max_steps=3,
        gradient_accumulation_steps=3,
        eval_strategy="steps",
        eval_steps=3,
    ).train()
    trained = [each for each in watch.passes if each[0]]
    evaluated = [each for each in watch.passes if not each[0]]
    assert (len(trained), len(evaluated)) == (9, 3)
    check(path, [*trained[:3], *trained[6:], *evaluated])
    assert marks(path) == [("train_step", 0, 0), ("train_step", 3, 2), ("evaluation", 6, 3)]


def test_training_is_what_it_is_without_the_callback(tmp_path: Path) -> None:
    plain, captured = tiny_model("llama"), tiny_model("llama")
    trainer_of(tmp_path, [], plain).train()
    callback = CaptureCallback(tmp_path / "a.strap", sites="blocks.*.*", every_n_steps=1, quiet=True)
    trainer_of(tmp_path, [callback], captured).train()
    for expected, found in zip(plain.parameters(), captured.parameters(), strict=True):
        assert torch.equal(expected, found)


class Breaks(TrainerCallback):
    """Ends a training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("broken")


def test_dataset_is_closed_if_the_training_fails(tmp_path: Path) -> None:
    path, model = tmp_path / "a.strap", tiny_model("llama")
    watch = Watch(model)
    with (
        pytest.raises(RuntimeError, match="broken") as raised,
        CaptureCallback(path, sites=SITE, every_n_steps=1, quiet=True) as callback,
    ):
        trainer_of(tmp_path, [Breaks(), callback], model).train()
    assert "30 rows of 1 sites from 30 tokens" in raised.value.__notes__[0]
    check(path, watch.passes)
    assert not model.model.layers[0]._forward_hooks
    assert callback.capture.report.state == "closed"


def test_training_that_was_cut_off_has_to_be_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.strap"
    callback = CaptureCallback(path, sites=SITE, every_n_steps=1, quiet=True)
    trainer = trainer_of(tmp_path, [Breaks(), callback])
    with pytest.raises(RuntimeError, match="broken"):
        trainer.train()
    with pytest.raises(CaptureError, match=r"cut off; call close\(\)"):
        trainer.train()
    callback.close()
    callback.close()
    assert strapfmt.verify(path).valid
    with pytest.raises(DatasetExistsError):
        trainer.train()


class AsksLate(TrainerCallback):
    """Asks for an evaluation."""

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> Any:
        control.should_evaluate = True
        return control


def test_evaluation_that_was_missed_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(CaptureError, match="add CaptureCallback last"),
        CaptureCallback(tmp_path / "a.strap", sites=SITE, every_n_steps=1, quiet=True) as callback,
    ):
        trainer_of(tmp_path, [callback, AsksLate()]).train()
    with CaptureCallback(tmp_path / "b.strap", sites=SITE, quiet=True, every_n_steps=9) as callback:
        trainer_of(tmp_path, [AsksLate(), callback], max_steps=2).train()
    assert [name for name, _, _ in marks(tmp_path / "b.strap")] == ["train_step", "evaluation", "evaluation"]


def test_what_captures_nothing_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="every_n_steps"):
        CaptureCallback(tmp_path / "a.strap", sites=SITE, evaluation=False)
    with pytest.raises(ArgumentError, match="every_n_steps"):
        CaptureCallback(tmp_path / "a.strap", sites=SITE, every_n_steps=0)
    callback = CaptureCallback(tmp_path / "a.strap", sites=SITE)
    with pytest.raises(CaptureError, match="none has begun"):
        _ = callback.capture
    with pytest.raises(ArgumentError, match="eval_strategy"):
        trainer_of(tmp_path, [callback]).train()
    assert not (tmp_path / "a.strap").exists()
