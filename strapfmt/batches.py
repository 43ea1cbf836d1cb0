"""Cuts streams of record batches: at a number of rows, or into equal sizes."""

from collections.abc import Iterator, Sequence

import pyarrow as pa

__all__ = ["limited", "resized"]


def limited(batches: Iterator[pa.RecordBatch], limit: int) -> Iterator[pa.RecordBatch]:
    """Yield batches until `limit` rows have come."""
    while limit > 0 and (batch := next(batches, None)) is not None:
        yield batch.slice(0, limit)
        limit -= batch.num_rows


def resized(batches: Iterator[pa.RecordBatch], size: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield batches of `size` rows, the last one shorter; they are copies where stored batches are joined."""
    kept: list[pa.RecordBatch] = []
    n_kept = 0
    for batch in batches:
        at = 0
        while at < batch.num_rows:
            part = batch.slice(at, size - n_kept)
            kept.append(part)
            n_kept += part.num_rows
            at += part.num_rows
            if n_kept == size:
                yield _merged(kept, schema)
                kept, n_kept = [], 0
    if kept:
        yield _merged(kept, schema)


def _merged(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    if len(batches) == 1:
        return batches[0]
    return pa.Table.from_batches(batches, schema).combine_chunks().to_batches()[0]
