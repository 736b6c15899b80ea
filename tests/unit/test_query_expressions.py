"""Arithmetic on vectors, pgvector's operators and text() of a column, against numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conjoin.pipeline.embedder import Embedder, load
from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query import Table, open_table

WORDS = [{"word": word} for word in ("red apple", "blue car", "red apple", None, " ", "dog")]


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Embedder:
    return load(str(tiny_encoder))


@pytest.fixture(scope="module")
def made(
    make_table_at: Callable[..., Any], encoder: Embedder, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    uri = f"{tmp_path_factory.mktemp('expressions')}/things.lance"
    return make_table_at(uri, 20, dim=8, fingerprint=encoder.fingerprint, encoder=str(tiny_encoder))


@pytest.fixture(scope="module")
def table(made: Any) -> Table:
    return open_table(made.uri)


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("expression", "weights"),
    [
        ("text('red apple') - text('dog') + text('blue car')", (1, -1, 1)),
        ("0.7 * text('red apple') + 0.3 * text('dog')", (0.7, 0.3, 0)),
        ("(text('red apple') + 2 * (text('dog') - text('blue car'))) / 4", (1, 2, -2)),
        ("-(text('dog')) - text('red apple') * (1 - 3)", (2, -1, 0)),
    ],
)
@pytest.mark.parametrize("measure", ["distance(image_vec, {})", "image_vec <=> {}", "1 - similarity(image_vec, {})"])
def test_a_mean_of_constants(
    table: Table, made: Any, encoder: Embedder, expression: str, weights: tuple[float, ...], measure: str
) -> None:
    vectors = encoder.embed("text", ["red apple", "dog", "blue car"]).vectors
    expected = 1 - made.vectors["image_vec"] @ unit(np.array(weights) @ vectors)
    found = table.sql(f"SELECT {measure.format(expression)} AS d FROM things").to_arrow()["d"].to_numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_mean_is_a_vector_like_any_other_for_the_plan(table: Table, made: Any) -> None:
    sql = (
        "SELECT id FROM things ORDER BY image_vec <=> 3 * vector_of('row-0-000003') - [1, 0, 0, 0, 0, 0, 0, 0] LIMIT 4"
    )
    vector = 3 * made.vectors["image_vec"][3] - np.eye(8)[0]
    expected = np.argsort(-made.vectors["image_vec"] @ vector)[:4]
    assert [row["id"] for row in table.sql(sql)] == [f"row-0-{i:06d}" for i in expected]
    assert "nearest rows first" in str(table.explain(sql))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("text('dog') - text('dog')", "cancel out: their sum has no direction"),
        ("text('a') + text('b') - text('b') - text('a')", "cancel out"),
        ("0 * text('dog')", "cancel out"),
        ("text_vec - text('a')", "text_vec is not a vector that can be added"),
        ("text('a') + [1, 2]", "image_vec has 8 dimensions, the vector given has 2"),
        ("text('a') + 1", "1 is not a vector. Vectors are added"),
        ("text('a') * text('b')", r"text\('a'\) \* text\('b'\) is not a vector"),
        ("text('a') / 0", "divides by zero"),
        ("text('a') / text('b')", "is not a vector"),
        ("text('a') + caption", "caption is not a vector that can be added"),
        ("text('a') + NULL", "NULL is not a vector"),
    ],
)
def test_what_is_no_vector_is_said(table: Table, expression: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        table.sql(f"SELECT distance(image_vec, {expression}) FROM things")


def test_the_other_metrics_are_exact_and_never_an_index(table: Table, made: Any) -> None:
    query = np.arange(8) - 2.5
    found = table.sql(
        "SELECT image_vec <-> $v AS l2, image_vec <#> $v AS ip, $v <-> image_vec AS r FROM things", {"v": query}
    )
    rows, stored = found.to_arrow(), made.vectors["image_vec"]
    np.testing.assert_allclose(rows["l2"].to_numpy(), np.linalg.norm(stored - unit(query), axis=1), atol=1e-6)
    np.testing.assert_allclose(rows["ip"].to_numpy(), -stored @ unit(query), atol=1e-6)
    np.testing.assert_allclose(rows["r"].to_numpy(), rows["l2"].to_numpy())
    plan = str(table.explain("SELECT id FROM things ORDER BY image_vec <-> $v LIMIT 3", {"v": query}))
    assert "exact scan" in plan


def test_an_operator_without_a_vector_column_is_an_error(table: Table) -> None:
    with pytest.raises(QueryError, match=r"caption of things is not a vector column"):
        table.sql("SELECT caption <=> id FROM things")
    with pytest.raises(QueryError, match="needs a vector column"):
        table.sql("SELECT [1, 2] <=> [3, 4]")


def test_text_of_a_column_embeds_each_value_once(
    table: Table, encoder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, embed = [], Embedder.embed

    def counted(self: Embedder, modality: str, values: list[Any], **options: Any) -> Any:
        asked.append(list(values))
        return embed(self, modality, values, **options)

    monkeypatch.setattr(Embedder, "embed", counted)
    sql = "SELECT w.word, min(distance(image_vec, text(w.word))) AS d FROM words w, things GROUP BY ALL"
    rows = {row["word"]: row["d"] for row in table.sql(sql, words=WORDS)}
    assert sorted(word for words in asked for word in words) == ["blue car", "dog", "red apple"]
    for word in ("red apple", "blue car", "dog"):
        vector = encoder.embed("text", [word]).vectors[0]
        expected = table.sql("SELECT min(distance(image_vec, $v)) AS d FROM things", {"v": vector}).to_pylist()[0]["d"]
        assert rows[word] == pytest.approx(expected, abs=1e-6)
    assert rows[None] is None
    assert rows[" "] is None
