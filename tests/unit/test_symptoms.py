"""What is said of a training that goes wrong, and when."""

from __future__ import annotations

import math

import pytest

from conjoin.pipeline.symptoms import symptom


def figures(step: int, loss: float = 1.0, total: int = 200, **more: float) -> dict[str, float]:
    return {"step": step, "total": total, "loss": loss, "chance_loss": math.log(256), **more}


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
    assert ("no better than guessing" in symptom(figures(step, loss, total))) == warned


@pytest.mark.parametrize(
    ("sign", "healthy", "said"),
    [
        ({"image_grad_norm": 0.0}, {"image_grad_norm": 1e-9}, "the image tower gets no gradient"),
        ({"text_alike": 0.99}, {"text_alike": 0.9}, "all vectors of text are nearly the same (mean cosine 0.99)"),
        ({"image_text_scale": 100.0}, {"image_text_scale": 99.0}, "the scale of image-text is at its limit"),
    ],
)
def test_signs_are_named_once_the_training_is_under_way(
    sign: dict[str, float], healthy: dict[str, float], said: str
) -> None:
    assert said in symptom(figures(40, **sign))
    assert not symptom(figures(39, **sign))
    assert not symptom(figures(40, **healthy))


def test_the_sigmoid_loss_has_no_clamp_to_warn_of() -> None:
    assert not symptom(figures(40, image_text_scale=112.3), "sigmoid")


def test_nothing_is_said_of_nothing() -> None:
    assert not symptom({})
