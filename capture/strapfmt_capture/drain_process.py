"""The drain in another process: starts it, sends it what lies in the ring, and hears how far it is.

Values stay where the hooks copied them: the other process maps the ring's memory. Two threads keep up the connection,
so that the model's own thread deals with nothing but the ring.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from strapfmt.counters import Counters
from strapfmt.errors import CaptureError
from strapfmt.schema import SiteSpec
from strapfmt_capture.channel import Channel
from strapfmt_capture.disk_space import DiskSpace
from strapfmt_capture.drain import Progress
from strapfmt_capture.drain_home import DrainHome
from strapfmt_capture.failures import revived
from strapfmt_capture.intake import turn_bytes
from strapfmt_capture.items import Item
from strapfmt_capture.messages import encode_items
from strapfmt_capture.priority import set_idle
from strapfmt_capture.ring import Ring

__all__ = ["ProcessDrain"]

_PATIENCE_S = 2.0
_TICK_S = 1.0
#: Above this fill of the ring the process runs like any other, until the fill is below the second.
_HIGH_FILL, _LOW_FILL = 1 / 2, 1 / 4
#: The same if a turn takes so long.
_LATE_S = 1.0


class ProcessDrain(DrainHome):
    """A drain in a process of its own, which runs when the model leaves a core idle.

    Parameters
    ----------
    ring : Ring
        With shared memory.
    writer_options : mapping
        Arguments of `DatasetWriter`, JSON-ready.
    space : DiskSpace
        Told in every turn what there is to write.
    spill_path : Path, optional

    Attributes
    ----------
    pid : int

    Raises
    ------
    StrapfmtError
        What the writer has refused to begin with.
    CaptureError
        If the process has ended before it began.
    """

    def __init__(
        self,
        ring: Ring[Item],
        writer_options: Mapping[str, Any],
        space: DiskSpace,
        spill_path: Path | None = None,
    ) -> None:
        super().__init__(ring, space, spill_path)
        self._is_over = self._is_aborted = self._is_awaited = False
        self._scheduling = threading.Lock()
        self._is_idle = self._may_change = False
        #: Up to where the ring was sent, and since when there was no word of that; None if all was written.
        self._n_sent = 0
        self._behind_s: float | None = None
        try:
            self._launch(writer_options)
        except BaseException:
            self._close_spill()
            raise
        self._feeder = threading.Thread(target=self._feed, name="strapfmt-feed", daemon=True)
        self._listener = threading.Thread(target=self._listen, name="strapfmt-listen", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return not self._is_over

    def reserve(self, kind: Literal["row", "step", "sequence"], n: int) -> int:
        """Return the first of `n` new consecutive ids."""
        return self._counters.reserve(kind, n)

    def start(self) -> None:
        """Begin."""
        self._look()
        if self.spill is not None:
            self.spill.start()
        self._listener.start()
        self._feeder.start()

    def abort(self) -> None:
        """End the process without writing any more."""
        self._abort_rings()
        if not self._is_aborted:
            self._is_aborted = True
            with suppress(OSError):  # it is gone already
                os.write(self._abort_fd, b"a")
            os.close(self._abort_fd)
        self._channel.end_sending()
        if self._listener.ident is None:
            self._reap()
        else:
            self._listener.join(_PATIENCE_S)
        self._close_spill()

    def _join(self) -> None:
        self._is_awaited = True
        self._schedule()
        self._feeder.join()
        self._listener.join()
        if not self._is_aborted:
            self._is_aborted = True
            os.close(self._abort_fd)

    # Starting.

    def _launch(self, writer_options: Mapping[str, Any]) -> None:
        """Start the process, and wait until it has opened the dataset."""
        ours, theirs = socket.socketpair()
        abort_read, self._abort_fd = os.pipe()
        assert self._ring.fd is not None
        fds = [theirs.fileno(), abort_read, self._ring.fd]
        fds += [] if self.spill is None else [self.spill.file.fd]
        self._channel = Channel(ours)
        try:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "strapfmt_capture.drain_child", *map(str, fds)],
                    pass_fds=fds,
                    stdin=subprocess.DEVNULL,
                    env=_environment(),
                )
            finally:
                theirs.close()
                os.close(abort_read)
            self.pid = self._process.pid
            self._begin(writer_options)
        except BaseException:
            self._give_up()
            raise

    def _begin(self, writer_options: Mapping[str, Any]) -> None:
        try:
            self._channel.send({"writer": dict(writer_options), "ring_bytes": self._ring.n_bytes})
            answer = self._channel.receive(None)
        except (EOFError, OSError) as error:
            raise CaptureError(f"{self._ending()} before it had opened the dataset") from error
        assert answer is not None
        message = answer[0]
        if "failure" in message:
            raise revived(message["failure"])
        self.path, self.rank = Path(message["path"]), message["rank"]
        self.sites = {fields["name"]: _site(fields) for fields in message["sites"]}
        self._counters = Counters(self.rank, message["counters"])
        self._is_idle = self._may_change = message["is_idle"]

    def _give_up(self) -> None:
        self._is_over = True
        os.close(self._abort_fd)
        self._channel.close()
        if hasattr(self, "_process"):
            self._process.kill()
            self._process.wait()

    # Threads.

    def _feed(self) -> None:
        """Send what hooks left in the ring."""
        try:
            while items := self._ring.take(turn_bytes(self._ring.n_bytes)):
                coded, arrays = encode_items(items)
                position = self._ring.position
                message = {
                    "items": coded,
                    "position": position,
                    "counters": self._counters.numbers,
                }
                self._n_sent, self._behind_s = position, self._behind_s or time.monotonic()
                self._channel.send(message, arrays, on_wait=self._while_waiting)
                self._schedule()
            self._channel.end_sending()
        except OSError:
            return  # nobody is there any more; the listener says why
        except BaseException as error:  # noqa: BLE001 - raised where the user waits
            self._fail(error)

    def _while_waiting(self) -> None:
        if self._ring.is_aborted:
            raise BrokenPipeError("aborted")
        self._schedule()

    def _listen(self) -> None:
        """Hear how far the process is, until it ends."""
        try:
            while True:
                answer = self._channel.receive(_TICK_S)
                if answer is not None:
                    self._hear(answer[0])
                else:
                    self._schedule()
        except EOFError:
            pass
        finally:
            self._reap()

    def _hear(self, message: Mapping[str, Any]) -> None:
        if "failure" in message:
            self._fail(revived(message["failure"]))
            return
        self._note(Progress(**message["progress"]), message["position"])
        self._behind_s = time.monotonic() if message["position"] < self._n_sent else None
        self._schedule()

    def _reap(self) -> None:
        """Wait for the process to end; that it does so without `Finish` or a failure is one."""
        code = self._process.wait()
        self._channel.close()
        self._is_over = True
        if code != 0 and not self._ring.is_aborted:
            self._fail(ChildProcessError(self._ending()))

    def _ending(self) -> str:
        code = self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"has ended with exit code {code}"
        return f"the process that writes (pid {self.pid}) {how}"

    def _schedule(self) -> None:
        """Let the process run only where a core is idle, unless it falls behind or somebody waits for its end."""
        with self._scheduling:
            fill = self._ring.fill
            is_late = self._behind_s is not None and time.monotonic() - self._behind_s > _LATE_S
            wants_idle = not (
                self._is_awaited or is_late or fill > (_HIGH_FILL if self._is_idle else _LOW_FILL)
            )
            if self._may_change and wants_idle != self._is_idle:
                with suppress(ProcessLookupError):
                    set_idle(self.pid, wants_idle)
                self._is_idle = wants_idle


def _site(fields: Mapping[str, Any]) -> SiteSpec:
    return SiteSpec(**{**fields, "statistics": tuple(fields["statistics"])})


def _environment() -> dict[str, str]:
    """Return the environment for a process that finds the same modules, has one thread, and uses no GPU."""
    paths = [os.path.abspath(path) for path in sys.path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
