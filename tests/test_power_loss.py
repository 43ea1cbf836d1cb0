"""Every state that a power loss may leave opens as an exact committed prefix, no less than what was acknowledged.

The disk records what the writer asks of it. What was not made durable may then be lost, or be there in part: of the
writes to a file since its last fsync each is missing, torn or whole; of the changes to a directory since it was last
synced any have happened. At every instant of a run, and for many combinations, the files are laid out and opened.
"""

import itertools
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from small_datasets import Contents, Script, contents_of, quick_directory

from strapfmt.commit import Disk
from strapfmt.errors import DatasetExistsError, DatasetNotFoundError, StrapfmtError
from strapfmt.reader import Reader
from strapfmt.writer import DatasetWriter

N_STATES = 1_500
N_SLOW_STATES = int(os.environ.get("STRAPFMT_N_STATES", "100000"))

State = dict[str, bytes]


@dataclass(eq=False)
class Inode:
    """A file: what is durable, and the writes since then."""

    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)


@dataclass(eq=False)
class Folder:
    """A directory: its durable entries, and the changes since (an entry of None is removed)."""

    durable: dict[str, "Inode | Folder"] = field(default_factory=dict)
    pending: list[dict[str, "Inode | Folder | None"]] = field(default_factory=list)

    def now(self) -> dict[str, "Inode | Folder"]:
        """Return the entries as programs see them."""
        return _applied(self.durable, self.pending)


def _applied(
    entries: dict[str, Inode | Folder], changes: Sequence[dict[str, Inode | Folder | None]]
) -> dict[str, Inode | Folder]:
    result: dict[str, Inode | Folder | None] = dict(entries)
    for change in changes:
        result |= change
    return {name: entry for name, entry in result.items() if entry is not None}


class RecordingDisk(Disk):
    """Does everything, and keeps what of it is durable; `moments` are copies of that after each operation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = Folder()
        self.files: dict[int, Inode] = {}
        self.n_steps = -1
        self.moments: list[tuple[int, Folder]] = []

    def _folder(self, path: Path) -> tuple[Folder, str]:
        parts = path.relative_to(self.path).parts
        folder: Inode | Folder = self.root
        for part in parts[:-1]:
            assert isinstance(folder, Folder)
            folder = folder.now()[part]
        assert isinstance(folder, Folder)
        return folder, parts[-1]

    def _changed(self) -> None:
        self.moments.append((self.n_steps, _copy(self.root, {})))

    def create(self, path: Path) -> int:
        fd = super().create(path)
        folder, name = self._folder(path)
        self.files[fd] = Inode()
        folder.pending.append({name: self.files[fd]})
        self._changed()
        return fd

    def write(self, fd: int, pieces: Sequence[bytes | memoryview], offset: int) -> None:
        super().write(fd, pieces, offset)
        self.files[fd].pending.append((offset, b"".join(bytes(piece) for piece in pieces)))
        self._changed()

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        self._sync(self.files[fd])
        self._changed()

    def _sync(self, inode: Inode) -> None:
        inode.durable, inode.pending = _written(inode.durable, inode.pending), []

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        folder, old = self._folder(source)
        same, new = self._folder(target)
        assert folder is same
        folder.pending.append({new: folder.now()[old], old: None})
        self._changed()

    def unlink(self, path: Path) -> None:
        super().unlink(path)
        folder, name = self._folder(path)
        if name in folder.now():
            folder.pending.append({name: None})
            self._changed()

    def mkdir(self, path: Path) -> None:
        super().mkdir(path)
        if path == self.path:
            return  # its name lies outside of what is looked at
        folder, name = self._folder(path)
        folder.pending.append({name: Folder()})
        self._changed()

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        if path.is_relative_to(self.path):
            folder, _ = self._folder(path / "any")
            self._sync_folder(folder)
            self._changed()

    def _sync_folder(self, folder: Folder) -> None:
        folder.durable, folder.pending = folder.now(), []


class ForgetfulDisk(RecordingDisk):
    """Tells the writer that files are durable when they are not."""

    def _sync(self, inode: Inode) -> None: ...


class ForgetfulFolders(RecordingDisk):
    """Tells the writer that names are durable when they are not."""

    def _sync_folder(self, folder: Folder) -> None: ...


def _copy(entry: Folder, seen: dict[int, Inode | Folder]) -> Folder:
    """Copy a tree; a file that has several names in it stays one file."""

    def twin(old: Inode | Folder | None) -> Inode | Folder | None:
        if old is None:
            return None
        if id(old) not in seen:
            seen[id(old)] = (
                Inode(old.durable, list(old.pending)) if isinstance(old, Inode) else _copy(old, seen)
            )
        return seen[id(old)]

    durable = {name: found for name, old in entry.durable.items() if (found := twin(old)) is not None}
    pending = [{name: twin(old) for name, old in change.items()} for change in entry.pending]
    return Folder(durable, pending)


def _written(data: bytes, writes: Sequence[tuple[int, bytes]]) -> bytes:
    result = bytearray(data)
    for offset, piece in writes:
        result.extend(bytes(max(offset + len(piece) - len(result), 0)))
        result[offset : offset + len(piece)] = piece
    return bytes(result)


def states_after(folder: Folder, rng: random.Random, limit: int) -> Iterator[State]:
    """Yield what may be found after a power loss: nothing pending, all of it, and up to `limit` choices between."""
    yield _survivors(folder, random.Random(0), probability=0.0)
    yield _survivors(folder, random.Random(0), probability=1.0)
    for _ in range(limit):
        yield _survivors(folder, rng, probability=rng.choice([0.1, 0.5, 0.5, 0.9]))


def _survivors(folder: Folder, rng: random.Random, probability: float, place: str = "") -> State:
    if rng.random() < 0.5:  # a journal keeps the order of changes, other file systems need not
        kept = list(
            itertools.takewhile(lambda _: rng.random() < probability or probability == 1, folder.pending)
        )
    else:
        kept = [change for change in folder.pending if rng.random() < probability]
    state: State = {}
    for name, entry in sorted(_applied(folder.durable, kept).items()):
        if isinstance(entry, Folder):
            state[place + name + "/"] = b""
            state |= _survivors(entry, rng, probability, place + name + "/")
        else:
            state[place + name] = _torn(entry, rng, probability)
    return state


def _torn(inode: Inode, rng: random.Random, probability: float) -> bytes:
    writes = []
    for offset, piece in inode.pending:
        if rng.random() < probability:
            whole = probability == 1 or rng.random() < 0.7
            writes.append((offset, piece if whole else piece[: rng.randrange(len(piece) + 1)]))
        elif rng.random() < 0.3:
            writes.append((offset, bytes(len(piece))))  # its length reached the disk, its bytes did not
    return _written(inode.durable, writes)


class Layout:
    """Lays states out on disk, changing only what differs from the state before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now: State = {}

    def become(self, state: State) -> None:
        for name in sorted(set(self.now) - set(state), reverse=True):
            target = self.path / name
            target.rmdir() if name.endswith("/") else target.unlink()
        for name, data in state.items():
            if name.endswith("/"):
                (self.path / name).mkdir(exist_ok=True)
            elif self.now.get(name) != data:
                (self.path / name).unlink(missing_ok=True)
                (self.path / name).write_bytes(data)
        self.now = state


@pytest.fixture(scope="module")
def known() -> dict[int, Contents]:
    """What the first steps hold, at each commit."""
    return {n: Script().contents(n) for n in (0, 1, 3, 5, 6, 7)}


def record(disk: RecordingDisk) -> None:
    """Write, commit, close, append and be cut off, telling the disk what was acknowledged."""
    script = Script()
    options = {"batch_bytes": 128, "shard_bytes": 2800, "commit_interval_s": 1e9}
    writer = DatasetWriter(disk.path, disk=disk, **options)  # type: ignore[arg-type]
    disk.n_steps = 0
    script.declare(writer)
    for step in range(5):
        script.write(writer, step)
        if step in (0, 2):
            writer.commit()
            disk.n_steps = step + 1
    writer.close()
    disk.n_steps = 5
    writer = DatasetWriter(disk.path, mode="append", disk=disk, **options)  # type: ignore[arg-type]
    script.declare(writer)
    script.write(writer, 5)
    writer.commit()
    disk.n_steps = 6
    script.write(writer, 6)
    writer.abort()


def is_sound(path: Path, acknowledged: int, known: dict[int, Contents]) -> bool:
    """Whether a dataset is a committed prefix that holds all that was acknowledged (-1: not even its making)."""
    try:
        with Reader(path, verify="always") as reader:
            n_steps = Script().n_steps_of(reader)
            if n_steps < acknowledged or n_steps not in known:
                return False
            return reader.names == [] or contents_of(reader) == known[n_steps]
    except DatasetNotFoundError:
        return acknowledged < 0
    except StrapfmtError:
        return False


def count_states(kind: type[RecordingDisk], n_states: int, known: dict[int, Contents]) -> tuple[int, int]:
    """Return how many distinct states were opened, and how many of them were not sound."""
    rng = random.Random(n_states)
    seen: set[tuple[int, int]] = set()
    n_bad = 0
    with quick_directory() as directory:
        disk = kind(directory / "run.strap")
        record(disk)
        shutil.rmtree(disk.path)
        target = directory / "after.strap"
        target.mkdir()
        layout = Layout(target)
        for each in itertools.count(1):
            for acknowledged, folder in disk.moments:
                for state in states_after(folder, rng, min(each * 4, 32)):
                    key = (acknowledged, hash(tuple(sorted(state.items()))))
                    if key in seen:
                        continue
                    seen.add(key)
                    layout.become(state)
                    n_bad += not is_sound(target, acknowledged, known)
                    if len(seen) >= n_states:
                        return len(seen), n_bad
            if each * 4 > 64 and len(seen) < 100:
                return len(seen), n_bad
    raise AssertionError("unreachable")


def test_every_state_after_a_power_loss_is_a_committed_prefix(known: dict[int, Contents]) -> None:
    assert count_states(RecordingDisk, N_STATES, known) == (N_STATES, 0)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_state_after_a_power_loss_is_a_committed_prefix_in_the_long_form(
    known: dict[int, Contents],
) -> None:
    assert count_states(RecordingDisk, N_SLOW_STATES, known) == (N_SLOW_STATES, 0)


def test_what_a_power_loss_leaves_of_a_new_rank_is_created_over_unless_it_was_committed() -> None:
    rng, seen = random.Random(1), dict[int, bool]()
    with quick_directory() as directory:
        disk = RecordingDisk(directory / "run.strap")
        DatasetWriter(disk.path, disk=disk).close()
        for _, folder in disk.moments:
            for state in states_after(folder, rng, 8):
                key = hash(tuple(sorted(state.items())))
                if key not in seen:
                    path = directory / f"{len(seen)}.strap"
                    path.mkdir()
                    Layout(path).become(state)
                    seen[key] = is_created_over(path)
    assert len(seen) > 10
    assert set(seen.values()) == {False, True}


def is_created_over(path: Path) -> bool:
    """Create over what a power loss left, as must be possible if nothing was committed; return whether it was."""
    try:
        Reader(path).close()
    except DatasetNotFoundError:
        DatasetWriter(path).close()
        return True
    with pytest.raises(DatasetExistsError):
        DatasetWriter(path)
    return False


@pytest.mark.parametrize("kind", [ForgetfulDisk, ForgetfulFolders])
def test_a_disk_that_lies_is_found_out(kind: type[RecordingDisk], known: dict[int, Contents]) -> None:
    _, n_bad = count_states(kind, 300, known)
    assert n_bad > 10
