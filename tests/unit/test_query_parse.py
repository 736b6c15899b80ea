"""What the parser lets through, what it refuses, and how it says so."""

from __future__ import annotations

import pytest

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.parse import parse, parse_condition


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        "select id from t limit 3;",
        "FROM t SELECT id",
        "FROM t",
        "TABLE t",
        "(SELECT 1)",
        "VALUES (1), (2)",
        "WITH a AS (SELECT 1 AS x) SELECT x FROM a",
        "SELECT 1 UNION ALL SELECT 2",
        "SELECT * FROM range(3)",
        "SELECT * FROM unnest([1, 2])",
        "SELECT id FROM t -- a comment",
        "SELECT 'COPY t TO ''x'''",
        'SELECT "delete" FROM t',
    ],
)
def test_queries_pass(sql: str) -> None:
    assert parse(sql) is not None


@pytest.mark.parametrize(
    "sql",
    [
        "COPY t TO 'x.csv'",
        "COPY (SELECT 1) TO 'x.csv'",
        "ATTACH 'x.db'",
        "DETACH x",
        "PRAGMA database_list",
        "SET threads = 1",
        "RESET threads",
        "INSTALL httpfs",
        "LOAD httpfs",
        "EXPORT DATABASE 'x'",
        "CALL pragma_version()",
        "CREATE TABLE x AS SELECT 1",
        "CREATE MACRO f(a) AS a",
        "DROP TABLE t",
        "INSERT INTO t VALUES (1)",
        "UPDATE t SET a = 1",
        "DELETE FROM t",
        "TRUNCATE t",
        "ALTER TABLE t ADD COLUMN x INT",
        "VACUUM",
        "BEGIN",
        "USE x",
        "DESCRIBE t",
        "SHOW TABLES",
        "SUMMARIZE t",
        "EXPLAIN SELECT 1",
        "WITH a AS (DELETE FROM t RETURNING *) SELECT * FROM a",
        "SELECT * FROM (DESCRIBE t)",
        "SELECT 1 INTO x",
    ],
)
def test_whatever_is_not_a_query_is_refused(sql: str) -> None:
    with pytest.raises(QueryError):
        parse(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_parquet('x')",
        "SELECT * FROM read_csv('x')",
        "SELECT * FROM read_csv_auto('x')",
        "SELECT * FROM read_json('x')",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM read_blob('/etc/passwd')",
        "SELECT * FROM parquet_scan('x')",
        "SELECT * FROM parquet_metadata('x')",
        "SELECT * FROM glob('/*')",
        "SELECT * FROM sniff_csv('x')",
        "SELECT * FROM duckdb_settings()",
        "SELECT * FROM duckdb_secrets()",
        "SELECT * FROM pragma_table_info('t')",
        "SELECT * FROM query('SELECT 1')",
        "SELECT * FROM query_table('t')",
        "SELECT * FROM sqlite_scan('x', 'y')",
        "SELECT * FROM postgres_scan('', '', '')",
        "SELECT * FROM t, LATERAL read_text('x')",
        "SELECT id FROM t WHERE id IN (SELECT content FROM read_text('x'))",
        "SELECT getenv('HOME')",
        "SELECT current_setting('threads')",
        "SELECT * FROM information_schema.tables",
        "SELECT * FROM other.t",
    ],
)
def test_functions_and_schemas_that_reach_outside_are_refused(sql: str) -> None:
    with pytest.raises(QueryError, match=r"not allowed|not known"):
        parse(sql)


@pytest.mark.parametrize(
    ("sql", "meant"),
    [
        ("a <=> b + c < 0.3", "distance(a, b + c) < 0.3"),
        ("a <-> b", "l2_distance(a, b)"),
        ("a<#>b", "negative_inner_product(a, b)"),
        ("a IS NOT DISTINCT FROM b", "a IS NOT DISTINCT FROM b"),
        ("1 < 2 AND a << 2 = 4", "1 < 2 AND a << 2 = 4"),
    ],
)
def test_operators_of_pgvector_bind_as_in_postgresql(sql: str, meant: str) -> None:
    assert parse(f"SELECT {sql} FROM t") == parse(f"SELECT {meant} FROM t")


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("", "empty"),
        ("  -- nothing", "empty"),
        ("SELEC id FROM t", r"'SELEC'.*line 1, column 1"),
        ("SELECT id FROM t\nWHERE", r"'WHERE': something is missing.*line 2, column 1"),
        ("SELECT 'open", "syntax error"),
        ("SELECT 1; SELECT 2", r"one statement at a time \[line 1, column 11\]"),
        ("SELECT 1; DROP TABLE t", "one statement at a time"),
        ("SELECT /*+ exact */ id FROM t", "hint comments"),
        ("SELECT id FROM t@v3", r"cannot be named this way \[t\]. Write FROM t FOR VERSION AS OF"),
        ("SELECT " + "(" * 3000 + "1" + ")" * 3000, "nested too deeply"),
    ],
    ids=["empty", "comment", "start", "place", "string", "two", "drop", "hint", "at-version", "deep"],
)
def test_errors_say_where(sql: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        parse(sql)


def test_placeholders_are_numbered_as_they_are_written() -> None:
    assert parse("SELECT ? FROM t WHERE a = ? LIMIT ?").sql("duckdb") == "SELECT $1 FROM t WHERE a = $2 LIMIT $3"


def test_a_question_mark_in_a_string_is_no_placeholder() -> None:
    assert parse("SELECT '?' WHERE a = ?").sql("duckdb") == "SELECT '?' WHERE a = $1"


@pytest.mark.parametrize("value", ["''", "'it''s'", "''''"])
@pytest.mark.parametrize("end", ["", " ", "\n", " -- why"])
def test_a_string_at_the_end_after_a_parameter_is_closed(value: str, end: str) -> None:
    assert parse(f"SELECT $v AS v WHERE a = {value}{end}").sql("duckdb", comments=False).endswith(f"a = {value}")


@pytest.mark.parametrize("text", ["a = 1", "a = 1 OR b = 2", "a = 1 -- why", "a IN (SELECT 1)"])
def test_conditions_pass(text: str) -> None:
    assert parse_condition(text) is not None


@pytest.mark.parametrize(
    "text", ["a = 1 ORDER BY b", "a = 1) UNION SELECT 1 WHERE (1 = 1", "1 = 1) LIMIT (1", "a = ", "", "a; b"]
)
def test_what_is_more_or_less_than_a_condition_is_refused(text: str) -> None:
    with pytest.raises(QueryError):
        parse_condition(text)


def test_the_place_of_a_wrong_condition_is_the_condition() -> None:
    with pytest.raises(QueryError) as error:
        parse_condition("a = 1 ORDER BY b")
    assert error.value.where == "a = 1 ORDER BY b"
