"""The move of the tag, rollback, history, leases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lance
import pyarrow as pa
import pytest

from conjoin.pipeline import publish, storage, store
from conjoin.pipeline.errors import TableError


@pytest.fixture
def uri(make_table: Callable[..., Any]) -> str:
    """Three versions of 20, 21 and 22 rows; nothing is live."""
    for position, mode in enumerate(("create", "overwrite", "overwrite")):
        made = make_table(20 + position, dim=4, live=False, mode=mode)
    return str(made.uri)


def live(uri: str) -> tuple[int | None, int | None]:
    tags = lance.dataset(uri).tags.list()
    versions = [int(tags[name]["version"]) if name in tags else None for name in ("live", "previous")]
    return versions[0], versions[1]


def test_publish_moves_live_and_previous(uri: str) -> None:
    assert publish.history(uri) == ()
    first = publish.publish(uri, 1, "r1")
    assert (live(uri), first.before, first.num_rows, first.live) == ((1, None), None, 20, True)
    second = publish.publish(uri, 3, "r2")
    assert (live(uri), second.before, second.num_rows) == ((3, 1), 1, 22)
    assert [(entry.run_id, entry.version, entry.live) for entry in publish.history(uri)] == [
        ("r2", 3, True),
        ("r1", 1, False),
    ]


def test_publishing_again_is_harmless(uri: str) -> None:
    first = publish.publish(uri, 1, "r1")
    second = publish.publish(uri, 2, "r2")
    assert publish.publish(uri, 2, "r2") == second
    assert publish.publish(uri, 1, "r1") == replace(first, live=False)
    assert live(uri) == (2, 1)
    assert len(publish.history(uri)) == 2


def test_a_run_that_died_between_its_tags_and_its_record(uri: str) -> None:
    publish.publish(uri, 1, "r1")
    publish.publish(uri, 2, "r2")
    record = next(path for path in storage.list_files(f"{store.bookkeeping(uri)}/history") if "r2" in path)
    storage.remove(record)
    entry = publish.publish(uri, 2, "r2")
    assert (live(uri), entry.before, entry.version) == ((2, 1), 1, 2)
    assert [e.run_id for e in publish.history(uri)] == ["r2", "r1"]


def test_a_version_that_is_gone_is_not_published(uri: str) -> None:
    with pytest.raises(TableError, match="no version 9"):
        publish.publish(uri, 9, "r9")
    assert live(uri) == (None, None)


def test_rollback_and_back_again(uri: str) -> None:
    publish.publish(uri, 1, "r1")
    publish.publish(uri, 3, "r2")
    back = publish.rollback(uri)
    assert (live(uri), back.action, back.version, back.run_id) == ((1, 3), "rollback", 1, "r1")
    assert publish.rollback(uri).version == 3
    assert live(uri) == (3, 1)
    assert [entry.live for entry in publish.history(uri)] == [True, False, False, False]


@pytest.mark.parametrize(("to", "version"), [(1, 1), ("1", 1), ("r1", 1), ("r2", 2)])
def test_rollback_to_a_version_or_a_run(uri: str, to: int | str, version: int) -> None:
    for number in (1, 2, 3):
        publish.publish(uri, number, f"r{number}")
    assert publish.rollback(uri, to).version == version
    assert live(uri) == (version, 3)


@pytest.mark.parametrize(
    ("to", "message"),
    [(None, "nothing to roll back to"), (2, "version 2 was never published"), ("r7", "no run 'r7' was ever")],
)
def test_rollback_to_what_was_never_live(uri: str, to: int | str | None, message: str) -> None:
    publish.publish(uri, 1, "r1")
    with pytest.raises(TableError, match=message):
        publish.rollback(uri, to)
    assert live(uri) == (1, None)


def test_an_overtaken_publisher_stops_before_it_moves_anything(uri: str) -> None:
    publish.publish(uri, 1, "r1")
    slow = publish.take_lease(uri, "slow")
    quick = publish.take_lease(uri, "quick")
    assert quick.number > slow.number
    with pytest.raises(TableError, match="quick took over from slow"):
        publish.publish(uri, 2, "slow", slow)
    assert live(uri) == (1, None)
    assert publish.publish(uri, 3, "quick", quick).version == 3


def detached(uri: str, rows: pa.Table, run_id: str) -> int:
    """A version of these rows beside the head."""
    from lance.fragment import write_fragments

    head = lance.dataset(uri)
    schema = head.schema.with_metadata(None)
    fragments = write_fragments(rows.cast(schema), uri, schema=schema, mode="overwrite", data_storage_version="2.2")
    operation = lance.LanceOperation.Overwrite(schema, list(fragments))
    work = lance.Transaction(read_version=head.version, operation=operation, transaction_properties={"run_id": run_id})
    return int(lance.LanceDataset.commit(uri, work, detached=True).version)


def ids_of(uri: str, version: int | str | None = None) -> list[str]:
    return sorted(store.open_version(uri, version).to_table(columns=["id"])["id"].to_pylist())


def test_a_rejected_version_is_tagged_once(uri: str) -> None:
    publish.publish(uri, 1, "r1")
    first = publish.reject(uri, 2, "a/b c")
    assert publish.reject(uri, 2, "a/b c") == first
    assert (first.action, first.version, first.before, first.num_rows) == ("rejected", 2, 1, 21)
    assert lance.dataset(uri).tags.list()["rejected-a_b_c"]["version"] == 2
    assert [(e.action, e.live) for e in publish.history(uri)] == [("rejected", False), ("publish", True)]
    publish.reject(uri, 3, "a/b c")
    assert lance.dataset(uri).tags.list()["rejected-a_b_c"]["version"] == 3
    assert publish.find_rejected(uri, "a/b c").version == 3
    with pytest.raises(TableError, match=r"no rejected run or version '2'.*Rejected runs are: a/b c\."):
        publish.find_rejected(uri, "2")


def test_a_rejection_overtakes_nobody(uri: str) -> None:
    lease = publish.take_lease(uri, "busy")
    publish.reject(uri, 2, "r2")
    assert publish.publish(uri, 3, "busy", lease).version == 3


def test_no_rollback_to_a_rejected_version(uri: str) -> None:
    publish.publish(uri, 1, "r1")
    publish.reject(uri, 2, "r2")
    for to in ("2", "r2"):
        with pytest.raises(TableError, match=r"was ever published|was never published"):
            publish.rollback(uri, to)


def test_a_rejected_version_is_forced(uri: str) -> None:
    publish.publish(uri, 1, "r1")
    found = publish.reject(uri, 2, "r2")
    assert publish.land(uri, found) == 2
    entry = publish.force(uri, 2, "r2")
    assert (entry.action, entry.version, entry.before, entry.live) == ("forced", 2, 1, True)
    assert publish.force(uri, 2, "r2") == entry
    assert "rejected-r2" not in lance.dataset(uri).tags.list()
    assert [e.action for e in publish.history(uri)] == ["forced", "rejected", "publish"]
    assert publish.rollback(uri).version == 1
    assert publish.rollback(uri, "r2").version == 2


def test_a_candidate_beside_the_head_lands_before_it_is_forced(uri: str, make_table: Callable[..., Any]) -> None:
    publish.publish(uri, 3, "r3")
    rows = make_table(5, dim=4, uri=f"{uri}.other.lance").rows
    found = publish.reject(uri, detached(uri, rows, "r4"), "r4")
    assert found.version >= publish.DETACHED
    assert publish.find_rejected(uri, str(found.version)) == found
    version = publish.land(uri, found)
    assert publish.land(uri, found) == version == 4
    assert (ids_of(uri), store.run_of(store.open_version(uri, None))["run_id"]) == (
        sorted(rows["id"].to_pylist()),
        "r4",
    )
    assert publish.force(uri, version, "r4").before == 3
    assert store.restore(uri) is None


def test_a_candidate_of_rows_that_are_gone_does_not_land(uri: str, make_table: Callable[..., Any]) -> None:
    publish.publish(uri, 3, "r3")
    found = publish.reject(uri, detached(uri, make_table(5, dim=4, uri=f"{uri}.o.lance").rows, "r4"), "r4")
    make_table(30, dim=4, live=False, mode="overwrite", seed=9)
    publish.publish(uri, 4, "r5")
    with pytest.raises(TableError, match=r"live has moved on since run r4 was rejected.*Raise the gate"):
        publish.land(uri, found)
    assert (len(ids_of(uri)), live(uri)) == (30, (4, 3))


def test_after_a_rejection_plain_readers_see_what_is_live(uri: str) -> None:
    publish.publish(uri, 1, "r1")
    publish.reject(uri, 3, "r3")
    assert len(lance.dataset(uri).to_table()) == 22
    assert store.restore(uri) == 4
    assert store.restore(uri) is None
    assert lance.dataset(uri).to_table().equals(store.open_version(uri).to_table())
    publish.force(uri, 3, "r3")
    assert store.restore(uri) == 5
    assert lance.dataset(uri).count_rows() == 22


def test_rollback_restores_the_answers_of_a_query_exactly(uri: str) -> None:
    from conjoin.pipeline.query import open_table

    def answers() -> list[pa.Table]:
        table = open_table(uri)
        near = "SELECT id, price, distance(image_vec, ?) AS d FROM things WHERE stock > 3 ORDER BY d, id LIMIT 7"
        return [table.sql(near, [[1, 0, 0, 0]]).to_arrow(), table.sql("SELECT * FROM things ORDER BY id").to_arrow()]

    publish.publish(uri, 1, "r1")
    before = answers()
    publish.publish(uri, 3, "r2")
    after = answers()
    assert not after[0].equals(before[0])
    publish.rollback(uri)
    assert [a.equals(b) for a, b in zip(answers(), before, strict=True)] == [True, True]
    publish.rollback(uri)
    assert [a.equals(b) for a, b in zip(answers(), after, strict=True)] == [True, True]


def test_run_ids_may_hold_anything(uri: str) -> None:
    assert publish.publish(uri, 1, "a/b c:2024").run_id == "a/b c:2024"
    assert publish.history(uri)[0].run_id == "a/b c:2024"
    assert publish.rollback(uri, "a/b c:2024").version == 1


def test_a_restore_that_was_overtaken_gives_the_head_back(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lance lets a Restore win over a commit that it never saw."""
    publish.publish(uri, 1, "r1")
    schema = store.open_version(uri, None).schema
    lance.write_dataset(store.open_version(uri, None).to_table().slice(0, 1), uri, mode="append")
    whole = lance.LanceDataset.restore

    def overtaken(self: lance.LanceDataset) -> None:
        monkeypatch.setattr(lance.LanceDataset, "restore", whole)
        lance.write_dataset(store.open_version(uri, None).to_table(limit=2), uri, schema=schema, mode="append")
        whole(self)

    monkeypatch.setattr(lance.LanceDataset, "restore", overtaken)
    before = store.open_version(uri, None).count_rows()
    with pytest.raises(TableError, match="while live was restored"):
        store.restore(uri)
    assert store.open_version(uri, None).count_rows() == before + 2
