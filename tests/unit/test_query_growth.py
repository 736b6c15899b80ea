"""Nearest rows that may drop out again: growth, ranges and semi-joins, against DuckDB over all rows."""

from __future__ import annotations

from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from conjoin.pipeline.query import Table, search, sources

DEALS = pa.table({"id": [f"row-0-{i:06d}" for i in range(0, 12_000, 40)], "rebate": list(range(300))})


@pytest.fixture(autouse=True)
def deals(things: Any) -> None:
    things.duckdb.register("deals", DEALS)


# Each sorts by a distance named d and has rows that an index search alone would lose.
GROWING = {
    "a residual filter": "SELECT DIST AS d FROM things WHERE stock % 7 = 3 ORDER BY d LIMIT 10",
    "a rare residual filter": "SELECT DIST AS d FROM things WHERE stock % 997 = 3 ORDER BY d LIMIT 10",
    "pushed and residual": "SELECT DIST AS d FROM things WHERE price < 50 AND upper(id) LIKE '%7' ORDER BY d LIMIT 10",
    "a page of a residual filter": "SELECT DIST AS d FROM things WHERE stock % 7 = 3 ORDER BY d LIMIT 10 OFFSET 30",
    "an inner join": "SELECT DIST AS d FROM things JOIN deals USING (id) ORDER BY d LIMIT 10",
    "an inner join and its side's filter": (
        "SELECT DIST AS d FROM things t JOIN deals x ON t.id = x.id WHERE x.rebate % 2 = 0 ORDER BY d LIMIT 10"
    ),
    "a left join": "SELECT DIST AS d, rebate FROM things LEFT JOIN deals USING (id) ORDER BY d LIMIT 10",
    "a left join with a filter after it": (
        "SELECT DIST AS d FROM things LEFT JOIN deals USING (id) WHERE rebate IS NULL OR rebate > 9 ORDER BY d LIMIT 9"
    ),
    "or across tables": (
        "SELECT DIST AS d FROM things t JOIN deals x ON t.stock > x.rebate "
        "WHERE t.price < 1 OR x.rebate = 7 ORDER BY d, x.rebate LIMIT 20"
    ),
    "a semi-join": "SELECT DIST AS d FROM things SEMI JOIN deals USING (id) ORDER BY d LIMIT 10",
    "an anti-join": "SELECT DIST AS d FROM things ANTI JOIN deals USING (id) ORDER BY d LIMIT 10",
    "in a subquery": (
        "SELECT DIST AS d FROM things WHERE id IN (SELECT id FROM deals WHERE rebate > 9) ORDER BY d LIMIT 10"
    ),
    "exists": (
        "SELECT DIST AS d FROM things t WHERE EXISTS (SELECT 1 FROM deals x WHERE x.id = t.id) ORDER BY d LIMIT 10"
    ),
    "distinct": 'SELECT DISTINCT "Odd Name", round(DIST, 1) AS r, DIST AS d FROM things ORDER BY d LIMIT 10',
    "distinct on": 'SELECT DISTINCT ON ("Odd Name") DIST AS d FROM things ORDER BY d LIMIT 6',
    "two of each": (
        'SELECT DIST AS d FROM things QUALIFY row_number() OVER (PARTITION BY "Odd Name" ORDER BY DIST) <= 2 '
        "ORDER BY d LIMIT 12"
    ),
    "two of each, more than near": (
        "SELECT DIST AS d, rank() OVER (PARTITION BY stock % 100 ORDER BY DIST) AS r FROM things "
        "QUALIFY r <= 2 ORDER BY d LIMIT 150"
    ),
    "a scalar subquery": (
        "SELECT DIST AS d FROM things WHERE price > (SELECT avg(rebate) / 2 FROM deals) ORDER BY d LIMIT 10"
    ),
    "within a range": "SELECT DIST AS d FROM things WHERE DIST < RADIUS ORDER BY d LIMIT 1000",
    "in a with": (
        "WITH n AS (SELECT id, DIST AS d FROM things WHERE stock % 7 = 3 ORDER BY d LIMIT 10) "
        "SELECT d FROM n JOIN things USING (id) ORDER BY d"
    ),
}


@pytest.mark.parametrize("text", GROWING.values(), ids=GROWING.keys())
def test_rows_that_drop_out_are_made_up_for(things: Any, text: str) -> None:
    recalls = []
    for seed in range(5):
        query = things.query(seed)
        sql = text.replace("RADIUS", f"{things.radius(query)}")
        expected = things.exactly(sql, query)
        got = things.answered(sql, query, deals=DEALS)
        assert got.num_rows == expected.num_rows
        far = np.sort(expected["d"].to_numpy())
        recalls.append(float((got["d"].to_numpy() <= far[-1] + 1e-6).mean()) if len(far) else 1.0)
        assert things.answered(sql, query, exact=True, deals=DEALS)["d"].to_numpy() == pytest.approx(far, abs=1e-6)
    assert np.mean(recalls) >= 0.98
    assert min(recalls) >= 0.9


@pytest.mark.parametrize(
    "name", ["a residual filter", "a left join", "distinct", "distinct on", "two of each", "exists", "within a range"]
)
def test_they_are_answered_by_the_index(things: Any, name: str) -> None:
    sql = GROWING[name].replace("RADIUS", f"{things.radius(things.query())}")
    told = things.explained(sql, analyze=True, deals=DEALS)
    assert next(step.way for step in told.steps if step.table == "things") == "index search"
    assert "candidates were read" in told
    assert told.measured.recall >= 0.9


def test_the_naive_way_returns_fewer_rows(things: Any) -> None:
    """What a top-k before the residual filter gives: the ten nearest, of which one or two pass."""
    query = things.query()
    near = things.table.sql("SELECT stock FROM things ORDER BY distance(image_vec, $v) LIMIT 10", {"v": query})
    assert sum(row["stock"] % 7 == 3 for row in near.to_pylist()) < 10
    assert things.answered(GROWING["a residual filter"], query).num_rows == 10


@pytest.mark.parametrize(
    "text",
    [
        "SELECT id FROM things WHERE DIST < RADIUS",
        "SELECT id FROM things WHERE RADIUS > DIST AND price < 50",
        "SELECT id FROM things WHERE (1 - DIST) >= 1 - RADIUS",
        "SELECT id FROM things WHERE DIST BETWEEN 0.01 AND RADIUS",
        "SELECT id, rebate FROM things JOIN deals USING (id) WHERE DIST < RADIUS",
        'SELECT "Odd Name" AS id, count(*) AS n FROM things WHERE DIST <= RADIUS GROUP BY ALL',
        "SELECT count(*) AS id FROM things WHERE DIST < RADIUS",
        "SELECT id FROM things WHERE DIST < -1",
        "SELECT id FROM things WHERE DIST < 3",
    ],
)
def test_ranges_hold_all_rows(things: Any, text: str) -> None:
    """The naive way, distance_range of a quantised index, has recall .02."""
    found = wanted = 0
    for seed in range(5):
        query = things.query(seed)
        radius = things.radius(query)
        sql = text.replace("1 - RADIUS", f"{1 - radius}").replace("RADIUS", f"{radius}")
        expected = things.exactly(sql, query).to_pylist()
        got = things.answered(sql.replace("(1 - DIST)", "similarity(image_vec, $v)"), query, deals=DEALS).to_pylist()
        exact = things.answered(
            sql.replace("(1 - DIST)", "similarity(image_vec, $v)"), query, exact=True, deals=DEALS
        ).to_pylist()
        assert sorted(map(str, exact)) == sorted(map(str, expected))
        if "count" not in sql:
            found += len({row["id"] for row in got} & {row["id"] for row in expected})
            wanted += len(expected)
    assert found >= 0.99 * wanted


def test_a_range_is_read_by_the_index(things: Any) -> None:
    radius = things.radius(things.query())
    told = things.explained(f"SELECT count(*) AS n FROM things WHERE DIST < {radius}", analyze=True)
    assert told.steps[0].way == "index search"
    assert "candidates were read" in told
    wide = things.explained("SELECT count(*) AS n FROM things WHERE DIST < 1.5", analyze=True)
    assert "scanned after a search could not tell" in wide


def test_naive_distance_ranges_lose_rows(things: Any) -> None:
    """Trap 1: the index's own distances are about twice the cosine distance."""
    import lance

    query = things.query().astype(np.float32)
    dataset, radius = lance.dataset(things.made.uri), things.radius(query)
    nearest = {"column": "image_vec", "q": query, "k": 2000, "distance_range": (0.0, radius), "minimum_nprobes": 44}
    naive = dataset.to_table(columns=["id", "_distance"], nearest=nearest)
    assert naive.num_rows < 100
    assert things.answered(f"SELECT id FROM things WHERE DIST < {radius}", query).num_rows >= 198


@pytest.mark.parametrize(
    ("sql", "keys"),
    [
        ("SELECT things.id FROM things JOIN deals USING (id) WHERE rebate < 50", "50 keys of deals"),
        ("SELECT t.id FROM deals d JOIN things t ON d.id = t.id WHERE d.rebate < 50", "50 keys of deals"),
        ("SELECT t.id FROM things t, deals d WHERE t.id = d.id AND d.rebate < 50", "50 keys of deals"),
        ("SELECT id FROM things WHERE id IN (SELECT id FROM deals WHERE rebate < 50)", "50 keys of a subquery"),
        (
            "WITH n AS (SELECT id FROM things ORDER BY DIST LIMIT 5) SELECT t.id FROM n JOIN things t ON t.id = n.id",
            "5 keys of a query",
        ),
        ("SELECT id FROM things SEMI JOIN deals USING (id) WHERE stock < 6000", "300 keys of deals"),
        ("SELECT things.id FROM things JOIN deals USING (id) ORDER BY DIST LIMIT 5", "300 keys of deals"),
        ("SELECT t.id FROM things t JOIN deals d ON t.stock = d.rebate", "300 keys of deals"),
        ("SELECT things.id FROM things JOIN deals USING (id) WHERE rebate < 0", "0 keys of deals"),
    ],
)
def test_a_small_joined_key_set_is_pushed(things: Any, sql: str, keys: str) -> None:
    query = things.query()
    told = things.table.explain(things.ours(sql), {"v": query} if "DIST" in sql else None, analyze=True, deals=DEALS)
    assert any(keys in line for line in told.measured.read)
    got = things.table.sql(things.ours(sql), {"v": query} if "DIST" in sql else None, deals=DEALS).to_pylist()
    expected = things.exactly(sql, query).to_pylist()
    assert sorted(map(str, got)) == sorted(map(str, expected))


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT things.id FROM things LEFT JOIN deals USING (id) WHERE stock < 50",
        "SELECT t.id FROM deals d LEFT JOIN things t ON d.id = t.id",
        "SELECT t.id FROM things t FULL JOIN deals d ON d.id = t.id",
        "SELECT id FROM things WHERE id NOT IN (SELECT id FROM deals)",
        "SELECT id FROM things WHERE price < 1 OR id IN (SELECT id FROM deals)",
        "SELECT id FROM things ANTI JOIN deals USING (id)",
        "SELECT t.id FROM things t JOIN deals d ON t.id = d.id OR t.stock = 3",
        "SELECT t.id FROM things t JOIN deals d ON t.price = d.rebate",
    ],
)
def test_keys_are_not_pushed_where_others_may_pass(things: Any, sql: str) -> None:
    told = things.table.explain(sql, analyze=True, deals=DEALS)
    assert not any("keys" in line for line in told.measured.read)
    got = things.table.sql(sql, deals=DEALS).to_pylist()
    assert sorted(map(str, got)) == sorted(map(str, things.exactly(sql, things.query()).to_pylist()))


def test_keys_never_come_from_rows_that_may_still_grow(things: Any) -> None:
    """Two references of one table: the keys of the second must not be those of the first one's candidates."""
    sql = (
        "SELECT a.id, DIST_A AS d FROM things a JOIN things b ON a.stock = b.stock "
        "WHERE b.stock % 3 = 0 AND a.stock % 5 = 0 ORDER BY d LIMIT 10"
    )
    query = things.query()
    exact = f"array_cosine_distance(a.image_vec, {[float(x) for x in query]}::FLOAT[32])"
    expected = things.duckdb.sql(sql.replace("DIST_A", exact)).to_arrow_table()["d"].to_numpy()
    got = things.table.sql(sql.replace("DIST_A", "distance(a.image_vec, $v)"), {"v": query}).to_arrow()["d"].to_numpy()
    assert len(got) == len(expected)
    np.testing.assert_allclose(got, expected, atol=0.02)


def aggregates() -> list[str]:
    sql = "SELECT DISTINCT function_name FROM duckdb_functions() WHERE function_type = 'aggregate' ORDER BY 1"
    return [name for (name,) in duckdb.sql(sql).fetchall() if name.isidentifier()]


def test_no_aggregate_is_taken_for_a_function_of_one_row(things: Any) -> None:
    """A top-k below an aggregate would aggregate ten rows."""
    from conjoin.pipeline.errors import QueryError
    from conjoin.pipeline.query.parse import parse

    read = 0
    for name in aggregates():
        try:
            sql = f"SELECT {name}(price), {name}(price, 2) FROM things ORDER BY distance(image_vec, $v) LIMIT 10"
            parse(sql)
        except QueryError:
            continue
        step = _plan(things.table, sql)
        assert step.top is None, name
        assert step.growth is None, name
        read += 1
    assert read > 50


def _plan(table: Table, sql: str) -> Any:
    from conjoin.pipeline.query.analysis import analyse
    from conjoin.pipeline.query.functions import rewrite
    from conjoin.pipeline.query.parameters import bind
    from conjoin.pipeline.query.parse import parse
    from conjoin.pipeline.query.planner import plan_reads

    tree = parse(sql)
    bound = bind(tree, {"v": [1.0] + [0.0] * 31})
    analysis = analyse(tree, table._relations({}))
    return plan_reads(analysis, rewrite(analysis, bound))[0]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT id, sum(price) OVER () FROM things ORDER BY DIST LIMIT 5",
        "SELECT id, row_number() OVER (ORDER BY price) FROM things ORDER BY DIST LIMIT 5",
        "SELECT id, row_number() OVER (ORDER BY DIST DESC) FROM things ORDER BY DIST LIMIT 5",
        "SELECT id, row_number() OVER () FROM things ORDER BY DIST LIMIT 5",
        "SELECT id, row_number() OVER (ORDER BY 2) AS r FROM things ORDER BY DIST LIMIT 5",
        "SELECT id, lead(id) OVER (ORDER BY DIST) FROM things ORDER BY DIST LIMIT 5",
        "SELECT min(DIST) AS d FROM things GROUP BY caption ORDER BY d LIMIT 5",
        "SELECT (SELECT max(t.price)) FROM things t ORDER BY DIST LIMIT 5",
        "SELECT id, unnest([1, 2]) FROM things ORDER BY DIST LIMIT 5",
        "SELECT u.id FROM things u RIGHT JOIN things t USING (id) ORDER BY distance(u.image_vec, $v) LIMIT 5",
    ],
)
def test_what_needs_every_row_does_not_grow(things: Any, sql: str) -> None:
    read = _plan(things.table, things.ours(sql))
    assert (read.top, read.growth) == (None, None)


@pytest.mark.parametrize("limit", [0, 1, 5_000, 5_001, 10**9])
def test_limits_of_every_size(things: Any, limit: int) -> None:
    for where in ("true", "stock % 7 = 3", "stock < 300"):
        sql = f"SELECT DIST AS d FROM things WHERE {where} ORDER BY d LIMIT {limit}"
        query = things.query()
        assert things.answered(sql, query).num_rows == things.exactly(sql, query).num_rows


def test_growth_begins_small_and_ends_in_a_scan(things: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = search.nearest
    monkeypatch.setattr(search, "nearest", lambda *a: asked.append(a[1].trusted) or real(*a))
    things.answered("SELECT id FROM things WHERE stock % 7 = 3 ORDER BY DIST LIMIT 10", things.query())
    assert asked[0] == search._GROWING
    assert len(asked) <= 3
    asked.clear()
    things.answered("SELECT id FROM things WHERE stock % 5000 = 3 ORDER BY DIST LIMIT 10", things.query())
    assert len(asked) <= 4


def test_small_tables_are_not_narrowed(things: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_LARGE", 20_000)
    told = things.table.explain("SELECT things.id FROM things JOIN deals USING (id)", analyze=True, deals=DEALS)
    assert not any("keys" in line for line in told.measured.read)
