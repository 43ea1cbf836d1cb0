"""One query: a fresh, closed-off DuckDB in memory, one statement, its result as Arrow, everything released."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from strapfmt import spec
from strapfmt.arguments import array_of_tensor, as_seconds
from strapfmt.errors import ArgumentError, QueryError, StrapfmtError
from strapfmt.query.decode import SQL_ELEMENTS
from strapfmt.query.hints import explained
from strapfmt.query.relations import Relations, Source
from strapfmt.query.result import Result
from strapfmt.query.statement import read_statement

if TYPE_CHECKING:
    import duckdb

__all__ = ["run_query"]

_CLOSED_OFF: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": False,
    "autoload_known_extensions": False,
    "autoinstall_known_extensions": False,
    "allow_community_extensions": False,
    "python_enable_replacements": False,
    "temp_directory": "",
    "lock_configuration": True,
}

Parameters = Sequence[object] | Mapping[str, object]


def run_query(
    source: Source,
    query: str,
    params: Parameters | None = None,
    *,
    timeout_s: float | None = None,
    memory_limit: str | None = None,
) -> Result:
    """Answer one SQL query over `source`.

    The query can read the source and nothing else: no files, no network, no Python variables, no settings.

    Parameters
    ----------
    source : Source
        The tables and sites it may name; only those it names are opened.
    query : str
        One SELECT in DuckDB's SQL (also FROM, WITH, VALUES, DESCRIBE, SUMMARIZE, SHOW TABLES, EXPLAIN).
    params : sequence or mapping, optional
        Values for `?` or `$name`. A one-dimensional NumPy array or tensor becomes an ARRAY of its element type, a
        bfloat16 or float16 one an ARRAY of FLOAT, one of more than 100,000 numbers a list.
    timeout_s : float, optional
        Interrupt after this many seconds. DuckDB stops at its next check, which a single huge value can delay.
    memory_limit : str, optional
        DuckDB's limit, such as "4GB"; the default is 80 % of memory. Nothing is spilled to disk.

    Raises
    ------
    QueryError
        If the query was refused, failed, or took too long.
    StrapfmtError
        If the data turned out to be damaged.
    """
    if not isinstance(query, str):
        raise ArgumentError(f"query: expected SQL text, got {type(query).__name__}")
    if any("\ud800" <= character <= "\udfff" for character in query):
        raise QueryError("the query holds half of a surrogate pair, which is no text")
    if memory_limit is not None and not isinstance(memory_limit, str):
        raise ArgumentError(f"memory_limit: expected text such as '4GB', got {memory_limit!r}")
    values, wait_s = _parameters(params), None if timeout_s is None else as_seconds("timeout_s", timeout_s)
    failures: list[StrapfmtError] = []
    # Inside functions, here and elsewhere: a worker process that has loaded it prints of leaks when it ends.
    import duckdb

    try:
        with closing(_connect(memory_limit)) as connection:
            statement = read_statement(connection, query)
            Relations(connection, source, statement, failures).register()
            return Result(_answer(connection, statement.text, values, wait_s))
    except duckdb.Error as error:
        if failures:
            raise failures[0] from None
        raise explained(error, query, source) from error.with_traceback(None)


def _connect(memory_limit: str | None) -> duckdb.DuckDBPyConnection:
    import duckdb

    limit = {} if memory_limit is None else {"memory_limit": memory_limit}
    return duckdb.connect(":memory:", config={**_CLOSED_OFF, **limit})


def _answer(
    connection: duckdb.DuckDBPyConnection, query: str, params: Parameters | None, timeout_s: float | None
) -> pa.Table:
    """Run a query in a thread of its own: one that runs inside DuckDB sees neither a deadline nor Ctrl-C."""
    wait_s = None if timeout_s is None else min(timeout_s, threading.TIMEOUT_MAX)
    with ThreadPoolExecutor(1, thread_name_prefix="strapfmt-sql") as pool:
        answer = pool.submit(lambda: connection.sql(query, params=params).to_arrow_table())
        try:
            wait([answer], wait_s)
        finally:
            is_late = not answer.done()
            while not answer.done():  # an interrupt before the query has begun is lost
                connection.interrupt()
                wait([answer], 0.05)
        if is_late and answer.exception() is not None:
            raise QueryError(f"the query was stopped after timeout_s={timeout_s}; narrow it or allow more")
        return answer.result()


def _parameters(params: Parameters | None) -> Parameters | None:
    if params is None:
        return None
    if isinstance(params, Mapping):
        return {name: _parameter(value) for name, value in params.items()}
    if isinstance(params, (str, bytes)) or not _is_iterable(params):
        raise ArgumentError(
            f"params: expected a list of values or a mapping of names to values, got {params!r}"
        )
    return [_parameter(value) for value in params]


def _is_iterable(params: object) -> bool:
    return isinstance(params, Iterable) and getattr(params, "ndim", 1) != 0


def _parameter(value: object) -> object:
    if hasattr(value, "detach"):  # a tensor; torch itself is not needed
        value = array_of_tensor("params", value)[()]  # one of no dimension becomes a number
    if isinstance(value, np.generic):
        return value.item()
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == np.float16:
        value = value.astype(np.float32)
    element = SQL_ELEMENTS.get(value.dtype.name)
    if value.ndim != 1 or element is None or not len(value):
        raise ArgumentError(
            "params: expected arrays of one dimension, at least one number; "
            f"got {value.dtype} of shape {value.shape}"
        )
    import duckdb

    size = len(value) if len(value) <= spec.MAX_DUCKDB_ARRAY else ""  # beyond, as sites are, a list
    return duckdb.Value(value.tolist(), duckdb.sqltype(f"{element}[{size}]"))
