"""Plans that are kept: asked again they answer as planned anew, and they are not used where they would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lance
import numpy as np
import pytest

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query import Table, open_table, table

NEAREST = "SELECT id, distance(image_vec, $v) AS d FROM things WHERE stock < $most ORDER BY d, id LIMIT 5"
BETWEEN = (
    "SELECT id, distance(image_vec, $v) AS d, distance(image_vec, $w) AS e FROM things "
    "ORDER BY distance(image_vec, $w), id LIMIT 3"
)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry per query that was planned."""
    calls: list[str] = []
    original = table.prepare

    def counted(tree: Any, *others: Any) -> Any:
        calls.append(tree.sql("duckdb"))
        return original(tree, *others)

    monkeypatch.setattr(table, "prepare", counted)
    return calls


def ask(opened: Table, sql: str, **params: object) -> list[dict[str, object]]:
    return opened.sql(sql, params).to_pylist()


def fresh(opened: Table, sql: str, **params: object) -> list[dict[str, object]]:
    return open_table(opened.uri).sql(sql, params).to_pylist()


def test_other_vectors_have_their_own_answers_without_a_plan(
    make_table: Callable[..., Any], planned: list[str]
) -> None:
    opened = open_table(make_table(200, dim=4).uri)
    for vector in np.random.default_rng(0).normal(size=(5, 4)):
        found = ask(opened, NEAREST, v=vector, most=100)
        assert found == ask(opened, NEAREST, v=vector.tolist(), most=100)
        assert found == fresh(opened, NEAREST, v=vector, most=100)
    assert len(planned) == 1 + 5


@pytest.mark.parametrize("other", [101, 100.0, "100", True, None, -0.0, 0.0])
def test_another_scalar_is_another_plan(make_table: Callable[..., Any], planned: list[str], other: object) -> None:
    opened = open_table(make_table(200, dim=4).uri)
    answers = []
    for most in (100, other):
        try:
            answers.append(ask(opened, NEAREST, v=[1, 0, 0, 0], most=most))
        except QueryError:
            answers.append([])
    assert len(planned) == 2
    assert len(answers[0]) == 5


def test_vectors_that_were_equal_may_differ_later(make_table: Callable[..., Any]) -> None:
    opened = open_table(make_table(200, dim=4).uri)
    first, second = np.random.default_rng(1).normal(size=(2, 4))
    for v, w in ((first, first), (first, second), (second, first), (second, second)):
        assert ask(opened, BETWEEN, v=v, w=w) == fresh(opened, BETWEEN, v=v, w=w)


def test_a_moved_tag_is_planned_anew(make_table: Callable[..., Any], planned: list[str]) -> None:
    made = make_table(20, dim=4)
    opened, sql = open_table(made.uri), "SELECT count(*) AS n, min(distance(image_vec, $v)) AS d FROM things"
    before = ask(opened, sql, v=[1, 0, 0, 0])
    make_table(30, dim=4, live=False, mode="overwrite", seed=1)
    assert ask(opened, sql, v=[1, 0, 0, 0]) == before
    lance.dataset(made.uri).tags.update("live", 2)
    after = ask(opened, sql, v=[1, 0, 0, 0])
    assert (before[0]["n"], after[0]["n"], len(planned)) == (20, 30, 2)


def test_versions_by_tag_are_looked_up_each_time(make_table: Callable[..., Any]) -> None:
    made = make_table(20, dim=4)
    make_table(30, dim=4, live=False, mode="overwrite", seed=1)
    dataset, opened = lance.dataset(made.uri), open_table(made.uri)
    sql, counts = "SELECT count(*) AS n FROM things FOR VERSION AS OF 'other'", []
    for version in (1, 2):
        (dataset.tags.create if version == 1 else dataset.tags.update)("other", version)
        counts.append(ask(opened, sql)[0]["n"])
    assert counts == [20, 30]


def test_errors_stay_errors(make_table: Callable[..., Any]) -> None:
    opened = open_table(make_table(20, dim=4).uri)
    ask(opened, NEAREST, v=[1, 0, 0, 0], most=5)
    for wrong in ([1, 0], [0, 0, 0, 0], [float("nan"), 0, 0, 0], "words"):
        with pytest.raises(QueryError):
            ask(opened, NEAREST, v=wrong, most=5)
    with pytest.raises(QueryError, match="not in the query"):
        ask(opened, NEAREST, v=[1, 0, 0, 0], most=5, more=1)


def test_many_threads_share_one_plan(make_table: Callable[..., Any]) -> None:
    from concurrent.futures import ThreadPoolExecutor

    opened = open_table(make_table(200, dim=4).uri)
    vectors = np.random.default_rng(2).normal(size=(40, 4))
    wanted = [fresh(opened, NEAREST, v=vector, most=150) for vector in vectors]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda vector: ask(opened, NEAREST, v=vector, most=150), vectors)) == wanted


@pytest.mark.parametrize("own_first", [True, False])
def test_a_vector_that_equals_the_querys_own_may_differ_later(make_table: Callable[..., Any], own_first: bool) -> None:
    opened = open_table(make_table(200, dim=4).uri)
    own, given = "distance(image_vec, [1, 0, 0, 0]) AS own", "distance(image_vec, $v) AS given"
    columns = f"{own}, {given}" if own_first else f"{given}, {own}"
    sql = f"SELECT id, {columns} FROM things ORDER BY id LIMIT 5"
    for vector in ([1, 0, 0, 0], [0, 1, 0, 0]):
        assert ask(opened, sql, v=vector) == fresh(opened, sql, v=vector)
