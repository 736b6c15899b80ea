"""Files, footers and rows of a local source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from conjoin.pipeline import parquet, source
from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.source import SourceConfig, list_source, read_rows


@pytest.fixture
def config(tmp_path: Path) -> SourceConfig:
    for name, start in (("a", 0), ("b", 10)):
        ids = pa.array([f"p{i}" for i in range(start, start + 10)], pa.large_string())
        titles = pa.array([f"title {i % 3}" for i in range(10)]).dictionary_encode()
        table = pa.table({"id": ids, "title": titles, "price": pa.array(range(10), pa.int32())})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4)
    return SourceConfig(path=str(tmp_path), id="id", text="title", keep=["price"])


def test_files_come_with_the_rows_of_their_row_groups(config: SourceConfig, tmp_path: Path) -> None:
    files = list_source(config)
    assert [Path(file.path).name for file in files] == ["a.parquet", "b.parquet"]
    assert [(file.num_rows, file.row_groups) for file in files] == [(10, (4, 4, 2))] * 2
    assert files[0].size_bytes == (tmp_path / "a.parquet").stat().st_size


def test_a_known_unchanged_file_is_not_opened(config: SourceConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {file.path: file for file in list_source(config)}
    opened: list[str] = []
    monkeypatch.setattr(parquet, "_footer", lambda stat: opened.append(stat.uri))
    assert list_source(config, known) == tuple(known.values())
    assert opened == []


def test_a_rewritten_file_is_opened_again(config: SourceConfig, tmp_path: Path) -> None:
    known = {file.path: file for file in list_source(config)}
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table.slice(0, 5), tmp_path / "a.parquet")
    assert [file.num_rows for file in list_source(config, known)] == [5, 10]


def test_rows_have_plain_types(config: SourceConfig, tmp_path: Path) -> None:
    table = read_rows(config, str(tmp_path / "b.parquet"), 1, source.all_columns(config))
    assert table.schema == pa.schema([("id", pa.string()), ("title", pa.string()), ("price", pa.int32())])
    assert table["id"].to_pylist() == ["p14", "p15", "p16", "p17"]


@pytest.mark.parametrize("rows", [[], [0], [3], [0, 2, 3]])
def test_picked_rows_equal_the_whole_row_group(
    config: SourceConfig, tmp_path: Path, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_BATCH_ROWS", 2)
    file, names = str(tmp_path / "a.parquet"), ["price", "id"]
    picked = read_rows(config, file, 0, names, np.array(rows, dtype=np.int64))
    assert picked.equals(read_rows(config, file, 0, names).take(pa.array(rows, pa.int64())))


def test_rows_that_are_no_longer_there(config: SourceConfig, tmp_path: Path) -> None:
    file = str(tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"row group 0 has 4 rows, not 10.*a\.parquet"):
        read_rows(config, file, 0, ["id"], np.array([1, 9]))
    with pytest.raises(SourceError, match="no row group 7"):
        read_rows(config, file, 7, ["id"])
    with pytest.raises(SourceError, match="no column 'gone'"):
        read_rows(config, file, 0, ["gone"])


def test_no_rows_at_all(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": pa.array([], pa.string())}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"no rows in 1 file\(s\)"):
        list_source(SourceConfig(path=str(tmp_path), id="id"))


@pytest.mark.parametrize(
    "content", [b"", b"id,title\n1,x\n", b"PAR1" + b"\0" * 40 + b"PAR1"], ids=["empty", "csv", "torn"]
)
def test_what_is_not_parquet_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(SourceError, match=r"not a readable Parquet file.*a\.parquet"):
        list_source(SourceConfig(path=str(tmp_path), id="id"))


def test_an_id_beyond_int64_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": pa.array([2**64 - 1], pa.uint64())}), tmp_path / "a.parquet")
    config = SourceConfig(path=str(tmp_path), id="id")
    with pytest.raises(SourceError, match=r"does not fit.*a\.parquet"):
        read_rows(config, str(tmp_path / "a.parquet"), 0, ["id"])


def test_text_in_a_struct_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    inner = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
    table = pa.table({"id": ["a", "b"], "facts": pa.StructArray.from_arrays([inner], ["brand"])})
    pq.write_table(table, tmp_path / "a.parquet")
    config = SourceConfig(path=str(tmp_path), id="id", keep=["facts"])
    with pytest.raises(
        SourceError, match=r"column 'facts' of type struct.*not UTF-8.*a\.parquet.*leave the column out"
    ):
        read_rows(config, str(tmp_path / "a.parquet"), 0, ["id", "facts"])


def test_the_names_of_all_columns_of_a_file(config: SourceConfig, tmp_path: Path) -> None:
    assert source.column_names(str(tmp_path / "a.parquet")) == ["id", "title", "price"]
    with pytest.raises(SourceError, match="a file of the source is gone"):
        source.column_names(str(tmp_path / "c.parquet"))


def test_the_schema_says_what_modalities_hold(config: SourceConfig) -> None:
    found = source.check_source(config)
    assert found.contents == {"text": "text"}
    assert found.arrow.names == ["id", "title", "price"]


def test_a_wrong_template_is_a_wrong_run_file() -> None:
    with pytest.raises(ValidationError, match="is allowed, without a format"):
        SourceConfig(path="x", id="id", text="{a:>3}")
