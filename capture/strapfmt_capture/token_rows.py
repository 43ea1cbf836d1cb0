"""Rows that a caller describes: which sequence and position each token has, and which token comes before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from strapfmt import spec
from strapfmt.arguments import as_integer
from strapfmt.errors import ArgumentError
from strapfmt.writer import DatasetWriter
from strapfmt_capture.arguments import stored_manifest, tags_text
from strapfmt_capture.texts import TokenTexts

__all__ = ["TokenBook", "TokenRows", "integers"]

_Int64 = npt.NDArray[np.int64]
_INT32_MAX, _INT64_MAX = int(np.iinfo(np.int32).max), int(np.iinfo(np.int64).max)


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Rows of the `tokens` table, to be shared by what is written of them at several sites.

    An index, a slice, a mask or an array of places makes the handle of a part of them.

    Attributes
    ----------
    rows, sequence_id, position : ndarray of int64 [n]
    """

    rows: _Int64
    sequence_id: _Int64
    position: _Int64
    #: The `writer_id` of the dataset they were made for; None for a handle of one's own making.
    _dataset: str | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, places: slice | npt.ArrayLike | torch.Tensor) -> TokenRows:
        part = places if isinstance(places, slice) else np.atleast_1d(np.asarray(places))
        return TokenRows(self.rows[part], self.sequence_id[part], self.position[part], self._dataset)


class TokenBook:
    """Numbers rows and sequences, and knows the last token of every sequence.

    Parameters
    ----------
    writer : DatasetWriter
    n_sequences : int
        Sequences with smaller numbers are in the dataset already.
    tokenizer : object or None
        Has `decode(list_of_ids)`, and `all_special_ids` if it knows any.
    tags : mapping or None
        JSON values kept with every sequence.
    """

    def __init__(
        self, writer: DatasetWriter, *, n_sequences: int, tokenizer: Any, tags: Mapping[str, Any] | None
    ) -> None:
        self._writer, self._n_before = writer, n_sequences
        self._base = writer.rank << spec.RANK_SHIFT
        self._texts = None if tokenizer is None else TokenTexts(tokenizer)
        self._tags, self._tags_text = dict(tags or {}), tags_text(tags)
        manifest = stored_manifest(writer.path, writer.rank)
        assert manifest is not None  # a writer begins with a commit
        self._dataset = manifest.writer_id
        #: The last position and row of each sequence.
        self._last: dict[int, tuple[int, int]] = {}

    def add(
        self,
        *,
        step: int,
        phase: str | list[str],
        token_ids: npt.ArrayLike | torch.Tensor | None,
        sequence_id: npt.ArrayLike | torch.Tensor | None,
        position: npt.ArrayLike | torch.Tensor | None,
        n: int | None,
        tags: Mapping[int, Mapping[str, Any]],
    ) -> TokenRows:
        """Number tokens, write their rows of `tokens`, and of `sequences` for those that begin."""
        columns = {"token_ids": token_ids, "position": position, "sequence_id": sequence_id}
        limits = {"token_ids": _INT32_MAX, "position": _INT32_MAX, "sequence_id": _INT64_MAX}
        ids, positions, sequences = (
            None if values is None else integers(name, values, most=limits[name])
            for name, values in columns.items()
        )
        n = _common_length(n, columns, (ids, positions, sequences))
        groups = _Groups.of(self._numbered(sequences, n))
        if positions is None:
            positions = integers("position", self._next_positions(groups), most=_INT32_MAX)
        positions = np.broadcast_to(positions, (n,))
        texts, is_special = (None, None) if ids is None or self._texts is None else self._texts.columns(ids)
        phases = [phase] * n if isinstance(phase, str) else phase
        if len(phases) != n:
            raise ArgumentError(f"phase: expected one, or one a token, {n}; got {len(phases)}")
        begun = self._begun(groups, step, ids, tags)
        first = self._writer.reserve("row", n) if n else self._base
        rows = np.arange(first, first + n)
        parents = self._parents(groups, positions, rows)
        self._writer.write_table(
            "tokens",
            {
                "row": rows,
                "step": np.full(n, step),
                "phase": phases,
                "batch_index": groups.batch_index.astype(np.int32),
                "sequence_id": groups.sequences,
                "position": positions.astype(np.int32),
                "token_id": pa.nulls(n, pa.int32()) if ids is None else ids.astype(np.int32),
                "token": pa.nulls(n, pa.utf8()) if texts is None else texts,
                "is_special": pa.nulls(n, pa.bool_()) if is_special is None else is_special,
                "parent_row": pa.array(parents, mask=parents < 0),
                "dropped": np.zeros(n, bool),
            },
        )
        if begun is not None:
            self._writer.write_table("sequences", begun)
        for sequence, last in zip(groups.unique.tolist(), groups.last.tolist(), strict=True):
            self._last[sequence] = (int(positions[last]), int(rows[last]))
        return TokenRows(rows, groups.sequences, positions, self._dataset)

    def check(self, site: str, tokens: TokenRows) -> None:
        """Refuse rows of another dataset, and rows that are not there.

        Raises
        ------
        ArgumentError
        """
        if tokens._dataset not in (None, self._dataset):
            raise ArgumentError(
                f"site {site!r}: tokens: expected rows of {self._writer.path}, got rows that were made for another "
                "dataset; describe them here too, with tokens()"
            )
        self.check_rows(f"site {site!r}: tokens", tokens.rows)

    def check_rows(self, what: str, rows: _Int64) -> None:
        """Refuse ids of rows of `tokens` that are not there.

        Raises
        ------
        ArgumentError
        """
        ranks = rows >> spec.RANK_SHIFT
        for rank in np.unique(ranks).tolist():
            if rank == self._writer.rank:
                end = self._writer.reserve("row", 0)
            else:  # another writer's: what it has committed
                manifest = stored_manifest(self._writer.path, rank)
                n_rows = 0 if manifest is None else manifest.counters["row"]
                end = (rank << spec.RANK_SHIFT) + n_rows
            missing = rows[(ranks == rank) & (rows >= end)]
            if len(missing):
                raise ArgumentError(
                    f"{what}: expected rows of the tokens table, of which rank {rank} has "
                    f"{end - (rank << spec.RANK_SHIFT)}; got {int(missing[0])}"
                )

    def _numbered(self, sequences: _Int64 | None, n: int) -> _Int64:
        """Sequence numbers of this rank: a new one for all tokens, or those that were asked for."""
        if sequences is None:
            return np.full(n, self._writer.reserve("sequence", 1) if n else 0)
        sequences = np.broadcast_to(sequences, (n,))
        counters = sequences & ((1 << spec.RANK_SHIFT) - 1)
        numbered: _Int64 = counters | self._base
        if np.any((sequences != numbered) & (sequences != counters)):
            raise ArgumentError(
                f"sequence_id: expected numbers from 0 to 2^{spec.RANK_SHIFT} - 1, or sequence_id of an earlier "
                f"result; got {int(sequences[(sequences != numbered) & (sequences != counters)][0])}"
            )
        if n:
            self._writer.skip_to({"sequence": int(counters.max()) + 1})
        return numbered

    def _next_positions(self, groups: _Groups) -> _Int64:
        starts = np.empty(len(groups.unique), np.int64)
        for i, sequence in enumerate(groups.unique.tolist()):
            if sequence not in self._last and not self._begins(sequence):
                raise ArgumentError(
                    f"position: expected one a token, since sequence {sequence} began in an earlier session"
                )
            starts[i] = self._last.get(sequence, (-1, 0))[0] + 1
        positions = np.empty(len(groups.sequences), np.int64)
        positions[groups.order] = np.arange(len(positions)) - np.repeat(groups.starts - starts, groups.counts)
        return positions

    def _parents(self, groups: _Groups, positions: _Int64, rows: _Int64) -> _Int64:
        """Row of the token one position before, if it is the last one known of the sequence; else -1."""
        if not len(rows):
            return rows
        before_row, before_position = np.roll(rows[groups.order], 1), np.roll(positions[groups.order], 1)
        last = [self._last.get(sequence, (-2, -1)) for sequence in groups.unique.tolist()]
        before_position[groups.starts] = [position for position, _ in last]
        before_row[groups.starts] = [row for _, row in last]
        parents = np.empty(len(rows), np.int64)
        parents[groups.order] = np.where(before_position == positions[groups.order] - 1, before_row, -1)
        return parents

    def _begins(self, sequence: int) -> bool:
        return sequence not in self._last and sequence - self._base >= self._n_before

    def _begun(
        self, groups: _Groups, step: int, ids: _Int64 | None, tags: Mapping[int, Mapping[str, Any]]
    ) -> dict[str, Any] | None:
        """Columns of `sequences` for those that begin."""
        begun = [i for i, sequence in enumerate(groups.unique.tolist()) if self._begins(sequence)]
        known = {number for sequence in groups.unique[begun].tolist() for number in _names(sequence)}
        if stray := [number for number in tags if number not in known]:
            raise ArgumentError(
                f"tags: expected numbers of sequences that begin with these tokens, got {stray[0]!r}"
            )
        if not begun:
            return None
        prompts: list[_Int64 | None] = [None] * len(begun)
        if ids is not None:
            prompts = [ids[groups.places(i)] for i in begun]
        n, texts = len(begun), self._texts
        return {
            "sequence_id": groups.unique[begun],
            "batch_index": groups.batch_index[groups.first[begun]].astype(np.int32),
            "first_step": np.full(n, step),
            "parent_sequence_id": pa.nulls(n, pa.int64()),
            "fork_position": pa.nulls(n, pa.int32()),
            "n_prompt_tokens": groups.counts[begun].astype(np.int32),
            "prompt_token_ids": [None if prompt is None else prompt.tolist() for prompt in prompts],
            "prompt": [
                None if prompt is None or texts is None else texts.of_prompt(prompt) for prompt in prompts
            ],
            "tags": [self._tags_of(sequence, tags) for sequence in groups.unique[begun].tolist()],
        }

    def _tags_of(self, sequence: int, tags: Mapping[int, Mapping[str, Any]]) -> str:
        """The dataset's tags, and over them those of one sequence."""
        own = next((tags[number] for number in _names(sequence) if number in tags), None)
        if own is None:
            return self._tags_text
        tags_text(own, f"tags of sequence {sequence}")  # before it is taken for a mapping
        return tags_text({**self._tags, **own})


def _names(sequence: int) -> tuple[int, int]:
    """The numbers by which a sequence may be called: its whole one, and the one in its rank."""
    return sequence, sequence & ((1 << spec.RANK_SHIFT) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """Tokens by sequence: `order` sorts them, and each sequence is `counts` of them from `starts`."""

    sequences: _Int64
    unique: _Int64
    order: _Int64
    starts: _Int64
    counts: _Int64
    first: _Int64
    batch_index: _Int64

    @classmethod
    def of(cls, sequences: _Int64) -> _Groups:
        unique, first, inverse, counts = np.unique(
            sequences, return_index=True, return_inverse=True, return_counts=True
        )
        appearance = np.empty(len(unique), np.int64)
        appearance[np.argsort(first)] = np.arange(len(unique))
        return cls(
            sequences=sequences,
            unique=unique,
            order=np.argsort(inverse, kind="stable"),
            starts=np.cumsum(counts) - counts,
            counts=counts,
            first=first,
            batch_index=appearance[inverse],
        )

    @property
    def last(self) -> _Int64:
        """Place of the last token of each sequence."""
        last: _Int64 = self.order[self.starts + self.counts - 1]
        return last

    def places(self, i: int) -> _Int64:
        """Places of the tokens of sequence `unique[i]`."""
        return self.order[self.starts[i] : self.starts[i] + self.counts[i]]


def integers(
    name: str, values: npt.ArrayLike | torch.Tensor, *, least: int = 0, most: int = _INT64_MAX
) -> _Int64:
    """Return a number or a one-dimensional array of them as int64.

    Raises
    ------
    ArgumentError
        If it is something else, or one is below `least` or above `most`.
    """
    expected = f"{name}: expected whole numbers from {least} to {most} in one dimension"
    try:
        array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors that NumPy has no type for
        raise ArgumentError(f"{expected}: {error}") from error
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim > 1 or isinstance(values, np.ma.MaskedArray):
        raise ArgumentError(f"{expected}, got {type(values).__name__} of {array.dtype} {list(array.shape)}")
    if array.size and (int(array.min()) < least or int(array.max()) > most):
        wrong = int(array.min()) if int(array.min()) < least else int(array.max())
        raise ArgumentError(f"{expected}, got {wrong}")
    converted: _Int64 = array.astype(np.int64)
    return converted


def _common_length(n: int | None, columns: Mapping[str, object], arrays: tuple[_Int64 | None, ...]) -> int:
    """How many tokens are meant; a single number stands for all of them."""
    found = {
        name: len(array)
        for name, array in zip(columns, arrays, strict=True)
        if array is not None and array.ndim
    }
    if n is not None:
        found["n"] = as_integer("n", n, least=0)
    if len(set(found.values())) != 1:
        raise ArgumentError(
            f"tokens: expected token_ids, sequence_id or position of one length, or n=; got {found or 'none'}"
        )
    return next(iter(found.values()))
