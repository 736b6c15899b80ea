"""A plain search is put in order without DuckDB, and is what DuckDB would have answered, types included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from conjoin.pipeline.query import Table, execute, open_table
from conjoin.pipeline.query import table as table_module

DIM, ROWS = 16, 500
DISTANCE = "distance(image_vec, $v)"
V = np.random.default_rng(5).normal(size=DIM)


@pytest.fixture(scope="module")
def table(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Table:
    made = make_table_at(f"{tmp_path_factory.mktemp('ranked')}/things.lance", ROWS, DIM, columns=("image_vec",))
    return open_table(made.uri, None)


def both(table: Table, sql: str, monkeypatch: pytest.MonkeyPatch) -> tuple[pa.Table, pa.Table, int]:
    """The answer, DuckDB's own, and how often DuckDB was asked for the first."""
    asked = list[str]()
    run = execute.Engine.run

    def counting(*args: Any, **options: Any) -> pa.Table:
        asked.append(args[1])
        return run(*args, **options)

    monkeypatch.setattr(execute.Engine, "run", counting)
    ours = table.sql(sql, {"v": V}).to_arrow()
    times = len(asked)
    monkeypatch.setattr(table_module, "_ranked", lambda *_: None)
    return ours, table.sql(sql, {"v": V}).to_arrow(), times


@pytest.mark.parametrize(
    "sql",
    [
        f"SELECT id, {DISTANCE} AS d FROM things ORDER BY d LIMIT 7",
        f"SELECT id, {DISTANCE} FROM things ORDER BY 2 LIMIT 7 OFFSET 3",
        "SELECT t.id AS k, price, similarity(image_vec, $v) AS s FROM things t ORDER BY s DESC LIMIT 5",
        f"SELECT {DISTANCE} AS d, similarity(image_vec, $v) AS s FROM things ORDER BY {DISTANCE} LIMIT 5",
        f"SELECT id FROM things WHERE stock < 40 AND price > 1 ORDER BY {DISTANCE} LIMIT 10",
        f"SELECT id, id AS again FROM things WHERE stock < 0 ORDER BY {DISTANCE} LIMIT 10",
        f"SELECT id FROM things ORDER BY {DISTANCE} LIMIT 0",
        f"SELECT id FROM things ORDER BY {DISTANCE} LIMIT 5 OFFSET {ROWS + 5}",
    ],
)
def test_a_plain_search_needs_no_duckdb(table: Table, sql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, times = both(table, sql, monkeypatch)
    assert times == 0
    assert ours.schema == theirs.schema
    for name in ours.column_names:
        left, right = ours[name].to_pylist(), theirs[name].to_pylist()
        assert left == (pytest.approx(right, abs=1e-6) if ours[name].type == pa.float32() else right), name


@pytest.mark.parametrize(
    "sql",
    [
        f"SELECT upper(id::VARCHAR) AS up FROM things ORDER BY {DISTANCE} LIMIT 5",
        f"SELECT id FROM things ORDER BY {DISTANCE}, id LIMIT 5",
        f"SELECT id, 1 - {DISTANCE} AS own FROM things ORDER BY {DISTANCE} LIMIT 5",
        f"SELECT *, {DISTANCE} AS d FROM things ORDER BY d LIMIT 5",
        f"SELECT image_vec FROM things ORDER BY {DISTANCE} LIMIT 5",
        f"SELECT id FROM (SELECT id FROM things ORDER BY {DISTANCE} LIMIT 5) ORDER BY id LIMIT 3",
        f"SELECT id FROM things WHERE abs(stock) < 40 ORDER BY {DISTANCE} LIMIT 10",
    ],
)
def test_anything_else_is_duckdbs(table: Table, sql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, times = both(table, sql, monkeypatch)
    assert times > 0
    assert ours.equals(theirs)


@pytest.mark.parametrize("order", ["distance(image_vec, $v)", "similarity(image_vec, $v) DESC"])
def test_nulls_and_nan_keep_duckdbs_place(
    make_table_at: Callable[..., Any], tmp_path: Any, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_table_at(f"{tmp_path}/things.lance", 30, DIM, columns=("image_vec",), nulls=4)
    sql = f"SELECT id FROM things ORDER BY {order} LIMIT 30"
    ours, theirs, times = both(open_table(made.uri, None), sql, monkeypatch)
    assert times == 1
    assert sorted(map(str, ours["id"].to_pylist())) == sorted(map(str, theirs["id"].to_pylist()))
    assert len(ours) == 30
