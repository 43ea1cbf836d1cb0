"""Makes the datasets that readers must refuse: a sound one, damaged in one place and re-signed where that is the point."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from strapfmt import spec
from strapfmt.arrowfile import digest
from strapfmt.index import BATCH_DTYPE, ShardIndex
from strapfmt.schema import SiteSpec
from strapfmt.writer import DatasetWriter

RANK = spec.RANK_DIRECTORY.format(rank=0)


def file_hashes(dataset: Path) -> dict[str, str]:
    """The xxh3-128 of every file of a dataset."""
    return {
        str(path.relative_to(dataset)): digest(path.read_bytes()).hex()
        for path in sorted(dataset.rglob("*"))
        if path.is_file()
    }


def signed(text: bytes) -> bytes:
    """A manifest's bytes: `text` is its JSON without the closing brace."""
    return text + b',"hash":"' + digest(text).hex().encode() + b'"}\n'


class Forge:
    """Edits a dataset of one rank and makes its checksums agree again, as someone who means harm would."""

    def __init__(self, dataset: Path) -> None:
        self.root = dataset / RANK
        self._path = self.root / spec.MANIFEST_NAME
        self.manifest: dict[str, Any] = json.loads(self._path.read_bytes())

    @property
    def site(self) -> dict[str, Any]:
        """The manifest's first site."""
        return self.manifest["sites"][0]

    @property
    def shard(self) -> dict[str, Any]:
        """The first shard of the first site."""
        return self.site["shards"][0]

    def part(self, role: str) -> dict[str, Any]:
        """One part of that shard."""
        return next(part for part in self.shard["parts"] if part["role"] == role)

    def file(self, role: str) -> Path:
        """The file of that part."""
        return self.root / self.part(role)["file"]

    def flip(self, path: Path, offset: int) -> None:
        """Flip one bit."""
        data = bytearray(path.read_bytes())
        data[offset] ^= 0x10
        path.write_bytes(data)

    def cut(self, path: Path, n_bytes: int) -> None:
        """Remove bytes from the end."""
        path.write_bytes(path.read_bytes()[:-n_bytes])

    def index(self) -> ShardIndex:
        """The shard's index."""
        return ShardIndex.decode(bytearray(self.file("index").read_bytes()), "index")

    def save_index(self, index: ShardIndex) -> None:
        """Store an index and everything that hashes it."""
        self.save_index_bytes(index.encode())
        self.part("data")["hash"] = index.data_hash().hex()
        if index.has_tail:
            self.part("tail")["hash"] = index.data_hash(tail=True).hex()
        self.save()

    def save_index_bytes(self, data: bytes) -> None:
        """Store the bytes of an index."""
        self.file("index").write_bytes(data)
        self.part("index").update(n_bytes=len(data), hash=digest(data).hex())
        self.save()

    def save(self) -> None:
        """Store the manifest with a checksum that fits."""
        members = {key: value for key, value in self.manifest.items() if key != "hash"}
        text = json.dumps(members, separators=(",", ":")).encode()[:-1]
        self._path.write_bytes(signed(text))

    def save_text(self, old: bytes, new: bytes) -> None:
        """Replace text in the manifest and sign it."""
        data = self._path.read_bytes()[: -spec.MANIFEST_HASH_SUFFIX_BYTES]
        if data.count(old) < 1:
            raise AssertionError(f"the manifest holds no {old!r}")
        self._path.write_bytes(signed(data.replace(old, new, 1)))

    def edit_body(self, edit: Callable[[bytearray], None]) -> None:
        """Change the body of the first record batch, and every hash that covers it."""
        index = self.index()
        entry = index.batches[0]
        start = int(entry["offset"]) + int(entry["header_bytes"])
        data = bytearray(self.file("data").read_bytes())
        body = data[start : start + int(entry["body_bytes"])]
        edit(body)
        data[start : start + len(body)] = body
        self.file("data").write_bytes(data)
        entry["body_hash"] = np.void(digest(bytes(body)))
        self.save_index(index)

    def edit_entry(self, **fields: int) -> None:
        """Change fields of the first record batch's entry in the index."""
        index = self.index()
        for name, value in fields.items():
            index.batches[0][name] = value
        self.save_index(index)

    def edit_index_bytes(self, offset: int, data: bytes) -> None:
        """Change bytes of the index and every hash that covers it."""
        old = self.file("index").read_bytes()[:-16]
        new = old[:offset] + data + old[offset + len(data) :]
        self.save_index_bytes(new + digest(new))


# Sound datasets to damage: one that was closed, one that was not.


def _plain(path: Path, **site: Any) -> None:
    spec_ = SiteSpec(**({"name": "x", "dtype": "float32", "shape": (16,), "statistics": ()} | site))
    with DatasetWriter(path, commit_interval_s=1e9) as writer:
        writer.add_site(spec_)
        n = 6
        if spec_.is_ragged:
            shapes = np.full((n, 1), 2, np.int32)
            writer.write("x", np.arange(2 * n, dtype=np.float32), rows=np.arange(n), shapes=shapes)
        else:
            values = np.arange(16 * n, dtype=np.float32).reshape(n, 16) // 4
            columns = {} if spec_.row_space == "own" else {"rows": np.array([0, 1, 4, 5, 6, 9])}
            writer.write("x", values, **columns)
        writer.wait()
    (path / RANK / spec.LOCK_NAME).unlink()


def _zstd(path: Path) -> None:
    _plain(path, codec="zstd")


def _incompressible(path: Path) -> None:
    """Compressed bodies that are longer than their values."""
    with DatasetWriter(path, commit_interval_s=1e9) as writer:
        writer.add_site(SiteSpec(name="x", dtype="uint8", shape=(64,), codec="zstd", statistics=()))
        noise = b"".join(digest(bytes([i])) for i in range(64))
        writer.write("x", np.frombuffer(noise, np.uint8).reshape(16, 64).copy(), rows=np.arange(16))
        writer.wait()
    (path / RANK / spec.LOCK_NAME).unlink()


def _ragged(path: Path) -> None:
    _plain(path, shape=(-1,))


def _two_batches(path: Path, n: int = 70) -> None:
    with DatasetWriter(path, commit_interval_s=1e9, batch_bytes=4096) as writer:
        writer.add_site(SiteSpec(name="x", dtype="float32", shape=(16,), statistics=()))
        writer.write("x", np.arange(16 * n, dtype=np.float32).reshape(n, 16), rows=np.arange(n))
        writer.wait()
    (path / RANK / spec.LOCK_NAME).unlink()


def _open(path: Path) -> None:
    live = path.with_name("live.strap")
    writer = DatasetWriter(live, commit_interval_s=1e9, batch_bytes=4096)
    writer.add_site(SiteSpec(name="x", dtype="float32", shape=(16,), statistics=()))
    writer.write("x", np.arange(1120, dtype=np.float32).reshape(70, 16), rows=np.arange(70))
    writer.commit()
    shutil.copytree(live, path)
    writer.abort()
    shutil.rmtree(live)
    (path / RANK / spec.LOCK_NAME).unlink()


# The damage. Each entry: name, when it must be refused, the kind of error, why, the sound dataset, what is done to it.
# "open": opening must fail. "read": opening may work, reading every site and table with every hash compared must fail.
# "verify": only a full check must find it.


def _set(target: str, **members: Any) -> Callable[[Forge], None]:
    def edit(forge: Forge) -> None:
        {"manifest": forge.manifest, "site": forge.site, "shard": forge.shard}[target].update(members)
        forge.save()

    return edit


def _set_part(role: str, **members: Any) -> Callable[[Forge], None]:
    def edit(forge: Forge) -> None:
        forge.part(role).update(members)
        forge.save()

    return edit


def _text(old: str, new: str) -> Callable[[Forge], None]:
    return lambda forge: forge.save_text(old.encode(), new.encode())


def _remove(target: str, member: str) -> Callable[[Forge], None]:
    def edit(forge: Forge) -> None:
        del {"manifest": forge.manifest, "site": forge.site, "shard": forge.shard}[target][member]
        forge.save()

    return edit


def _manifest_bytes(edit: Callable[[bytes], bytes]) -> Callable[[Forge], None]:
    def run(forge: Forge) -> None:
        path = forge.root / spec.MANIFEST_NAME
        path.write_bytes(edit(path.read_bytes()))

    return run


def _with_bit(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def _copied_site(forge: Forge) -> None:
    forge.manifest["sites"].append(forge.site)
    forge.save()


def _copied_shard(forge: Forge) -> None:
    forge.site["shards"].append(forge.shard)
    forge.save()


def _copied_part(forge: Forge) -> None:
    forge.shard["parts"].append(forge.part("data"))
    forge.save()


def _no_data_part(forge: Forge) -> None:
    forge.shard["parts"].remove(forge.part("data"))
    forge.save()


def _unknown_role(forge: Forge) -> None:
    extra = {"role": "offsets", "must_understand": True, "file": "sites/x/000000.offsets"}
    forge.shard["parts"].append(forge.part("data") | extra)
    forge.save()


def _nested(_: bytes) -> bytes:
    return signed(b'{"format":' + b"[" * 100_000)


def _move_rank(name: str) -> Callable[[Forge], None]:
    return lambda forge: forge.root.rename(forge.root.with_name(name)) and None


def _overlapping_runs(forge: Forge) -> None:
    index = forge.index()
    index.runs["row"][1] = 1
    forge.save_index(index)


def _overflowing_run(forge: Forge) -> None:
    index = forge.index()
    index.runs["row"][1] = (1 << 63) - 1
    forge.save_index(index)


def _other_rank(forge: Forge) -> None:
    forge.manifest["rank"] = 1
    for member in ("first_row", "last_row"):
        forge.shard[member] += 1 << spec.RANK_SHIFT
    forge.save()


def _sealed_with_tail(forge: Forge) -> None:
    forge.shard["is_sealed"] = True
    data = bytearray(forge.file("index").read_bytes()[:-16])
    struct.pack_into("<I", data, 12, 3)
    forge.save_index_bytes(bytes(data) + digest(bytes(data)))


def _other_shapes(body: bytearray) -> None:
    """The column `shape` lies behind 7 offsets (28 bytes, padded to 32) and 12 float32."""
    if struct.unpack_from("<6i", body, 80) != (2,) * 6:
        raise AssertionError("the column `shape` is elsewhere")
    struct.pack_into("<2i", body, 80, 1, 3)


def _moved_activations(forge: Forge) -> None:
    """The header says that the activations begin 48 bytes into the body, where views do not look."""
    index = forge.index()
    entry = index.batches[0]
    start, size = int(entry["offset"]), int(entry["header_bytes"])
    data = bytearray(forge.file("data").read_bytes())
    header = data[start : start + size]
    at = header.index(struct.pack("<qq", 0, 16 * 6 * 4))
    struct.pack_into("<q", header, at, 48)
    data[start : start + size] = header
    forge.file("data").write_bytes(data)
    entry["header_hash"] = np.void(digest(bytes(header)))
    forge.save_index(index)


def _denied_compression(forge: Forge) -> None:
    forge.site["codec"] = "none"
    for part in forge.shard["parts"]:
        part["codec"] = "none"
    forge.save()


def _empty_batch(forge: Forge) -> None:
    """A last entry without rows and without bytes, so that nothing else is wrong."""
    index = forge.index()
    empty = np.zeros(1, BATCH_DTYPE)
    empty["offset"], empty["first_ordinal"], empty["raw_bytes"] = index.trailer_offset, index.n_rows, 0
    empty["header_hash"] = empty["body_hash"] = np.void(digest(b""))
    forge.save_index(dataclasses.replace(index, batches=np.concatenate([index.batches, empty])))


def _longer(forge: Forge) -> None:
    with forge.file("data").open("ab") as file:
        file.write(b"more")


def _gap(forge: Forge) -> None:
    index = forge.index()
    index.batches[1]["offset"] += 64
    forge.save_index(index)


def _unaligned(forge: Forge) -> None:
    """Eight bytes move from the end of the schema's message to the first header: the chain of offsets stays whole."""
    index = forge.index()
    index.batches[0]["header_bytes"] += 8
    index.batches[0]["body_bytes"] -= 8
    data = forge.file("data").read_bytes()
    start, middle = int(index.batches[0]["offset"]), int(index.batches[0]["offset"] + index.batches[0]["header_bytes"])
    end = middle + int(index.batches[0]["body_bytes"])
    index.batches[0]["header_hash"] = np.void(digest(data[start:middle]))
    index.batches[0]["body_hash"] = np.void(digest(data[middle:end]))
    forge.save_index(index)


def _beyond(forge: Forge) -> None:
    forge.edit_entry(n_rows=7)


def _more_rows(forge: Forge) -> None:
    """More rows than the body has room for."""
    index = forge.index()
    data = bytearray(index.encode()[:-16])
    struct.pack_into("<Q", data, 32, 9)
    struct.pack_into("<I", data, spec.INDEX_HEADER_BYTES + BATCH_DTYPE.fields["n_rows"][1], 9)
    forge.shard.update(n_rows=9, last_row=12)
    forge.save_index_bytes(bytes(data) + digest(bytes(data)))


def _bomb(body: bytearray) -> None:
    struct.pack_into("<q", body, 0, 1 << 40)


def _bad_frame(body: bytearray) -> None:
    body[8:12] = b"\0\0\0\0"


def _bad_offsets(body: bytearray) -> None:
    struct.pack_into("<i", body, 8, 1 << 30)


def _other_schema(forge: Forge) -> None:
    forge.site["dtype"] = "int32"
    forge.save()


def _bad_footer_hash(forge: Forge) -> None:
    data = bytearray(forge.file("data").read_bytes())
    data[-20] ^= 1
    forge.file("data").write_bytes(data)


_CASES: list[tuple[str, str, str, str, Callable[[Path], None], Callable[[Forge], None]]] = [
    # The manifest's bytes.
    ("manifest-bit-flip", "open", "corrupt", "One bit of the manifest is wrong.", _plain,
     _manifest_bytes(lambda data: _with_bit(data, 100))),
    ("manifest-cut", "open", "corrupt", "The manifest lacks its last byte.", _plain,
     _manifest_bytes(lambda data: data[:-1])),
    ("manifest-empty", "open", "corrupt", "The manifest has no bytes.", _plain, _manifest_bytes(lambda _: b"")),
    ("manifest-upper-case-hash", "open", "corrupt", "The checksum is written in upper case.", _plain,
     _manifest_bytes(lambda data: data[:-35] + data[-35:-3].upper() + data[-3:])),
    ("manifest-trailing-bytes", "open", "corrupt", "Something follows the manifest.", _plain,
     _manifest_bytes(lambda data: data + b"\n")),
    ("manifest-not-json", "open", "corrupt", "The checksum fits, the JSON is cut.", _plain,
     _manifest_bytes(lambda _: signed(b'{"format":'))),
    ("manifest-too-deep", "open", "corrupt", "100,000 nested arrays.", _plain, _manifest_bytes(_nested)),
    ("manifest-duplicate-key", "open", "corrupt", "A member occurs twice.", _plain,
     _text('"rank":0', '"rank":0,"rank":0')),
    ("manifest-nan", "open", "corrupt", "NaN is not JSON.", _plain, _text('"commit":1', '"commit":NaN')),
    # Its members.
    ("format-name", "open", "corrupt", "Another format's name.", _plain, _set("manifest", format="strap")),
    ("member-missing", "open", "corrupt", "The member `counters` is missing.", _plain,
     _remove("manifest", "counters")),
    ("member-float", "open", "corrupt", "A count is written as 6.0.", _plain, _set("shard", n_rows=6.0)),
    ("member-bool", "open", "corrupt", "A count is `true`.", _plain, _set("manifest", commit=True)),
    ("member-negative", "open", "corrupt", "A length is negative.", _plain, _set_part("data", n_bytes=-1)),
    ("member-huge", "open", "corrupt", "A length is 2^64.", _plain, _set_part("data", n_bytes=1 << 64)),
    ("shard-without-rows", "open", "corrupt", "A shard of no rows.", _plain, _set("shard", n_rows=0)),
    ("shape-zero", "open", "corrupt", "A dimension of size 0.", _plain, _set("site", shape=[0])),
    ("shape-overflow", "open", "corrupt", "More values in a row than the limit.", _plain,
     _set("site", shape=[65536, 65536])),
    ("layout-unknown", "open", "corrupt", "A layout that version 1 does not have.", _plain,
     _set("site", layout={"kind": "columns", "batch_rows": 1})),
    ("statistics-unknown", "open", "corrupt", "A statistic that version 1 does not have.", _plain,
     _set("site", statistics=["median"])),
    ("row-space-unknown", "open", "corrupt", "A row space that version 1 does not have.", _plain,
     _set("site", row_space="heads")),
    ("site-twice", "open", "corrupt", "Two sites of one name.", _plain, _copied_site),
    ("shard-twice", "open", "corrupt", "Two shards hold the same rows.", _plain, _copied_shard),
    ("part-twice", "open", "corrupt", "A shard has two data parts.", _plain, _copied_part),
    ("part-missing", "open", "corrupt", "A shard has no data part.", _plain, _no_data_part),
    ("rows-of-another-rank", "open", "corrupt", "Rank 0 claims rows of rank 1.", _plain,
     _set("shard", first_row=1 << 40, last_row=(1 << 40) + 9)),
    ("rows-too-many-for-range", "open", "corrupt", "Six rows between row 5 and row 9.", _plain,
     _set("shard", first_row=5)),
    ("path-parent", "open", "corrupt", "A part lies in a parent directory.", _plain,
     _set_part("data", file="sites/../../../000000.arrow")),
    ("path-absolute", "open", "corrupt", "A part has an absolute path.", _plain,
     _set_part("data", file="/sites/x/000000.arrow")),
    ("path-nul", "open", "corrupt", "A part's path holds NUL.", _plain,
     _set_part("data", file="sites/x\0/000000.arrow")),
    ("rank-mismatch", "open", "corrupt", "The directory says rank 0, the manifest rank 1.", _plain,
     _other_rank),
    ("rank-not-canonical", "open", "corrupt", "The directory `rank-000000` has a zero too many.", _plain,
     _move_rank("rank-000000")),
    ("no-manifest", "open", "missing", "No rank has a manifest.", _plain,
     lambda forge: (forge.root / spec.MANIFEST_NAME).unlink()),
    # Versions.
    ("newer-reader-needed", "open", "unsupported", "Needs a reader of version 2.", _plain,
     _set("manifest", format_version=2, min_reader_version=2)),
    ("feature-required", "open", "unsupported", "Requires a feature that version 1 does not have.", _plain,
     _set("manifest", required_features=["encryption"])),
    ("codec-unknown", "read", "unsupported", "The data are in a codec that must be understood.", _plain,
     _set_part("data", codec="planes")),
    ("codec-unknown-not-must", "read", "unsupported", "So are they when `must_understand` is wrongly false.", _plain,
     _set_part("data", codec="planes", must_understand=False)),
    ("role-unknown", "read", "unsupported", "A part of an unknown role must be understood.", _plain, _unknown_role),
    ("index-newer", "read", "unsupported", "The index is of version 2.", _plain,
     lambda forge: forge.edit_index_bytes(8, struct.pack("<I", 2))),
    # The index.
    ("index-bit-flip", "read", "corrupt", "One bit of the index is wrong.", _plain,
     lambda forge: forge.flip(forge.file("index"), 40)),
    ("index-cut", "read", "corrupt", "The index lacks its last byte.", _plain,
     lambda forge: forge.cut(forge.file("index"), 1)),
    ("index-missing", "read", "missing", "The index is gone.", _plain, lambda forge: forge.file("index").unlink()),
    ("index-magic", "read", "corrupt", "Another magic, all hashes fitting.", _plain,
     lambda forge: forge.edit_index_bytes(0, b"STRAPIDY")),
    ("index-flags", "read", "corrupt", "An unknown flag, all hashes fitting.", _plain,
     lambda forge: forge.edit_index_bytes(12, struct.pack("<I", 5))),
    ("index-counts", "read", "corrupt", "More entries than the file has room for.", _plain,
     lambda forge: forge.edit_index_bytes(16, struct.pack("<Q", 1 << 40))),
    ("index-rows", "read", "corrupt", "The entries do not add up to the shard's rows.", _plain, _beyond),
    ("index-gap", "read", "corrupt", "A gap between two record batches.", _two_batches, _gap),
    ("index-runs", "read", "corrupt", "Two runs hold the same row.", _plain, _overlapping_runs),
    ("index-run-overflow", "read", "corrupt", "A run whose end is beyond 2^63.", _plain, _overflowing_run),
    ("index-body-beyond", "read", "corrupt", "A body of 2^63 bytes.", _plain,
     lambda forge: forge.edit_entry(body_bytes=1 << 63)),
    ("index-more-rows-than-body", "read", "corrupt", "More rows than the body has room for.", _plain, _more_rows),
    ("index-unaligned-body", "read", "corrupt", "A body off the row's multiple in layout `rows`.", _two_batches,
     _unaligned),
    # The data.
    ("data-missing", "read", "missing", "The data file is gone.", _plain, lambda forge: forge.file("data").unlink()),
    ("data-cut", "read", "corrupt", "The data file lacks its last byte.", _plain,
     lambda forge: forge.cut(forge.file("data"), 1)),
    ("data-body-bit-flip", "read", "corrupt", "One bit of a body is wrong.", _plain,
     lambda forge: forge.flip(forge.file("data"), int(forge.index().batches[0]["offset"]
                                                     + forge.index().batches[0]["header_bytes"]) + 5)),
    ("data-header-bit-flip", "read", "corrupt", "One bit of a record batch's header is wrong.", _plain,
     lambda forge: forge.flip(forge.file("data"), int(forge.index().batches[0]["offset"]) + 60)),
    ("data-schema-bit-flip", "read", "corrupt", "One bit of the schema is wrong.", _plain,
     lambda forge: forge.flip(forge.file("data"), 60)),
    ("data-footer-bit-flip", "read", "corrupt", "One bit of the footer is wrong.", _plain, _bad_footer_hash),
    ("data-length", "read", "corrupt", "Manifest and index disagree on the length of the data file.", _plain,
     lambda forge: forge.edit_index_bytes(72, struct.pack("<Q", forge.index().trailer_bytes - 8))),
    ("data-other-schema", "read", "corrupt", "The manifest says int32, the file holds float32.", _plain,
     _other_schema),
    ("data-bomb", "read", "corrupt", "A compressed buffer claims 2^40 bytes; all hashes fit.", _zstd,
     lambda forge: forge.edit_body(_bomb)),
    ("data-bad-frame", "read", "corrupt", "A compressed buffer is no zstd frame; all hashes fit.", _zstd,
     lambda forge: forge.edit_body(_bad_frame)),
    ("data-bad-offsets", "read", "corrupt", "Offsets of lists point outside; all hashes fit.", _ragged,
     lambda forge: forge.edit_body(_bad_offsets)),
    ("data-other-shapes", "read", "corrupt", "A row's shape does not fit its length; all hashes fit.", _ragged,
     lambda forge: forge.edit_body(_other_shapes)),
    ("data-moved", "read", "corrupt", "The activations do not begin the body; all hashes fit.", _plain,
     _moved_activations),
    ("data-longer", "verify", "corrupt", "A sealed file is longer than was committed; reading may ignore that.",
     _plain, _longer),
    # The tail of a shard that is still open.
    ("tail-missing", "read", "missing", "The tail is gone.", _open, lambda forge: forge.file("tail").unlink()),
    ("tail-bit-flip", "read", "corrupt", "One bit of the tail's body is wrong.", _open,
     lambda forge: forge.flip(forge.file("tail"), -1200)),
    ("tail-unlisted", "read", "corrupt", "The index has a tail, the manifest none.", _open,
     lambda forge: (forge.shard["parts"].remove(forge.part("tail")), forge.save()) and None),
    ("tail-of-sealed", "read", "corrupt", "The index says both sealed and with a tail.", _open, _sealed_with_tail),
    ("open-cut", "read", "corrupt", "The open data file is shorter than what was committed.", _open,
     lambda forge: forge.cut(forge.file("data"), 1)),
    # Added later.
    ("data-compression-denied", "read", "corrupt", "The manifest says codec none, the data are compressed.", _incompressible,
     _denied_compression),
    ("index-empty-batch", "read", "corrupt", "A record batch without rows.", _plain, _empty_batch),
]  # fmt: skip


def build(root: Path) -> None:
    """Write `refused/NAME.strap` and `refused/NAME.json` for every case."""
    with tempfile.TemporaryDirectory() as directory:
        sound: dict[Callable[[Path], None], Path] = {}
        for name, when, error, why, make, damage in _CASES:
            if make not in sound:
                sound[make] = Path(directory, f"{len(sound)}{spec.DATASET_SUFFIX}")
                make(sound[make])
            path = root / "refused" / f"{name}{spec.DATASET_SUFFIX}"
            shutil.copytree(sound[make], path)
            damage(Forge(path))
            document = {"description": why, "when": when, "error": error, "files": file_hashes(path)}
            path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
