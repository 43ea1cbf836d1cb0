"""The binary index: encoding, lookups, and everything that makes one refused."""

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strapfmt import spec
from strapfmt.arrowfile import digest
from strapfmt.errors import CorruptError, UnsupportedError
from strapfmt.index import BATCH_DTYPE, RUN_DTYPE, ShardIndex, find_runs

PREFIX = 800


def make_index(
    n_rows: tuple[int, ...] = (4, 4, 2), *, tail: bool = False, sealed: bool = True, runs: Any = None
) -> ShardIndex:
    batches = np.zeros(len(n_rows), BATCH_DTYPE)
    batches["n_rows"], batches["header_bytes"], batches["body_bytes"] = n_rows, 200, 64
    batches["offset"] = PREFIX + 264 * np.arange(len(n_rows))
    if tail:
        batches["offset"][-1] = PREFIX
    batches["first_ordinal"] = np.cumsum([0, *n_rows[:-1]])
    batches["header_hash"], batches["body_hash"] = np.void(b"h" * 16), np.void(b"b" * 16)
    end = PREFIX + 264 * len(n_rows)
    return ShardIndex(
        batches=batches,
        runs=np.array([(10, 0)] if runs is None else runs, RUN_DTYPE),
        n_rows=sum(n_rows),
        prefix_bytes=PREFIX,
        prefix_hash=b"p" * 16,
        trailer_offset=end if sealed else 0,
        trailer_bytes=300 if sealed else 0,
        trailer_hash=b"t" * 16,
        is_sealed=sealed,
        has_tail=tail,
    )


@pytest.mark.parametrize(
    "index", [make_index(), make_index(sealed=False), make_index(tail=True, sealed=False)]
)
def test_an_index_comes_back(index: ShardIndex) -> None:
    data = index.encode()
    assert len(data) == 128 + 96 * 3 + 16 + 16
    found = ShardIndex.decode(data, "x.idx")
    assert found.encode() == data
    assert (found.n_rows, found.is_sealed, found.has_tail) == (10, index.is_sealed, index.has_tail)
    np.testing.assert_array_equal(found.batches, index.batches)


def test_sizes_are_those_of_the_specification() -> None:
    assert BATCH_DTYPE.itemsize == spec.INDEX_BATCH_BYTES == 96
    assert RUN_DTYPE.itemsize == spec.INDEX_RUN_BYTES == 16
    assert len(make_index((1,), runs=[]).encode()) == spec.INDEX_HEADER_BYTES + 96 + 16


def test_where_the_data_ends() -> None:
    assert make_index().data_end() == PREFIX + 3 * 264 + 300
    assert make_index(sealed=False).data_end() == PREFIX + 3 * 264
    assert make_index(sealed=False, tail=True).data_end() == PREFIX + 2 * 264
    assert make_index((3,), sealed=False, tail=True).data_end() == PREFIX


def test_the_hash_of_the_data_covers_every_part() -> None:
    index = make_index()
    hashes = {index.data_hash()}
    for change in (
        {"prefix_hash": b"q" * 16},
        {"trailer_hash": b"u" * 16},
        {"batches": index.batches[::-1][:2]},
    ):
        hashes.add(replace(index, **change).data_hash())
    tail = make_index(sealed=False, tail=True)
    hashes |= {tail.data_hash(), tail.data_hash(tail=True)}
    assert len(hashes) == 6


def changed(**fields: Any) -> Callable[[ShardIndex], ShardIndex]:
    def change(index: ShardIndex) -> ShardIndex:
        batches = index.batches.copy()
        for name, value in fields.items():
            if name in BATCH_DTYPE.names:
                batches[name][1] = value
        others = {name: value for name, value in fields.items() if name not in BATCH_DTYPE.names}
        return replace(index, batches=batches, **others)

    return change


def runs_of(*runs: tuple[int, int]) -> Any:
    return np.array([(row, ordinal & (1 << 64) - 1) for row, ordinal in runs], RUN_DTYPE)


WRAP = (1 << 63) - 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (changed(n_rows=5), "first_ordinal"),
        (changed(n_rows=0), "at least 1"),
        (changed(first_ordinal=5), "first_ordinal"),
        (changed(first_ordinal=(1 << 64) - 1), "first_ordinal"),
        (changed(offset=PREFIX), "offset"),
        (changed(offset=(1 << 64) - 1), "2\\^62"),
        (changed(body_bytes=(1 << 63)), "2\\^62"),
        (changed(body_bytes=65), "offset"),
        (changed(header_bytes=0), "offset"),
        (changed(trailer_offset=0), "offset"),
        (changed(trailer_offset=(1 << 64) - 1), "offset"),
        (changed(prefix_bytes=(1 << 64) - 1), "offset"),
        (changed(has_tail=True), "tail"),
        (changed(runs=runs_of((10, 1))), "runs"),
        (changed(runs=runs_of((10, 0), (12, 5))), "runs"),
        (changed(runs=runs_of((10, 0), (20, 5), (30, 5))), "runs"),
        (changed(runs=runs_of((10, 0), (20, 10))), "runs"),
        (changed(runs=runs_of((20, 0), (10, 5))), "runs"),
        (changed(runs=runs_of((-1, 0))), "runs"),
        (changed(runs=runs_of(((1 << 62) + 1, 0))), "runs"),
        (changed(runs=runs_of(((1 << 63) - 4, 0))), "runs"),
        (changed(runs=runs_of((1, 0), (1, WRAP), (1, -2))), "runs"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(
    change: Callable[[ShardIndex], ShardIndex], problem: str
) -> None:
    with pytest.raises(CorruptError, match=problem):
        ShardIndex.decode(change(make_index()).encode(), "x.idx")


@pytest.mark.parametrize("size", [0, 7, 143, 144, 200])
def test_a_cut_index_is_refused(size: int) -> None:
    with pytest.raises(CorruptError, match=r"x\.idx"):
        ShardIndex.decode(make_index().encode()[:size], "x.idx")


@pytest.mark.parametrize("field", ["n_batches", "n_runs"])
def test_counts_beyond_the_file_are_refused_before_anything_is_allocated(field: str) -> None:
    data = bytearray(make_index().encode()[:-16])
    struct.pack_into("<Q", data, 16 if field == "n_batches" else 24, 1 << 60)
    with pytest.raises(CorruptError, match=r"need \d+ bytes"):
        ShardIndex.decode(bytes(data) + digest(bytes(data)), "x.idx")


def test_a_newer_index_is_unsupported_and_unknown_flags_are_corrupt() -> None:
    data = bytearray(make_index().encode()[:-16])
    data[8] = 2
    with pytest.raises(UnsupportedError, match="version 2"):
        ShardIndex.decode(bytes(data) + digest(bytes(data)), "x.idx")
    data[8], data[12] = 1, 4
    with pytest.raises(CorruptError):
        ShardIndex.decode(bytes(data) + digest(bytes(data)), "x.idx")


@settings(deadline=None)
@given(st.sets(st.integers(0, 60), min_size=1), st.integers(0, 1 << 40))
def test_runs_hold_exactly_the_rows(rows: set[int], first: int) -> None:
    array = np.array(sorted(rows), np.int64)
    runs = find_runs(array, first)
    ends = np.append(runs["ordinal"][1:], first + len(array)).astype(np.int64)
    found = [
        row + i
        for row, ordinal, end in zip(runs["row"], runs["ordinal"].astype(np.int64), ends, strict=True)
        for i in range(end - ordinal)
    ]
    assert found == array.tolist()
    assert len(runs) == sum(row - 1 not in rows for row in rows)
