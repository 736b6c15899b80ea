"""What a rank reads of a step: every row once an epoch, in order, drawn by (seed, epoch, row) alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile as sf

from conjoin.encoders.options import TowerOptions
from conjoin.encoders.towers import build_tower
from conjoin.pipeline import mixture, steps
from conjoin.pipeline.order import Order
from conjoin.pipeline.progress import silent
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.selection import Selection, select
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.steps import Raw, Reader, rank_steps

NUM_ROWS = 60
WHOLE = {"split": {"validation": 0, "test": 0}}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Selection:
    """60 rows in row groups of 7; every fifth has no text, the others a list of two."""
    path = tmp_path_factory.mktemp("steps") / "rows.parquet"
    texts = [None if number % 5 == 0 else [f"first {number}", f"second {number}"] for number in range(NUM_ROWS)]
    pq.write_table(pa.table({"id": np.arange(NUM_ROWS), "text": texts}), path, row_group_size=7)
    source = SourceConfig.model_validate({"path": str(path), "id": "id", "text": "text", "image": "text", **WHOLE})
    return select(mixture.parts(source, TrainConfig()), None, silent)["train"]


@pytest.fixture
def make_wave() -> Callable[[int], bytes]:
    """A tone of 0.1 s as WAV."""

    def make(number: int) -> bytes:
        out = io.BytesIO()
        sf.write(out, np.sin(np.arange(1600) * (0.01 + 0.01 * number)).astype(np.float32), 16000, format="WAV")
        return out.getvalue()

    return make


@pytest.fixture
def make_reader(rows: Selection) -> Callable[..., Reader]:
    spec = build_tower("text", TowerOptions(width=16, max_tokens=8), 8, ["first", "second"]).spec

    def make(augment: bool = True, seed: int = 0) -> Reader:
        return Reader(rows, (Raw("text", spec),), seed, augment)

    return make


@pytest.mark.parametrize("world", [1, 2, 3, 70])
def test_ranks_share_every_row_once_an_epoch(rows: Selection, world: int) -> None:
    order = Order(rows.reading, 16, seed=3)
    assert order.steps_per_epoch == 4
    shares = [list(rank_steps(order, 0, 8, (rank, world))) for rank in range(world)]
    for epoch in (0, 1):
        seen = np.concatenate([part for share in shares for number, part in share if number == epoch])
        assert sorted(seen.tolist()) == list(range(NUM_ROWS))


def test_a_later_start_is_the_rest_of_the_same_steps(rows: Selection) -> None:
    order = Order(rows.reading, 16, seed=3)
    whole, rest = list(rank_steps(order, 0, 9, (0, 2))), list(rank_steps(order, 6, 9, (0, 2)))
    assert len(whole) == 9
    for (epoch, part), (again, same) in zip(whole[6:], rest, strict=True):
        assert epoch == again
        assert part.tolist() == same.tolist()


def test_values_are_in_the_order_of_the_rows_and_gaps_are_marked(make_reader: Callable[..., Reader]) -> None:
    positions = np.array([59, 0, 8, 7, 30, 13])
    found = make_reader(augment=False).read(positions, 0)["text"]
    assert found.present.tolist() == [True, False, True, True, False, True]
    assert found.values == ["first 59", "first 8", "first 7", "first 13"]


def test_an_item_of_a_list_is_drawn_by_seed_epoch_and_row(make_reader: Callable[..., Reader]) -> None:
    positions = np.arange(NUM_ROWS)
    one = make_reader().read(positions, 1)["text"].values
    assert one == [
        *make_reader().read(positions[:20], 1)["text"].values,
        *make_reader().read(positions[20:], 1)["text"].values,
    ]
    assert {value.split()[0] for value in one} == {"first", "second"}
    assert one != make_reader().read(positions, 2)["text"].values
    assert one != make_reader(seed=1).read(positions, 1)["text"].values


def test_a_row_group_is_read_once_for_the_steps_of_a_window(
    make_reader: Callable[..., Reader], monkeypatch: pytest.MonkeyPatch
) -> None:
    from conjoin.pipeline import source

    reads: list[int] = []
    real = source.read_rows

    def counted(config: SourceConfig, file: str, row_group: int, *rest: object) -> pa.Table:
        reads.append(row_group)
        return real(config, file, row_group, *rest)

    monkeypatch.setattr(source, "read_rows", counted)
    steps._kept.clear()
    reader = make_reader(augment=False)
    for _ in range(3):
        reader.read(np.arange(0, NUM_ROWS, 3), 0)
    assert sorted(reads) == list(range(9))
    monkeypatch.setattr(steps, "_KEPT_BYTES", 0)
    steps._kept.clear()
    assert reader.read(np.array([8]), 0)["text"].values == ["first 8"]
    assert not steps._kept


def test_each_part_is_read_with_its_own_columns(
    rows: Selection, tmp_path: Path, make_wave: Callable[[int], bytes]
) -> None:
    """A part with texts in lists and no sound, one whose text is a template; rows of both in one step, one twice."""
    table = {"key": range(8), "title": [f"title {n}" for n in range(8)], "sound": [make_wave(n) for n in range(8)]}
    pq.write_table(pa.table(table), tmp_path / "own.parquet", row_group_size=3)
    source = rows.parts[0].source.model_copy(update={"path": str(tmp_path / "own.parquet"), "audio": "sound"})
    first = {"path": rows.files[0], "audio": None}
    second = {"path": str(tmp_path / "own.parquet"), "id": "key", "text": "a {title}", "image": None, "weight": 2}
    both = mixture.parts(source, TrainConfig.model_validate({"path": [first, second]}))
    found = select(both, None, silent)["train"]
    assert found.modalities == ("image", "text", "audio")
    text, audio = (build_tower(name, TowerOptions(width=16, max_s=0.1), 8, ["a"]).spec for name in ("text", "audio"))
    reader = Reader(found, (Raw("text", text), Raw("audio", audio)), 0, augment=True)
    positions = np.array([61, 7, 5, 67, 61])
    read = reader.read(positions, 3)
    assert read["text"].present.tolist() == [True, True, False, True, True]
    assert [value for value in read["text"].values if "title" in value] == ["a title 1", "a title 7", "a title 1"]
    assert read["text"].values[1] in ("first 7", "second 7")
    assert {reader.read(positions, draw)["text"].values[1] for draw in range(20)} == {"first 7", "second 7"}
    assert read["audio"].present.tolist() == [True, False, False, True, True]
    sounds = read["audio"].values
    assert np.array_equal(sounds[0], sounds[2])
    assert not np.array_equal(sounds[0], sounds[1])
