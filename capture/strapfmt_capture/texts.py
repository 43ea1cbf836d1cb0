"""Text of single tokens, each decoded once; a tokenizer that fails costs its text and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from strapfmt.errors import ArgumentError

__all__ = ["ForgivingTokenizer", "TokenTexts", "special_ids"]

_REASON_CHARS = 200


class ForgivingTokenizer:
    """A tokenizer whose failures are counted, not raised: text goes with the values, and must not cost them.

    Vocabularies are often padded: models know ids that their tokenizers have no text for.

    Parameters
    ----------
    tokenizer : object
        Has `decode(list_of_ids)`, and `all_special_ids` if it knows any.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = tokenizer.decode
        self.all_special_ids = special_ids(tokenizer)
        self._tokens: set[int] = set()
        self._n_prompts, self._reason = 0, ""

    def decode(self, ids: list[int]) -> str | None:
        """Return the text of token ids, fit for UTF-8, or None if it cannot be had."""
        try:
            text = self._decode(ids)
            if not isinstance(text, str):
                raise TypeError(f"expected text, got {type(text).__name__}")
        except Exception as error:  # noqa: BLE001 - a tokenizer is anybody's code; `note` says what it raised
            if len(ids) == 1:
                self._tokens.update(ids)
            else:
                self._n_prompts += 1
            self._reason = self._reason or f"{type(error).__name__}: {error}"[:_REASON_CHARS]
            return None
        # Halves of surrogate pairs that belong together become one character, the others U+FFFD.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    @property
    def note(self) -> str | None:
        """What a person should know of the texts, None if there are all of them."""
        counts = [(len(self._tokens), "token ids"), (self._n_prompts, "prompts")]
        missing = " and ".join(f"{count} {what}" for count, what in counts if count)
        if not missing:
            return None
        return f"{missing} have no text, which is stored as null: the tokenizer's decode failed with {self._reason}"


class TokenTexts:
    """What a tokenizer says of token ids; null where it fails.

    Parameters
    ----------
    tokenizer : object
        Has `decode(list_of_ids)`, and `all_special_ids` if it knows any. A `ForgivingTokenizer` says afterwards what
        is missing.
    """

    def __init__(self, tokenizer: Any) -> None:
        known = isinstance(tokenizer, ForgivingTokenizer)
        self._tokenizer: ForgivingTokenizer = tokenizer if known else ForgivingTokenizer(tokenizer)
        self._special = self._tokenizer.all_special_ids
        self._known: dict[int, str | None] = {}

    def of_prompt(self, ids: npt.NDArray[np.int64]) -> str | None:
        """Text of a whole prompt, less placeholders for images and the like, whose ids are negative."""
        return self._tokenizer.decode(ids[ids >= 0].tolist())

    def columns(self, ids: npt.NDArray[np.int64]) -> tuple[list[str | None], list[bool]]:
        """Text and speciality of each token."""
        numbers = ids.tolist()
        known = self._known
        for number in set(numbers).difference(known):
            known[number] = self._tokenizer.decode([number]) if number >= 0 else None
        return [known[number] for number in numbers], [number in self._special for number in numbers]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that a tokenizer calls special, none if it does not say.

    Raises
    ------
    ArgumentError
        If `all_special_ids` is neither None nor ids.
    """
    ids = getattr(tokenizer, "all_special_ids", None)
    if ids is None:
        return frozenset()
    if not isinstance(ids, Iterable):
        raise ArgumentError(f"tokenizer: expected all_special_ids to be token ids or None, got {ids!r}")
    return frozenset(ids)
