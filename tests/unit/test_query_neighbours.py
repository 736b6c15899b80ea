"""Rows near to rows: LATERAL top-k and joins within a radius give what DuckDB gives over all pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import lance
import pyarrow as pa
import pytest

from conjoin.pipeline import index, store
from conjoin.pipeline.embedder import load
from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query import Table, open_table, pairs, prepared

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


@pytest.fixture(scope="module")
def indexed(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = make_table_at(f"{tmp_path_factory.mktemp('indexed')}/things.lance", 6_000, dim=16)
    index.build(made.uri, store.TableConfig(path=made.uri), exact_floats=10_000)
    return made


@pytest.mark.parametrize("where", ["", "WHERE b.stock < 1500"], ids=["all", "filtered"])
def test_a_batch_of_the_index_finds_what_a_product_finds(
    indexed: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = open_table(indexed.uri, None)
    frame = pa.table({"n": range(200), "v": pa.array(indexed.vectors["image_vec"][:200].tolist())})
    sql = (
        "SELECT q.n, b.id, b.d FROM queries q, LATERAL (SELECT id, distance(b.image_vec, q.v) AS d "
        f"FROM things b {where} ORDER BY d LIMIT 10) b"
    )
    by_index = spied(monkeypatch)
    exact = table.sql(sql, exact=True, queries=frame).to_arrow()
    assert by_index == []
    monkeypatch.setattr(pairs, "_EXACT_FLOATS", 0)
    found = table.sql(sql, queries=frame).to_arrow()
    assert by_index, "the index answered"
    assert found.num_rows == exact.num_rows == 2_000
    both = [set(zip(rows["n"].to_pylist(), rows["id"].to_pylist(), strict=True)) for rows in (found, exact)]
    assert len(both[0] & both[1]) / 2_000 >= 0.99


def test_a_radius_by_the_index_is_grown_until_it_is_met(indexed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_table(indexed.uri, None)
    sql = (
        "SELECT a.id AS a, b.id AS b FROM things a JOIN things b ON distance(a.image_vec, b.image_vec) < 0.1 "
        "WHERE a.stock < 300"
    )
    exact = table.sql(sql, exact=True).to_arrow()
    by_index = spied(monkeypatch)
    monkeypatch.setattr(pairs, "_EXACT_FLOATS", 0)
    found = table.sql(sql).to_arrow()
    assert by_index
    both = [set(zip(rows["a"].to_pylist(), rows["b"].to_pylist(), strict=True)) for rows in (found, exact)]
    assert both[0] <= both[1]
    assert len(both[0]) >= 0.99 * len(both[1]) > 300


def test_rows_that_no_index_holds_leave_it_to_a_product(indexed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch puts the rough distances of quantised rows beside exact ones of the others, which are half as large."""
    dataset = lance.dataset(indexed.uri)
    lance.write_dataset(dataset.to_table(limit=50), indexed.uri, mode="append")
    table = open_table(indexed.uri, version=None)
    by_index = spied(monkeypatch)
    monkeypatch.setattr(pairs, "_EXACT_FLOATS", 0)
    sql = (
        "SELECT count(*) AS n FROM things a, LATERAL (SELECT id FROM things b "
        "ORDER BY distance(a.image_vec, b.image_vec) LIMIT 2) n WHERE a.stock < 10"
    )
    assert table.sql(sql).to_pylist()[0]["n"] >= 20
    assert by_index == []


def test_rows_are_found_where_lance_keeps_stable_ids(made_stable: str) -> None:
    """Addresses of such a table are not what Lance takes rows by."""
    found = open_table(made_stable, None).sql(
        "SELECT a.id AS a, n.id AS b FROM things a, LATERAL (SELECT b.id FROM things b "
        "ORDER BY distance(b.image_vec, a.image_vec) LIMIT 1) n"
    )
    assert [row["a"] == row["b"] for row in found] == [True] * 40


@pytest.fixture
def made_stable(make_table: Callable[..., Any], tmp_path: Path) -> str:
    rows = make_table(60, dim=DIM).rows
    uri = f"{tmp_path}/stable/things.lance"
    dataset = lance.write_dataset(rows, uri, max_rows_per_file=25, enable_stable_row_ids=True)
    dataset.delete("stock < 20")
    dataset.optimize.compact_files()
    return uri


def test_values_of_a_query_are_looked_for_at_once(
    make_table: Callable[..., Any], tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(str(tiny_encoder))
    uri = make_table(50, dim=8, fingerprint=encoder.fingerprint, encoder=str(tiny_encoder)).uri
    table = open_table(uri)
    sql = (
        "WITH words AS (SELECT unnest(['red apple', 'dog', NULL]) AS w) SELECT words.w, n.id, n.d FROM words, LATERAL "
        "(SELECT id, distance(image_vec, text(words.w)) AS d FROM things ORDER BY d, id LIMIT 3) n ORDER BY ALL"
    )
    assert "batched nearest-neighbour search" in str(table.explain(sql))
    found = table.sql(sql).to_pylist()
    monkeypatch.setattr(prepared, "with_neighbours", lambda *_: {})
    expected = table.sql(f"{sql}  ").to_pylist()
    assert [(row["w"], row["id"]) for row in found] == [(row["w"], row["id"]) for row in expected]
    assert len(found) == 9


def test_rows_without_vectors_that_make_too_many_pairs_are_refused(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "_MOST_PAIRS", 15_000)
    sql = (
        "SELECT count(*) FROM things a, LATERAL (SELECT id FROM things b "
        "ORDER BY distance(b.image_vec, a.image_vec), id LIMIT 2) n"
    )
    with pytest.raises(QueryError, match=r"rows without a vector make more than 15,000 pairs.*IS NOT NULL"):
        table.sql(sql)


def test_more_pairs_than_fit_are_refused(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_MOST_PAIRS", 1_000)
    sql = "SELECT count(*) FROM things a JOIN things b ON distance(a.image_vec, b.image_vec) < 1.9"
    with pytest.raises(QueryError, match="more than 1,000 pairs are this near"):
        table.sql(sql)
    monkeypatch.setattr(pairs, "_MOST_PRODUCTS", 1e5)
    with pytest.raises(QueryError, match="compares 600 vectors with 600 rows: about 0 minutes"):
        table.sql(sql)


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at every search of an index."""
    calls: list[int] = []
    searched = pairs._searched

    def spy(*given: Any) -> Any:
        calls.append(1)
        return searched(*given)

    monkeypatch.setattr(pairs, "_searched", spy)
    return calls
