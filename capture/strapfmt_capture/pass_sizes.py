"""How large a pass will be, foreseen from its tokens and from what sites have given before."""

from __future__ import annotations

import math
from dataclasses import dataclass

from strapfmt.schema import SiteSpec
from strapfmt_capture.calls import Call
from strapfmt_capture.disk_space import PassSize

__all__ = ["PassSizes"]


class PassSizes:
    """Says before a pass what it will store: of its rows, their number is known, and of sites that have fired, a row.

    What it cannot say it leaves out: sites that have not fired, so the whole first pass, and sites that number their
    own rows.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._rows = {False: _RowBytes(), True: _RowBytes()}

    def add(self, site: SiteSpec, *, is_head: bool, is_last: bool, in_encoder: bool) -> None:
        """Take note of a site: `is_head` if it may have rows of some positions only, `is_last` if of the last only."""
        if site.row_space != "tokens" or site.name in self._known:
            return
        self._known.add(site.name)
        row = self._rows[in_encoder]
        n_bytes = math.prod(size for size in site.shape if size >= 0) * site.stored_dtype.item_bytes
        if site.is_ragged:
            row.of_key += n_bytes
        elif is_last:
            row.of_last += n_bytes
        elif is_head:
            row.of_head += n_bytes
        else:
            row.of_token += n_bytes

    def of(self, call: Call, n_rows: int | None, *, in_encoder: bool) -> PassSize:
        """Return what a pass will store.

        Parameters
        ----------
        call : Call
        n_rows : int or None
            Tokens of which values are stored, at most; None: all.
        in_encoder : bool
            Whether it is a pass of the encoder of an encoder-decoder model.
        """
        inputs, row = call.inputs, self._rows[in_encoder]
        if inputs is None:
            return PassSize()
        n, q = inputs.n_sequences, inputs.n_query
        n_rows, chosen = n * q if n_rows is None else n_rows, call.chosen(q)
        n_keys = (inputs.past or 0) + q
        n_bytes = n_rows * (row.of_token + n_keys * row.of_key)
        n_bytes += min(n_rows, n * (q if chosen is None else len(chosen))) * row.of_head
        return PassSize(n_bytes + min(n_rows, n) * row.of_last, n * q)


@dataclass(slots=True)
class _RowBytes:
    """Bytes of a row at all sites together.

    Those of every token, of the tokens that the head computes, of the last one of each sequence, and for each key that
    a token attends to.
    """

    of_token: int = 0
    of_head: int = 0
    of_last: int = 0
    of_key: int = 0
