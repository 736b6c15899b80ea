"""classify() against numpy: labels, probabilities, templates, NULLs, and every place in a query."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query import Table, open_table, search
from conjoin.pipeline.query.classification import labelled

LABELS = ["red apple", "blue car", "dog"]
CALL = "classify(image_vec, ['red apple', 'blue car', 'dog'], 'a photo of a {}')"


@pytest.fixture(scope="module")
def made(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, tiny_encoder: Path) -> Any:
    from conjoin.pipeline.embedder import read_spec

    uri = f"{tmp_path_factory.mktemp('labelled')}/things.lance"
    return make_table_at(uri, 300, 8, nulls=30, fingerprint=read_spec(tiny_encoder)[1], encoder=str(tiny_encoder))


@pytest.fixture(scope="module")
def table(made: Any) -> Table:
    return open_table(made.uri)


def expected(made: Any, encoder: Path, templates: list[str]) -> tuple[list[str | None], np.ndarray]:
    """By the definition: the softmax of scaled cosines with the mean direction of each label's prompts."""
    from conjoin.pipeline.embedder import load

    loaded = load(encoder)
    means = np.stack([loaded.encode(text=[t.replace("{}", label) for t in templates]).mean(0) for label in LABELS])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    logits = made.vectors["image_vec"] @ means.T * float(loaded.encoder.scale("image", "text").detach())
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = (powers / powers.sum(axis=1, keepdims=True)).max(axis=1)
    names = [None if np.isnan(row).any() else LABELS[int(row.argmax())] for row in logits]
    return names, probabilities


@pytest.mark.parametrize(
    ("argument", "templates"),
    [
        ("'a photo of a {}'", ["a photo of a {}"]),
        ("['a {}', 'a photo of a {}', 'the {}']", ["a {}", "a photo of a {}", "the {}"]),
        ("$templates", ["a {}", "the {}"]),
        ("", ["a {}"]),
    ],
    ids=["one", "several", "bound", "none"],
)
def test_labels_and_probabilities(
    table: Table, made: Any, tiny_encoder: Path, argument: str, templates: list[str]
) -> None:
    names, probabilities = expected(made, tiny_encoder, templates)
    arguments = f"image_vec, $labels{', ' if argument else ''}{argument}"
    params = {"labels": LABELS, **({"templates": templates} if argument == "$templates" else {})}
    rows = table.sql(f"SELECT classify({arguments}) AS c FROM things ORDER BY id", params).to_pylist()
    assert [row["c"] and row["c"]["label"] for row in rows] == names
    assert sum(row["c"] is None for row in rows) == 30
    got = np.array([row["c"]["probability"] if row["c"] else np.nan for row in rows])
    np.testing.assert_allclose(got, probabilities, rtol=1e-4)


def test_it_groups_filters_and_sorts(table: Table, made: Any, tiny_encoder: Path) -> None:
    names, probabilities = expected(made, tiny_encoder, ["a photo of a {}"])
    sql = f"SELECT {CALL}.label AS label, count(*) AS n FROM things GROUP BY label"
    assert {row["label"]: row["n"] for row in table.sql(sql)} == {name: names.count(name) for name in set(names)}
    common = max(set(names) - {None}, key=names.count)
    sql = f"SELECT count(*) AS n FROM things WHERE {CALL}.label = '{common}' AND {CALL}.probability > 0.5"
    sure = [name == common and p > 0.5 for name, p in zip(names, probabilities, strict=True)]
    assert table.sql(sql).to_pylist() == [{"n": sum(sure)}]
    sql = f"WITH v AS (SELECT id, image_vec AS v FROM things) SELECT id, {CALL}.label AS l FROM v".replace(
        "image_vec,", "v,"
    )
    assert sorted(str(row["l"]) for row in table.sql(sql)) == sorted(map(str, names))
    assert table.sql(f"SELECT {CALL} FROM things LIMIT 1").columns == ["classify"]


def test_it_is_computed_for_the_nearest_rows_alone(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_SCAN_FLOATS", 0)
    sql = f"SELECT id, {CALL}.label AS l FROM things ORDER BY distance(image_vec, text('dog')) LIMIT 3"
    assert "nearest-neighbour search" in table.explain(sql)
    assert len(table.sql(sql)) == 3


def test_prompts_are_embedded_once_a_query(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    from conjoin.pipeline.embedder import Embedder

    calls = []
    embed = Embedder.embed
    monkeypatch.setattr(Embedder, "embed", lambda self, *a, **k: calls.append(a) or embed(self, *a, **k))
    table.sql(f"SELECT {CALL}.label AS l, max({CALL}.probability) AS p FROM things GROUP BY {CALL}.label")
    assert len(calls) == 1
    table.explain(f"SELECT {CALL}.label AS l FROM things")
    assert len(calls) == 1


def test_of_no_direction_there_is_no_label() -> None:
    vectors = pa.array([[1, 0], None, [0, 0], [float("nan"), 1], [0, 2]], pa.list_(pa.float32(), 2))
    found = labelled(vectors, np.eye(2), 10.0, pa.array(["a", "b"])).to_pylist()
    assert [row and row["label"] for row in found] == ["a", None, None, None, "b"]
    assert found[4]["probability"] == pytest.approx(1 / (1 + np.exp(-10)))
    sliced = labelled(vectors.slice(1, 4), np.eye(2), 10.0, pa.array(["a", "b"])).to_pylist()
    assert sliced == found[1:]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("classify(image_vec)", "takes a vector column, a list of labels"),
        ("classify(image_vec, ['a'])", "2 to 10,000 different labels"),
        ("classify(image_vec, ['a', 'a'])", "2 to 10,000 different labels"),
        ("classify(image_vec, ['a', 3])", "2 to 10,000 different labels"),
        ("classify(image_vec, caption)", "2 to 10,000 different labels"),
        ("classify(image_vec, ['a', 'b'], 'a photo')", "a text with {} for the label"),
        ("classify(image_vec, ['a', 'b'], [])", "a text with {} for the label"),
        ("classify(price, ['a', 'b'])", "price is not a vector column"),
        ("classify(image_ve, ['a', 'b'])", "not a vector column; did you mean 'image_vec'"),
    ],
)
def test_what_cannot_be_classified(table: Table, sql: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        table.sql(f"SELECT {sql} FROM things")
