from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from conjoin.jobs import render
from conjoin.pipeline import calibration, evaluate
from conjoin.pipeline.embedder import read_spec
from conjoin.pipeline.errors import ConfigError, SourceError, TableError
from conjoin.pipeline.evaluate import Classes, Measure, Vectors, compare


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def aligned() -> dict[str, Vectors]:
    """Six pictures of four captions; each picture lies on its caption's axis."""
    captions = np.array([0, 0, 1, 1, 2, 3])
    vectors = np.eye(4, dtype=np.float32)[captions]
    return {"image": Vectors(vectors, captions, np.arange(6)), "text": Vectors(vectors, captions, captions)}


def test_a_caption_of_two_pictures_is_asked_once(aligned: dict[str, Vectors]) -> None:
    found = {(d.query, d.candidate): d for d in compare(aligned)}
    assert found["text", "image"].num_queries == 4
    assert found["image", "text"].num_queries == 6
    assert found["text", "image"].hit_at[1].value == 1
    assert found["text", "image"].mrr.value == 1  # two right pictures tied at the top are found at once


def test_queries_without_a_right_candidate_are_left_out(aligned: dict[str, Vectors]) -> None:
    text = aligned["text"]
    odd = Vectors(text.vectors_ND, np.array([0, 0, 1, 1, 2, 99]), np.array([0, 0, 1, 1, 2, 99]))
    found = {(d.query, d.candidate): d for d in compare({"image": aligned["image"], "text": odd})}
    assert found["text", "image"].num_queries == 3
    assert found["image", "text"].num_candidates == 6


def test_random_vectors_hit_at_chance() -> None:
    rng = np.random.default_rng(0)
    ids = np.arange(1000)
    sets = {name: Vectors(unit(rng.normal(size=(1000, 8))), ids, ids) for name in ("image", "text")}
    for direction in compare(sets):
        assert direction.hit_at[10].low <= 0.01 <= direction.hit_at[10].high
        assert direction.chance_at == pytest.approx({1: 0.001, 5: 0.005, 10: 0.01})


def test_chance_knows_that_several_candidates_may_be_right(aligned: dict[str, Vectors]) -> None:
    found = {(d.query, d.candidate): d for d in compare(aligned)}
    assert found["text", "image"].chance_at[1] == pytest.approx((2 / 6 + 2 / 6 + 1 / 6 + 1 / 6) / 4)
    assert found["text", "image"].chance_at[5] == pytest.approx((1 + 1 + 5 / 6 + 5 / 6) / 4)


@pytest.mark.parametrize(("queries", "asked"), [(100, 100), (0, 300), (301, 300)], ids=["some", "all", "more"])
def test_queries_beyond_the_wanted_number_are_drawn_and_said(queries: int, asked: int) -> None:
    vectors, ids = unit(np.random.default_rng(0).normal(size=(300, 8))), np.arange(300)
    sets = {name: Vectors(vectors, ids, ids) for name in ("image", "text")}
    first, again = compare(sets, Measure(queries))[0], compare(sets, Measure(queries))[0]
    assert (first.num_queries, first.num_distinct, first.num_candidates) == (asked, 300, 300)
    assert first == again
    with pytest.raises(ConfigError, match="-1 queries"):
        Measure(-1)


def test_templates_need_a_place_for_the_class() -> None:
    with pytest.raises(ConfigError, match=r"no \{\}"):
        Classes("category", ("a photo",))


def test_null_groups_are_nobodys_positives() -> None:
    codes = evaluate._codes(pa.chunked_array([["a", None], ["a", None]]))
    assert codes[0] == codes[2]
    assert len(set(codes.tolist())) == 3


@pytest.fixture
def table(tmp_path: Path) -> str:
    import lance

    vectors = unit(np.random.default_rng(1).normal(size=(50, 4)))
    meta = {"conjoin:fingerprint": "f", "conjoin:metric": "cosine", "conjoin:dim": "4", "conjoin:encoder": "none"}
    columns, fields = [pa.array([f"r{i}" for i in range(50)])], [pa.field("id", pa.string())]
    for modality in ("image", "text"):
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 4, mask=pa.array(np.arange(50) == 7))
        columns += [column, pa.array([bytes([i]) * 16 for i in range(50)], pa.binary(16))]
        kind = pa.list_(pa.float32(), 4)
        fields.append(pa.field(f"{modality}_vec", kind, metadata={**meta, "conjoin:modality": modality}))
        fields.append(pa.field(f"{modality}_hash", pa.binary(16)))
    dataset = lance.write_dataset(pa.table(columns, schema=pa.schema(fields)), tmp_path / "t.lance")
    dataset.tags.create("live", dataset.version)
    return str(tmp_path / "t.lance")


def test_a_table_is_evaluated_where_a_condition_holds(table: str) -> None:
    found = evaluate.evaluate_table(table, "id <> 'r0'")
    assert found.direction("text", "image").num_candidates == 48  # one left out, one without a vector
    assert found.direction("text", "image").hit_at[1].value == 1


@pytest.mark.parametrize(("where", "message"), [("nosuch = 1", "nosuch"), ("id = 'none'", "no rows")])
def test_conditions_that_find_nothing_are_errors(table: str, where: str, message: str) -> None:
    with pytest.raises(TableError, match=message):
        evaluate.evaluate_table(table, where)


def test_rows_held_out_by_a_condition_calibrate_the_encoder(
    make_table: Callable[..., Any], tiny_encoder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    fingerprint = read_spec(folder)[1]
    uri = make_table(200, dim=8, fingerprint=fingerprint, encoder=str(folder)).uri
    measure = evaluate.Measure(calibrate=True)
    with pytest.raises(SourceError, match=r"fewer than 50 matching pairs.*--where"):
        evaluate.evaluate_table(uri, "stock < 40", measure=measure)
    rows = lance.dataset(uri).to_table()
    same = rows["image_vec"].combine_chunks()
    alike = rows.set_column(rows.schema.get_field_index("text_vec"), rows.schema.field("text_vec"), same)
    dataset = lance.write_dataset(alike, uri, mode="overwrite")
    dataset.tags.update("live", dataset.version)
    found = evaluate.evaluate_table(uri, "stock < 150", measure=measure)
    assert found.calibration == calibration.read(str(folder), fingerprint)
    assert found.calibration["image_text"].num_pairs == 150
    assert "relevance of image_text: even odds at a similarity of" in render.evaluation(found)
    other = make_table(200, dim=8, uri=f"{tmp_path}/o.lance", fingerprint="a" * 32, encoder=str(folder)).uri
    with pytest.raises(TableError, match="holds another encoder"):
        evaluate.evaluate_table(other, measure=measure)
