"""The traps of vector search and SQL parsing: what the naive way gives, by running it, and what a query gives here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lance
import numpy as np
import pytest
import sqlglot
from sqlglot import exp

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query import open_table, search
from conjoin.pipeline.query.parse import parse

TOP = "SELECT id, DIST AS d FROM things WHERE {} ORDER BY d LIMIT 10"


def naive(things: Any, query: np.ndarray, **options: Any) -> Any:
    """Lance as its documentation calls it."""
    filtered = {key: options.pop(key) for key in ("filter", "prefilter", "fast_search") if key in options}
    nearest = {"column": "image_vec", "q": query.astype(np.float32), "k": 10, **options}
    return lance.dataset(things.made.uri).to_table(columns=["id", "_distance"], nearest=nearest, **filtered)


def test_distances_of_a_quantised_index_are_other_numbers(things: Any) -> None:
    query = things.query()
    exact = things.exactly(TOP.format("true"), query)["d"].to_numpy()
    wrong = np.sort(naive(things, query)["_distance"].to_numpy())
    assert (wrong > 1.5 * exact).all()  # about twice
    np.testing.assert_allclose(things.answered(TOP.format("true"), query)["d"].to_numpy()[0], exact[0], atol=1e-5)


@pytest.mark.parametrize("options", [{"minimum_nprobes": 2, "maximum_nprobes": 2}, {"prefilter": False}])
def test_a_selective_filter_loses_rows(things: Any, options: dict[str, Any]) -> None:
    found = naive(things, things.query(), filter="stock < 40", **{"prefilter": True, **options})
    assert found.num_rows < 10
    assert things.answered(TOP.format("stock < 40"), things.query()).num_rows == 10


def test_few_partitions_hold_fewer_rows_than_a_large_limit(things: Any) -> None:
    found = naive(things, things.query(), k=3000, minimum_nprobes=2, maximum_nprobes=2)
    assert found.num_rows < 3000
    sql = "SELECT id FROM things ORDER BY DIST LIMIT 3000"
    assert things.answered(sql, things.query()).num_rows == 3000


def test_a_filter_that_lance_does_not_know_is_left_to_duckdb(things: Any) -> None:
    condition = "CASE WHEN price < 50 THEN stock < 5000 ELSE false END"
    with pytest.raises((OSError, ValueError, RuntimeError)):
        naive(things, things.query(), filter="price < ?", prefilter=True)
    query = things.query()
    got = things.answered(TOP.format(condition), query)["d"].to_numpy()
    expected = things.exactly(TOP.format(condition), query)["d"].to_numpy()
    assert len(got) == len(expected) == 10
    assert (got <= expected[-1] + 1e-6).mean() >= 0.9


def test_rows_after_the_index_are_skipped_by_a_fast_search(
    make_table: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_SCAN_FLOATS", 0)
    made = make_table(3000, 32, columns=("image_vec",))
    dataset = lance.dataset(made.uri)
    dataset.create_index("image_vec", "IVF_SQ", metric="cosine", num_partitions=8)
    make_table(2000, 32, columns=("image_vec",), seed=5, mode="append")
    sql = "SELECT id FROM things ORDER BY distance(image_vec, $v) LIMIT 1"
    row = 123
    query = lance.dataset(made.uri).to_table(filter=f"id = 'row-5-{row:06d}'")["image_vec"][0].as_py()
    nearest = {"column": "image_vec", "q": np.array(query, np.float32), "k": 1}
    skipped = lance.dataset(made.uri).to_table(columns=["id", "_distance"], nearest=nearest, fast_search=True)
    assert skipped["id"].to_pylist() != [f"row-5-{row:06d}"]
    table = open_table(made.uri, None)
    assert table.sql(sql, {"v": query}).to_pylist() == [{"id": f"row-5-{row:06d}"}]
    step = table.explain(sql, {"v": query}).steps[0]
    assert (step.way, step.unindexed_rows) == ("index search", 2000)
    assert "2,000 rows not in it" in table.explain(sql, {"v": query})


def test_another_metric_would_be_brute_force(things: Any) -> None:
    """Asked in l2, a cosine index is not used, and the answer is a squared distance."""
    query = things.query()
    squared = naive(things, query, metric="l2")["_distance"].to_numpy()
    exact = things.exactly(TOP.format("true"), query)["d"].to_numpy()
    np.testing.assert_allclose(np.sort(squared)[0], 2 * exact[0], atol=1e-3)
    assert things.explained(TOP.format("true")).steps[0].metric == "cosine"


def test_a_wrong_dimension_is_an_error_with_both_numbers(things: Any) -> None:
    with pytest.raises(ValueError, match=r"dim|length|size"):
        naive(things, np.ones(5))
    with pytest.raises(QueryError, match="has 32 dimensions, the vector given has 5"):
        things.table.sql("SELECT id FROM things ORDER BY distance(image_vec, [1, 2, 3, 4, 5]) LIMIT 1")


def test_a_limit_before_an_offset_gives_no_rows(things: Any) -> None:
    """k nearest rows have no second page."""
    query = things.query()
    assert naive(things, query).slice(10, 10).num_rows == 0
    pages = [
        things.answered(f"SELECT DIST AS d FROM things ORDER BY d, id LIMIT 10 OFFSET {at}", query) for at in (0, 10)
    ]
    ds = [page["d"].to_numpy() for page in pages]
    assert len(ds[1]) == 10
    assert ds[0].max() <= ds[1].min() + 1e-6


def test_parsers_traps() -> None:
    naive_tree = sqlglot.parse_one("EXPLAIN SELECT 1", read="duckdb")
    assert isinstance(naive_tree, exp.Command)  # text, that nobody has looked at
    hint = sqlglot.parse_one("SELECT /*+ exact */ id FROM t", read="duckdb")
    assert hint.args.get("hint") is None  # and so the hint has no effect
    alias = sqlglot.parse_one("SELECT id FROM t@v3", read="duckdb").find(exp.Table)
    assert alias is not None
    assert alias.args.get("version") is None  # an alias, and the newest version
    assert "NULLS FIRST" in sqlglot.parse_one("SELECT a FROM t ORDER BY a").sql("duckdb")
    for sql in ("SELECT /*+ exact */ id FROM t", "SELECT id FROM t@v3"):
        with pytest.raises(QueryError):
            parse(sql)
    assert parse("SELECT a FROM t ORDER BY a").sql("duckdb") == "SELECT a FROM t ORDER BY a"


def test_names_that_need_quoting_are_pushed_and_grown(things: Any) -> None:
    for where in ('"Odd Name" <> 3', '"odd name" + 0 <> 3'):
        query = things.query()
        sql = f'SELECT "Odd Name" AS "a ""b""", DIST AS d FROM things AS "x y" WHERE {where} ORDER BY d LIMIT 10'
        got, expected = things.answered(sql, query), things.exactly(sql, query)
        assert got.column_names == expected.column_names
        assert (got["d"].to_numpy() <= expected["d"].to_numpy()[-1] + 1e-6).mean() >= 0.9
        assert things.explained(sql).steps[0].way == "index search"


@pytest.mark.parametrize("order", ["d", "1", "DIST", "D"])
def test_an_alias_or_a_position_uses_the_index(things: Any, order: str) -> None:
    sql = f"SELECT DIST AS d, id FROM things ORDER BY {order} LIMIT 10"
    assert things.explained(sql).steps[0].way == "index search"


@pytest.mark.parametrize("where", ["true", "upper(id) = 'X'", "distance(image_vec, [1, 0, 0, 0]) < 0.3"])
def test_an_empty_table_and_a_table_without_an_index(make_table: Callable[..., Any], where: str) -> None:
    sql = f"SELECT id FROM things WHERE {where} ORDER BY distance(image_vec, [1, 0, 0, 0]) LIMIT 5"
    few = open_table(make_table(30, dim=4).uri)
    assert len(few.sql(sql)) == (0 if "upper" in where else 5)
    lance.dataset(few.uri).delete("true")
    assert len(open_table(few.uri, None).sql(sql)) == 0
    assert open_table(few.uri, None).sql(sql.split(" ORDER")[0]).to_pylist() == []


@pytest.mark.parametrize("where", ["stock % 2 = 0", "distance(image_vec, [1, 0, 0, 0]) < 3", "true"])
def test_rows_without_vectors_come_last_after_growth_too(
    make_table: Callable[..., Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_SCAN_FLOATS", 0)
    made = make_table(4000, dim=4, nulls=3000, columns=("image_vec",))
    sql = f"SELECT id, distance(image_vec, [1, 0, 0, 0]) AS d FROM things WHERE {where} ORDER BY d LIMIT 1500"
    import duckdb

    connection = duckdb.connect()
    connection.register("things", made.rows)
    exact = sql.replace("distance(image_vec, [1, 0, 0, 0])", "array_cosine_distance(image_vec, [1, 0, 0, 0]::FLOAT[4])")
    expected = connection.sql(exact).to_arrow_table()["d"].to_pylist()
    got = open_table(made.uri).sql(sql).to_arrow()["d"].to_pylist()
    assert got == expected
