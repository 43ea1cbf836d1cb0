"""An oracle for rows: what a model was really given and made, and what a plain pass over a row's history makes.

Nothing here uses strapfmt's own notion of a sequence, a cache or a mask. A spy sees what enters the embedding and what
leaves a block. `generate` says which texts there are. A pass without a cache, over the tokens that `parent_row` leads
back through, must make the value that is stored; so a row with a wrong history, position or place is found out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from models import PAD

import strapfmt

__all__ = ["Spy", "Stored", "check_histories", "check_passes", "check_rows", "real_places", "without_cache"]


class Spy:
    """Token ids `[n, q]` and values `[n, q, d]` of every pass, by plain hooks on an embedding and a block."""

    def __init__(self, embedding: torch.nn.Module, block: torch.nn.Module) -> None:
        self.ids: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self._handles = [
            embedding.register_forward_hook(self._embedded),
            block.register_forward_hook(self._left),
        ]

    def _embedded(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self.ids.append(args[0].clone())

    def _left(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        self.values.append((output[0] if isinstance(output, tuple) else output).clone())

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class Stored:
    """The tables of a dataset, and the values of one site by row."""

    def __init__(self, path: Path, site: str) -> None:
        with strapfmt.open(path) as dataset:
            tables = {name: view.to_arrow().to_pylist() for name, view in dataset.tables.items()}
            rows = [row for batch in dataset[site].scan(["row"]) for row in batch["row"].to_pylist()]
            self.values = dict(zip(rows, dataset[site][:], strict=True))
        self.tokens = {row["row"]: row for row in tables["tokens"]}
        self.sequences = {row["sequence_id"]: row for row in tables["sequences"]}
        self.steps = {row["step"]: row for row in tables["steps"]}
        self.rejected = [row["row"] for row in tables["row_events"] if row["event"] == "rejected"]
        self.chains: dict[int, list[int]] = {}
        for row, token in sorted(self.tokens.items()):
            parent = token["parent_row"]
            self.chains[row] = [*(self.chains[parent] if parent is not None else []), row]

    def text(self, row: int) -> tuple[int, ...]:
        """Token ids from the first of a row's history to itself."""
        return tuple(self.tokens[each]["token_id"] for each in self.chains[row])

    def leaves(self) -> list[int]:
        """Rows that no other goes on from: every row is in the history of one of them."""
        parents = {token["parent_row"] for token in self.tokens.values()}
        return [row for row in self.chains if row not in parents]

    def by_place(self) -> dict[int, dict[int, list[int]]]:
        """Rows of each step, of each place in its batch."""
        found: dict[int, dict[int, list[int]]] = {}
        for row, token in sorted(self.tokens.items()):
            found.setdefault(token["step"], {}).setdefault(token["batch_index"], []).append(row)
        return found


def real_places(ids: torch.Tensor) -> torch.Tensor:
    """Places that hold no padding, in a test whose texts hold no padding token."""
    return ids != PAD


def check_rows(
    stored: Stored,
    spy: Spy,
    forward: Callable[[tuple[int, ...]], torch.Tensor] | None,
    *,
    returned: Iterable[list[int]] = (),
    real: Callable[[torch.Tensor], torch.Tensor] = real_places,
    atol: float = 1e-5,
) -> None:
    """Compare every stored row with what the model did.

    Parameters
    ----------
    stored, spy
        Of one run with one stream of tokens.
    forward : callable
        Given a text, the values `[tokens, d]` that a plain pass over it makes; None where that is not to be expected.
    returned : iterable of list of int
        What `generate` returned, padding left out: every token but the last has been processed.
    """
    check_passes(stored, spy, real)
    check_histories(stored)
    texts = {stored.text(row) for row in stored.chains}
    for text in returned:
        assert tuple(text[:-1]) in texts
    for row in stored.leaves() if forward is not None else ():
        chain = stored.chains[row]
        expected = forward(stored.text(row))
        found = torch.stack([stored.values[each] for each in chain])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


def check_passes(stored: Stored, spy: Spy, real: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Every pass made the rows of its real tokens, in their order, with the very values of that pass."""
    assert len(spy.ids) == len(spy.values) == len(stored.steps)
    by_place = stored.by_place()
    for step, (ids, values) in enumerate(zip(spy.ids, spy.values, strict=True)):
        kept = real(ids)
        for place in range(len(ids)):
            rows = by_place.get(step, {}).get(place, [])
            assert [stored.tokens[row]["token_id"] for row in rows] == ids[place][kept[place]].tolist()
            expected = values[place][kept[place]]
            assert torch.equal(torch.stack([stored.values[row] for row in rows]), expected) if rows else True
        assert stored.steps[step]["n_rows"] == int(kept.sum())
    assert set(stored.values) == set(stored.tokens)


def check_histories(stored: Stored) -> None:
    """Positions count along the history; a sequence is left where another is said to branch off, and nowhere else."""
    for row, chain in stored.chains.items():
        token = stored.tokens[row]
        assert token["position"] == len(chain) - 1
        if len(chain) == 1:
            continue
        sequence, before = token["sequence_id"], stored.tokens[chain[-2]]["sequence_id"]
        if sequence != before:
            branch = stored.sequences[sequence]
            assert branch["fork_position"] == token["position"]
            assert branch["parent_sequence_id"] == before
    first: dict[int, int] = {}
    for token in stored.tokens.values():
        first[token["sequence_id"]] = min(
            token["position"], first.get(token["sequence_id"], token["position"])
        )
    for sequence, position in first.items():
        if stored.sequences[sequence]["parent_sequence_id"] is not None:
            # 0: without a cache a branch is read from its beginning again.
            assert position in (stored.sequences[sequence]["fork_position"], 0)


def without_cache(
    model: torch.nn.Module, block: torch.nn.Module, text: tuple[int, ...], **options: Any
) -> torch.Tensor:
    """What leaves `block` in a plain pass of `model` over one text: `[tokens, d]`."""
    spy = Spy(torch.nn.Identity(), block)
    try:
        model(torch.tensor([text]), use_cache=False, **options)
    finally:
        spy.close()
    return spy.values[0][0]
