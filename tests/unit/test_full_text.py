"""Full-text indexes: built, extended by what is new, dropped with their declaration, refused where there is no text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import pytest

from conjoin.pipeline import full_text, store
from conjoin.pipeline.errors import TableError
from conjoin.pipeline.full_text import index_texts


def hits(uri: str, words: str) -> int:
    from lance.query import MatchQuery

    return int(
        lance.dataset(uri).scanner(full_text_query=MatchQuery(words, "caption"), columns=["id"]).to_table().num_rows
    )


def hows(uri: str, *columns: str) -> list[str]:
    return [report.how for report in index_texts(uri, columns)]


def test_an_index_is_built_kept_and_extended(make_table: Callable[..., Any]) -> None:
    made = make_table(300, dim=4)
    assert hows(made.uri, "caption") == ["built"]
    version = lance.dataset(made.uri).version
    assert hows(made.uri, "caption") == ["kept"]
    assert lance.dataset(made.uri).version == version
    lance.write_dataset(make_table(10, dim=4, uri=f"{made.uri}.more", seed=1).rows, made.uri, mode="append")
    assert hits(made.uri, "quoted") == 310
    assert hows(made.uri, "caption") == ["extended"]
    assert hits(made.uri, "quoted") == 310
    statistics = lance.dataset(made.uri).stats.index_stats("caption_words")
    assert statistics["num_unindexed_rows"] == 0


def test_an_index_that_is_declared_no_more_goes(make_table: Callable[..., Any]) -> None:
    made = make_table(50, dim=4)
    index_texts(made.uri, ["caption"])
    index_texts(made.uri, [])
    assert full_text.text_index(store.open_version(made.uri, None), "caption") is None


@pytest.mark.parametrize(
    ("column", "message"), [("titel", "no column 'titel'.*kept columns"), ("price", "price is double, not text")]
)
def test_columns_that_cannot_have_one(make_table: Callable[..., Any], column: str, message: str) -> None:
    with pytest.raises(TableError, match=message):
        index_texts(make_table(3, dim=4).uri, [column])


@pytest.mark.parametrize(
    ("text", "words"),
    [("Café au lait", "cafe"), ("T-shirt", "shirt"), ("The Who", "the"), ("SHOES", "shoes"), ("Größe 42", "größe")],
)
def test_words_are_folded_and_none_is_dropped(tmp_path: Path, text: str, words: str) -> None:
    import pyarrow as pa

    uri = f"{tmp_path}/t.lance"
    lance.write_dataset(
        pa.table({"id": ["a", "b"], "caption": [text, "nothing else"]}), uri, data_storage_version="2.2"
    )
    index_texts(uri, ["caption"])
    assert hits(uri, words) == 1
