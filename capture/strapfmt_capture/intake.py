"""Where a drain gets its turns from: a ring or another process, and the spill file where these say so."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from strapfmt.schema import SiteSpec
from strapfmt_capture.items import Item, Spilled, StepEnd, StepStart
from strapfmt_capture.messages import ItemReader
from strapfmt_capture.spill import SpillFile

__all__ = ["Intake", "Source", "Turn", "turn_bytes"]

_TURN_SHARE = 8
_TURN_BYTES = 16 << 20


class Source(Protocol):
    """Where a drain takes items from: a `Ring`, or what arrives from one in another process."""

    @property
    def is_aborted(self) -> bool:
        """Whether nothing more is to be written."""

    @property
    def position(self) -> int:
        """Position behind everything taken so far, for `release`."""

    def take(self, max_bytes: int, *, wait: bool = True) -> list[Item]:
        """Take items in order; none, if `wait`, means that no more will come."""

    def abort(self) -> None:
        """Say that nothing more will be taken."""


class Turn(NamedTuple):
    """What is written together; `position` and `spilled` say which memory and which part of the spill file it is."""

    items: list[Item]
    position: int
    spilled: int


class Intake:
    """Takes items from a source, and from the spill file where the source says so."""

    def __init__(self, source: Source, spill: SpillFile | None, specs: dict[str, SiteSpec]) -> None:
        self._source, self._spill, self._specs = source, spill, specs
        self._reader = ItemReader(specs)
        self._waiting: deque[Item] = deque()
        self._position = self._spilled = 0
        self._last_begun = self._last_ended = -1

    def take(self, max_bytes: int, *, wait: bool) -> Turn | None:
        """Return what comes next, None if there is nothing yet or, after waiting, nothing any more."""
        if not self._waiting:
            self._waiting.extend(self._source.take(max_bytes, wait=wait))
            if not self._waiting:
                return None
        items = self._read_back() if isinstance(self._waiting[0], Spilled) else list(self._next())
        if not self._waiting:
            self._position = self._source.position
        return Turn([item for item in items if not self._is_said_again(item)], self._position, self._spilled)

    def _is_said_again(self, item: Item) -> bool:
        """Whether this is the beginning or end of a step that was said before: an interrupt right behind does that."""
        if isinstance(item, StepStart):
            last, self._last_begun = self._last_begun, item.step.step
            return last == self._last_begun
        if isinstance(item, StepEnd):
            last, self._last_ended = self._last_ended, item.step.step
            return last == self._last_ended
        return False

    def _next(self) -> Iterator[Item]:
        """Take items up to the next that is spilled."""
        while self._waiting and not isinstance(self._waiting[0], Spilled):
            item = self._waiting.popleft()
            if isinstance(item, SiteSpec):
                self._specs[item.name] = item
            yield item

    def _read_back(self) -> list[Item]:
        """Read one record of the spill file."""
        spilled = self._waiting[0]
        assert isinstance(spilled, Spilled)
        assert self._spill is not None
        items, self._spilled = self._spill.read(max(spilled.start, self._spilled), self._reader)
        if self._spilled == spilled.stop:
            self._waiting.popleft()
        return items


def turn_bytes(ring_bytes: int) -> int:
    """Return how many bytes of values a turn has, so that two of them leave most of the ring to the hooks."""
    return min(_TURN_BYTES, ring_bytes // _TURN_SHARE)
