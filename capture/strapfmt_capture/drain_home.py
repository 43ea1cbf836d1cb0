"""Where a drain runs, as the model's thread sees it; and the home in a thread of the same process."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter
from strapfmt_capture.disk_space import DiskSpace
from strapfmt_capture.drain import Drain, Progress
from strapfmt_capture.failures import stopped
from strapfmt_capture.intake import turn_bytes
from strapfmt_capture.items import Finish, Item
from strapfmt_capture.ring import Ring
from strapfmt_capture.spill import Spill

__all__ = ["DrainHome", "ThreadDrain"]

_PATIENCE_S = 2.0
#: What "recent" means for a rate.
_WINDOW_S = 5.0


class DrainHome(ABC):
    """A drain, wherever it runs.

    The first failure ends it: the ring is aborted, so that nobody waits for it, and the failure is kept for `check` and
    `finish`.

    Parameters
    ----------
    ring : Ring
    space : DiskSpace
        Told in every turn what there is to write.
    spill_path : Path or None
        Where steps are spilled.

    Attributes
    ----------
    path : Path
        The dataset.
    rank : int
    space : DiskSpace
    sites : mapping of str to SiteSpec
        What the dataset held as the session began, at least.
    spill : Spill or None
    """

    path: Path
    rank: int
    sites: Mapping[str, SiteSpec]

    def __init__(self, ring: Ring[Item], space: DiskSpace, spill_path: Path | None) -> None:
        self._ring, self.space = ring, space
        self._failure: BaseException | None = None
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        self._progress = Progress()
        self.spill = None if spill_path is None else Spill(spill_path, ring, self._fail)

    @property
    @abstractmethod
    def is_alive(self) -> bool:
        """Whether it runs, which it may still do after `abort` if the disk hangs."""

    @abstractmethod
    def reserve(self, kind: Literal["row", "step", "sequence"], n: int) -> int:
        """Return the first of `n` new consecutive ids."""

    @abstractmethod
    def start(self) -> None:
        """Begin."""

    @abstractmethod
    def abort(self) -> None:
        """End it without writing any more; the last commit stays. A disk that hangs is not waited for."""

    @abstractmethod
    def _join(self) -> None:
        """Return when it has ended."""

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return self._progress

    @property
    def n_committed_steps(self) -> int:
        """Steps of this session that are durable, of those that have ended."""
        return self.progress.n_committed_steps

    @property
    def n_spill_pending_bytes(self) -> int:
        """Bytes of the spill file that the writer has not got yet."""
        return 0 if self.spill is None else max(self.spill.file.end - self.progress.n_unspilled_bytes, 0)

    @property
    def bytes_per_s(self) -> float:
        """Bytes of values handed to the writer in a second, over the last few."""
        now, samples = time.monotonic(), self._samples
        since_s, n_bytes = samples[0]
        return max(self.progress.n_bytes - n_bytes, 0) / max(now - since_s, 1e-9)

    @property
    def failed(self) -> bool:
        """Whether it has stopped because of a failure."""
        return self._failure is not None

    def check(self) -> None:
        """Raise what has stopped the drain, if anything has.

        Raises
        ------
        DrainError
            With the failure as its cause.
        """
        if self._failure is not None:
            what = f"{self.path}: writing failed after {self.progress.n_rows} rows"
            raise stopped(what, self._failure) from self._failure

    def settle_spill(self) -> None:
        """Return when all that was spilled is in the file, or nothing more gets there."""
        if self.spill is not None:
            self.spill.settle()

    def finish(self, finish: Finish) -> None:
        """Write what is left, close the dataset, and end the drain.

        Raises
        ------
        DrainError
            If anything failed on the way.
        """
        try:
            self.settle_spill()
            if self.spill is not None:
                self.spill.close()
            self._ring.publish(finish)
            self._ring.close()
            self._join()
        except BaseException:
            self.abort()
            raise
        finally:
            self._close_spill()
        self.check()

    def _abort_rings(self) -> None:
        self._ring.abort()
        if self.spill is not None:
            self.spill.abort()

    def _close_spill(self) -> None:
        if self.spill is not None and not self.is_alive:
            self.spill.file.close()

    def _fail(self, failure: BaseException) -> None:
        self._failure = self._failure or failure
        self._abort_rings()

    def _look(self) -> None:
        """Look at the disk before memory is given back: what that holds counts as waiting until it is on the disk."""
        progress = self.progress
        self.space.passed(progress.most_pass_bytes)
        self.space.look(n_bytes=progress.n_bytes, n_rows=progress.n_rows, n_sites=len(progress.written))

    def _note(self, progress: Progress, position: int) -> None:
        """Take note of progress after a turn, and give back the slots before `position`."""
        self._progress = progress
        self._look()
        self._ring.release(position)
        now = time.monotonic()
        self._samples.append((now, progress.n_bytes))
        while len(self._samples) > 2 and self._samples[1][0] < now - _WINDOW_S:
            self._samples.popleft()


class ThreadDrain(DrainHome):
    """A drain in a thread of its own.

    Parameters
    ----------
    ring : Ring
    writer : DatasetWriter
        The drain's own from `start` on.
    space : DiskSpace
        Told in every turn what there is to write.
    spill_path : Path, optional
    """

    def __init__(
        self, ring: Ring[Item], writer: DatasetWriter, space: DiskSpace, spill_path: Path | None = None
    ) -> None:
        self._writer = writer
        try:
            super().__init__(ring, space, spill_path)
        except BaseException:
            writer.abort()
            raise
        self.path, self.rank, self.sites = writer.path, writer.rank, writer.sites
        self._drain = Drain(
            ring,
            writer,
            specs={},
            spill=None if self.spill is None else self.spill.file,
            max_bytes=turn_bytes(ring.n_bytes),
            on_turn=self._note,
        )
        self._thread = threading.Thread(target=self._run, name="strapfmt-drain", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    @property
    def progress(self) -> Progress:
        """How far it is; the object that the drain keeps up to date."""
        return self._drain.progress()

    def reserve(self, kind: Literal["row", "step", "sequence"], n: int) -> int:
        """Return the first of `n` new consecutive ids."""
        return self._writer.reserve(kind, n)

    def start(self) -> None:
        """Begin."""
        self._look()
        if self.spill is not None:
            self.spill.start()
        self._thread.start()

    def abort(self) -> None:
        """End the thread without writing any more."""
        self._abort_rings()
        if self._thread.ident is None:
            self._writer.abort()
        else:
            self._thread.join(_PATIENCE_S)
        self._close_spill()

    def _join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        self._drain.run()
        if self._drain.failure is not None:
            self._fail(self._drain.failure)
