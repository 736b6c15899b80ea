"""The pool for a machine, and what needs none."""

from __future__ import annotations

from pathlib import Path

import pytest

from conjoin.pipeline import storage
from conjoin.pipeline.embed import Attempt, Pool, is_little, pool_for
from conjoin.pipeline.units import INSERT, Unit, file_of


@pytest.mark.parametrize(
    ("wanted", "cpus", "gpus", "expected"),
    [
        ("auto", 1, 0, Pool(1, 0, 1, 0)),
        ("auto", 2, 0, Pool(1, 0, 2, 1)),
        ("auto", 16, 0, Pool(1, 0, 16, 15)),
        ("auto", 64, 8, Pool(8, 1, 8, 7)),
        ("auto", 2, 4, Pool(2, 1, 1, 0)),
        (3, 2, 0, Pool(2, 0, 1, 0)),
        (4, 16, 2, Pool(2, 1, 8, 7)),
    ],
    ids=["one-cpu", "two-cpus", "many-cpus", "gpus", "more-gpus-than-cpus", "too-many-asked", "more-than-gpus"],
)
def test_pool(wanted: int | str, cpus: int, gpus: int, expected: Pool) -> None:
    pool = pool_for(wanted, cpus, gpus)
    assert pool == expected
    # never more than there is: actors hold a CPU each, and each has `ahead` tasks of one CPU
    assert pool.actors * (1 + pool.ahead) <= cpus


@pytest.mark.parametrize(
    ("rows", "attempt", "begun", "here"),
    [
        (1_000, Attempt(rows_per_s=500), False, True),
        (10_000, Attempt(rows_per_s=500), False, False),
        (1_000, Attempt(), False, False),
        (1_000, Attempt(rows_per_s=500, address="auto"), False, False),
        (1_000, Attempt(rows_per_s=500), True, False),
        (0, Attempt(), False, True),
    ],
    ids=["little", "much", "rate-unknown", "a-cluster", "begun-before", "no-tower"],
)
def test_ray_is_started_only_for_much_work(
    tmp_path: Path, rows: int, attempt: Attempt, begun: bool, here: bool
) -> None:
    unit = Unit(0, INSERT, rows or 5, "ids", ("text",) if rows else ())
    if begun:
        storage.write_json(file_of(str(tmp_path), 0, "tries"), {"tries": 1})
    assert is_little([unit], attempt, str(tmp_path)) is here
