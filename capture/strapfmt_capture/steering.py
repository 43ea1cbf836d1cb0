"""What a user says while a capture runs: tags of what follows, keys that are done, marks, and pauses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from strapfmt.done_keys import KEY, key_text, read_done_keys
from strapfmt.errors import ArgumentError
from strapfmt.json_fields import plain_json
from strapfmt_capture.arguments import tags_text
from strapfmt_capture.drain_home import DrainHome
from strapfmt_capture.items import Annotation
from strapfmt_capture.rings import Rings
from strapfmt_capture.rows import RowTracker
from strapfmt_capture.steps import Steps
from strapfmt_capture.tags import TagValues, checked_tags

__all__ = ["Steering"]

# They are written anew with every commit.
_MARKS_BYTES = 8 << 20


class Steering:
    """Steers a capture from the thread that runs the model, between its passes.

    Parameters
    ----------
    path : Path
        The dataset.
    rings, drain, tracker, steps
        Those of the capture.
    """

    def __init__(
        self, path: Path, *, rings: Rings, drain: DrainHome, tracker: RowTracker, steps: Steps
    ) -> None:
        self._path, self._rings, self._drain, self._tracker, self._steps = path, rings, drain, tracker, steps
        #: Read when first asked for.
        self._done: set[str] | None = None
        self._marks_bytes = 0

    @contextmanager
    def tagged(self, tags: object) -> Iterator[None]:
        """Lay tags over those of sequences that begin inside; with a key among them, all passes are one block."""
        layer = checked_tags(tags)
        self._steps.settle("tagged()")
        has_key = any(KEY in each for each in ([layer] if isinstance(layer, Mapping) else layer))
        is_block = has_key and not self._tracker.keys.is_in_block
        with ExitStack() as leaving:
            for _ in range(2):  # what an interrupt cuts off in one is left to the other
                leaving.push(partial(self._leave, layer, is_block))
            if is_block:
                self._tracker.keys.begin_block()
            self._tracker.tags.push(layer)
            yield

    def _leave(
        self, layer: TagValues, is_block: bool, kind: Any, error: BaseException | None, trace: Any
    ) -> None:
        """Undo as much of `tagged` as was done, and is not undone yet."""
        self._tracker.tags.pop(layer)
        if is_block and self._tracker.keys.is_in_block:  # else the capture has ended before
            self._steps.end_block(error)

    def done(self, key: object) -> bool:
        """Say whether the dataset holds a key, whole and durable."""
        text = key_text(key)
        if self._done is None:
            self._done = read_done_keys(self._path)
        self._done |= self._tracker.keys.take_durable(self._drain.n_committed_steps)
        return text in self._done

    def mark(self, name: str, attributes: Mapping[str, Any]) -> None:
        """Note the point that the run has reached."""
        if not isinstance(name, str) or not name:
            raise ArgumentError(f"mark: expected a name that is text, got {name!r}")
        n_bytes = len(tags_text({name: dict(attributes)}, "mark").encode())
        if self._marks_bytes + n_bytes > _MARKS_BYTES:
            raise ArgumentError(
                f"mark {name[:80]!r}: the marks of one capture may take {_MARKS_BYTES} bytes, as every commit writes "
                "them anew; mark the phases of a run, and keep what belongs to single sequences in their tags"
            )
        self._drain.check()
        self._marks_bytes += n_bytes
        record = {
            "name": name,
            "step": self._steps.number,
            "time_ns": time.time_ns(),
            "attributes": plain_json(attributes, "mark"),
        }
        self._rings.publish(Annotation(record=record))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record no passes inside; afterwards as before."""
        was_paused = self._steps.is_paused
        self._steps.pause()
        try:
            yield
        finally:
            if not was_paused:
                self._steps.resume()
