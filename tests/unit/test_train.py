"""What a training run says of itself."""

from __future__ import annotations

from conjoin.pipeline.train import TrainReport


def test_the_report_shows_the_warning() -> None:
    report = TrainReport("f", "f/best", "0" * 32, 10, 200, 1.0, 10.0, {}, "no better than guessing: lower train.lr")
    assert any("no better than guessing: lower train.lr" in line for line in report.lines())
