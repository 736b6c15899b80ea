"""DuckDB as the finisher: no files, no network, no extensions, no settings; Arrow in, Arrow out.

Assumes: the SQL comes from our own syntax tree; every query has its own cursor, so that names never meet.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pyarrow as pa

from conjoin.pipeline.errors import QueryError

if TYPE_CHECKING:
    import duckdb

_CONFIG = {
    "enable_external_access": "false",
    "lock_configuration": "true",
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}


class Engine:
    """One in-memory DuckDB, opened on first use."""

    def __init__(self) -> None:
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._lock = threading.Lock()

    def check(self, sql: str, parameters: Mapping[str, object], schemas: Mapping[str, pa.Schema]) -> None:
        """Bind the query against empty tables. Raises QueryError for unknown columns, functions and wrong types."""
        empty = {name: schema.empty_table() for name, schema in schemas.items()}
        self._run(sql, parameters, empty, fetch=False)

    def run(self, sql: str, parameters: Mapping[str, object], sources: Mapping[str, object]) -> pa.Table:
        """The answer. sources: Arrow tables or scanners by the name the SQL calls them."""
        return self._run(sql, parameters, sources, fetch=True)

    def _run(
        self, sql: str, parameters: Mapping[str, object], sources: Mapping[str, object], *, fetch: bool
    ) -> pa.Table | None:
        import duckdb

        cursor = self._cursor()
        try:
            for name, source in sources.items():
                cursor.register(name, source)
            relation = cursor.sql(sql, params=dict(parameters) or None)
            return relation.to_arrow_table() if fetch else None
        except duckdb.Error as error:
            raise _explain(error) from None
        finally:
            cursor.close()

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        import duckdb

        with self._lock:
            if self._connection is None:
                self._connection = duckdb.connect(":memory:", config=_CONFIG)
            return self._connection.cursor()


def _explain(error: Exception) -> QueryError:
    """DuckDB's message without its picture of the rewritten query, which is not what the user wrote."""
    text = str(error).split("\n\nLINE ")[0].strip()
    first, _, rest = text.partition("\n")
    what = re.sub(r"^[A-Z][\w -]* Error: ", "", first).rstrip("!.")
    bindings = re.search(r'Candidate bindings: "([^"]+)"', rest)
    tables = re.search(r'Candidate tables: "([^"]+)"', rest)
    meant = re.search(r'Did you mean "([^"]+)"', rest)
    near = bindings or tables or meant
    return QueryError(what, next=f"Did you mean {near[1]!r}?" if near else "")
