"""The tables and views a query sees: what each is called, and how it is put before DuckDB without a copy.

====================  =============================================================================================
tokens, sequences,    as stored
steps, row_events
sites                 one row per site
marks                 one row per annotation of the run
a site's own name     row, statistics, [shape,] activation. A site that numbers its rows itself has `own_row`,
                      `token_row` and `call` instead of `row`: joining its numbers with those of tokens by
                      `USING (row)` is an error, never a wrong answer.
stats, activations    all sites below one another: site, row (null for a site with own rows), token_row, own_row
====================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from strapfmt import spec
from strapfmt.errors import QueryError, StrapfmtError
from strapfmt.query.decode import DECODED, array_type, as_registered, decoder
from strapfmt.query.statement import NAMES_TABLE, Statement, quoted
from strapfmt.schema import SiteSpec, site_schema

if TYPE_CHECKING:
    import duckdb

__all__ = ["Relations", "Source", "StoredSite"]

_OURS = "__strap_"  # begins the names of what is registered behind the views

_LONG = ("stats", "activations")
_STATISTICS = {name: pa.int32() if name == "n_nonfinite" else pa.float32() for name in spec.STATISTICS}
_STATS_SCHEMA = pa.schema(
    {
        "site": pa.run_end_encoded(pa.int64(), pa.utf8()),
        **dict.fromkeys(("row", "token_row", "own_row"), pa.int64()),
        **_STATISTICS,
    }
)
_NO_ACTIVATIONS = (
    "SELECT NULL::VARCHAR AS site, NULL::BIGINT AS row, NULL::BIGINT AS token_row, NULL::BIGINT AS own_row, "
    "NULL::FLOAT[] AS activation WHERE false"
)


class StoredSite(Protocol):
    """The part of a site that queries need."""

    @property
    def spec(self) -> SiteSpec:
        """What it holds."""

    def to_arrow(self, columns: Sequence[str] | None = None, *, verify: bool = True) -> pa.Table:
        """All rows, over the memory map where uncompressed."""

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """All rows, one record batch at a time."""


class Source:
    """What can be queried. Nothing is read until a query names it, and what was read serves the next query too.

    Keeping a site's record batches costs some kilobytes each, since they alias the map; of a compressed site only
    the columns beside the activation are kept.

    Parameters
    ----------
    tables : mapping of str to callable
        Each table's name and the function that loads it.
    sites : mapping of str to StoredSite
        Each site under its stored name.
    """

    def __init__(
        self, *, tables: Mapping[str, Callable[[], pa.Table]], sites: Mapping[str, StoredSite]
    ) -> None:
        self.tables, self.sites = dict(tables), dict(sites)
        self._names = _names_of(self.sites, {*self.tables, *_LONG})
        self._read: dict[tuple[str, bool], pa.Table] = {}

    def names(self) -> dict[str, str]:
        """Every name SQL can use, with its kind: "table" or "site"."""
        names = dict.fromkeys([*self.tables, *_LONG], "table")
        return names | dict.fromkeys(self._names.values(), "site")

    def name_of(self, site: str) -> str:
        """Return the name of a site in SQL.

        Its own; where a table is called so, with `site:` in front, as often as no other site is called so.
        """
        return self._names[site]

    def read(self, name: str, *, with_tensor: bool) -> pa.Table:
        """Return all rows of a site as DuckDB can take them, with the activation or without."""
        if (name, True) in self._read:
            return self._read[name, True]
        if (name, with_tensor) not in self._read:
            site = self.sites[name]
            columns = None if with_tensor else _small_columns(site.spec)
            self._read[name, with_tensor] = _registered(site.to_arrow(columns, verify=False), site.spec)
        return self._read[name, with_tensor]

    def forget(self) -> None:
        """Let go of everything it holds; nothing can be queried afterwards."""
        for held in (self.tables, self.sites, self._names, self._read):
            held.clear()


def _names_of(sites: Iterable[str], tables: set[str]) -> dict[str, str]:
    """Return the name in SQL of every site."""
    taken = tables | {site.lower() for site in sites}
    names = {}
    for site in sites:
        name = site
        if site.lower() in tables or site.lower().startswith(_OURS):
            while name.lower() in taken:
                name = f"site:{name}"
        names[site] = name
    return names


class Relations:
    """Registers with one connection what one statement names.

    Parameters
    ----------
    connection : duckdb.DuckDBPyConnection
        Fresh, in memory.
    source : Source
        Where the data is.
    statement : Statement
        Names relations, and says whether the tensors are needed.
    failures : list of StrapfmtError
        Receives what is raised while DuckDB reads a compressed site: DuckDB passes on the text only.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        source: Source,
        statement: Statement,
        failures: list[StrapfmtError],
    ) -> None:
        self._connection, self._source, self._statement = connection, source, statement
        self._failures = failures
        self._names = source.names()
        self._sites = {source.name_of(name): site for name, site in source.sites.items()}
        self._raw: dict[str, str] = {}
        self._functions: dict[tuple[object, ...], str] = {}

    def register(self) -> None:
        """Register every relation the statement names and this source has."""
        for path in self._statement.relations:
            self._check(path)
        found = [self._resolve(path[-1]) for path in self._statement.relations]
        names = dict.fromkeys(name for name in found if name is not None)
        for name in names:
            clash = next((other for other in names if other != name and other.lower() == name.lower()), None)
            if clash is not None:
                raise QueryError(
                    f"{quoted(name)} and {quoted(clash)} differ only in case, which SQL cannot tell apart"
                )
            self._register(name)

    def _check(self, path: tuple[str, ...]) -> None:
        """Refuse the one view of DuckDB's own that shows settings, unless it is a site that is called so."""
        if path[-1].lower() == "pg_settings" and (len(path) > 1 or self._resolve(path[-1]) is None):
            raise QueryError("pg_settings is not available: a query sees this dataset and no settings")

    def _resolve(self, name: str) -> str | None:
        if name in self._names or name == NAMES_TABLE:
            return name
        matches = [known for known in self._names if known.lower() == name.lower()]
        if len(matches) > 1:
            raise QueryError(f"{name!r} may be {' or '.join(map(quoted, matches))}; write it exactly")
        return matches[0] if matches else None

    def _register(self, name: str) -> None:
        if name == NAMES_TABLE:
            self._connection.register(
                name, pa.table({"name": [*self._names], "kind": [*self._names.values()]})
            )
        elif name in self._sites:
            columns = self._columns(self._sites[name].spec, self._raw_name(name))
            self._view(name, f"SELECT {', '.join(columns)} FROM {self._raw_name(name)}")
        elif name == "activations":
            self._view(name, " UNION ALL ".join(map(self._long_activations, self._sites)) or _NO_ACTIVATIONS)
        elif name == "stats":
            self._connection.register(name, _statistics(self._source))
        else:
            self._connection.register(name, self._source.tables[name]())

    def _view(self, name: str, select: str) -> None:
        self._connection.execute(f"CREATE VIEW {quoted(name)} AS {select}")

    def _columns(self, site: SiteSpec, raw: str) -> list[str]:
        ids = ["row"] if site.row_space == "tokens" else ["row AS own_row", "token_row", "call"]
        columns = [*ids, *site.statistics]
        if self._needs_tensor:
            columns += ["shape"] * site.is_ragged
            columns.append(f"{self._activation(site)} AS activation")
        return columns

    def _long_activations(self, name: str) -> str:
        site = self._sites[name].spec
        ids = "row, row AS token_row, NULL::BIGINT AS own_row"
        if site.row_space == "own":
            ids = "NULL::BIGINT AS row, token_row, row AS own_row"
        value = f"{self._function(site, as_list=True)}(activation)" if self._needs_tensor else "NULL::FLOAT[]"
        return f"SELECT {_text(site.name)} AS site, {ids}, {value} AS activation FROM {self._raw_name(name)}"

    @property
    def _needs_tensor(self) -> bool:
        return self._statement.may_read("activation") or self._statement.may_read("shape")

    def _activation(self, site: SiteSpec) -> str:
        if site.dtype in DECODED:
            return f"{self._function(site, as_list=False)}(activation)"
        return f"activation::{array_type(site, 'BOOLEAN')}" if site.dtype == "bool" else "activation"

    def _function(self, site: SiteSpec, *, as_list: bool) -> str:
        import duckdb
        from duckdb.func import PythonUDFType

        stored, returned = array_type(site), "FLOAT[]" if as_list else array_type(site, "FLOAT")
        key = (site.dtype, stored, returned)
        if key not in self._functions:
            name = f"{_OURS}decode_{len(self._functions)}"
            function = decoder(site, as_list=as_list)
            self._connection.create_function(
                name,
                function,
                [duckdb.sqltype(stored)],
                duckdb.sqltype(returned),
                type=PythonUDFType.ARROW,
                side_effects=False,
            )
            self._functions[key] = name
        return self._functions[key]

    def _raw_name(self, name: str) -> str:
        if name not in self._raw:
            self._raw[name] = f"{_OURS}{len(self._raw)}"
            self._connection.register(self._raw[name], self._stored(self._sites[name]))
        return self._raw[name]

    def _stored(self, site: StoredSite) -> object:
        if self._needs_tensor and site.spec.codec != "none":
            return _Stream(site, self._failures)
        return self._source.read(site.spec.name, with_tensor=self._needs_tensor)


class _Stream:
    """A compressed site: each scan of a query decompresses it batch by batch, in bounded memory."""

    def __init__(self, site: StoredSite, failures: list[StrapfmtError]) -> None:
        self._site, self._failures = site, failures
        self._schema = _registered(site_schema(site.spec).empty_table(), site.spec).schema

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        reader = pa.RecordBatchReader.from_batches(self._schema, self._batches())
        return reader.__arrow_c_stream__(requested_schema)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        try:
            for batch in self._site.scan():
                yield from _registered(pa.Table.from_batches([batch]), self._site.spec).to_batches()
        except StrapfmtError as error:
            self._failures.append(error)
            raise


def _small_columns(site: SiteSpec) -> list[str]:
    return [name for name in site_schema(site).names if name not in {"activation", "shape"}]


def _registered(table: pa.Table, site: SiteSpec) -> pa.Table:
    """Return the same columns without extension metadata, the activation as DuckDB can take it."""
    columns = {name: table[name] for name in table.column_names}
    if "activation" in columns:
        columns["activation"] = as_registered(columns["activation"], site)
    return pa.table(columns)


def _statistics(source: Source) -> pa.Table:
    """Return the statistics of all sites below one another; the site's name costs one run each."""
    tables = [
        _site_statistics(site.spec, source.read(name, with_tensor=False))
        for name, site in source.sites.items()
    ]
    return pa.concat_tables([table for table in tables if table.num_rows] or [_STATS_SCHEMA.empty_table()])


def _site_statistics(site: SiteSpec, stored: pa.Table) -> pa.Table:
    n, none = stored.num_rows, pa.nulls(stored.num_rows, pa.int64())
    if n == 0:
        return _STATS_SCHEMA.empty_table()
    is_own = site.row_space == "own"
    name = pa.RunEndEncodedArray.from_arrays(pa.array([n], pa.int64()), pa.array([site.name]))
    ids = [none, stored["token_row"], stored["row"]] if is_own else [stored["row"], stored["row"], none]
    values = [
        stored[column] if column in site.statistics else pa.nulls(n, kind)
        for column, kind in _STATISTICS.items()
    ]
    return pa.Table.from_arrays([name, *ids, *values], schema=_STATS_SCHEMA)


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
