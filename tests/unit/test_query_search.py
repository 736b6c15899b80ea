"""Top-k answers against brute force: scans, exact search, and an index that was measured; NULL, NaN, ties, OFFSET."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from conjoin.pipeline import index, store
from conjoin.pipeline.query import Table, open_table, search

DIM = 32
ROWS = 12_000


@dataclass(frozen=True, slots=True)
class Indexed:
    """A table with an index, and what is in it."""

    table: Table
    made: Any
    reports: tuple[index.IndexReport, ...]


@pytest.fixture(scope="module")
def indexed(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Indexed:
    made = make_table_at(f"{tmp_path_factory.mktemp('ann')}/things.lance", ROWS, DIM, columns=("image_vec",))
    reports = index.build(made.uri, store.TableConfig(path=made.uri), exact_floats=100_000)
    return Indexed(open_table(made.uri, None), made, reports)


@pytest.fixture
def never_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tables are searched as large ones are."""
    monkeypatch.setattr(search, "_SCAN_FLOATS", 0)


def brute(vectors: np.ndarray, query: np.ndarray, keep: np.ndarray, k: int, offset: int = 0) -> np.ndarray:
    """(k,) sorted distances of the nearest rows that are kept."""
    distances = 1 - vectors[keep] @ (query / np.linalg.norm(query))
    return np.sort(distances[np.isfinite(distances)])[offset : offset + k]


def queries(num: int, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(num, dim))


def near(made: Any, num: int) -> np.ndarray:
    """Queries in the neighbourhood of rows."""
    rng = np.random.default_rng(8)
    rows = made.vectors["image_vec"][rng.integers(ROWS, size=num)]
    return rows + 0.1 * rng.normal(size=rows.shape)


def recall(indexed: Indexed, where: str, keep: np.ndarray, k: int = 10) -> float:
    found = []
    for query in near(indexed.made, 30):
        sql = f"SELECT id, distance(image_vec, $v) AS d FROM things WHERE {where} ORDER BY d LIMIT {k}"
        got = indexed.table.sql(sql, {"v": query}).to_arrow()["d"].to_numpy()
        expected = brute(indexed.made.vectors["image_vec"], query, keep, k)
        assert len(got) == len(expected)
        found.append(float((got <= expected[-1] + 1e-5).mean()))
    return float(np.mean(found))


def test_the_index_is_used_and_says_so(indexed: Indexed) -> None:
    sql = "SELECT id FROM things WHERE price < 90 ORDER BY distance(image_vec, $v) LIMIT 5"
    told = indexed.table.explain(sql, {"v": queries(1)[0]})
    assert "index search" in told
    assert "filter in Lance: (`price` < 90.0)" in told


@pytest.mark.usefixtures("never_scan")
@pytest.mark.parametrize(
    ("where", "share"), [("true", 1.0), ("stock < 1000", 0.05), ("stock < 100", 0.005), ("stock < 40", 0.002)]
)
def test_a_selective_filter_loses_no_rows(indexed: Indexed, where: str, share: float) -> None:
    keep = indexed.made.rows["stock"].to_numpy() < share * ROWS
    sql = f"SELECT id FROM things WHERE {where} ORDER BY distance(image_vec, $v) LIMIT 10"
    assert "index search" in indexed.table.explain(sql, {"v": queries(1)[0]})
    assert recall(indexed, where, keep) >= 0.97  # 300 answers; losing rows gave .94 to .32


def test_distances_shown_are_exact_not_those_of_the_index(indexed: Indexed) -> None:
    vectors = indexed.made.vectors["image_vec"]
    for query in near(indexed.made, 5):
        sql = "SELECT id, distance(image_vec, $v) AS d FROM things ORDER BY d LIMIT 10"
        for row in indexed.table.sql(sql, {"v": query}):
            exact = 1 - vectors[int(str(row["id"])[-6:])] @ (query / np.linalg.norm(query))
            assert row["d"] == pytest.approx(exact, abs=1e-5)


def test_a_threshold_is_cut_on_exact_distances(indexed: Indexed) -> None:
    query = near(indexed.made, 1)[0]
    expected = brute(indexed.made.vectors["image_vec"], query, np.ones(ROWS, bool), ROWS)
    limit = float(expected[200])
    sql = f"SELECT id FROM things WHERE distance(image_vec, $v) < {limit} ORDER BY distance(image_vec, $v) LIMIT 1000"
    assert len(indexed.table.sql(sql, {"v": query})) == pytest.approx(200, abs=1)


@pytest.mark.parametrize(("k", "offset"), [(5, 0), (5, 30), (200, 0), (1000, 500), (5, ROWS - 3), (5, ROWS)])
def test_offset_and_large_limits_never_return_fewer_rows(indexed: Indexed, k: int, offset: int) -> None:
    query = near(indexed.made, 1)[0]
    sql = f"SELECT distance(image_vec, $v) AS d FROM things ORDER BY d LIMIT {k} OFFSET {offset}"
    got = indexed.table.sql(sql, {"v": query}).to_arrow()["d"].to_numpy()
    expected = brute(indexed.made.vectors["image_vec"], query, np.ones(ROWS, bool), k, offset)
    assert len(got) == len(expected)
    if len(got):
        np.testing.assert_allclose(got[0], expected[0], atol=0.02)


def test_a_residual_filter_is_answered_exactly(indexed: Indexed) -> None:
    query = near(indexed.made, 1)[0]
    keep = indexed.made.rows["stock"].to_numpy() % 50 == 3
    sql = "SELECT distance(image_vec, $v) AS d FROM things WHERE stock % 50 = 3 AND price >= -1 ORDER BY d LIMIT 10"
    got = indexed.table.sql(sql, {"v": query}).to_arrow()["d"].to_numpy()
    np.testing.assert_allclose(got, brute(indexed.made.vectors["image_vec"], query, keep, 10), atol=1e-5)


def test_rows_after_the_index_are_found(indexed: Indexed) -> None:
    query = -near(indexed.made, 1)[0]
    row = indexed.made.rows.slice(0, 1)
    unit = (query / np.linalg.norm(query)).astype(np.float32)
    vector = pa.FixedSizeListArray.from_arrays(pa.array(unit), DIM)
    position = row.schema.get_field_index("image_vec")
    row = row.set_column(position, row.schema.field(position), vector).set_column(0, "id", pa.array(["new"]))
    lance.write_dataset(row.cast(lance.dataset(indexed.made.uri).schema), indexed.made.uri, mode="append")
    table = open_table(indexed.made.uri, None)
    assert table.sql("SELECT id FROM things ORDER BY distance(image_vec, $v) LIMIT 1", {"v": query}).to_pylist() == [
        {"id": "new"}
    ]


def write(path: Path, vectors: Sequence[Sequence[float] | None], dtype: str = "float32") -> Table:
    kind = pa.list_(pa.type_for_alias(dtype), 2)
    facts = {"fingerprint": "a" * 32, "modality": "image", "metric": "cosine", "dim": "2", "encoder": ""}
    field = pa.field("image_vec", kind, metadata={f"conjoin:{k}": v for k, v in facts.items()})
    filled = [None if v is None else np.asarray(v, kind.value_type.to_pandas_dtype()) for v in vectors]
    rows = {"id": pa.array([f"{i:03d}" for i in range(len(vectors))]), "image_vec": pa.array(filled, kind)}
    schema = pa.schema([pa.field("id", pa.string()), field])
    lance.write_dataset(pa.table(rows, schema=schema), f"{path}/t.lance", data_storage_version="2.2")
    return open_table(f"{path}/t.lance", None)


def circle(num: int) -> list[list[float]]:
    return [[float(np.cos(a)), float(np.sin(a))] for a in np.linspace(0, 3, num)]


@pytest.mark.usefixtures("never_scan")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_null_nan_and_zero_vectors_come_last_and_are_not_lost(tmp_path: Path, dtype: str) -> None:
    vectors: list[Sequence[float] | None] = [None, [np.nan, np.nan], [0.0, 0.0], *circle(60), None]
    table = write(tmp_path, vectors, dtype)
    sql = "SELECT id, distance(image_vec, [1, 0]) AS d FROM t ORDER BY d, id LIMIT {}"
    assert [row["id"] for row in table.sql(sql.format(3))] == ["003", "004", "005"]
    everything = table.sql(sql.format(100)).to_pylist()
    assert len(everything) == 64
    assert {row["id"] for row in everything[60:]} == {"000", "001", "002", "063"}
    assert [row["id"] for row in everything[-2:]] == ["000", "063"]
    assert all(row["d"] is None for row in everything[-2:])


@pytest.mark.usefixtures("never_scan")
def test_ties_at_the_last_rank_follow_the_further_keys(tmp_path: Path) -> None:
    table = write(tmp_path, [*circle(200)[20:], *[[1.0, 0.0]] * 100])
    for query in ("[1, 0]", "[2, 0]"):
        sql = f"SELECT id FROM t ORDER BY distance(image_vec, {query}), id DESC LIMIT 5"
        assert [row["id"] for row in table.sql(sql)] == ["279", "278", "277", "276", "275"]


@pytest.mark.usefixtures("never_scan")
def test_pages_of_ties_do_not_overlap(tmp_path: Path) -> None:
    table = write(tmp_path, [*[[1.0, 0.0]] * 50, *circle(50)[1:]])
    sql = "SELECT id FROM t ORDER BY distance(image_vec, [1, 0]), id LIMIT 10 OFFSET {}"
    ids = [row["id"] for page in range(0, 50, 10) for row in table.sql(sql.format(page))]
    assert ids == [f"{i:03d}" for i in range(50)]


@pytest.mark.usefixtures("never_scan")
def test_a_filter_that_leaves_fewer_rows_than_the_limit(make_table: Callable[..., Any]) -> None:
    made = make_table(300, dim=4, nulls=30)
    table = open_table(made.uri)
    for where, count in (("stock < 3", 3), ("stock < 0", 0), ("image_vec IS NULL", 20)):
        sql = f"SELECT id FROM things WHERE {where} ORDER BY distance(image_vec, [1, 0, 0, 0]) LIMIT 20"
        assert len(table.sql(sql)) == count


@pytest.mark.usefixtures("never_scan")
def test_half_floats_are_searched_and_shown_as_floats(make_table: Callable[..., Any]) -> None:
    made = make_table(300, dim=4, dtype="float16")
    table = open_table(made.uri)
    query = queries(1, 4)[0]
    rows = table.sql("SELECT image_vec, distance(image_vec, $v) AS d FROM things ORDER BY d LIMIT 5", {"v": query})
    expected = brute(made.vectors["image_vec"], query, np.ones(300, bool), 5)
    np.testing.assert_allclose(rows.to_arrow()["d"].to_numpy(), expected, atol=2e-3)
    assert rows.to_arrow().schema.field("image_vec").type.value_type == pa.float32()


def test_choices_by_size(indexed: Indexed) -> None:
    def way(limit: int, where: str = "true") -> str:
        sql = f"SELECT id FROM things WHERE {where} ORDER BY distance(image_vec, $v) LIMIT {limit}"
        return indexed.table.explain(sql, {"v": queries(1)[0]}).steps[0].way

    assert way(10) == "index search"
    assert way(10, "stock < 500") == "exact scan"
    assert way(4500, "stock < 8800") == "exact nearest-neighbour search"
