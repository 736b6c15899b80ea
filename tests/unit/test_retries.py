"""Which quarantined values a night tries again."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from conjoin.pipeline import storage, store
from conjoin.pipeline.errors import TableError
from conjoin.pipeline.quarantine import quarantine_schema, replace_rows, rows_of
from conjoin.pipeline.retries import due, mark
from conjoin.pipeline.state import Manifest


def manifest(run_id: str) -> Manifest:
    return Manifest(run_id, "f", "e", "c", "p", 1, (), (run_id,))


def night(uri: str, run_id: str, rows: dict[str, tuple[str, int, str]], id_type: pa.DataType | None = None) -> Manifest:
    """A quarantine of {id: (stage, attempts, the run that tried)}, and the manifest that names it."""
    kind = id_type or pa.string()
    entries = [
        {
            "id": int(key) if pa.types.is_integer(kind) else key,
            "modality": "image",
            "run_id": run_id,
            "stage": stage,
            "reason": "why",
            "file": "/a.parquet",
            "attempts": attempts,
            "tried": tried,
        }
        for key, (stage, attempts, tried) in rows.items()
    ]
    replace_rows(uri, run_id, pa.Table.from_pylist(entries, quarantine_schema(kind)))
    return manifest(run_id)


def ids(rows: pa.Table | None) -> list[object]:
    return [] if rows is None else sorted(rows["id"].to_pylist())


ROWS = {"a": ("fetch", 1, "r1"), "b": ("fetch", 3, "r1"), "c": ("decode", 1, "r1"), "d": ("embed", 1, "r1")}


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "things.lance")


def test_nothing_in_quarantine(uri: str) -> None:
    assert due(uri, manifest("r1"), 7) is None
    with pytest.raises(TableError, match="nothing is in quarantine"):
        mark(uri, manifest("r1"), ["all"])


@pytest.mark.parametrize(("retries", "expected"), [(0, []), (1, ["a"]), (2, ["a"]), (3, ["a", "b"])])
def test_what_was_not_fetched_is_due_until_it_was_tried_often_enough(
    uri: str, retries: int, expected: list[str]
) -> None:
    found = due(uri, night(uri, "r1", ROWS), retries)
    assert ids(found) == expected
    if found is not None:
        assert {"id", "modality", "file"} <= set(found.schema.names)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(["all"], ["a", "b", "c", "d"]), (["fetch"], ["a", "b"]), (["decode", "b"], ["b", "c"]), (["d"], ["d"])],
    ids=["all", "stage", "both", "id"],
)
def test_marked_values_are_due(uri: str, wanted: list[str], expected: list[str]) -> None:
    live = night(uri, "r1", ROWS)
    assert due(uri, live, 0) is None
    for _ in range(2):
        assert ids(mark(uri, live, wanted)) == expected
        assert ids(due(uri, live, 0)) == expected
    files = storage.list_files(f"{store.bookkeeping(uri)}/retries")
    assert len(files) == len(wanted)


def test_a_mark_is_spent_by_the_attempt_and_by_nothing_else(uri: str) -> None:
    live = night(uri, "r1", ROWS)
    mark(uri, live, ["all"])
    # A night that was planned before it carried c over, tried a and d in vain, and mended b.
    later = night(uri, "r2", {"a": ("fetch", 2, "r2"), "c": ("decode", 1, "r1"), "d": ("embed", 2, "r2")})
    assert ids(due(uri, later, 0)) == ["c"]
    assert ids(due(uri, live, 0)) == ["a", "b", "c", "d"]  # after a rollback
    last = night(uri, "r3", {"c": ("decode", 2, "r3")})
    assert due(uri, last, 0) is None
    mark(uri, last, ["c"])
    assert [path.rsplit("/", 1)[1][:4] for path in storage.list_files(f"{store.bookkeeping(uri)}/retries")] == ["ids-"]


def test_ids_that_are_numbers(uri: str) -> None:
    live = night(uri, "r1", {"7": ("decode", 1, "r1"), "8": ("decode", 1, "r1")}, pa.int64())
    mark(uri, live, ["7"])
    assert ids(due(uri, live, 0)) == [7]


def test_an_id_that_is_not_in_quarantine_marks_nothing(uri: str) -> None:
    live = night(uri, "r1", ROWS)
    with pytest.raises(TableError, match=r"not in quarantine: x, y, z and 1 more.*`conjoin repair` shows"):
        mark(uri, live, ["a", "x", "y", "z", "zz"])
    assert due(uri, live, 0) is None
    assert rows_of(uri, live) is not None
