"""The rows a loader goes through, and how they are read: the same rows of one or more sites, hashed on first touch."""

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from strapfmt.arrowfile import digest
from strapfmt.errors import ArgumentError, DatasetChangedError
from strapfmt.loader.buffers import Buffers
from strapfmt.site import Site

__all__ = ["Selection", "Sites", "as_integers"]

Integers = NDArray[np.int64]


class Sites(Protocol):
    """A dataset, as far as a loader needs one; pickling it must open the same path again."""

    def __getitem__(self, name: str) -> Site:
        """The site of this name."""


class Selection:
    """Rows 0 to `n_rows` that every one of some sites holds, in stored order.

    Pickled, it opens the dataset again, and refuses one that has grown meanwhile.

    Parameters
    ----------
    dataset : Sites
    names : sequence of str
        Several need the row space of the tokens.
    rows : int64 [n], optional
        Row ids, each once; by default all that the sites have in common.

    Attributes
    ----------
    sites : list of Site
        As committed when this was made.
    n_rows : int
    """

    def __init__(self, dataset: Sites, names: Sequence[str], rows: Integers | None) -> None:
        self._dataset, self.names = dataset, list(names)
        self._open()
        self._ordinals = _ordinals(self.sites, rows)
        self.n_rows = self.sites[0].n_rows if self._ordinals is None else len(self._ordinals[0])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, over all sites."""
        return sum(site.spec.row_bytes for site in self.sites)

    @property
    def is_uniform(self) -> bool:
        """Whether the sites agree in dtype and shape."""
        return len({(site.dtype, site.shape) for site in self.sites}) == 1

    @property
    def block_starts(self) -> Integers:
        """First row of each stored record batch of the first site, and `n_rows`."""
        starts = self._batch_ordinals[0]
        if self._ordinals is None:
            return starts
        return np.unique(np.append(np.searchsorted(self._ordinals[0], starts), self.n_rows))

    def gather(self, number: int, rows: Integers, buffers: Buffers) -> torch.Tensor:
        """Return rows of site `number`, `[n, *shape]`, in memory from `buffers`.

        Raises
        ------
        CorruptError
            If the hash of a record batch that holds one of them does not match.
        """
        site = self.sites[number]
        ordinals = rows if self._ordinals is None else self._ordinals[number][rows]
        self._verify(number, ordinals)
        return site.gather(ordinals, out=buffers.take((len(rows), *site.shape), site.spec.stored_dtype.torch))

    def row_ids(self, rows: Integers) -> Integers:
        """Return the row ids of these rows, int64 [n]."""
        return _row_ids(self.sites[0], rows if self._ordinals is None else self._ordinals[0][rows])

    def hash(self, *, blocks: bool) -> str:
        """Return a digest of which rows these are and, with `blocks`, of how they lie in record batches."""
        parts = [self.block_starts] if blocks else []
        if self._ordinals is None:
            ends = np.array([0, max(self.n_rows - 1, 0)][: self.n_rows], np.int64)
            parts += [_row_ids(site, ends) for site in self.sites]
        else:
            parts += self._ordinals
        return digest(b"".join(part.tobytes() for part in parts)).hex()

    def _open(self) -> None:
        self.sites = [self._dataset[name] for name in self.names]
        if not self.sites or len(set(self.names)) != len(self.names):
            raise ArgumentError(f"sites: expected one or more different names, got {self.names}")
        for site in self.sites:
            if site.is_ragged:
                raise ArgumentError(
                    f"site {site.name!r}: rows differ in shape {site.shape}, so they fit no batch tensor; use scan()"
                )
            if len(self.sites) > 1 and site.row_space != "tokens":
                raise ArgumentError(
                    f"site {site.name!r} numbers its own rows, so they cannot be paired with those of other sites; "
                    "load it alone, or pair them in SQL over token_row"
                )
        self._batch_ordinals = [site.batch_ordinals for site in self.sites]
        self._is_verified = [np.zeros(len(ordinals) - 1, bool) for ordinals in self._batch_ordinals]

    def _verify(self, number: int, ordinals: Integers) -> None:
        """Compare the hashes of the record batches that hold `ordinals`, once each."""
        is_verified = self._is_verified[number]
        touched = np.unique(np.searchsorted(self._batch_ordinals[number], ordinals, "right") - 1)
        new = touched[~is_verified[touched]]
        for run in np.split(new, np.flatnonzero(np.diff(new) > 1) + 1):
            if len(run):
                self.sites[number].verify_batches(int(run[0]), int(run[-1]) + 1)
        is_verified[new] = True

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("sites", "_batch_ordinals", "_is_verified")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        return {**state, "_n_stored": [site.n_rows for site in self.sites]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        n_stored = state.pop("_n_stored")
        self.__dict__.update(state)
        self._open()
        found = [site.n_rows for site in self.sites]
        if found != n_stored:
            raise DatasetChangedError(
                f"the sites {self.names} held {n_stored} rows when this loader was made, and hold {found} now: "
                "make the loader anew, after the writer has closed"
            )


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """Return a view of the bits: copies and index_select lack kernels for some dtypes."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(sizes[tensor.element_size()])


def _ordinals(sites: Sequence[Site], rows: Integers | None) -> list[Integers] | None:
    """Return for every site the ordinals of the chosen rows, ascending; None stands for all rows of equal sites."""
    if rows is None:
        if len(sites) == 1:
            return None
        stored = [site.rows for site in sites]
        if all(np.array_equal(stored[0], other) for other in stored[1:]):
            return None
        rows = functools.reduce(lambda a, b: np.intersect1d(a, b, assume_unique=True), stored)
        if not len(rows):
            raise ArgumentError(f"sites {', '.join(site.name for site in sites)} have no row in common")
    wanted = np.unique(rows)
    if len(wanted) != len(rows):
        raise ArgumentError(f"rows: expected each row once, got {len(rows)} of which {len(wanted)} differ")
    return [site.ordinals_of(wanted) for site in sites]


def _row_ids(site: Site, ordinals: Integers) -> Integers:
    """Return the row ids of `ordinals`, reading only the stretch they span."""
    if not len(ordinals):
        return np.empty(0, np.int64)
    first = int(ordinals.min())
    return site.rows_between(first, int(ordinals.max()) + 1)[ordinals - first]
