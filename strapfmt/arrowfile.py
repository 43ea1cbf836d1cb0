"""Arrow IPC bytes: record batch messages whose bodies are aligned and hashed, and the footer that seals a file."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.ipc
import xxhash

from strapfmt import spec
from strapfmt.codecs import Codec

__all__ = [
    "Block",
    "EncodedBatch",
    "LaidOutBatch",
    "MessageEncoder",
    "check_message",
    "decoded_bytes",
    "digest",
    "is_compressed",
    "message_bytes",
    "trailer",
]

_STATED_HASH = re.compile(rb"\x20\x00\x00\x00([0-9a-f]{32})\x00")
_BODY_PLACEHOLDER, _HEADER_PLACEHOLDER = b"b" * 32, b"h" * 32


def digest(*pieces: bytes | pa.Buffer | memoryview) -> bytes:
    """Return the xxh3-128 of `pieces` joined, as 16 bytes (big-endian, the canonical form)."""
    state = xxhash.xxh3_128()
    for piece in pieces:
        state.update(piece)
    return state.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class LaidOutBatch:
    """One record batch message with all but its hashes, for which its header has room.

    Attributes
    ----------
    header : bytes
        Continuation marker, length, and the padded flatbuffer.
    body : tuple of buffers
        The body in pieces; uncompressed pieces alias the arrays the batch was made of.
    body_bytes : int
        Sum of the pieces.
    """

    header: bytes
    body: tuple[bytes | pa.Buffer, ...]
    body_bytes: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole message."""
        return len(self.header) + self.body_bytes

    def hashed(self) -> EncodedBatch:
        """Return the message with its hashes; reads all of the body."""
        body_hash = digest(*self.body)
        header = self.header.replace(_BODY_PLACEHOLDER, body_hash.hex().encode(), 1)
        header = header.replace(_HEADER_PLACEHOLDER, digest(header).hex().encode(), 1)
        return EncodedBatch(
            header=header,
            body=self.body,
            body_bytes=self.body_bytes,
            header_hash=digest(header),
            body_hash=body_hash,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBatch(LaidOutBatch):
    """One record batch message, ready to be written.

    Attributes
    ----------
    header_hash, body_hash : bytes
        xxh3-128 of the two. The header's metadata holds the body's, and its own as it was before that was filled in, so
        that a lone stream can be checked.
    """

    header_hash: bytes
    body_hash: bytes


class MessageEncoder:
    """Encodes record batches of one schema.

    Parameters
    ----------
    schema : pyarrow.Schema
    codec : Codec
    """

    def __init__(self, schema: pa.Schema, codec: Codec) -> None:
        self.schema = schema
        self._sink = _Sink()
        self._file = pa.PythonFile(self._sink, mode="w")
        self._writer = pa.ipc.new_stream(self._file, schema, options=codec.options())
        empty = pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
        self._writer.write_batch(empty)
        taken = b"".join(bytes(piece) for piece in self._sink.take())
        (schema_bytes,) = struct.unpack_from("<i", taken, 4)
        #: What every file of this schema begins with: the magic, its padding, the schema message.
        self.prefix = spec.IPC_PREFIX + taken[: schema_bytes + 8]
        self.prefix_hash = digest(self.prefix)

    def lay_out(self, batch: pa.RecordBatch, *, start: int = 0, alignment: int = 8) -> LaidOutBatch:
        """Lay out `batch` so that its body begins at a multiple of `alignment` when the message is written at `start`.

        The room is made inside the header, by a metadata value of spaces.
        """
        header, body = self._pieces(batch, 0)
        need = -(start + len(header)) % alignment
        if need:
            header, body = self._padded(batch, start, alignment, need)
        body_bytes = sum(len(piece) for piece in body)
        return LaidOutBatch(header=header, body=tuple(body), body_bytes=body_bytes)

    def header_bytes(self) -> int:
        """Bytes of an unpadded header: the same for every batch of the schema."""
        batch = pa.RecordBatch.from_arrays(
            [pa.array([], field.type) for field in self.schema], schema=self.schema
        )
        return len(self._pieces(batch, 0)[0])

    def _padded(
        self, batch: pa.RecordBatch, start: int, alignment: int, need: int
    ) -> tuple[bytes, list[bytes | pa.Buffer]]:
        for size in sorted(range(max(need - 16, 1), need + 17), key=lambda size: abs(size - need)):
            header, body = self._pieces(batch, size)
            if (start + len(header)) % alignment == 0:
                return header, body
        raise AssertionError(f"no padding of about {need} bytes aligns a header at {start} to {alignment}")

    def _pieces(self, batch: pa.RecordBatch, pad: int) -> tuple[bytes, list[bytes | pa.Buffer]]:
        metadata = {
            spec.BODY_HASH_KEY: _BODY_PLACEHOLDER,
            spec.HEADER_HASH_KEY: _HEADER_PLACEHOLDER,
            spec.PAD_KEY: b" " * pad,
        }
        self._writer.write_batch(batch, custom_metadata=metadata)
        pieces = self._sink.take()
        marker, length = pieces[0], pieces[1]
        (header_bytes,) = struct.unpack("<i", bytes(length))
        header, at = bytes(marker) + bytes(length), 2
        while len(header) < header_bytes + 8:
            header += bytes(pieces[at])
            at += 1
        return header, pieces[at:]


class _Sink:
    """Collects what Arrow writes, without copying the bodies."""

    closed = False

    def __init__(self) -> None:
        self._pieces: list[bytes | pa.Buffer] = []

    def write(self, data: bytes | pa.Buffer) -> int:
        self._pieces.append(data)
        return len(data)

    def take(self) -> list[bytes | pa.Buffer]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def flush(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Block:
    """Where one message lies in a file, as an Arrow footer states it."""

    offset: int
    header_bytes: int
    body_bytes: int

    def pack(self) -> bytes:
        """The 24 bytes of Arrow's `Block` struct."""
        return struct.pack("<qi4xq", self.offset, self.header_bytes, self.body_bytes)


def trailer(schema: pa.Schema, blocks: Sequence[Block]) -> bytes:
    """Return what turns a stream into a file: end of stream, footer, footer length, magic.

    No body is needed: Arrow writes a file of as many empty batches, and the blocks in its footer are replaced.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        empty = pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
        for _ in blocks:
            writer.write_batch(empty)
    written = memoryview(sink.getvalue())
    end = len(written) - len(spec.IPC_MAGIC) - 4
    (footer_bytes,) = struct.unpack_from("<i", written, end)
    footer = bytearray(written[end - footer_bytes : end])
    at = _record_batches(footer)
    (count,) = struct.unpack_from("<I", footer, at)
    if count != len(blocks):
        raise AssertionError(f"the footer lists {count} record batches, expected {len(blocks)}")
    footer[at + 4 : at + 4 + 24 * count] = b"".join(block.pack() for block in blocks)
    return spec.IPC_END + bytes(footer) + struct.pack("<i", footer_bytes) + spec.IPC_MAGIC


def message_bytes(memory: memoryview, offset: int) -> tuple[int, int] | None:
    """Return the bytes of header and body of the message at `offset`, or None where no complete message lies.

    Nothing is believed but that the lengths stay inside `memory`.
    """
    if offset + 8 > len(memory):
        return None
    marker, size = struct.unpack_from("<Ii", memory, offset)
    if marker != 0xFFFFFFFF or not 0 < size <= min(spec.MAX_HEADER_BYTES, len(memory) - offset - 8):
        return None
    message = memory[offset + 8 : offset + 8 + size]
    try:
        at = _find_field(message, _root(message), 3)
        body_bytes = 0 if at is None else struct.unpack_from("<q", message, at)[0]
    except (ValueError, struct.error):
        return None
    if not 0 <= body_bytes <= len(memory) - offset - 8 - size:
        return None
    return size + 8, body_bytes


def check_message(header: memoryview, body: memoryview) -> bool:
    """Return whether a record batch message agrees with the two hashes in its own metadata, before it is parsed."""
    stated = _STATED_HASH.findall(bytes(header))
    if digest(body).hex().encode() not in stated:
        return False
    return any(digest(bytes(header).replace(h, _HEADER_PLACEHOLDER, 1)).hex().encode() == h for h in stated)


def is_compressed(header: bytes | memoryview) -> bool:
    """Return whether Arrow would decompress the body of this record batch.

    Raises
    ------
    ValueError, struct.error
        If the flatbuffer points outside.
    """
    message = memoryview(header)[8:]
    table = _follow(message, _field(message, _root(message), 2))
    return _find_field(message, table, 3) is not None


def decoded_bytes(header: bytes | memoryview, body: memoryview) -> int:
    """Return what the compressed buffers of a record batch say they expand to, in bytes, without expanding them.

    Raises
    ------
    ValueError, struct.error
        If an offset or a length points outside.
    """
    message = memoryview(header)[8:]
    table = _follow(message, _field(message, _root(message), 2))
    vector = _follow(message, _field(message, table, 2))
    (count,) = struct.unpack_from("<I", message, vector)
    total = 0
    for at in range(vector + 4, vector + 4 + 16 * count, 16):
        offset, length = struct.unpack_from("<qq", message, at)
        if length == 0:
            continue
        if offset < 0 or length < 8 or offset + length > len(body):
            raise ValueError(f"a compressed buffer at {offset} of {length} bytes in a body of {len(body)}")
        (size,) = struct.unpack_from("<q", body, offset)
        if size < -1:
            raise ValueError(f"a compressed buffer says it expands to {size} bytes")
        total += length - 8 if size == -1 else size
    return total


def _record_batches(footer: bytearray) -> int:
    """Return where the vector `recordBatches` (field 3 of the flatbuffer table `Footer`) begins."""
    view = memoryview(footer)
    return _follow(view, _field(view, _root(view), 3))


def _root(buffer: memoryview) -> int:
    return int(struct.unpack_from("<I", buffer, 0)[0])


def _follow(buffer: memoryview, at: int) -> int:
    return at + int(struct.unpack_from("<I", buffer, at)[0])


def _field(buffer: memoryview, table: int, number: int) -> int:
    """Return where field `number` of a flatbuffer table lies."""
    at = _find_field(buffer, table, number)
    if at is None:
        raise ValueError(f"a flatbuffer table has no field {number}")
    return at


def _find_field(buffer: memoryview, table: int, number: int) -> int | None:
    """Return where field `number` of a flatbuffer table lies, None where it has its default."""
    vtable = table - int(struct.unpack_from("<i", buffer, table)[0])
    if vtable < 0:
        raise ValueError("a flatbuffer table lies outside")
    (size,) = struct.unpack_from("<H", buffer, vtable)
    entry = 4 + 2 * number
    if entry + 2 > size:
        return None
    (slot,) = struct.unpack_from("<H", buffer, vtable + entry)
    return table + int(slot) if slot else None
