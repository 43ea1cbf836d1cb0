"""Values on a device that works beside the host reach the host's ring whole and in order, in bounded memory."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import PATIENCE_S, LateStream, LateStreams
from models import tiny_model
from test_capture_flow import gate, wait_until

import strapfmt
from strapfmt.errors import ArgumentError, DrainError
from strapfmt.schema import SiteSpec
from strapfmt_capture import rings as rings_module
from strapfmt_capture.accounts import CaptureReport
from strapfmt_capture.device_ring import DeviceRing
from strapfmt_capture.items import Boundary, Events, Item
from strapfmt_capture.memory import Memory
from strapfmt_capture.ring import LINGER_S, Ring
from strapfmt_capture.rings import Rings
from strapfmt_capture.spill import Spill
from strapfmt_capture.turn import Values

__all__ = ["gate"]

NOWHERE = Memory(64)
SPEC = SiteSpec(name="s", dtype="uint8", shape=(1,), row_space="own")
FIRST, SECOND = torch.device("cpu", 0), torch.device("cpu", 1)
HOST = torch.device("cpu")


def values_of(number: int, n_bytes: int, start: int) -> Values:
    return Values(
        spec=SPEC,
        dtype=torch.uint8,
        shape=(1,),
        n_rows=n_bytes,
        memory=NOWHERE,  # the mover says where
        start=start,
        rows=None,
        token_row=None,
        call=number,
    )


def put(rings: Rings, device: torch.device, number: int, n_bytes: int, stream: LateStream | None) -> bool:
    """Fill a slot with the number, when the device gets to it, and scribble over its source's source afterwards."""
    ring = rings.of(device)
    slot = ring.reserve(n_bytes)
    if slot is None:
        return False
    view = ring.view(slot.start, torch.uint8, (n_bytes,))
    if stream is None:
        view.fill_(number % 251)
    else:
        stream.launch(lambda: view.fill_(number % 251))
    rings.put(ring, values_of(number, n_bytes, slot.start), slot)
    return True


class Consumer:
    """What stands for the drain: takes everything, remembers it, and checks each byte before it gives it back."""

    def __init__(self, ring: Ring[Item]) -> None:
        self.ring = ring
        self.seen: list[int | str] = []
        self.wrong: list[int] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while items := self.ring.take(1 << 20):
            for item in items:
                if isinstance(item, Values):
                    view = self.ring.view(item.start, torch.uint8, (item.n_rows,))
                    if not bool((view == item.call % 251).all()):
                        self.wrong.append(item.call)
                    self.seen.append(item.call)
                elif isinstance(item, Events):
                    self.seen.append(str(item.columns["row"]))
            self.ring.release(self.ring.position)

    def join(self) -> None:
        self.ring.close()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


def staged(
    delay_s: float = 0.002, host: int = 1 << 16, gpu: int = 1 << 14, linger_s: float = LINGER_S
) -> tuple[Rings, dict[Any, LateStreams]]:
    known = {FIRST: LateStreams(1, delay_s), SECOND: LateStreams(2, delay_s)}
    return Rings(Ring(host, linger_s=linger_s), gpu_ring_bytes=gpu, streams=known.get), known


def count_fetches(streams: LateStreams, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the bytes of each copy to the host."""
    fetched: list[int] = []
    fetch = streams.fetch

    def counted(source: torch.Tensor, *others: Any) -> Any:
        fetched.append(source.nbytes)
        return fetch(source, *others)

    monkeypatch.setattr(streams, "fetch", counted)
    return fetched


def await_that(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.001)


def event(number: int) -> Events:
    return Events(columns={"row": [number]})


def test_values_in_host_memory_go_straight_to_the_host_s_ring() -> None:
    rings, known = staged()
    assert rings.of(HOST) is rings.host
    assert put(rings, HOST, 7, 100, None)
    rings.finish()
    assert (rings.devices, rings.is_pinned) == ({}, None)
    assert [item.call for item in rings.host.take(1000) if isinstance(item, Values)] == [7]
    assert not any(streams.is_pinned for streams in known.values())


@pytest.mark.parametrize("seed", range(4))
def test_slots_are_reused_again_and_again_and_nothing_is_torn_or_out_of_order(seed: int) -> None:
    rng = random.Random(seed)
    rings, known = staged(delay_s=0.0005)
    consumer = Consumer(rings.host)
    expected: list[int | str] = []
    for number in range(400):
        device = rng.choice([FIRST, SECOND, HOST] if seed % 2 else [FIRST])
        streams = known.get(device)
        # Slots of up to a third of the device's ring: it is written over a hundred times.
        assert put(rings, device, number, rng.randrange(1, 5000), streams.model if streams else None)
        expected.append(number)
        if rng.random() < 0.2:
            rings.publish(event(number))
            expected.append(str([number]))
    rings.finish()
    consumer.join()
    assert consumer.wrong == []
    assert consumer.seen == expected
    assert all(ring.peak_bytes <= ring.n_bytes for ring in [rings.host, *rings.devices.values()])
    assert all(ring.n_used == 0 for ring in rings.devices.values())


def test_what_was_published_before_the_first_value_on_a_device_comes_first() -> None:
    rings, known = staged()
    consumer = Consumer(rings.host)
    rings.publish(event(-1))
    put(rings, HOST, 0, 10, None)
    put(rings, FIRST, 1, 10, known[FIRST].model)
    put(rings, HOST, 2, 10, None)
    rings.publish(event(3))
    rings.finish()
    consumer.join()
    assert consumer.seen == ["[-1]", 0, 1, 2, "[3]"]


def test_a_change_of_the_stream_in_use_is_followed() -> None:
    rings, known = staged()
    slow = LateStream(random.Random(0), 0.05)
    streams = known[FIRST]
    consumer = Consumer(rings.host)
    fast = streams.model
    for number in range(20):
        streams.model = slow if number % 3 == 0 else fast
        put(rings, FIRST, number, 500, streams.model)
    rings.finish()
    consumer.join()
    assert (consumer.wrong, consumer.seen) == ([], list(range(20)))


def test_values_of_one_device_do_not_wait_for_ever_for_items_of_another() -> None:
    rings, known = staged()
    consumer = Consumer(rings.host)
    put(rings, FIRST, 0, 10, known[FIRST].model)  # never followed by anything on this device
    for number in range(1, 50):
        put(rings, SECOND, number, 5000, known[SECOND].model)
    rings.finish()
    consumer.join()
    assert consumer.seen == list(range(50))


def test_neighbours_are_moved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rings, known = staged(gpu=1 << 16, host=1 << 18)
    consumer = Consumer(rings.host)
    fetched = count_fetches(known[FIRST], monkeypatch)
    for number in range(200):
        put(rings, FIRST, number, 64, None)
    rings.finish()
    consumer.join()
    assert consumer.seen == list(range(200))
    assert fetched == [200 * 64]


def test_ends_of_steps_with_a_little_each_are_moved_together_and_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rings, known = staged(delay_s=0, gpu=1 << 20, host=1 << 20, linger_s=0.5)
    consumer = Consumer(rings.host)
    fetched = count_fetches(known[FIRST], monkeypatch)
    for number in range(50):
        put(rings, FIRST, number, 64, known[FIRST].model)
        rings.publish(event(number))
    await_that(lambda: len(consumer.seen) == 100)  # nobody has asked for it
    assert len(fetched) <= 3
    assert consumer.seen == [each for number in range(50) for each in (number, str([number]))]
    rings.finish()
    consumer.join()
    assert consumer.wrong == []


@pytest.mark.parametrize("what", ["a good part of the ring", "an urgent end"])
def test_some_things_are_moved_at_once(what: str) -> None:
    rings, known = staged(delay_s=0, gpu=1 << 20, host=1 << 21, linger_s=PATIENCE_S)
    n_bytes = 1 << 17 if "part" in what else 64
    put(rings, FIRST, 0, n_bytes, known[FIRST].model)
    rings.publish(Boundary(is_urgent="urgent" in what))
    await_that(lambda: rings.devices[FIRST].n_used == 0)
    rings.abort()


def test_after_settling_nothing_is_under_way_on_any_device() -> None:
    rings, known = staged(delay_s=0.02, linger_s=PATIENCE_S)
    consumer = Consumer(rings.host)
    for number in range(6):
        device = (FIRST, SECOND)[number % 2]
        put(rings, device, number, 500, known[device].model)
    rings.settle()
    assert [ring.n_used for ring in rings.devices.values()] == [0, 0]
    rings.finish()
    consumer.join()
    assert (consumer.wrong, consumer.seen) == ([], list(range(6)))


def test_settling_ends_where_the_mover_has_ended() -> None:
    rings, known = staged()
    known[FIRST].failure = RuntimeError("device lost")
    put(rings, FIRST, 0, 500, known[FIRST].model)
    rings.settle()
    with pytest.raises(DrainError, match="device lost"):
        rings.check()


def test_memory_is_locked_once_and_unlocked_at_the_end() -> None:
    rings, known = staged()
    consumer = Consumer(rings.host)
    put(rings, FIRST, 0, 10, known[FIRST].model)
    put(rings, SECOND, 1, 10, known[SECOND].model)
    assert [known[FIRST].is_pinned, known[SECOND].is_pinned, rings.is_pinned] == [True, False, True]
    rings.finish()
    consumer.join()
    rings.free()
    assert not known[FIRST].is_pinned


def test_memory_that_cannot_be_locked_is_told() -> None:
    rings, known = staged()
    consumer = Consumer(rings.host)

    def refuse(memory: torch.Tensor) -> Callable[[], None]:
        raise RuntimeError("too much")

    known[FIRST].pin = refuse  # type: ignore[method-assign]
    put(rings, FIRST, 0, 10, known[FIRST].model)
    rings.finish()
    consumer.join()
    assert (consumer.seen, rings.is_pinned, rings.pin_refusal) == ([0], False, "too much")


def test_the_ring_of_what_is_spilled_is_locked_too_and_unlocked_at_the_end(
    tmp_path: Path, late: LateStreams
) -> None:
    locked: list[int] = []

    def pin(memory: torch.Tensor) -> Callable[[], None]:
        locked.append(memory.data_ptr())
        return lambda: locked.remove(memory.data_ptr())

    late.pin = pin  # type: ignore[method-assign]
    model, path = tiny_model("llama"), tmp_path / "x.strap"
    options: dict[str, Any] = {"on_full": "spill", "spill_path": tmp_path, "quiet": True}
    with strapfmt.capture(model, path, sites="blocks.*.resid_post", **options) as cap:
        model(torch.arange(5, 29).reshape(2, 12))
        rings = cap._engine.rings
        assert rings.spill is not None
        assert locked == [rings.host.memory.tensor.data_ptr(), rings.spill.ring.memory.tensor.data_ptr()]
    assert locked == []


def test_a_lock_that_is_refused_is_told_with_its_reason(tmp_path: Path, late: LateStreams) -> None:
    def refuse(memory: torch.Tensor) -> Callable[[], None]:
        raise RuntimeError("CUDA error 2")

    late.pin = refuse  # type: ignore[method-assign]
    model = tiny_model("llama")
    with strapfmt.capture(model, tmp_path / "x.strap", sites="blocks.*.resid_post", quiet=True) as cap:
        model(torch.arange(5, 29).reshape(2, 12))
    assert any("could not be locked for the GPU (CUDA error 2)" in note for note in cap.report.notes)
    assert not any("ulimit" in note for note in cap.report.notes)


def test_rings_can_be_looked_at_by_other_threads_while_another_one_opens() -> None:
    rings, _ = staged()
    rings.of(FIRST)
    looked_at = iter(rings.devices.values())
    rings.of(SECOND)
    assert len(list(looked_at)) == 1
    assert len(rings.devices) == 2
    rings.abort()


def test_a_failure_of_the_device_is_raised_where_the_user_waits_and_nobody_hangs() -> None:
    rings, known = staged()
    known[FIRST].failure = RuntimeError("device lost")
    consumer = Consumer(rings.host)
    n_put = 0
    while n_put < 1000 and put(rings, FIRST, n_put, 5000, known[FIRST].model):
        n_put += 1
    assert n_put < 1000  # the ring gave up, and the model goes on
    with pytest.raises(DrainError, match="RuntimeError: device lost"):
        rings.check()
    with pytest.raises(DrainError, match="device lost"):
        rings.finish()
    consumer.join()


def test_a_ring_that_is_opened_after_the_mover_has_failed_is_ended_and_says_so() -> None:
    rings, known = staged()
    known[FIRST].failure = RuntimeError("device lost")
    put(rings, FIRST, 0, 500, known[FIRST].model)
    rings.settle()
    with pytest.raises(DrainError, match="device lost"):
        rings.of(SECOND)
    assert rings.of(SECOND).is_aborted
    assert rings.of(SECOND).reserve(500) is None


def test_a_ring_that_is_opened_after_the_drain_has_gone_is_ended() -> None:
    rings, known = staged()
    put(rings, FIRST, 0, 5000, known[FIRST].model)
    rings.host.abort()
    rings.settle()
    await_that(lambda: not rings._mover.is_alive)
    assert not put(rings, SECOND, 1, 500, known[SECOND].model)
    rings.finish()


def test_where_the_mover_puts_things_is_left_to_it_when_another_ring_opens(tmp_path: Path) -> None:
    rings, known = staged(host=1 << 16)
    spill = rings.spill = Spill(tmp_path, rings.host, lambda error: None)
    settled: list[str] = []
    settle = spill.settle
    spill.settle = lambda: (settled.append(threading.current_thread().name), settle())[1]  # type: ignore[method-assign]
    spill.start()
    n_put = 0
    while rings._sink is not spill.ring:  # the host's ring fills up, as nobody empties it
        put(rings, FIRST, n_put, 5000, known[FIRST].model)
        rings.mark()
        n_put += 1
    assert put(rings, SECOND, n_put, 5000, known[SECOND].model)
    assert rings._sink is spill.ring
    assert threading.current_thread().name not in settled
    rings.abort()
    rings.host.abort()
    spill.abort()
    spill.close()
    spill.file.close()


def test_a_drain_that_is_gone_ends_the_mover_and_the_model_does_not_wait() -> None:
    rings, known = staged()
    put(rings, FIRST, 0, 5000, known[FIRST].model)
    rings.host.abort()
    n_put = 0
    while n_put < 1000 and put(rings, FIRST, n_put, 5000, known[FIRST].model):
        n_put += 1
    assert n_put < 1000
    rings.finish()


def test_a_slot_wider_than_the_smallest_ring_is_not_offered() -> None:
    rings, _ = staged(host=4096, gpu=1 << 14)
    assert rings.most_bytes == 4096
    assert isinstance(rings.of(FIRST), DeviceRing)
    assert rings.most_bytes == 4096
    rings.abort()


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateStreams:
    streams = LateStreams()
    monkeypatch.setattr(rings_module, "streams_of", lambda device: streams)
    return streams


@pytest.mark.parametrize("gpu_ring_bytes", [4096, 1 << 20])
def test_a_capture_through_a_device_s_ring_stores_the_same(
    tmp_path: Path, late: LateStreams, monkeypatch: pytest.MonkeyPatch, gpu_ring_bytes: int
) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, attn_implementation="eager")
    ids = torch.arange(5, 29).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    sites = ["blocks.*.*", "logits"]

    def run(path: Path) -> CaptureReport:
        with strapfmt.capture(
            model, path, sites=sites, quiet=True, gpu_ring_bytes=gpu_ring_bytes, stats=False
        ) as cap:
            model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        return cap.report

    report = run(tmp_path / "late.strap")
    assert late.n_fetched > 0
    assert late.is_pinned is False
    assert report.n_dropped == 0
    monkeypatch.undo()
    run(tmp_path / "plain.strap")
    assert_same(tmp_path / "late.strap", tmp_path / "plain.strap")


def assert_same(got: Path, wanted: Path) -> None:
    """Every value of every site, its row, and every token but for when it came."""
    with strapfmt.open(got, verify="always") as found, strapfmt.open(wanted) as expected:
        assert list(found.sites) == list(expected.sites)
        for query in ("SELECT * FROM tokens", "SELECT step, phase, n_rows, first_row, status FROM steps"):
            assert list(found.sql(query)) == list(expected.sql(query))
        for name, site in expected.sites.items():
            assert found[name].to_arrow().equals(site.to_arrow())


@pytest.mark.parametrize("gpu_ring_bytes", [4096, 1 << 16])
def test_what_a_device_gives_while_the_disk_stands_still_is_spilled_and_comes_in_its_place(
    tmp_path: Path, late: LateStreams, monkeypatch: pytest.MonkeyPatch, gate: Any, gpu_ring_bytes: int
) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16, attn_implementation="eager")
    prompts = [torch.randint(3, 90, (2, 9)) for _ in range(12)]
    spill, (shut, is_open) = tmp_path / "spill", gate
    spill.mkdir()

    def capture(path: Path, **options: Any) -> Any:
        sites = ["blocks.*.*", "logits"]  # rows, heads, patterns that grow, and the last position only
        return strapfmt.capture(model, path, sites=sites, quiet=True, batch_bytes=4096, **options)

    def run(some: list[torch.Tensor]) -> None:
        for ids in some:
            mask = torch.ones_like(ids)
            mask[0, :4] = 0
            model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)

    small = {"host_ring_bytes": 1 << 16, "gpu_ring_bytes": gpu_ring_bytes}
    with capture(tmp_path / "late.strap", on_full="spill", spill_path=spill, **small) as cap:
        run(prompts[:1])
        shut()
        run(prompts[1:9])
        wait_until(lambda: cap.stats.n_spill_pending_bytes > 2 * small["host_ring_bytes"])
        is_open.set()
        wait_until(lambda: cap.stats.n_spill_pending_bytes == 0)
        run(prompts[9:])  # straight to the host's ring again, or spilled once more
    assert late.n_fetched > 0
    assert (cap.report.n_dropped, list(spill.iterdir())) == (0, [])
    assert 0 < cap.stats.n_spilled_steps < cap.report.n_steps
    assert f"{cap.stats.n_spilled_steps} steps went through spill_path" in cap.report.notes
    monkeypatch.undo()
    with capture(tmp_path / "plain.strap"):
        run(prompts)
    assert_same(tmp_path / "late.strap", tmp_path / "plain.strap")


def test_nothing_is_awaited_on_the_device_while_a_pass_is_recorded(
    tmp_path: Path, late: LateStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tiny_model("llama"), tmp_path / "x.strap"
    ids = torch.arange(5, 29).reshape(2, 12)
    is_recording, waits = False, []
    wait = late.wait

    def noted(event: threading.Event) -> None:
        wait(event)
        waits.append(is_recording)

    monkeypatch.setattr(late, "wait", noted)
    options: dict[str, Any] = {"commit_interval_s": 0.01, "quiet": True}  # so that little is left to lie
    with strapfmt.capture(model, path, sites="blocks.*.resid_post", **options) as cap:
        for _ in range(3):
            model(ids)
        with cap.recording():
            is_recording = True
            model(ids)
            time.sleep(0.2)
            is_recording = False
    assert waits
    assert not any(waits)
    assert cap.report.n_steps == 3


def test_a_device_that_fails_in_a_capture_is_an_error_and_what_was_committed_stays(
    tmp_path: Path, late: LateStreams
) -> None:
    model = tiny_model("llama")
    path = tmp_path / "x.strap"
    ids = torch.arange(5, 29).reshape(2, 12)
    cap = strapfmt.capture(model, path, sites="blocks.*.resid_post", quiet=True)

    def run() -> None:
        with cap:
            model(ids)
            late.failure = RuntimeError("device lost")
            for _ in range(10_000):
                model(ids)

    with pytest.raises(DrainError, match="device lost"):
        run()
    assert strapfmt.verify(path).valid


@pytest.mark.parametrize("n_bytes", [1, 1 << 62])
def test_a_ring_on_a_device_that_cannot_be_made_names_the_argument_it_comes_from(n_bytes: int) -> None:
    rings, _ = staged(gpu=n_bytes)
    with pytest.raises(ArgumentError, match=r"^gpu_ring_bytes: expected"):
        rings.of(FIRST)
    assert rings.devices == {}


def test_a_slot_that_no_ring_on_a_device_could_hold_names_the_argument() -> None:
    rings, _ = staged()
    with pytest.raises(ArgumentError, match="raise gpu_ring_bytes"):
        rings.of(FIRST).reserve(1 << 20)
    rings.abort()
