from __future__ import annotations

import datetime as dt
import pickle
from pathlib import Path

import pytest

from conjoin.jobs.config import RunFile, load, read_run_file, table_of
from conjoin.pipeline.errors import ConfigError

TEXT = """
name: products
source: {path: "s3://shop/dt=${DATE}/", id: product_id, image: image_url, text: "{title}. {brand}", keep: [title]}
table: {path: /vectors/products.lance}
train: {epochs: 2, towers: {image: {model: efficientnet-lite0, tune: head}}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "conjoin.yaml"
    path.write_text(TEXT)
    return path


def test_a_run_file_is_frozen_models(file: Path) -> None:
    config = load(file, date=dt.date(2026, 3, 1))
    assert config.source.path == "s3://shop/dt=2026-03-01/"
    assert config.source.modalities == ("image", "text")
    assert config.train.towers["image"].tune == "head"
    with pytest.raises(ValueError, match="frozen"):
        config.name = "other"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


def test_overrides_reach_into_sections(file: Path) -> None:
    assert load(file, train__epochs=3).train.epochs == 3
    assert read_run_file(file, [("train.towers.text.model", "builtin"), ("embed.actors", "2")], None).embed.actors == 2


def test_variables_come_from_the_environment(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_OUT", "/elsewhere")
    assert load(file, table__path="${SHOP_OUT}/t.lance").table.path == "/elsewhere/t.lance"
    with pytest.raises(ConfigError, match="SHOP_MISSING"):
        load(file, table__path="${SHOP_MISSING}/t.lance")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("source.imge", "x", r"source\.imge: unknown key; did you mean 'image'"),
        ("sorce", {}, r"sorce: unknown key; did you mean 'source'"),
        ("train.epochs", -1, r"train\.epochs: .*greater than 0"),
        ("train.towers.image.modle", "x", r"train\.towers\.image\.modle: unknown key; did you mean 'model'"),
        (
            "train.path",
            ["a", {"path": "b", "wieght": 2}],
            r"train\.path\.1\.wieght: unknown key; did you mean 'weight'",
        ),
        ("train.path", [{"path": "b", "weight": 0}], r"train\.path\.0\.weight: .*greater than 0"),
        ("table.ann_recall", 2, r"table\.ann_recall: .*less than or equal to 1"),
        ("table.full_text", ["txt"], r"table\.full_text: there will be no column 'txt'; did you mean 'text'"),
        ("table.full_text", ["nothing"], r"table\.full_text: .*; the table has .*text"),
        ("embed.max_bad_fraction", "many", r"embed\.max_bad_fraction"),
        ("name", "my table", r"name: "),
    ],
)
def test_wrong_fields_are_named(file: Path, field: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_run_file(file, [(field, value)], None)
    assert str(file) in str(caught.value)


def test_missing_and_broken_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="conjoin init"):
        load(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="YAML"):
        load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(ConfigError, match="mapping"):
        load(tmp_path / "list.yaml")


def test_a_target_is_a_run_file_or_a_table(file: Path) -> None:
    assert table_of(str(file)) == "/vectors/products.lance"
    assert table_of("s3://shop/v/products.lance/") == "s3://shop/v/products.lance"


def test_every_field_of_the_run_file_is_described() -> None:
    for name in ("source", "table", "embed", "gates"):
        section = RunFile.model_fields[name].annotation
        assert section is not None
        for field, info in section.model_fields.items():
            assert info.description, f"{name}.{field} has no description"


def test_a_variable_in_braces_that_is_no_yaml_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "conjoin.yaml"
    file.write_text("name: shop\ntable: {path: ${OUT}/shop.lance}\n")
    with pytest.raises(ConfigError, match="needs quotes") as caught:
        load(file)
    assert "not valid YAML" in str(caught.value)
