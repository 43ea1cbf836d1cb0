"""One sequence of a dataset: its tokens in order, and the activations that belong to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from strapfmt.errors import ArgumentError

if TYPE_CHECKING:
    import torch

    from strapfmt.reader import Reader

__all__ = ["SequenceView", "Tokens"]


class Tokens:
    """The tokens of one state of a dataset, read once however many sequences are asked for.

    Parameters
    ----------
    table : pyarrow.Table
        The `tokens` table; it is kept, and costs no memory where it aliases the maps.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self._rows, self._sequences, self._parents = (
            np.asarray(table.column(name).fill_null(-1).to_numpy())
            for name in ("row", "sequence_id", "parent_row")
        )

    def history(self, sequence_id: int) -> tuple[npt.NDArray[np.int64], pa.Table]:
        """Return the row ids of a sequence along its history, and their rows of the table.

        Raises
        ------
        ArgumentError
            If it has no tokens.
        """
        own = self._rows[self._sequences == sequence_id]
        if not len(own):
            raise ArgumentError(
                f"no tokens of sequence {sequence_id}; the dataset holds {_shown(self._sequences)}"
            )
        order, rows, parent_at = self._by_row
        at = order[_chain(parent_at, int(np.searchsorted(rows, own.max())))]
        return self._rows[at], self.table.take(pa.array(at))

    @cached_property
    def _by_row(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The order of the row ids, these in that order, and where among them the parent of each is (-1: none)."""
        order = np.argsort(self._rows, kind="stable")
        rows, parents = self._rows[order], self._parents[order]
        parent_at = np.searchsorted(rows, parents)
        parent_at[(parents < 0) | (parents >= rows)] = -1
        return order, rows, parent_at


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceView:
    """The tokens of one sequence.

    Attributes
    ----------
    sequence_id : int
    rows : int64 ndarray [n_tokens]
        Row ids along the history: after a beam was forked the tokens of its parents come first, and tokens that were
        rejected or computed again are left out.
    tokens : pyarrow.Table
        The rows of the `tokens` table, in that order.
    """

    sequence_id: int
    rows: npt.NDArray[np.int64]
    tokens: pa.Table
    _reader: Reader

    @classmethod
    def of(cls, reader: Reader, tokens: Tokens, sequence_id: int) -> SequenceView:
        """Collect a sequence. See `Reader.sequence`."""
        rows, table = tokens.history(sequence_id)
        return cls(sequence_id=sequence_id, rows=rows, tokens=table, _reader=reader)

    @property
    def text(self) -> str:
        """The tokens' texts joined ("" where none was stored)."""
        return "".join(text or "" for text in self.tokens.column("token").to_pylist())

    def tensors(self, names: str | Sequence[str]) -> dict[str, torch.Tensor]:
        """Return tensors [n_tokens, *shape] of several sites, copies.

        Raises
        ------
        RowNotFoundError
            If a site does not hold all of the tokens.
        """
        return self._reader.tensors(names, self.rows)[1]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors([name])[name]

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"SequenceView({self.sequence_id}: {len(self)} tokens, {self.text[:60]!r})"


def _chain(parent_at: npt.NDArray[np.int64], at: int) -> npt.NDArray[np.int64]:
    """Return the indices of `at` and all before it in its history, oldest first."""
    found = []
    while at >= 0:
        found.append(at)
        at = int(parent_at[at])
    return np.array(found[::-1], np.int64)


def _shown(of_sequence: npt.NDArray[np.int64]) -> str:
    known = np.unique(of_sequence)
    return f"{', '.join(map(str, known[:5]))}{' ...' if len(known) > 5 else ''}" if len(known) else "none"
