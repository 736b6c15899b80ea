"""EXPLAIN and EXPLAIN ANALYZE as statements, as text and as data."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pytest

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.explanation import recall_of_distances, recall_of_rows
from conjoin.pipeline.query.parse import split_explain

TOP = "SELECT id FROM things WHERE price < 90 AND upper(id) <> 'X' ORDER BY DIST LIMIT 5"


@pytest.mark.parametrize(
    ("sql", "mode"),
    [
        ("EXPLAIN SELECT 1", "explain"),
        ("  explain\nanalyze\nSELECT 1", "analyze"),
        ("-- why\nEXPLAIN /* so */ SELECT 1", "explain"),
        ("SELECT 1", ""),
        ("SELECT 'EXPLAIN'", ""),
        ("EXPLAINED", ""),
    ],
)
def test_explain_is_taken_off_and_places_stay(sql: str, mode: str) -> None:
    found, rest = split_explain(sql)
    assert found == mode
    assert len(rest) == len(sql)
    assert rest.count("\n") == sql.count("\n")


def test_explain_says_everything(things: Any) -> None:
    step = things.explained(TOP).steps[0]
    assert (step.table, step.way, step.vector, step.metric) == ("things", "index search", "image_vec", "cosine")
    assert step.why == "only DuckDB can evaluate upper(id) <> 'X'; grown until LIMIT is met"
    assert (step.pushed, step.residual) == ("(`price` < 90.0)", ("upper(id) <> 'X'",))
    assert (step.index, step.unindexed_rows, step.fingerprint) == ("image_vec_idx", 0, "0123456789abcdef" * 2)
    assert step.rows == things.duckdb.sql("SELECT count(*) FROM things WHERE price < 90").fetchall()[0][0]
    assert step.version == things.table.version
    assert step.candidates is not None
    assert 0 < step.probes <= step.partitions
    text = str(things.explained(TOP))
    for words in ("index search", "partitions", "encoder 0123456789ab", "filter in Lance", "filter in DuckDB"):
        assert words in text


def test_as_a_statement_it_is_rows_of_text(things: Any) -> None:
    query = things.query()
    rows = things.table.sql(f"EXPLAIN {things.ours(TOP)}", {"v": query})
    assert rows.columns == ["explain"]
    assert "\n".join(str(row["explain"]) for row in rows) == str(things.explained(TOP))
    analyzed = [str(row["explain"]) for row in things.table.sql(f"EXPLAIN ANALYZE {things.ours(TOP)}", {"v": query})]
    assert analyzed[-1] == "recall of this query against its exact answer: 1"
    assert "5 rows; query vectors" in analyzed[-2]


def test_analyze_measures(things: Any) -> None:
    told = things.explained(TOP, analyze=True)
    assert told.measured.num_rows == 5
    assert told.measured.times.search_ms > 0
    assert told.measured.times.finish_ms > 0
    assert 0.8 <= told.measured.recall <= 1
    data = json.loads(told.to_json())
    assert data["format"] == 1
    assert data["steps"][0]["way"] == "index search"
    assert data["measured"]["recall"] == told.measured.recall
    assert json.loads(things.explained(TOP).to_json())["measured"] is None


def test_exact_is_told(things: Any) -> None:
    told = things.explained("SELECT id FROM things ORDER BY DIST LIMIT 5", exact=True)
    assert told.steps[0].way == "exact nearest-neighbour search"
    assert "exact is asked for" in told
    assert things.explained("EXPLAIN SELECT id FROM things ORDER BY DIST LIMIT 5").steps[0].way == "index search"


def test_tables_without_vectors_are_told_too(things: Any) -> None:
    told = things.table.explain("SELECT count(*) FROM things, deals", deals=[{"a": 1}])
    assert [(step.table, step.way) for step in told.steps] == [("things", "exact scan"), ("deals", "given")]


@pytest.mark.parametrize("sql", ["EXPLAIN", "EXPLAIN EXPLAIN SELECT 1", "EXPLAIN DROP TABLE things", "EXPLAIN COPY x"])
def test_only_queries_are_explained(things: Any, sql: str) -> None:
    with pytest.raises(QueryError):
        things.table.sql(sql)


def test_places_of_errors_are_those_of_the_statement(things: Any) -> None:
    with pytest.raises(QueryError, match="line 2, column 14"):
        things.table.sql("EXPLAIN\nSELECT * FRM things WHERE")


def test_recall_counts_rows_and_ties() -> None:
    import numpy as np

    assert recall_of_distances(np.array([0.1, 0.2, 0.4]), np.array([0.1, 0.2, 0.3])) == pytest.approx(2 / 3)
    assert recall_of_distances(np.array([0.1, 0.2]), np.array([0.1, 0.2])) == 1
    assert recall_of_distances(np.array([]), np.array([])) == 1
    assert recall_of_distances(None, np.array([])) is None
    rows = pa.table({"a": [1, 1, 2], "b": ["x", "x", None]})
    assert recall_of_rows(rows, rows) == 1
    assert recall_of_rows(rows.slice(0, 2), rows) == pytest.approx(2 / 3)
    assert recall_of_rows(rows.slice(0, 0), rows.slice(0, 0)) == 1
