"""Where rescued rows go: a site or table of the new dataset, which takes what belongs there and is not there yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from strapfmt import spec
from strapfmt.errors import ArgumentError
from strapfmt.report import SiteRepair
from strapfmt.row_checks import TABLE_IDS
from strapfmt.salvage import Stream
from strapfmt.schema import TABLE_SCHEMAS, SiteSpec, read_site, site_schema
from strapfmt.writer import DatasetWriter

__all__ = ["IdColumn", "RescueTarget"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class IdColumn:
    """The column of a table's or a site's ids, the counter they come from ("" for a site's own), and what they keep to.

    Attributes
    ----------
    is_rising, is_unique : bool
        Whether ids go up from row to row, and whether one never comes twice.
    """

    column: str
    counter: str
    is_rising: bool = True
    is_unique: bool = True


# As the writer holds them to; events tell of any row again, and are cut by their step.
_TABLE_KEYS = {
    **{name: IdColumn(ids.column, ids.counter, ids.is_rising) for name, ids in TABLE_IDS.items()},
    "row_events": IdColumn("step", "step", is_rising=False, is_unique=False),
}


class RescueTarget:
    """Writes rescued batches of one site or table.

    Raises
    ------
    ArgumentError
        If this version cannot store it.
    """

    def __init__(
        self, writer: DatasetWriter, name: str, site: SiteSpec | None, account: SiteRepair, is_table: bool
    ) -> None:
        if is_table and name not in TABLE_SCHEMAS:
            raise ArgumentError(f"{name!r} is no table that this version knows")
        if not is_table and site is None:
            raise ArgumentError("no file in it says that it belongs here: misplaced, or damaged")
        if site:
            writer.add_site(site)
        self.name, self.site, self.account, self.last = name, site, account, -1
        self.key = IdColumn("row", "row" if site.row_space == "tokens" else "") if site else _TABLE_KEYS[name]
        self._schema = site_schema(site) if site else TABLE_SCHEMAS[name]
        self._writer = writer
        self._seen: set[int] = set()

    def refusal(self, stream: Stream) -> str:
        """Return why a file does not belong here, or nothing."""
        try:
            stated = read_site(stream.schema)
        except ArgumentError as error:
            return str(error)
        if stated != self.site:
            whose = f"site {stated.name!r}, as {stated}" if stated else "a table"
            return f"it belongs to {whose}, not to {self.name!r}{f', {self.site}' if self.site else ''}"
        if not stream.schema.equals(self._schema, check_metadata=False):
            return f"its columns are not those of {self.name!r}"
        first = stream.first_id(self.key.column)
        if first is not None and first >> spec.RANK_SHIFT != self._writer.rank:
            return f"it belongs to rank {first >> spec.RANK_SHIFT}, not to rank {self._writer.rank}"
        return ""

    def fresh(self, batch: pa.RecordBatch, limit: int, place: str) -> pa.RecordBatch | None:
        """Return the rows of `batch` that come after all before and lie below `limit`, None if there are none."""
        ids = batch.column(self.key.column).to_numpy()
        if self.key.is_rising and (
            np.any(ids[1:] <= ids[:-1]) or ids[0] < 0 or ids[-1] >> spec.RANK_SHIFT != self._writer.rank
        ):
            self.account.problems.append(f"{place}: a record batch's row numbers do not increase in its rank")
            return None
        keep = ids < limit
        if self.key.is_rising:
            keep &= ids > self.last
        elif self.key.is_unique:
            keep &= self._are_new(ids)
        if not keep.any():
            return None
        return batch if keep.all() else batch.filter(pa.array(keep))

    def write(self, batch: pa.RecordBatch) -> None:
        """Write rows that `fresh` has given."""
        self.last = int(batch.column(self.key.column)[-1].as_py())
        if self.site is None:
            self._writer.write_table(self.name, dict(zip(batch.schema.names, batch.columns, strict=True)))
        else:
            _write_site(self._writer, self.site, batch)
        self.account.n_rescued += batch.num_rows

    def _are_new(self, ids: Array) -> npt.NDArray[np.bool_]:
        """Say which ids come for the first time."""
        are_new = []
        for number in ids.tolist():
            are_new.append(number not in self._seen)
            self._seen.add(number)
        return np.array(are_new, bool)


def _write_site(writer: DatasetWriter, site: SiteSpec, batch: pa.RecordBatch) -> None:
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    values = columns["activation"].flatten().to_numpy(zero_copy_only=True)
    shapes = None
    if site.is_ragged:
        shapes = columns["shape"].flatten().to_numpy().reshape(-1, len(site.shape))
    else:
        values = values.reshape(batch.num_rows, *site.shape)
    is_own = site.row_space == "own"
    writer.write(
        site.name,
        values,
        rows=columns["row"].to_numpy(),
        shapes=shapes,
        statistics={name: columns[name].to_numpy() for name in site.statistics},
        token_row=columns["token_row"].fill_null(-1).to_numpy() if is_own else None,
        call=columns["call"].to_numpy() if is_own else None,
    )
    writer.wait()
