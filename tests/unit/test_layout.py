"""How a table's columns follow those of the source: added, dropped, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lance
import pyarrow as pa
import pytest

from conjoin.pipeline.errors import TableError
from conjoin.pipeline.layout import Change, change_of


@pytest.fixture
def table(make_table: Callable[..., Any]) -> lance.LanceDataset:
    return lance.dataset(make_table(3, dim=4).uri)


def test_the_same_columns_change_nothing(table: lance.LanceDataset) -> None:
    assert change_of(table, table.schema, anew=False) == Change()


def test_a_column_more_and_one_less(table: lance.LanceDataset) -> None:
    schema = table.schema.append(pa.field("brand", pa.string()))
    schema = schema.remove(schema.get_field_index("price"))
    assert change_of(table, schema, anew=False) == Change(added=("brand",), dropped=("price",))


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("price", pa.string(), "price: double there, string now"),
        ("stock", pa.int32(), "stock: int64 there, int32 now"),
        ("id", pa.int64(), "id: string there, int64 now"),
        ("caption", pa.binary(), "caption: string there, binary now"),
    ],
    ids=["kept", "narrower", "id", "text"],
)
def test_another_type_takes_a_new_table(table: lance.LanceDataset, name: str, kind: pa.DataType, words: str) -> None:
    position = table.schema.get_field_index(name)
    schema = table.schema.set(position, pa.field(name, kind))
    with pytest.raises(TableError, match=rf"{words}.*things\.lance.*old type again, or .*--full"):
        change_of(table, schema, anew=False)
