"""A dataset as a user holds it: everything the reader gives, with SQL and loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from strapfmt.arguments import as_names
from strapfmt.errors import ArgumentError, QueryError
from strapfmt.marks import marks_of, table_of_marks
from strapfmt.query import Result, Source, check_condition, quoted, run_query
from strapfmt.reader import Reader
from strapfmt.site import Site
from strapfmt.text import shown_path

if TYPE_CHECKING:
    import torch

    from strapfmt.loader import Loader
    from strapfmt.manifest import Manifest

__all__ = ["Dataset", "open"]

Verify = Literal["touch", "always"]
Integers = npt.NDArray[np.int64]


def open(path: str | Path, *, verify: Verify = "touch") -> Dataset:
    """Open a dataset for reading: its last commit, also while it is being written.

    Parameters
    ----------
    path : path
        The directory `NAME.strap`.
    verify : {"touch", "always"}
        "touch": `scan`, `to_arrow` and loaders compare the hash of each record batch when they first touch it; `take`,
        views and SQL check metadata only. "always": these compare hashes too.

    Raises
    ------
    DatasetNotFoundError, CorruptError, UnsupportedError
    """
    return Dataset(path, verify=verify)


class Dataset(Reader):
    """One committed state of a dataset; see `strapfmt.open`.

    Indexing by a site's name gives the site: `ds["blocks.3.resid_post"].take(rows)`. Pickling opens the same path
    anew.
    """

    def sql(
        self,
        query: str,
        params: Sequence[object] | Mapping[str, object] | None = None,
        *,
        timeout_s: float | None = None,
        memory_limit: str | None = None,
    ) -> Result:
        """Answer one SQL query (DuckDB's dialect) over the stored data.

        ======================  =======================================================================================
        tokens, sequences,      as stored; `ds.tokens.columns` and so on
        steps, row_events
        sites                   name, module_path, hook_point, dtype, shape, n_rows, row_space, codec, layout, bytes,
                                expected, written, dropped
        marks                   annotations of the run: rank, session, name, step, time_ns, attributes (JSON text)
        "blocks.3.resid_post"   one view per site, its name in double quotes: row, statistics, activation (ARRAY; a list
                                for ragged sites and beyond 100,000 values). A site that numbers its rows itself has
                                own_row, token_row and call instead of row. One that is called like a table here is
                                "site:NAME", with `site:` in front as often as no other site is called so
        stats, activations      all sites below one another: site, row, token_row, own_row, and statistics or the
                                activation as FLOAT[]
        ======================  =======================================================================================

        Only what the query names is opened, and tensors are decoded only where it names `activation`. It cannot reach
        files, the network, Python variables or settings.

        Parameters
        ----------
        query : str
            One SELECT (or FROM, WITH, VALUES, DESCRIBE, SUMMARIZE, SHOW TABLES, EXPLAIN).
        params : sequence or mapping, optional
            Values for `?` or `$name`; a one-dimensional array or tensor becomes an ARRAY.
        timeout_s : float, optional
            Interrupt after this many seconds.
        memory_limit : str, optional
            Such as "4GB"; by default 80 % of memory.

        Returns
        -------
        Result
            Rows in memory: `to_arrow()`, `to_pandas()`, `to_polars()`, `to_torch()`, `fetchall()`, iteration.

        Raises
        ------
        QueryError
            If the query was refused, failed or took too long.
        CorruptError
            If stored data turned out to be damaged.
        """
        self._check_open()
        return run_query(self._source, query, params, timeout_s=timeout_s, memory_limit=memory_limit)

    def loader(
        self,
        sites: str | Sequence[str],
        *,
        batch_size: int,
        shuffle: bool | Literal["full", "block"] = False,
        seed: int = 0,
        where: str | None = None,
        rows: npt.ArrayLike | None = None,
        own_rows: npt.ArrayLike | None = None,
        drop_last: bool = False,
        dtype: torch.dtype | None = None,
        with_rows: bool = False,
        shard: tuple[int, int] = (0, 1),
        epochs: int | None = 1,
        pool_rows: int | None = None,
    ) -> Loader:
        """Return an iterable of training batches, `[batch, *shape]` tensors in the site's own dtype.

        It resumes exactly: `state_dict()` is small and JSON-ready. Record batches are hashed when first touched.

        In a `DataLoader` with worker processes the place moves in these only: every pass begins where the loader here
        stands, so set `loader.epoch` before each, and `state_dict()` raises after one: take the state before, and count
        the batches, `state | {"batch": n}`.

        Parameters
        ----------
        sites : str or sequence of str
            Several sites give `[batch, n_sites, *shape]`, or a dict of tensors where shapes or dtypes differ; their
            rows are those that every site holds.
        batch_size : int
        shuffle : bool or {"full", "block"}
            True: a permutation of all rows ("full") up to 4 GiB, else "block": stored record batches in random order,
            and rows permuted in pools of `pool_rows`. Every row once per epoch, each epoch in another order.
        seed : int
        where : str, optional
            An SQL condition over the columns of `tokens` and of the sites: `"not is_special and l2_norm < 1000"`.
            Statistics leave out values that are not finite, so a row of NaN alone has an l2_norm of 0: add
            `and n_nonfinite = 0` where that matters. A column that several have is written
            `"blocks.3.resid_post".l2_norm`; a site that numbers its rows itself has own_row and token_row, no row.
        rows : int64 array, optional
            Only these row ids of tokens (and, with `where`, only those of them that it keeps), each once. Their order
            means nothing: without shuffling rows come as they are stored.
        own_rows : int64 array, optional
            The same for a site that numbers its rows itself: its own numbers, `own_row` in SQL.
        drop_last : bool
            Full batches only, equally many in every shard.
        dtype : torch.dtype, optional
            Convert every batch.
        with_rows : bool
            Yield `(values, rows)`.
        shard : (int, int)
            `(rank, world size)`.
        epochs : int or None
            Epochs in one iteration; None: without end.
        pool_rows : int, optional
            By default 256 MiB of activations.

        Raises
        ------
        SiteNotFoundError, RowNotFoundError, QueryError
        ArgumentError
            If a site is ragged, or an option is out of range.
        """
        from strapfmt.loader import Loader

        names = as_names("sites", sites)
        chosen = self._chosen(names, rows, own_rows)
        if where is not None:
            kept = self._rows_where(self._source, [self[name] for name in names], where)
            if not len(kept):
                raise ArgumentError(f"where: no row of {', '.join(names)} has {where!r}")
            if chosen is not None and not np.isin(chosen, kept).any():
                raise ArgumentError(f"where: none of the {len(chosen)} rows asked for has {where!r}")
            chosen = kept if chosen is None else chosen[np.isin(chosen, kept)]
        return Loader(
            self,
            names,
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            rows=chosen,
            drop_last=drop_last,
            dtype=dtype,
            with_rows=with_rows,
            shard=shard,
            epochs=epochs,
            pool_rows=pool_rows,
        )

    def __repr__(self) -> str:
        if self._is_closed:
            return f"Dataset {shown_path(self.path)}: closed"
        report = self.report
        unfinished = [str(rank.rank) for rank in report.ranks if not rank.is_clean]
        lines = [
            f"Dataset {shown_path(self.path)}: {report.n_tokens:,} tokens of {report.n_sequences:,} sequences "
            f"in {report.n_steps:,} steps"
        ]
        if unfinished:
            lines.append(f"not closed (still written, or interrupted): rank {', '.join(unfinished)}")
        return "\n".join([*lines, repr(self.sites)])

    # Inside.

    def _load(self, manifests: dict[int, Manifest], *, is_whole: bool) -> None:
        super()._load(manifests, is_whole=is_whole)
        tables = {name: view.to_arrow for name, view in self.tables.items()}
        made = {"sites": self._site_listing, "marks": lambda: table_of_marks(marks_of(manifests))}
        self._source = Source(tables={**tables, **made}, sites=self.sites)
        for site in self._sites.values():
            # A site keeps the state that it is of, also after `refresh`.
            site.resolve_where = partial(self._rows_of_site_where, self._source)

    def close(self) -> None:
        """Let go of all maps; tensors and tables that were handed out keep theirs alive."""
        super().close()
        self._source.forget()

    def _chosen(
        self, names: Sequence[str], rows: npt.ArrayLike | None, own_rows: npt.ArrayLike | None
    ) -> Integers | None:
        if rows is None and own_rows is None:
            return None
        parts = [self[name].checked_rows(rows, own_rows, "loader") for name in names]
        if parts and not len(parts[0]):
            raise ArgumentError("rows: expected at least one, got none")
        return parts[0] if parts else None

    def _site_listing(self) -> pa.Table:
        accounts = {account.name: account for account in self.report.sites}
        rows = [
            {
                "name": site.name,
                "module_path": site.spec.module_path,
                "hook_point": site.spec.hook_point,
                "dtype": site.dtype,
                "shape": site.shape,
                "n_rows": site.n_rows,
                "row_space": site.row_space,
                "codec": site.codec,
                "layout": site.layout.kind,
                "bytes": site.n_bytes,
                "expected": accounts[site.name].expected,
                "written": accounts[site.name].written,
                "dropped": accounts[site.name].dropped,
            }
            for site in self.sites.values()
        ]
        return pa.Table.from_pylist(rows, schema=_SITES_SCHEMA)

    def _rows_of_site_where(self, source: Source, site: Site, where: str) -> Integers:
        return self._rows_where(source, [site], where)

    def _rows_where(self, source: Source, sites: Sequence[Site], where: str) -> Integers:
        """Return the row ids that all of `sites` hold and a condition over them and their tokens keeps, ascending."""
        self._check_open()
        check_condition(where)
        first, *others = [quoted(source.name_of(site.name)) for site in sites]
        is_own = sites[0].row_space == "own"
        if is_own:
            row, tokens = (
                f"{first}.own_row",
                f"LEFT JOIN tokens ON tokens.row = {first}.token_row {_SECOND_ROW}",
            )
        else:
            row, tokens = "row", "LEFT JOIN tokens USING (row)"
        joined = "".join(f" JOIN {other} USING (row)" for other in others)
        query = f"SELECT {row} AS id FROM {first}{joined} {tokens} WHERE (\n{where}\n)"
        try:
            result = run_query(source, query)
        except QueryError as error:
            if is_own and 'ambiguous reference to column name "row"' in str(error).lower():
                raise QueryError(
                    f"where: site {sites[0].name!r} numbers its rows itself, so `row` alone could mean two things; "
                    "write own_row for the site's own numbers, token_row for those of its tokens"
                ) from None
            raise
        return np.sort(result.to_arrow()["id"].to_numpy())


#: No rows, and a column `row` besides that of tokens: DuckDB then refuses a `row` that does not say whose it is.
_SECOND_ROW = "LEFT JOIN (SELECT NULL::BIGINT AS row WHERE false) AS __strap_second ON true"
_SITES_SCHEMA = pa.schema(
    {
        "name": pa.utf8(),
        "module_path": pa.utf8(),
        "hook_point": pa.utf8(),
        "dtype": pa.utf8(),
        "shape": pa.list_(pa.int32()),
        "n_rows": pa.int64(),
        "row_space": pa.utf8(),
        "codec": pa.utf8(),
        "layout": pa.utf8(),
        "bytes": pa.int64(),
        "expected": pa.int64(),
        "written": pa.int64(),
        "dropped": pa.int64(),
    }
)
