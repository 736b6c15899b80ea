"""DuckDB as the finisher: no files, no network, no extensions, no settings; Arrow in, Arrow out.

Assumes: the SQL comes from our own syntax tree; every query has its own cursor, so that names never meet.
"""

from __future__ import annotations

import difflib
import math
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import pyarrow as pa

from conjoin.pipeline.errors import ConjoinError, QueryError
from conjoin.pipeline.query.functions import FUNCTIONS
from conjoin.pipeline.query.pairs import KEY, ROW, Joined
from conjoin.pipeline.query.parse import is_allowed
from conjoin.pipeline.query.relations import nearest_name
from conjoin.pipeline.query.scalar import Function

if TYPE_CHECKING:
    import duckdb

_CONFIG = {
    "enable_external_access": "false",
    "lock_configuration": "true",
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
}
# Up to so many rows one thread answers sooner than several, which have to wake each other: 20 rows of 256 dimensions
# took 2.9 instead of 5.3 ms where other programs used the cores as well, 2.2 instead of 2.4 alone.
_FEW_ROWS = 2_000


class Engine:
    """In-memory DuckDB, opened on first use: one for few rows, one for many."""

    def __init__(self) -> None:
        self._connections: dict[bool, duckdb.DuckDBPyConnection] = {}
        self._lock = threading.Lock()
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="duckdb")

    def check(
        self,
        sql: str,
        parameters: Mapping[str, object],
        schemas: Mapping[str, pa.Schema],
        functions: Sequence[Function] = (),
    ) -> None:
        """Bind the query against empty tables. Raises QueryError for unknown columns, functions and wrong types."""
        empty = {name: schema.empty_table() for name, schema in schemas.items()}
        self._run(sql, parameters, empty, functions, fetch=False)

    def run(
        self,
        sql: str,
        parameters: Mapping[str, object],
        sources: Mapping[str, object],
        functions: Sequence[Function] = (),
    ) -> pa.Table:
        """The answer. sources: Arrow tables or scanners by the name the SQL calls them."""
        return self._run(sql, parameters, sources, functions, fetch=True)

    def _run(
        self,
        sql: str,
        parameters: Mapping[str, object],
        sources: Mapping[str, object],
        functions: Sequence[Function],
        *,
        fetch: bool,
    ) -> pa.Table | None:
        import duckdb

        cursor = self._cursor(few=_count(sources) <= _FEW_ROWS)
        made, failed = list[str](), list[ConjoinError]()
        try:
            for function in functions:
                _create(cursor, function, failed)
                made.append(function.name)
            for name, source in sources.items():
                _register(cursor, name, source)
            relation = cursor.sql(sql, params=dict(parameters) or None)
            return _fetched(cursor, relation, self._waiting) if fetch else None
        except duckdb.Error as error:
            if failed:
                raise failed[0] from None
            raise _explain(error, _columns(sources)) from None
        finally:
            for name in made:
                cursor.remove_function(name)
            cursor.close()

    def _cursor(self, *, few: bool) -> duckdb.DuckDBPyConnection:
        import duckdb

        with self._lock:
            if few not in self._connections:
                config = {**_CONFIG, "threads": "1"} if few else _CONFIG
                self._connections[few] = duckdb.connect(":memory:", config=config)
            return self._connections[few].cursor()


def _count(sources: Mapping[str, object]) -> float:
    """Rows; infinite for what is read while DuckDB runs."""
    return sum(source.num_rows if isinstance(source, pa.Table) else math.inf for source in sources.values())


def _fetched(
    cursor: duckdb.DuckDBPyConnection, relation: duckdb.DuckDBPyRelation, waiting: ThreadPoolExecutor
) -> pa.Table:
    """The whole answer. DuckDB hears no signal while it works: another thread waits for it, so that Ctrl-C ends it.

    Ctrl-C reaches the main thread alone, which waits for one answer at a time.
    """
    if threading.current_thread() is not threading.main_thread():
        return relation.to_arrow_table()
    answer = waiting.submit(relation.to_arrow_table)
    try:
        return answer.result()
    except KeyboardInterrupt:
        cursor.interrupt()
        wait([answer])
        raise


def function_names() -> list[str]:
    """DuckDB's functions whose names are words and that a query may call, for completion."""
    import duckdb

    with duckdb.connect(":memory:", config=_CONFIG) as connection:
        kinds = "function_type IN ('scalar', 'aggregate', 'macro')"
        sql = f"SELECT DISTINCT function_name FROM duckdb_functions() WHERE {kinds} ORDER BY 1"  # noqa: S608
        rows = connection.sql(sql).fetchall()
    return [name for (name,) in rows if re.fullmatch(r"[a-z][a-z0-9_]+", name) and is_allowed(name)]


def _register(cursor: duckdb.DuckDBPyConnection, name: str, source: object) -> None:
    """Rows under a name; those of neighbours as a view, so that a row near to many vectors is held once."""
    if not isinstance(source, Joined):
        cursor.register(name, source)
        return
    cursor.register(f"{name}_pairs", source.pairs)
    cursor.register(f"{name}_rows", source.rows)
    outputs = f'r.* EXCLUDE ("{ROW}"), p."{KEY}"'
    of_rows = f'SELECT {outputs} FROM "{name}_pairs" p JOIN "{name}_rows" r USING ("{ROW}")'  # noqa: S608  # our names
    cursor.execute(f'CREATE TEMP VIEW "{name}" AS {of_rows}')


def _create(cursor: duckdb.DuckDBPyConnection, function: Function, failed: list[ConjoinError]) -> None:
    """failed: takes what the function raises, of which DuckDB keeps the words only."""
    from duckdb.func import ARROW, SPECIAL  # SPECIAL: nulls are passed on, not answered by null

    def body(*columns: pa.ChunkedArray) -> pa.Array:
        try:
            return function.body(*columns)
        except ConjoinError as error:
            failed.append(error)
            raise

    takes = list(function.takes)
    cursor.create_function(function.name, body, takes, function.result, type=ARROW, null_handling=SPECIAL)


def _columns(sources: Mapping[str, object]) -> Iterable[str]:
    return [name for source in sources.values() if isinstance(source, pa.Table) for name in source.column_names]


def _explain(error: Exception, columns: Iterable[str]) -> QueryError:
    """DuckDB's message without its picture of the rewritten query, which is not what the user wrote."""
    text = str(error).split("\n\nLINE ")[0].strip()
    first, _, rest = text.partition("\n")
    what = re.sub(r"^[A-Z][\w -]* Error: ", "", first).rstrip("!.")
    if unknown := _NO_COLUMN.search(what):
        name = unknown[1] or unknown[3]
        owner = f"{unknown[2]} has" if unknown[2] else "there is"
        return QueryError(f"{owner} no column {name!r}{nearest_name(name, columns)}")
    bindings = re.search(r'Candidate bindings: "([^"]+)"', rest)
    tables = re.search(r'Candidate tables: "([^"]+)"', rest)
    meant = re.search(r'Did you mean "([^"]+)"', rest)
    if unknown := _NO_FUNCTION.search(what):
        ours = difflib.get_close_matches(unknown[1].lower(), FUNCTIONS, 1, 0.7)
        near = repr(ours[0]) if ours else repr(meant[1]) if meant else ""
        return QueryError(f"there is no function {unknown[1]}()" + (f"; did you mean {near}?" if near else ""))
    candidate = bindings or tables or meant
    return QueryError(what, next=f"Did you mean {candidate[1]!r}?" if candidate else "")


_NO_COLUMN = re.compile(
    r'Referenced column "([^"]+)" (?:was )?not found|'
    r'(?:Values list|Table) "([^"]+)" does not have a column named "([^"]+)"'
)
_NO_FUNCTION = re.compile(r"Function with name \"?(\w+)\"? does not exist")
