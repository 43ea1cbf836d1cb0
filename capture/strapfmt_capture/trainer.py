"""A callback of the Hugging Face Trainer: captures chosen training steps, and the evaluations between them.

This module imports transformers, and nothing else in the package imports this module.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from strapfmt.arguments import as_integer
from strapfmt.errors import ArgumentError, CaptureError
from strapfmt.extras import require
from strapfmt_capture.arguments import as_flag
from strapfmt_capture.opening import capture
from strapfmt_capture.session import Capture

require("transformers", "hf", "the Trainer callback")
from transformers import TrainerCallback  # noqa: E402 - after the error that names the extra

__all__ = ["CaptureCallback"]


class CaptureCallback(TrainerCallback):
    """Captures what a `transformers.Trainer` runs, into a dataset that lives as long as the training.

    ::

        with CaptureCallback("run.strap", sites="blocks.*.resid_post", every_n_steps=100) as callback:
            Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train()

    A training step that is captured has one forward pass for each batch that its gradient is accumulated over, and
    begins with the mark `train_step` (`step`, the number of optimizer steps before it, and `epoch`). An evaluation
    begins with the mark `evaluation` (the same attributes), and lasts until the next training step begins. With
    gradient checkpointing the passes inside `backward` add nothing.

    The Trainer tells callbacks nothing of an exception that ends it, so enter the callback around `train()`, as above:
    then the dataset is closed, and what was captured is committed, in that case too. Without `with`, call `close`.

    Parameters
    ----------
    path : path
        The dataset.
    sites : str or iterable of str
        As in `capture`.
    every_n_steps : int, optional
        Capture the first, the (n+1)th, ... training step of the run. None: no training steps.
    evaluation : bool
        Capture evaluations. One is known to come when the callbacks before this one have asked for it, as the
        Trainer's own do; add this one behind others that ask.
    **options
        Of `capture`: `codec`, `tokenizer`, `positions`, `max_rows`, `mode`, ...

    Raises
    ------
    ArgumentError
        If neither training steps nor evaluations are captured. What `capture` refuses is raised as training begins.
    MissingExtraError
        By the import, without transformers.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sites: Any,
        every_n_steps: int | None = None,
        evaluation: bool = True,
        **options: Any,
    ) -> None:
        self._path, self._options = path, {"sites": sites, **options}
        self._every = None if every_n_steps is None else as_integer("every_n_steps", every_n_steps, least=1)
        self._evaluation = as_flag("evaluation", evaluation)
        if self._every is None and not evaluation:
            raise ArgumentError(
                "every_n_steps: expected a number, as evaluation=False leaves nothing to capture"
            )
        self._capture: Capture | None = None
        self._is_open = self._is_paused = False

    @property
    def capture(self) -> Capture:
        """The capture of the training under way, or of the last one.

        Raises
        ------
        CaptureError
            Before training.
        """
        if self._capture is None:
            raise CaptureError(f"{self._path}: the capture begins with the training, and none has begun")
        return self._capture

    def close(self) -> None:
        """Close the dataset of a training that was cut off. Safe to call twice, and after one that was not."""
        self._close(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(error)

    # What the Trainer calls.

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Open the dataset."""
        if self._is_open:
            raise CaptureError(
                f"{self._path}: another training with this callback was cut off; call close(), and go on with "
                'mode="append" or into another dataset'
            )
        has_none = str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no"
        if self._every is None and has_none and not args.eval_on_start:
            raise ArgumentError(
                f'{self._path}: expected every_n_steps, or evaluations; the Trainer has eval_strategy="no"'
            )
        self._capture = capture(others["model"], self._path, **self._options)
        self._capture.__enter__()
        self._is_open, self._is_paused = True, False
        self._pause()
        if args.eval_on_start:
            self._expect_evaluation(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Record the step, or pass it by."""
        if self._every is not None and state.global_step % self._every == 0:
            self._resume("train_step", state)
        else:
            self._pause()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """End the step; record an evaluation that follows it."""
        self._pause()
        if control.should_evaluate:
            self._expect_evaluation(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Record an evaluation that follows the epoch."""
        self._pause()
        if control.should_evaluate:
            self._expect_evaluation(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Refuse to have missed an evaluation."""
        if self._is_open and self._evaluation and self._is_paused:
            raise CaptureError(
                f"{self._path}: an evaluation ran at step {state.global_step} that was not captured, as a callback "
                "behind this one asked for it; add CaptureCallback last, or pass evaluation=False"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Close the dataset."""
        self._close(None)

    # Inside.

    def _expect_evaluation(self, state: Any) -> None:
        if self._evaluation:
            self._resume("evaluation", state)

    def _resume(self, mark: str, state: Any) -> None:
        if self._is_paused:
            self.capture.resume()
            self._is_paused = False
        self.capture.mark(mark, step=state.global_step, epoch=state.epoch)

    def _pause(self) -> None:
        if not self._is_paused:
            self.capture.pause()
            self._is_paused = True

    def _close(self, error: BaseException | None) -> None:
        if self._is_open:
            self._is_open = False
            self.capture.__exit__(None if error is None else type(error), error, None)
