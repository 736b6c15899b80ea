"""Indexes by size, measured against exact search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from conjoin.pipeline import index, storage, store

MANY = 20_000


def config(uri: str, recall: float = 0.99) -> store.TableConfig:
    return store.TableConfig(path=uri, ann_recall=recall)


def by_column(reports: tuple[index.IndexReport, ...]) -> dict[str, index.IndexReport]:
    return {report.column: report for report in reports}


def unindexed(uri: str) -> dict[str, int]:
    dataset = lance.dataset(uri)
    return {i.name: dataset.stats.index_stats(i.name)["num_unindexed_rows"] for i in dataset.describe_indices()}


@pytest.fixture(scope="module")
def built(
    make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, tuple[index.IndexReport, ...]]:
    made = make_table_at(f"{tmp_path_factory.mktemp('index')}/things.lance", MANY, 32, columns=("image_vec",))
    return made, index.build(made.uri, config(made.uri), exact_floats=1000)


@pytest.fixture
def few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the figure itself is not looked at closely."""
    monkeypatch.setattr(index, "_QUERIES", 12)


def test_a_small_table_has_an_index_on_id_alone(make_table: Callable[..., Any]) -> None:
    made = make_table(200, dim=8)
    found = by_column(index.build(made.uri, config(made.uri)))
    assert {name: report.kind for name, report in found.items()} == {
        "id": "BTREE",
        "image_vec": "none",
        "text_vec": "none",
    }
    assert found["image_vec"].recall == 1.0
    assert unindexed(made.uri) == {"id_idx": 0}
    dataset = lance.dataset(made.uri)
    assert "ScalarIndex" in dataset.scanner(columns=["id"], filter="id = 'row-0-000003'").explain_plan()
    assert dict(index.settings(made.uri, dataset)) == {}


def test_a_large_column_gets_an_index_that_reaches_the_target(
    built: tuple[Any, tuple[index.IndexReport, ...]],
) -> None:
    made, reports = built
    report = by_column(reports)["image_vec"]
    assert (report.kind, report.num_rows) == (index.KIND, MANY)
    assert report.recall is not None
    assert report.recall >= 0.99
    assert 0 < report.nprobes <= report.num_partitions == index.num_partitions(MANY)
    assert unindexed(made.uri) == {"id_idx": 0, "image_vec_idx": 0}


@pytest.mark.usefixtures("few_queries")
def test_every_column_of_the_encoder_asks(make_table: Callable[..., Any]) -> None:
    made = make_table(600, dim=8)
    found = by_column(index.build(made.uri, config(made.uri, 0.9), exact_floats=1000))
    assert [found[name].kind for name in ("image_vec", "text_vec")] == [index.KIND] * 2
    assert min(found[name].recall or 0 for name in ("image_vec", "text_vec")) >= 0.9
    assert unindexed(made.uri) == {"id_idx": 0, "image_vec_idx": 0, "text_vec_idx": 0}


def test_the_reported_recall_is_that_of_other_queries_too(built: tuple[Any, tuple[index.IndexReport, ...]]) -> None:
    made, reports = built
    report = by_column(reports)["image_vec"]
    dataset, vectors = lance.dataset(made.uri), made.vectors["image_vec"]
    rng = np.random.default_rng(99)
    hits = []
    for row in rng.choice(MANY, 40, replace=False):
        query = vectors[row] + 0.05 * rng.normal(size=32).astype(np.float32)
        nearest = {
            "column": "image_vec",
            "q": query,
            "k": 10 * report.refine,
            "metric": "cosine",
            "minimum_nprobes": report.nprobes,
            "maximum_nprobes": report.nprobes,
        }
        ids = dataset.to_table(columns=["id"], nearest=nearest)["id"].to_pylist()
        exact = np.argsort(-vectors @ query)[:10]
        hits.append(len({int(i[-6:]) for i in ids} & set(exact.tolist())) / 10)
    assert np.mean(hits) >= 0.96


def test_building_again_changes_nothing(built: tuple[Any, tuple[index.IndexReport, ...]]) -> None:
    made, reports = built
    version = lance.dataset(made.uri).version
    assert index.build(made.uri, config(made.uri), exact_floats=1000) == reports
    assert lance.dataset(made.uri).version == version


def test_settings_are_those_measured_and_belong_to_their_version(
    built: tuple[Any, tuple[index.IndexReport, ...]],
) -> None:
    made, reports = built
    dataset = lance.dataset(made.uri)
    report = by_column(reports)["image_vec"]
    expected = index.Setting(report.nprobes, report.refine, report.num_partitions)
    assert index.settings(made.uri, dataset)["image_vec"] == expected
    assert dict(index.settings(made.uri, lance.dataset(made.uri, version=1))) == {}


def test_an_index_of_somebody_else_is_used_with_care(make_table: Callable[..., Any]) -> None:
    made = make_table(600, dim=8, columns=("image_vec",))
    dataset = lance.dataset(made.uri)
    dataset.create_index("image_vec", "IVF_FLAT", metric="cosine", num_partitions=4)
    setting = index.settings(made.uri, lance.dataset(made.uri))["image_vec"]
    assert setting.num_partitions == 4
    assert setting.nprobes >= 4


@pytest.mark.usefixtures("few_queries")
def test_new_rows_are_added_to_the_index(make_table: Callable[..., Any]) -> None:
    made = make_table(2000, dim=16, columns=("image_vec",))
    index.build(made.uri, config(made.uri, 0.9), exact_floats=1000)
    make_table(300, dim=16, columns=("image_vec",), mode="append", seed=5, live=False)
    assert unindexed(made.uri) == {"id_idx": 300, "image_vec_idx": 300}
    found = by_column(index.build(made.uri, config(made.uri, 0.9), exact_floats=1000))
    assert unindexed(made.uri) == {"id_idx": 0, "image_vec_idx": 0}
    assert found["image_vec"].num_rows == 2300
    assert (found["image_vec"].recall or 0) >= 0.9


@pytest.mark.usefixtures("few_queries")
def test_a_table_that_shrank_loses_its_index(make_table: Callable[..., Any]) -> None:
    made = make_table(1000, dim=16, columns=("image_vec",))
    index.build(made.uri, config(made.uri, 0.9), exact_floats=1000)
    lance.dataset(made.uri).delete("stock >= 30")
    found = by_column(index.build(made.uri, config(made.uri, 0.9), exact_floats=1000))
    assert found["image_vec"].kind == "none"
    assert unindexed(made.uri) == {"id_idx": 0}


@pytest.mark.usefixtures("few_queries")
def test_mostly_null_and_half_float_columns_are_measured(make_table: Callable[..., Any]) -> None:
    made = make_table(4000, dim=16, columns=("image_vec",), nulls=3500, dtype="float16")
    found = by_column(index.build(made.uri, config(made.uri, 0.9), exact_floats=1000))["image_vec"]
    assert (found.kind, found.num_rows) == (index.KIND, 500)
    assert (found.recall or 0) >= 0.9
    assert set(unindexed(made.uri).values()) == {0}


@pytest.mark.usefixtures("few_queries")
def test_a_killed_build_is_repeated(make_table: Callable[..., Any]) -> None:
    made = make_table(1000, dim=16, columns=("image_vec",))
    first = index.build(made.uri, config(made.uri, 0.9), exact_floats=1000)
    version = lance.dataset(made.uri).version
    storage.remove(f"{store.bookkeeping(made.uri)}/index/{version}.json")
    again = by_column(index.build(made.uri, config(made.uri, 0.9), exact_floats=1000))
    assert again["image_vec"].kind == by_column(first)["image_vec"].kind == index.KIND
    assert unindexed(made.uri) == {"id_idx": 0, "image_vec_idx": 0}


def test_nothing_is_said_on_stderr(built: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    index.settings(built[0].uri, lance.dataset(built[0].uri))
    assert capfd.readouterr().err == ""
