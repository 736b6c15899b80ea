"""One plain type per column over all files, and a clear refusal of what does not fit."""

from __future__ import annotations

import pyarrow as pa
import pytest

from conjoin.pipeline import columns
from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.source import SourceConfig


def _config(**fields: object) -> SourceConfig:
    return SourceConfig.model_validate({"path": "/x.parquet", "id": "id", **fields})


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (pa.large_string(), pa.string()),
        (pa.string_view(), pa.string()),
        (pa.dictionary(pa.int32(), pa.large_string()), pa.string()),
        (pa.binary(4), pa.binary()),
        (pa.large_list(pa.large_binary()), pa.list_(pa.binary())),
        (pa.list_(pa.float32(), 3), pa.list_(pa.float32())),
        (pa.struct([("bytes", pa.large_binary())]), pa.struct([("bytes", pa.binary())])),
        (pa.int16(), pa.int16()),
    ],
    ids=str,
)
def test_plain_types(kind: pa.DataType, expected: pa.DataType) -> None:
    assert columns.plain(kind) == expected


def test_types_of_several_files_widen() -> None:
    first = pa.schema([("id", pa.int32()), ("price", pa.float32()), ("text", pa.null())])
    second = pa.schema([("price", pa.float64()), ("text", pa.large_string()), ("id", pa.int64())])
    found = columns.unify(_config(text="text", keep=["price"]), [("a", first), ("b", second)])
    assert found.arrow == pa.schema([("id", pa.int64()), ("text", pa.string()), ("price", pa.float64())])
    assert found.contents == {"text": "text"}


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (pa.binary(), "bytes"),
        (pa.string(), "uri"),
        (pa.large_list(pa.string()), "uri"),
        (pa.struct([("bytes", pa.binary()), ("path", pa.string())]), "bytes"),
        (pa.struct([("path", pa.string())]), "uri"),
    ],
    ids=str,
)
def test_what_an_image_column_holds(kind: pa.DataType, content: str) -> None:
    schema = pa.schema([("id", pa.string()), ("image", kind)])
    assert columns.unify(_config(image="image"), [("a", schema)]).contents == {"image": content}


def test_two_files_that_disagree_are_both_named() -> None:
    first, second = pa.schema([("id", pa.int64())]), pa.schema([("id", pa.string())])
    with pytest.raises(
        SourceError, match=r"source\.id: column 'id' is string here, but int64 in a\.parquet \[b\.parquet"
    ):
        columns.unify(_config(), [("a.parquet", first), ("b.parquet", second)])


def test_other_columns_come_and_go_unnoticed() -> None:
    first = pa.schema([("id", pa.string()), ("text", pa.string())])
    second = pa.schema([("new", pa.int64()), ("text", pa.string()), ("id", pa.string())])
    third = pa.schema([("id", pa.string()), ("text", pa.string()), ("new", pa.string())])
    found = columns.unify(_config(text="text"), [("a", first), ("b", second), ("c", third)])
    assert found.arrow == first


IDS = [("id", pa.int64())]


@pytest.mark.parametrize(
    ("fields", "first", "second", "words"),
    [
        (
            {"keep": ["price"]},
            [*IDS, ("price", pa.float64())],
            IDS,
            r"source\.keep: no column 'price' in 1 of 2 files \[b\]\. Write it there too, null where it has no value, "
            r"or take it out of source\.keep",
        ),
        (
            {"keep": ["price"]},
            [*IDS, ("price", pa.float64())],
            [*IDS, ("Price", pa.float64())],
            r"no column 'price' in 1 of 2 files \[b\]\. Did you mean 'Price'\?",
        ),
        ({"text": "name"}, IDS, IDS, r"source\.text: no column 'name' \[a\]\. Its columns are: id"),
        (
            {"id": "product_id"},
            [("productId", pa.int64())],
            [("productId", pa.int64())],
            r"source\.id: no column 'product_id' \[a\]\. Did you mean 'productId'\?",
        ),
        (
            {"keep": ["price"]},
            [*IDS, ("price", pa.float64())],
            [*IDS, ("price", pa.string())],
            r"source\.keep: column 'price' is string here, but double in a \[b\]\. Give the column one type",
        ),
        (
            {"text": "name"},
            [*IDS, ("name", pa.string())],
            [*IDS, ("name", pa.int64())],
            r"source\.text: column 'name' is int64 here, but string in a \[b\]",
        ),
        (
            {"image": "image"},
            [*IDS, ("image", pa.string())],
            [*IDS, ("image", pa.binary())],
            r"source\.image: column 'image' is binary here, but string in a \[b\]",
        ),
        (
            {"image": "image"},
            [*IDS, ("image", pa.list_(pa.large_binary()))],
            [*IDS, ("image", pa.list_(pa.string()))],
            r"source\.image: column 'image' is list<item: string> here, but list<item: binary> in a \[b\]",
        ),
        ({}, IDS, [("id", pa.float64())], r"source\.id: column 'id' is double"),
        (
            {},
            [("id", pa.string())],
            [("id", pa.binary())],
            r"source\.id: column 'id' is binary here, but string in a \[b\]",
        ),
    ],
    ids=[
        "missing-in-some",
        "capitals-in-some",
        "missing-in-all",
        "id-renamed",
        "kept-type",
        "text-type",
        "addresses-and-bytes",
        "lists-of-them",
        "id-to-float",
        "id-to-bytes",
    ],
)
def test_what_drifted_is_named(
    fields: dict[str, object],
    first: list[tuple[str, pa.DataType]],
    second: list[tuple[str, pa.DataType]],
    words: str,
) -> None:
    with pytest.raises(SourceError, match=words):
        columns.unify(_config(**fields), [("a", pa.schema(first)), ("b", pa.schema(second))])


def test_texts_may_come_as_bytes() -> None:
    first, second = pa.schema([*IDS, ("t", pa.string())]), pa.schema([*IDS, ("t", pa.binary())])
    assert columns.unify(_config(text="t"), [("a", first), ("b", second)]).contents == {"text": "text"}


@pytest.mark.parametrize(
    ("fields", "schema", "words"),
    [
        (
            {"text": "captoin"},
            [("id", pa.string()), ("caption", pa.string())],
            r"source\.text: no column 'captoin'.*f\.parquet.*'caption'",
        ),
        (
            {"text": "{a}. {zz}"},
            [("id", pa.string()), ("a", pa.string())],
            r"source\.text: no column 'zz'.*columns are: id, a",
        ),
        ({"keep": ["x"]}, [("id", pa.string())], r"source\.keep: no column 'x'"),
        ({}, [("id", pa.string()), ("id", pa.string())], r"source\.id: 2 columns are named 'id'"),
        ({}, [("id", pa.float64())], r"source\.id: column 'id' is double.*string or integer"),
        (
            {"image": "n"},
            [("id", pa.int8()), ("n", pa.int64())],
            r"source\.image: column 'n' is int64.*needs bytes, URIs",
        ),
        ({"text": "n"}, [("id", pa.int8()), ("n", pa.float32())], r"source\.text: column 'n' is float.*template"),
        ({"audio": "n"}, [("id", pa.int8()), ("n", pa.list_(pa.int8()))], r"source\.audio: column 'n' is list"),
    ],
)
def test_missing_and_unfit_columns_are_named(
    fields: dict[str, object], schema: list[tuple[str, pa.DataType]], words: str
) -> None:
    with pytest.raises(SourceError, match=words):
        columns.unify(_config(**fields), [("f.parquet", pa.schema(schema))])
