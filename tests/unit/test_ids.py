"""Ids: unique, never null, and named with file and row where they are not."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.ids import check_ids
from conjoin.pipeline.source import SourceConfig, list_source


def _check(tmp_path: Path, *files: list[object]) -> None:
    for number, ids in enumerate(files):
        pq.write_table(pa.table({"id": pa.array(ids)}), tmp_path / f"{number}.parquet", row_group_size=2)
    config = SourceConfig(path=str(tmp_path), id="id")
    check_ids(config, list_source(config))


@pytest.mark.parametrize("files", [(["a", "b", "c"], ["d"]), ([1, 2, 3], [4]), ([], ["a"])], ids=str)
def test_unique_ids_pass(tmp_path: Path, files: tuple[list[object], ...]) -> None:
    _check(tmp_path, *files)


def test_a_duplicate_is_named_with_both_places(tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        _check(tmp_path, ["a", "b", "c"], ["d", "e", "c", "a"])
    text = str(caught.value)
    assert "2 id(s) of column 'id' occur more than once" in text
    assert f"'a': {tmp_path}/0.parquet row 0 and {tmp_path}/1.parquet row 3" in text
    assert f"'c': {tmp_path}/0.parquet row 2 and {tmp_path}/1.parquet row 2" in text
    assert "Make the ids unique" in text


def test_many_duplicates_are_counted_but_not_all_shown(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"9 id\(s\).*and 4 more"):
        _check(tmp_path, list(range(9)), list(range(9)))


@pytest.mark.parametrize(
    ("ids", "words"),
    [(["a", None, "b"], "null in 1 row.*0.parquet row 1"), ([1, None, None], "null in 2 row.*row 1 to .*row 2")],
)
def test_null_ids_are_named(tmp_path: Path, ids: list[object], words: str) -> None:
    with pytest.raises(SourceError, match=words):
        _check(tmp_path, ids)


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1]}), tmp_path / "0.parquet")
    config = SourceConfig(path=str(tmp_path), id="id")
    files = list_source(config)
    (tmp_path / "0.parquet").rename(tmp_path / "1.parquet")
    with pytest.raises(SourceError, match=r"a file of the source is gone.*0\.parquet"):
        check_ids(SourceConfig(path=str(tmp_path / "1.parquet"), id="id"), files)
