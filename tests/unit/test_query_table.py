"""A published table: what it answers, which version, what it may reach, what it imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from conjoin.pipeline.errors import QueryError, TableError
from conjoin.pipeline.query import Table, open_table, search
from conjoin.pipeline.query.execute import Engine


def test_a_full_query(make_table: Callable[..., Any]) -> None:
    made = make_table(200, dim=4)
    found = open_table(made.uri).sql(
        'SELECT "Odd Name", count(*) AS n, min(distance(image_vec, ?)) AS best FROM things '
        "WHERE price BETWEEN ? AND 90 AND caption LIKE '%\"quoted\"%' GROUP BY ALL ORDER BY n DESC, 1 LIMIT 3",
        [[1, 0, 0, 0], 10],
    )
    frame = made.rows.to_pandas()
    frame["d"] = 1 - made.vectors["image_vec"][:, 0]
    frame = frame[(frame.price >= 10) & (frame.price <= 90)]
    expected = frame.groupby("Odd Name", dropna=False).agg(n=("id", "size"), best=("d", "min")).reset_index()
    expected = expected.sort_values(["n", "Odd Name"], ascending=[False, True]).head(3)
    got = found.to_pandas()
    assert got["n"].tolist() == expected["n"].tolist()
    np.testing.assert_allclose(got["best"], expected["best"], atol=1e-6)
    assert found.versions == {"things": 1}


def test_names_are_found_whatever_their_case_and_quotes(make_table: Callable[..., Any]) -> None:
    table = open_table(make_table(3, dim=4).uri, name="My Things")
    sql = 'SELECT "ODD NAME" AS "a ""b""", t."id" FROM "my things" AS t WHERE t."odd Name" IS NOT NULL ORDER BY T.ID'
    assert table.sql(sql).columns == ['a "b"', "id"]
    assert len(table.sql(sql)) == 2


def test_an_open_table_follows_its_tag_and_a_query_keeps_one_version(make_table: Callable[..., Any]) -> None:
    made = make_table(10, dim=4)
    live, first, newest = open_table(made.uri), open_table(made.uri, 1), open_table(made.uri, None)
    make_table(20, dim=4, live=False, mode="overwrite", seed=1)
    counts = [table.sql("SELECT count(*) AS n FROM things").to_pylist()[0]["n"] for table in (live, first, newest)]
    assert counts == [10, 10, 20]
    lance.dataset(made.uri).tags.update("live", 2)
    found = live.sql("SELECT count(*) AS n, (SELECT count(*) FROM things) AS m FROM things")
    assert (found.to_pylist(), found.versions, live.version) == ([{"n": 20, "m": 20}], {"things": 2}, 2)
    assert first.sql("SELECT count(*) AS n FROM things").to_pylist() == [{"n": 10}]


def test_another_version_joins_as_a_frame(make_table: Callable[..., Any]) -> None:
    made = make_table(10, dim=4)
    make_table(10, dim=4, mode="overwrite", seed=1)
    sql = "SELECT count(*) AS n FROM things t JOIN before b ON t.stock = b.stock WHERE t.id <> b.id"
    found = open_table(made.uri).sql(sql, before=open_table(made.uri, 1))
    assert (found.to_pylist(), found.versions) == ([{"n": 10}], {"things": 2, "before": 1})


@pytest.mark.parametrize(
    "make", [pa.Table.from_pylist, pd.DataFrame, list, lambda rows: pa.Table.from_pylist(rows).to_batches()[0]]
)
def test_frames_join(make_table: Callable[..., Any], make: Callable[..., object]) -> None:
    rows = [{"id": "row-0-000002", "rebate": 5}, {"id": "nobody", "rebate": 9}]
    sql = "SELECT id, rebate FROM things JOIN deals USING (id)"
    found = open_table(make_table(5, dim=4).uri).sql(sql, deals=make(rows))
    assert found.to_pylist() == [{"id": "row-0-000002", "rebate": 5}]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT id FROM things SEMI JOIN deals USING (id) WHERE price < 70 ORDER BY id",
        "SELECT things.id FROM things ANTI JOIN deals ON things.id = deals.id WHERE price < 70 ORDER BY 1",
        "SELECT deals.id FROM deals SEMI JOIN things ON things.id = deals.id ORDER BY 1",
        "SELECT things.id, rebate, DIST AS d FROM things LEFT JOIN deals USING (id) ORDER BY d, 1 LIMIT 7",
        "SELECT deals.id, price FROM deals LEFT JOIN things ON things.id = deals.id WHERE price IS NULL ORDER BY 1",
        "SELECT things.id, rebate FROM things FULL JOIN deals USING (id) WHERE price < 50 OR rebate > 30 ORDER BY ALL",
        "SELECT rebate, l.id AS near FROM deals, "
        "LATERAL (SELECT id FROM things WHERE stock > rebate ORDER BY DIST LIMIT 1) l ORDER BY 1",
        "SELECT stock % 3 AS g, id FROM things "
        "QUALIFY row_number() OVER (PARTITION BY g ORDER BY DIST) <= 2 ORDER BY ALL",
        "WITH n AS (SELECT id FROM things WHERE stock > 9 ORDER BY DIST LIMIT 5) SELECT id, price FROM n JOIN things "
        "USING (id) ORDER BY 1",
        "SELECT id, (SELECT count(*) FROM things u WHERE u.price < t.price) AS n FROM things t "
        "WHERE stock < 9 ORDER BY 1",
        "SELECT id, price AS image_vec FROM things ORDER BY DIST LIMIT 3",
        "SELECT price AS stock, id FROM things WHERE stock < 9 ORDER BY stock LIMIT 3",
        "SELECT id FROM things WHERE (stock, stock) IN ((1, 1), (2, 2)) OR id IN (SELECT id FROM deals) ORDER BY 1",
        "SELECT max(id) AS m FROM (SELECT id FROM things ORDER BY DIST LIMIT 9) WHERE id < 'row-0-000030'",
    ],
)
def test_the_rest_of_sql_is_duckdbs(make_table: Callable[..., Any], sql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text over the same rows, without Lance in between."""
    monkeypatch.setattr(search, "_SCAN_FLOATS", 0)
    made = make_table(60, dim=4)
    deals = pa.table({"id": [f"row-0-{i:06d}" for i in range(0, 90, 3)], "rebate": list(range(30))})
    connection = duckdb.connect()
    connection.register("things", made.rows)
    connection.register("deals", deals)
    exact = sql.replace("DIST", "array_cosine_distance(image_vec, [1, 0, 0, 0]::FLOAT[4])")
    found = open_table(made.uri).sql(sql.replace("DIST", "distance(image_vec, [1, 0, 0, 0])"), deals=deals)
    assert found.to_pylist() == connection.sql(exact).to_arrow_table().to_pylist()


@pytest.mark.parametrize(
    ("frames", "message"),
    [({"deals": 3}, "the frame 'deals' is a int"), ({"THINGS": []}, "taken by the table itself")],
    ids=["kind", "name"],
)
def test_frames_that_do_not_fit(make_table: Callable[..., Any], frames: dict[str, object], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        open_table(make_table(5, dim=4).uri).sql("SELECT 1", **frames)


@pytest.fixture(scope="module")
def five(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Five rows, for whatever does not change them."""
    return open_table(make_table_at(f"{tmp_path_factory.mktemp('five')}/things.lance", 5, dim=4).uri)


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELECT idd FROM things", "no column 'idd'; did you mean 'id'"),
        ("SELECT zzzzz FROM things", "no column 'zzzzz'; known: Odd Name, caption"),
        ("SELECT t.prize FROM things t", "t has no column 'prize'; did you mean 'price'"),
        ("SELECT x.id FROM things t", "\"x\" not found. Did you mean 't'"),
        ("SELECT id FROM thing", "no table 'thing'; did you mean 'things'"),
        ("SELECT id FROM things WHERE caption = 3", "Could not convert"),
        ("SELECT id FROM things ORDER BY distance(image_vec, [1, 0, 0, 0]) LIMIT -1", "negative"),
    ],
)
def test_errors_name_the_nearest(five: Table, sql: str, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        five.sql(sql)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM '{file}'",
        "COPY (SELECT 1) TO '{folder}/out.csv'",
        "ATTACH '{folder}/x.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "SET lock_configuration = false",
        "SELECT * FROM glob('{folder}/*')",
        "SELECT * FROM frame",
    ],
)
def test_the_second_wall_holds_without_the_first(tmp_path: Path, sql: str) -> None:
    frame = pa.table({"a": [1]})  # replacement scans would find it
    (tmp_path / "f.csv").write_text("a\n1\n")
    with pytest.raises(QueryError):
        Engine().run(sql.format(file=tmp_path / "f.csv", folder=tmp_path), {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["f.csv"]
    assert frame.num_rows == 1


def test_search_filters_and_hides_what_people_do_not_read(
    make_table: Callable[..., Any], tiny_encoder: Path, fingerprint: str
) -> None:
    table = open_table(make_table(50, dim=8, fingerprint=fingerprint, encoder=str(tiny_encoder)).uri)
    found = table.search("red apple", where="price < 50 OR caption LIKE 'x%'", k=5)
    assert found.columns == ["id", "caption", "price", "stock", "Odd Name", "day", "distance"]
    rows = found.to_pylist()
    assert [row["distance"] for row in rows] == sorted(row["distance"] for row in rows)
    assert len(rows) == 5
    assert all(row["price"] < 50 for row in rows)
    sql = "SELECT id FROM things WHERE price < 50 ORDER BY distance(image_vec, text('red apple')) LIMIT 5"
    assert [row["id"] for row in table.sql(sql)] == [row["id"] for row in rows]
    other = table.search("red apple", column="text_vec", k=50)
    assert [row["id"] for row in other] != [row["id"] for row in table.search("red apple", k=50)]


@pytest.fixture(scope="module")
def fingerprint(tiny_encoder: Path) -> str:
    from conjoin.pipeline.embedder import load

    return load(str(tiny_encoder)).fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of them"),
        ({"words": "a", "image": "b"}, "exactly one of them"),
        ({"words": "a", "k": -1}, "k is a number of rows"),
        ({"words": "a", "column": "image_vc"}, "no vector column 'image_vc'; did you mean 'image_vec'"),
        ({"words": "a", "where": "price < 5 ORDER BY id"}, "syntax error"),
        ({"words": "a", "where": "prize < 5"}, "no column 'prize'; did you mean 'price'"),
    ],
    ids=["nothing", "both", "k", "column", "syntax", "name"],
)
def test_searches_that_cannot_be(five: Table, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QueryError, match=message):
        five.search(**options)


def test_a_directory_with_one_table_is_enough(make_table: Callable[..., Any], tmp_path: Path) -> None:
    make_table(3, dim=4)
    assert open_table(str(tmp_path)).name == "things"
    make_table(3, dim=4, uri=f"{tmp_path}/others.lance")
    with pytest.raises(TableError, match=r"2 tables here \(others.lance, things.lance\)"):
        open_table(str(tmp_path))
    with pytest.raises(TableError, match="no table here"):
        open_table(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("version", ["live", 7, "nightly"])
def test_versions_that_are_missing_are_named(make_table: Callable[..., Any], version: str | int) -> None:
    with pytest.raises(TableError, match=f"no version {version!r}"):
        open_table(make_table(3, dim=4, live=False).uri, version)


def test_threads_share_a_table(make_table: Callable[..., Any]) -> None:
    table = open_table(make_table(300, dim=4).uri)
    sql = "SELECT id, distance(image_vec, $v) AS d FROM things ORDER BY d LIMIT 3"
    queries = np.random.default_rng(0).normal(size=(12, 4))
    alone = [table.sql(sql, {"v": query}).to_pylist() for query in queries]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda query: table.sql(sql, {"v": query}).to_pylist(), queries)) == alone


def test_explain_tells_of_small_tables(make_table: Callable[..., Any]) -> None:
    table = open_table(make_table(20, dim=4).uri)
    sql = "SELECT id FROM things WHERE price < 5 AND upper(id) = 'X' ORDER BY distance(image_vec, [1, 0, 0, 0]) LIMIT 3"
    told = str(table.explain(sql)).splitlines()
    assert told[0].startswith("things version 1: exact scan (only DuckDB can evaluate upper(id) = 'X', but a scan of ")
    assert told[1:] == [
        "  columns id, price, image_vec",
        f"  rows {table.explain(sql).steps[0].rows}",
        "  vectors image_vec, cosine, encoder 0123456789ab",
        "  index none",
        "  filter in Lance: (`price` < 5.0)",
        "  filter in DuckDB: upper(id) = 'X'",
    ]


def test_querying_imports_neither_ray_nor_torch(make_table: Callable[..., Any]) -> None:
    code = (
        "import sys, conjoin as cj\n"
        "found = cj.open(sys.argv[1]).sql('SELECT id FROM things ORDER BY distance(image_vec, [1,0,0,0]) LIMIT 2')\n"
        "assert len(found) == 2 and '2 rows' in repr(found) and found._repr_html_()\n"
        "print(sorted({'ray', 'torch', 'transformers', 'lancedb', 'pandas'} & {n.split('.')[0] for n in sys.modules}))"
    )
    command = [sys.executable, "-c", code, make_table(5, dim=4).uri]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['pandas']")
    assert done.stderr == ""


def test_plain_lancedb_reads_and_searches_the_live_version(make_table: Callable[..., Any], tmp_path: Path) -> None:
    made = make_table(30, dim=4)
    make_table(40, dim=4, live=False, mode="overwrite", seed=1)
    code = (
        "import sys, lancedb\n"
        "table = lancedb.connect(sys.argv[1]).open_table('things')\n"
        "table.checkout('live')\n"
        "rows = table.search([1, 0, 0, 0], vector_column_name='image_vec').metric('cosine').limit(3).to_list()\n"
        "print(table.count_rows(), *[row['id'] for row in rows])\n"
        "assert not [name for name in sys.modules if name.split('.')[0] == 'conjoin']"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    nearest = np.argsort(-made.vectors["image_vec"][:, 0])[:3]
    assert done.stdout.split() == ["30", *[f"row-0-{i:06d}" for i in nearest]]
