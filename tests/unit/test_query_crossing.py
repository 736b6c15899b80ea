"""Cross joins of large tables are refused with an estimate; what is joined, narrowed, limited or small is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query import Table, crossing, open_table

# What only DuckDB can answer: the condition of each row is another one.
CHEAPER = "SELECT b.id FROM things b WHERE b.price < a.price ORDER BY distance(b.image_vec, a.image_vec) LIMIT 3"


@pytest.fixture(scope="module")
def table(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Table:
    return open_table(make_table_at(f"{tmp_path_factory.mktemp('cross')}/things.lance", 1_000, dim=4).uri)


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand rows stand for a million."""
    monkeypatch.setattr(crossing, "_MOST_PAIRS", 2e5)
    monkeypatch.setattr(crossing, "_MOST_DISTANCES", 2e4)


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT count(*) FROM things a, things b", "a, b: 1,000 x 1,000 rows make 1e\\+06 pairs, about"),
        ("SELECT count(*) FROM things a JOIN things b ON a.price < b.price", "LIMIT without ORDER BY"),
        ("SELECT a.id FROM things a CROSS JOIN things b ORDER BY a.price LIMIT 5", "1,000 x 1,000"),
        ("SELECT * FROM (SELECT a.id FROM things a, things b)", "1,000 x 1,000"),
        ("SELECT count(*) FROM things a, things b, things c WHERE a.id = c.id", "a, b, c: 1,000 x 1,000"),
        ("SELECT max(distance(a.image_vec, b.image_vec)) FROM things a, things b WHERE a.stock < 100", "100 x 1,000"),
        (f"SELECT a.id, n.id FROM things a, LATERAL ({CHEAPER}) n LIMIT 5", "(?s)1,000 x 1,000.*beside the"),
    ],
)
def test_a_large_cross_join_is_refused_with_an_estimate(table: Table, sql: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        table.sql(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT count(*) FROM things a, things b WHERE a.id = b.id",
        "SELECT count(*) FROM things a JOIN things b USING (id)",
        "SELECT a.id FROM things a, things b LIMIT 5",
        "SELECT count(*) FROM things a, things b WHERE a.stock < 10",
        "SELECT count(*) FROM things a, things b WHERE distance(a.image_vec, b.image_vec) < 0.01",
        "SELECT count(*) FROM things a, (SELECT 1 AS one) b",
        f"SELECT a.id, n.id FROM things a, LATERAL ({CHEAPER}) n WHERE a.stock < 10",
        f"SELECT a.id, n.id FROM things a, LATERAL ({CHEAPER.replace('<', '=')}) n",
        "SELECT a.id, n.id FROM things a, LATERAL (SELECT b.id FROM things b ORDER BY b.price LIMIT 3) n LIMIT 3",
    ],
)
def test_what_is_joined_narrowed_limited_or_small_is_answered(table: Table, sql: str) -> None:
    assert len(table.sql(sql)) > 0
