"""Messages between the process that captures and the one that writes: JSON, and bytes behind it."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy.typing as npt

__all__ = ["Channel"]

_SIZES = struct.Struct("<QQ")
_TICK_S = 0.05


class Channel:
    """One end of a pair of sockets; one thread may send while another receives.

    Parameters
    ----------
    end : socket
        The channel's own from here on.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(end, select.POLLIN)
        self._writable.register(end, select.POLLOUT)

    def send(
        self,
        message: Mapping[str, Any],
        arrays: Sequence[npt.NDArray[Any]] = (),
        *,
        on_wait: Callable[[], None] = lambda: None,
    ) -> None:
        """Send a message, and `arrays` one behind the other; `on_wait` is called again and again while that waits.

        Raises
        ------
        OSError
            If nobody is at the other end.
        """
        text, tail = (
            json.dumps(message, separators=(",", ":")).encode(),
            [array.tobytes() for array in arrays],
        )
        view = memoryview(b"".join([_SIZES.pack(len(text), sum(map(len, tail))), text, *tail]))
        while view:
            try:
                view = view[self._end.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                on_wait()
                self._writable.poll(_TICK_S * 1_000)

    def receive(self, timeout_s: float | None) -> tuple[dict[str, Any], bytes] | None:
        """Return the next message and the bytes behind it, None if it does not begin within the time; None: wait.

        Raises
        ------
        EOFError
            If there will be none.
        """
        if not self._readable.poll(None if timeout_s is None else timeout_s * 1_000):
            return None
        n_text, n_tail = _SIZES.unpack(self._read(_SIZES.size))
        return json.loads(self._read(n_text)), self._read(n_tail)

    def end_sending(self) -> None:
        """Let the other end see that no more will come."""
        with contextlib.suppress(OSError):  # the other end may be gone already
            self._end.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close this end."""
        self._end.close()

    def _read(self, n_bytes: int) -> bytes:
        data = bytearray(n_bytes)
        view = memoryview(data)
        while view:
            try:
                n = self._end.recv_into(view)
            except ConnectionError:
                n = 0
            if n == 0:
                raise EOFError("the other process has ended")
            view = view[n:]
        return bytes(data)
