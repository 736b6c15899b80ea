"""Tables that the run file names: joined by name, read lazily, refused clearly when their files do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline import storage
from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query import Table, open_table

FIRST, SECOND = "row-0-000001", "row-0-000002"
ORDERS = pa.table({"id": [FIRST, SECOND, "nobody"], "amount": [3, 4, 5]})


@pytest.fixture(scope="module")
def things(make_table_at: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_table_at(f"{tmp_path_factory.mktemp('named')}/things.lance", 5, dim=4).uri)


def write(rows: pa.Table, path: Path) -> str:
    if path.suffix == ".lance":
        lance.write_dataset(rows, str(path))
    else:
        (pq.write_table if path.suffix == ".parquet" else pc.write_csv)(rows, str(path))
    return str(path)


def amounts(table: Table) -> list[object]:
    found = table.sql("SELECT sum(amount) AS n FROM things JOIN orders USING (id) WHERE amount > 3").to_pylist()
    return [row["n"] for row in found]


@pytest.mark.parametrize("name", ["orders.parquet", "orders.csv", "orders.lance"])
def test_files_and_tables_are_joined_by_name(things: str, tmp_path: Path, name: str) -> None:
    table = open_table(things, tables={"Orders": write(ORDERS, tmp_path / name)})
    assert amounts(table) == [4]
    assert table.sql("SELECT count(*) AS n FROM orders").to_pylist() == [{"n": 3}]


@pytest.mark.parametrize("path", ["*.parquet", "", ["a.parquet", "b.parquet"]], ids=["glob", "directory", "list"])
def test_several_files_are_one_table(things: str, tmp_path: Path, path: str | list[str]) -> None:
    write(ORDERS.slice(0, 1), tmp_path / "a.parquet")
    write(ORDERS.slice(1).select(["amount", "id"]), tmp_path / "b.parquet")
    named = f"{tmp_path}/{path}" if isinstance(path, str) else [f"{tmp_path}/{one}" for one in path]
    assert amounts(open_table(things, tables={"orders": named})) == [4]


def test_a_table_in_a_bucket(things: str, s3: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(ORDERS, sink)
    storage.write_bytes(f"{s3}/orders/1.parquet", sink.getvalue().to_pybytes())
    assert amounts(open_table(things, tables={"orders": f"{s3}/orders/*.parquet"})) == [4]


def test_a_lance_table_is_read_at_its_live_version(things: str, tmp_path: Path) -> None:
    path = write(ORDERS, tmp_path / "orders.lance")
    lance.dataset(path).tags.create("live", 1)
    lance.write_dataset(ORDERS.slice(2), path, mode="overwrite")
    found = open_table(things, tables={"orders": path}).sql("SELECT count(*) AS n FROM orders")
    assert (found.to_pylist(), found.versions) == ([{"n": 3}], {"orders": 1})


def test_files_are_looked_at_again(things: str, tmp_path: Path) -> None:
    table = open_table(things, tables={"orders": f"{tmp_path}/*.parquet"})
    write(ORDERS, tmp_path / "a.parquet")
    assert amounts(table) == [4]
    write(ORDERS, tmp_path / "b.parquet")
    assert amounts(table) == [8]


def test_only_what_a_query_needs_is_read(things: str, tmp_path: Path) -> None:
    """Pages of another column and of row groups that the filter excludes are overwritten with rubbish."""
    rows = pa.table({"a": list(range(2000)), "b": [float(i) for i in range(2000)]})
    pq.write_table(rows, tmp_path / "x.parquet", row_group_size=1000, use_dictionary=False)
    groups = pq.read_metadata(tmp_path / "x.parquet")
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    for group, column in ((0, 1), (1, 0), (1, 1)):
        chunk = groups.row_group(group).column(column)
        start, size = chunk.data_page_offset, chunk.total_compressed_size
        data[start : start + size] = b"\xff" * size
    (tmp_path / "x.parquet").write_bytes(data)
    table = open_table(things, tables={"x": f"{tmp_path}/x.parquet"})
    assert table.sql("SELECT sum(a) AS n FROM x WHERE a < 10").to_pylist() == [{"n": 45}]
    with pytest.raises(QueryError):
        table.sql("SELECT sum(b) AS n FROM x")


def test_a_table_that_no_query_names_is_not_opened(things: str) -> None:
    table = open_table(things, tables={"orders": "/nowhere/orders.parquet"})
    assert len(table.sql("SELECT id FROM things")) == 5
    with pytest.raises(QueryError, match="no table 'order'; did you mean 'orders'"):
        table.sql('SELECT * FROM "order"')


FIVE = {"a": [1, 2]}


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"b": [1]}, "1.parquet has a column 'a', 2.parquet has none"),
        ({"a": [1], "c": [1]}, "2.parquet has a column 'c', 1.parquet has none"),
        ({"a": ["x"]}, "column 'a' is int64 in 1.parquet, string in 2.parquet"),
    ],
    ids=["missing", "more", "type"],
)
def test_files_that_differ_are_named(things: str, tmp_path: Path, second: dict[str, Any], message: str) -> None:
    write(pa.table(FIVE), tmp_path / "1.parquet")
    write(pa.table(second), tmp_path / "2.parquet")
    with pytest.raises(QueryError, match=f"the table 'x' cannot be opened: its files differ: .*{message}"):
        open_table(things, tables={"x": f"{tmp_path}/*.parquet"}).sql("SELECT 1 FROM x")


def test_numbers_are_widened(things: str, tmp_path: Path) -> None:
    write(pa.table({"a": pa.array([1], pa.int32())}), tmp_path / "1.parquet")
    write(pa.table({"a": pa.array([2.5])}), tmp_path / "2.parquet")
    write(pa.table({"a": pa.array([None], pa.null())}), tmp_path / "3.parquet")
    found = open_table(things, tables={"x": f"{tmp_path}/*.parquet"}).sql("SELECT sum(a) AS n FROM x")
    assert found.to_pylist() == [{"n": 3.5}]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.parquet", "no such file or directory"),
        ("*.parquet", "no file matches"),
        ("", "the directory is empty"),
        ("bad.parquet", "not Parquet"),
        ("none.lance", "no table"),
        ("x.tar", "it holds tar files"),
    ],
)
def test_files_that_are_not_there_or_not_readable(things: str, tmp_path: Path, name: str, message: str) -> None:
    if name.startswith(("bad", "x")):
        (tmp_path / name).write_text("rubbish")
    table = open_table(things, tables={"Orders": f"{tmp_path}/{name}"})
    with pytest.raises(QueryError, match=f"the table 'Orders' cannot be opened: {message}") as caught:
        table.sql("SELECT 1 FROM orders")
    assert str(tmp_path) in caught.value.where
    assert "Orders" in caught.value.next


def test_a_csv_that_breaks_its_type_later_is_an_error_with_the_place(things: str, tmp_path: Path) -> None:
    lines = ["a,b", *(f"{i},{i}" for i in range(300_000)), "x,1"]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    with pytest.raises(QueryError, match="conversion error to int64: invalid value 'x'"):
        open_table(things, tables={"x": f"{tmp_path}/x.csv"}).sql("SELECT sum(a) AS n FROM x")


@pytest.mark.parametrize(
    ("kind", "condition", "n"),
    [
        (pa.large_string(), "a = '3'", 1),
        (pa.string_view(), "a > '2'", 1),
        (pa.dictionary(pa.int32(), pa.string()), "a IN ('1', '3')", 2),
        (pa.int8(), "a >= 2", 2),
        (pa.float32(), "a > 1.5", 2),
        (pa.float16(), "a > 1.5", 2),
        (pa.decimal128(9, 2), "a < 2.5", 2),
        (pa.large_binary(), "a = '3'::BLOB", 1),
        (pa.timestamp("ns"), "a > TIMESTAMP '1969-01-01'", 3),
        (pa.timestamp("us", tz="UTC"), "a > TIMESTAMPTZ '1969-01-01'", 3),
        (pa.date32(), "a > DATE '1969-01-01'", 3),
    ],
    ids=str,
)
def test_filters_on_every_type(things: str, tmp_path: Path, kind: pa.DataType, condition: str, n: int) -> None:
    values = pa.array(["1", "2", "3"])
    if pa.types.is_timestamp(kind) or pa.types.is_date32(kind):
        values = pa.array([1, 2, 3], pa.int64() if pa.types.is_timestamp(kind) else pa.int32())
    elif not (pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_dictionary(kind)):
        values = values.cast(pa.float32()) if pa.types.is_floating(kind) else values
    write(pa.table({"a": values.cast(kind)}), tmp_path / "x.parquet")
    table = open_table(things, tables={"x": f"{tmp_path}/x.parquet"})
    assert table.sql(f"SELECT count(*) AS n FROM x WHERE {condition}").to_pylist() == [{"n": n}]


def test_a_frame_cannot_take_a_named_tables_name(things: str) -> None:
    with pytest.raises(QueryError, match="'ORDERS' is taken by a named table"):
        open_table(things, tables={"orders": "x.parquet"}).sql("SELECT 1", ORDERS=ORDERS)


def test_tables_are_listed_and_described(things: str, tmp_path: Path) -> None:
    table = open_table(things, tables={"orders": write(ORDERS, tmp_path / "o.csv")})
    assert table.tables().to_pylist() == [
        {"table": "things", "path": things},
        {"table": "orders", "path": f"{tmp_path}/o.csv"},
    ]
    assert table.describe("ORDERS").to_pylist() == [
        {"column": "id", "type": "string", "vector": ""},
        {"column": "amount", "type": "int64", "vector": ""},
    ]
    facts = {row["column"]: row["vector"] for row in table.describe().to_pylist()}
    assert facts["image_vec"] == "image, 4 dimensions, cosine, encoder 0123456789ab in no folder"
    with pytest.raises(QueryError, match="no table 'ordes'; did you mean 'orders'"):
        table.describe("ordes")


def test_a_plan_says_what_is_read(things: str, tmp_path: Path) -> None:
    path = write(ORDERS, tmp_path / "o.parquet")
    explained = open_table(things, tables={"orders": path}).explain("SELECT id FROM orders")
    assert f"orders: files of {path}" in str(explained)
