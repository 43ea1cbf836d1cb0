"""Finds the tokens that a crash left without the rest of their step, for repair."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from strapfmt.report import SiteRepair

__all__ = ["UnfinishedSteps"]

_RESCUED = "rescued after a crash"
_COLUMNS = ["step", "row", "batch_index", "phase"]


class UnfinishedSteps:
    """Tokens of one rank that lie beyond its last commit and beyond its last complete step.

    A step is complete if it has a row in `steps` and its activations are there: none of its tokens come after the last
    activation of any site. (Of a site that had none of them to give, that cannot be told: such a step counts as cut.)

    Attributes
    ----------
    last_step : int
        The last step with a row in `steps`, -1 if there is none.
    n_tokens : int
        Tokens found beyond the last complete step.
    """

    def __init__(self) -> None:
        self.last_step, self.n_tokens = -1, 0
        self._site, self._last_row, self._n_without, self._n_cut = "", -1, 0, 0
        self._without_step: list[pa.RecordBatch] = []

    def see_site(self, name: str, last_row: int) -> None:
        """Take note of a site's last row; the site that ends first counts."""
        if not self._site or last_row < self._last_row:
            self._site, self._last_row = name, last_row

    def judged(self, steps: pa.RecordBatch, account: SiteRepair) -> pa.RecordBatch:
        """Return rows of `steps` in which those whose activations are not there have the status "abandoned".

        Parameters
        ----------
        steps : RecordBatch
        account : SiteRepair
            Of the table before these; what was committed stays as it is.
        """
        if not self._site:
            return steps
        last_row = steps["first_row"].to_numpy() + steps["n_rows"].to_numpy() - 1
        is_cut = (steps["n_rows"].to_numpy() > 0) & (last_row > self._last_row)
        is_cut &= np.array([status == "complete" for status in steps["status"].to_pylist()], bool)
        is_cut[: max((account.n_committed or 0) - account.n_rescued, 0)] = False
        if not is_cut.any():
            return steps
        self._n_cut += int(np.count_nonzero(is_cut))
        columns = dict(zip(steps.schema.names, steps.columns, strict=True))
        for name, value in (("status", "abandoned"), ("reason", _RESCUED)):
            kind = steps.schema.field(name).type
            columns[name] = pc.if_else(pa.array(is_cut), pa.scalar(value, kind), columns[name])
        return pa.RecordBatch.from_arrays(list(columns.values()), schema=steps.schema)

    def see(self, tokens: pa.RecordBatch, account: SiteRepair) -> None:
        """Take note of tokens just rescued; all sites and steps have been seen."""
        n_beyond = min(account.n_rescued - (account.n_committed or 0), len(tokens))
        if n_beyond <= 0:
            return
        tokens = tokens.slice(len(tokens) - n_beyond).select(_COLUMNS)
        is_stepless = tokens["step"].to_numpy() > self.last_step
        has_no_activation = (
            tokens["row"].to_numpy() > self._last_row if self._site else np.zeros(n_beyond, bool)
        )
        self.n_tokens += int(np.count_nonzero(is_stepless | has_no_activation))
        self._n_without += int(np.count_nonzero(has_no_activation))
        if is_stepless.any():
            self._without_step.append(tokens.filter(pa.array(is_stepless)))

    def rows(self) -> Mapping[str, list[Any]] | None:
        """Return rows of `steps` for the steps that have none, as far as their tokens tell; None if there are none."""
        if not self._without_step:
            return None
        tokens = pa.Table.from_batches(self._without_step)
        numbers, first, n_rows = np.unique(tokens["step"].to_numpy(), return_index=True, return_counts=True)
        n = len(numbers)
        pairs = np.stack([tokens["step"].to_numpy(), tokens["batch_index"].to_numpy()], axis=1)
        each, widths = np.unique(pairs, axis=0, return_counts=True)
        of_step = [widths[each[:, 0] == number] for number in numbers]
        return {
            "step": numbers.tolist(),
            "phase": tokens["phase"].take(pa.array(first)).to_pylist(),
            "n_sequences": [len(counts) for counts in of_step],
            "n_query": [int(counts.max()) for counts in of_step],
            "n_rows": n_rows.tolist(),
            "first_row": tokens["row"].to_numpy()[first].tolist(),
            "started_ns": [0] * n,
            "duration_s": [0.0] * n,
            "status": ["abandoned"] * n,
            "reason": [_RESCUED] * n,
        }

    def note(self, n_added: int) -> str:
        """Return what there is to say, for people.

        Parameters
        ----------
        n_added : int
            Steps that were given a row in `steps`.
        """
        n_stepless = sum(map(len, self._without_step))
        parts = []
        if n_stepless:
            added = f" ({n_added:,} added to it, status 'abandoned')" if n_added else ""
            parts.append(f"{n_stepless:,} are of steps without a row in `steps`{added}")
        if self._n_without:
            cut = f" ({self._n_cut:,} step(s) have the status 'abandoned' for that)" if self._n_cut else ""
            parts.append(f"{self._n_without:,} come after the last activation of {self._site!r}{cut}")
        return f"{self.n_tokens:,} rescued token(s) lie beyond the last complete step: {'; '.join(parts)}"
