"""An iterable of activation batches over one or more sites, whose place is a small JSON state."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import get_spawning_popen
from multiprocessing.sharedctypes import RawValue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from strapfmt.arguments import as_integer, as_names
from strapfmt.errors import ArgumentError
from strapfmt.loader.buffers import Buffers
from strapfmt.loader.order import FULL_SHUFFLE_BYTES, FULL_SHUFFLE_ROWS, Epoch, Order, Shuffle
from strapfmt.loader.selection import Selection, Sites, as_integers

__all__ = ["Batch", "Loader"]

Integers = NDArray[np.int64]
Values = torch.Tensor | dict[str, torch.Tensor]
Batch = Values | tuple[Values, torch.Tensor]

POOL_BYTES = 256 << 20
_STATE_VERSION = 1


class Loader(torch.utils.data.IterableDataset[Batch]):
    """Batches of activations, `[batch, *shape]` in the site's own dtype unless `dtype` says otherwise.

    Several sites of one shape and dtype give `[batch, n_sites, *shape]`, others a dict of tensors; their rows are those
    that every site holds. Batches are the caller's to keep. Iterating goes through `epochs` epochs, each in a new
    order, and going through it again continues with the next epochs. Record batches are hashed when first touched.

    It is a `torch.utils.data.IterableDataset`: `DataLoader(loader, batch_size=None, num_workers=2)` yields the same
    batches in the same order. The place (`state_dict`, `epoch`) then moves in the workers only, each pass begins where
    this loader stands, and `state_dict()` raises: set `loader.epoch` before each pass, take the state then, and count
    the batches, `state | {"batch": n}`. Persistent workers go on to the next epoch by themselves.

    Parameters
    ----------
    dataset : Sites
        Where the sites are.
    names : str or sequence of str
        One site, or several whose row space is that of the tokens.
    batch_size : int
        Rows in every batch but an epoch's last.
    shuffle : bool or {"full", "block"}
        True: "full" (one permutation of all rows) up to 4 GiB and 2**26 rows of uncompressed data, else "block"
        (permuted record batches, and rows permuted in pools of `pool_rows`). See `strapfmt.loader.order`.
    seed : int
        The order is a function of this, of the epoch and of what is stored.
    rows : int64 array, optional
        Only these row ids, as in the site's `rows`, each once. The order without shuffling stays that of the dataset.
    drop_last : bool
        Leave out the rows beyond the last full batch; every shard then yields equally many batches.
    dtype : torch.dtype, optional
        Convert every batch.
    with_rows : bool
        Yield `(values, rows)`, the row ids as an int64 tensor `[batch]`.
    shard : (int, int)
        `(rank, world size)`: this loader's part of the rows.
    epochs : int or None
        Epochs in one iteration; None: without end.
    pool_rows : int, optional
        For "block"; rounded up to whole batches. By default 256 MiB of activations.

    Raises
    ------
    SiteNotFoundError, RowNotFoundError
    ArgumentError
        If a site is ragged, sites number their own rows differently, or an option is out of range.
    """

    def __init__(
        self,
        dataset: Sites,
        names: str | Sequence[str],
        *,
        batch_size: int,
        shuffle: bool | str = False,
        seed: int = 0,
        rows: Integers | None = None,
        drop_last: bool = False,
        dtype: torch.dtype | None = None,
        with_rows: bool = False,
        shard: tuple[int, int] = (0, 1),
        epochs: int | None = 1,
        pool_rows: int | None = None,
    ) -> None:
        batch_size = as_integer("batch_size", batch_size, least=1)
        epochs = None if epochs is None else as_integer("epochs", epochs, least=1)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ArgumentError(f"dtype: expected a torch.dtype such as torch.float32, got {dtype!r}")
        self.names = as_names("sites", names)
        self.batch_size, self.drop_last, self.epochs = batch_size, drop_last, epochs
        self.dtype, self.with_rows = dtype, with_rows
        self._selection = Selection(dataset, self.names, rows)
        pool = max(1, POOL_BYTES // self._selection.row_bytes)
        if pool_rows is not None:
            pool = as_integer("pool_rows", pool_rows, least=1)
        self._order = Order(
            n_rows=self._selection.n_rows,
            kind=_kind(shuffle, self._selection),
            seed=seed,
            block_starts=self._selection.block_starts,
            pool_rows=-(-pool // batch_size) * batch_size,
            shard=shard,
        )
        if self._order.n_rows and drop_last and not self.n_batches:
            raise ArgumentError(
                f"drop_last: a shard of {self._order.smallest_size} rows holds no full batch of {batch_size}; choose a "
                "smaller batch_size"
            )
        self._first_epoch, self._epoch, self._batch = 0, 0, 0
        self._is_resumed = False
        self._hash: str | None = None
        self._is_in_workers = _shared_flag()

    # Going through it.

    @property
    def n_batches(self) -> int:
        """Batches of one epoch in this shard."""
        if self.drop_last:
            return self._order.smallest_size // self.batch_size
        return -(-self._order.size // self.batch_size)

    @property
    def shuffle(self) -> Shuffle:
        """The order in use: "none", "full" or "block"."""
        return self._order.kind

    @property
    def epoch(self) -> int:
        """The epoch it is in, or that the next iteration begins with; setting it goes to that epoch's beginning."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        epoch = as_integer("epoch", epoch, least=0)
        self._go_to(epoch, epoch, 0)
        self._is_resumed = False

    def __len__(self) -> int:
        """Batches of one iteration, all epochs together."""
        if self.epochs is None:
            raise TypeError("a loader with epochs=None has no length; n_batches is that of one epoch")
        return self.n_batches * self.epochs

    def __iter__(self) -> Iterator[Batch]:
        if not self._is_resumed:
            self.epoch = self._epoch
        self._is_resumed = False
        return self._run()

    def _go_to(self, first_epoch: int, epoch: int, batch: int) -> None:
        self._first_epoch, self._epoch, self._batch = first_epoch, epoch, batch
        self._is_in_workers.value = torch.utils.data.get_worker_info() is not None

    def _run(self) -> Iterator[Batch]:
        worker = torch.utils.data.get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        first, epoch, start = self._first_epoch, self._epoch, self._batch
        n_passed, buffers = 0, Buffers()
        while self.n_batches and (self.epochs is None or epoch < first + self.epochs):
            mine = range(start + (number - n_passed) % count, self.n_batches, count)
            for batch, values in self._batches(self._order.epoch(epoch), mine, buffers):
                self._go_to(first, epoch, batch + 1)
                yield values
            n_passed += self.n_batches - start
            epoch, start = epoch + 1, 0
        self.epoch = epoch

    def _batches(self, epoch: Epoch, batches: range, buffers: Buffers) -> Iterator[tuple[int, Batch]]:
        if self._order.kind == "block":
            yield from self._batches_of_pools(epoch, batches, buffers)
            return
        for batch in batches:
            rows = epoch.rows(*self._places(batch))
            parts = self._gathered(rows, buffers)
            yield batch, self._joined(parts, rows, buffers)

    def _batches_of_pools(
        self, epoch: Epoch, batches: range, buffers: Buffers
    ) -> Iterator[tuple[int, Batch]]:
        """Read what the batches of a pool need in stored order, then hand it out in theirs."""
        per_pool = self._order.pool_rows // self.batch_size
        for _, pool in itertools.groupby(batches, lambda batch: batch // per_pool):
            yield from self._batches_of_pool(epoch, list(pool), buffers)

    def _batches_of_pool(
        self, epoch: Epoch, batches: list[int], buffers: Buffers
    ) -> Iterator[tuple[int, Batch]]:
        rows = [epoch.rows(*self._places(batch)) for batch in batches]
        stored = np.sort(np.concatenate(rows))
        pools = self._gathered(stored, buffers)
        for batch, wanted in zip(batches, rows, strict=True):
            at = torch.from_numpy(np.searchsorted(stored, wanted))
            yield batch, self._joined([_selected(part, at, buffers) for part in pools], wanted, buffers)

    def _places(self, batch: int) -> tuple[int, int]:
        return batch * self.batch_size, min((batch + 1) * self.batch_size, self._order.size)

    def _gathered(self, rows: Integers, buffers: Buffers) -> list[torch.Tensor]:
        return [self._selection.gather(site, rows, buffers) for site in range(len(self.names))]

    def _joined(self, parts: list[torch.Tensor], rows: Integers, buffers: Buffers) -> Batch:
        if self.dtype is not None:
            parts = [part.to(self.dtype) for part in parts]
        values: Values
        if len(parts) == 1:
            values = parts[0]
        elif self._selection.is_uniform:
            shape = (len(rows), len(parts), *parts[0].shape[1:])
            values = buffers.take(shape, parts[0].dtype)
            for number, part in enumerate(parts):
                as_integers(values)[:, number] = as_integers(part)
        else:
            values = dict(zip(self.names, parts, strict=True))
        if not self.with_rows:
            return values
        return values, torch.from_numpy(self._selection.row_ids(rows))

    # Its place.

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last batch handed out: small, plain, fit for JSON.

        Raises
        ------
        ArgumentError
            If workers of a DataLoader went through it since, who alone know the place.
        """
        if self._is_in_workers.value and torch.utils.data.get_worker_info() is None:
            raise ArgumentError(
                "state_dict(): workers of a DataLoader went through this loader, and the place moved in them only; "
                'take the state before the pass and count its batches, state | {"batch": n}, or use num_workers=0. '
                "Setting loader.epoch says where the next pass begins"
            )
        return {
            "version": _STATE_VERSION,
            "first_epoch": self._first_epoch,
            "epoch": self._epoch,
            "batch": self._batch,
            "loader": self._identity(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a place: the next iteration yields exactly the batches that were still to come.

        Raises
        ------
        ArgumentError
            If the state is not that of a loader like this one; the message names what differs.
        """
        if not isinstance(state, Mapping) or not isinstance(state.get("loader", {}), Mapping):
            raise ArgumentError(f"state: expected what state_dict() returned, got {state!r}")
        if state.get("version") != _STATE_VERSION:
            raise ArgumentError(f"state: expected version {_STATE_VERSION}, got {state.get('version')!r}")
        mine, theirs = self._identity(), dict(state.get("loader", {}))
        differing = [key for key in mine if mine[key] != theirs.get(key)]
        if differing:
            what = "; ".join(_difference(key, mine, theirs) for key in differing)
            raise ArgumentError(f"state: it belongs to another loader ({what})")
        place = [state.get(key) for key in ("first_epoch", "epoch", "batch")]
        if not all(type(number) is int and number >= 0 for number in place):
            raise ArgumentError(f"state: expected first_epoch, epoch and batch to be counts, got {place}")
        first, epoch, batch = (int(number) for number in place if number is not None)
        if epoch < first or batch > self.n_batches:
            raise ArgumentError(
                f"state: expected epoch >= {first} and batch <= {self.n_batches}, got {epoch} and {batch}"
            )
        self._go_to(first, epoch, batch)
        self._is_resumed = True

    def _identity(self) -> dict[str, Any]:
        """Return what the order of batches depends on."""
        is_block = self._order.kind == "block"
        if self._hash is None:
            self._hash = self._selection.hash(blocks=is_block)
        return {
            "sites": self.names,
            "n_rows": self._order.n_rows,
            "rows": self._hash,
            "batch_size": self.batch_size,
            "drop_last": self.drop_last,
            "shuffle": self._order.kind,
            "seed": self._order.seed,
            "pool_rows": self._order.pool_rows if is_block else None,
            "shard": list(self._order.shard),
        }

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if (
            get_spawning_popen() is None
        ):  # shared memory goes to processes that are being started, and nowhere else
            del state["_is_in_workers"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"_is_in_workers": _shared_flag(), **state})

    def __repr__(self) -> str:
        return (
            f"Loader({', '.join(self.names)}: {self._order.size} rows in {self.n_batches} batches "
            f"of {self.batch_size}, shuffle={self.shuffle!r}, epoch {self._epoch})"
        )


def _shared_flag() -> Any:
    """Return a flag that worker processes, forked or spawned, share with this one."""
    return RawValue(ctypes.c_bool, False)


def _difference(key: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    here, there = mine[key], theirs.get(key)
    if key == "n_rows" and isinstance(there, int):
        change = "grown" if here > there else "shrunk"
        return (
            f"n_rows: the rows have {change} from {there} to {here}; if the dataset was appended to, choose the rows "
            "of before with rows="
        )
    if key == "rows":
        return "rows: they are not the same ones"
    return f"{key}: here {here!r}, there {there!r}"


def _kind(shuffle: bool | str, selection: Selection) -> Shuffle:
    if shuffle is True:
        n_rows = selection.n_rows
        is_small = n_rows * selection.row_bytes <= FULL_SHUFFLE_BYTES and n_rows <= FULL_SHUFFLE_ROWS
        return "full" if is_small and all(site.codec == "none" for site in selection.sites) else "block"
    kinds: dict[bool | str, Shuffle] = {False: "none", "full": "full", "block": "block"}
    if not isinstance(shuffle, (bool, str)) or shuffle not in kinds:
        raise ArgumentError(f"shuffle: expected True, False, 'full' or 'block', got {shuffle!r}")
    return kinds[shuffle]


def _selected(part: torch.Tensor, at: torch.Tensor, buffers: Buffers) -> torch.Tensor:
    out = buffers.take((len(at), *part.shape[1:]), part.dtype)
    torch.index_select(as_integers(part), 0, at, out=as_integers(out))
    return out
