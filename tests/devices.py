"""A device that works beside the host, simulated: it does what it is told later, in the order of its streams."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

__all__ = ["LateStream", "LateStreams"]

PATIENCE_S = 20.0


class LateStream:
    """Runs functions one after another in a thread of its own, each after a moment."""

    def __init__(self, rng: random.Random, delay_s: float) -> None:
        self._rng, self._delay_s = rng, delay_s
        self._queue: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def launch(self, function: Callable[[], object]) -> None:
        self._queue.put(function)

    def _run(self) -> None:
        while True:
            function = self._queue.get()
            if self._delay_s:
                time.sleep(self._rng.random() * self._delay_s)
            function()


class LateStreams:
    """The streams of such a device: `model` is what the model's kernels are launched on."""

    def __init__(self, seed: int = 0, delay_s: float = 0.002) -> None:
        rng = random.Random(seed)
        self.model = LateStream(rng, delay_s)
        self.side = LateStream(rng, delay_s)
        self.n_fetched = 0
        self.failure: BaseException | None = None
        self.is_pinned = False

    def current(self) -> LateStream:
        return self.model

    def mark(self, stream: LateStream) -> threading.Event:
        event = threading.Event()
        stream.launch(event.set)
        return event

    def fetch(
        self, source: torch.Tensor, target: torch.Tensor, after: Sequence[threading.Event]
    ) -> threading.Event:
        if self.failure is not None:
            raise self.failure
        end = threading.Event()
        self.n_fetched += source.nbytes
        for event in after:
            self.side.launch(partial(event.wait, PATIENCE_S))
        self.side.launch(lambda: target.copy_(source))
        self.side.launch(end.set)
        return end

    def wait(self, event: threading.Event) -> None:
        assert event.wait(PATIENCE_S)

    def pin(self, memory: torch.Tensor) -> Callable[[], Any]:
        assert memory.device.type == "cpu"
        self.is_pinned = True
        return lambda: setattr(self, "is_pinned", False)
