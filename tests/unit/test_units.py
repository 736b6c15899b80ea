"""Units: cut at fixed positions, every row once; digests of ids; records that belong to a plan."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conjoin.pipeline.units import (
    Record,
    cut,
    ids_digest,
    read_record,
    read_records,
    unit_rows,
    write_record,
)


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 20))
def test_cut_covers_every_row_once(sizes: list[int], rows: int) -> None:
    units = cut(sizes, rows)
    assert sum(units) == sum(sizes)
    assert all(0 < unit <= rows for unit in units)


def test_cut_keeps_row_groups_whole_where_they_fit() -> None:
    assert cut([4, 4, 3], 8) == [8, 3]


def test_cut_divides_a_large_row_group_evenly() -> None:
    assert cut([10], 4) == [3, 3, 4]


@pytest.mark.parametrize(
    ("wanted", "num_rows", "expected"),
    [(7, 100, 7), ("auto", 1_000, 2_000), ("auto", 100_000, 12_500), ("auto", 100_000_000, 32_768)],
    ids=["as-asked", "tiny", "small", "large"],
)
def test_unit_rows(wanted: int | str, num_rows: int, expected: int) -> None:
    assert unit_rows(wanted, num_rows, 2_048) == expected


def test_ids_digest_sees_order_type_and_value() -> None:
    same = [pa.array(["1", "2"]), pa.chunked_array([["1"], ["2"]])]
    other = [pa.array(["2", "1"]), pa.array([1, 2]), pa.array(["1"]), pa.array(["12"])]
    assert len({ids_digest(ids) for ids in same}) == 1
    assert len({ids_digest(ids) for ids in [*same, *other]}) == 5


def record(unit: int, plan: str) -> Record:
    return Record(unit, plan, 10, "aa", 9, "bb", 1, 1, {"id": 0, "physical_rows": 9}, 2.0)


def test_records_of_another_plan_do_not_count(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    for unit, plan in ((0, "old"), (1, "new"), (2, "new")):
        write_record(run, record(unit, plan))
    assert read_records(run, "new") == {1: record(1, "new"), 2: record(2, "new")}
    assert read_record(run, 0, "new") is None
    assert read_record(run, 7, "new") is None
    assert record(1, "new").rows_per_s == 5.0


def test_a_repeated_record_replaces_the_first(tmp_path: Path) -> None:
    write_record(str(tmp_path), record(3, "one"))
    write_record(str(tmp_path), record(3, "two"))
    assert read_record(str(tmp_path), 3, "two") == record(3, "two")
    assert read_records(str(tmp_path), "one") == {}
