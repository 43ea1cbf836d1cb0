"""Text of single tokens, each decoded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["TokenTexts"]


class TokenTexts:
    """What a tokenizer says of token ids.

    Parameters
    ----------
    tokenizer : object
        Has `decode(list_of_ids)`, and `all_special_ids` if it knows any.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode: Callable[[list[int]], str] = tokenizer.decode
        self._special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self._known: dict[int, str | None] = {}

    def of_prompt(self, ids: npt.NDArray[np.int64]) -> str:
        """Text of a whole prompt, less placeholders for images and the like, whose ids are negative."""
        return self._decode(ids[ids >= 0].tolist())

    def columns(self, ids: npt.NDArray[np.int64]) -> tuple[list[str | None], list[bool]]:
        """Text and speciality of each token."""
        numbers = ids.tolist()
        known = self._known
        for number in set(numbers).difference(known):
            known[number] = self._decode([number]) if number >= 0 else None
        return [known[number] for number in numbers], [number in self._special for number in numbers]
