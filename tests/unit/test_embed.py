"""The pool for a machine."""

from __future__ import annotations

import pytest

from conjoin.pipeline.embed import Pool, pool_for


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
