"""Texts of training rows: a fair sample of every part, and how often they repeat."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline import mixture
from conjoin.pipeline.captions import captions, duplicates
from conjoin.pipeline.progress import silent
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.selection import Selection, select
from conjoin.pipeline.source import SourceConfig


def rows_of(folder: Path, **files: list[tuple[str | None, object]]) -> Selection:
    """A part per file of (group, text) rows, in row groups of 10."""
    for name, rows in files.items():
        groups, texts = zip(*rows, strict=True)
        ids = [f"{name}{number}" for number in range(len(rows))]
        table = pa.table({"id": ids, "group": pa.array(groups, pa.string()), "text": list(texts)})
        pq.write_table(table.append_column("image", pa.array(ids)), folder / f"{name}.parquet", row_group_size=10)
    source = {"path": str(folder), "id": "id", "group": "group", "text": "text", "image": "image"}
    config = SourceConfig.model_validate({**source, "split": {"validation": 0, "test": 0}})
    paths = [{"path": str(folder / f"{name}.parquet")} for name in files]
    return select(mixture.parts(config, TrainConfig.model_validate({"path": paths})), None, silent)["train"]


def test_repeats_inside_and_outside_of_groups(tmp_path: Path) -> None:
    rows = [("g", "same"), ("g", "same"), ("h", "shared"), (None, "shared"), (None, "own"), (None, None)]
    found = duplicates(rows_of(tmp_path, a=rows))
    assert (found.rows, found.groups, found.checked) == (6, 5, 6)
    assert (found.repeated, found.apart) == (4 / 5, 2 / 5)
    assert not found.is_sampled
    assert found.lines() == [
        "6 training rows in 5 groups",
        "texts that repeat: 80.0% of 6 rows; in other groups: 40.0%",
    ]


def test_repeats_in_lists_and_across_parts(tmp_path: Path) -> None:
    found = duplicates(rows_of(tmp_path, a=[(None, ["x", "y"]), (None, ["z", "z"])], b=[(None, "y"), (None, "w")]))
    assert found.repeated == found.apart == 2 / 4


@pytest.mark.parametrize("most", [15, 20, 100])
def test_a_large_selection_is_sampled_by_row_groups_and_says_so(tmp_path: Path, most: int) -> None:
    found = duplicates(rows_of(tmp_path, a=[(None, f"text {n // 2}") for n in range(100)]), most)
    assert found.checked == most
    assert found.is_sampled == (most < 100) == ("random row groups" in found.lines()[1])
    assert found.repeated == pytest.approx(14 / 15 if most == 15 else 1, abs=0.07)


def test_captions_are_of_every_part_in_proportion(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, a=[(None, f"a{n}") for n in range(60)], b=[(None, [f"b{n}", None]) for n in range(20)])
    assert captions(rows, 8) == ["a0", "a1", "a2", "a3", "a4", "a5", "b0", "b1"]
    assert len(captions(rows, 1000)) == 80
