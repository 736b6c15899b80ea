"""Values bound into a query."""

from __future__ import annotations

import datetime as dt
import decimal

import numpy as np
import pytest

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.parameters import Params, bind
from conjoin.pipeline.query.parse import parse


def bound(sql: str, params: Params) -> tuple[str, dict[str, object]]:
    tree = parse(sql)
    rest = bind(tree, params)
    return tree.sql("duckdb"), rest


@pytest.mark.parametrize(
    ("value", "sql"),
    [
        (None, "NULL"),
        (True, "TRUE"),
        (7, "7"),
        (-7, "-7"),
        (1.5, "1.5e0"),
        (-0.0, "-0.0e0"),
        (1e300, "1e+300"),
        (float("nan"), "CAST('nan' AS DOUBLE)"),
        (float("-inf"), "CAST('-inf' AS DOUBLE)"),
        ("it's", "'it''s'"),
        ("'; DROP TABLE t; --", "'''; DROP TABLE t; --'"),
        (decimal.Decimal("-1.20"), "-1.20"),
        (dt.date(2024, 2, 29), "CAST('2024-02-29' AS DATE)"),
        (dt.datetime(2024, 2, 29, 1, 2, 3), "CAST('2024-02-29 01:02:03' AS TIMESTAMP)"),  # noqa: DTZ001
        (np.int64(5), "5"),
        (np.float32(0.5), "0.5e0"),
        (np.bool_(False), "FALSE"),
    ],
)
def test_scalars_become_literals(value: object, sql: str) -> None:
    assert bound("SELECT ?", [value]) == (f"SELECT {sql}", {})


def test_lists_and_bytes_stay_parameters() -> None:
    sql, rest = bound("SELECT $v, $b", {"v": np.arange(2.0), "b": bytearray(b"x")})
    assert sql == "SELECT $pv, $pb"
    assert rest == {"pv": [0.0, 1.0], "pb": b"x"}


def test_the_order_is_that_of_the_text() -> None:
    sql, _ = bound("SELECT ? FROM t WHERE a = ? ORDER BY b LIMIT ? OFFSET ?", [1, "x", 3, 4])
    assert sql == "SELECT 1 FROM t WHERE a = 'x' ORDER BY b LIMIT 3 OFFSET 4"


def test_a_name_may_occur_twice() -> None:
    assert bound("SELECT $a + $a", {"a": 1})[0] == "SELECT 1 + 1"


@pytest.mark.parametrize(
    ("sql", "params", "message"),
    [
        ("SELECT ?", None, "no value for the parameter"),
        ("SELECT $a", {"b": 1}, r"\$a. Given: b"),
        ("SELECT 1", [1], "'1' is not in the query"),
        ("SELECT ?", "x", "a list of values or a mapping"),
        ("SELECT ?", [object()], "is a object"),
    ],
    ids=["none", "other", "unused", "text", "kind"],
)
def test_wrong_parameters_are_named(sql: str, params: Params, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        bound(sql, params)
