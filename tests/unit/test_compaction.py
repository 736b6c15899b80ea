"""Compaction of real tables with delta indexes: same rows, fewer fragments, indexes complete and right."""

from __future__ import annotations

from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest
from lance.fragment import write_fragments

from conjoin.pipeline import store
from conjoin.pipeline.compaction import compact, index_parts
from conjoin.pipeline.upkeep import Upkeep

DIM = 8
NIGHTLY = 50


def rows(first: int, count: int) -> pa.Table:
    vectors = np.random.default_rng(first).normal(size=(count, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    array = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)
    return pa.table({"id": [f"i{n:06d}" for n in range(first, first + count)], "vec": array})


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """2,000 rows in four fragments with an index on id and one on the vectors."""
    path = str(tmp_path / "t.lance")
    dataset = lance.write_dataset(rows(0, 2000), path, max_rows_per_file=500, data_storage_version="2.2")
    dataset.create_scalar_index("id", "BTREE", name="id_idx")
    dataset.create_index("vec", "IVF_SQ", name="vec_idx", metric="cosine", num_partitions=4)
    return path


def night(uri: str, number: int, *, deleted: int = 5) -> None:
    """New rows, some of the first fragments deleted, indexes extended."""
    head = lance.dataset(uri)
    fragments = head.get_fragments()[:2]
    gone = range(number * deleted, (number + 1) * deleted)
    operation = lance.LanceOperation.Update(
        updated_fragments=[fragment.delete_rows(gone) for fragment in fragments],
        new_fragments=write_fragments(rows(10_000 + number * NIGHTLY, NIGHTLY), uri, mode="append"),
    )
    lance.LanceDataset.commit(uri, operation, read_version=head.version)
    index(uri)


def index(uri: str) -> None:
    for name in ("id_idx", "vec_idx"):
        lance.dataset(uri).optimize.optimize_indices(index_names=[name], num_indices_to_merge=0)


def upkeep(**changes: object) -> Upkeep:
    return Upkeep.model_validate({"small_fragments": 4, "deleted_share": 0.5, **changes})


def recall(dataset: lance.LanceDataset) -> float:
    hits = 0
    for query in np.random.default_rng(1).normal(size=(20, DIM)).astype(np.float32):
        nearest = {"column": "vec", "q": query, "k": 10, "metric": "cosine"}
        columns = ["id", "_distance"]
        exact = dataset.to_table(columns=columns, nearest={**nearest, "use_index": False})["id"].to_pylist()
        found = dataset.to_table(columns=columns, nearest={**nearest, "nprobes": 4, "refine_factor": 4})
        hits += len(set(exact) & set(found["id"].to_pylist()))
    return hits / 200


def check(uri: str, before: pa.Table) -> None:
    """Same rows; every index complete after the night's indexing and right about every id."""
    index(uri)
    dataset = lance.dataset(uri)
    assert dataset.to_table().sort_by("id").equals(before)
    for name in ("id_idx", "vec_idx"):
        assert dataset.stats.index_stats(name)["num_unindexed_rows"] == 0
        assert set().union(*index_parts(dataset)[name]) == {f.fragment_id for f in dataset.get_fragments()}
    assert recall(dataset) > 0.95
    for key in before["id"].to_pylist()[::37]:
        assert dataset.to_table(columns=["id"], filter=f"id = '{key}'")["id"].to_pylist() == [key]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")


def test_nothing_to_do_makes_no_version(uri: str) -> None:
    night(uri, 0)
    version = lance.dataset(uri).version
    report = compact(uri, upkeep(), small_bytes=1000)
    assert (report.rewritten, report.source_mb, report.merged) == (0, 0.0, ())
    assert lance.dataset(uri).version == version == report.version


def test_small_fragments_of_many_nights_become_one(uri: str) -> None:
    for number in range(6):
        night(uri, number)
    before = lance.dataset(uri).to_table().sort_by("id")
    assert len(index_parts(lance.dataset(uri))["vec_idx"]) == 7
    # 300 rows of about 50 bytes: the nights' fragments are small, the first night's are not.
    report = compact(uri, upkeep(), small_bytes=22_000)
    assert (report.fragments_before, report.rewritten) == (10, 6)
    assert report.fragments_after == 5
    assert "vec_idx" in report.merged
    check(uri, before)
    again = compact(uri, upkeep(), small_bytes=22_000)
    assert again.rewritten == 0


def test_fragments_of_tonight_wait_for_their_index(uri: str) -> None:
    for number in range(6):
        night(uri, number)
    write = lance.write_dataset(rows(50_000, 30), uri, mode="append")
    before = write.to_table().sort_by("id")
    compact(uri, upkeep(), small_bytes=22_000)
    check(uri, before)


def test_worn_fragments_are_written_anew(uri: str) -> None:
    for number in range(3):
        night(uri, number, deleted=60)
    before = lance.dataset(uri).to_table().sort_by("id")
    report = compact(uri, upkeep(deleted_share=0.3, small_fragments=100))
    assert (report.rewritten, report.merged) == (2, ())
    dataset = lance.dataset(uri)
    assert sum(fragment.num_deletions for fragment in dataset.get_fragments()) == 0
    check(uri, before)


def test_a_night_spends_what_it_may(uri: str) -> None:
    for number in range(6):
        night(uri, number, deleted=30)
    assert compact(uri, upkeep(compact_mb=0, deleted_share=0.1)).rewritten == 0
    sizes = [sum(f.file_size_bytes for f in fragment.metadata.files) for fragment in lance.dataset(uri).get_fragments()]
    assert sum(sizes[:2]) < 10**6


def test_old_versions_keep_their_rows(uri: str) -> None:
    for number in range(6):
        night(uri, number)
    old = store.open_version(uri, None)
    before = old.to_table()
    compact(uri, upkeep(), small_bytes=22_000)
    assert store.open_version(uri, int(old.version)).to_table().equals(before)
