"""Datasets written without hooks: rows that a caller describes, and tensors from anywhere."""

from __future__ import annotations

import errno
import gc
import json
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import tiny_tokenizer

import strapfmt
import strapfmt_capture
from strapfmt.commit import Disk
from strapfmt.errors import ArgumentError, DatasetExistsError, WriteError, WriterClosedError
from strapfmt.reader import Reader


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def test_several_sites_share_the_rows_of_one_description(tmp_path: Path) -> None:
    one, two = torch.randn(3, 8), torch.randn(3, 2, 4).bfloat16()
    with strapfmt.create(tmp_path / "x.strap", tokenizer=tiny_tokenizer(), tags={"run": 1}) as rec:
        tokens = rec.tokens([2, 30, 31])
        rec.write("one", one, tokens=tokens)
        rec.write("two", two, tokens=tokens)
    reader = Reader(tmp_path / "x.strap")
    rows, tensors = reader.tensors(["one", "two"])
    assert rows.tolist() == tokens.rows.tolist() == [0, 1, 2]
    assert torch.equal(tensors["one"], one)
    assert torch.equal(bits(tensors["two"]), bits(two))
    table = reader.tokens.to_arrow().to_pylist()
    assert [row["token_id"] for row in table] == [2, 30, 31]
    assert [row["position"] for row in table] == [0, 1, 2]
    assert [row["parent_row"] for row in table] == [None, 0, 1]
    assert table[0]["is_special"] is True
    assert table[1]["token"] == tiny_tokenizer().decode([30])
    (sequence,) = reader.sequences.to_arrow().to_pylist()
    assert (sequence["n_prompt_tokens"], sequence["prompt_token_ids"]) == (3, [2, 30, 31])
    assert sequence["tags"] == '{"run": 1}'
    np.testing.assert_allclose(
        reader["one"].to_arrow(["l2_norm"])["l2_norm"].to_numpy(), one.norm(dim=1).numpy(), rtol=1e-6
    )


def test_tokens_may_be_described_in_the_call_itself(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        tokens = rec.write(
            "one", torch.zeros(3, 2), tokens={"token_ids": [5, 6, 7], "position": [10, 11, 12]}
        )
        assert tokens is not None
        rec.write("two", torch.zeros(3, 2), tokens=tokens)
        rec.write("one", torch.zeros(2, 2), tokens={})
    reader = Reader(tmp_path / "x.strap")
    assert reader.tokens.to_arrow()["position"].to_pylist() == [10, 11, 12, 0, 1]
    assert reader["two"].rows.tolist() == [0, 1, 2]


def test_sequences_go_on_over_calls_and_know_their_parents(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        prompt = rec.tokens([1, 2, 3, 4, 5], sequence_id=[0, 0, 0, 1, 1])
        rec.end_step()
        decoded = rec.tokens([6, 7], sequence_id=[1, 0], phase="decode")
        rec.end_step()
        again = rec.tokens([8], sequence_id=prompt.sequence_id[:1])
        apart = rec.tokens([9], sequence_id=1, position=[40])
    assert decoded.position.tolist() == [2, 3]
    assert (again.position.tolist(), apart.position.tolist()) == ([4], [40])
    reader = Reader(tmp_path / "x.strap")
    table = reader.tokens.to_arrow().to_pylist()
    assert [row["parent_row"] for row in table] == [None, 0, 1, None, 3, 4, 2, 6, None]
    assert [row["batch_index"] for row in table] == [0, 0, 0, 1, 1, 0, 1, 0, 0]
    assert [row["phase"] for row in table][4:6] == ["prefill", "decode"]
    assert reader.sequences.to_arrow()["sequence_id"].to_pylist() == [0, 1]
    steps = reader.steps.to_arrow().to_pylist()
    assert [(s["n_sequences"], s["n_query"], s["n_rows"], s["first_row"]) for s in steps] == [
        (2, 3, 5, 0),
        (2, 1, 2, 5),
        (2, 1, 2, 7),
    ]


def test_chosen_sequence_numbers_and_new_ones_do_not_meet(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        rec.tokens([1, 2], sequence_id=[7, 3])
        fresh = rec.tokens([3])
        rec.tokens([4], sequence_id=3)
    assert fresh.sequence_id.tolist() == [8]
    assert Reader(tmp_path / "x.strap").sequences.to_arrow()["sequence_id"].to_pylist() == [3, 7, 8]


def test_sequences_begin_in_any_order_of_numbers_and_survive_repair(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap", rank=2) as rec:
        rec.tokens([1, 2], sequence_id=[7, 3])
        rec.commit()
        rec.tokens([4], sequence_id=5)
        assert rec.tokens([4]).sequence_id.tolist() == [(2 << 40) + 8]
    base = 2 << 40
    stored = Reader(tmp_path / "x.strap").sequences.to_arrow()["sequence_id"].to_pylist()
    assert stored == [base + 3, base + 7, base + 5, base + 8]
    assert strapfmt.repair(tmp_path / "x.strap", tmp_path / "y.strap").is_complete
    assert Reader(tmp_path / "y.strap").sequences.to_arrow()["sequence_id"].to_pylist() == stored


def test_a_site_may_hold_some_of_the_tokens(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        tokens = rec.tokens(n=6)
        rec.write("last", torch.ones(2, 4), tokens=tokens[4:])
        rec.write("odd", torch.ones(3, 4), tokens=tokens[np.arange(6) % 2 == 1])
        rec.write("one", torch.ones(1, 4), tokens=tokens[torch.tensor([3])])
    reader = Reader(tmp_path / "x.strap")
    assert reader["last"].rows.tolist() == [4, 5]
    assert reader["odd"].rows.tolist() == [1, 3, 5]
    assert reader["one"].rows.tolist() == [3]


def test_without_tokens_a_site_numbers_its_own_rows(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        tokens = rec.tokens([1, 2, 3])
        rec.write("expert", torch.zeros(2, 4), token_row=tokens.rows[[2, 0]])
        rec.write("expert", torch.zeros(2, 4), token_row=torch.tensor([-1, 1]))
        rec.write("images", np.zeros((2, 3, 5), np.float16))
    reader = Reader(tmp_path / "x.strap")
    assert reader["images"].row_space == "own"
    assert reader["images"].shape == (3, 5)
    columns = reader["expert"].to_arrow(["row", "token_row", "call"]).to_pydict()
    assert columns == {"row": [0, 1, 2, 3], "token_row": [2, 0, None, 1], "call": [0, 0, 1, 1]}


def test_calls_go_on_behind_those_of_earlier_sessions(tmp_path: Path) -> None:
    for mode in ("create", "append", "append"):
        with strapfmt.create(tmp_path / "x.strap", mode=mode) as rec:
            for n in (2, 0, 1):
                rec.write("expert", torch.zeros(n, 4))
    columns = Reader(tmp_path / "x.strap")["expert"].to_arrow(["row", "call"]).to_pydict()
    assert columns == {"row": list(range(9)), "call": [0, 0, 1, 3, 3, 4, 6, 6, 7]}


def test_rows_in_a_list_may_be_no_wider_than_the_format_holds(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        for wide in (
            torch.empty(1 << 31, 0),
            torch.empty(0, 1 << 31),
            torch.zeros(1).expand(1 << 16, 1 << 15),
        ):
            with pytest.raises(
                ArgumentError, match="site 'x': expected sizes, and values in a row, of at most"
            ):
                rec.write("x", [torch.ones(2, 3), wide], tokens={"token_ids": [1, 2]})
        rec.write("x", [torch.ones(2, 3), torch.ones(0, 3)])
    reader = Reader(tmp_path / "x.strap")
    assert len(reader.tokens) == 0
    assert reader["x"].to_arrow(["shape"])["shape"].to_pylist() == [[2, 3], [0, 3]]


def test_tensors_of_different_shapes_make_a_ragged_site(tmp_path: Path) -> None:
    patterns = [torch.rand(2, n) for n in (3, 1, 4)]
    with strapfmt.create(tmp_path / "x.strap") as rec:
        tokens = rec.tokens(n=3)
        rec.write("pattern", patterns, tokens=tokens, shape=(2, -1))
        rec.write("any", [torch.zeros(2), torch.zeros(5)])
    reader = Reader(tmp_path / "x.strap")
    assert (reader["pattern"].shape, reader["any"].shape) == ((2, -1), (-1,))
    table = reader["pattern"].to_arrow().to_pydict()
    assert table["shape"] == [[2, 3], [2, 1], [2, 4]]
    for found, pattern in zip(table["activation"], patterns, strict=True):
        np.testing.assert_array_equal(np.float32(found), pattern.flatten().numpy())
    np.testing.assert_allclose(table["abs_max"], [p.max() for p in patterns], rtol=1e-6)


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(6.0).reshape(2, 3).t(),
        torch.randn(3, 2, requires_grad=True),
        np.arange(6).reshape(3, 2),
        np.arange(6, dtype=">f4").reshape(3, 2),
        torch.tensor([True, False, True]),
        torch.randn(3, 2).to(torch.float8_e5m2),
    ],
)
def test_values_arrive_as_they_are(values: Any, tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        rec.write("x", values)
    found = Reader(tmp_path / "x.strap")["x"].tensor()
    expected = (
        values.detach()
        if isinstance(values, torch.Tensor)
        else torch.from_numpy(values.astype(values.dtype.newbyteorder("=")))
    )
    assert torch.equal(bits(found), bits(expected))


def test_read_only_arrays_are_taken_and_later_changes_do_not_matter(tmp_path: Path) -> None:
    frozen = np.ones((2, 3), np.float32)
    frozen.flags.writeable = False
    changing = torch.ones(100_000, 16)
    with strapfmt.create(tmp_path / "x.strap") as rec:
        rec.write("frozen", frozen)
        rec.write("changing", changing)
        changing.zero_()
    reader = Reader(tmp_path / "x.strap")
    assert reader["frozen"].tensor().eq(1).all()
    assert reader["changing"].tensor().eq(1).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rec: rec.write("x", torch.zeros(2, 5)), r"'x': expected float32 .*\(4,\).*got float32 \(5,\)"),
        (lambda rec: rec.write("x", torch.zeros(2, 4).half()), "got float16"),
        (lambda rec: rec.write("x", torch.zeros(2, 4), tokens=rec.tokens(n=2)), "row space 'own'"),
        (lambda rec: rec.write("y", torch.zeros(2, 4), tokens=rec.tokens(n=3)), "expected one row a token, 3; got 2"),
        (lambda rec: rec.write("y", torch.zeros(2, 4), tokens={"token_ids": [1]}), r"of one length.*'n': 2"),
        (lambda rec: rec.write("y", torch.tensor(1.0)), r"expected a tensor \[n, \*shape\]"),
        (lambda rec: rec.write("y", torch.zeros(2, 2, dtype=torch.complex64)), "complex64"),
        (lambda rec: rec.write("y", np.array(["a"])), "site 'y'"),
        (lambda rec: rec.write("y", []), "got none"),
        (lambda rec: rec.write("y", [torch.zeros(2), torch.zeros(2, 2)]), "of one dtype and number of dimensions"),
        (lambda rec: rec.write("y", torch.zeros(2, 4), token_row=[1]), r"token_row: expected one a row, \[2\]"),
        (lambda rec: rec.write("y", torch.zeros(2, 4), token_row=[-2, 0]), "token_row"),
        (lambda rec: rec.write("y", torch.zeros(1, 4), tokens=rec.tokens(n=1), token_row=[0]), "leave out tokens"),
        (lambda rec: rec.write("y", torch.zeros(2, 4), tokens=rec.tokens(n=2)[[1, 0]]), "strictly increasing"),
        (lambda rec: rec.tokens([1, 2], position=[1]), "of one length"),
        (lambda rec: rec.tokens(), "got none"),
        (lambda rec: rec.tokens([1.5]), "token_ids: expected whole numbers"),
        (lambda rec: rec.tokens([1], sequence_id=1 << 41), "sequence_id: expected numbers"),
        (lambda rec: rec.tokens([1], phase="training"), "phase"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_the_rest_goes_on(call: Any, message: str, tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        rec.write("x", torch.zeros(3, 4))
        with pytest.raises(ArgumentError, match=message):
            call(rec)
        rec.write("x", torch.zeros(1, 4))
    reader = Reader(tmp_path / "x.strap")
    assert reader["x"].n_rows == 4
    assert reader.report.is_clean


def test_an_exception_keeps_what_was_written_and_marks_the_step(tmp_path: Path) -> None:
    def body(rec: Any) -> None:
        rec.write("x", torch.zeros(2, 4), tokens=rec.tokens(n=2))
        rec.end_step()
        rec.write("x", torch.zeros(1, 4), tokens=rec.tokens(n=1))
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError) as caught, strapfmt.create(tmp_path / "x.strap") as rec:
        body(rec)
    assert "closed" in caught.value.__notes__[0]
    reader = Reader(tmp_path / "x.strap")
    assert reader.report.is_clean
    assert reader["x"].n_rows == 3
    assert reader.steps.to_arrow()["status"].to_pylist() == ["complete", "abandoned"]
    assert reader.row_events.to_arrow()["row"].to_pylist() == [2]


def test_a_failing_disk_is_raised_and_never_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def body(rec: Any) -> None:
        rec.write("x", torch.zeros(2, 4))
        rec.commit()
        monkeypatch.setattr(Disk, "write", fail)
        rec.write("x", torch.zeros(500_000, 4))

    with pytest.raises(WriteError, match="No space left"), strapfmt.create(tmp_path / "x.strap") as rec:
        body(rec)
    assert Reader(tmp_path / "x.strap")["x"].n_rows == 2


def test_a_commit_can_be_read_while_writing_goes_on(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        rec.write("x", torch.zeros(2, 4))
        rec.commit()
        rec.write("x", torch.zeros(3, 4))
        assert Reader(tmp_path / "x.strap")["x"].n_rows == 2
    assert Reader(tmp_path / "x.strap")["x"].n_rows == 5


def test_modes_and_ranks(tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    for rank in (0, 1):
        with strapfmt.create(path, rank=rank) as rec:
            rec.write("x", torch.zeros(2, 4), tokens=rec.tokens([1, 2], sequence_id=[5, 5]))
    with pytest.raises(DatasetExistsError):
        strapfmt.create(path, rank=1)
    with strapfmt.create(path, rank=1, mode="append") as rec:
        rec.write("x", torch.zeros(1, 4), tokens=rec.tokens([3], sequence_id=5, position=2))
        with pytest.raises(ArgumentError, match="began in an earlier session"):
            rec.tokens([3], sequence_id=4)
    reader = Reader(path)
    first = 1 << 40
    assert reader["x"].rows.tolist() == [0, 1, first, first + 1, first + 2]
    assert reader.tokens.to_arrow()["sequence_id"].to_pylist() == [5, 5, *[first + 5] * 3]
    assert reader.sequences.to_arrow()["sequence_id"].to_pylist() == [5, first + 5]


def test_options_reach_the_dataset(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap", codec="zstd", stats=["abs_max"]) as rec:
        rec.write("x", torch.zeros(2, 4), module_path="model.layers.0")
        assert rec.summary().n_rows == 2
    reader = Reader(tmp_path / "x.strap")
    assert (reader["x"].codec, reader["x"].statistics, reader["x"].spec.module_path) == (
        "zstd",
        ("abs_max",),
        "model.layers.0",
    )
    assert reader.manifests[0].sessions[0]["tool"] == "strapfmt.create"
    report = reader.report.sites[0]
    assert (report.expected, report.written, report.dropped) == (2, 2, 0)


@pytest.mark.parametrize("options", [{"codec": "gzip"}, {"stats": ["x"]}, {"tags": {"a": {1}}}])
def test_a_mistake_is_found_before_anything_is_created(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError):
        strapfmt.create(tmp_path / "x.strap", **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_can_be_written_after_closing(tmp_path: Path) -> None:
    rec = strapfmt.create(tmp_path / "x.strap")
    rec.write("x", torch.zeros(2, 4))
    rec.close()
    rec.close()
    with pytest.raises(WriterClosedError):
        rec.write("x", torch.zeros(2, 4))


def n_threads() -> int:
    return sum(thread.name.startswith("strapfmt") for thread in threading.enumerate())


def test_a_recorder_that_is_dropped_gives_its_rank_back_and_says_so(tmp_path: Path) -> None:
    before = n_threads(), len(os.listdir("/proc/self/fd"))
    rec = strapfmt.create(tmp_path / "x.strap")
    rec.write("x", torch.zeros(2, 4))
    rec.commit()
    rec.write("x", torch.zeros(2, 4))
    with pytest.warns(ResourceWarning, match=r"x\.strap: this recorder was dropped without close"):
        del rec
    assert (n_threads(), len(os.listdir("/proc/self/fd"))) == before
    with strapfmt.create(tmp_path / "x.strap", mode="append") as rec:
        rec.write("x", torch.ones(1, 4))
    assert Reader(tmp_path / "x.strap")["x"].tensor()[:, 0].tolist() == [0, 0, 1]


def test_a_recorder_in_a_cycle_may_be_collected_in_the_thread_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("strapfmt_capture.recorder._PATIENCE_S", 0.1)
    gc.disable()  # only where the test says so
    try:
        rec = strapfmt.create(tmp_path / "x.strap")
        io = rec._writer._io
        cycle: list[Any] = [rec]
        cycle.append(cycle)
        del rec, cycle

        def collect() -> None:
            with pytest.warns(ResourceWarning, match="dropped without close"):
                gc.collect()

        io.submit(collect)
        io._thread.join(60)
    finally:
        gc.enable()
    assert not io._thread.is_alive()
    io.check()
    strapfmt.create(tmp_path / "x.strap", mode="append").close()


def test_a_recorder_that_ended_is_dropped_without_a_word(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rec = strapfmt.create(tmp_path / "x.strap")
        rec.close()
        del rec
        with pytest.raises(KeyError), strapfmt.create(tmp_path / "y.strap") as rec:
            raise KeyError
        del rec
        gc.collect()
    assert [warning for warning in caught if "dropped" in str(warning.message)] == []


def test_the_first_write_may_be_empty(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        rec.write("x", torch.zeros(0, 4), tokens=rec.tokens(n=0))
        rec.write("x", torch.ones(1, 4), tokens=rec.tokens(n=1))
    assert Reader(tmp_path / "x.strap")["x"].tensor().tolist() == [[1.0] * 4]


@pytest.mark.parametrize(
    "arguments",
    [
        {"token_ids": [5, 2**32 + 7]},
        {"token_ids": torch.tensor([2**31])},
        {"token_ids": np.array([2**64 - 1], np.uint64)},
        {"n": 1, "position": [2**31 + 3]},
        {"n": 1, "sequence_id": np.array([2**63], np.uint64)},
        {"token_ids": [[1], [2, 3]]},
        {"token_ids": ["a"]},
        {"token_ids": np.ma.masked_array([1, 2], [False, True])},
        {"n": -3},
        {"n": 3.0},
    ],
)
def test_a_description_that_is_refused_writes_nothing(arguments: dict[str, Any], tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        with pytest.raises(ArgumentError, match="expected"):
            rec.tokens(**arguments)
        assert rec.tokens([1]).rows.tolist() == [0]
    reader = Reader(tmp_path / "x.strap")
    assert (len(reader.tokens), len(reader.sequences)) == (1, 1)


def test_positions_that_would_leave_int32_by_going_on_are_refused(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec:
        last = rec.tokens(n=1, position=[2**31 - 1])
        with pytest.raises(ArgumentError, match="position"):
            rec.tokens(n=1, sequence_id=last.sequence_id)
    assert Reader(tmp_path / "x.strap").tokens.to_arrow()["position"].to_pylist() == [2**31 - 1]


def test_rows_of_another_dataset_and_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec, strapfmt.create(tmp_path / "y.strap") as other:
        tokens, strange = rec.tokens([1, 2]), other.tokens([3, 4])
        with pytest.raises(ArgumentError, match="made for another dataset"):
            rec.write("a", torch.zeros(1, 2), tokens=strange[:1])
        made = strapfmt_capture.TokenRows(np.array([77]), np.array([0]), np.array([0]))
        for arguments in ({"token_row": [77]}, {"token_row": [(5 << 40) + 1]}, {"tokens": made}):
            with pytest.raises(ArgumentError, match=r"expected rows of the tokens table"):
                rec.write("a", torch.zeros(1, 2), **arguments)
        rec.write("a", torch.zeros(2, 2), tokens=tokens)
    with strapfmt.create(tmp_path / "x.strap", mode="append") as rec:
        rec.write("b", torch.zeros(2, 2), tokens=tokens)  # the same dataset, a later session
    assert Reader(tmp_path / "x.strap").names == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        (None, {}),
        ([1.0, 2.0], {}),
        (torch.eye(2).to_sparse(), {}),
        (torch.zeros(2, 2, device="meta"), {}),
        (np.ma.masked_array([[1.0]], [[True]]), {}),
        (torch.zeros(3, 2), {"tokens": [1, 2, 3]}),
        (torch.zeros(3, 2), {"tokens": {"foo": 3}}),
        (torch.zeros(3, 2), {"tokens": {"n": 2}}),
        (torch.zeros(3, 2), {"tokens": {}, "site": None}),
        ([torch.zeros(3, 2)], {"tokens": {}, "shape": (2, -1)}),
    ],
)
def test_values_that_are_refused_write_nothing(
    values: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    with strapfmt.create(tmp_path / "x.strap") as rec, pytest.raises(ArgumentError, match="expected"):
        rec.write(values=values, **{"site": "a", **arguments})
    reader = Reader(tmp_path / "x.strap")
    assert (reader.names, len(reader.tokens)) == ([], 0)


def test_tokens_of_one_call_may_differ_in_phase_and_their_sequences_in_tags(tmp_path: Path) -> None:
    with strapfmt.create(tmp_path / "a.strap", tags={"run": 1, "who": "all"}) as recorder:
        recorder.tokens(
            [5, 6, 7],
            sequence_id=[0, 0, 1],
            phase=["prefill", "prefill", "decode"],
            tags={1: {"who": "one"}},
        )
        recorder.end_step()
        recorder.tokens([8, 9], sequence_id=[0, 1], phase=["decode", "decode"])
    dataset = strapfmt.open(tmp_path / "a.strap")
    phases = [phase for (phase,) in dataset.sql("select phase from tokens order by row").fetchall()]
    assert phases == ["prefill", "prefill", "decode", "decode", "decode"]
    assert dataset.sql("select phase from steps order by step").fetchall() == [("prefill",), ("decode",)]
    tags = dataset.sql("select tags from sequences order by sequence_id").fetchall()
    assert [json.loads(text) for (text,) in tags] == [{"run": 1, "who": "all"}, {"run": 1, "who": "one"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"phase": ["prefill"], "n": 2}, "phase: expected one, or one a token, 2; got 1"),
        ({"phase": ["prefill", "x"], "n": 2}, "got 'x'"),
        ({"n": 1, "tags": {0: {}}}, "expected sequence_id beside them"),
        ({"sequence_id": [0], "tags": {3: {}}}, "begin with these tokens, got 3"),
        ({"sequence_id": [0], "tags": {0: "x"}}, "tags of sequence 0: expected a mapping"),
        ({"sequence_id": [0], "tags": {0: {1: 2}}}, "keys that are text"),
    ],
)
def test_phases_and_tags_that_fit_no_token_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with strapfmt.create(tmp_path / "a.strap") as recorder:
        with pytest.raises(ArgumentError, match=message):
            recorder.tokens(**options)
        recorder.tokens([5], sequence_id=[0])
    assert strapfmt.open(tmp_path / "a.strap").sql("select count(*) from tokens").fetchall() == [(1,)]
