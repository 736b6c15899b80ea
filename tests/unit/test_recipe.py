"""The recipe: defaults and what it refuses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from conjoin.pipeline.recipe import TowerConfig, TrainConfig, TrainPath


def test_a_tower_that_the_recipe_does_not_name_has_the_defaults() -> None:
    recipe = TrainConfig.model_validate({"towers": {"image": {"model": "efficientnet-lite0", "tune": "head"}}})
    assert recipe.tower("image").tune == "head"
    assert recipe.tower("text") == TowerConfig()


@pytest.mark.parametrize("field", [{"lr": 0}, {"global_batch_size": 1}, {"clip_grad_norm": 0}, {"warmup": 1.5}])
def test_values_out_of_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TrainConfig.model_validate(field)


def test_an_entry_of_path_keeps_null_and_unsaid_apart() -> None:
    recipe = TrainConfig.model_validate({"path": ["a/", {"path": "b.tar", "weight": 2, "audio": None, "image": "jpg"}]})
    assert isinstance(recipe.path, list)
    entry = recipe.path[1]
    assert isinstance(entry, TrainPath)
    assert entry.named == {"image": "jpg", "audio": None}
    assert recipe.model_dump(mode="json")["path"] == ["a/", {"path": "b.tar", "weight": 2, **entry.named}]
    assert TrainConfig.model_validate_json(recipe.model_dump_json()) == recipe
    assert TrainConfig.model_validate({"path": {"path": "b.tar"}}).path == TrainPath(path="b.tar")


@pytest.mark.parametrize("path", [["a", {"path": "b", "weight": 0}], [{"path": "b", "text": "{x"}], [{"weight": 1}], 3])
def test_paths_that_are_refused(path: object) -> None:
    with pytest.raises(ValidationError):
        TrainConfig.model_validate({"path": path})
