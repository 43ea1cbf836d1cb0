"""A sequence in order: its own history over beams, crops and drafts, and its activations."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strapfmt.errors import ArgumentError, RowNotFoundError
from strapfmt.reader import Reader
from strapfmt.schema import SiteSpec
from strapfmt.shard_reader import ShardReader
from strapfmt.writer import DatasetWriter

SITE = SiteSpec(name="x", dtype="float32", shape=(2,), statistics=())


def write_tokens(path: Path, tokens: list[tuple[int, int, int | None, int]]) -> None:
    """Write tokens (row, sequence, parent row, position) and one activation each, but for row 99."""
    with DatasetWriter(path) as writer:
        writer.add_site(SITE)
        n = len(tokens)
        columns: dict[str, Any] = {
            "row": [row for row, *_ in tokens],
            "step": [0] * n,
            "phase": ["decode"] * n,
            "batch_index": [0] * n,
            "sequence_id": [sequence for _, sequence, *_ in tokens],
            "position": [position for *_, position in tokens],
            "token_id": [None] * n,
            "token": [f"t{row}" if row != 3 else None for row, *_ in tokens],
            "is_special": [None] * n,
            "parent_row": [parent for _, _, parent, _ in tokens],
            "dropped": [row == 99 for row, *_ in tokens],
        }
        writer.write_table("tokens", columns)
        rows = np.array([row for row, *_ in tokens if row != 99])
        writer.write("x", np.repeat(rows[:, None], 2, 1).astype(np.float32), rows=rows)


@pytest.fixture
def reader(tmp_path: Path) -> Any:
    tokens = [
        (0, 0, None, 0),
        (1, 0, 0, 1),
        (2, 1, None, 0),
        (3, 1, 2, 1),
        (4, 0, 1, 2),  # a draft that was rejected
        (5, 0, 1, 2),  # what came instead
        (6, 2, 1, 2),  # a beam that forked from sequence 0
        (7, 2, 6, 3),
        (99, 3, 7, 4),
    ]
    write_tokens(tmp_path / "a.strap", tokens)
    with Reader(tmp_path / "a.strap") as reader:
        yield reader


@pytest.mark.parametrize(
    ("sequence", "rows"), [(0, [0, 1, 5]), (1, [2, 3]), (2, [0, 1, 6, 7]), (3, [0, 1, 6, 7, 99])]
)
def test_a_sequence_is_the_history_of_its_last_token(reader: Reader, sequence: int, rows: list[int]) -> None:
    view = reader.sequence(sequence)
    assert view.rows.tolist() == rows
    assert len(view) == len(rows)
    assert view.tokens["row"].to_pylist() == rows
    assert view.tokens["position"].to_pylist() == list(range(len(rows)))


def test_activations_come_in_the_order_of_the_tokens(reader: Reader) -> None:
    assert reader.sequence(2)["x"][:, 0].tolist() == [0, 1, 6, 7]
    assert list(reader.sequence(2).tensors(["x"])) == ["x"]


def test_texts_are_joined_where_there_are_any(reader: Reader) -> None:
    assert reader.sequence(2).text == "t0t1t6t7"
    assert reader.sequence(1).text == "t2"
    assert "4 tokens" in repr(reader.sequence(2))


def test_a_token_without_activation_is_named(reader: Reader) -> None:
    with pytest.raises(RowNotFoundError, match="99"):
        reader.sequence(3).tensors(["x"])


@pytest.mark.parametrize("wrong", [True, 1.0, "1", None, [1, 2], torch.tensor(1.0)])
def test_a_sequence_is_asked_for_by_number(reader: Reader, wrong: Any) -> None:
    with pytest.raises(ArgumentError, match="sequence_id: expected a whole number"):
        reader.sequence(wrong)


@pytest.mark.parametrize("number", [torch.tensor(1), np.int64(1), np.uint8(1)])
def test_a_number_of_any_kind_will_do(reader: Reader, number: Any) -> None:
    view = reader.sequence(number)
    assert view.rows.tolist() == [2, 3]
    assert repr(view).startswith("SequenceView(1: 2 tokens")


def test_tokens_are_read_once_for_all_sequences(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(reader.sequence(0)) == 3
    monkeypatch.setattr(ShardReader, "batch", None)
    assert [len(reader.sequence(number)) for number in (1, 2, 3)] == [2, 4, 5]


def test_an_unknown_sequence_says_which_there_are(reader: Reader) -> None:
    with pytest.raises(ArgumentError, match="no tokens of sequence 7; the dataset holds 0, 1, 2, 3"):
        reader.sequence(7)


def test_a_history_that_points_forward_or_in_circles_ends(tmp_path: Path) -> None:
    write_tokens(
        tmp_path / "b.strap", [(0, 0, 5, 0), (1, 0, 1, 1), (2, 0, 77, 2), (3, 0, 2, 3), (4, 0, -3, 4)]
    )
    with Reader(tmp_path / "b.strap") as reader:
        assert reader.sequence(0).rows.tolist() == [4]
