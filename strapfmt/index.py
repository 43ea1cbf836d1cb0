"""The binary index of a shard: where each record batch lies, its hashes, and which rows it holds.

Layout (little-endian): a header of 128 bytes, `n_batches` entries of 96 bytes, `n_runs` runs of 16 bytes, and the
xxh3-128 of everything before. A run says that rows `row, row + 1, ...` lie at ordinals `ordinal, ordinal + 1, ...`
up to the next run.
"""

import struct
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from strapfmt import spec
from strapfmt.arrowfile import digest
from strapfmt.errors import CorruptError, UnsupportedError

__all__ = ["BATCH_DTYPE", "RUN_DTYPE", "ShardIndex", "find_runs"]

BATCH_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("header_bytes", "<u4"),
        ("n_rows", "<u4"),
        ("body_bytes", "<u8"),
        ("raw_bytes", "<u8"),
        ("first_ordinal", "<u8"),
        ("first_row", "<i8"),
        ("first_run", "<u8"),
        ("n_values", "<u8"),
        ("header_hash", "V16"),
        ("body_hash", "V16"),
    ]
)
RUN_DTYPE = np.dtype([("row", "<i8"), ("ordinal", "<u8")])

_HEADER = struct.Struct("<8sIIQQQQ16sQQ16s32x")
_SEALED, _HAS_TAIL = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """The decoded index of one shard.

    Attributes
    ----------
    batches : structured array, `BATCH_DTYPE`, [n_batches]
        One entry a record batch. `raw_bytes` is the body before compression, `n_values` the elements of the activation.
    runs : structured array, `RUN_DTYPE`, [n_runs]
        Empty for tables, whose rows have no numbers.
    n_rows : int
    prefix_bytes, prefix_hash : int, bytes
        The magic and the schema message that begin the data file (and the tail file).
    trailer_offset, trailer_bytes, trailer_hash : int, int, bytes
        End of stream and footer of the sealed data file, or of the tail file while the shard is open.
    is_sealed : bool
    has_tail : bool
        Whether the last entry lies in the tail file.
    """

    batches: npt.NDArray[np.void]
    runs: npt.NDArray[np.void]
    n_rows: int
    prefix_bytes: int
    prefix_hash: bytes
    trailer_offset: int = 0
    trailer_bytes: int = 0
    trailer_hash: bytes = field(default=bytes(16))
    is_sealed: bool
    has_tail: bool = False

    def encode(self) -> bytes:
        """Return the file's bytes."""
        flags = (_SEALED if self.is_sealed else 0) | (_HAS_TAIL if self.has_tail else 0)
        header = _HEADER.pack(
            spec.INDEX_MAGIC,
            spec.FORMAT_VERSION,
            flags,
            len(self.batches),
            len(self.runs),
            self.n_rows,
            self.prefix_bytes,
            self.prefix_hash,
            self.trailer_offset,
            self.trailer_bytes,
            self.trailer_hash,
        )
        data = header + self.batches.tobytes() + self.runs.tobytes()
        return data + digest(data)

    @classmethod
    def decode(cls, data: bytes | memoryview, where: str) -> "ShardIndex":
        """Check and decode an index; the arrays alias `data`.

        Parameters
        ----------
        data : bytes
        where : str
            The file's name, for errors.

        Raises
        ------
        CorruptError
            If a length, the checksum or the order of its entries is wrong.
        UnsupportedError
            If a newer version wrote it.
        """
        if len(data) < spec.INDEX_HEADER_BYTES + 16:
            raise CorruptError(
                f"{where}: expected an index of at least {spec.INDEX_HEADER_BYTES + 16} bytes, got {len(data)}"
            )
        if bytes(data[:8]) != spec.INDEX_MAGIC:
            raise CorruptError(f"{where}: expected the magic {spec.INDEX_MAGIC!r}, got {bytes(data[:8])!r}")
        if digest(memoryview(data)[:-16]) != bytes(data[-16:]):
            raise CorruptError(f"{where}: the index's checksum does not match its bytes")
        _, version, flags, n_batches, n_runs, n_rows, prefix, prefix_hash, *end = _HEADER.unpack_from(data)
        if version > spec.FORMAT_VERSION:
            raise UnsupportedError(
                f"{where}: index of version {version}, this reader knows {spec.FORMAT_VERSION}"
            )
        size = (
            spec.INDEX_HEADER_BYTES + n_batches * spec.INDEX_BATCH_BYTES + n_runs * spec.INDEX_RUN_BYTES + 16
        )
        if flags & ~(_SEALED | _HAS_TAIL):
            raise CorruptError(f"{where}: flags: expected none but {_SEALED | _HAS_TAIL:#x}, got {flags:#x}")
        if size != len(data):
            raise CorruptError(
                f"{where}: {n_batches} batches and {n_runs} runs need {size} bytes, got {len(data)}"
            )
        batches = np.frombuffer(data, BATCH_DTYPE, n_batches, spec.INDEX_HEADER_BYTES)
        runs = np.frombuffer(
            data, RUN_DTYPE, n_runs, spec.INDEX_HEADER_BYTES + n_batches * spec.INDEX_BATCH_BYTES
        )
        index = cls(
            batches=batches,
            runs=runs,
            n_rows=n_rows,
            prefix_bytes=prefix,
            prefix_hash=prefix_hash,
            trailer_offset=end[0],
            trailer_bytes=end[1],
            trailer_hash=end[2],
            is_sealed=bool(flags & _SEALED),
            has_tail=bool(flags & _HAS_TAIL),
        )
        index._check(where)
        return index

    def data_end(self) -> int:
        """Bytes of the data file that this index vouches for."""
        if self.is_sealed:
            return self.trailer_offset + self.trailer_bytes
        batches = self.batches[:-1] if self.has_tail else self.batches
        if not len(batches):
            return self.prefix_bytes
        last = batches[-1]
        return int(last["offset"]) + int(last["header_bytes"]) + int(last["body_bytes"])

    def data_hash(self, *, tail: bool = False) -> bytes:
        """Return the hash of the data file (or the tail file): that of its parts' hashes, in order."""
        batches = self.batches[-1:] if tail else self.batches[:-1] if self.has_tail else self.batches
        hashes = np.ascontiguousarray(
            batches[["header_hash", "body_hash"]].astype([("h", "V16"), ("b", "V16")])
        )
        ends_here = self.is_sealed or tail
        return digest(self.prefix_hash, hashes.tobytes(), self.trailer_hash if ends_here else b"")

    def _check(self, where: str) -> None:
        batches, runs = self.batches, self.runs
        problems = []
        rows = batches["n_rows"].astype(np.uint64)
        firsts = np.append(np.uint64(0), np.cumsum(rows))
        if np.any(rows == 0):
            problems.append("n_rows: expected at least 1 in every batch")
        if not np.array_equal(batches["first_ordinal"], firsts[:-1]) or int(firsts[-1]) != self.n_rows:
            problems.append(f"first_ordinal: expected the running sum of n_rows, in all {self.n_rows}")
        inner = batches[:-1] if self.has_tail else batches
        limit = 1 << 62
        if np.any(batches["offset"] > limit) or np.any(batches["body_bytes"] > limit):
            problems.append("offset, body_bytes: expected less than 2^62")
        else:
            ends = inner["offset"] + inner["header_bytes"].astype(np.uint64) + inner["body_bytes"]
            starts = np.append(inner["offset"], np.array([self.trailer_offset] * self.is_sealed, np.uint64))
            expected = np.append(np.uint64(self.prefix_bytes), ends)[: len(starts)]
            if not np.array_equal(starts, expected):
                problems.append("offset: expected each message to begin where the one before ends")
        if self.has_tail and (not len(batches) or int(batches["offset"][-1]) != self.prefix_bytes):
            problems.append("tail: expected its batch right behind the schema")
        if self.has_tail and self.is_sealed:
            problems.append("flags: a sealed shard has no tail")
        if np.any(runs["ordinal"] >= max(self.n_rows, 1)):
            problems.append(f"runs: expected ordinals below {self.n_rows}")
        elif len(runs) and self.n_rows <= limit:
            ordinals = runs["ordinal"].astype(np.int64)
            lengths = np.diff(np.append(ordinals, self.n_rows))
            ends_row = runs["row"] + lengths
            if ordinals[0] != 0 or np.any(lengths <= 0) or np.any(runs["row"][1:] < ends_row[:-1]):
                problems.append("runs: expected strictly increasing rows and ordinals from 0")
            if np.any((runs["row"] < 0) | (runs["row"] > limit)) or np.any(ends_row > np.int64(1 << 62)):
                problems.append("runs: expected row numbers in 0..2^62")
        if problems:
            raise CorruptError(f"{where}: {'; '.join(problems)}", problems)


def find_runs(rows: npt.NDArray[np.int64], first_ordinal: int) -> npt.NDArray[np.void]:
    """Return the runs of consecutive numbers in `rows` (strictly increasing, [n]), counted from `first_ordinal`."""
    starts = np.flatnonzero(np.diff(rows) != 1) + 1
    starts = np.concatenate([[0], starts]) if len(rows) else np.empty(0, np.int64)
    runs = np.empty(len(starts), RUN_DTYPE)
    runs["row"], runs["ordinal"] = rows[starts], starts + first_ordinal
    return runs
