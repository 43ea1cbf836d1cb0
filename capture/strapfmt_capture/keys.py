"""Which keys a running capture has carried out: a block of passes counts as a whole, and once it is durable."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from strapfmt.done_keys import UNFINISHED

__all__ = ["Begun", "Keys"]


@dataclass(slots=True)
class Begun:
    """Sequences that have begun: the first row of each, and the keys among their tags, as JSON text."""

    rows: list[int] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Block:
    """Passes that belong together, and the first thing that kept one of them from being stored."""

    begun: Begun = field(default_factory=Begun)
    problem: str | None = None


class Keys:
    """Follows the steps of a session, and the blocks they lie in.

    Attributes
    ----------
    n_steps : int
        Steps that have ended.
    """

    def __init__(self) -> None:
        self.n_steps = 0
        self._last_step = -1
        self._block: _Block | None = None
        #: Keys in the order of their ends, and how many steps must be durable for them to be so.
        self._ended: deque[tuple[int, set[str]]] = deque()

    @property
    def is_in_block(self) -> bool:
        """Whether steps that end now are committed only with later ones."""
        return self._block is not None

    def begin_block(self) -> None:
        """Begin a block, outside of any other."""
        self._block = _Block()

    def step_ended(self, step: int, begun: Begun, status: str, reason: str | None) -> None:
        """Take note of a step that has ended, and the sequences that began in it; once for each step."""
        if step == self._last_step:
            return
        # What counts it is one statement, as an interrupt has this said again.
        n_steps, block = self.n_steps + 1, self._block
        if block is None:
            if begun.keys and status == "complete":
                self._ended.append((n_steps, begun.keys))
            self._last_step, self.n_steps = step, n_steps
            return
        problem = block.problem
        if status != "complete":
            problem = problem or f"a pass was {status}: {reason}"
        together = Begun([*block.begun.rows, *begun.rows], block.begun.keys | begun.keys)
        block.begun, block.problem, self._last_step, self.n_steps = together, problem, step, n_steps

    def end_block(self, problem: str | None, step: int) -> dict[str, Any] | None:
        """Return columns of `row_events` that tell of the block's sequences, if it was not carried out.

        It is over with `leave_block`, when these have been handed over.

        Parameters
        ----------
        problem : str or None
            What has cut it off.
        step : int
            The last step.
        """
        block = self._block
        assert block is not None
        problem = block.problem or problem
        rows = block.begun.rows
        if problem is None:
            if block.begun.keys:
                self._ended.append((self.n_steps, block.begun.keys))
            return None
        if not rows:
            return None
        n = len(rows)
        return {
            "row": np.array(rows),
            "step": np.full(n, step),
            "event": [UNFINISHED] * n,
            "detail": [problem] * n,
        }

    def leave_block(self) -> None:
        """Steps that end from now on are committed by themselves."""
        self._block = None

    def take_durable(self, n_steps: int) -> set[str]:
        """Return keys that are durable now that so many steps are, and were not yet at the last call."""
        durable: set[str] = set()
        while self._ended and self._ended[0][0] <= n_steps:
            durable |= self._ended.popleft()[1]
        return durable
