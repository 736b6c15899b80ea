"""What a night will take, and the limits that stop it before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from conjoin.pipeline import runs, storage
from conjoin.pipeline.errors import GateError
from conjoin.pipeline.estimate import Limits, check_limits, estimate, last_rate


def finish(uri: str, run_id: str, **report: object) -> None:
    storage.write_json(storage.join(runs.run_directory(uri, run_id), "plan.json"), {})
    runs.finish(uri, run_id, {"rows_per_s": 0.0, "fingerprint": "f", **report})


def test_the_rate_is_the_newest_of_this_encoder_that_embedded(tmp_path: Path) -> None:
    uri = f"{tmp_path}/shop.lance"
    assert last_rate(uri, "f") is None
    finish(uri, "shop-2026-01-01", rows_per_s=10.0)
    finish(uri, "shop-2026-01-02", rows_per_s=20.0)
    finish(uri, "shop-2026-01-03")
    finish(uri, "shop-2026-01-04", rows_per_s=99.0, fingerprint="another")
    assert last_rate(uri, "f") == 20.0
    assert last_rate(uri, "unknown") is None


def test_hours_and_cost() -> None:
    one = estimate(7_200_000, 100.0, 4, 2.5)
    assert one.hours == pytest.approx(5.0)
    assert one.cost == pytest.approx(50.0)
    assert estimate(3_600, 1.0, 0, None).hours == pytest.approx(1.0)
    assert estimate(3_600, 1.0, 0, None).cost is None


@pytest.mark.parametrize(
    ("limits", "message"), [({"hours": 4.9}, "5.0 hours expected"), ({"cost": 49}, "a cost of 50.00 expected")]
)
def test_above_a_limit_is_an_error_with_the_numbers(limits: dict[str, float], message: str) -> None:
    with pytest.raises(GateError, match=message):
        check_limits(estimate(7_200_000, 100.0, 4, 2.5), Limits.model_validate(limits))


def test_within_the_limits_nothing_happens() -> None:
    check_limits(estimate(7_200_000, 100.0, 4, 2.5), Limits(hours=5.1, cost=50.1))
    check_limits(estimate(7_200_000, 100.0, 4, None), Limits(cost=1))
