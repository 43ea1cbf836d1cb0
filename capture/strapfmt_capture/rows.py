"""Rows: which token of which sequence each place of a forward pass is, decided once per pass for all sites.

What a person can rely on, whatever way the model is driven:

- One row per token a pass *processed*. The last token that `generate` returns was never processed and has no row;
  generation without a cache processes the whole prefix again in every pass and makes new rows for it. A sequence that
  has ended while others in its batch go on is fed padding tokens, which the model processes: they have rows, with
  `is_special` true.
- Padding (where the attention mask is 0) has no row. `position` counts tokens from 0, padding not included.
- A sequence goes on as long as its cache does, or, of a model that neither takes nor returns a cache, as long as its
  input is the previous input and one more token. Any other pass begins new sequences.
- A sequence is a hypothesis, not a place in the batch: beam search moves it between places, and when it branches,
  the first branch keeps the number and the others get one of their own (`parent_sequence_id`, `fork_position`) and
  the same tags. Copies of a cache branch in the same way.
- `parent_row` is the row of the token before, through every branching; following it gives the true history.
- In an encoder-decoder model both stacks have sequences of their own. Those of the encoder end with their pass; one of
  the decoder is a branch of the encoder's sequence it attends to, at position 0, so that no token is shared.
- Tokens taken back out of a cache (`crop`: rejected drafts) keep their rows; `row_events` says `rejected`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from strapfmt_capture.batches import Batch, Uncached
from strapfmt_capture.caches import CacheWatcher
from strapfmt_capture.encoders import Encoded, first_tensor, vectors_of
from strapfmt_capture.histories import PADDING, History
from strapfmt_capture.inputs import Inputs
from strapfmt_capture.keys import Keys
from strapfmt_capture.passes import Column, Step
from strapfmt_capture.tags import Tags
from strapfmt_capture.texts import TokenTexts

__all__ = ["RowTracker"]

_Int64 = NDArray[np.int64]


class RowTracker:
    """Numbers the rows of every forward pass and knows which token each of them is.

    Used from the thread that runs the model, one forward pass after another.

    Parameters
    ----------
    reserve : callable
        `reserve(kind, n)` returns the first of `n` consecutive new ids; kind is `"row"`, `"step"` or `"sequence"`.
    tokenizer : object or None
        Has `decode(list_of_ids)`, and `all_special_ids` if it knows any. None leaves text out.
    tags : mapping or None
        JSON values kept with every sequence.
    encoders : collection of torch.nn.Module
        All modules inside the encoder of an encoder-decoder model.

    Attributes
    ----------
    tags : Tags
        Those of the sequences that begin now.
    keys : Keys
        Which keys among them have been carried out.
    under_way : Step or None
        The pass that was described last, until its end.
    """

    def __init__(
        self,
        *,
        reserve: Callable[[Literal["row", "step", "sequence"], int], int],
        tokenizer: Any = None,
        tags: Mapping[str, Any] | None = None,
        encoders: Collection[torch.nn.Module] = (),
    ) -> None:
        self._reserve = reserve
        self._texts = None if tokenizer is None else TokenTexts(tokenizer)
        self.tags, self.keys = Tags(tags), Keys()
        self._watcher = CacheWatcher(self._reject)
        self._events: list[tuple[_Int64, int]] = []
        self._encoders, self._encoded = encoders, Encoded()
        self._uncached: Uncached | None = None
        self._awaiting: Callable[[Any], None] | None = None
        self._step = -1
        self.under_way: Step | None = None

    def begin(self, module: torch.nn.Module, inputs: Inputs | None) -> Step:
        """Describe the pass that has just begun.

        Parameters
        ----------
        module : torch.nn.Module
            The module that is called.
        inputs : Inputs or None
            What it is given, as `read_inputs` found it when it was called; not kept.
        """
        self._awaiting = None  # what a pass that failed has not returned
        if inputs is None:
            if module not in self._encoders:
                self.tags.check_kept()
            self._step = self._reserve("step", 1)
            self.under_way = Step(
                step=self._step,
                phase="prefill",
                n_sequences=0,
                n_query=0,
                selected=None,
                rows=np.empty(0, np.int64),
                tokens=None,
                sequences=None,
                events=self._event_columns(),
            )
            self._events = []
            return self.under_way
        if self.is_encoder(module):
            return self._encode(inputs)
        history = None if inputs.cache is None else self._followed(inputs)
        self._step = self._reserve(
            "step", 1
        )  # not earlier: what was just found missing was lost before this step
        if history is not None:
            batch = self._continued(history, inputs.real(history.length), history.n_tokens)
        elif inputs.cache is not None:
            past = inputs.past or 0
            batch = self._begun(inputs, inputs.real(past), past)
            self._watcher.watch(inputs.cache, batch.history)
        else:
            batch = self._without_cache(inputs)
            self._awaiting = partial(self._follow_made, batch.history)
        is_decode = inputs.n_query == 1 and batch.history.length > 0
        return self._record(inputs, batch, "decode" if is_decode else "prefill")

    def is_encoder(self, module: torch.nn.Module) -> bool:
        """Whether a pass of this module is one of the encoder of an encoder-decoder model."""
        return module in self._encoders

    def returned(self, output: Any) -> None:
        """Take note of what the module of the pass begun last has returned: a cache it has made, or what is encoded."""
        awaiting, self._awaiting = self._awaiting, None
        if awaiting is not None:
            awaiting(output)

    @property
    def next_step(self) -> int:
        """The number of the next step."""
        return self._reserve("step", 0)

    def end(self, status: str, reason: str | None) -> None:
        """Take note of what became of the pass that was described last."""
        self.under_way = None
        self.keys.step_ended(self._step, self.tags.begun, status, reason)
        self.tags.forget_begun()  # not before: an interrupt has this said again

    def end_block(self, problem: str | None) -> dict[str, Column] | None:
        """End a block of passes; return columns of `row_events`, for no step, if it was not carried out."""
        return self.keys.end_block(problem, self._step)

    def pass_by(self) -> None:
        """Passes follow that are not described: what an output brings is not the last one's."""
        self._awaiting = self._uncached = None

    def take_events(self) -> dict[str, Column] | None:
        """Return what has happened to rows since the last step, as columns of `row_events`, and forget it.

        `begin` hands events over with its step; this is for those after the last one.
        """
        columns, self._events = self._event_columns(), []
        return columns

    def _event_columns(self) -> dict[str, Column] | None:
        if not self._events:
            return None
        rows = np.concatenate([rows for rows, _ in self._events])
        return {
            "row": rows,
            "step": np.repeat([step for _, step in self._events], [len(rows) for rows, _ in self._events]),
            "event": ["rejected"] * len(rows),
            "detail": ["taken out of the cache"] * len(rows),
        }

    def close(self) -> None:
        """Stop watching: caches are as they were."""
        self._watcher.close()
        self._awaiting = self._uncached = None

    def _encode(self, inputs: Inputs) -> Step:
        """A pass of an encoder: new sequences, to be known when a decoder attends to them."""
        self._step = self._reserve("step", 1)
        batch = self._begun(inputs, inputs.real(0), 0)
        self._awaiting = partial(self._remember, batch.history)
        return self._record(inputs, batch, "encode")

    def _followed(self, inputs: Inputs) -> History | None:
        """The history behind a cache that was seen before, brought to the length the cache has now."""
        history = self._watcher.find(inputs.cache)
        if history is None or len(history) != inputs.n_sequences or not history.length:
            return None
        length = inputs.past
        if length is None or length == history.length:
            return history
        if length == 0:  # reset, to be used for something else
            return None
        if length < history.length:
            history.truncate(length, self._reject)
        else:
            history.extend_unknown(length, inputs.n_past_tokens(length))
        return history

    def _without_cache(self, inputs: Inputs) -> Batch:
        """A pass over whole sequences: new ones, or the last pass's with one more token each."""
        real, before = inputs.real(0), self._uncached
        slots = None if before is None else before.slots_of(inputs, real)
        if before is None or slots is None:
            batch = self._begun(inputs, real, 0)
        else:
            former = before.history
            history = History(former.sequence_ids[slots], former.n_prompt[slots], former.tags[slots])
            batch = self._continued(history, real, before.history.n_tokens[slots])
        self._uncached = None
        if inputs.token_ids is not None:
            self._uncached = Uncached(batch.history, inputs.token_ids.copy(), real, inputs.encoded)
        return batch

    def _continued(self, history: History, real: NDArray[np.bool_] | None, fork_positions: _Int64) -> Batch:
        """The sequences of `history`; slots that share one begin a new one at their fork position."""
        branching = history.branching(lambda n: self._reserve("sequence", n))
        return Batch(
            history=history,
            real=real,
            slots=np.arange(len(history)),
            counts=None if real is None else real.sum(axis=1),
            sequence_ids=history.sequence_ids if branching is None else branching.sequence_ids,
            positions=history.n_tokens,
            previous=history.last_row,
            branching=branching,
            fork_positions=fork_positions,
        )

    def _begun(self, inputs: Inputs, real: NDArray[np.bool_] | None, past: int) -> Batch:
        """New sequences, behind `past` places that nobody watched."""
        starts = inputs.starts()
        if starts is not None:
            return self._packed(inputs, starts)
        n = inputs.n_sequences
        counts = np.full(n, inputs.n_query) if real is None else real.sum(axis=1)
        encoded = inputs.encoded
        sources, tags = (None, None) if encoded is None else self._encoded.sequences_of(encoded)
        tags = self.tags.texts(n) if tags is None else self.tags.inherited(tags)
        first = self._reserve("sequence", n)
        history = History(np.arange(first, first + n), counts, tags)
        if past:
            history.extend_unknown(past, inputs.n_past_tokens(past))
        return Batch(
            history=history,
            real=real,
            slots=np.arange(n),
            counts=counts,
            sequence_ids=history.sequence_ids,
            positions=history.n_tokens,
            previous=history.last_row,
            tags=tags,
            sources=sources,
        )

    def _packed(self, inputs: Inputs, starts: NDArray[np.bool_]) -> Batch:
        """New sequences, several of them one after another in a row of the batch."""
        n, q = inputs.n_sequences, inputs.n_query
        places = np.flatnonzero(starts)
        slots, counts = places // q, np.diff(places, append=n * q)
        tags = self.tags.texts(len(places))
        first = self._reserve("sequence", len(places))
        sequence_ids = np.arange(first, first + len(places))
        last = np.diff(slots, append=n) > 0
        history = History(sequence_ids[last], counts[last], tags[last])
        # `append` will count the whole row; a cache made by this pass goes on with the last sequence in it.
        history.n_tokens = counts[last] - q
        return Batch(
            history=history,
            real=None,
            slots=slots,
            counts=counts,
            sequence_ids=sequence_ids,
            positions=np.zeros(len(places), np.int64),
            previous=np.full(len(places), PADDING),
            tags=tags,
        )

    def _record(self, inputs: Inputs, batch: Batch, phase: str) -> Step:
        """Number the rows of a batch, enter them into its history, and write its tables."""
        n, q = inputs.n_sequences, inputs.n_query
        n_rows = n * q if batch.real is None else int(np.count_nonzero(batch.real))
        first = self._reserve("row", n_rows) if n_rows else 0
        rows = np.arange(first, first + n_rows)
        selected = None if batch.real is None else np.flatnonzero(batch.real)
        tokens = batch.tokens(q)
        ids = None
        if inputs.token_ids is not None:
            ids = inputs.token_ids.reshape(-1) if selected is None else inputs.token_ids.reshape(-1)[selected]
        sequences = self._sequences(batch, ids)
        if batch.tags is not None and batch.counts is not None:
            self.tags.began(rows, batch.counts)
        if ids is not None:
            tokens.token_ids = ids.astype(np.int32)  # a copy, as the model may change its own
            if self._texts is not None:
                tokens.texts, tokens.is_special = self._texts.columns(ids)
        self.under_way = Step(
            step=self._step,
            phase=phase,
            n_sequences=n,
            n_query=q,
            selected=selected,
            rows=rows,
            tokens=tokens,
            sequences=sequences,
            events=self._event_columns(),
            history=batch.history,
        )
        # Behind it, so that no row or sequence is known that belongs to no step, wherever an interrupt strikes.
        self._events = []
        if batch.branching is not None:
            batch.history.branch(batch.branching)
        if batch.real is None and q == 1:
            batch.history.append_tokens(rows)
        elif batch.real is None:
            batch.history.append(rows.reshape(n, q))
        else:
            places = np.full((n, q), PADDING)
            places[batch.real] = rows
            batch.history.append(places)
        return self.under_way

    def _sequences(self, batch: Batch, ids: _Int64 | None) -> dict[str, Column] | None:
        """Columns of the `sequences` table: what begins in this pass, or branches off in it."""
        if batch.tags is not None:
            assert batch.counts is not None
            n = len(batch.sequence_ids)
            prompts = None if ids is None else np.split(ids, np.cumsum(batch.counts)[:-1])
            sources = np.full(n, -1) if batch.sources is None else batch.sources
            return {
                "sequence_id": batch.sequence_ids.copy(),
                "batch_index": batch.slots.astype(np.int32),
                "first_step": np.full(n, self._step),
                "parent_sequence_id": pa.array(sources, pa.int64(), mask=sources < 0),
                "fork_position": pa.array(np.zeros(n, np.int32), mask=sources < 0),
                "n_prompt_tokens": batch.counts.astype(np.int32),
                "prompt_token_ids": [None] * n
                if prompts is None
                else [prompt.tolist() for prompt in prompts],
                "prompt": [None] * n
                if prompts is None or self._texts is None
                else [self._texts.of_prompt(prompt) for prompt in prompts],
                "tags": batch.tags.tolist(),
            }
        if batch.branching is None:
            return None
        assert batch.fork_positions is not None
        slots = [slot for slot, _ in batch.branching.parents]
        n = len(slots)
        return {
            "sequence_id": batch.sequence_ids[slots],
            "batch_index": np.array(slots, np.int32),
            "first_step": np.full(n, self._step),
            "parent_sequence_id": np.array([parent for _, parent in batch.branching.parents]),
            "fork_position": batch.fork_positions[slots].astype(np.int32),
            "n_prompt_tokens": batch.history.n_prompt[slots].astype(np.int32),
            "prompt_token_ids": [None] * n,
            "prompt": [None] * n,
            "tags": batch.history.tags[slots].tolist(),
        }

    def _reject(self, rows: _Int64) -> None:
        if len(rows):
            self._events.append((rows, self._step))

    def _follow_made(self, history: History, output: Any) -> None:
        """Follow the cache that a pass has made and returned."""
        values = output.values() if isinstance(output, Mapping) else output
        for value in values if isinstance(values, Iterable) and not isinstance(values, torch.Tensor) else ():
            if hasattr(value, "get_seq_length") and self._watcher.find(value) is None:
                self._watcher.watch(value, history)
                self._uncached = None  # who goes on with this pass does so with its cache

    def _remember(self, history: History, output: Any) -> None:
        """Know what an encoder has made of its sequences."""
        vectors = vectors_of(first_tensor(output), len(history))
        if vectors is not None:
            self._encoded.remember(vectors, history.sequence_ids, history.tags)
