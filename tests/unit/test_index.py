"""Indexes by size, measured against exact search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from conjoin.pipeline import index, measures, recall, storage, store

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
    monkeypatch.setattr(measures, "QUERIES", 12)


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
    expected = index.Setting(report.nprobes, report.refine, report.num_partitions, complete=True)
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


def indexed(uri: str, recall: float = 0.9, columns: list[str] | None = None) -> dict[str, index.IndexReport]:
    return by_column(index.build(uri, config(uri, recall), columns, exact_floats=1000))


@pytest.fixture
def one_column(make_table: Callable[..., Any], tmp_path: Path) -> Callable[[int, int], pa.Table]:
    """rows(number, seed): of 16 dimensions."""

    def rows(number: int, seed: int) -> pa.Table:
        return make_table(number, dim=16, seed=seed, columns=("image_vec",), uri=f"{tmp_path}/rows-{seed}.lance").rows

    return rows


@pytest.mark.usefixtures("few_queries")
def test_a_night_adds_a_delta_and_reads_no_whole_column(
    one_column: Callable[[int, int], pa.Table], nights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nights.first(one_column(2000, 0))
    first = indexed(nights.uri)
    nights.publish()
    monkeypatch.setattr(measures, "_batches", lambda *_: pytest.fail("a whole column was read"))
    nights.next("r2", insert=one_column(40, 1), delete=["row-0-000003"])
    found = indexed(nights.uri)
    assert {name: (report.action, report.parts) for name, report in found.items()} == {
        "id": ("extended", 0),
        "image_vec": ("extended", 2),
    }
    assert set(unindexed(nights.uri).values()) == {0}
    report = found["image_vec"]
    assert (report.built_rows, report.num_rows) == (first["image_vec"].num_rows, 2039)
    assert (report.recall or 0) >= 0.9


@pytest.mark.usefixtures("few_queries")
def test_a_night_of_prices_leaves_the_vector_index_alone(
    one_column: Callable[[int, int], pa.Table], nights: Any
) -> None:
    rows = one_column(1000, 0)
    nights.first(rows)
    indexed(nights.uri)
    nights.publish()
    nights.next("r2", columns=pa.table({"id": rows["id"][:300], "price": [2.5] * 300}))
    assert unindexed(nights.uri) == {"id_idx": 0, "image_vec_idx": 0}
    assert indexed(nights.uri)["image_vec"].action == "kept"


@pytest.mark.usefixtures("few_queries")
def test_vectors_written_anew_are_found_where_they_are_now(
    one_column: Callable[[int, int], pa.Table], nights: Any
) -> None:
    """Lance takes the fragments whose column was rewritten out of the index: old vectors are not found any more."""
    rows = one_column(1000, 0)
    nights.first(rows)
    indexed(nights.uri)
    nights.publish()
    before = np.array(rows["image_vec"][:5].to_pylist(), np.float32)
    kind = rows.schema.field("image_vec").type
    turned = pa.FixedSizeListArray.from_arrays(pa.array(-before.ravel()), kind.list_size)
    nights.next("r2", columns=pa.table({"id": rows["id"][:5], "image_vec": turned}))
    assert unindexed(nights.uri)["image_vec_idx"] > 0
    assert indexed(nights.uri)["image_vec"].action == "extended"
    dataset = lance.dataset(nights.uri)
    setting = index.settings(nights.uri, dataset)["image_vec"]
    nearest = {"column": "image_vec", "k": 1, "metric": "cosine", "nprobes": setting.num_partitions, "refine_factor": 8}
    for row in range(5):
        for query, wanted in ((-before[row], True), (before[row], False)):
            found = dataset.to_table(columns=["id"], nearest={**nearest, "q": query})["id"].to_pylist()
            assert (found == [f"row-0-{row:06d}"]) is wanted


@pytest.mark.usefixtures("few_queries")
def test_many_deltas_are_merged(
    one_column: Callable[[int, int], pa.Table], nights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "MOST_PARTS", 3)
    nights.first(one_column(1000, 0))
    indexed(nights.uri)
    actions, parts = [], []
    for night in range(2, 6):
        nights.publish()
        nights.next(f"r{night}", insert=one_column(20, night))
        found = indexed(nights.uri)
        actions.append((found["id"].action, found["image_vec"].action))
        parts.append(found["image_vec"].parts)
        assert set(unindexed(nights.uri).values()) == {0}
    assert actions == [("extended",) * 2, ("extended",) * 2, ("merged",) * 2, ("extended",) * 2]
    assert parts == [2, 3, 1, 2]
    ids = [f"row-{night}-000019" for night in range(2, 6)]
    found_ids = lance.dataset(nights.uri).to_table(columns=["id"], filter=f"id IN {tuple(ids)}")["id"].to_pylist()
    assert sorted(found_ids) == ids


@pytest.mark.usefixtures("few_queries")
@pytest.mark.parametrize(("factor", "action"), [(1.5, "merged"), (1e9, "extended")], ids=["slower", "as fast"])
def test_latency_asks_for_merging(
    one_column: Callable[[int, int], pa.Table],
    nights: Any,
    monkeypatch: pytest.MonkeyPatch,
    factor: float,
    action: str,
) -> None:
    monkeypatch.setattr(index, "_SLOWER", factor)
    monkeypatch.setattr(index, "_SLOWER_MS", 0.0)
    nights.first(one_column(1000, 0))
    version = indexed(nights.uri) and lance.dataset(nights.uri).version
    path = f"{store.bookkeeping(nights.uri)}/index/{version}.json"
    report = storage.read_json(path)
    for row in report["indexes"]:  # type: ignore[attr-defined]  # a list of dicts
        row["built_ms"] = 1e-3
    storage.write_json(path, report)
    nights.publish()
    nights.next("r2", insert=one_column(20, 2))
    assert indexed(nights.uri)["image_vec"].action == action


@pytest.mark.usefixtures("few_queries")
@pytest.mark.parametrize(("merging_helps", "action"), [(True, "merged"), (False, "built")])
def test_recall_asks_for_merging_then_for_building(
    one_column: Callable[[int, int], pa.Table],
    nights: Any,
    monkeypatch: pytest.MonkeyPatch,
    merging_helps: bool,
    action: str,
) -> None:
    nights.first(one_column(1000, 0))
    indexed(nights.uri)
    nights.publish()
    nights.next("r2", insert=one_column(20, 2))
    original, asked = index._reached, []

    def reached(*args: Any) -> recall.Reached | None:
        asked.append(args)
        return None if len(asked) <= (1 if merging_helps else 2) else original(*args)

    monkeypatch.setattr(index, "_reached", reached)
    found = indexed(nights.uri)["image_vec"]
    assert (found.action, found.parts) == (action, 1)


@pytest.mark.usefixtures("few_queries")
def test_a_table_that_outgrew_its_partitions_is_indexed_anew(
    one_column: Callable[[int, int], pa.Table], nights: Any
) -> None:
    nights.first(one_column(300, 0))
    small = indexed(nights.uri)["image_vec"]
    nights.publish()
    nights.next("r2", insert=one_column(1000, 2))
    found = indexed(nights.uri)["image_vec"]
    assert (found.action, found.built_rows, found.parts) == ("built", 1300, 1)
    assert found.num_partitions > small.num_partitions


@pytest.mark.usefixtures("few_queries")
def test_a_new_encoders_column_is_indexed_before_it_is_renamed(
    one_column: Callable[[int, int], pa.Table], nights: Any
) -> None:
    rows = one_column(1000, 0)
    nights.first(rows)
    indexed(nights.uri)
    for number, fingerprint in enumerate(("a" * 32, "b" * 32), start=2):
        nights.publish()
        metadata = {**rows.schema.field("image_vec").metadata, b"conjoin:fingerprint": fingerprint.encode()}
        kind = rows.schema.field("image_vec").type
        field = pa.field("image_vec__next", kind, metadata=metadata)
        lance.dataset(nights.uri).add_columns(pa.schema([field]))
        turned = pa.FixedSizeListArray.from_arrays(
            pa.array(np.roll(np.array(rows["image_vec"].to_pylist(), np.float32), number, axis=1).ravel()), 16
        )
        nights.next(f"r{number}", columns=pa.table({"id": rows["id"], "image_vec__next": turned}))
        ahead = indexed(nights.uri, columns=["image_vec__next"])
        assert list(ahead) == ["image_vec__next"]
        assert ahead["image_vec__next"].action == "built"
        lance.dataset(nights.uri).drop_columns(["image_vec"])
        lance.dataset(nights.uri).alter_columns({"path": "image_vec__next", "name": "image_vec"})
        swapped = lance.dataset(nights.uri)
        expected = replace(ahead["image_vec__next"].setting, complete=True)
        assert index.settings(nights.uri, swapped)["image_vec"] == expected
        found = indexed(nights.uri)["image_vec"]
        assert (found.action, found.fingerprint, found.parts) == ("kept", fingerprint, 1)
        assert set(unindexed(nights.uri).values()) == {0}
