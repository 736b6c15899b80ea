from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.jobs.render import evaluation, facts, write_rows
from conjoin.pipeline.errors import ConfigError
from conjoin.pipeline.evaluate import MAX_QUERIES, Evaluation, Measure, Vectors, compare

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


def test_an_evaluation_says_how_many_were_asked_among_how_many() -> None:
    axes, ids = np.eye(30, dtype=np.float32), np.arange(30)
    sets = {name: Vectors(axes, ids, ids) for name in ("image", "text")}
    whole = evaluation(Evaluation("test split", compare(sets))).splitlines()
    assert whole[1].split()[:3] == ["direction", "queries", "candidates"]
    assert whole[2].split()[:6] == ["image", "->", "text", "30", "30", "1.00"]
    assert "0.33" in whole[2]  # hit@10 by chance
    assert len(whole) == 4
    some = evaluation(Evaluation("test split", compare(sets, Measure(queries=20)))).splitlines()
    assert some[2].split()[3:5] == ["20", "30"]
    assert some[4] == "drawn at random: 20 of 30 image queries, 20 of 30 text queries (--queries 0 asks all)"


def test_the_commands_default_is_the_measures() -> None:
    import typer.main

    from conjoin.jobs.cli import app

    options = typer.main.get_command(app).commands["evaluate"].params  # type: ignore[attr-defined]
    assert next(option.default for option in options if option.name == "queries") == MAX_QUERIES
