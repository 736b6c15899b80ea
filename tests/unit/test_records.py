"""Values, groups, splits and hashes of single tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conjoin.pipeline import records, utf8
from conjoin.pipeline.source import SourceConfig, Split


def _config(**fields: object) -> SourceConfig:
    return SourceConfig.model_validate({"path": "/data/x.parquet", "id": "id", **fields})


def test_columns_are_named_once_in_a_fixed_order() -> None:
    config = _config(image="url", text="{title}. {brand}. {title}", keep=["brand", "price"], group="style")
    assert records.columns_of(config, "text") == ["title", "brand"]
    assert records.columns_of(config, "audio") == []
    assert records.all_columns(config) == ["id", "style", "url", "title", "brand", "price"]


@pytest.mark.parametrize(
    ("path", "uri", "expected"),
    [
        ("s3://shop/catalog/", "a/1.jpg", "s3://shop/catalog/a/1.jpg"),
        ("s3://shop/catalog/*.parquet", "1.jpg", "s3://shop/catalog/1.jpg"),
        ("/data/x.parquet", " 1.jpg ", "/data/1.jpg"),
        ("/data/x.parquet", "/pictures/1.jpg", "/pictures/1.jpg"),
        ("/data/x.parquet", "https://h/1.jpg", "https://h/1.jpg"),
        ("x.parquet", "1.jpg", str(Path.cwd() / "1.jpg")),
    ],
)
def test_relative_uris_start_at_the_source(path: str, uri: str, expected: str) -> None:
    config = _config(path=path, image="url")
    single = pa.table({"url": pa.array([uri, None])})
    lists = pa.table({"url": pa.array([[uri, "/b"], None, []], pa.list_(pa.string()))})
    assert records.values_of(config, single, "image").to_pylist() == [expected, None]
    assert records.values_of(config, lists, "image").to_pylist() == [[expected, "/b"], None, []]
    assert records.uris_of(config, single, "image").to_pylist() == [expected, None]  # type: ignore[union-attr]
    assert records.uris_of(config, lists, "image").to_pylist() == [expected, None, None]  # type: ignore[union-attr]


def test_bytes_have_no_uri_and_structs_give_their_bytes() -> None:
    config = _config(image="image")
    table = pa.table({"image": pa.array([{"bytes": b"x", "path": "a.jpg"}, None])})
    assert records.values_of(config, table, "image").to_pylist() == [b"x", None]
    assert records.uris_of(config, table, "image") is None
    paths = pa.table(
        {
            "image": pa.array(
                [{"bytes": None, "path": "/a.jpg"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            )
        }
    )
    assert records.values_of(config, paths, "image").to_pylist() == ["/a.jpg"]


@pytest.mark.parametrize("text", ["t", "{t}"])
@pytest.mark.parametrize("kind", [pa.string(), pa.binary()], ids=str)
def test_text_that_is_not_utf8_is_its_rows_own_trouble(text: str, kind: pa.DataType) -> None:
    table = pa.table({"t": pa.array([b"ok", b"\xff", None], pa.binary()).view(kind)})
    values = records.values_of(_config(text=text), table, "text")
    assert utf8.python_values(values) == ["ok", b"\xff", None]
    alone = records.content_hashes(pa.array(["ok"]))[0]
    assert records.content_hashes(values)[0] == alone


def test_an_address_that_is_not_utf8_or_empty() -> None:
    table = pa.table({"url": pa.array([b"a\xff.jpg", b"", None, b"/b.jpg"], pa.binary()).view(pa.string())})
    found = records.values_of(_config(image="url"), table, "image")
    assert found.to_pylist() == ["/data/a\ufffd.jpg", "", None, "/b.jpg"]


def test_kept_text_is_repaired() -> None:
    bad = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
    config = _config(text="t", keep=["t", "n"])
    table = pa.table({"t": bad, "n": [1, 2]})
    assert records.kept_of(config, table).to_pydict() == {"t": ["ok", "\ufffd"], "n": [1, 2]}


def test_a_missing_group_is_the_id() -> None:
    table = pa.table({"id": [1, 2], "style": ["a", None]})
    assert records.group_values(_config(group="style"), table).to_pylist() == ["a", "2"]
    assert records.group_values(_config(), table).to_pylist() == [1, 2]


@given(st.lists(st.text(max_size=8), min_size=1, unique=True), st.integers(0, 5))
def test_a_split_is_a_function_of_the_group_alone(groups: list[str], seed: int) -> None:
    split = Split(validation=0.3, test=0.3)
    whole = records.split_of(pa.array(groups, pa.string()), split, seed)
    alone = [str(records.split_of(pa.array([group], pa.string()), split, seed)[0]) for group in groups]
    assert whole.tolist() == alone


def test_splits_have_their_shares_and_depend_on_the_seed() -> None:
    groups = pa.array(np.arange(20_000))
    split = Split(validation=0.1, test=0.2)
    names = records.split_of(groups, split)
    shares = {name: float(np.mean(names == name)) for name in ("train", "validation", "test")}
    assert shares == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.01)
    assert np.mean(names != records.split_of(groups, split, seed=1)) > 0.3
    assert (records.split_of(pa.array(["7"]), split) == records.split_of(pa.array([7]), split)).all()


def test_hashes_tell_contents_apart() -> None:
    values: list[object] = ["a", b"a", "b", ["a"], ["a", "b"], [["a"], "b"], 1, 1.5, None, [], ""]
    assert len({records.content_hash(value) for value in values}) == len(values)
    assert records.content_hash("a") == records.content_hash("a")
    hashes = records.content_hashes(pa.chunked_array([["a", None]]))
    assert hashes.to_pylist() == [records.content_hash("a"), None]
    assert hashes.type == pa.binary(16)
