"""The move of the tag, rollback, history, leases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lance
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
    with pytest.raises(TableError, match="run quick took over while run slow"):
        publish.publish(uri, 2, "slow", slow)
    assert live(uri) == (1, None)
    assert publish.publish(uri, 3, "quick", quick).version == 3


def test_run_ids_may_hold_anything(uri: str) -> None:
    assert publish.publish(uri, 1, "a/b c:2024").run_id == "a/b c:2024"
    assert publish.history(uri)[0].run_id == "a/b c:2024"
    assert publish.rollback(uri, "a/b c:2024").version == 1
