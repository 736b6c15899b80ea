"""The recipe: defaults and what it refuses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from conjoin.pipeline.recipe import TowerConfig, TrainConfig


def test_a_tower_that_the_recipe_does_not_name_has_the_defaults() -> None:
    recipe = TrainConfig.model_validate({"towers": {"image": {"model": "efficientnet-lite0", "tune": "head"}}})
    assert recipe.tower("image").tune == "head"
    assert recipe.tower("text") == TowerConfig()


@pytest.mark.parametrize("field", [{"lr": 0}, {"global_batch_size": 1}, {"clip_grad_norm": 0}, {"warmup": 1.5}])
def test_values_out_of_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TrainConfig.model_validate(field)
