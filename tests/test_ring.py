"""The ring buffer: what goes in comes out, in order, in bounded memory, whatever happens to either side."""

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from interrupts import interrupts

from strapfmt.errors import ArgumentError
from strapfmt_capture.ring import Ring, Slot

PATIENCE_S = 20.0


@pytest.fixture
def thread() -> Iterator[Callable[[Callable[[], None]], threading.Thread]]:
    """Start a function in a thread; the test fails if it is still running, or has failed, at the end."""
    started: list[threading.Thread] = []
    failures: list[BaseException] = []

    def start(function: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                function()
            except BaseException as error:  # noqa: BLE001 - the fixture reports it
                failures.append(error)

        started.append(threading.Thread(target=run, daemon=True))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.join(PATIENCE_S)
    assert not any(one.is_alive() for one in started)
    assert failures == []


def put(ring: Ring[tuple[int, Slot]], n_bytes: int, value: int) -> bool:
    slot = ring.reserve(n_bytes)
    if slot is None:
        return False
    ring.view(slot.start, torch.uint8, (n_bytes,)).fill_(value)
    ring.publish((n_bytes, slot), slot)
    return True


def test_views_are_aligned_typed_and_alias_the_ring() -> None:
    ring: Ring[str] = Ring(1000)
    assert ring.n_bytes == 1024
    slot = ring.reserve(48)
    assert slot is not None
    view = ring.view(slot.start, torch.bfloat16, (2, 3, 4))
    assert view.data_ptr() % 64 == 0
    assert (view.shape, view.dtype, view.is_contiguous()) == ((2, 3, 4), torch.bfloat16, True)
    view.fill_(1.5)
    assert torch.equal(
        ring.view(slot.start, torch.bfloat16, (24,)), torch.full((24,), 1.5, dtype=torch.bfloat16)
    )


def test_slots_follow_each_other_and_are_released_in_order() -> None:
    ring: Ring[tuple[int, Slot]] = Ring(256)
    for value in range(4):
        assert put(ring, 60, value)
    assert ring.fill == 1.0
    assert ring.peak_bytes == 256
    assert [slot.start for _, slot in ring.take(128)] == [0, 64]
    assert ring.n_used == 256
    ring.release(ring.position)
    assert ring.n_used == 128
    assert put(ring, 128, 9)
    assert [slot.start % 256 for _, slot in ring.take(1000)] == [128, 192, 0]


def test_a_slot_is_never_torn_at_the_end_of_the_memory() -> None:
    ring: Ring[tuple[int, Slot]] = Ring(256)
    put(ring, 100, 1)
    put(ring, 64, 2)
    ring.take(0)
    ring.release(ring.position)
    put(ring, 128, 3)
    taken = ring.take(1000)
    assert [slot.start % 256 for _, slot in taken] == [128, 0]


def test_an_empty_ring_begins_again_at_the_start_of_its_memory() -> None:
    ring: Ring[tuple[int, Slot]] = Ring(1 << 20)
    for _ in range(5):
        put(ring, 1000, 1)
        ((_, slot),) = ring.take(1000)
        assert slot.start % ring.n_bytes == 0
        ring.release(ring.position)
    assert ring.n_used == 0


def test_a_little_is_not_worth_taking_also_when_the_ring_begins_again() -> None:
    ring: Ring[tuple[int, Slot]] = Ring(1 << 20, linger_s=0.01)
    for _ in range(3):
        put(ring, 1000, 1)
        assert ring.take(1 << 20, wait=False) == []
        assert len(ring.take(1 << 20)) == 1
        ring.release(ring.position)


def test_a_slot_as_large_as_the_ring_fits_and_a_larger_one_is_refused() -> None:
    ring: Ring[tuple[int, Slot]] = Ring(256)
    assert put(ring, 3, 1)
    ring.take(100)
    ring.release(ring.position)
    assert put(ring, 256, 1)
    with pytest.raises(ArgumentError, match="257 bytes does not fit a ring of 256; raise host_ring_bytes"):
        ring.reserve(257)
    with pytest.raises(ArgumentError, match="host_ring_bytes"):
        Ring(1)


def test_take_gives_at_least_one_item_and_no_more_bytes_than_asked() -> None:
    ring: Ring[tuple[int, Slot]] = Ring(1024)
    for value in range(4):
        put(ring, 128, value)
    ring.close()
    assert len(ring.take(1)) == 1
    assert len(ring.take(256)) == 2
    assert len(ring.take(256)) == 1
    assert ring.take(256, wait=False) == []


def test_items_without_memory_keep_their_place() -> None:
    ring: Ring[str] = Ring(256)
    slot = ring.reserve(64)
    ring.publish("slot", slot)
    ring.publish("end")
    ring.close()
    assert ring.take(1000) == ["slot", "end"]
    assert ring.take(1000) == []


def test_a_reservation_that_was_never_published_is_forgotten() -> None:
    ring: Ring[str] = Ring(256)
    first = ring.reserve(200)
    assert ring.reserve(200) == first
    assert ring.n_used == 0


def test_a_producer_waits_for_space_and_the_wait_is_counted(thread: Callable[..., threading.Thread]) -> None:
    ring: Ring[tuple[int, Slot]] = Ring(128)
    put(ring, 128, 1)
    producer = thread(lambda: put(ring, 128, 2))
    time.sleep(0.05)
    assert producer.is_alive()
    ring.take(128)
    assert producer.is_alive()
    ring.release(ring.position)
    producer.join(PATIENCE_S)
    assert not producer.is_alive()
    assert ring.stall_s > 0.02


def test_abort_wakes_a_waiting_producer_with_nothing(thread: Callable[..., threading.Thread]) -> None:
    ring: Ring[tuple[int, Slot]] = Ring(128)
    put(ring, 128, 1)
    results: list[bool] = []
    producer = thread(lambda: results.append(put(ring, 128, 2)))
    time.sleep(0.02)
    ring.abort()
    producer.join(PATIENCE_S)
    assert results == [False]
    assert ring.reserve(1) is None
    assert ring.take(128) == []


def test_a_waiting_consumer_is_woken_by_close(thread: Callable[..., threading.Thread]) -> None:
    ring: Ring[str] = Ring(128)
    taken: list[list[str]] = []
    consumer = thread(lambda: taken.append(ring.take(128)))
    time.sleep(0.02)
    ring.close()
    consumer.join(PATIENCE_S)
    assert taken == [[]]


def test_the_consumer_waits_for_more_but_not_for_long(thread: Callable[..., threading.Thread]) -> None:
    ring: Ring[tuple[int, Slot]] = Ring(1 << 20)
    taken: list[int] = []
    consumer = thread(lambda: taken.append(len(ring.take(1 << 20))))
    for value in range(3):
        put(ring, 64, value)
        time.sleep(0.001)
    consumer.join(PATIENCE_S)
    assert taken == [3]


def test_everything_arrives_in_order_through_a_small_ring(thread: Callable[..., threading.Thread]) -> None:
    ring: Ring[tuple[int, Slot]] = Ring(1 << 10)
    sizes = [random.Random(i).choice([1, 64, 100, 333, 700, 1024]) for i in range(1500)]
    wrong: list[int] = []
    n_seen = 0

    def consume() -> None:
        nonlocal n_seen
        while items := ring.take(300):
            for n_bytes, slot in items:
                expected = torch.full((n_bytes,), n_seen % 251, dtype=torch.uint8)
                if n_bytes != sizes[n_seen] or not torch.equal(
                    ring.view(slot.start, torch.uint8, (n_bytes,)), expected
                ):
                    wrong.append(n_seen)
                n_seen += 1
            ring.release(ring.position)

    consumer = thread(consume)
    for i, n_bytes in enumerate(sizes):
        put(ring, n_bytes, i % 251)
    ring.close()
    consumer.join(PATIENCE_S)
    assert (n_seen, wrong) == (len(sizes), [])
    assert ring.peak_bytes <= ring.n_bytes
    assert ring.n_used == 0


class Interrupted(BaseException):
    pass


def test_interrupts_at_any_moment_leave_a_ring_that_works(thread: Callable[..., threading.Thread]) -> None:
    ring: Ring[tuple[int, Slot]] = Ring(1 << 10)
    wrong: list[Slot] = []

    def consume() -> None:
        while items := ring.take(256):
            for n_bytes, slot in items:
                view = ring.view(slot.start, torch.uint8, (n_bytes,))
                if view.unique().numel() > 1:
                    wrong.append(slot)
            ring.release(ring.position)

    consumer = thread(consume)
    n_interrupts = n_published = 0
    began = time.monotonic()

    def goes_on() -> bool:
        is_enough = n_interrupts > 20 and n_published > 50
        return time.monotonic() - began < (0.5 if is_enough else PATIENCE_S)

    with interrupts(Interrupted) as arm:
        while goes_on():
            try:
                arm(random.uniform(0.0001, 0.002))
                while goes_on():
                    put(ring, random.choice([64, 200, 500]), n_published % 256)
                    n_published += 1
                arm(0.0)
            except Interrupted:
                n_interrupts += 1
    assert put(ring, 1024, 1)
    ring.close()
    consumer.join(PATIENCE_S)
    assert not consumer.is_alive()
    assert wrong == []
    assert n_interrupts > 20
    assert n_published > 50
    assert ring.n_used == 0
