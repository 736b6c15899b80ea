"""Nights over a bucket that fails, or with keys that run out: they finish or say why not; `live` is never wrong."""

from __future__ import annotations

import pytest
from bucket import Bucket, change, reading
from faults import KINDS, Faults, faulty


def nights(bucket: Bucket, faults: Faults, count: int) -> None:
    """Nights of one change each through a faulty endpoint, under the eyes of a reader."""
    with faulty(bucket.good, faults) as endpoint:
        for number in range(count):
            before = bucket.wanted()
            change(bucket, number)
            with reading(bucket, (before, bucket.wanted())):
                bucket.night(endpoint)
    assert sum(faults.met[kind] for kind in KINDS) > 0
    for error in bucket.errors:
        assert error.what, repr(error)


def test_a_night_over_a_faulty_bucket_finishes(bucket: Bucket) -> None:
    nights(bucket, Faults(0.05, seed=1), 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(2, 6))
def test_nights_over_a_faulty_bucket_finish(bucket: Bucket, seed: int) -> None:
    faults = Faults(0.05, seed)
    nights(bucket, faults, 4)
    print(dict(faults.met), [str(error) for error in bucket.errors])
