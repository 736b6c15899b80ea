"""Samples by position and by id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from conjoin.pipeline import sample


@pytest.fixture
def worn(make_table: Callable[..., Any]) -> Any:
    """270 rows left of 300, in three fragments."""
    made = make_table(300, dim=4)
    lance.dataset(made.uri).delete("stock % 10 = 3")
    return lance.dataset(made.uri)


@pytest.mark.parametrize("count", [0, 1, 100, 270])
def test_rows_by_position_are_those_of_the_whole_table(worn: Any, count: int) -> None:
    wanted = np.sort(np.random.default_rng(count).choice(270, count, replace=False))
    whole = worn.to_table(columns=["id", "text_vec"])
    assert sample.take(worn, wanted, ["id", "text_vec"]).equals(whole.take(pa.array(wanted, pa.int64())))


def test_the_sample_is_fixed_and_of_neighbours() -> None:
    found = sample.positions(1_000_003, 20_000)
    assert len(found) == 20_000 - 20_000 % 64
    assert (np.diff(found) > 0).all()
    assert (np.diff(found) == 1).mean() > 0.98
    assert (found == sample.positions(1_000_003, 20_000)).all()
    assert sample.positions(100, 20_000).tolist() == list(range(100))


@pytest.mark.parametrize("ids", [["it's", "b\\", "x"], [3, -7, 12]], ids=["strings", "integers"])
def test_rows_of_ids(tmp_path: Any, ids: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_IDS_AT_ONCE", 2)
    dataset = lance.write_dataset(pa.table({"id": ids, "n": [0, 1, 2]}), f"{tmp_path}/t.lance")
    dataset.create_scalar_index("id", "BTREE")
    found = sample.rows_of_ids(lance.dataset(f"{tmp_path}/t.lance"), pa.array([*ids, ids[0]]).slice(1), ["n"])
    assert sorted(zip(found["id"].to_pylist(), found["n"].to_pylist(), strict=True)) == sorted(
        [(ids[1], 1), (ids[2], 2), (ids[0], 0)]
    )
    assert sample.rows_of_ids(dataset, pa.array([], found["id"].type), ["n"]).num_rows == 0
