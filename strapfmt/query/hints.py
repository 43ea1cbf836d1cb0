"""DuckDB's messages turned into ours: which name was meant, and how it has to be written."""

import re
from collections.abc import Iterator

import duckdb

from strapfmt.errors import QueryError, near_misses
from strapfmt.query.relations import Source, quoted

__all__ = ["explained"]

_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", re.DOTALL)
_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[\w\[\]-]+)+")
_MISSING = re.compile(r"Table with name (.+?) does not exist")
_GUESS = re.compile(r"\nDid you mean \"[^\n]*\"\?")


def explained(error: duckdb.Error, query: str, source: Source) -> QueryError:
    """Return the error to raise for one of DuckDB's, with the name that was probably meant."""
    message = _GUESS.sub("", str(error)) if isinstance(error, duckdb.CatalogException) else str(error)
    hints = dict.fromkeys(_hints(error, query, source))
    return QueryError("\n".join([message.strip(), *hints]))


def _hints(error: duckdb.Error, query: str, source: Source) -> list[str]:
    names = list(source.names())
    hints: list[str] = []
    if isinstance(error, (duckdb.ParserException, duckdb.CatalogException)):
        for written in _DOTTED.findall(_QUOTED.sub(" ", query)):
            hints.extend(_unquoted(written, names))
    missing = _MISSING.search(str(error))
    if missing and not hints:
        hints.append(_unknown(missing[1].strip('"'), names))
    if isinstance(error, duckdb.BinderException) and '"row"' in str(error):
        own = [name for name, site in source.sites.items() if site.spec.row_space == "own" and name in query]
        hints.extend(_own_rows(quoted(name)) for name in own[:1])
    return hints


def _unquoted(written: str, names: list[str]) -> Iterator[str]:
    for name in sorted(names, key=len, reverse=True):
        if "." in name and f"{written}.".lower().startswith(f"{name}.".lower()):
            yield f"a site's name needs double quotes: {quoted(name)}{written[len(name) :]}"
            return
    near = [name for name in near_misses(written, names) if "." in name]
    if near:
        yield f"no site {written!r}; did you mean {' or '.join(map(quoted, near))} (in double quotes)?"


def _unknown(written: str, names: list[str]) -> str:
    near = near_misses(written, names)
    if near:
        return f"no table or site {written!r}; did you mean {' or '.join(map(quoted, near))}?"
    return f"no table or site {written!r}; SHOW TABLES lists every name"


def _own_rows(name: str) -> str:
    return (
        f"{name} numbers its rows itself and has own_row, token_row and call instead of row; "
        f"join it with ON tokens.row = {name}.token_row"
    )
