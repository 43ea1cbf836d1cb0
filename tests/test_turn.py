"""What a turn of the drain makes of many small pieces is what each of them says."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from strapfmt.schema import SiteSpec
from strapfmt_capture.memory import Memory, aligned
from strapfmt_capture.statistics import STATISTICS, RowStatistics
from strapfmt_capture.turn import Block, Values, compute_statistics, pieces_of, statistics_of, values_of

N_BYTES = 1 << 16


def site(name: str, width: int, dtype: str = "float32", *, has_statistics: bool = True) -> SiteSpec:
    return SiteSpec(name=name, dtype=dtype, shape=(width,), statistics=STATISTICS if has_statistics else ())


ALIKE = [site("a", 16), site("b", 16), site("c", 16)]
PADDED = [site("d", 5), site("e", 5)]
MIXED = [site("f", 16), site("g", 8, "bfloat16"), site("h", 3, has_statistics=False), site("i", 16)]


class Writing:
    """Fills memory as hooks do, and knows what it has put there."""

    def __init__(self) -> None:
        self.memory = Memory(N_BYTES)
        self.memory.bytes[:] = 0
        self.position = self.n_rows = 0
        self.expected: dict[str, list[tuple[int, torch.Tensor]]] = {}

    def fill(self, spec: SiteSpec, rows: Any, start: int) -> None:
        x = torch.randn(len(rows), *spec.shape).to(spec.stored_dtype.torch)
        self.memory.view(start, x.dtype, tuple(x.shape)).copy_(x)
        self.expected.setdefault(spec.name, []).extend(zip(rows.tolist(), x, strict=True))

    def slot(self, n_bytes: int) -> int:
        if self.position % N_BYTES + n_bytes > N_BYTES:
            self.position += N_BYTES - self.position % N_BYTES
        start = self.position
        self.position += aligned(n_bytes)
        return start

    def rows(self, n: int) -> Any:
        self.n_rows += n
        return np.arange(self.n_rows - n, self.n_rows)

    def block(self, specs: list[SiteSpec], rows: Any) -> Block:
        at = start = self.slot(sum(aligned(len(rows) * spec.row_bytes) for spec in specs))
        for spec in specs:
            self.fill(spec, rows, at)
            at += aligned(len(rows) * spec.row_bytes)
        return Block(specs=list(specs), memory=self.memory, start=start, rows=rows)

    def values(self, spec: SiteSpec, rows: Any) -> Values:
        start = self.slot(len(rows) * spec.row_bytes)
        self.fill(spec, rows, start)
        return Values(
            spec=spec,
            dtype=spec.stored_dtype.torch,
            shape=spec.shape,
            n_rows=len(rows),
            memory=self.memory,
            start=start,
            rows=rows,
            token_row=None,
            call=0,
        )


def check(writing: Writing, items: list[Any]) -> list[Values]:
    """Compare rows, values and statistics of all sites with what was written, and return the values."""
    compute = RowStatistics()
    values = values_of(items)
    columns = compute_statistics(values, compute)
    pieces = list(pieces_of(values))
    stored: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for piece, statistics in zip(pieces, statistics_of(pieces, columns), strict=True):
        name = piece.spec.name
        assert piece.stored().flags.c_contiguous
        x = torch.from_numpy(piece.stored()).view(piece.spec.stored_dtype.torch)
        rows = piece.columns()["rows"]
        assert set(statistics) == set(piece.spec.statistics)
        for statistic, column in compute(x, piece.spec.statistics).items():
            np.testing.assert_array_equal(statistics[statistic], column, err_msg=f"{name}: {statistic}")
        stored.setdefault(name, []).extend(zip(rows.tolist(), x, strict=True))
    assert stored.keys() == writing.expected.keys()
    for name, expected in writing.expected.items():
        assert [row for row, _ in stored[name]] == [row for row, _ in expected], name
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(stored[name], expected, strict=True)), name
    return values


@pytest.mark.parametrize("specs", [ALIKE, PADDED, MIXED], ids=["alike", "padded", "mixed"])
@pytest.mark.parametrize("n_rows", [1, 3])
def test_blocks_of_several_steps_become_one_value_a_site(specs: list[SiteSpec], n_rows: int) -> None:
    writing = Writing()
    items = [writing.block(specs, writing.rows(n_rows)) for _ in range(7)]
    values = check(writing, items)
    assert [one.spec.name for one in values] == [spec.name for spec in specs]
    assert {one.n_blocks for one in values} == {7}


def test_two_blocks_a_step_are_two_sheets() -> None:
    writing = Writing()
    items: list[Any] = []
    for _ in range(5):
        rows = writing.rows(2)
        items += [
            writing.block(ALIKE, rows),
            writing.values(site("z", 40), rows),
            writing.block(PADDED, rows),
        ]
    values = check(writing, items)
    assert sorted(one.n_blocks for one in values) == [1] * 5 + [5] * 5


@pytest.mark.parametrize("seed", range(30))
def test_whatever_comes_nothing_is_lost_or_out_of_order(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    writing = Writing()
    first = writing.position = rng.randrange(0, N_BYTES, 64)
    items: list[Any] = []
    while writing.position < first + 0.8 * N_BYTES:
        rows = writing.rows(rng.choice([1, 1, 1, 2]))
        left = [*ALIKE, *PADDED, *MIXED]
        if rng.random() < 0.3:
            left = rng.sample(left, len(left) - 1)
        while left:
            n = rng.choice([1, 3, 3, len(left)])
            some, left = left[:n], left[n:]
            if rng.random() < 0.2:
                items += [writing.values(spec, rows) for spec in some]
            else:
                items.append(writing.block(some, rows))
        if rng.random() < 0.2:
            writing.slot(rng.randrange(1, 300))
        if rng.random() < 0.1:
            check(writing, items)
            writing.expected.clear()
            items = []
    if items:
        check(writing, items)
