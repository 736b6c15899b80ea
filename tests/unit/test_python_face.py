"""`import conjoin as cj`: every name is there, and takes what the README gives it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import conjoin as cj
from conjoin.pipeline.errors import ConfigError


@pytest.mark.parametrize("name", [name for name in cj.__all__ if name != "__version__"])
def test_every_name_loads(name: str) -> None:
    found = getattr(cj, name)
    assert callable(found) or inspect.ismodule(found)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cj.nothing
    assert set(cj.__all__) == set(dir(cj))


@pytest.mark.parametrize("name", ["train", "evaluate", "run"])
def test_what_works_on_a_run_file_takes_its_configuration_first(name: str) -> None:
    assert next(iter(inspect.signature(getattr(cj, name)).parameters)) == "config"


def test_a_table_is_evaluated_from_python(make_table: Callable[..., Any], tmp_path: Path) -> None:
    made = make_table(40)
    file = tmp_path / "conjoin.yaml"
    source = {"path": "none.parquet", "id": "id", "image": "image", "text": "caption"}
    file.write_text(yaml.safe_dump({"name": "things", "source": source, "table": {"path": made.uri}}))
    config = cj.config(file, train__epochs=3)
    assert config.train.epochs == 3
    found = cj.evaluate(config, where="price >= 0")
    assert {(one.query, one.candidate) for one in found.directions} == {("image", "text"), ("text", "image")}
    with pytest.raises(ConfigError, match="validation or test"):
        cj.evaluate(config, split="train")
    with pytest.raises(ConfigError, match="no encoder"):
        cj.evaluate(config, split="test")
