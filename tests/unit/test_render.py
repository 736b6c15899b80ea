from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.jobs.render import facts, write_rows
from conjoin.pipeline.errors import ConfigError

ROWS = pa.table({"id": ["a", "b"], "d": [0.123456, float("nan")], "v": [[0.0] * 8, None], "t": [b"xyz", None]})


def test_a_table_abbreviates_vectors_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(ROWS)
    shown = capsys.readouterr().out
    assert "0.1235" in shown
    assert "... 8]" in shown
    assert "<3 bytes>" in shown
    assert "(2 rows)" in shown


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(ROWS, style="json")
    rows = json.loads(capsys.readouterr().out)
    assert [row["d"] for row in rows] == [0.123456, None]


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".json"])
def test_files_by_suffix(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"rows{suffix}"
    write_rows(ROWS, out=out)
    assert out.stat().st_size > 0
    if suffix == ".parquet":
        assert pq.read_table(out)["id"].to_pylist() == ["a", "b"]


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="parquet"):
        write_rows(ROWS, out=tmp_path / "rows.xlsx")


def test_facts_nest() -> None:
    assert facts({"a": {"long name": 1, "b": [2, 3]}}).splitlines() == [
        "a",
        "  long name  1",
        "  b          2",
        "  b          3",
    ]
