"""Which queries are answered by a nearest-neighbour search, what is read, and what is pushed down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conjoin.pipeline import store
from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.analysis import analyse
from conjoin.pipeline.query.functions import rewrite
from conjoin.pipeline.query.parse import parse
from conjoin.pipeline.query.planner import LARGEST_K, Read, plan_reads
from conjoin.pipeline.query.relations import Relation, frame_relation, table_relation

D = "distance(image_vec, [1, 0, 0, 0])"


@pytest.fixture(scope="module")
def relations(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Relation]:
    made = make_table_at(f"{tmp_path_factory.mktemp('plan')}/things.lance", 12, dim=4)
    table = table_relation("things", made.uri, store.open_version(made.uri))
    return {"things": table, "deals": frame_relation("deals", [{"id": "row-0-000001", "rebate": 3}])}


def plan(sql: str, relations: dict[str, Relation]) -> tuple[Read, ...]:
    analysis = analyse(parse(sql), relations)
    return plan_reads(analysis, rewrite(analysis, {}))


@pytest.mark.parametrize(
    ("sql", "need", "ties"),
    [
        (f"SELECT id FROM things ORDER BY {D} LIMIT 5", 5, False),
        (f"SELECT id, {D} AS d FROM things ORDER BY d LIMIT 5 OFFSET 7", 12, False),
        (f"SELECT id, {D} FROM things ORDER BY 2 LIMIT 5", 5, False),
        (f"SELECT id, {D} FROM things ORDER BY distance LIMIT 5", 5, False),
        (f"SELECT id FROM things ORDER BY ({D}) ASC NULLS LAST, id LIMIT 5", 5, True),
        ("SELECT id FROM things ORDER BY similarity([1, 0, 0, 0], image_vec) DESC LIMIT 5", 5, False),
        (f"SELECT id FROM things WHERE price < 50 AND stock IN (1, 2) ORDER BY {D} LIMIT 5", 5, False),
        (f"SELECT count(*) FROM (SELECT id FROM things ORDER BY {D} LIMIT 5)", 5, False),
        (f"WITH a AS (SELECT id FROM things ORDER BY {D} LIMIT 5) SELECT * FROM a JOIN deals USING (id)", 5, False),
        (f"(SELECT id FROM things ORDER BY {D} LIMIT 5) UNION ALL SELECT id FROM deals", 5, False),
    ],
)
def test_nearest_rows_first_with_a_limit_is_a_search(
    sql: str, need: int, ties: bool, relations: dict[str, Relation]
) -> None:
    top = next(read.top for read in plan(sql, relations) if read.reference.relation.name == "things")
    assert top is not None
    assert (top.need, top.ties, top.measure.column.name) == (need, ties, "image_vec")


@pytest.mark.parametrize(
    ("sql", "reason"),
    [
        ("SELECT id FROM things LIMIT 5", "no ORDER BY with LIMIT"),
        (f"SELECT id FROM things ORDER BY {D}", "no ORDER BY with LIMIT"),
        (f"SELECT id FROM things ORDER BY {D} DESC LIMIT 5", "does not start with the distance"),
        ("SELECT id FROM things ORDER BY similarity(image_vec, [1, 0, 0, 0]) LIMIT 5", "does not start with"),
        (f"SELECT id FROM things ORDER BY {D} NULLS FIRST LIMIT 5", "does not start with the distance"),
        (f"SELECT id FROM things ORDER BY price, {D} LIMIT 5", "does not start with the distance"),
        (f"SELECT id FROM things ORDER BY 1 + {D} LIMIT 5", "does not start with the distance"),
        ("SELECT id FROM things ORDER BY distance(image_vec, text_vec) LIMIT 5", "does not start with the distance"),
        (f"SELECT id FROM things WHERE upper(caption) = 'X' ORDER BY {D} LIMIT 5", "only DuckDB can evaluate upper"),
        (f"SELECT id FROM things WHERE {D} < 0.5 ORDER BY {D} LIMIT 5", "only DuckDB can evaluate"),
        (f"SELECT id FROM things ORDER BY {D} LIMIT {LARGEST_K} OFFSET 1", "is above"),
        (f"SELECT id FROM things ORDER BY {D} LIMIT 10 PERCENT", "not a plain number"),
        (f"SELECT id FROM things ORDER BY {D} LIMIT 2 + 3", "not a plain number"),
        (f"SELECT DISTINCT caption, {D} AS d FROM things ORDER BY d LIMIT 5", "DISTINCT"),
        (f"SELECT count(*), min({D}) AS d FROM things GROUP BY caption ORDER BY {D} LIMIT 5", "grouped"),
        (f"SELECT id, row_number() OVER () FROM things ORDER BY {D} LIMIT 5", "needs every row"),
        (f"SELECT id, max(price) FROM things ORDER BY {D} LIMIT 5", "needs every row"),
        (f"SELECT id, unnest([1, 2]) FROM things ORDER BY {D} LIMIT 5", "needs every row"),
        (f"SELECT things.id FROM things LEFT JOIN deals USING (id) ORDER BY {D} LIMIT 5", "joined"),
        (f"SELECT things.id FROM things, deals ORDER BY {D} LIMIT 5", "joined"),
        (f"SELECT id FROM things USING SAMPLE 5 ORDER BY {D} LIMIT 5", "sample"),
        (f"SELECT id FROM things QUALIFY row_number() OVER (ORDER BY id) < 3 ORDER BY {D} LIMIT 5", "QUALIFY"),
    ],
)
def test_everything_else_is_exact_and_says_why(sql: str, reason: str, relations: dict[str, Relation]) -> None:
    read = next(read for read in plan(sql, relations) if read.reference.relation.name == "things")
    assert read.top is None
    assert reason in read.reason


@pytest.mark.parametrize(
    ("sql", "pushed", "kept"),
    [
        ("SELECT id FROM things WHERE price < 5 AND upper(id) = 'X'", "(`price` < 5.0)", ("upper(id) = 'X'",)),
        ("SELECT id FROM things WHERE price < 5 OR upper(id) = 'X'", None, ("price < 5 OR upper(id) = 'X'",)),
        ('SELECT id FROM things WHERE "ODD NAME" = 3', "(`Odd Name` = 3)", ()),
        ("SELECT t.id FROM things t JOIN deals USING (id) WHERE t.price < 5", "(`price` < 5.0)", ()),
        ("SELECT t.id FROM things t LEFT JOIN deals USING (id) WHERE t.price < 5", "(`price` < 5.0)", ()),
        ("SELECT t.id FROM deals LEFT JOIN things t USING (id) WHERE t.price < 5", None, ("t.price < 5",)),
        ("SELECT t.id FROM things t FULL JOIN deals USING (id) WHERE t.price < 5", None, ("t.price < 5",)),
        ("SELECT t.id FROM things t JOIN deals d USING (id) WHERE t.price < 5 OR d.rebate = 3", None, None),
        ("SELECT t.id FROM things t JOIN deals d USING (id) WHERE rebate = 3", None, None),
        ("SELECT id FROM things USING SAMPLE 3 WHERE price < 5", None, ("price < 5",)),
        ("SELECT a FROM things AS t(a, price) WHERE price = 'x'", None, None),
        ("SELECT id FROM (SELECT * FROM things) WHERE price < 5", None, ()),
    ],
)
def test_filters_go_down_only_where_that_changes_nothing(
    sql: str, pushed: str | None, kept: tuple[str, ...] | None, relations: dict[str, Relation]
) -> None:
    read = next(read for read in plan(sql, relations) if read.reference.relation.name == "things")
    assert read.filter == pushed
    assert kept is None or read.kept == kept


@pytest.mark.parametrize(
    ("sql", "columns"),
    [
        ("SELECT count(*) FROM things", ("id",)),
        ("SELECT caption FROM things WHERE price < 5 ORDER BY stock", ("caption", "price", "stock")),
        (f"SELECT id FROM things ORDER BY {D} LIMIT 1", ("id", "image_vec")),
        ('SELECT "odd name" FROM things', ("Odd Name",)),
        ("SELECT t.id FROM things t JOIN deals d ON t.id = d.id WHERE t.stock = d.rebate", ("id", "stock")),
        ("SELECT t.id FROM things t JOIN deals USING (id)", ("id",)),
        (
            "SELECT * EXCLUDE (image_vec, text_vec, image_hash, text_hash) FROM things",
            ("id", "caption", "price", "stock", "Odd Name", "day"),
        ),
        ("SELECT count(t.*) FROM things t", None),
        ("SELECT * FROM things", None),
        ("SELECT things FROM things", None),
        ("SELECT COLUMNS('i.*') FROM things", None),
        ("SELECT d.* FROM things t JOIN deals d USING (id)", ("id",)),
    ],
)
def test_only_named_columns_are_read(sql: str, columns: tuple[str, ...] | None, relations: dict[str, Relation]) -> None:
    read = next(read for read in plan(sql, relations) if read.reference.relation.name == "things")
    assert read.columns == (columns or tuple(relations["things"].schema.names))


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT 1 FROM thing", "no table 'thing'; did you mean 'things'"),
        ("SELECT 1 FROM xyz", "no table 'xyz'; known: deals, things"),
        ("SELECT 1 FROM 'x.parquet'", r"no table 'x\.parquet'"),
        ("SELECT 1 FROM things, things", "own alias"),
    ],
)
def test_unknown_tables(sql: str, message: str, relations: dict[str, Relation]) -> None:
    with pytest.raises(QueryError, match=message):
        plan(sql, relations)
