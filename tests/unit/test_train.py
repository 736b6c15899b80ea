"""What a training run says of itself."""

from __future__ import annotations

import math

import pytest

from conjoin.pipeline.train import TrainReport, stuck


def figures(step: int, loss: float, total: int = 200) -> dict[str, float]:
    return {"step": step, "total": total, "loss": loss, "chance_loss": math.log(256)}


@pytest.mark.parametrize(
    ("step", "loss", "total", "warned"),
    [
        (39, 5.54, 100, False),
        (40, 5.54, 100, True),
        (40, 5.54, 1000, False),
        (200, 5.60, 1000, True),
        (200, 5.2, 1000, False),
        (200, 6.5, 1000, False),
    ],
)
def test_a_loss_no_better_than_guessing_is_named_after_a_while(
    step: int, loss: float, total: int, warned: bool
) -> None:
    assert bool(stuck(figures(step, loss, total))) == warned


def test_the_report_shows_the_warning() -> None:
    report = TrainReport("f", "f/best", "0" * 32, 10, 200, 1.0, 10.0, {}, stuck(figures(200, 5.545)))
    assert any("no better than guessing: lower train.lr" in line for line in report.lines())
    assert not stuck({})
