"""What a query can name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from conjoin.pipeline import store
from conjoin.pipeline.query.relations import frame_relation, nearest_name, projection, readable, table_relation


@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("titel", ["Title", "price"], "; did you mean 'Title'?"),
        ("zzz", ["b", "a"], "; known: a, b"),
        ("zzz", [], ""),
    ],
)
def test_nearest_name(name: str, known: list[str], said: str) -> None:
    assert nearest_name(name, known) == said


def test_half_floats_are_read_as_floats(make_table: Callable[..., Any]) -> None:
    made = make_table(5, dim=4, dtype="float16")
    relation = table_relation("things", made.uri, store.open_version(made.uri))
    assert relation.schema.field("image_vec").type == pa.list_(pa.float32(), 4)
    assert projection(relation, ["id", "image_vec"])["image_vec"].startswith("arrow_cast")
    assert readable(pa.float16()) == pa.float32()
    assert readable(pa.string()) == pa.string()


def test_a_frame_keeps_its_fingerprints_and_widens_half_floats(make_table: Callable[..., Any]) -> None:
    relation = frame_relation("old", make_table(5, dim=4, dtype="float16").rows)
    assert relation.vectors["image_vec"].dim == 4
    assert relation.frame is not None
    assert relation.frame.schema.field("image_vec").type.value_type == pa.float32()
    assert relation.column("ODD name") == "Odd Name"
    assert relation.column("nothing") is None
