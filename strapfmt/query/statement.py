"""What one SQL text asks for, read from DuckDB's own syntax tree before anything is registered or run.

DuckDB's settings close the file system, but some table functions act at once or take raw pointers, so only listed ones
pass; and knowing the relations a query names is what keeps a query over one site from opening all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from strapfmt.errors import ArgumentError, QueryError

if TYPE_CHECKING:
    import duckdb

__all__ = ["NAMES_TABLE", "TABLE_FUNCTIONS", "Statement", "check_condition", "quoted", "read_statement"]

NAMES_TABLE = "__strap_names"  # what SHOW TABLES reads

TABLE_FUNCTIONS = frozenset(
    {
        "duckdb_functions",
        "duckdb_keywords",
        "duckdb_types",
        "generate_series",
        "json_each",
        "json_tree",
        "range",
        "repeat",
        "repeat_row",
        "unnest",
    }
)

_QUERY_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
_EXPLAIN = re.compile(r"explain\b(?:\s|/\*.*?\*/|--[^\n]*\n)*(analyze\b)?(.*)", re.IGNORECASE | re.DOTALL)
_SHOW_TABLES = frozenset({'"tables"', "__show_tables_expanded"})
_ONE_SELECT = (
    "expected one SELECT (or FROM, WITH, VALUES, DESCRIBE, SUMMARIZE, SHOW TABLES, or EXPLAIN of one)"
)

Node = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """One checked statement.

    Attributes
    ----------
    text : str
        What to run.
    relations : tuple of tuple of str
        Tables and views it names, each as written: `("tokens",)`, `("main", "tokens")`. Names of its own common
        table expressions are among them.
    columns : frozenset of str
        Every column it names, in lower case.
    names_all_columns : bool
        `*`, a natural join, a pivot, a whole row or a column by number: columns it does not name may matter too.
    """

    text: str
    relations: tuple[tuple[str, ...], ...]
    columns: frozenset[str]
    names_all_columns: bool

    def may_read(self, column: str) -> bool:
        """Whether this column of a relation can take part in the result."""
        return self.names_all_columns or column in self.columns


def read_statement(connection: duckdb.DuckDBPyConnection, query: str) -> Statement:
    """Parse and check `query` without binding or running it.

    Raises
    ------
    QueryError
        If it is not exactly one statement that only reads, or calls a table function outside `TABLE_FUNCTIONS`.
    duckdb.Error
        If DuckDB cannot parse it.
    """
    import duckdb

    statements = connection.extract_statements(query)
    if len(statements) != 1:
        raise QueryError(f"{_ONE_SELECT}; found {len(statements)} statements")
    text, kind = statements[0].query, statements[0].type
    if kind == duckdb.StatementType.MULTI:
        raise QueryError(
            "PIVOT without values runs as several statements; write PIVOT ... ON column IN (...)"
        )
    explain = _EXPLAIN.fullmatch(text) if kind == duckdb.StatementType.EXPLAIN else None
    select = explain[2] if explain else text
    if explain is None and kind != duckdb.StatementType.SELECT:
        raise QueryError(f"{_ONE_SELECT}; found {kind.name}: a query only reads")
    nodes = list(_nodes(_syntax_tree(connection, select)))
    if any(node.get("show_type") == "SHOW_SPECIAL" for node in nodes):
        select = _names_instead_of(select, nodes)
        nodes = list(_nodes(_syntax_tree(connection, select)))
    for node in nodes:
        _check(node)
    # What runs is what was checked: the words before it are written anew.
    before = f"EXPLAIN {explain[1] or ''} " if explain else ""
    return _describe(before + select, nodes)


def quoted(name: str) -> str:
    """Return `name` as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def check_condition(condition: str) -> None:
    """Check that a text is one SQL expression, so that brackets around it hold all of it.

    Raises
    ------
    ArgumentError
        If it is no text, or empty.
    QueryError
        If it is no expression, or more than one.
    """
    import duckdb

    if not isinstance(condition, str) or not condition.strip():
        raise ArgumentError(f"where: expected an SQL condition, got {condition!r}")
    # What parses bare and in brackets neither closes a bracket that it did not open nor goes on with another clause.
    with duckdb.connect(":memory:") as connection:
        for query in (f"SELECT 1 WHERE\n{condition}\n", f"SELECT 1 WHERE (\n{condition}\n)"):
            try:
                statements = connection.extract_statements(query)
            except duckdb.Error as error:
                why = str(error).split("\n")[0]
                raise QueryError(f"where: expected one SQL condition, got {condition!r}: {why}") from None
            if len(statements) != 1:
                raise QueryError(f"where: expected one SQL condition, got {condition!r}")


def _syntax_tree(connection: duckdb.DuckDBPyConnection, select: str) -> Node:
    [(text,)] = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [select]).fetchall()
    try:
        tree: Node = json.loads(text)
    except RecursionError:
        raise QueryError("the query is nested too deeply; split it with WITH") from None
    if tree.get("error") or len(tree.get("statements", [])) != 1:
        raise QueryError(f"{_ONE_SELECT}; DuckDB says: {tree.get('error_message', 'nothing')}")
    return tree


def _names_instead_of(select: str, nodes: list[Node]) -> str:
    """Return what SHOW TABLES stands for here: all names, where DuckDB would list those that are registered."""
    shown = {node.get("table_name") for node in nodes if node.get("show_type") == "SHOW_SPECIAL"}
    if not shown <= _SHOW_TABLES or not re.match(r"\s*(show|describe)\b", select, re.IGNORECASE):
        raise QueryError(
            "the only SHOW is SHOW TABLES, as a statement of its own; sites are also rows of `sites`"
        )
    return f"SELECT * FROM {NAMES_TABLE}"


def _nodes(value: object) -> Iterator[Node]:
    """Yield every JSON object inside `value`, however deep."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _check(node: Node) -> None:
    kind, function = str(node.get("type")), str(node.get("function_name", ""))
    if kind.endswith("_NODE") and kind not in _QUERY_NODES:
        raise QueryError(f"{_ONE_SELECT}; found {kind.removesuffix('_NODE')} inside it: a query only reads")
    if kind == "TABLE_FUNCTION" and (name := _table_function(node)) not in TABLE_FUNCTIONS:
        raise QueryError(
            f"table function {name}() is not available: a query sees this dataset and nothing else "
            f"(available: {', '.join(sorted(TABLE_FUNCTIONS))}). To join other data, take this dataset out with "
            "to_arrow() and use your own DuckDB connection"
        )
    if function.lower() == "current_setting":
        raise QueryError(f"function {function}() is not available: a query sees this dataset and no settings")
    if node.get("show_type") == "SHOW" and node.get("query") is None:
        name = str(node.get("table_name"))
        raise QueryError(f"the only SHOW is SHOW TABLES; DESCRIBE {quoted(name)} lists the columns of one")
    if function.startswith("__"):
        raise QueryError(f"function {function}() is internal to DuckDB or strapfmt and not available")


def _table_function(node: Node) -> str:
    function = node.get("function") or {}
    return str(function.get("function_name", "")).lower()


def _describe(text: str, nodes: list[Node]) -> Statement:
    references = [
        tuple(map(str.lower, node["column_names"])) for node in nodes if node.get("class") == "COLUMN_REF"
    ]
    tables = [node for node in nodes if node.get("type") == "BASE_TABLE"]
    rows = {str(name).lower() for node in tables for name in (node.get("alias"), _path(node)[-1])}
    return Statement(
        text=text,
        relations=tuple(dict.fromkeys(map(_path, tables))),
        columns=frozenset(name for reference in references for name in reference)
        | {str(name).lower() for node in nodes for name in node.get("using_columns") or ()},
        names_all_columns=any(len(reference) == 1 and reference[0] in rows for reference in references)
        or any(map(_names_all_columns, nodes)),
    )


def _names_all_columns(node: Node) -> bool:
    return (
        node.get("type") in ("STAR", "PIVOT")  # what a sample calls `type` is no text
        or node.get("class") == "POSITIONAL_REFERENCE"
        or node.get("ref_type") == "NATURAL"
        or bool(node.get("column_name_alias"))
    )


def _path(node: Node) -> tuple[str, ...]:
    path = (node.get("catalog_name"), node.get("schema_name"), node.get("table_name"))
    return tuple(str(part) for part in path if part)
