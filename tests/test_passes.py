"""Columns of tokens, made of several passes at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from strapfmt.schema import TABLE_SCHEMAS
from strapfmt_capture.passes import Step, Tokens, token_columns


def array(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


def step(number: int, first_row: int, n_rows: int, tokens: Tokens | None, phase: str = "decode") -> Step:
    return Step(
        step=number,
        phase=phase,
        n_sequences=2,
        n_query=1,
        selected=None,
        rows=np.arange(first_row, first_row + n_rows),
        tokens=tokens,
        sequences=None,
        events=None,
    )


PROMPTS = step(
    3,
    10,
    5,
    Tokens(
        slots=array(0, 1, 2),
        sequence_ids=array(7, 8, 9),
        positions=array(0, 4, 0),
        previous=array(-1, 2, -1),
        counts=array(3, 2, 0),  # nothing but padding in the last one
        token_ids=np.array([1, 2, 3, 4, 5], np.int32),
        texts=["a", None, "c", "d", "e"],
        is_special=[True, False, False, False, False],
    ),
    "prefill",
)
DECODED = step(
    4,
    15,
    2,
    Tokens(
        slots=array(0, 1),
        sequence_ids=array(7, 8),
        positions=array(3, 6),
        previous=array(12, 14),
        token_ids=np.array([6, 7], np.int32),
        texts=["f", "g"],
        is_special=[False, True],
        dropped=np.array([False, True]),
    ),
)
EMBEDDED = step(
    6,
    17,
    1,
    Tokens(slots=array(0), sequence_ids=array(7), positions=array(4), previous=array(15)),
)
NOT_LANGUAGE = step(5, 17, 0, None)


def table(columns: Any) -> list[dict[str, Any]]:
    schema = TABLE_SCHEMAS["tokens"]
    assert set(columns) == set(schema.names)
    found: list[dict[str, Any]] = pa.table(
        [pa.array(columns[field.name], field.type) for field in schema], schema=schema
    ).to_pylist()
    return found


def test_runs_become_one_row_a_token() -> None:
    rows = table(token_columns([PROMPTS]))
    picked = ("row", "batch_index", "sequence_id", "position", "parent_row", "token_id", "token", "dropped")
    assert [tuple(row[name] for name in picked) for row in rows] == [
        (10, 0, 7, 0, None, 1, "a", False),
        (11, 0, 7, 1, 10, 2, None, False),
        (12, 0, 7, 2, 11, 3, "c", False),
        (13, 1, 8, 4, 2, 4, "d", False),
        (14, 1, 8, 5, 13, 5, "e", False),
    ]
    assert {(row["step"], row["phase"]) for row in rows} == {(3, "prefill")}


@pytest.mark.parametrize(
    "steps",
    [
        [DECODED, EMBEDDED],
        [PROMPTS, DECODED],
        [PROMPTS, DECODED, NOT_LANGUAGE, EMBEDDED],
        [EMBEDDED, EMBEDDED],
    ],
)
def test_several_passes_give_the_rows_of_each(steps: list[Step]) -> None:
    alone = [row for each in steps if each.tokens is not None for row in table(token_columns([each]))]
    assert table(token_columns(steps)) == alone


def test_what_is_not_known_is_null() -> None:
    (row,) = table(token_columns([EMBEDDED]))
    assert (row["token_id"], row["token"], row["is_special"], row["dropped"]) == (None, None, None, False)
    assert (row["position"], row["parent_row"]) == (4, 15)
