"""What train.path names: parts with columns, weights and files of their own."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline import mixture
from conjoin.pipeline.errors import ConfigError, SourceError
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.source import SourceConfig


@pytest.fixture
def source(tmp_path: Path) -> SourceConfig:
    """Two files of a shop, one of captions with other names, a CSV and a tar that are never opened here."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "sets").mkdir()
    for name in ("a", "b"):
        table = pa.table({"sku": [f"{name}1"], "style": ["s"], "title": ["t"], "photo": [b"x"], "price": [1]})
        pq.write_table(table, tmp_path / f"shop/{name}.parquet")
    pq.write_table(pa.table({"key": [1], "img": [b"x"], "body": ["t"]}), tmp_path / "captions.parquet")
    for name in ("sets/00.tar", "sets/01.tar", "more.csv"):
        (tmp_path / name).write_bytes(b"x")
    shop = {"path": str(tmp_path / "shop"), "id": "sku", "group": "style", "image": "photo", "text": "{title}"}
    return SourceConfig.model_validate({**shop, "keep": ["price"], "changed_by": "price"})


def parts(source: SourceConfig, *path: object, **recipe: object) -> tuple[mixture.Part, ...]:
    named = {} if not path else {"path": list(path)}
    return mixture.parts(source, TrainConfig.model_validate({**named, **recipe}))


def test_without_a_path_it_is_the_source(source: SourceConfig) -> None:
    (part,) = parts(source)
    assert part.source == source
    assert (part.weight, part.has_own_ids, len(part.files)) == (1.0, False, 2)
    assert [name for name, *_ in mixture.stamps([part])] == [file.path for file in part.files]


def test_plain_paths_are_one_part_with_the_columns_of_the_source(source: SourceConfig, tmp_path: Path) -> None:
    named = [f"{tmp_path}/shop/b.parquet", f"{tmp_path}/shop"]
    (part,) = parts(source, *named)
    assert [Path(file.path).name for file in part.files] == ["b.parquet", "a.parquet"]
    assert (part.source.path, part.source.keep, part.source.changed_by) == (named, [], None)
    assert part.source.text == "{title}"
    (one,) = mixture.parts(source, TrainConfig(path=named[0]))
    assert one.source.path == named[0]


def test_an_entry_has_its_own_columns_and_the_rest_of_the_source(source: SourceConfig, tmp_path: Path) -> None:
    own = {"path": f"{tmp_path}/captions.parquet", "weight": 2, "id": "key", "image": "img", "text": "a {body}"}
    shop, captions = parts(source, f"{tmp_path}/shop", {**own, "group": None})
    assert (shop.source.image, shop.weight, shop.has_own_ids) == ("photo", 1.0, False)
    columns = {name: getattr(captions.source, name) for name in ("id", "group", "image", "text", "audio")}
    assert columns == {"id": "key", "group": None, "image": "img", "text": "a {body}", "audio": None}
    assert (captions.weight, captions.has_own_ids) == (2.0, True)


def test_a_csv_and_tars_are_listed_and_not_opened(source: SourceConfig, tmp_path: Path) -> None:
    tar = {"path": f"{tmp_path}/sets/{{00..01}}.tar", "image": "jpg", "text": "txt"}
    csv, tars = parts(source, f"{tmp_path}/more.csv", tar)
    assert (csv.kind, csv.source.id, csv.source.group, csv.files) == ("CSV", "sku", "style", ())
    assert (tars.kind, tars.source.id, tars.source.group, tars.has_own_ids) == ("tar", "__key__", None, True)
    assert [Path(name).name for name, *_ in mixture.stamps([csv, tars])] == ["more.csv", "00.tar", "01.tar"]
    (whole,) = parts(source, {"path": f"{tmp_path}/sets", "image": "jpg", "text": "txt", "id": "uid", "group": "g"})
    assert (whole.kind, whole.source.id, whole.source.group) == ("tar", "uid", "g")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"id": "key", "image": "pic", "group": None}, r"train\.path: image: no column 'pic'.*captions\.parquet"),
        (
            {"id": "key", "image": "img", "text": "body"},
            r"source\.group: no column 'style'.*Or say `group: null` in this entry",
        ),
        ({"image": "img", "text": "body", "group": None}, r"source\.id: no column 'sku'"),
    ],
    ids=["named", "inherited", "id"],
)
def test_a_column_that_is_not_there_says_whose_it_was(
    source: SourceConfig, tmp_path: Path, entry: dict[str, object], words: str
) -> None:
    with pytest.raises(SourceError, match=words):
        parts(source, {"path": f"{tmp_path}/captions.parquet", **entry})


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("gone.parquet", r"no such file or directory.*Correct train\.path"),
        ("*.orc", "no file matches"),
        ("{more.csv,sets/00.tar}", "holds CSV and tar files.*entry of its own"),
    ],
)
def test_files_that_are_not_there(source: SourceConfig, tmp_path: Path, path: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        parts(source, {"path": f"{tmp_path}/{path}"})


def test_an_empty_list_of_paths(source: SourceConfig) -> None:
    with pytest.raises(SourceError, match=r"train\.path is empty"):
        mixture.parts(source, TrainConfig(path=[]))


def test_every_part_joins_two_modalities_and_towers_are_of_any(source: SourceConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two modalities or more, the source gives text.*shop"):
        parts(source, {"path": f"{tmp_path}/shop", "image": None})
    with pytest.raises(ConfigError, match=r"train\.towers names 'audio'"):
        parts(source, f"{tmp_path}/shop", towers={"audio": {}})
    sound = {"path": f"{tmp_path}/more.csv", "audio": "wav", "image": None}
    found = parts(source, f"{tmp_path}/shop", sound, towers={"audio": {}})
    assert mixture.modalities(found) == ("image", "text", "audio")
