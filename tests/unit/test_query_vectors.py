"""Words, pictures, rows and numbers become query vectors, by the encoder of their column only."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conjoin.pipeline.embedder import Embedder, load
from conjoin.pipeline.errors import ConjoinError, QueryError
from conjoin.pipeline.query import Table, open_table
from conjoin.pipeline.query.vectors import unit
from conjoin.pipeline.store import VectorColumn

COLUMN = VectorColumn("image_vec", "image", "f" * 32, 3, "cosine", "")


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path) -> Embedder:
    return load(str(tiny_encoder))


@pytest.fixture(scope="module")
def table(
    make_table_at: Callable[..., Any],
    encoder: Embedder,
    tiny_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Table:
    uri = f"{tmp_path_factory.mktemp('vectors')}/things.lance"
    return open_table(make_table_at(uri, 20, dim=8, fingerprint=encoder.fingerprint, encoder=str(tiny_encoder)).uri)


def distance_to(table: Table, expression: str, vector: np.ndarray, params: dict[str, object] | None = None) -> float:
    """Largest difference between distances to an expression and to a vector."""
    sql = f"SELECT distance(image_vec, {expression}) AS a, distance(image_vec, $v) AS b FROM things"
    rows = table.sql(sql, {**(params or {}), "v": vector}).to_arrow()
    return float(np.abs(rows["a"].to_numpy() - rows["b"].to_numpy()).max())


def test_words_are_embedded_by_the_columns_encoder(table: Table, encoder: Embedder) -> None:
    vector = encoder.embed("text", ["red apple"]).vectors[0]
    assert distance_to(table, "text('red apple')", vector) < 1e-6
    assert distance_to(table, "text($w)", vector, {"w": "red apple"}) < 1e-6
    assert distance_to(table, "text('blue car')", vector) > 1e-3


def test_pictures_by_path_and_by_bytes(table: Table, encoder: Embedder, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), (200, 30, 30)).save(buffer, "PNG")
    (tmp_path / "red.png").write_bytes(buffer.getvalue())
    vector = encoder.embed("image", [buffer.getvalue()]).vectors[0]
    assert distance_to(table, f"image('{tmp_path}/red.png')", vector) < 1e-6
    assert distance_to(table, "image($b)", vector, {"b": buffer.getvalue()}) < 1e-6


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("text('')", "empty text"),
        ("image('{folder}/none.png')", "no such file"),
        ("image('{folder}/junk.png')", "not a picture"),
        ("audio('{folder}/x.wav')", "no audio tower, only image, text"),
        ("text(3)", "takes text"),
    ],
)
def test_what_cannot_be_embedded_is_said(table: Table, tmp_path: Path, expression: str, message: str) -> None:
    (tmp_path / "junk.png").write_bytes(b"junk" * 10)
    with pytest.raises(QueryError, match=message):
        table.sql(f"SELECT distance(image_vec, {expression.format(folder=tmp_path)}) FROM things")


def test_an_encoder_that_changed_in_its_folder_is_refused(make_table: Callable[..., Any], tiny_encoder: Path) -> None:
    table = open_table(make_table(5, dim=8, fingerprint="0" * 32, encoder=str(tiny_encoder)).uri)
    with pytest.raises(QueryError, match=r"made by encoder 000000000000, but the folder now holds.*re-embed"):
        table.sql("SELECT distance(image_vec, text('red')) FROM things")


def test_an_encoder_that_is_gone_is_named(make_table: Callable[..., Any], tmp_path: Path) -> None:
    table = open_table(make_table(5, dim=8, encoder=str(tmp_path / "gone")).uri)
    with pytest.raises(ConjoinError, match="gone"):
        table.sql("SELECT distance(image_vec, text('red')) FROM things")
    nowhere = open_table(make_table(5, dim=8, uri=f"{tmp_path}/nowhere.lance").uri)
    with pytest.raises(QueryError, match="does not say where"):
        nowhere.sql("SELECT distance(image_vec, text('red')) FROM nowhere")


def test_a_row_without_that_modality_has_no_vector(make_table: Callable[..., Any]) -> None:
    table = open_table(make_table(4, dim=4, nulls=4).uri)
    with pytest.raises(QueryError, match="that row has no image_vec"):
        table.sql("SELECT distance(image_vec, vector_of('row-0-000001')) FROM things")


@pytest.mark.parametrize("value", [[3, 0, 4], (3.0, 0.0, 4.0), np.array([3, 0, 4], np.float16)])
def test_numbers_become_unit_vectors(value: object) -> None:
    np.testing.assert_allclose(unit(value, COLUMN), [0.6, 0, 0.8], rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "has 3 dimensions, the vector given has 2"),
        ([[1, 2, 3]], r"given has \(1, 3\)"),
        ([0, 0, 0], "zero"),
        ([1, float("nan"), 0], "NaN or infinity"),
        (["a", "b", "c"], "not a list of numbers"),
        (None, "dimensions|numbers"),
    ],
)
def test_what_is_no_vector(value: object, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        unit(value, COLUMN)
