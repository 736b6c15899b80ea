"""Differences of real Lance versions against a comparison of all their rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pytest
from lance.fragment import write_fragments

from conjoin.pipeline.difference import ADDRESS, Difference, difference


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """40 rows in four fragments."""
    path = str(tmp_path / "t.lance")
    lance.write_dataset(rows(range(40)), path, max_rows_per_file=10, data_storage_version="2.2")
    return path


def rows(numbers: Sequence[int], mark: float = 0.0) -> pa.Table:
    vectors = pa.array([float(n) + mark for n in numbers for _ in range(2)], pa.float32())
    return pa.table(
        {
            "id": [f"i{n}" for n in numbers],
            "price": [n + mark for n in numbers],
            "shape": pa.array([{"w": n, "h": "x"} for n in numbers]),
            "vec": pa.FixedSizeListArray.from_arrays(vectors, 2),
        }
    )


def update(uri: str, delete: dict[int, list[int]], insert: pa.Table | None = None, detached: bool = False) -> Any:
    """One night: rows of old fragments deleted, new ones in a fragment of their own."""
    head = lance.dataset(uri)
    made = [(number, head.get_fragment(number).delete_rows(offsets)) for number, offsets in delete.items()]
    operation = lance.LanceOperation.Update(
        updated_fragments=[fragment for _, fragment in made if fragment is not None],
        removed_fragment_ids=[number for number, fragment in made if fragment is None],
        new_fragments=write_fragments(insert, uri, mode="append") if insert is not None else [],
    )
    return lance.LanceDataset.commit(uri, operation, read_version=head.version, detached=detached)


def reprice(uri: str, fragment: int, ids: list[str]) -> Any:
    head = lance.dataset(uri)
    prices = pa.table({"id": ids, "price": [-1.0] * len(ids)})
    changed, fields = head.get_fragment(fragment).update_columns(prices, left_on="id", right_on="id")
    operation = lance.LanceOperation.Update(updated_fragments=[changed], fields_modified=fields)
    return lance.LanceDataset.commit(uri, operation, read_version=head.version)


def ids(batches: Any) -> list[str]:
    return [value for batch in batches for value in batch.column("id").to_pylist()]


def check(before: Any, after: Any) -> Difference:
    """Against all rows of both: the rows that are neither removed nor added are the same but for rewritten columns."""
    found = difference(before, after)
    gone, come = ids(found.removed_rows(["id"], 3)), ids(found.added_rows(["id"], 3))
    assert (len(gone), len(come)) == (found.num_removed, found.num_added)
    then, now = before.to_table().to_pylist(), after.to_table().to_pylist()
    stayed = {row["id"]: row for row in then if row["id"] not in gone}
    assert sorted(stayed) == sorted(row["id"] for row in now if row["id"] not in come)
    for row in now:
        if row["id"] not in come:
            changed = [name for name in row if row[name] != stayed[row["id"]].get(name)]
            assert set(changed) <= set(found.rewritten)
    return found


def test_nothing_before_adds_everything(uri: str) -> None:
    found = difference(None, lance.dataset(uri))
    assert ids(found.added_rows(["id"])) == [f"i{n}" for n in range(40)]
    assert not found.removed
    assert not found.rewritten


def test_a_version_and_itself(uri: str) -> None:
    head = lance.dataset(uri)
    assert difference(head, head).is_empty


@pytest.mark.parametrize("detached", [False, True], ids=["on-the-head", "detached"])
def test_deleted_and_inserted(uri: str, detached: bool) -> None:
    before = lance.dataset(uri)
    after = update(uri, {0: [2, 5], 3: list(range(10))}, rows([40, 41, 5]), detached)
    found = check(before, after)
    assert ids(found.removed_rows(["id"])) == ["i2", "i5", *(f"i{n}" for n in range(30, 40))]
    assert ids(found.added_rows(["id", "vec"])) == ["i40", "i41", "i5"]
    assert not found.rewritten
    assert [part.offsets is None for part in found.removed] == [False, True]


def test_deletions_on_top_of_deletions_and_back(uri: str) -> None:
    update(uri, {1: [0, 9]})
    before = lance.dataset(uri)
    after = update(uri, {1: [4, 5]})
    assert ids(check(before, after).removed_rows(["id"])) == ["i14", "i15"]
    assert ids(check(after, before).added_rows(["id"])) == ["i14", "i15"]


def test_values_come_with_the_rows(uri: str) -> None:
    before = lance.dataset(uri)
    after = update(uri, {1: [0, 3, 9], 2: [1]})
    batches = list(difference(before, after).removed_rows(["shape", "vec", "id"], 2))
    got = pa.Table.from_batches(batches)
    assert got.column_names == ["shape", "vec", "id"]
    assert got.equals(rows([10, 13, 19, 21]).select(["shape", "vec", "id"]))
    assert max(batch.num_rows for batch in batches) == 2


def test_a_column_written_anew(uri: str) -> None:
    update(uri, {1: [0]})
    before = lance.dataset(uri)
    reprice(uri, 1, ["i12", "i13"])
    after = update(uri, {1: [1]}, rows([50]))
    found = check(before, after)
    assert list(found.rewritten) == ["price"]
    assert found.num_rewritten("price") == 8
    pairs = list(found.rewritten_rows(["id", "price"], 3))
    assert [ids([then]) for then, _ in pairs] == [ids([now]) for _, now in pairs]
    changed = {
        key: (old, new)
        for then, now in pairs
        for key, old, new in zip(ids([then]), then["price"].to_pylist(), now["price"].to_pylist(), strict=True)
        if old != new
    }
    assert changed == {"i12": (12.0, -1.0), "i13": (13.0, -1.0)}


def test_a_new_column_is_written_anew_everywhere_and_a_swap_keeps_its_name(uri: str) -> None:
    before = lance.dataset(uri)
    head = lance.dataset(uri)
    head.add_columns({"vec__next": "arrow_cast(make_array(1.0, 2.0), 'FixedSizeList(2, Float32)')"})
    middle = lance.dataset(uri)
    assert set(check(before, middle).rewritten) == {"vec__next"}
    head.drop_columns(["vec"])
    head.alter_columns({"path": "vec__next", "name": "vec"})
    found = check(before, lance.dataset(uri))
    assert set(found.rewritten) == {"vec"}
    assert found.num_rewritten("vec") == 40
    assert found.dropped == ()
    assert difference(middle, lance.dataset(uri)).dropped == ("vec__next",)


def test_all_null_columns_have_no_file(uri: str) -> None:
    lance.dataset(uri).add_columns(pa.schema([pa.field("extra", pa.list_(pa.float32(), 2))]))
    before = lance.dataset(uri)
    after = update(uri, {0: [0]})
    assert not check(before, after).rewritten


def test_overwrite_shares_nothing_although_fragment_numbers_repeat(uri: str) -> None:
    before = lance.dataset(uri)
    after = lance.write_dataset(rows(range(20)), uri, mode="overwrite", data_storage_version="2.2")
    found = check(before, after)
    assert (found.num_removed, found.num_added, found.shared) == (40, 20, ())


def test_restore_is_the_version_restored(uri: str) -> None:
    before = lance.dataset(uri)
    update(uri, {0: [1]}, rows([60]))
    back = lance.dataset(uri, version=before.version)
    back.restore()
    assert difference(before, lance.dataset(uri)).is_empty
    after = update(uri, {2: [2]})
    assert ids(check(before, after).removed_rows(["id"])) == ["i22"]


def test_compaction_is_removed_and_added(uri: str) -> None:
    update(uri, {0: [1], 1: [1]})
    before = lance.dataset(uri)
    lance.dataset(uri).optimize.compact_files(target_rows_per_fragment=20)
    found = check(before, lance.dataset(uri))
    assert found.num_removed == found.num_added
    assert found.num_removed > 0
    assert sorted(ids(found.removed_rows(["id"]))) == sorted(ids(found.added_rows(["id"])))


@pytest.mark.parametrize("make", [rows], ids=["string-ids"])
def test_whole_fragments_of_before_leave_their_deleted_rows_out(uri: str, make: Callable[..., pa.Table]) -> None:
    update(uri, {0: [0, 1]})
    before = lance.dataset(uri)
    after = update(uri, {0: list(range(2, 10))}, make([70]))
    assert ids(check(before, after).removed_rows(["id"])) == [f"i{n}" for n in range(2, 10)]


def test_rows_come_with_their_addresses(uri: str) -> None:
    before = lance.dataset(uri)
    update(uri, {1: [0], 2: [5]})
    after = update(uri, {1: [3, 9], 2: [1]})
    batches = difference(before, after).removed_rows(["id", ADDRESS])
    found = pa.Table.from_batches(list(batches)).to_pydict()
    assert found == {
        "id": ["i10", "i13", "i19", "i21", "i25"],
        ADDRESS: [(1 << 32), (1 << 32) + 3, (1 << 32) + 9, (2 << 32) + 1, (2 << 32) + 5],
    }
