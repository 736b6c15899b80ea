"""Text templates: tidy where fields are empty, null where all are, bytes where one is not UTF-8."""

from __future__ import annotations

import datetime as dt

import pyarrow as pa
import pytest

from conjoin.pipeline import template, utf8
from conjoin.pipeline.errors import ConfigError, SourceError


def _render(text: str, **row: object) -> object:
    return template.render(text, pa.table({name: [value] for name, value in row.items()})).to_pylist()[0]


@pytest.mark.parametrize(
    ("text", "row", "expected"),
    [
        ("{a}. {b}", {"a": "Shoe", "b": "Nike"}, "Shoe. Nike"),
        ("{a}. {b}", {"a": "Shoe", "b": None}, "Shoe"),
        ("{a}. {b}", {"a": None, "b": "Nike"}, "Nike"),
        ("{a}. {b}", {"a": None, "b": None}, None),
        ("{a}. {b}", {"a": " ", "b": None}, ""),
        ("{a}. {b}. {c}", {"a": "Shoe", "b": None, "c": "Red"}, "Shoe. Red"),
        ("{a}. {b}. {c}", {"a": None, "b": None, "c": "Red"}, "Red"),
        ("{a}. {b}.", {"a": "Shoe", "b": None}, "Shoe."),
        ("{a} ({b})", {"a": "Shoe", "b": None}, "Shoe"),
        ("{a} ({b}) {c}", {"a": "Shoe", "b": None, "c": "Red"}, "Shoe Red"),
        ("{a} by {b}, {c}", {"a": "Shoe", "b": None, "c": "Red"}, "Shoe, Red"),
        ("A photo of {a}, {b}", {"a": None, "b": "Red"}, "A photo of Red"),
        ("Title: {a}. Brand: {b}", {"a": None, "b": "Nike"}, "Brand: Nike"),
        ("Title: {a}. Brand: {b}", {"a": "Shoe", "b": None}, "Title: Shoe"),
        ("{a}. {a}", {"a": "Shoe"}, "Shoe. Shoe"),
        ("{{{a}}}", {"a": "Shoe"}, "{Shoe}"),
        ("{a} ... {b}", {"a": "wait...", "b": "(x)"}, "wait... ... (x)"),
    ],
)
def test_empty_fields_take_their_separator_with_them(text: str, row: dict[str, str | None], expected: object) -> None:
    columns = {name: pa.array([value], pa.string()) for name, value in row.items()}
    assert template.render(text, pa.table(columns)).to_pylist() == [expected]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(7, "7"), (2.5, "2.5"), (True, "true"), (dt.date(2024, 2, 1), "2024-02-01"), (["red", "blue"], "red, blue")],
    ids=["int", "float", "bool", "date", "list"],
)
def test_other_types_are_written_as_text(value: object, expected: str) -> None:
    assert _render("size {a}", a=value) == f"size {expected}"


def test_a_field_that_is_not_utf8_makes_bytes_of_its_row_only_by_value() -> None:
    bad = pa.array([b"ok", b"\xff\xfe"], pa.binary()).view(pa.string())
    rendered = template.render("{a}. {b}", pa.table({"a": bad, "b": ["x", "y"]}))
    assert utf8.python_values(rendered) == ["ok. x", b"\xff\xfe y"]


@pytest.mark.parametrize("text", ["{}", "{a:>5}", "{a!r}", "{a", "{{a}}"])
def test_anything_but_plain_columns_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"source\.text"):
        template.parts(text)


def test_a_column_that_cannot_be_text_is_named() -> None:
    table = pa.table({"a": pa.array([{"x": 1}])})
    with pytest.raises(SourceError, match=r"column 'a' of type struct"):
        template.render("{a}", table)
