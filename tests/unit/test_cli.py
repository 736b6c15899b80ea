"""query, search, history, rollback and init as people type them: data on stdout, words on stderr, exit 0, 1 or 2."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from command import Done, Run
from PIL import Image

from conjoin.pipeline import publish
from conjoin.pipeline.embedder import load

SQL = "SELECT id, price, image_vec FROM things WHERE stock < 3 ORDER BY id"


@pytest.fixture(scope="module")
def fingerprint(tiny_encoder: Path) -> str:
    return load(str(tiny_encoder)).fingerprint


def write(make: Callable[..., Any], folder: Path, fingerprint: str, encoder: Path) -> str:
    """A published table and its run file."""
    uri = str(make(f"{folder}/things.lance", 40, dim=8, fingerprint=fingerprint, encoder=str(encoder), live=False).uri)
    publish.publish(uri, 1, "things-2024-01-01")
    source = {"path": "rows.parquet", "id": "id", "text": "caption"}
    fields = {"name": "things", "source": source, "table": {"path": uri}}
    (folder / "conjoin.yaml").write_text(yaml.safe_dump(fields))
    return uri


@pytest.fixture(scope="module")
def shared(
    make_table_at: Callable[..., Any], fingerprint: str, tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory
) -> str:
    return write(make_table_at, tmp_path_factory.mktemp("cli"), fingerprint, tiny_encoder)


@pytest.fixture
def table(shared: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A table, its run file in the current directory; every test sees the same."""
    monkeypatch.chdir(Path(shared).parent)
    return shared


@pytest.fixture
def fresh(
    make_table_at: Callable[..., Any],
    fingerprint: str,
    tiny_encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """The same for one test alone."""
    monkeypatch.chdir(tmp_path)
    return write(make_table_at, tmp_path, fingerprint, tiny_encoder)


def usage(done: Done, words: str) -> None:
    assert (done.code, done.out) == (2, "")
    assert words in " ".join(done.err.replace("\u2502", " ").split())
    assert "Traceback" not in done.err


def test_a_query_as_a_table(conjoin: Run, table: str) -> None:
    done = conjoin("query", SQL)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0].split() == ["id", "price", "image_vec"]
    assert "... 8]" in lines[1]
    assert lines[-1] == "(3 rows)"
    assert conjoin("query", table, SQL) == conjoin("query", "conjoin.yaml", SQL) == done


def test_a_query_as_json_and_csv(conjoin: Run, table: str) -> None:
    rows = json.loads(conjoin("query", SQL, "--json").out)
    assert [set(row) for row in rows] == [{"id", "price", "image_vec"}] * 3
    assert len(rows[0]["image_vec"]) == 8
    read = list(csv.DictReader(io.StringIO(conjoin("query", SQL, "--csv").out)))
    assert [row["id"] for row in read] == [row["id"] for row in rows]
    assert json.loads(read[0]["image_vec"]) == rows[0]["image_vec"]
    assert conjoin("query", "SELECT id FROM things WHERE false", "--json").out == "[]\n"
    assert conjoin("query", "SELECT id FROM things WHERE false", "--csv").out == "id\n"


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json"])
def test_a_query_into_a_file(conjoin: Run, table: str, suffix: str) -> None:
    done = conjoin("query", SQL, "-o", f"out.{suffix}")
    assert (done.code, done.out, done.err) == (0, f"out.{suffix}\n", "")
    if suffix == "parquet":
        assert pq.read_table("out.parquet").num_rows == 3
    else:
        assert "row-0-" in Path(f"out.{suffix}").read_text()


def test_a_query_explained(conjoin: Run, table: str) -> None:
    done = conjoin("query", SQL, "--explain")
    assert done.code == 0
    assert "filter in Lance: (`stock` < 3)" in done.out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["SELECT idd FROM things"], 1, "conjoin: there is no column 'idd'; did you mean 'id'?\n"),
        (["SELECT id FROM thing"], 1, "conjoin: there is no table 'thing'; did you mean 'things'?\n"),
        (["DROP TABLE things"], 1, "conjoin: DROP is not allowed"),
        (["none.lance", SQL], 1, "conjoin: no table [none.lance]. `conjoin run` makes it\n"),
        (["none.yaml", SQL], 2, "conjoin: no run file [none.yaml]"),
        ([".", SQL], 2, "conjoin: a folder is no run file [.]. Give a run file (conjoin.yaml) or a table"),
        ([SQL, "-o", "none/out.csv"], 2, "conjoin: cannot write the file: No such file or directory [none/out.csv]\n"),
        ([SQL, "-o", "none/out.parquet"], 2, "conjoin: cannot write the file: "),
        ([SQL, "-o", "out.xlsx"], 2, "conjoin: cannot write .xlsx [out.xlsx]. Use .parquet, .csv or .json\n"),
    ],
    ids=["column", "table", "drop", "no-table", "no-file", "folder", "csv", "parquet", "suffix"],
)
def test_query_errors(conjoin: Run, table: str, words: list[str], code: int, message: str) -> None:
    done = conjoin("query", *words)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["query", "a", "b", "c"], "quote the SQL"),
        (["query", SQL, "--csv", "--json"], "one of --json, --csv and --out"),
        (["query", SQL, "--csv", "-o", "x.csv"], "one of --json, --csv and --out"),
        (["search"], "what to look for is missing"),
        (["search", "conjoin.yaml"], "what to look for is missing"),
        (["search", "conjoin.yaml", "red", "apple"], "quote what to look for"),
        (["search", "conjoin.yaml", "red", "--image", "x.png"], "not both"),
        (["search", "red", "-k", "0"], "-k"),
    ],
)
def test_usage_errors(conjoin: Run, table: str, words: list[str], message: str) -> None:
    usage(conjoin(*words), message)


def test_a_search_for_words(conjoin: Run, table: str) -> None:
    done = conjoin("search", "red apple", "-k", "4", "--where", "price < 80", "--json")
    rows = json.loads(done.out)
    assert (done.code, len(rows)) == (0, 4)
    assert [row["distance"] for row in rows] == sorted(row["distance"] for row in rows)
    assert all(row["price"] < 80 for row in rows)
    shown = conjoin("search", table, "red apple", "-k", "4", "--where", "price < 80").out.splitlines()
    assert shown[0].split()[-1] == "distance"
    assert [line.split()[0] for line in shown[1:-1]] == [row["id"] for row in rows]


def test_a_search_for_a_picture(conjoin: Run, table: str) -> None:
    Image.new("RGB", (20, 20), (200, 30, 30)).save("red.png")
    done = conjoin("search", "--image", "red.png", "-k", "2", "--csv")
    assert (done.code, done.err) == (0, "")
    assert len(done.out.splitlines()) == 3
    assert conjoin("search", table, "--image", "red.png", "-k", "2", "--csv").out == done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", "none.png"], "conjoin: image('none.png'): no such file"),
        (["red", "--where", "prize < 3"], "conjoin: there is no column 'prize'; did you mean 'price'?"),
        (["red", "--where", "price < 3 LIMIT 1"], "conjoin: syntax error at 'LIMIT'"),
    ],
    ids=["picture", "column", "syntax"],
)
def test_search_errors(conjoin: Run, table: str, words: list[str], message: str) -> None:
    done = conjoin("search", *words)
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(message)


def test_history_and_rollback(conjoin: Run, fresh: str, make_table: Callable[..., Any]) -> None:
    done = conjoin("rollback")
    assert (done.code, done.out) == (1, "")
    assert "nothing to roll back to" in done.err
    make_table(41, dim=8, mode="overwrite", live=False)
    publish.publish(fresh, 2, "things-2024-01-02")
    assert conjoin("rollback").out == ("version 1 of run things-2024-01-01 with 40 rows is live, before it version 2\n")
    entry = json.loads(conjoin("rollback", fresh, "--to", "things-2024-01-02", "--json").out)
    assert (entry["action"], entry["version"], entry["live"]) == ("rollback", 2, True)
    rows = json.loads(conjoin("history", "--json").out)
    assert [(row["action"], row["version"], row["live"]) for row in rows] == [
        ("rollback", 2, True),
        ("rollback", 1, False),
        ("publish", 2, False),
        ("publish", 1, False),
    ]
    assert conjoin("history", fresh).out.splitlines()[-1] == "(4 rows)"
    done = conjoin("rollback", "--to", "7")
    assert (done.code, done.out) == (1, "")
    assert "version 7 was never published" in done.err


def test_history_of_nothing(conjoin: Run, make_table: Callable[..., Any], tmp_path: Path) -> None:
    done = conjoin("history", f"{tmp_path}/none.lance")
    assert (done.code, done.out) == (1, "")
    unpublished = conjoin("history", str(make_table(3, dim=4, live=False).uri))
    assert unpublished.out.splitlines()[0].split()[:3] == ["number", "action", "run_id"]
    assert unpublished.out.splitlines()[-1] == "(0 rows)"


def test_init_and_its_run_file(conjoin: Run, emoji: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = conjoin("init", str(emoji))
    assert (done.code, done.out) == (0, "conjoin.yaml\n")
    assert "text: caption  (its name says so)" in done.err
    again = conjoin("init", str(emoji))
    assert (again.code, again.out) == (2, "")
    assert conjoin("init", "none.parquet", "-o", "x.yaml").code == 1
    assert not (tmp_path / "x.yaml").exists()
