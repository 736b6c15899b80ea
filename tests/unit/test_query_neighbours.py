"""Rows near to rows: LATERAL top-k and joins within a radius give what DuckDB gives over all pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import duckdb
import lance
import pyarrow as pa
import pytest

from conjoin.pipeline.query import Table, open_table

NUM_ROWS, DIM = 600, 8
COLUMNS = "a.id AS a, n.id AS b, n.d"


@pytest.fixture(scope="module")
def table(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Table:
    """With 30 rows that have no vector."""
    uri = f"{tmp_path_factory.mktemp('near')}/things.lance"
    return open_table(make_table_at(uri, NUM_ROWS, dim=DIM, nulls=30).uri)


@pytest.fixture(scope="module")
def whole(table: Table) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    connection.register("things", lance.dataset(table.uri).to_table())
    return connection


def brute(whole: duckdb.DuckDBPyConnection, sql: str) -> pa.Table:
    for name in ("similarity", "distance"):
        inner = "array_cosine_distance(x, y)"
        result = inner if name == "distance" else f"1 - {inner}"
        whole.execute(f"CREATE OR REPLACE MACRO {name}(x, y) AS {result}")
    return whole.sql(sql).to_arrow_table()


def lateral(inner: str, outer: str = "things a", columns: str = COLUMNS) -> str:
    return f"SELECT {columns} FROM {outer}, LATERAL ({inner}) n ORDER BY ALL"


D = "distance(b.image_vec, a.image_vec)"
QUERIES = {
    "nearest": lateral(f"SELECT b.id, {D} AS d FROM things b ORDER BY d LIMIT 3"),
    "without-itself": lateral(f"SELECT b.id, {D} AS d FROM things b WHERE b.id <> a.id ORDER BY d LIMIT 3"),
    "filtered": lateral(f"SELECT b.id, {D} AS d FROM things b WHERE b.price < 40 ORDER BY {D}, b.id LIMIT 2 OFFSET 1"),
    "few-pass": lateral(f"SELECT b.id, {D} AS d FROM things b WHERE b.price < 1 ORDER BY d, b.id LIMIT 20"),
    "nearly-all": lateral(f"SELECT b.id, {D} AS d FROM things b ORDER BY d, b.id LIMIT 590").replace(
        ") n ORDER", ") n WHERE a.price < 2 ORDER"
    ),
    "similar": lateral(
        "SELECT b.id, similarity(a.image_vec, b.image_vec) AS d FROM things b "
        "ORDER BY similarity(a.image_vec, b.image_vec) DESC, b.id LIMIT 4"
    ),
    "left": "SELECT a.id AS a, n.id AS b FROM things a LEFT JOIN LATERAL (SELECT b.id FROM things b "
    "WHERE b.price < 5 ORDER BY distance(b.image_vec, a.image_vec), b.id LIMIT 1) n ON true ORDER BY ALL",
    "star": "SELECT count(*), count(id), min(d) FROM (SELECT n.* FROM things a, "
    f"LATERAL (SELECT *, {D} AS d FROM things b ORDER BY d LIMIT 3) n)",
    "star-within": "SELECT * FROM (SELECT * FROM things a JOIN things b ON distance(a.image_vec, b.image_vec) < 0.01) "
    "ORDER BY ALL",
    "within": "SELECT a.id AS a, b.id AS b FROM things a JOIN things b ON distance(a.image_vec, b.image_vec) < 0.05 "
    "AND a.id < b.id ORDER BY ALL",
    "comma": "SELECT a.id AS a, b.id AS b FROM things a, things b WHERE similarity(a.image_vec, b.image_vec) > 0.96 "
    "AND a.price > 50 AND b.price < 20 ORDER BY ALL",
    "left-within": "SELECT a.id AS a, count(b.id) AS n FROM things a LEFT JOIN things b "
    "ON distance(a.image_vec, b.image_vec) <= 0.03 AND b.id <> a.id GROUP BY 1 ORDER BY ALL",
    "all-columns": "SELECT * EXCLUDE (image_vec, text_vec) FROM (SELECT * FROM things b JOIN (FROM things) a "
    "ON distance(a.image_vec, b.image_vec) < 0) ORDER BY ALL",
    "with": "WITH cheap AS (SELECT id, image_vec AS v FROM things WHERE price < 10) SELECT a.id AS a, b.id AS b "
    "FROM cheap a, things b WHERE distance(a.v, b.image_vec) < 0.1 ORDER BY ALL",
}
NOT_BATCHED = {"all-columns", "with"}


@pytest.mark.parametrize("name", QUERIES)
def test_it_equals_all_pairs(table: Table, whole: duckdb.DuckDBPyConnection, name: str) -> None:
    sql = QUERIES[name]
    plan = str(table.explain(sql))
    assert ("batched nearest-neighbour search" in plan) == (name not in NOT_BATCHED), plan
    found, expected = table.sql(sql).to_arrow(), brute(whole, sql)
    assert found.num_rows == expected.num_rows
    assert found.column_names == expected.column_names
    for column in found.column_names:
        if pa.types.is_floating(found[column].type):
            assert found[column].to_pylist() == pytest.approx(expected[column].to_pylist(), abs=1e-5, nan_ok=True)
        elif "LIMIT 3" not in sql:  # a row without a vector has any three beside it
            assert found[column].to_pylist() == expected[column].to_pylist()
