"""A line on the terminal while a capture runs: rows, MB/s, how full the ring is, and what was dropped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.live import Live

__all__ = ["ProgressLine"]

_REFRESHES_PER_S = 4


class ProgressLine:
    """Shows a line on a terminal for as long as it is entered; elsewhere it does nothing.

    Parameters
    ----------
    read : callable
        Returns rows written, bytes written, fill of the ring (0 to 1) and rows dropped.
    show : bool, optional
        None: if `stream` is a terminal.
    stream : text file, optional
        The standard error stream by default.
    """

    def __init__(
        self,
        read: Callable[[], tuple[int, int, float, int]],
        *,
        show: bool | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._read = read
        self._stream = sys.stderr if stream is None else stream
        self._show = self._stream.isatty() if show is None else show
        self._started_s = 0.0
        self._live: Live | None = None

    def text(self) -> str:
        """Return the line as it is now."""
        n_rows, n_bytes, fill, n_dropped = self._read()
        rate = n_bytes / 1e6 / max(time.monotonic() - self._started_s, 1e-9)
        return f"strapfmt: {n_rows:,} rows  {rate:,.1f} MB/s  ring {fill:.0%}  dropped {n_dropped:,}"

    def __enter__(self) -> Self:
        self._started_s = time.monotonic()
        if self._show:
            from rich.console import Console
            from rich.live import Live
            from rich.text import Text

            self._live = Live(
                get_renderable=lambda: Text(self.text(), no_wrap=True, overflow="ellipsis"),
                console=Console(file=self._stream, force_terminal=True),
                refresh_per_second=_REFRESHES_PER_S,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
