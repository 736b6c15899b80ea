"""The Lance table with made vectors: schema, staging, one commit, lineage, tags, tables of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from conjoin.pipeline import commits, store
from conjoin.pipeline.errors import ConjoinError, TableError

DIM = 4


def layout(**changes: object) -> store.Layout:
    made = store.Layout(
        id_type=pa.string(),
        kept=pa.schema([("price", pa.float64())]),
        modalities=("image", "text"),
        uris=("image",),
        thumbnails=False,
        vector_type=pa.list_(pa.float32(), DIM),
        fingerprint="f" * 32,
        encoder="/encoders/one",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def rows(schema: pa.Schema, ids: Sequence[str]) -> pa.Table:
    vectors = np.eye(DIM, dtype=np.float32)[np.arange(len(ids)) % DIM].reshape(-1)
    kind = schema.field("text_vec").type
    made: dict[str, pa.Array] = {"id": pa.array(ids), "price": pa.array([1.0] * len(ids))}
    for name in ("image_vec", "text_vec"):
        made[name] = pa.FixedSizeListArray.from_arrays(pa.array(vectors), type=kind)
    return pa.table([made.get(f.name, pa.nulls(len(ids), f.type)) for f in schema], schema=schema)


def work(uri: str, run_id: str, parts: Sequence[Sequence[str]], **changes: object) -> commits.Commit:
    schema, head = store.table_schema(layout(**changes)), store.head(uri)
    fragments = [commits.stage(uri, rows(schema, ids), mode="create" if head is None else "overwrite") for ids in parts]
    version = 0 if head is None else int(head.version)
    return commits.Commit(run_id, schema, fragments, version, {store.FINGERPRINT: "f" * 32, store.PLAN: "p"})


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "things.lance")


def ids_of(uri: str, version: str | int | None = None) -> list[str]:
    return list(store.open_version(uri, version).to_table(columns=["id"])["id"].to_pylist())


def test_places_beside_the_table() -> None:
    assert store.bookkeeping("s3://b/v/things.lance") == "s3://b/v/things.conjoin"
    assert store.quarantine_uri("/v/things.lance") == "/v/things__quarantine.lance"


def test_schema_order_types_and_metadata() -> None:
    schema = store.table_schema(layout(thumbnails=True))
    names = ["id", "price", "text", "image_uri", "image_thumb", "image_hash", "text_hash", "image_vec", "text_vec"]
    assert schema.names == names
    assert not schema.field("id").nullable
    assert store.columns_of_schema(schema)["image_vec"] == store.VectorColumn(
        "image_vec", "image", "f" * 32, DIM, "cosine", "/encoders/one"
    )


def test_kept_column_with_a_name_of_ours_is_refused() -> None:
    with pytest.raises(TableError, match="'text'"):
        store.table_schema(layout(kept=pa.schema([("text", pa.string())])))


def test_nothing_is_visible_before_the_commit(uri: str) -> None:
    made = work(uri, "r1", [["a", "b"], ["c"]])
    assert store.head(uri) is None
    with pytest.raises(TableError, match="no table"):
        store.open_version(uri)
    version = commits.commit(uri, made)
    table = store.open_version(uri, version)
    assert ids_of(uri) == ["a", "b", "c"]
    assert (table.data_storage_version, table.has_stable_row_ids) == (store.STORAGE_VERSION, False)
    assert store.run_of(table) == {
        "run_id": "r1",
        "fingerprint": "f" * 32,
        "plan_digest": "p",
    }


def test_commit_twice_is_one_version(uri: str) -> None:
    made = work(uri, "r1", [["a", "b"]])
    assert commits.commit(uri, made) == commits.commit(uri, made) == 1
    assert ids_of(uri) == ["a", "b"]
    assert len(lance.dataset(uri).versions()) == 1


def test_full_run_replaces_all_rows_in_one_commit(uri: str) -> None:
    commits.commit(uri, work(uri, "r1", [["a", "b"]]))
    assert commits.commit(uri, work(uri, "r2", [["b"], ["c"]])) == 2
    assert ids_of(uri) == ["b", "c"]
    assert ids_of(uri, 1) == ["a", "b"]


def test_candidate_is_read_beside_the_head(uri: str) -> None:
    first = work(uri, "r1", [["a"]])
    assert commits.candidate(uri, first) is None
    commits.commit(uri, first)
    second = work(uri, "r2", [["b", "c"]])
    candidate = commits.candidate(uri, second)
    assert candidate is not None
    assert candidate.to_table()["id"].to_pylist() == ["b", "c"]
    assert ids_of(uri) == ["a"]
    assert commits.commit(uri, second) == 2


def test_committed_looks_back_to_the_live_run_and_not_below_a_restore(uri: str) -> None:
    commits.commit(uri, work(uri, "r1", [["a"]]))
    lance.dataset(uri).tags.create(store.LIVE, 1)
    second = work(uri, "r2", [["b"]])
    commits.commit(uri, second)
    assert (store.committed(uri, "r1"), store.committed(uri, "r2")) == (1, 2)
    lance.dataset(uri).checkout_version(1).restore()
    assert (store.committed(uri, "r1"), store.committed(uri, "r2")) == (1, None)
    assert store.run_of(store.open_version(uri, None))["run_id"] == "r1"


def test_committed_is_found_below_index_versions(uri: str) -> None:
    commits.commit(uri, work(uri, "r1", [["a", "b"]]))
    lance.dataset(uri).create_scalar_index("id", "BTREE")
    lance.dataset(uri).tags.create(store.LIVE, 2)
    assert store.committed(uri, "r1") == 1
    assert store.run_of(store.open_version(uri))["run_id"] == "r1"


def test_another_run_in_between_is_refused(uri: str) -> None:
    commits.commit(uri, work(uri, "r1", [["a"]]))
    slow, quick = work(uri, "slow", [["s"]]), work(uri, "quick", [["q"]])
    commits.commit(uri, quick)
    with pytest.raises(TableError, match="run quick committed version 2"):
        commits.commit(uri, slow)
    assert ids_of(uri) == ["q"]


def test_a_table_that_appears_meanwhile_is_refused(uri: str) -> None:
    one, other = work(uri, "one", [["a"]]), work(uri, "other", [["b"]])
    commits.commit(uri, one)
    with pytest.raises(TableError, match="a table appeared"):
        commits.commit(uri, other)


def test_commit_without_any_fragment(uri: str) -> None:
    commits.commit(uri, work(uri, "r1", []))
    assert ids_of(uri) == []


def test_a_table_of_somebody_else_is_left_alone(uri: str) -> None:
    lance.write_dataset(pa.table({"id": ["x"]}), uri)
    with pytest.raises(TableError, match="not made by conjoin"):
        store.check_ours(uri)
    assert ids_of(uri) == ["x"]


def test_versions_that_are_missing_are_named(uri: str) -> None:
    commits.commit(uri, work(uri, "r1", [["a"]]))
    with pytest.raises(TableError, match="no version 'live'"):
        store.open_version(uri)
    with pytest.raises(TableError, match="no version 9"):
        store.open_version(uri, 9)


def test_an_unreadable_place_is_an_error_of_ours(tmp_path: Path) -> None:
    uri = tmp_path / "torn.lance"
    (uri / "_versions").mkdir(parents=True)
    (uri / "_versions" / "1.manifest").write_bytes(b"torn")
    with pytest.raises(ConjoinError):
        store.open_version(str(uri))


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (["text_vec"], "the table has a column 'text_vec' of its own"),
        (["ID"], "the table has a column 'ID' of its own"),
        (["_distance"], "the table has a column '_distance' of its own"),
        (["Price", "price"], "'price' is there twice, but for capitals"),
        (["size.cm"], "cannot be named 'size.cm'"),
        ([""], "cannot be named ''"),
    ],
    ids=str,
)
def test_kept_columns_that_a_table_cannot_have(kept: list[str], words: str) -> None:
    with pytest.raises(TableError, match=rf"keep: .*{words}.*Leave it out of keep"):
        store.table_schema(layout(kept=pa.schema([(name, pa.int64()) for name in kept])))


def test_lineage_passes_a_compaction_of_an_indexed_table(make_table: Callable[..., Any]) -> None:
    """pylance 14 raises TypeError when it is asked what such a commit did."""
    made = make_table(30, dim=4)
    lance.dataset(made.uri).create_scalar_index("id", "BTREE", name="id_idx")
    lance.dataset(made.uri).optimize.compact_files()
    versions = [version for version, _ in store.lineage(lance.dataset(made.uri))]
    assert versions == list(range(lance.dataset(made.uri).version, 0, -1))
