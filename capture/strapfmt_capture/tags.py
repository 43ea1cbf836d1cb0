"""Tags of sequences: those of the whole capture, and over them those of the blocks that are open."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strapfmt.done_keys import KEY, key_text
from strapfmt.errors import ArgumentError, CaptureError
from strapfmt_capture.arguments import tags_text
from strapfmt_capture.keys import Begun

__all__ = ["TagValues", "Tags", "checked_tags"]

TagValues = Mapping[str, Any] | Sequence[Mapping[str, Any]]


class Tags:
    """The tags of the sequences that begin now.

    Parameters
    ----------
    own : mapping or None
        JSON values kept with every sequence.
    """

    def __init__(self, own: Mapping[str, Any] | None) -> None:
        tags_text(own)
        self._layers: list[TagValues] = [dict(own or {})]
        self._merged: list[dict[str, Any]] = []
        self._set_common()
        self.begun = Begun()

    def push(self, tags: TagValues) -> None:
        """Lay `tags` (as `checked_tags` returns them) over those there are, until `pop`."""
        self._layers.append(tags)
        self._set_common()

    def pop(self, tags: TagValues) -> None:
        """Take a layer away again: this very one, as blocks may end in any order."""
        self._layers = [layer for layer in self._layers if layer is not tags]
        self._set_common()

    def texts(self, n: int) -> NDArray[np.object_]:
        """Return the tags of `n` sequences that begin in one pass, in batch order, as JSON text.

        Raises
        ------
        CaptureError
            If a block gives tags for another number of sequences.
        """
        if self._common is not None:
            text, self._merged = self._common[1], [self._common[0]] * n
            return np.full(n, text, object)
        for layer in self._layers:
            if not isinstance(layer, Mapping) and len(layer) != n:
                raise CaptureError(
                    f"tagged() was given tags for {len(layer)} sequences, and {n} begin in this pass; give one mapping "
                    "a sequence in batch order (generate runs each prompt num_beams or num_return_sequences times: "
                    "repeat its mapping as often), or one mapping for all"
                )
        self._merged = [
            _merged(layer if isinstance(layer, Mapping) else layer[i] for layer in self._layers)
            for i in range(n)
        ]
        return np.array([*map(tags_text, self._merged)], object)

    def inherited(self, texts: NDArray[np.object_]) -> NDArray[np.object_]:
        """Return `texts`, the tags that sequences which begin in one pass have from others, as `texts` does."""
        self._merged = [json.loads(text) for text in texts]
        return texts

    def began(self, rows: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
        """Take note of the sequences that `texts` was asked for: all their rows, and how many each has."""
        has_rows = counts > 0
        keys = {
            key_text(tags[KEY])
            for tags, is_stored in zip(self._merged, has_rows, strict=True)
            if is_stored and KEY in tags
        }
        self.begun = Begun(rows[(np.cumsum(counts) - counts)[has_rows]].tolist(), keys)

    def forget_begun(self) -> None:
        """Forget the sequences that began in the pass that is over."""
        self.begun = Begun()

    def check_kept(self) -> None:
        """Refuse a pass without sequences, which could not keep the tags of a block.

        Raises
        ------
        CaptureError
        """
        if len(self._layers) > 1:
            raise CaptureError(
                "tagged(): tags are kept with sequences, and this model is given no tokens under a name that is known "
                "(input_ids, ...), so it has none; leave tagged() out and use mark()"
            )

    def _set_common(self) -> None:
        """Put the tags together once, where all sequences have the same."""
        self._common: tuple[dict[str, Any], str] | None = None
        if all(isinstance(layer, Mapping) for layer in self._layers):
            merged = _merged(layer for layer in self._layers if isinstance(layer, Mapping))
            self._common = merged, tags_text(merged)


def _merged(layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what all layers hold; the last one that has a name counts."""
    return {name: value for layer in layers for name, value in layer.items()}


def checked_tags(tags: object) -> TagValues:
    """Return tags of a block, one mapping or a sequence of them, as copies.

    Raises
    ------
    ArgumentError
        If they are something else, or hold what JSON cannot.
    """
    if isinstance(tags, Mapping):
        tags_text(tags)
        return dict(tags)
    if isinstance(tags, (list, tuple)):
        for each in tags:
            if not isinstance(each, Mapping):
                raise ArgumentError(
                    f"tags: expected one mapping a sequence, got {type(each).__name__} among them"
                )
            tags_text(each)
        return [dict(each) for each in tags]
    raise ArgumentError(
        f"tags: expected a mapping, or a list of them, one a sequence in batch order; got {type(tags).__name__}"
    )
