"""How the activations of a site lie in its files: rows to a batch, and the alignment of each body."""

import math

from strapfmt import spec
from strapfmt.codecs import get_codec
from strapfmt.manifest import Layout
from strapfmt.schema import SiteSpec

__all__ = ["body_alignment", "plan_layout"]

_MAX_BATCH_ROWS = 1 << 16


def plan_layout(site: SiteSpec, header_bytes: int, batch_bytes: int) -> Layout:
    """Choose the layout of a new site.

    Batches hold a power of two of rows, about `batch_bytes`. Where the padding that row-aligned bodies need is at most
    `spec.SPARE_LIMIT` of the file (after growing the batch up to four times) the layout is "rows", else "strided".
    Compressed and ragged sites are "plain".

    Parameters
    ----------
    site : SiteSpec
    header_bytes : int
        Bytes of an unpadded record batch header.
    batch_bytes : int
        Target size of a record batch.
    """
    if site.is_ragged:
        return Layout(kind="plain", batch_rows=0)
    n_rows = _power_of_two(batch_bytes / (site.row_bytes + _other_bytes(site)))
    if not get_codec(site.codec).is_plain:
        return Layout(kind="plain", batch_rows=n_rows)
    for growth in (1, 2, 4):
        if _spare(site, header_bytes, n_rows * growth) <= spec.SPARE_LIMIT:
            return Layout(kind="rows", batch_rows=n_rows * growth)
    return Layout(kind="strided", batch_rows=n_rows)


def body_alignment(site: SiteSpec, layout: Layout) -> int:
    """Return what the offset of every body of a site is a multiple of, in bytes."""
    if layout.kind == "rows":
        return math.lcm(site.row_bytes, spec.ALIGNMENT_BYTES)
    return spec.ALIGNMENT_BYTES if layout.kind == "strided" else 8


def _power_of_two(n: float) -> int:
    return int(min(max(2 ** round(math.log2(max(n, 1))), 1), _MAX_BATCH_ROWS))


def _other_bytes(site: SiteSpec) -> int:
    return 8 + (16 if site.row_space == "own" else 0) + 4 * len(site.statistics)


def _spare(site: SiteSpec, header_bytes: int, n_rows: int) -> float:
    alignment = body_alignment(site, Layout(kind="rows", batch_rows=n_rows))
    needed = header_bytes + n_rows * (site.row_bytes + _other_bytes(site))
    stride = math.ceil(needed / alignment) * alignment
    return (stride - needed) / stride
