"""Which rows may be trained on: whole groups, a condition, positions that name their rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline import mixture
from conjoin.pipeline.errors import ConfigError, SourceError, TrainError
from conjoin.pipeline.progress import Progress, silent
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.selection import Selection, ids_of, select
from conjoin.pipeline.source import SourceConfig

NUM = 400


@pytest.fixture
def config(tmp_path: Path) -> SourceConfig:
    for name, start in (("a", 0), ("b", NUM // 2)):
        numbers = range(start, start + NUM // 2)
        table = pa.table(
            {
                "id": pa.array([f"p{n}" for n in numbers]),
                "style": pa.array([f"s{n % 100}" if n % 7 else None for n in numbers]),
                "Price": pa.array([n if n % 5 else None for n in numbers]),
                "t": pa.array(["words"] * len(numbers)),
            }
        )
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=60)
    split = {"validation": 0.2, "test": 0.2}
    return SourceConfig.model_validate(
        {"path": str(tmp_path), "id": "id", "group": "style", "text": "t", "split": split}
    )


def chosen(config: SourceConfig, where: str | None = None) -> dict[str, Selection]:
    return select(parts(config), where, silent)


def parts(config: SourceConfig, path: object = None) -> tuple[mixture.Part, ...]:
    """One modality is enough to select by."""
    recipe = TrainConfig.model_validate({"path": path})
    return mixture.parts(config.model_copy(update={"image": "t"}), recipe)


def column(selection: Selection, name: str) -> list[object]:
    """The column's value of every selected row, read by position."""
    groups = {}
    found = []
    for file, group, row in zip(selection.file_N, selection.row_group_N, selection.row_N, strict=True):
        key = (selection.files[file], int(group))
        if key not in groups:
            groups[key] = pq.ParquetFile(key[0]).read_row_group(key[1], columns=[name])[name].to_pylist()
        found.append(groups[key][row])
    return found


def test_every_row_is_in_one_split_and_groups_stay_whole(config: SourceConfig) -> None:
    found = chosen(config)
    ids = {name: column(part, "id") for name, part in found.items()}
    assert sorted(str(key) for keys in ids.values() for key in keys) == sorted(f"p{n}" for n in range(NUM))
    assert all(0.1 < len(ids[name]) / NUM < 0.3 for name in ("validation", "test"))
    styles = [{style for style in column(part, "style") if style} for part in found.values()]
    assert sum(len(some) for some in styles) == len(set.union(*styles))


def test_group_numbers_are_equal_for_equal_groups_only(config: SourceConfig) -> None:
    train = chosen(config)["train"]
    names = [style or key for style, key in zip(column(train, "style"), column(train, "id"), strict=True)]
    assert (
        len(set(zip(names, train.group_N.tolist(), strict=True))) == len(set(names)) == len(set(train.group_N.tolist()))
    )


def test_rows_come_in_the_order_of_the_source(config: SourceConfig) -> None:
    train = chosen(config)["train"]
    order = [int(str(key)[1:]) for key in column(train, "id")]
    assert order == sorted(order)
    assert (np.diff(train.reading) >= 0).all()
    assert len(set(train.reading.tolist())) == 8


def test_a_condition_chooses_among_all_splits_and_null_is_false(config: SourceConfig) -> None:
    whole, cheap = chosen(config), chosen(config, "price < 100 OR id = 'p300'")
    for name, part in cheap.items():
        expected = [key for key in column(whole[name], "id") if _is_cheap(int(str(key)[1:]))]
        assert column(part, "id") == expected


def _is_cheap(number: int) -> bool:
    return number == 300 or (number < 100 and number % 5 != 0)


def test_progress_counts_the_rows(config: SourceConfig) -> None:
    seen: list[Progress] = []
    select(parts(config), None, seen.append)
    assert [(step.done, step.total) for step in seen][-1] == (NUM, NUM)


def test_two_selections_follow_each_other(config: SourceConfig) -> None:
    found = chosen(config)
    both = found["validation"].followed_by(found["test"])
    assert column(both, "id") == column(found["validation"], "id") + column(found["test"], "id")
    assert len(both) == len(found["validation"]) + len(found["test"])


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("price <", "train.where is not SQL"),
        ("cost < 3", r"unknown column 'cost'.*a\.parquet.*It has id, style, Price, t"),
        ("price < 'much'", "train.where cannot be evaluated"),
        ("nosuch(price)", "train.where cannot be evaluated"),
        ("id IN (SELECT * FROM read_csv('/etc/passwd'))", "train.where"),
    ],
    ids=["syntax", "column", "type", "function", "file"],
)
def test_a_wrong_condition_is_named(config: SourceConfig, where: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        chosen(config, where)


def test_a_condition_that_leaves_nothing(config: SourceConfig) -> None:
    with pytest.raises(TrainError, match=r"0 of 400 rows where price < 0 are for training.*two or more"):
        chosen(config, "price < 0")


def test_groups_and_conditions_on_text_that_is_not_utf8(tmp_path: Path) -> None:
    styles = pa.array([b"caf\xe9", b"ok", b"caf\xe9"] * 20, pa.binary()).view(pa.string())
    table = pa.table({"id": pa.array(range(60)), "style": styles, "t": pa.array(["x"] * 60)})
    pq.write_table(table, tmp_path / "a.parquet")
    split = {"validation": 0.0, "test": 0.0}
    config = SourceConfig.model_validate(
        {"path": str(tmp_path), "id": "id", "group": "style", "text": "t", "split": split}
    )
    found = chosen(config, "style <> 'ok'")["train"]
    assert len(found) == 40
    assert len(set(found.group_N.tolist())) == 1


def test_a_file_that_went_away_is_named(config: SourceConfig, tmp_path: Path) -> None:
    found = parts(config)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(SourceError, match=r"a file of the source is gone.*a\.parquet"):
        select(found, "price < 3", silent)


@pytest.fixture
def mixed(config: SourceConfig, tmp_path: Path) -> tuple[mixture.Part, ...]:
    """The 400 rows, and 300 with columns of their own: 30 of them in groups s0 .. s29, ids 0 .. 299."""
    numbers = range(300)
    table = pa.table(
        {
            "key": pa.array(numbers),
            "kind": pa.array([f"s{n}" if n < 30 else None for n in numbers]),
            "body": ["words"] * 300,
            "picture": pa.array([b"x"] * 300),
        }
    )
    (tmp_path / "other").mkdir()
    pq.write_table(table, tmp_path / "other/c.parquet", row_group_size=100)
    own = {"path": f"{tmp_path}/other/*.parquet", "weight": 0.5, "id": "key", "group": "kind", "text": "{body}!"}
    return parts(config, [f"{tmp_path}/[ab].parquet", {**own, "image": "picture"}])


def test_parts_are_split_alike_and_share_groups(mixed: tuple[mixture.Part, ...]) -> None:
    found = select(mixed, None, silent)
    train, validation = found["train"], found["validation"]
    assert sum(map(len, found.values())) == 700
    assert (np.diff(train.weights.part_N) >= 0).all()
    assert train.weights.by_part == (1.0, 0.5)
    first, second = (set(train.group_N[train.weights.part_N == part].tolist()) for part in (0, 1))
    ids = ids_of(train, np.arange(len(train)))
    in_both = {int(key) for key, part in zip(ids, train.weights.part_N, strict=True) if part == 1} & set(range(30))
    assert len(first & second) == len(in_both) > 5
    assert not first & set(validation.group_N.tolist())
    assert len(set(train.weights.part_N[:100].tolist())) == 1
    share = len(np.flatnonzero(validation.weights.part_N == 1)) / len(validation)
    assert abs(np.mean(validation.weights.part_N[:20] == 1) - share) < 0.1


def test_ids_of_a_part_with_its_own_ids_are_other_things(config: SourceConfig, tmp_path: Path) -> None:
    plain = config.model_copy(update={"group": None})
    both = [f"{tmp_path}/a.parquet", {"path": f"{tmp_path}/a.parquet", "id": "id"}]
    train = select(parts(plain, both), None, silent)["train"]
    assert len(set(train.group_N.tolist())) == len(train)
    both = [f"{tmp_path}/a.parquet", {"path": f"{tmp_path}/a.parquet"}]
    train = select(parts(plain, both), None, silent)["train"]
    assert len(set(train.group_N.tolist())) == len(train) / 2


def test_a_condition_applies_to_parts_that_have_its_columns(mixed: tuple[mixture.Part, ...]) -> None:
    found = select(mixed, "price < 0", silent)
    assert sum(map(len, found.values())) == 300
    with pytest.raises(ConfigError, match=r"unknown column 'body2'.*a\.parquet"):
        select(mixed, "body2 = 'words'", silent)
    with pytest.raises(ConfigError, match=r"unknown column 'kind'.*a\.parquet"):
        select(mixed, "price < 3 OR kind = 's1'", silent)


def test_ids_in_the_order_asked_for(mixed: tuple[mixture.Part, ...]) -> None:
    train = select(mixed, None, silent)["train"]
    last = len(train) - 1
    assert ids_of(train, np.array([last, 0, last])) == [ids_of(train, np.array([at]))[0] for at in (last, 0, last)]
