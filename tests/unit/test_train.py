"""What a training run says of itself, and which of Ray Train's helpers it takes."""

from __future__ import annotations

import pytest

from conjoin.pipeline import workers
from conjoin.pipeline.train import TrainReport, _trainer_class


def test_the_report_shows_the_warning() -> None:
    report = TrainReport("f", "f/best", "0" * 32, 10, 200, 1.0, 10.0, {}, "no better than guessing: lower train.lr")
    assert any("no better than guessing: lower train.lr" in line for line in report.lines())


@pytest.mark.parametrize("here", [True, False], ids=["own", "cluster"])
def test_only_a_cluster_gets_the_actor_that_asks_its_dashboard(here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train import ScalingConfig

    monkeypatch.setattr(workers, "started_here", lambda: here)
    trainer = _trainer_class()(print, scaling_config=ScalingConfig(num_workers=1))
    names = [type(callback).__name__ for callback in trainer._create_default_callbacks()]
    assert ("PlacementGroupCleanerCallback" in names) == (not here)
    assert "BackendSetupCallback" in names


def test_a_ray_is_ours_as_long_as_it_is_the_one_we_started(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(workers, "_started", "10.0.0.1:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    for address, ours in (("10.0.0.1:6379", True), ("10.0.0.2:6379", False)):
        context = type("Context", (), {"gcs_address": address})()
        monkeypatch.setattr(ray, "get_runtime_context", lambda context=context: context)
        assert workers.started_here() == ours
