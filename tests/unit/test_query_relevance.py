"""relevance(): the curve of the right pair of modalities, in every place, and errors that say how to calibrate."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conjoin.pipeline import calibration
from conjoin.pipeline.calibration import Curve
from conjoin.pipeline.errors import EncoderError, QueryError
from conjoin.pipeline.query import Table, open_table, search

ACROSS, WITHIN = Curve(12.5, -3.0, 900, 0.01), Curve(30.0, -21.0, 800, 0.02)


@pytest.fixture(scope="module")
def encoder(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that is calibrated for words against pictures, and pictures against pictures."""
    from conjoin.pipeline.embedder import read_spec

    folder = shutil.copytree(tiny_encoder, tmp_path_factory.mktemp("calibrated") / "encoder")
    curves = {"image_text": ACROSS, "image_image": WITHIN}
    calibration.write(str(folder), read_spec(folder)[1], curves, "made up")
    return folder


@pytest.fixture(scope="module")
def made(encoder: Path, make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    from conjoin.pipeline.embedder import read_spec

    uri = f"{tmp_path_factory.mktemp('relevant')}/things.lance"
    return make_table_at(uri, 400, 8, nulls=40, fingerprint=read_spec(encoder)[1], encoder=str(encoder))


@pytest.fixture(scope="module")
def table(made: Any) -> Table:
    return open_table(made.uri)


def logistic(curve: Curve, similarity: float) -> float:
    return float(1 / (1 + np.exp(-(curve.slope * similarity + curve.bias))))


def test_it_is_the_curve_of_the_similarity(table: Table) -> None:
    sql = "SELECT similarity(image_vec, text('cat')) AS s, relevance(image_vec, text('cat')) AS r FROM things"
    rows = table.sql(sql).to_pylist()
    assert sum(row["r"] is None for row in rows) == 40
    for row in rows:
        if row["s"] is not None:
            assert row["r"] == pytest.approx(logistic(ACROSS, row["s"]), abs=1e-6)


@pytest.mark.parametrize(
    ("other", "curve"),
    [
        ("text('cat')", ACROSS),
        ("t.text_vec", ACROSS),
        ("vector_of('row-0-7')", WITHIN),
        ("u.image_vec", WITHIN),
    ],
)
def test_the_curve_is_that_of_both_modalities(table: Table, made: Any, other: str, curve: Curve) -> None:
    one, two = np.flatnonzero(~np.isnan(made.vectors["image_vec"] + made.vectors["text_vec"]).any(axis=1))[:2]
    other = other.replace("7", f"{one:06d}")
    sql = (
        f"SELECT similarity(t.image_vec, {other}) AS s, relevance(t.image_vec, {other}) AS r "
        f"FROM things t JOIN things u ON u.id = 'row-0-{one:06d}' WHERE t.id = 'row-0-{two:06d}'"
    )
    row = table.sql(sql).to_pylist()[0]
    assert row["r"] == pytest.approx(logistic(curve, row["s"]), abs=1e-6)


@pytest.mark.parametrize(
    "order", ["relevance(image_vec, text('cat')) DESC", "r DESC", "2 DESC", "relevance(text('cat'), image_vec) DESC"]
)
def test_its_order_is_answered_by_the_nearest_rows(table: Table, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    monkeypatch.setattr(search, "_SCAN_FLOATS", 0)
    sql = f"SELECT id, relevance(image_vec, text('cat')) AS r FROM things ORDER BY {order} LIMIT 5"
    assert "nearest-neighbour search" in table.explain(sql)
    nearest = "SELECT id FROM things ORDER BY distance(image_vec, text('cat')) LIMIT 5"
    assert [row["id"] for row in table.sql(sql)] == [row["id"] for row in table.sql(nearest)]
    assert "exact scan" in table.explain(sql.replace(" DESC", ""))


def test_ties_far_above_the_curve_follow_the_further_keys(
    table: Table, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest rows would be the wrong ones: all relevances are 1, and the ids decide."""
    from conjoin.pipeline.embedder import read_spec

    monkeypatch.setattr(search, "_SCAN_FLOATS", 0)
    calibration.write(str(encoder), read_spec(encoder)[1], {"image_text": Curve(1.0, 50.0, 900, 0.0)}, "made up")
    try:
        sql = "SELECT id FROM things ORDER BY relevance(image_vec, text('cat')) DESC, id LIMIT 3"
        first = "SELECT id FROM things WHERE image_vec IS NOT NULL ORDER BY id LIMIT 3"
        assert table.sql(sql).to_pylist() == table.sql(first).to_pylist()
    finally:
        curves = {"image_text": ACROSS, "image_image": WITHIN}
        calibration.write(str(encoder), read_spec(encoder)[1], curves, "made up")


def test_it_stands_in_conditions_and_aggregates(table: Table) -> None:
    sql = (
        "SELECT count(*) AS n, avg(relevance(image_vec, text('cat'))) * 2 AS twice FROM things "
        "WHERE relevance(image_vec, text('cat')) > 0.02"
    )
    rows = [
        r["r"] for r in table.sql("SELECT relevance(image_vec, text('cat')) AS r FROM things") if r["r"] is not None
    ]
    kept = [float(str(r)) for r in rows if float(str(r)) > 0.02]
    found = table.sql(sql).to_pylist()[0]
    assert found["n"] == len(kept)
    assert found["twice"] == pytest.approx(2 * np.mean(kept), rel=1e-6)
    assert table.sql("SELECT relevance(image_vec, text('cat')) FROM things LIMIT 1").columns == ["relevance"]


def test_an_encoder_without_a_calibration_says_how(
    make_table: Callable[..., Any], tiny_encoder: Path, tmp_path: Path
) -> None:
    from conjoin.pipeline.embedder import read_spec

    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    fingerprint = read_spec(folder)[1]
    table = open_table(make_table(5, dim=8, fingerprint=fingerprint, encoder=str(folder)).uri)
    sql = "SELECT relevance(image_vec, text('cat')) FROM things"
    with pytest.raises(QueryError, match=r"image and text is not calibrated.*conjoin evaluate --calibrate"):
        table.sql(sql)
    calibration.write(str(folder), fingerprint, {"image_text": ACROSS}, "made up")
    assert len(table.sql(sql)) == 5
    with pytest.raises(QueryError, match=r"image and image is not calibrated.*source.group"):
        table.sql("SELECT relevance(image_vec, vector_of('row-0-000001')) FROM things")
    calibration.write(str(folder), "f" * 32, {"image_text": ACROSS}, "made up")
    with pytest.raises(EncoderError, match="of another encoder"):
        table.sql(sql)


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT relevance(image_vec) FROM things", "takes a vector column and a vector"),
        ("SELECT relevance(price, text('a')) FROM things", "needs a vector column"),
        ("SELECT relevance(image_vec, [1, 0, 0, 0, 0, 0, 0, 0]) FROM things", "cannot be told for a vector of numbers"),
    ],
)
def test_what_has_no_relevance(table: Table, sql: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        table.sql(sql)
