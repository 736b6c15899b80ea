"""Samples of a tar as columns."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.members import Members

NAN = float("nan")  # what a data frame has where a sample lacks a member


def table(*frames: dict[str, list[object]]) -> pa.Table:
    members = Members("/data/0001.tar", "0001")
    for frame in frames:
        members.add(frame)
    return pa.concat_tables([members.table(frame) for frame in frames])


def of_fields(*fields: object) -> pa.Table:
    """Samples with these JSON members."""
    texts = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in fields]
    return table({"__key__": [str(n) for n in range(len(texts))], "json": texts})


def test_a_column_per_extension_and_null_where_a_sample_has_none() -> None:
    first = {"__key__": ["./a", "b"], "jpg": [b"\xff1", b"\xff2"], "__url__": ["u", "u"], "txt": [b"one", NAN]}
    found = table(first, {"__key__": ["c"], "seg.png": [b"3"]})
    assert found.to_pydict() == {
        "__key__": ["0001/a", "0001/b", "0001/c"],
        "jpg": [b"\xff1", b"\xff2", None],
        "txt": ["one", None, None],
        "seg.png": [None, None, b"3"],
    }
    assert [field.type for field in found.schema] == [pa.string(), pa.binary(), pa.string(), pa.binary()]


def test_text_that_is_not_utf8_is_left_to_decoding() -> None:
    found = table({"__key__": ["a", "b"], "txt": [b"caf\xe9", b"ok"]})
    assert found["txt"].cast(pa.binary()).to_pylist() == [b"caf\xe9", b"ok"]


@pytest.mark.parametrize(
    ("values", "expected", "kind"),
    [
        ([1, None, 3], [1, None, 3], pa.int64()),
        ([1, 2.5], [1.0, 2.5], pa.float64()),
        ([True, None], [True, None], pa.bool_()),
        ([1, "x", True], ["1", "x", "true"], pa.string()),
        ([["a", "b"], "c", []], [["a", "b"], ["c"], None], pa.list_(pa.string())),
        ([1 << 70, 1], [str(1 << 70), "1"], pa.string()),
        ([{"deep": 1}, None], [None, None], pa.null()),
        (["\ud800", "y"], ["?", "y"], pa.string()),
    ],
    ids=["ints", "floats", "bools", "mixed", "lists", "huge", "objects", "surrogate"],
)
def test_fields_of_json_are_columns_of_their_own_type(
    values: list[object], expected: list[object], kind: pa.DataType
) -> None:
    found = of_fields(*({"field": value} for value in values))
    assert found["field"].to_pylist() == expected
    assert found.schema.field("field").type == kind


def test_a_torn_json_or_one_that_is_no_object_has_no_fields() -> None:
    found = of_fields({"title": "x"}, b"{", [1])
    assert found["title"].to_pylist() == ["x", None, None]
    assert found["json"].to_pylist() == ['{"title": "x"}', "{", "[1]"]


def test_a_field_that_is_named_like_an_extension_has_a_prefix() -> None:
    frame = {"__key__": ["a"], "txt": [b"member"], "json": [json.dumps({"txt": "f", "__key__": "k"}).encode()]}
    found = table(frame).to_pylist()[0]
    assert (found["txt"], found["json.txt"], found["__key__"], found["json.__key__"]) == ("member", "f", "0001/a", "k")


@pytest.mark.parametrize("key", ["../a", "/etc/a", "x/../../a"])
def test_a_path_out_of_the_tar(key: str) -> None:
    with pytest.raises(SourceError, match=r"a path out of it \[/data/0001\.tar\]"):
        table({"__key__": ["ok", key], "jpg": [b"1", b"2"]})


def test_a_tar_without_samples() -> None:
    with pytest.raises(SourceError, match=r"no sample \[/data/0001\.tar\].*<key>\.<extension>"):
        Members("/data/0001.tar", "0001").schema()
