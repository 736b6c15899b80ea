"""Deltas replayed: the old version with a delta applied is the new version, and a delta holds nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lance.fragment import write_fragments

from conjoin.pipeline import delta, publish, store
from conjoin.pipeline.delta import Delta, export_delta
from conjoin.pipeline.errors import TableError

Night = Callable[[str], None]


@pytest.fixture
def uri(make_table: Callable[..., Any]) -> str:
    """90 rows in three fragments, some vectors null, published by the run `first`."""
    made = make_table(90, dim=4, nulls=5, live=False)
    publish.publish(made.uri, 1, "first")
    return str(made.uri)


def commit(uri: str, updated: list[Any], new: Any = (), fields: Any = ()) -> None:
    operation = lance.LanceOperation.Update(
        updated_fragments=updated, new_fragments=list(new), fields_modified=list(fields)
    )
    lance.LanceDataset.commit(uri, operation, read_version=lance.dataset(uri).version)


def changed_vectors(table: pa.Table) -> pa.Table:
    position = table.schema.get_field_index("image_vec")
    field = table.schema.field(position)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.full(4 * len(table), 0.5, np.float32)), 4)
    return table.set_column(position, field, vectors)


def insert(uri: str) -> None:
    head = lance.dataset(uri)
    rows = head.to_table(limit=5)
    fresh = rows.set_column(0, "id", pa.array([f"new-{n}" for n in range(5)]))
    commit(uri, [], write_fragments(fresh.cast(head.schema), uri, mode="append"))


def update(uri: str) -> None:
    """Seven rows are rewritten with another vector, two of another fragment with the same values."""
    head = lance.dataset(uri)
    first, second = head.get_fragment(0), head.get_fragment(1)
    rows = pa.concat_tables([changed_vectors(first.take(list(range(7)))), second.take([3, 4])])
    commit(
        uri,
        [first.delete_rows(range(7)), second.delete_rows([3, 4])],
        write_fragments(rows.cast(head.schema), uri, mode="append"),
    )


def reprice(uri: str) -> None:
    """Two prices change, one is written as it was."""
    head = lance.dataset(uri)
    fragment = head.get_fragments()[len(head.get_fragments()) // 2]
    rows = fragment.take([0, 1, 2], columns=["id", "price"])
    prices = rows.set_column(1, "price", pa.array([-1.0, None, rows["price"][2].as_py()]))
    changed, fields = fragment.update_columns(prices, left_on="id", right_on="id")
    commit(uri, [changed], fields=fields)


def delete(uri: str) -> None:
    """Three rows."""
    head = lance.dataset(uri)
    commit(uri, [head.get_fragment(0).delete_rows([20, 21]), head.get_fragment(2).delete_rows([29])])


def compact(uri: str) -> None:
    lance.dataset(uri).optimize.compact_files(target_rows_per_fragment=1000)


def encoder(uri: str) -> None:
    """Other vectors under the same name, as a new encoder leaves them."""
    head = lance.dataset(uri)
    head.add_columns({"image_vec__next": "arrow_cast(make_array(1.0, 0.0, 0.0, 0.0), 'FixedSizeList(4, Float32)')"})
    head.drop_columns(["image_vec"])
    head.alter_columns({"path": "image_vec__next", "name": "image_vec"})


def column(uri: str) -> None:

    @lance.batch_udf()
    def seen(batch: pa.RecordBatch) -> pa.RecordBatch:
        return pa.record_batch({"seen": ["yes" if price > 50 else None for price in batch["price"].to_pylist()]})

    lance.dataset(uri).add_columns(seen, read_columns=["price"])
    lance.dataset(uri).drop_columns(["stock"])


def full(uri: str) -> None:
    """Everything made anew, in other order: no value differs but one."""
    rows = lance.dataset(uri).to_table()
    rows = rows.take(pa.array(np.random.default_rng(0).permutation(len(rows))))
    captions = [
        f"{text}!" if key == "row-0-000050" else text for key, text in rows.select(["id", "caption"]).to_pandas().values
    ]
    rows = rows.set_column(1, rows.schema.field("caption"), pa.array(captions))
    lance.write_dataset(rows, uri, mode="overwrite", data_storage_version="2.2")


def replay(uri: str, since: Any, folder: Path) -> pa.Table:
    """The old rows with the delta applied, in the new schema, by id."""
    manifest = json.loads((folder / "manifest.json").read_text())
    parts = {"upserts": [], "deletes": []}
    for file in manifest["files"]:
        part = pq.read_table(folder / file["path"])
        assert part.num_rows == file["rows"]
        parts[file["kind"]].append(part)
    upserts = pa.concat_tables(parts["upserts"]) if parts["upserts"] else None
    gone = {key for part in parts["deletes"] for key in part["id"].to_pylist()}
    gone |= set(upserts["id"].to_pylist()) if upserts else set()
    old = since.to_table() if since is not None else lance.dataset(uri).to_table().slice(0, 0)
    old = old.filter(pa.array([key not in gone for key in old["id"].to_pylist()], pa.bool_()))
    schema = pa.schema([lance.dataset(uri, version="live").schema.field(f["name"]) for f in manifest["schema"]])
    kept = {n: old[n] if n in old.schema.names else pa.nulls(len(old), schema.field(n).type) for n in schema.names}
    whole = pa.table(kept).cast(schema)
    return pa.concat_tables([whole, upserts.cast(schema)]).sort_by("id") if upserts else whole.sort_by("id")


def go(uri: str, folder: Path, *nights: Night, since: str = "first", **options: Any) -> Delta:
    """The nights, published together; the delta replays."""
    for night in nights:
        night(uri)
    publish.publish(uri, int(lance.dataset(uri).version), "second")
    before = None if since == "0" else delta.published(uri, since)
    found = export_delta(uri, str(folder), since=since, **options)
    live = lance.dataset(uri, version="live").to_table().sort_by("id")
    assert replay(uri, before, folder).to_pylist() == live.to_pylist()
    return found


@pytest.mark.parametrize(
    ("nights", "upserts", "deletes"),
    [
        ([], 0, 0),
        ([insert], 5, 0),
        ([update], 7, 0),
        ([reprice], 2, 0),
        ([delete], 0, 3),
        ([compact], 0, 0),
        ([delete, compact], 0, 3),
        ([encoder], 90, 0),
        ([full], 1, 0),
        ([insert, update, reprice, delete, compact], 5 + 7 + 2, 3),
        ([delete, compact, reprice, insert, encoder], 87 + 5, 3),
    ],
    ids=lambda value: "-".join(night.__name__ for night in value) or "nothing" if isinstance(value, list) else None,
)
def test_replayed_it_is_the_new_version(
    uri: str, tmp_path: Path, nights: list[Night], upserts: int, deletes: int
) -> None:
    found = go(uri, tmp_path / "out", *nights)
    assert (found.upserts, found.deletes) == (upserts, deletes)


def test_columns_that_came_and_went(uri: str, tmp_path: Path) -> None:
    found = go(uri, tmp_path / "out", column)
    assert (found.added_columns, found.dropped_columns) == (("seen",), ("stock",))
    assert 0 < found.upserts < 90  # rows where the new column is null have nothing new


def test_everything_since_nothing(uri: str, tmp_path: Path) -> None:
    found = go(uri, tmp_path / "out", since="0")
    assert (found.upserts, found.deletes, found.since.version) == (90, 0, 0)


def test_backwards_over_a_rollback(uri: str, tmp_path: Path) -> None:
    go(uri, tmp_path / "forth", insert, delete)
    publish.rollback(uri)
    found = export_delta(uri, str(tmp_path / "back"), since="second")
    assert (found.upserts, found.deletes) == (3, 5)


def test_half_precision_and_integer_ids(make_table: Callable[..., Any], tmp_path: Path) -> None:
    made = make_table(40, dim=4, nulls=4, dtype="float16", live=False)
    rows = made.rows.set_column(0, "id", pa.array(range(40), pa.int64()))
    rows = rows.append_column("tags", pa.array([[f"t{n}", None] if n % 3 else None for n in range(40)]))
    uri = str(tmp_path / "ints.lance")
    lance.write_dataset(rows, uri, max_rows_per_file=15, data_storage_version="2.2")
    publish.publish(uri, 1, "first")
    head = lance.dataset(uri)
    commit(uri, [head.get_fragment(0).delete_rows([2])], write_fragments(rows.slice(0, 0), uri, mode="append"))
    found = go(uri, tmp_path / "out", compact)
    assert (found.upserts, found.deletes) == (0, 1)
    assert pq.read_table(tmp_path / "out" / "deletes-00000.parquet").to_pydict() == {"id": [2]}


def test_parts_keep_their_size_and_vectors_their_metadata(uri: str, tmp_path: Path) -> None:
    found = go(uri, tmp_path / "out", since="0", part_bytes=1)
    assert len(found.files) == 1  # one batch, which is never cut
    part = pq.read_table(tmp_path / "out" / found.files[0].path)
    assert store.columns_of_schema(part.schema) == store.vector_columns(store.open_version(uri))


def test_several_parts(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "BATCH_ROWS", 10)
    found = go(uri, tmp_path / "out", since="0", part_bytes=1)
    assert [file.rows for file in found.files] == [10] * 9


def test_the_folder(uri: str, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "upserts-00007.parquet").write_bytes(b"torn")
    go(uri, killed, insert)
    assert sorted(path.name for path in killed.iterdir()) == ["manifest.json", "upserts-00000.parquet"]
    with pytest.raises(TableError, match="holds something already"):
        export_delta(uri, str(killed), since="first")


@pytest.mark.parametrize(
    ("name", "message"),
    [("7", "version 7 was never published"), ("nope", "no version 'nope'"), ("rejected-x", "no version")],
)
def test_versions_that_are_none(uri: str, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(TableError, match=message):
        export_delta(uri, str(tmp_path / "out"), since=name)


def test_a_version_that_was_cleaned_up(uri: str, tmp_path: Path) -> None:
    go(uri, tmp_path / "one", insert)
    delete(uri)
    publish.publish(uri, 3, "third")
    lance.dataset(uri).cleanup_old_versions(versions=[1])
    with pytest.raises(TableError, match="cleaned up"):
        export_delta(uri, str(tmp_path / "out"), since="first")
