"""The process that writes: maps the ring, opens the dataset, and runs the drain; started by `ProcessDrain`.

It ends when it is told to, when it fails, or when the process that runs the model is gone. In that case it writes what
it was given before, marks a step that was cut off as abandoned, and commits: what that process had handed over is not
lost with it.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import torch

from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter
from strapfmt_capture.channel import Channel
from strapfmt_capture.drain import Drain, Progress
from strapfmt_capture.failures import described
from strapfmt_capture.intake import turn_bytes
from strapfmt_capture.items import Item
from strapfmt_capture.memory import Memory
from strapfmt_capture.messages import ItemReader
from strapfmt_capture.priority import lower
from strapfmt_capture.spill import SpillFile

__all__ = ["Inbox", "main"]

_TICK_S = 0.25


class Inbox:
    """The source of a drain: what the other process sends of its ring.

    Parameters
    ----------
    channel : Channel
    abort_fd : int
        Readable when nothing more is to be written.
    memory : Memory
        The ring's.
    writer : DatasetWriter
        Told which ids are used.
    specs : dict of str to SiteSpec
    """

    def __init__(
        self,
        channel: Channel,
        abort_fd: int,
        memory: Memory,
        writer: DatasetWriter,
        specs: dict[str, SiteSpec],
    ) -> None:
        self._channel, self._memory, self._writer = channel, memory, writer
        self._reader = ItemReader(specs)
        self._abort_fd, self._abort = abort_fd, select.poll()
        self._abort.register(abort_fd, select.POLLIN)
        self._parent = os.getppid()
        self._is_over = False
        self.position = 0
        #: Called now and then while there is nothing to do.
        self.on_idle: Callable[[], None] = lambda: None

    @property
    def is_aborted(self) -> bool:
        """Whether nothing more is to be written."""
        # At the end of a pipe there is nothing to read, which says that the other process is gone.
        return any(event & select.POLLIN for _, event in self._abort.poll(0))

    def take(self, max_bytes: int, *, wait: bool = True) -> list[Item]:
        """Take what was sent together."""
        while not self._is_over and not self.is_aborted:
            try:
                answer = self._channel.receive(_TICK_S if wait else 0)
            except EOFError:
                self._is_over = True
                break
            if answer is not None:
                message, tail = answer
                self._writer.skip_to(message["counters"])
                self.position = message["position"]
                return self._reader.decode(message["items"], tail, self._memory)
            if not wait:
                break
            self._is_over = os.getppid() != self._parent
            self.on_idle()
        return []

    def abort(self) -> None:
        """Take nothing more."""
        self._is_over = True

    def tell(self, progress: Progress, position: int) -> None:
        """Say how far the drain is, and which slots are free."""
        with suppress(OSError):  # nobody hears it any more; what was sent before is written all the same
            self._channel.send({"progress": asdict(progress), "position": position})


def main(arguments: Sequence[str]) -> int:
    """Run a drain for the process at the other end of a socket; arguments are descriptors."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the process that runs the model, which then closes
    torch.set_num_threads(1)
    end, abort_fd, ring_fd, *spill_fds = map(int, arguments)
    channel = Channel(socket.socket(fileno=end))
    try:
        answer = channel.receive(None)
    except EOFError:
        return 1
    assert answer is not None
    try:
        drain = _open(channel, answer[0], abort_fd, ring_fd, spill_fds)
    except Exception as error:  # noqa: BLE001 - raised in the other process
        channel.send({"failure": described(error)})
        return 1
    drain.run()
    if drain.failure is None:
        return 0
    with suppress(OSError):
        channel.send({"failure": described(drain.failure)})
    return 1


def _open(
    channel: Channel, setup: dict[str, Any], abort_fd: int, ring_fd: int, spill_fds: Sequence[int]
) -> Drain:
    """Open the dataset, and say how it is there."""
    memory = Memory(setup["ring_bytes"], fd=ring_fd)
    writer = DatasetWriter(**setup["writer"])
    specs: dict[str, SiteSpec] = {}
    inbox = Inbox(channel, abort_fd, memory, writer, specs)
    drain = Drain(
        inbox,
        writer,
        specs=specs,
        spill=SpillFile(spill_fds[0]) if spill_fds else None,
        max_bytes=turn_bytes(memory.n_bytes),
        on_turn=inbox.tell,
    )
    inbox.on_idle = drain.tell
    channel.send(
        {
            "path": str(writer.path),
            "rank": writer.rank,
            "sites": [asdict(site) for site in writer.sites.values()],
            "counters": dict(writer.counters),
            "is_idle": lower(),
        }
    )
    return drain


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
