"""DuckDB's messages turned into ours: which name was meant, and what to do where its own advice cannot be followed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from strapfmt import spec
from strapfmt.errors import QueryError, near_misses
from strapfmt.query.relations import Source
from strapfmt.query.statement import quoted

if TYPE_CHECKING:
    import duckdb

__all__ = ["explained"]

_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", re.DOTALL)
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[\w\[\]-]+)+")
_MISSING = re.compile(r"Table with name (.+?) does not exist")
_AMBIGUOUS = re.compile(r"Ambiguous reference to column name (\"[^\n]+\") \(use: '([^\n]+)'\)")
_ARRAY_OF_LIST = re.compile(r"No function matches [^\n]*'array_(\w+)\([^\n]*\[\]")
_GUESS = re.compile(r"\nDid you mean \"[^\n]*\"\?")
#: A query cannot change settings, so a sentence that advises to is left out.
_SET = re.compile(r"[^.\n]*\bSET \w+ ?(?:=|TO\b)[^\n]*")
_NEED_ARRAYS = ("cross_product",)


def explained(error: duckdb.Error, query: str, source: Source) -> QueryError:
    """Return the error to raise for one of DuckDB's, with the name that was probably meant."""
    hints = dict.fromkeys(_hints(error, query, source))
    return QueryError("\n".join([_message(error), *hints]))


def _message(error: duckdb.Error) -> str:
    import duckdb

    message = str(error)
    if isinstance(error, duckdb.OutOfMemoryException):
        return (
            f"{message.splitlines()[0]}\nname fewer columns or rows, or allow more with memory_limit= "
            "(nothing is written to disk)"
        )
    if isinstance(error, duckdb.CatalogException):
        message = _GUESS.sub("", message)
    return _SET.sub("", message).strip()


def _hints(error: duckdb.Error, query: str, source: Source) -> list[str]:
    import duckdb

    names, message = list(source.names()), str(error)
    hints: list[str] = []
    if isinstance(error, (duckdb.ParserException, duckdb.CatalogException)):
        for written in _DOTTED.findall(_QUOTED.sub(" ", query)):
            hints.extend(_unquoted(written, names))
    missing = _MISSING.search(message)
    if missing and not hints:
        hints.append(_unknown(missing[1].strip('"'), names))
    if isinstance(error, duckdb.BinderException):
        hints.extend(_bound(message, query, source))
    return hints


def _bound(message: str, query: str, source: Source) -> Iterator[str]:
    """Yield what is known of names that exist and do not fit where they stand."""
    ambiguous, on_list = _AMBIGUOUS.search(message), _ARRAY_OF_LIST.search(message)
    if ambiguous:
        ways = " or ".join(ambiguous[2].split("' or '"))
        yield f"{ambiguous[1]} is a column of several; write {ways}"
    elif '"row"' in message:
        own = [name for name, site in source.sites.items() if site.spec.row_space == "own" and name in query]
        yield from (_own_rows(quoted(source.name_of(name))) for name in own[:1])
    if on_list and on_list[1] not in _NEED_ARRAYS:
        yield (
            f"rows of more than {spec.MAX_DUCKDB_ARRAY} values, and ragged ones, are lists: "
            f"use list_{on_list[1]}()"
        )


def _unquoted(written: str, names: list[str]) -> Iterator[str]:
    for name in sorted(names, key=len, reverse=True):
        if "." in name and f"{written}.".lower().startswith(f"{name}.".lower()):
            yield f"a site's name needs double quotes: {quoted(name)}{written[len(name) :]}"
            return
    near = [name for name in near_misses(written, names) if "." in name]
    if near:
        yield f"no site {written!r}; did you mean {' or '.join(map(quoted, near))} (in double quotes)?"


def _unknown(written: str, names: list[str]) -> str:
    if written in names:
        return f"there is {quoted(written)}: write it alone, with no catalog or schema in front"
    near = near_misses(written, names)
    if near:
        return f"no table or site {written!r}; did you mean {' or '.join(map(quoted, near))}?"
    return f"no table or site {written!r}; SHOW TABLES lists every name"


def _own_rows(name: str) -> str:
    return (
        f"{name} numbers its rows itself and has own_row, token_row and call instead of row; "
        f"join it with ON tokens.row = {name}.token_row"
    )
