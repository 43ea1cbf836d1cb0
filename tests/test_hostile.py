"""Damaged and malicious files: never a wrong value, a dead process, a hang or runaway memory; a typed error instead.

Everything here is opened in children, so that a fault of the process is seen and told apart.
"""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forge import Forger, leaves, put
from small_datasets import Contents, bits, make_dataset, quick_directory, taken

import strapfmt
from strapfmt import spec
from strapfmt.errors import StrapfmtError
from strapfmt.reader import Reader
from strapfmt.repair import repair
from strapfmt.verify import verify

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["small_datasets", "forge"])

MEMORY_BYTES = 12 << 30
N_FLIPS, N_CUTS, N_SPECIAL, N_FIELDS, N_NUMBERS, N_MESSAGES = 500, 250, 40, 100, 40, 100
N_SLOW_NUMBERS = int(os.environ.get("STRAPFMT_N_NUMBERS", "6000"))
N_SLOW_MESSAGES = int(os.environ.get("STRAPFMT_N_MESSAGES", "20000"))

Mutation = tuple[str, int, int]
"""A file, where, and the bit to flip there; -1 cuts the file there."""


# Children.


def run_in_child(function: Callable[..., Iterable[str]], *args: Any, timeout_s: float) -> list[str]:
    """Run a generator of complaints in a process of its own; its death by a signal is a complaint too."""
    receive, send = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_child, args=(send, function, args))
    process.start()
    send.close()
    complaints, last, deadline = [], "the beginning", time.monotonic() + timeout_s
    done = False
    while not done:
        if not receive.poll(max(deadline - time.monotonic(), 0)):
            process.kill()
            complaints.append(f"hangs at {last}")
            break
        try:
            kind, text = receive.recv()
        except EOFError:
            break
        if kind == "at":
            last = text
        elif kind == "complaint":
            complaints.append(text)
        else:
            done = True
    process.join()
    receive.close()
    if not done and complaints[-1:] != [f"hangs at {last}"]:
        complaints.append(f"the process died with {process.exitcode} at {last}")
    return complaints


def _child(send: Any, function: Callable[..., Iterable[str]], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for text in function(*args):
        send.send(("at" if text.startswith("at ") else "complaint", text))
    send.send(("done", ""))


def try_everything(path: Path, expected: Contents | None, only: str = "") -> Iterator[str]:
    """Read a dataset in every way; yield what came out wrong. Without `expected` any values are right."""
    try:
        reader = strapfmt.open(path, verify="always")
    except StrapfmtError:
        return
    with reader:
        yield from _tried(f"{path.name}: refresh", reader.refresh)
        yield from _tried(f"{path.name}: report", lambda: str(reader.report))
        yield from _tried(f"{path.name}: sites", lambda: repr(reader.sites))
        for name in reader.names:
            if only in ("", f"site {name}"):
                yield from _try_site(reader, name, expected)
        for name, table in reader.tables.items():
            if only in ("", f"table {name}"):
                found = _read(lambda table=table: repr(table.to_arrow().to_pylist()).encode())
                yield from _compared(f"{path.name}: table {name}", found, _rows(expected, name))


def try_sql(path: Path, expected: Contents, only: str) -> Iterator[str]:
    """Ask for one site or table in SQL, and compare what has a name of its own."""
    kind, _, name = only.partition(" ")
    quoted = name.replace('"', '""')
    try:
        reader = strapfmt.open(path, verify="always")
    except StrapfmtError:
        return
    with reader:
        found = _read(lambda: reader.sql(f'select * from "{quoted}"').to_arrow())
        if not isinstance(found, RuntimeError) and found is not None and kind == "site":
            row = next(column for column in ("own_row", "row") if column in found.column_names)
            found = np.asarray(found[row].to_numpy(), np.int64).tobytes()
        elif not isinstance(found, RuntimeError) and found is not None:
            found = repr(found.to_pylist()).encode()
        right = expected[only]["row" if kind == "site" else "rows"]
        yield from _compared(f"{path.name}: SQL over {only}", found, right)


def _rows(expected: Contents | None, table: str) -> bytes | None:
    return None if expected is None else expected[f"table {table}"]["rows"]


def _try_site(reader: Reader, name: str, expected: Contents | None) -> Iterator[str]:
    place, right = f"{reader.path.name}: site {name}", None if expected is None else expected[f"site {name}"]
    found = _read(lambda: contents_of_site(reader, name))
    yield from _compared(place, found, right)
    site = reader[name]
    values = None if right is None else right["activation"]
    if not site.is_ragged:
        yield from _compared(place + ".tensor()", _read(lambda: bits(site.tensor())), values)
        yield from _compared(place + "[:]", _read(lambda: b"".join(bits(row) for row in site)), values)
        yield from _compared(place + ".take()", _read(lambda: bits(taken(site, site.rows))), values)
        if site.codec == "none":
            views = _read(lambda: b"".join(bits(view.tensor) for view in site.views()))
            yield from _compared(place + ".views()", views, values)
    rows = None if right is None else right["row"]
    yield from _compared(place + ".rows", _read(lambda: site.rows.tobytes()), rows)


def contents_of_site(reader: Reader, name: str) -> dict[str, bytes]:
    from small_datasets import _columns

    return _columns(reader[name].to_arrow())


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except StrapfmtError:
        return None
    except MemoryError as error:
        return RuntimeError(f"runs out of memory: {error}")
    except Exception as error:  # noqa: BLE001 - any other kind is what is looked for
        return RuntimeError(f"raises {type(error).__name__}: {error}")


def _tried(place: str, read: Callable[[], Any]) -> Iterator[str]:
    yield from _compared(place, _read(read), None)


def _compared(place: str, found: Any, right: Any) -> Iterator[str]:
    if isinstance(found, RuntimeError):
        yield f"{place}: {found}"
    elif found is not None and right is not None and found != right:
        yield f"{place}: WRONG VALUES"


# Bits and lengths.


def make_datasets(directory: Path, n_steps: int) -> dict[str, Contents]:
    found = {}
    for unclean in (False, True):
        path = directory / f"unclean-{unclean}.strap"
        script = make_dataset(path, n_steps=n_steps, unclean=unclean, shard_bytes=6000)
        found[str(path)] = script.contents(n_steps)
    return found


@pytest.fixture(scope="module")
def datasets() -> Iterator[dict[str, Contents]]:
    """A closed dataset and one that was cut off, by path, with what they hold."""
    with quick_directory() as directory:
        yield make_datasets(directory, n_steps=6)


def files_of(path: Path) -> list[str]:
    """Return the manifest and the files that it names."""
    manifest = Forger(path).manifest
    entries = [*manifest["sites"], *manifest["tables"]]
    parts = [part["file"] for entry in entries for shard in entry["shards"] for part in shard["parts"]]
    return [f"rank-00000/{file}" for file in (spec.MANIFEST_NAME, *sorted(parts))]


def all_mutations(path: Path, n_bits: int, rng: random.Random) -> list[Mutation]:
    """Return a cut at every offset and the flip of `n_bits` of every byte of every file."""
    mutations = []
    for file in files_of(path):
        for at in range((path / file).stat().st_size):
            mutations.append((file, at, -1))
            mutations += [(file, at, bit) for bit in rng.sample(range(8), n_bits)]
    return mutations


def mutate_and_read(directory: str, mutations: list[Mutation], expected: Contents) -> Iterator[str]:
    """Apply one mutation after the other to a copy; yield what came out wrong."""
    with quick_directory() as temporary:
        path = temporary / "copy.strap"
        shutil.copytree(directory, path)
        names = {entry["name"] for entry in Forger(path).manifest["sites"]}
        slugs, rng = {strapfmt_slug(name): f"site {name}" for name in names}, random.Random(len(mutations))
        for number, (file, at, bit) in enumerate(mutations):
            if number % 20 == 0:
                yield f"at {file}, byte {at}, bit {bit}, or one of the 20 after it"
            whole = (path / file).read_bytes()
            data = bytearray(whole[:at] if bit < 0 else whole)
            if bit >= 0:
                data[at] ^= 1 << bit
            (path / file).write_bytes(data)
            folder = file.split("/")[2] if "/tables/" in file or "/sites/" in file else ""
            only = slugs.get(folder, f"table {folder}" if folder else "")
            for complaint in try_everything(path, expected, only):
                yield f"{file}, byte {at}, bit {bit}: {complaint}"
            if number % 40 == 0:
                for complaint in try_sql(path, expected, only or rng.choice(list(expected))):
                    yield f"{file}, byte {at}, bit {bit}: {complaint}"
            (path / file).write_bytes(whole)
        yield from try_everything(path, expected)
        for only in expected:
            yield from try_sql(path, expected, only)


def strapfmt_slug(name: str) -> str:
    from strapfmt.manifest import file_slug

    return file_slug(name)


def test_sampled_cuts_and_bit_flips_give_no_wrong_value_and_no_crash(datasets: dict[str, Contents]) -> None:
    rng = random.Random()
    for path, expected in datasets.items():
        mutations = all_mutations(Path(path), 1, rng)
        cuts = rng.sample([mutation for mutation in mutations if mutation[2] < 0], N_CUTS // 2)
        flips = rng.sample([mutation for mutation in mutations if mutation[2] >= 0], N_FLIPS // 2)
        assert run_in_child(mutate_and_read, path, cuts + flips, expected, timeout_s=60) == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_cut_and_every_bit_flip_gives_no_wrong_value_and_no_crash() -> None:
    with quick_directory() as directory:
        for path, expected in make_datasets(directory, n_steps=2).items():
            mutations = all_mutations(Path(path), 8, random.Random(0))
            print(f"{len(mutations)} mutations of {len(files_of(Path(path)))} files")  # noqa: T201
            for first in range(0, len(mutations), 20_000):
                batch = mutations[first : first + 20_000]
                assert run_in_child(mutate_and_read, path, batch, expected, timeout_s=1000) == []


def test_a_wrong_value_would_be_noticed(datasets: dict[str, Contents]) -> None:
    path, expected = next(iter(datasets.items()))
    wrong = json.loads(json.dumps(list(expected)))
    changed = {name: dict(expected[name]) for name in wrong}
    site = changed["site blocks.0.resid_post"]
    site["activation"] = site["activation"][:-1] + bytes([site["activation"][-1] ^ 1])
    complaints = list(try_everything(Path(path), changed))
    assert len([text for text in complaints if "WRONG VALUES" in text]) >= 4


def test_a_crash_and_a_hang_would_be_noticed() -> None:
    assert "died with -11" in run_in_child(_crash, timeout_s=20)[0]
    assert run_in_child(_hang, timeout_s=6) == ["hangs at at the hang"]


def _crash() -> Iterator[str]:
    yield "at the crash"
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang() -> Iterator[str]:
    yield "at the hang"
    time.sleep(100)


# Files that are something else.


def special_files(path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield ways to replace each kind of file or directory of a dataset; each works on a fresh copy."""
    root = path / "rank-00000"
    site = root / "sites" / "blocks.0.resid_post"
    targets = [path / file for file in files_of(path)] + [site, root / "sites", root]
    for target in targets:

        def gone(target: Path = target) -> None:
            shutil.rmtree(target) if target.is_dir() else target.unlink()

        def link(target: Path = target) -> None:
            moved = path.parent / "moved"
            target.rename(moved)
            target.symlink_to(moved)

        def loop(target: Path = target) -> None:
            gone(target)
            target.symlink_to(target)

        def fifo(target: Path = target) -> None:
            gone(target)
            os.mkfifo(target)

        def directory(target: Path = target) -> None:
            gone(target)
            target.mkdir()

        def bound(target: Path = target) -> None:
            gone(target)
            before = os.getcwd()
            os.chdir(target.parent)
            socket.socket(socket.AF_UNIX).bind("s")
            os.chdir(before)
            (target.parent / "s").rename(target)

        def empty(target: Path = target) -> None:
            gone(target)
            target.touch()

        for change in (gone, link, loop, fifo, directory, bound, empty):
            yield f"{change.__name__} {target.relative_to(path)}", change


def replace_files(directory: str, expected: Contents, sample: int, seed: int) -> Iterator[str]:
    n_changes = len(list(special_files(Path(directory))))
    numbers = random.Random(seed).sample(range(n_changes), sample) if sample else range(n_changes)
    with quick_directory() as temporary:
        path = temporary / "copy.strap"
        for number in numbers:
            shutil.copytree(directory, path)
            name, change = list(special_files(path))[number]
            yield f"at {name}"
            change()
            is_link = name.startswith(("link", "loop"))
            try:
                Reader(path).close()
                opened = True
            except StrapfmtError:
                opened = False
            if opened and is_link and name.endswith(("rank-00000", "manifest.json")):
                yield f"{name}: a symbolic link was followed"
            for complaint in try_everything(path, expected):
                yield f"{name}: {complaint}"
            if is_link and opened and verify(path).problems == ():
                yield f"{name}: verify finds nothing"
            for complaint in _tried_all(path):
                yield f"{name}: {complaint}"
            for entry in list(temporary.iterdir()):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _tried_all(path: Path) -> Iterator[str]:
    """Verify and repair; yield what is raised that is not ours."""
    yield from _tried(f"{path.name}: verify", lambda: verify(path))
    out = path.parent / "repaired.strap"
    yield from _tried(f"{path.name}: repair", lambda: repair(path, out))
    if out.exists():
        yield from try_everything(out, None)
        shutil.rmtree(out)


def test_sampled_links_pipes_sockets_and_directories_in_place_of_files_are_refused(
    datasets: dict[str, Contents],
) -> None:
    path = next(path for path in datasets if "True" in path)
    assert run_in_child(replace_files, path, datasets[path], N_SPECIAL, time.time_ns(), timeout_s=100) == []


@pytest.mark.slow
def test_links_pipes_sockets_and_directories_in_place_of_any_file_are_refused(
    datasets: dict[str, Contents],
) -> None:
    for path, expected in datasets.items():
        assert run_in_child(replace_files, path, expected, 0, 0, timeout_s=100) == []


# Lies with valid checksums.

EDGES: list[Any] = [
    None,
    True,
    -1,
    0,
    1 << 31,
    (1 << 62) + 1,
    (1 << 63) - 1,
    1 << 64,
    10**400,
    0.5,
    "",
    "x",
    "../../../etc/passwd",
    "sites/../x/000000.arrow",
    "a\x00b",
    "\ud800",
    [],
    [[]],
    {},
    {"a": 1},
    "\u202e<script>",
    ...,
]


def forge_fields(directory: str, sample: int, seed: int) -> Iterator[str]:
    """Replace values of the manifest, one at a time."""
    rng = random.Random(seed)
    with quick_directory() as temporary:
        path = temporary / "copy.strap"
        shutil.copytree(directory, path)
        forger = Forger(path)
        original = forger.manifest
        cases = [(place, edge) for place in leaves(original) for edge in EDGES]
        for place, edge in rng.sample(cases, sample) if sample else cases:
            yield f"at manifest {place} = {edge!r:.60}"
            manifest = json.loads(json.dumps(original))
            put(manifest, place, edge)
            forger.put_manifest(manifest)
            for complaint in [*try_everything(path, None), *_tried_all(path)]:
                yield f"manifest {place} = {edge!r:.60}: {complaint}"


NUMBERS = [
    0,
    1,
    2,
    7,
    255,
    1 << 16,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
]


def forge_numbers(directory: str, sample: int, seed: int) -> Iterator[str]:
    """Replace the numbers of indexes, one at a time."""
    rng = random.Random(seed)
    with quick_directory() as temporary:
        path = temporary / "copy.strap"
        cases = []
        shutil.copytree(directory, path)
        manifest = Forger(path).manifest
        for kind in ("sites", "tables"):
            for which in range(len(manifest[kind])):
                size = Forger(path).shard(kind, which)["parts"][-1]["n_bytes"] - 16
                cases += [
                    (kind, which, at, n_bytes, number)
                    for at in range(8, size, 4)
                    for n_bytes in (4, 8)
                    for number in NUMBERS
                ]
        for kind, which, at, n_bytes, number in rng.sample(cases, sample) if sample else cases:
            yield f"at {kind} {which}: index bytes {at} to {at + n_bytes} = {number}"
            shutil.rmtree(path)
            shutil.copytree(directory, path)
            value = (number & (1 << 8 * n_bytes) - 1).to_bytes(n_bytes, "little")
            Forger(path).put_index_bytes(at, value, kind=kind, which=which)
            for complaint in [*try_everything(path, None), *_tried_all(path)]:
                yield f"{kind} {which}: index bytes {at} to {at + n_bytes} = {number}: {complaint}"
            yield from forge_deeper(path, directory, kind, which, at, value)


def forge_deeper(path: Path, directory: str, kind: str, which: int, at: int, value: bytes) -> Iterator[str]:
    """The same, with the manifest made to agree as far as the index can be decoded at all."""
    try:
        index = Forger(path).index(kind, which)
    except StrapfmtError:
        return
    shutil.rmtree(path)
    shutil.copytree(directory, path)
    Forger(path).put_index(index, kind, which)
    for complaint in try_everything(path, None):
        yield f"{kind} {which}: index at {at} = {value!r} and all that follows: {complaint}"


def forge_messages(directory: str, n_cases: int, seed: int) -> Iterator[str]:
    """Damage headers and bodies of record batches and hash them again, so that Arrow itself is what must hold."""
    rng = random.Random(seed)
    with quick_directory() as temporary:
        path = temporary / "copy.strap"
        shutil.copytree(directory, path)
        manifest = Forger(path).manifest
        places = [(kind, which) for kind in ("sites", "tables") for which in range(len(manifest[kind]))]
        files = files_of(path)
        originals = {file: (path / file).read_bytes() for file in files}
        for case in range(n_cases):
            kind, which = rng.choice(places)
            index = Forger(path).index(kind, which)
            n_batches = len(index.batches) - index.has_tail

            def change(header: bytearray, body: bytearray) -> None:
                target = header if rng.random() < 0.7 else body
                for _ in range(rng.choice([1, 1, 2, 5])):
                    if not len(target):
                        return
                    at = rng.randrange(min(len(target), rng.choice([64, 400, 1 << 20])))
                    how = rng.randrange(3)
                    if how == 0:
                        target[at] ^= 1 << rng.randrange(8)
                    elif how == 1:
                        target[at] = rng.choice([0, 1, 127, 128, 255])
                    else:
                        value = rng.choice(NUMBERS) & 0xFFFFFFFFFFFFFFFF
                        piece = struct.pack("<Q", value)[: rng.choice([2, 4, 8])]
                        target[at : at + len(piece)] = piece[: len(target) - at]

            yield f"at message case {case} of seed {seed}"
            if n_batches == 0 or rng.random() < 0.2:
                Forger(path).edit_prefix(lambda prefix: change(prefix, prefix), kind, which)
            else:
                Forger(path).edit_message(rng.randrange(n_batches), change, kind, which)
            for complaint in [*try_everything(path, None), *_tried_all(path)]:
                yield f"message case {case} of seed {seed}: {complaint}"
            for file, data in originals.items():
                (path / file).write_bytes(data)


def test_sampled_lies_in_manifests_are_refused_or_harmless(datasets: dict[str, Contents]) -> None:
    for path in datasets:
        assert run_in_child(forge_fields, path, N_FIELDS // 2, time.time_ns(), timeout_s=100) == []


def test_sampled_lies_in_indexes_are_refused_or_harmless(datasets: dict[str, Contents]) -> None:
    for path in datasets:
        assert run_in_child(forge_numbers, path, N_NUMBERS // 2, time.time_ns(), timeout_s=100) == []


def test_sampled_lies_in_arrow_messages_are_refused_or_harmless(datasets: dict[str, Contents]) -> None:
    for path in datasets:
        assert run_in_child(forge_messages, path, N_MESSAGES // 2, time.time_ns(), timeout_s=100) == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_lie_in_manifests_is_refused_or_harmless(datasets: dict[str, Contents]) -> None:
    for path in datasets:
        assert run_in_child(forge_fields, path, 0, 0, timeout_s=3000) == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_lies_in_indexes_are_refused_or_harmless(datasets: dict[str, Contents]) -> None:
    for path in datasets:
        assert run_in_child(forge_numbers, path, N_SLOW_NUMBERS // 2, 0, timeout_s=3000) == []


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_lies_in_arrow_messages_are_refused_or_harmless(datasets: dict[str, Contents]) -> None:
    for path in datasets:
        for seed in range(8):
            assert run_in_child(forge_messages, path, N_SLOW_MESSAGES // 16, seed, timeout_s=1000) == []
