"""The recipe: defaults and what it refuses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from conjoin.encoders.options import TowerOptions, Tuning
from conjoin.pipeline.recipe import TowerConfig, TrainConfig, TrainPath


def test_a_tower_that_the_recipe_does_not_name_has_the_defaults() -> None:
    recipe = TrainConfig.model_validate({"towers": {"image": {"model": "efficientnet-lite0", "tune": "head"}}})
    assert recipe.tower("image").tune == "head"
    assert recipe.tower("text") == TowerConfig()


@pytest.mark.parametrize("field", [{"lr": 0}, {"global_batch_size": 1}, {"clip_grad_norm": 0}, {"warmup": 1.5}])
def test_values_out_of_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        TrainConfig.model_validate(field)


@pytest.mark.parametrize("tune", ["all", "head", "lora", "last:1", "last:12"])
def test_what_may_learn(tune: str) -> None:
    tower = TowerConfig.model_validate({"model": "package:some_bert", "tune": tune})
    assert tower.tuning(7) == Tuning(tune, 8, 16.0, 7)
    assert tower.frozen == (tune == "head")


@pytest.mark.parametrize(
    ("tower", "message"),
    [
        ({"tune": "last:0"}, "should match pattern"),
        ({"tune": "last"}, "should match pattern"),
        ({"tune": "none"}, "should match pattern"),
        ({"tune": "head", "layer_decay": 0.9}, "layer_decay does nothing with tune: head"),
        ({"tune": "all", "lora_rank": 4}, "do nothing with tune: all"),
        ({"layer_decay": 0}, "greater than 0"),
        ({"layer_decay": 1.1}, "less than or equal to 1"),
    ],
)
def test_a_towers_tuning_that_is_refused(tower: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TowerConfig.model_validate(tower)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"schedule": "wsd", "warmup": 0.5, "cooldown": 0.6}, "are more than the whole run"),
        ({"cooldown": 0.5}, "cooldown does nothing with schedule: cosine"),
        ({"schedule": "linear"}, "'cosine', 'wsd' or 'constant'"),
        ({"compile": True, "parallel": "fsdp"}, "compile does not go with parallel: fsdp"),
        ({"ema": 1}, "less than 1"),
        ({"ema": 0}, "greater than 0"),
        ({"patience": 0}, "greater than or equal to 1"),
    ],
)
def test_a_schedule_that_is_refused(field: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate(field)


def test_options_say_how_a_tower_is_made_and_nothing_of_its_tuning() -> None:
    fields = {"model": "efficientnet-lite0", "head": "mlp", "size_px": 96, "tune": "last:3", "dropout": 0.1}
    assert TowerConfig.model_validate(fields).options(3) == TowerOptions(
        model="efficientnet-lite0", head="mlp", size_px=96, seed=3
    )


def test_a_dumped_recipe_is_read_again() -> None:
    recipe = TrainConfig.model_validate({"towers": {"text": {"tune": "head"}, "image": {"tune": "last:2"}}})
    assert TrainConfig.model_validate(recipe.model_dump(mode="json")) == recipe


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
