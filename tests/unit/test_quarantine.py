"""The quarantine table: a run replaces its own rows, readers see those of their version's runs."""

from __future__ import annotations

from pathlib import Path

import lance
import pyarrow as pa
import pytest

from conjoin.pipeline import commits, state, store
from conjoin.pipeline.errors import TableError
from conjoin.pipeline.quarantine import (
    check_quarantine,
    groups_of,
    quarantine_schema,
    read_quarantine,
    replace_rows,
    sample_of,
)


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "things.lance")


def rows(run_id: str, *ids: str | int) -> pa.Table:
    kind = pa.int64() if ids and isinstance(ids[0], int) else pa.string()
    entries = [
        {
            "id": key,
            "modality": "image",
            "run_id": run_id,
            "stage": "decode",
            "reason": f"why {key}",
            "file": "/data/a.parquet",
            "row_group": 0,
            "row": number,
        }
        for number, key in enumerate(ids)
    ]
    return pa.Table.from_pylist(entries, quarantine_schema(kind))


def stored(uri: str) -> list[tuple[str, str]]:
    found = lance.dataset(store.quarantine_uri(uri)).to_table().to_pylist()
    return sorted((row["run_id"], row["id"]) for row in found)


def publish(uri: str, run_id: str, *quarantine: str) -> None:
    """A version of the table whose manifest names these runs."""
    metadata = {"conjoin:fingerprint": "f", "conjoin:modality": "text", "conjoin:metric": "cosine"}
    field = pa.field(
        "text_vec", pa.list_(pa.float32(), 2), metadata={**metadata, "conjoin:dim": "2", "conjoin:encoder": "e"}
    )
    schema = pa.schema([pa.field("id", pa.string(), nullable=False), field])
    head = store.head(uri)
    table = pa.table([pa.array(["a"]), pa.array([[1.0, 0.0]], field.type)], schema=schema)
    fragments = [commits.stage(uri, table, mode="create" if head is None else "overwrite")]
    manifest = state.Manifest(run_id, "f", "e", "c", "p", 1, (), quarantine)
    state.write_manifest(uri, manifest)
    version = 0 if head is None else int(head.version)
    commits.commit(uri, commits.Commit(run_id, schema, fragments, version, {store.STATE: state.manifest_path(run_id)}))


def test_a_repeated_run_replaces_its_own_rows_only(uri: str) -> None:
    replace_rows(uri, "one", rows("one", "a", "b"))
    replace_rows(uri, "two", rows("two", "b"))
    replace_rows(uri, "one", rows("one", "a", "c"))
    replace_rows(uri, "one", rows("one", "a", "c"))
    assert stored(uri) == [("one", "a"), ("one", "c"), ("two", "b")]
    replace_rows(uri, "one", rows("one"))
    assert stored(uri) == [("two", "b")]


def test_a_run_without_bad_rows_makes_no_table(uri: str) -> None:
    replace_rows(uri, "one", rows("one"))
    assert store.head(store.quarantine_uri(uri)) is None
    publish(uri, "one", "one")
    assert read_quarantine(uri, None) is None


def test_a_version_shows_the_rows_of_its_runs(uri: str) -> None:
    replace_rows(uri, "one", rows("one", "a"))
    publish(uri, "one", "one")
    replace_rows(uri, "two", rows("two", "b"))
    before = read_quarantine(uri, None)
    publish(uri, "two", "two")
    after = read_quarantine(uri, None)
    assert before is not None
    assert after is not None
    assert before["id"].to_pylist() == ["a"]
    assert after.select(["id", "reason"]).to_pylist() == [{"id": "b", "reason": "why b"}]


@pytest.mark.parametrize(("first", "second"), [((7, 8), ("a",)), (("a",), (7, 8))], ids=["to-text", "to-numbers"])
def test_ids_of_another_type_lose_nothing(
    uri: str, first: tuple[str | int, ...], second: tuple[str | int, ...]
) -> None:
    replace_rows(uri, "one", rows("one", *first))
    for _ in range(2):
        replace_rows(uri, "two", rows("two", *second))
        expected = [("one", str(key)) for key in first] + [("two", str(key)) for key in second]
        assert stored(uri) == sorted(expected)


def test_a_table_of_somebody_else_is_left_alone(uri: str) -> None:
    theirs = pa.table({"run_id": ["one"], "id": ["a"]})
    lance.write_dataset(theirs, store.quarantine_uri(uri))
    with pytest.raises(TableError, match=r"conjoin did not make it.*things__quarantine\.lance.*Move it away"):
        replace_rows(uri, "one", rows("one", "a"))
    with pytest.raises(TableError, match="conjoin did not make it"):
        check_quarantine(uri)
    assert lance.dataset(store.quarantine_uri(uri)).to_table() == theirs


def go_live(uri: str) -> None:
    dataset = lance.dataset(uri)
    (dataset.tags.update if "live" in dataset.tags.list() else dataset.tags.create)("live", dataset.version)


def attempts(uri: str) -> dict[str, tuple[int, str]]:
    found = read_quarantine(uri, None)
    assert found is not None
    return {row["id"]: (row["attempts"], row["tried"]) for row in found.to_pylist()}


def test_attempts_are_counted_from_what_is_live(uri: str) -> None:
    replace_rows(uri, "one", rows("one", "a", "b", "c"))
    publish(uri, "one", "one")
    assert attempts(uri) == dict.fromkeys("abc", (1, "one"))
    go_live(uri)
    for _ in range(2):  # a is tried again, b is carried over, c is mended
        carried = rows("two", "b").set_column(8, "attempts", pa.array([1], pa.int32()))
        carried = carried.set_column(9, "tried", pa.array(["one"]))
        replace_rows(uri, "two", pa.concat_tables([rows("two", "a"), carried.cast(rows("two", "a").schema)]))
    publish(uri, "two", "two")
    assert attempts(uri) == {"a": (2, "two"), "b": (1, "one")}


def test_a_table_of_an_older_conjoin_is_read_and_grows(uri: str) -> None:
    old = rows("one", "a").drop_columns(["attempts", "tried"])
    lance.write_dataset(old, store.quarantine_uri(uri), data_storage_version="2.2")
    publish(uri, "one", "one")
    assert attempts(uri) == {"a": (1, "one")}
    go_live(uri)
    replace_rows(uri, "two", rows("two", "a", "b"))
    publish(uri, "two", "one", "two")
    assert sorted(stored(uri)) == [("one", "a"), ("two", "a"), ("two", "b")]
    found = read_quarantine(uri, None)
    assert found is not None
    assert sorted(zip(*(found[n].to_pylist() for n in ("run_id", "id", "attempts", "tried")), strict=True)) == [
        ("one", "a", 1, "one"),
        ("two", "a", 2, "two"),
        ("two", "b", 1, "two"),
    ]


def test_groups_and_samples() -> None:
    reasons = [
        "nothing there (HTTP 404) [https://x.org/1.jpg]",
        "nothing there (HTTP 404) [https://x.org/2.jpg]",
        "nothing there (HTTP 410) [https://x.org/3.jpg]",
        "not a picture that can be read (14 bytes, begins with 00ff)",
        "not a picture that can be read (9,999 bytes, begins with abcd)",
        "not a picture that can be read (1 bytes, begins with 12)",
    ]
    table = rows("one", *"abcdef").set_column(4, "reason", pa.array(reasons))
    found = groups_of(table)
    assert [(group.reason, group.count, group.example_id) for group in found] == [
        ("not a picture that can be read (# bytes, begins with ...)", 3, "d"),
        ("nothing there (HTTP 404) [...]", 2, "a"),
        ("nothing there (HTTP 410) [...]", 1, "c"),
    ]
    assert found[1].example == reasons[0]
    assert sample_of(table, 1)["id"].to_pylist() == ["a", "c", "d"]
    assert sample_of(table, 2)["id"].to_pylist() == ["a", "b", "c", "d", "e"]
