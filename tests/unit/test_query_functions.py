"""distance(), similarity() and what they are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query import Table, open_table

OTHER = "f" * 32


@pytest.fixture(scope="module")
def table(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Table:
    return open_table(make_table_at(f"{tmp_path_factory.mktemp('table')}/things.lance", 20, dim=4).uri)


@pytest.fixture(scope="module")
def other(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Table:
    """A table of another encoder with as many dimensions."""
    uri = f"{tmp_path_factory.mktemp('other')}/other.lance"
    return open_table(make_table_at(uri, 5, dim=4, fingerprint=OTHER).uri)


def test_distance_is_exact_and_similarity_its_complement(make_table: Callable[..., Any]) -> None:
    made = make_table(20, dim=4)
    sql = (
        "SELECT distance(image_vec, $v) AS d, similarity(image_vec, $v) AS s, distance($v, image_vec) AS r FROM things"
    )
    query = np.array([1.0, 2.0, 0.0, -1.0])
    found = open_table(made.uri).sql(sql, {"v": query}).to_arrow()
    expected = 1 - made.vectors["image_vec"] @ (query / np.linalg.norm(query))
    np.testing.assert_allclose(found["d"].to_numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(found["s"].to_numpy(), 1 - expected, atol=1e-6)
    np.testing.assert_allclose(found["r"].to_numpy(), expected, atol=1e-6)


def test_two_columns_of_one_encoder_and_a_stored_row(table: Table) -> None:
    rows = table.sql(
        "SELECT distance(image_vec, text_vec) AS a, distance(image_vec, vector_of('row-0-000003')) AS b FROM things "
        "WHERE id = 'row-0-000003'"
    ).to_pylist()
    assert rows[0]["b"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["a"] > 0


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT distance(image_vec, [1, 2, 3]) FROM things", "image_vec has 4 dimensions, the vector given has 3"),
        ("SELECT distance(image_vec, [0, 0, 0, 0]) FROM things", "is zero"),
        ("SELECT distance(image_vec, ['a', 0, 0, 0]) FROM things", "not a number"),
        ("SELECT distance(image_vec, NULL) FROM things", "NULL is not a vector"),
        ("SELECT distance(image_vec, 'red') FROM things", r"'red' is not a vector.*text\('...'\)"),
        ("SELECT distance(image_vec, txt('red')) FROM things", r"txt\('red'\) is not a vector; did you mean 'text'"),
        ("SELECT distance(image_vec) FROM things", "takes a vector column and a vector"),
        ("SELECT distance(caption, [1, 2, 3, 4]) FROM things", "caption of things is not a vector column"),
        ("SELECT distance(image_vc, [1, 2, 3, 4]) FROM things", "image_vc.*did you mean 'image_vec'"),
        ("SELECT distance([1, 2, 3, 4], [1, 2, 3, 4])", "needs a vector column"),
        ("SELECT text('red')", r"text\('red'\) stands alone"),
        ("SELECT distance(image_vec, text(caption)) FROM things", "does not say where its encoder is kept"),
        ("SELECT distance(image_vec, vector_of(id)) FROM things", "one literal or parameter"),
        ("SELECT distance(image_vec, vector_of('nobody')) FROM things", "no such id"),
        ("SELECT distance(image_vec, vector_of(3)) FROM things", "ids of things are of type string"),
        ("SELECT distanc(image_vec, [1, 2, 3, 4]) FROM things", r"no function distanc\(\); did you mean 'distance'"),
        ("SELECT lenght(caption) FROM things", r"no function lenght\(\); did you mean 'length'"),
    ],
)
def test_what_cannot_be_compared_is_said(table: Table, sql: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        table.sql(sql)


@pytest.mark.parametrize("value", [[float("nan"), 0, 0, 1], [float("inf"), 0, 0, 1], "red", [[1, 2], [3, 4]]])
def test_wrong_vectors_as_parameters(table: Table, value: object) -> None:
    with pytest.raises(QueryError):
        table.sql("SELECT distance(image_vec, $v) FROM things", {"v": value})


@pytest.mark.parametrize(
    "expression",
    [
        "distance(t.image_vec, o.image_vec)",
        "similarity(o.text_vec, t.image_vec)",
        "array_cosine_distance(t.image_vec, o.image_vec)",
        "list_cosine_distance(t.image_vec, o.image_vec)",
        "array_distance(t.image_vec, o.image_vec)",
        "array_inner_product(t.image_vec, o.text_vec)",
        "list_dot_product(t.image_vec, o.text_vec)",
        "1 - array_cosine_similarity((t.image_vec), o.image_vec)",
    ],
)
def test_vectors_of_two_encoders_are_never_compared(table: Table, other: Table, expression: str) -> None:
    with pytest.raises(QueryError, match="different encoders"):
        table.sql(f"SELECT {expression} FROM things t, other o", other=other)


def test_two_encoders_are_seen_through_subqueries_and_views(table: Table, other: Table) -> None:
    sql = (
        "WITH a AS (SELECT id, image_vec AS v FROM things), b(id, w) AS (SELECT id, text_vec FROM other) "
        "SELECT distance(a.v, b.w) FROM a, b"
    )
    with pytest.raises(QueryError, match="different encoders"):
        table.sql(sql, other=other)
    union = "SELECT image_vec AS v FROM things UNION ALL SELECT image_vec FROM other"
    with pytest.raises(QueryError, match="can be traced"):
        table.sql(f"SELECT distance(v, [1, 0, 0, 0]) FROM ({union})", other=other)


def test_a_column_without_a_fingerprint_is_not_compared(make_table: Callable[..., Any], tmp_path: Any) -> None:
    import lance

    plain = make_table(5, dim=4).rows.replace_schema_metadata(None)
    plain = plain.set_column(
        plain.schema.get_field_index("image_vec"),
        plain.schema.field("image_vec").remove_metadata(),
        plain["image_vec"],
    )
    lance.write_dataset(plain, f"{tmp_path}/plain.lance")
    table = open_table(f"{tmp_path}/plain.lance", None)
    with pytest.raises(QueryError, match="no encoder's fingerprint"):
        table.sql("SELECT distance(image_vec, [1, 0, 0, 0]) FROM plain")


def test_outputs_are_named_as_they_were_written(table: Table) -> None:
    outputs = "distance(image_vec, [1, 0, 0, 0]), 1 - avg(distance(image_vec, text_vec))"
    columns = table.sql(f"SELECT {outputs} FROM things GROUP BY 1").columns
    assert columns == ["distance", "1 - avg(distance(image_vec, text_vec))"]
