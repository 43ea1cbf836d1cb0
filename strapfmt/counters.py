"""The numbers of rows, steps and sequences that one writer gives out."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from strapfmt import spec
from strapfmt.arguments import as_integer
from strapfmt.errors import ArgumentError
from strapfmt.manifest import COUNTERS

__all__ = ["Counters"]


class Counters:
    """Gives out consecutive numbers of each kind; safe from any thread.

    Parameters
    ----------
    rank : int
    numbers : mapping of str to int
        The next number of each kind.
    """

    def __init__(self, rank: int, numbers: Mapping[str, int]) -> None:
        self._rank, self._numbers = rank, dict(numbers)
        self._lock = threading.Lock()

    @property
    def numbers(self) -> dict[str, int]:
        """The next number of each kind, without the rank's bits."""
        with self._lock:
            return dict(self._numbers)

    def reserve(self, kind: str, n: int) -> int:
        """Return the first of `n` new consecutive ids: `rank << 40 | counter`."""
        if kind not in COUNTERS:
            raise ArgumentError(f"kind: expected one of {', '.join(COUNTERS)}; got {kind!r}")
        n = as_integer(f"{kind}: n", n, least=0)
        with self._lock:
            first = self._numbers[kind]
            if first + n > 1 << spec.COUNTER_BITS:
                raise ArgumentError(f"{kind}: a rank holds at most 2^{spec.COUNTER_BITS} of them")
            self._numbers[kind] = first + n
        return self._rank << spec.RANK_SHIFT | first

    def skip_to(self, numbers: Mapping[str, int]) -> None:
        """Never give out a number below these (by kind, without the rank's bits), as they are used elsewhere."""
        with self._lock:
            self._numbers = {kind: max(n, numbers.get(kind, 0)) for kind, n in self._numbers.items()}
