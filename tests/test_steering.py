"""Steering a capture: tags, keys that are done, marks, pauses, a disk that fills up, captures inside one another."""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_model

import strapfmt
from strapfmt.commit import Disk
from strapfmt.done_keys import key_text, read_done_keys
from strapfmt.errors import (
    ArgumentError,
    CaptureError,
    CorruptError,
    DiskSpaceError,
    DrainError,
    RingFullError,
    SiteNeverFiredError,
)
from strapfmt.manifest import Manifest
from strapfmt_capture.disk_space import DiskSpace, PassSize

SITE = "blocks.0.resid_post"
PROMPT = torch.arange(3, 9)[None]


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def capture(model: torch.nn.Module, path: Path, **options: Any) -> Any:
    return strapfmt.capture(model, path, **{"sites": SITE, "quiet": True, **options})


def batch(*lengths: int, start: int = 3) -> dict[str, torch.Tensor]:
    """Left-padded prompts that all differ."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    for i, n in enumerate(lengths):
        ids[i, width - n :] = torch.arange(n) + start + 10 * i
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def tags_of(path: Path) -> list[dict[str, Any]]:
    """Tags of every sequence, by its number."""
    with strapfmt.open(path) as ds:
        found = ds.sequences.to_arrow(["sequence_id", "tags"]).to_pylist()
    return [json.loads(row["tags"]) for row in sorted(found, key=lambda row: row["sequence_id"])]


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


class Failing(torch.nn.Module):
    """A model that fails when it is told to, after its site has fired."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Identity()
        self.error: BaseException | None = None

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.one(input_ids[..., None].expand(*input_ids.shape, 8).float())
        if self.error is not None:
            raise self.error
        return x


# Tags.


def test_sequences_that_begin_inside_have_the_tags_of_the_block(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    with capture(model, path, tags={"run": 1, "split": "train"}) as cap:
        model(PROMPT)
        with cap.tagged({"split": "test", "doc": "a"}):
            model(PROMPT)
            with cap.tagged({"doc": "b"}):
                model(PROMPT)
            model(PROMPT)
        model(PROMPT)
    own, inside = {"run": 1, "split": "train"}, {"run": 1, "split": "test", "doc": "a"}
    assert tags_of(path) == [own, inside, {**inside, "doc": "b"}, inside, own]


def test_a_list_gives_each_sequence_of_the_batch_its_own(model: Any, tmp_path: Path) -> None:
    path, docs = tmp_path / "x.strap", [{"doc": n, "long": n > 1} for n in range(3)]
    with capture(model, path, tags={"run": 1, "doc": None}) as cap, cap.tagged(docs):
        model(**batch(2, 5, 3))
        with cap.tagged({"long": "?"}):
            model(**batch(4, 1, 1))
    assert tags_of(path) == [{"run": 1, **doc} for doc in docs] + [
        {"run": 1, **doc, "long": "?"} for doc in docs
    ]


def test_packed_sequences_have_the_tags_of_their_order(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    with capture(model, path) as cap, cap.tagged([{"n": 0}, {"n": 1}, {"n": 2}]):
        model(input_ids=PROMPT, position_ids=positions, use_cache=False)
    assert tags_of(path) == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_a_list_of_another_length_is_refused_naming_both(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    with capture(model, path) as cap:
        with cap.tagged([{"doc": 1}, {"doc": 2}]):
            with pytest.raises(CaptureError, match=r"tags for 2 sequences, and 3 begin"):
                model(**batch(2, 2, 2))
            with pytest.raises(CaptureError, match=r"tags for 2 sequences, and 6 begin.*num_beams"):
                model.generate(**batch(2, 3), num_beams=3, max_new_tokens=2, do_sample=False)
            model(**batch(2, 3))
        model(PROMPT)
    assert tags_of(path) == [{"doc": 1}, {"doc": 2}, {}]
    assert cap.report.n_steps == 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_that_branch_have_the_tags_of_their_parent(model: Any, tmp_path: Path, use_cache: bool) -> None:
    path = tmp_path / "x.strap"
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with capture(model, path) as cap, cap.tagged([{"doc": doc} for doc in "ab" for _ in range(3)]):
        model.generate(**batch(4, 6), use_cache=use_cache, **options)
    with strapfmt.open(path) as ds:
        rows = ds.sequences.to_arrow().to_pylist()
    doc = {row["sequence_id"]: json.loads(row["tags"])["doc"] for row in rows}
    parents = {row["sequence_id"]: row["parent_sequence_id"] for row in rows}
    assert [doc[sequence] for sequence in sorted(doc)[:6]] == list("aaabbb")
    assert sum(parent is not None for parent in parents.values()) > 2
    assert all(doc[sequence] == doc[parent] for sequence, parent in parents.items() if parent is not None)


def test_copies_of_a_cache_have_its_tags_whatever_block_is_open(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    with capture(model, path) as cap:
        with cap.tagged({"doc": "a"}):
            cache = model(PROMPT, use_cache=True).past_key_values
        with cap.tagged({"doc": "b"}):
            model(PROMPT[:, :1], past_key_values=deepcopy(cache))
            model(PROMPT[:, :1], past_key_values=cache)
    assert tags_of(path) == [{"doc": "a"}] * 2


def test_tags_that_json_cannot_hold_are_refused_before_anything(model: Any, tmp_path: Path) -> None:
    with capture(model, tmp_path / "x.strap") as cap:
        for wrong in (
            {"a": {1, 2}},
            {1: 2},
            [{"a": 1}, {"a": float("nan")}],
            [1],
            "key",
            None,
            {"a": "\ud800"},
        ):
            with pytest.raises(ArgumentError, match="tags"), cap.tagged(wrong):
                model(PROMPT)
        model(PROMPT)
    assert tags_of(tmp_path / "x.strap") == [{}]


def test_tags_are_copies(model: Any, tmp_path: Path) -> None:
    tags = {"doc": 1}
    with capture(model, tmp_path / "x.strap") as cap, cap.tagged(tags):
        tags["doc"] = 2
        model(PROMPT)
    assert tags_of(tmp_path / "x.strap") == [{"doc": 1}]


def test_a_model_without_tokens_cannot_keep_tags(tmp_path: Path) -> None:
    linear = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with capture(linear, tmp_path / "x.strap", sites="0") as cap:
        linear(torch.ones(1, 2))
        with cap.tagged({"doc": 1}), pytest.raises(CaptureError, match="tags are kept with sequences"):
            linear(torch.ones(1, 2))
        linear(torch.ones(1, 2))
    assert cap.report.n_steps == 2


# Keys.


def test_a_key_is_done_when_it_is_committed_and_not_before(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    with capture(model, path, commit_interval_s=1000) as cap:
        assert not cap.done("a")
        with cap.tagged({"key": "a"}):
            model(PROMPT)
        wait_until(lambda: cap.report.sites[0].written == 6)
        assert not cap.done("a")
    assert cap.done("a")
    assert not cap.done("b")
    with capture(model, path, mode="append", commit_interval_s=0) as cap:
        assert cap.done("a")
        assert not cap.done("b")
        with cap.tagged({"key": "b"}):
            model(PROMPT)
            assert not cap.done("b")
        wait_until(lambda: cap.done("b"))
        with strapfmt.open(path) as ds:  # a commit of the live writer
            assert {"key": "b"} in [json.loads(tags) for tags in ds.sequences.to_arrow()["tags"].to_pylist()]
    assert read_done_keys(path) == {'"a"', '"b"'}


def test_keys_are_compared_as_json(model: Any, tmp_path: Path) -> None:
    path, keys = tmp_path / "x.strap", [1, "1", True, 1.5, None, ["a", {"b": 1, "c": 2}], "ä\n"]
    with capture(model, path) as cap:
        for key in keys:
            with cap.tagged({"key": key}):
                model(PROMPT)
        with pytest.raises(ArgumentError, match="key: expected a JSON value"):
            cap.done({1, 2})
    with capture(model, path, mode="append") as cap:
        model(PROMPT)
        assert all(cap.done(key) for key in [*keys, ["a", {"c": 2, "b": 1}]])
        assert not any(cap.done(key) for key in [2, "true", False, 0, "null", [], "a"])


def test_a_batch_may_hold_several_keys(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    with capture(model, path, tags={"key": "own"}) as cap, cap.tagged([{"key": "a"}, {}, {"key": "b"}]):
        model(**batch(2, 3, 4))
    assert read_done_keys(path) == {'"a"', '"own"', '"b"'}
    assert all(map(cap.done, ["a", "b", "own"]))


@pytest.mark.parametrize("where", ["in the pass", "between passes", "interrupt", "outside", "end of capture"])
def test_a_block_that_is_not_carried_out_is_not_done(tmp_path: Path, where: str) -> None:
    path, model = tmp_path / "x.strap", Failing()
    error: Any = KeyboardInterrupt() if where == "interrupt" else RuntimeError("too bad")

    def block(cap: Any) -> None:
        with cap.tagged({"key": "a"}):
            model(PROMPT)
            model(PROMPT)
            if where == "between passes":
                raise error
            model.error = error
            model(PROMPT)

    with capture(model, path, sites="one") as cap:
        if where == "end of capture":
            block_of_its_own = cap.tagged({"key": "a"})
            block_of_its_own.__enter__()
            model(PROMPT)
        elif where == "outside":
            with cap.tagged({"doc": 1}), cap.tagged({"key": "a"}):
                model(PROMPT)
                model.error = error
                with pytest.raises(RuntimeError):  # the block itself goes on, with a pass missing
                    model(PROMPT)
        else:
            with pytest.raises(type(error)):
                block(cap)
        model.error = None
        if where != "end of capture":
            with cap.tagged({"key": "b"}):
                model(PROMPT)
    if where == "end of capture":
        block_of_its_own.__exit__(None, None, None)
    assert not cap.done("a")
    assert cap.done("b") is (where != "end of capture")
    assert key_text("a") not in read_done_keys(path)
    with strapfmt.open(path) as ds:
        events = ds.row_events.to_arrow().to_pylist()
        first = [row["row"] for row in ds.tokens.to_arrow().to_pylist() if row["position"] == 0]
        unfinished = [event["row"] for event in events if event["event"] == "unfinished"]
    assert unfinished == first[: len(first) - (where != "end of capture")]
    assert strapfmt.verify(path).valid
    with capture(model, path, sites="one", mode="append") as cap:
        assert not cap.done("a")
        with cap.tagged({"key": "a"}):
            model(PROMPT)
    assert cap.done("a")
    assert key_text("a") in read_done_keys(path)


def test_a_key_of_the_whole_capture_counts_from_its_first_complete_pass(tmp_path: Path) -> None:
    path, model = tmp_path / "x.strap", Failing()
    with capture(model, path, sites="one", tags={"key": "a"}) as cap:
        model.error = RuntimeError("too bad")
        with pytest.raises(RuntimeError):
            model(PROMPT)
    assert not cap.done("a")
    assert read_done_keys(path) == set()
    model.error = None
    with capture(model, path, sites="one", tags={"key": "a"}, mode="append") as cap:
        model(PROMPT)
    assert cap.done("a")
    assert read_done_keys(path) == {'"a"'}


def test_a_dropped_pass_leaves_its_key_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_open, write = threading.Event(), Disk.write
    path, model = tmp_path / "x.strap", Failing()
    cap = capture(model, path, sites="one", on_full="drop", host_ring_bytes=4 << 10, batch_bytes=1 << 10)
    with cap:
        monkeypatch.setattr(Disk, "write", lambda *given: (is_open.wait(20), write(*given))[1])
        n = 0
        while not cap.report.n_dropped_steps:
            with cap.tagged({"key": n}):
                model(torch.arange(40)[None])
            n += 1
            assert n < 200
        is_open.set()
    assert [cap.done(key) for key in range(n)] == [True] * (n - 1) + [False]
    assert read_done_keys(path) == {str(key) for key in range(n - 1)}


def test_passes_of_a_block_are_committed_together(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"

    def n_steps() -> int:
        with strapfmt.open(path) as ds:
            return len(ds.steps)

    with capture(model, path, commit_interval_s=0) as cap:
        model(PROMPT)
        wait_until(lambda: n_steps() == 1)
        with cap.tagged({"key": "a"}):
            for _ in range(5):
                model(PROMPT)
                wait_until(lambda: cap.report.sites[0].written % 6 == 0)
                with cap.tagged({"key": "inner"}):  # part of the block around it
                    model(PROMPT)
            wait_until(lambda: cap.report.sites[0].written == 66)
            time.sleep(0.3)
            assert n_steps() == 1
        wait_until(lambda: n_steps() == 11)
        with cap.tagged({"doc": "no key"}):
            model(PROMPT)
            wait_until(lambda: n_steps() == 12)


def test_keys_of_other_ranks_count(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    for rank in range(3):
        with capture(model, path, rank=rank) as cap, cap.tagged({"key": rank}):
            model(PROMPT)
    with capture(model, path, rank=3) as cap:
        assert [cap.done(key) for key in range(4)] == [True, True, True, False]
        model(PROMPT)


DOCS = [f"doc-{n}" for n in range(12)]


def visit(path: Path, seed: int, interval_s: float) -> None:
    """Generate for every document that is not done yet; killed from outside."""
    torch.set_num_threads(1)
    model, mode = tiny_model("llama"), "append" if path.exists() else "create"
    with (
        torch.no_grad(),
        capture(model, path, mode=mode, commit_interval_s=interval_s, batch_bytes=1 << 10) as cap,
    ):
        for n, doc in enumerate(DOCS):
            if cap.done(doc):
                continue
            with cap.tagged({"key": doc}):
                model.generate(torch.arange(n, n + 4)[None] + 3, max_new_tokens=n % 4 + 2, do_sample=False)
            time.sleep(random.Random(seed).choice((0.0, 0.02)))


def test_kill_minus_nine_leaves_no_key_out_and_none_twice(tmp_path: Path) -> None:
    path, choose, n_killed = tmp_path / "x.strap", random.Random(5), 0
    code = "import sys, pathlib, test_steering as t; t.victims(pathlib.Path(sys.argv[1]), int(sys.argv[2]))"
    here = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, here.parent / "capture")))
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(choose.randrange(1000))],
        env=environment,
        check=True,
        timeout=120,
        capture_output=True,
        text=True,
    )
    n_killed = int(done.stdout)
    assert n_killed >= 3
    with strapfmt.open(path, verify="always") as ds:
        keys = Counter(json.loads(tags)["key"] for tags in ds.sequences.to_arrow()["tags"].to_pylist())
        assert keys == Counter(DOCS), "a block is there as a whole, once, or not at all"
        counts = ds.sql(
            "SELECT tags->>'key', count(*) FROM sequences JOIN tokens USING (sequence_id) GROUP BY ALL"
        )
        assert dict(counts.fetchall()) == {doc: 4 + n % 4 + 1 for n, doc in enumerate(DOCS)}
        assert len(ds[SITE]) == len(ds.tokens)
    assert strapfmt.verify(path).valid


def victims(path: Path, seed: int) -> None:
    """Fork visits and kill each at a random moment, until one gets to the end; runs in a process of its own."""
    choose, n_killed = random.Random(seed), 0
    model = tiny_model("llama")
    with torch.no_grad(), capture(model, path.with_name("warm.strap")) as cap:
        cap.done("x")
        with cap.tagged({"key": 1}):  # everything is imported before the first fork
            model.generate(PROMPT, max_new_tokens=2)
    while True:
        child = os.fork()
        if child == 0:
            try:
                visit(path, seed + n_killed, choose.choice((0.0, 0.0, 0.03)))
                os._exit(0)
            finally:
                os._exit(1)
        if n_killed < 8:
            time.sleep(choose.uniform(0.05, 0.4))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                raise SystemExit("a visit failed")
            break
        n_killed += 1
    sys.stdout.write(str(n_killed))


# Marks.


def test_marks_know_their_step_and_are_there_in_sql(model: Any, tmp_path: Path) -> None:
    path, before = tmp_path / "x.strap", time.time_ns()
    with capture(model, path) as cap:
        cap.mark("phase", name="warm-up", step=-1)
        model(PROMPT)
        model(PROMPT)
        handle = model.model.layers[1].register_forward_hook(lambda *_: cap.mark("inside"))
        model(PROMPT)
        handle.remove()
        cap.mark("phase", name="end", ratio=0.5, text="'; DROP TABLE marks; --ä", nested={"a": [1, None]})
    with capture(model, path, mode="append") as cap:
        model(PROMPT)
        cap.mark("again")
    with strapfmt.open(path) as ds:
        marks = ds.marks
        assert [(mark.session, mark.name, mark.step) for mark in marks] == [
            (0, "phase", 0),
            (0, "inside", 2),
            (0, "phase", 3),
            (1, "again", 4),
        ]
        assert marks[0].attributes == {"name": "warm-up", "step": -1}
        assert marks[2].attributes["nested"] == {"a": [1, None]}
        times = [mark.time_ns for mark in marks]
        assert times == sorted(times)
        assert before < times[0]
        found = ds.sql("""
            SELECT s.step, m.name, m.attributes->>'name' FROM steps s ASOF JOIN marks m ON s.step >= m.step ORDER BY 1
        """).fetchall()
        assert found == [
            (0, "phase", "warm-up"),
            (1, "phase", "warm-up"),
            (2, "inside", None),
            (3, "phase", "end"),
        ]


def test_marks_are_committed_with_what_came_before(model: Any, tmp_path: Path) -> None:
    with capture(model, tmp_path / "x.strap", commit_interval_s=0) as cap:
        cap.mark("one")
        model(PROMPT)

        def names() -> list[str]:
            with strapfmt.open(tmp_path / "x.strap") as ds:
                return [mark.name for mark in ds.marks]

        wait_until(lambda: names() == ["one"])
        cap.mark("two")
        model(PROMPT)
        wait_until(lambda: names() == ["one", "two"])


def test_wrong_marks_are_refused(model: Any, tmp_path: Path) -> None:
    with capture(model, tmp_path / "x.strap") as cap:
        for wrong in ({"x": {1}}, {"x": float("inf")}, {"x": {1: 2}}, {"x": "\ud800"}):
            with pytest.raises(ArgumentError, match="mark"):
                cap.mark("phase", **wrong)
        for name in ("", None, 3):
            with pytest.raises(ArgumentError, match="expected a name"):
                cap.mark(name)
        for _ in range(7):
            cap.mark("large", text="x" * (1 << 20))
        with pytest.raises(ArgumentError, match="marks of one capture"):
            cap.mark("large", text="x" * (1 << 20))
        model(PROMPT)
    with strapfmt.open(tmp_path / "x.strap") as ds:
        assert {mark.name for mark in ds.marks} == {"large"}
        assert len(ds.marks) == 7


def test_what_is_no_mark_is_refused_when_it_is_asked_for(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    with capture(model, path):
        model(PROMPT)
    file = path / "rank-00000" / "manifest.json"
    manifest = Manifest.decode(file.read_bytes(), "")
    for wrong in ("text", [1], [{"name": "a", "step": -1, "time_ns": 0, "attributes": {}}], [{"name": 3}]):
        sessions = ({**manifest.sessions[0], "marks": wrong},)
        file.write_bytes(replace(manifest, sessions=sessions).encode())
        with strapfmt.open(path) as ds:
            assert len(ds.tokens) == 6
            with pytest.raises(CorruptError, match=r"rank 0: sessions\.0\.marks"):
                len(ds.marks)
            with pytest.raises(CorruptError, match=r"sessions\.0\.marks"):
                ds.sql("SELECT * FROM marks")


# Pauses.


def test_paused_passes_are_counted_and_nothing_else(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    with capture(model, path) as cap:
        model(PROMPT)
        with cap.paused():
            quiet = model(PROMPT).logits
            model.model(PROMPT)
            with cap.paused():
                model(PROMPT)
            model(PROMPT)
        model(PROMPT + 1)
        cap.pause()
        cap.pause()
        model(PROMPT)
        cap.resume()
        model(PROMPT + 2)
    assert torch.equal(quiet, model(PROMPT).logits)
    assert (cap.report.n_steps, cap.report.n_paused_passes, cap.report.n_tokens) == (3, 5, 18)
    assert "5 more passes while paused" in str(cap.report)
    with strapfmt.open(path) as ds:
        assert ds.manifests[0].sessions[0]["outcome"]["n_paused_passes"] == 5
        expected = torch.cat([PROMPT, PROMPT + 1, PROMPT + 2]).flatten().tolist()
        assert ds.tokens.to_arrow()["token_id"].to_pylist() == expected
        assert len(ds[SITE]) == 18


def test_sequences_go_on_at_the_right_positions_after_a_pause(model: Any, tmp_path: Path) -> None:
    path, ids = tmp_path / "x.strap", torch.arange(3, 15)[None]
    with capture(model, path) as cap:
        cache = model(ids[:, :4], use_cache=True).past_key_values
        with cap.paused():
            model(ids[:, 4:6], past_key_values=cache)
            model(ids[:, 6:7], past_key_values=cache)
            other = model(ids[:, :3], use_cache=True).past_key_values
        model(ids[:, 7:9], past_key_values=cache)
        model(ids[:, 3:5], past_key_values=other)
        with cap.paused():
            model(ids[:, 9:10], past_key_values=cache)
            cache.crop(-4)
        model(ids[:, 6:8], past_key_values=cache)
    with strapfmt.open(path) as ds:
        rows = ds.tokens.to_arrow().to_pylist()
        rejected = ds.row_events.to_arrow().to_pylist()
    found = [(row["sequence_id"], row["position"], row["token_id"] - 3, row["parent_row"]) for row in rows]
    assert found == [
        (0, 0, 0, None), (0, 1, 1, 0), (0, 2, 2, 1), (0, 3, 3, 2),
        (0, 7, 7, None), (0, 8, 8, 4),
        (1, 3, 3, None), (1, 4, 4, 6),
        (0, 6, 6, None), (0, 7, 7, 8),
    ]  # fmt: skip
    assert [event["row"] for event in rejected] == [4, 5]


def test_a_pause_in_the_middle_of_generation(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.strap"
    calls = iter(range(100))

    def steer(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        n = next(calls)
        if n in (2, 5):
            cap.pause() if n == 2 else cap.resume()
        return scores

    with capture(model, path) as cap:
        out = model.generate(
            PROMPT, max_new_tokens=9, do_sample=False, logits_processor=[steer], eos_token_id=None
        )
    with strapfmt.open(path) as ds:
        rows = ds.tokens.to_arrow().to_pylist()
    positions = [*range(8), *range(11, 14)]
    assert [row["position"] for row in rows] == positions
    assert [row["token_id"] for row in rows] == out[0, positions].tolist()
    assert {row["sequence_id"] for row in rows} == {0}
    assert cap.report.n_paused_passes == 3


def test_a_failed_pass_before_a_pause_brings_no_cache_to_the_passes_in_it(tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "x.strap"
    handle = model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with capture(model, path) as cap:
        with pytest.raises(ZeroDivisionError):
            model(PROMPT)
        handle.remove()
        with cap.paused():
            cache = model(PROMPT[:, :3]).past_key_values
        model(PROMPT[:, 3:], past_key_values=cache)
    with strapfmt.open(path) as ds:
        rows = ds.tokens.to_arrow().to_pylist()[6:]
    assert [(row["sequence_id"], row["position"], row["parent_row"]) for row in rows] == [
        (1, 3, None), (1, 4, 6), (1, 5, 7)
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["pause", "resume", "tagged"])
def test_steering_inside_a_pass_is_refused(what: str, tmp_path: Path) -> None:
    model, problems = tiny_model("llama"), []
    cap = capture(model, tmp_path / "x.strap")

    def inside(*_: Any) -> None:
        steer = cap.tagged({"key": 1}).__enter__ if what == "tagged" else getattr(cap, what)
        with pytest.raises(CaptureError, match="inside a forward pass") as caught:
            steer()
        problems.append(caught.value)

    with cap:
        model.model.layers[1].register_forward_hook(inside)
        model(PROMPT)
        with cap.paused():
            model(PROMPT)
        model(PROMPT)
    assert len(problems) == 3
    assert (cap.report.n_steps, cap.report.n_paused_passes) == (2, 1)


def test_a_capture_that_was_paused_throughout_says_so(model: Any, tmp_path: Path) -> None:
    cap = capture(model, tmp_path / "x.strap")
    cap.__enter__()
    with cap.paused():
        model(PROMPT)
        model(PROMPT)
    with pytest.raises(SiteNeverFiredError, match="all 2 forward passes ran while the capture was paused"):
        cap.__exit__(None, None, None)


def test_an_exception_in_a_paused_pass_leaves_the_count_right(tmp_path: Path) -> None:
    model = Failing()
    with capture(model, tmp_path / "x.strap", sites="one") as cap:
        with cap.paused():
            for error in (RuntimeError("no"), KeyboardInterrupt(), None):
                model.error = error
                with pytest.raises(type(error)) if error else nullcontext():
                    model(PROMPT)
        model(PROMPT)
    assert (cap.report.n_steps, cap.report.n_paused_passes) == (1, 3)


def test_steering_is_for_a_capture_that_runs(model: Any, tmp_path: Path) -> None:
    cap = capture(model, tmp_path / "x.strap")
    calls = [lambda: cap.mark("a"), cap.pause, cap.resume, cap.paused, lambda: cap.tagged({})]
    for call in [*calls, lambda: cap.done("a")]:
        with pytest.raises(CaptureError, match=r"ready|enter it"):
            call()
    with cap:
        model(PROMPT)
    for call in calls:
        with pytest.raises(CaptureError, match="closed"):
            call()


# A disk that fills up.


def many(model: torch.nn.Module, ids: torch.Tensor, n: int = 1000) -> None:
    for _ in range(n):
        model(ids)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize(("min_free_bytes", "has_key"), [(0, False), (1 << 20, True), (3 << 20, False)])
def test_a_capture_stops_before_the_disk_is_full(
    model: Any, small_disk: Path, min_free_bytes: int, has_key: bool
) -> None:
    path, ids = small_disk / "x.strap", torch.arange(100).repeat(8, 1)
    cap = capture(model, path, min_free_bytes=min_free_bytes, commit_interval_s=1000, batch_bytes=16 << 10)

    def run() -> None:
        with cap:
            for n in range(1000):
                with cap.tagged({"key": n} if has_key else {}):
                    model(ids)

    with pytest.raises(DiskSpaceError, match="min_free_bytes") as caught:
        run()
    n = cap.report.n_steps
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.min_free_bytes == min_free_bytes
    assert isinstance(caught.value, OSError)
    assert cap.report.state == "closed", (caught.value.__notes__, shutil.disk_usage(small_disk))
    assert shutil.disk_usage(small_disk).free >= min_free_bytes
    with strapfmt.open(path, verify="always") as ds:
        assert ds.report.is_clean
        assert ds.steps.to_arrow()["status"].to_pylist() == ["complete"] * n
        assert len(ds[SITE]) == len(ds.tokens) == n * 800
        assert "stopped before the disk was full" in ds.manifests[0].sessions[0]["outcome"]["stopped"]
    assert any("stopped before the disk was full" in note for note in cap.report.notes)
    assert strapfmt.verify(path).valid
    assert n > 2
    assert [cap.done(key) for key in range(n + 1)] == [has_key] * n + [False]
    if min_free_bytes:  # with room made, it goes on behind
        with capture(model, path, mode="append", batch_bytes=16 << 10) as cap:
            model(ids)
        assert strapfmt.verify(path).valid


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    """A disk that always says that 3 MiB are free."""
    n_bytes = 3 << 20
    said = os.statvfs_result((4096, 4096, n_bytes // 4096, n_bytes // 4096, n_bytes // 4096, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: said)
    return n_bytes


@pytest.mark.parametrize("site", [SITE, "logits", "blocks.0.attn_pattern", "model.layers.0.mlp"])
def test_a_pass_that_is_far_larger_than_all_before_is_not_begun_where_it_might_not_fit(
    tmp_path: Path, free: int, site: str
) -> None:
    model = tiny_model("llama", attn_implementation="eager")
    path, rows = tmp_path / "x.strap", torch.arange(100)[None]
    cap = capture(model, path, sites=site, batch_bytes=16 << 10)

    def run() -> None:
        with cap:
            many(model, rows[:, :10], 3)
            model(rows.repeat(300, 1))

    with torch.no_grad(), pytest.raises(DiskSpaceError) as caught:
        run()
    assert caught.value.needed_bytes > 300 * 100 * 32 * 4
    with strapfmt.open(path) as ds:
        assert ds.steps.to_arrow()["status"].to_pylist() == ["complete"] * 3
        assert (len(ds[site]), len(ds.tokens)) == (30, 30)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"sites": "logits"}, 1),  # of one position only
        ({"sites": SITE, "positions": "last"}, 0),
        ({"sites": ["logits", SITE], "max_rows": 30}, 0),
        ({"sites": SITE, "channels": [0]}, 0),
    ],
)
def test_a_pass_of_many_tokens_goes_on_where_little_of_it_is_stored(
    model: Any, tmp_path: Path, free: int, options: dict[str, Any], kept: int
) -> None:
    with capture(model, tmp_path / "x.strap", batch_bytes=16 << 10, **options) as cap, torch.no_grad():
        many(model, torch.arange(10)[None], 3)
        wait_until(lambda: cap.stats.n_pending == 0)
        model(torch.arange(100).repeat(60, 1), logits_to_keep=kept)
    assert (cap.report.n_steps, cap.report.n_abandoned_steps) == (4, 0)


def test_with_filters_a_pass_that_might_not_fit_is_abandoned(model: Any, tmp_path: Path, free: int) -> None:
    path = tmp_path / "x.strap"
    cap = capture(model, path, batch_bytes=16 << 10, positions=slice(0, 90))

    def run() -> None:
        with cap:
            many(model, torch.arange(10)[None], 3)
            model(torch.arange(100).repeat(200, 1))

    with torch.no_grad(), pytest.raises(DiskSpaceError):
        run()
    with strapfmt.open(path) as ds:
        steps = ds.steps.to_arrow().to_pylist()
        assert [step["status"] for step in steps] == ["complete"] * 3 + ["abandoned"]
        assert "DiskSpaceError" in steps[-1]["reason"]
        assert len(ds[SITE]) == 30
    assert strapfmt.verify(path).valid


def test_tokens_of_an_encoder_take_no_space_at_sites_of_the_decoder(tmp_path: Path, free: int) -> None:
    t5 = tiny_model("t5")
    encoder, decoder = (f"{stack}.blocks.0.resid_post" for stack in ("encoder", "decoder"))
    ids, some = torch.arange(100).repeat(100, 1), torch.arange(5)[None]
    for number, site in enumerate((decoder, encoder)):
        cap = capture(t5, tmp_path / f"{number}.strap", sites=site, batch_bytes=16 << 10)
        with torch.no_grad(), nullcontext() if site == decoder else pytest.raises(DiskSpaceError), cap:
            t5(input_ids=some, decoder_input_ids=some)
            t5(input_ids=ids, decoder_input_ids=some.repeat(100, 1))


def test_what_was_captured_is_committed_before_the_block_ends(model: Any, small_disk: Path) -> None:
    path, ids = small_disk / "x.strap", torch.arange(100).repeat(8, 1)
    with capture(model, path, commit_interval_s=1000, batch_bytes=16 << 10) as cap:
        with pytest.raises(DiskSpaceError):
            many(model, ids)

        def n_steps() -> int:
            with strapfmt.open(path) as ds:
                return len(ds.steps)

        wait_until(lambda: n_steps() == cap.report.n_steps)
        for _ in range(2):  # and it does not go on
            with pytest.raises(DiskSpaceError) as caught:
                model(ids)
        with cap.paused():
            model(ids)
    copied = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert str(copied) == str(caught.value)
    assert copied.free_bytes == caught.value.free_bytes


def test_a_full_disk_that_nobody_watches_is_an_error_of_the_drain(model: Any, small_disk: Path) -> None:
    path, ids = small_disk / "x.strap", torch.arange(100).repeat(8, 1)
    cap = capture(model, path, min_free_bytes=None, batch_bytes=16 << 10)

    def run() -> None:
        with cap:
            many(model, ids)

    with pytest.raises(DrainError) as caught:
        run()
    assert caught.value.__cause__.errno == errno.ENOSPC


def test_a_file_system_that_does_not_say_is_not_asked(
    tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = DiskSpace(tmp_path, 1 << 60, 1)
    space.look(n_bytes=0, n_rows=0, n_sites=0)
    with pytest.raises(DiskSpaceError):
        space.check(0, PassSize())
    nothing_known = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: nothing_known)
    space = DiskSpace(tmp_path, 1 << 60, 1)
    space.look(n_bytes=0, n_rows=0, n_sites=0)
    space.check(1 << 50, PassSize(n_bytes=1 << 50, n_tokens=1 << 50))


@pytest.mark.parametrize("wrong", [-1, 1.5, "1 GiB", True])
def test_a_wrong_least_space_is_refused(model: Any, tmp_path: Path, wrong: object) -> None:
    with pytest.raises(ArgumentError, match="min_free_bytes"):
        capture(model, tmp_path / "x.strap", min_free_bytes=wrong)


# Captures inside one another.


def generated(path: Path) -> dict[str, list[dict[str, Any]]]:
    """All tables, without what tells of time."""
    with strapfmt.open(path, verify="always") as ds:
        tables = {name: table.to_arrow().to_pylist() for name, table in ds.tables.items()}
    for row in tables["steps"]:
        del row["started_ns"], row["duration_s"]
    tables["row_events"].sort(key=lambda event: event["row"])  # the turns of the drain order them
    return tables


@pytest.mark.parametrize("order", ["nested", "crossed"])
def test_captures_inside_one_another_see_the_same_rows(tmp_path: Path, order: str) -> None:
    model = tiny_model("llama")
    paths = [tmp_path / f"{name}.strap" for name in ("alone", "outer", "inner")]
    sites = [SITE, SITE, "blocks.1.mlp_out"]

    def run() -> None:
        model.generate(**batch(3, 5), max_new_tokens=5, num_beams=3, do_sample=False)
        model.generate(**batch(2), max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)
        with pytest.raises(IndexError):
            model(torch.tensor([[1000]]))
        cache = model(PROMPT, use_cache=True).past_key_values
        cache.crop(-3)
        model(PROMPT, past_key_values=cache)

    with capture(model, paths[0], sites=sites[0]):
        run()
    outer, inner = (capture(model, path, sites=site) for path, site in zip(paths[1:], sites[1:], strict=True))
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    outer.__enter__()
    inner.__enter__()
    run()
    for cap in (outer, inner) if order == "crossed" else (inner, outer):
        cap.__exit__(None, None, None)
    after = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert after == before
    alone, *both = map(generated, paths)
    assert both[0] == both[1] == alone
    assert len(alone["row_events"]) > 3
    with strapfmt.open(paths[0]) as ds, strapfmt.open(paths[1]) as other:
        assert torch.equal(ds[SITE].tensor(), other[SITE].tensor())
    assert list(strapfmt.open(paths[2])) == ["blocks.1.mlp_out"]


def test_a_capture_that_begins_and_ends_inside_another(tmp_path: Path) -> None:
    model, paths = tiny_model("llama"), [tmp_path / "outer.strap", tmp_path / "inner.strap"]
    ids = torch.arange(3, 15)[None]
    with capture(model, paths[0]) as outer:
        cache = model(ids[:, :4], use_cache=True).past_key_values
        with capture(model, paths[1], sites="blocks.1.mlp_out", tags={"who": "inner"}) as inner:
            model(ids[:, 4:6], past_key_values=cache)
            with outer.paused(), inner.tagged({"doc": 1}):
                model(ids[:, 6:8], past_key_values=cache)
                model(PROMPT)
        model(ids[:, 8:10], past_key_values=cache)
    with strapfmt.open(paths[0]) as ds:
        assert ds.tokens.to_arrow()["position"].to_pylist() == [0, 1, 2, 3, 4, 5, 8, 9]
    with strapfmt.open(paths[1]) as ds:
        assert ds.tokens.to_arrow()["position"].to_pylist() == [4, 5, 6, 7, 0, 1, 2, 3, 4, 5]
    assert tags_of(paths[1]) == [{"who": "inner"}, {"who": "inner", "doc": 1}]
    assert tags_of(paths[0]) == [{}]


def test_an_error_of_one_capture_is_an_abandoned_pass_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_open, write = threading.Event(), Disk.write
    model, paths = tiny_model("llama"), [tmp_path / "outer.strap", tmp_path / "inner.strap"]
    with capture(model, paths[0]) as outer:
        inner = capture(
            model,
            paths[1],
            sites="blocks.1.mlp_out",
            on_full="raise",
            host_ring_bytes=8 << 10,
            batch_bytes=1 << 10,
        )
        with inner:
            monkeypatch.setattr(Disk, "write", lambda *given: (is_open.wait(20), write(*given))[1])
            with pytest.raises(RingFullError):
                many(model, PROMPT.repeat(4, 1))
            is_open.set()
        model(PROMPT)
    n = inner.report.n_steps
    assert (outer.report.n_steps, outer.report.n_abandoned_steps) == (n + 2, 1)
    with strapfmt.open(paths[0]) as ds:
        assert ds.steps.to_arrow()["status"].to_pylist() == ["complete"] * n + ["abandoned", "complete"]
