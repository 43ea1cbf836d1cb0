"""Arrow IPC bytes: aligned and hashed messages, footers, and what is believed of untrusted ones."""

import struct

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from strapfmt import spec
from strapfmt.arrowfile import (
    Block,
    MessageEncoder,
    check_message,
    decoded_bytes,
    digest,
    is_compressed,
    message_bytes,
    trailer,
)
from strapfmt.codecs import CODECS, get_codec

SCHEMA = pa.schema([pa.field("a", pa.list_(pa.float32(), 3)), pa.field("row", pa.int64())])


def batch_of(n_rows: int) -> pa.RecordBatch:
    values = pa.array(np.arange(3 * n_rows, dtype=np.float32))
    return pa.RecordBatch.from_arrays(
        [pa.FixedSizeListArray.from_arrays(values, 3), pa.array(np.arange(n_rows))], schema=SCHEMA
    )


def test_a_digest_is_xxh3_128_of_the_pieces_joined() -> None:
    assert digest(b"ab", memoryview(b"c"), pa.py_buffer(b"")) == xxhash.xxh3_128_digest(b"abc")
    assert len(digest()) == 16


@settings(deadline=None)
@given(
    n_rows=st.integers(1, 50),
    start=st.integers(0, 5000).map(lambda n: n * 8),
    alignment=st.sampled_from([8, 64, 192, 4096, 12 * 64, 50257 * 64, 8 * 1001]),
    codec=st.sampled_from(sorted(CODECS)),
)
def test_a_body_begins_where_it_is_told_to(n_rows: int, start: int, alignment: int, codec: str) -> None:
    encoder = MessageEncoder(SCHEMA, get_codec(codec))
    encoded = encoder.lay_out(batch_of(n_rows), start=start, alignment=alignment).hashed()
    body = b"".join(bytes(piece) for piece in encoded.body)
    assert (start + len(encoded.header)) % alignment == 0
    assert len(encoded.header) < encoder.header_bytes() + alignment + 64
    assert encoded.n_bytes == len(encoded.header) + len(body)
    assert digest(encoded.header) == encoded.header_hash
    assert digest(body) == encoded.body_hash
    message = memoryview(encoded.header + body)
    assert message_bytes(message, 0) == (len(encoded.header), len(body))
    assert pa.ipc.read_record_batch(pa.py_buffer(message), SCHEMA).equals(batch_of(n_rows))
    assert is_compressed(encoded.header) == (codec != "none")


def test_a_message_vouches_for_itself() -> None:
    encoded = MessageEncoder(SCHEMA, get_codec("none")).lay_out(batch_of(4), alignment=64).hashed()
    header, body = bytearray(encoded.header), bytearray(b"".join(bytes(piece) for piece in encoded.body))
    assert check_message(memoryview(header), memoryview(body))
    for data in (header, body):
        for at in range(len(data)):
            data[at] ^= 4
            assert not check_message(memoryview(header), memoryview(body)), (data is header, at)
            data[at] ^= 4


@pytest.mark.parametrize("n_batches", [0, 1, 7, 1000])
def test_a_stream_with_a_trailer_is_an_arrow_file(n_batches: int) -> None:
    encoder = MessageEncoder(SCHEMA, get_codec("none"))
    data, blocks = bytearray(encoder.prefix), []
    for i in range(n_batches):
        encoded = encoder.lay_out(batch_of(1 + i % 3), start=len(data), alignment=64).hashed()
        blocks.append(Block(len(data), len(encoded.header), encoded.body_bytes))
        data += encoded.header + b"".join(bytes(piece) for piece in encoded.body)
    stream = bytes(data[8:]) + spec.IPC_END
    data += trailer(SCHEMA, blocks)
    file = pa.ipc.open_file(pa.py_buffer(bytes(data)))
    assert file.num_record_batches == n_batches
    assert file.schema.equals(SCHEMA)
    found = [file.get_batch(i) for i in range(n_batches)]
    assert found == [batch_of(1 + i % 3) for i in range(n_batches)]
    assert pa.ipc.open_stream(stream).read_all().equals(pa.Table.from_batches(found, SCHEMA))


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 250))
def test_no_message_is_found_in_noise_beyond_its_end(data: bytes, offset: int) -> None:
    found = message_bytes(memoryview(data), offset)
    assert found is None or offset + sum(found) <= len(data)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_what_a_batch_expands_to_is_known_before(codec: str) -> None:
    encoded = MessageEncoder(SCHEMA, get_codec(codec)).lay_out(batch_of(100)).hashed()
    body = b"".join(bytes(piece) for piece in encoded.body)
    assert decoded_bytes(encoded.header, memoryview(body)) == 100 * 12 + 100 * 8
    bomb = bytearray(body)
    struct.pack_into("<q", bomb, 0, 1 << 50)
    assert decoded_bytes(encoded.header, memoryview(bytes(bomb))) > 1 << 50
    struct.pack_into("<q", bomb, 0, -7)
    with pytest.raises(ValueError, match="expands to -7"):
        decoded_bytes(encoded.header, memoryview(bytes(bomb)))
    with pytest.raises(ValueError, match="in a body of 40"):
        decoded_bytes(encoded.header, memoryview(body[:40]))
