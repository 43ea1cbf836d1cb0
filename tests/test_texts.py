"""Text of tokens: whatever a tokenizer does, it costs its own text only, and the report says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_model

import strapfmt
from strapfmt.errors import ArgumentError
from strapfmt.reader import Reader
from strapfmt_capture.texts import ForgivingTokenizer, TokenTexts

IDS = torch.tensor([[5, 6, 7, 8]])


class Padded:
    """A tokenizer that knows ids up to 6 only, as a vocabulary that was padded for the model."""

    all_special_ids = None

    def __init__(self, beyond: Callable[[int], Any]) -> None:
        self.beyond = beyond

    def decode(self, ids: list[int]) -> Any:
        return next((self.beyond(number) for number in ids if number > 6), "x" * len(ids))


def fail(error: Exception) -> Callable[[int], Any]:
    def beyond(number: int) -> Any:
        raise error

    return beyond


@pytest.mark.parametrize(
    ("beyond", "reason"),
    [
        (fail(KeyError(7)), "KeyError: 7"),
        (fail(IndexError("no such piece")), "IndexError: no such piece"),
        (fail(OverflowError("too large")), "OverflowError: too large"),
        (lambda number: b"bytes", "TypeError: expected text, got bytes"),
        (lambda number: None, "TypeError: expected text, got NoneType"),
    ],
)
def test_tokens_without_a_text_are_null_and_counted(
    beyond: Callable[[int], Any], reason: str, tmp_path: Path
) -> None:
    model, path = tiny_model("gpt2"), tmp_path / "x.strap"
    with strapfmt.capture(model, path, sites="logits", tokenizer=Padded(beyond), quiet=True) as cap:
        model(input_ids=IDS)
        model(input_ids=IDS[:, :2])
    assert cap.report.notes == (
        "2 token ids and 1 prompts have no text, which is stored as null: the tokenizer's decode failed with "
        + reason,
    )
    reader = Reader(path)
    assert reader.tokens.to_arrow()["token"].to_pylist() == ["x", "x", None, None, "x", "x"]
    assert reader.tokens.to_arrow()["is_special"].to_pylist() == [False] * 6
    assert reader.sequences.to_arrow()["prompt"].to_pylist() == [None, "xx"]
    assert reader["logits"].n_rows == 6


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("\ud800", "\ufffd"),
        ("a\udc00b", "a\ufffdb"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\ufeffé", "\ufeffé"),
    ],
)
def test_text_that_utf_8_cannot_hold_is_replaced(text: str, stored: str, tmp_path: Path) -> None:
    model, path = tiny_model("gpt2"), tmp_path / "x.strap"
    tokenizer = Padded(lambda number: text)
    with strapfmt.capture(model, path, sites="logits", tokenizer=tokenizer, quiet=True) as cap:
        model(input_ids=IDS)
    assert cap.report.notes == ()
    assert Reader(path).tokens.to_arrow()["token"].to_pylist() == ["x", "x", stored, stored]


def test_a_tokenizer_that_fails_is_asked_once_for_each_id() -> None:
    calls = []

    def beyond(number: int) -> str:
        calls.append(number)
        raise KeyError(number)

    tokenizer = ForgivingTokenizer(Padded(beyond))
    texts = TokenTexts(tokenizer)
    assert tokenizer.note is None
    for _ in range(3):
        assert texts.columns(np.array([9, 8, 9]))[0] == [None] * 3
    assert sorted(calls) == [8, 9]
    assert str(tokenizer.note).startswith("2 token ids have no text")


def test_an_interrupt_while_decoding_is_no_failure_of_the_tokenizer() -> None:
    def beyond(number: int) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ForgivingTokenizer(Padded(beyond)).decode([9])


def test_special_ids_that_are_none_are_none(tmp_path: Path) -> None:
    tokenizer = Padded(str)
    tokenizer.all_special_ids = 3  # type: ignore[assignment]
    with pytest.raises(ArgumentError, match="expected all_special_ids to be token ids or None, got 3"):
        strapfmt.capture(tiny_model("gpt2"), tmp_path / "x.strap", sites="logits", tokenizer=tokenizer)
