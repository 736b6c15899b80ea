"""Full-text indexes of a table: an inverted index per declared column, extended by every night.

Assumes: the head version is complete and no other run works on it. Words are cut at everything that is no letter or
digit, lower-cased and stripped of accents; nothing is stemmed and no word is dropped: catalogs speak many languages.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from conjoin.pipeline import store
from conjoin.pipeline.errors import TableError

if TYPE_CHECKING:
    import lance

_SUFFIX = "_words"
_MOST_PARTS = 8
# What is not said here is Lance's own default, and that changes from version to version.
_PARAMETERS = {
    "base_tokenizer": "simple",
    "language": "English",
    "lower_case": True,
    "ascii_folding": True,
    "stem": False,
    "remove_stop_words": False,
    "max_token_length": 40,
    "with_position": False,
}


@dataclass(frozen=True, slots=True)
class TextIndex:
    """One full-text index; how: built, extended or kept as it was."""

    column: str
    how: str
    num_rows: int
    seconds: float


def index_texts(uri: str, columns: Sequence[str]) -> tuple[TextIndex, ...]:
    """Bring the head's full-text indexes to what is declared; one that is declared no more is dropped.

    Raises TableError for a column that the table has not, or that is no text.
    """
    dataset = store.open_version(uri, None)
    for column in columns:
        check_text(dataset, column)
    for index in dataset.describe_indices():
        if index.name.endswith(_SUFFIX) and index.field_names[0] not in columns:
            dataset.drop_index(index.name)
    return tuple(index_text(store.open_version(uri, None), column) for column in columns)


def index_text(dataset: lance.LanceDataset, column: str) -> TextIndex:
    """Build the index of one column of the head, or add the rows it lacks. Raises TableError if rows stay unindexed."""
    start = time.perf_counter()
    check_text(dataset, column)
    name, how = column + _SUFFIX, "kept"
    if text_index(dataset, column) is None:
        dataset.create_scalar_index(column, "INVERTED", name=name, **_PARAMETERS)
        how = "built"
    elif _unindexed(dataset, name):
        parts = int(cast(int, dataset.stats.index_stats(name)["num_indices"]))
        # A delta costs what changed; its scores are those of the whole index all the same (measured, pylance 14).
        dataset.optimize.optimize_indices(index_names=[name], num_indices_to_merge=0 if parts < _MOST_PARTS else parts)
        how = "extended"
    fresh = store.open_version(str(dataset.uri), None)
    if missing := _unindexed(fresh, name):
        raise TableError(f"{missing} rows are not in the index {name}", where=f"{dataset.uri} version {fresh.version}")
    return TextIndex(column, how, fresh.count_rows(), time.perf_counter() - start)


def text_index(dataset: lance.LanceDataset, column: str) -> str | None:
    """The name of the column's full-text index, None without one."""
    found = (i.name for i in dataset.describe_indices() if i.field_names == [column] and "Inverted" in i.type_url)
    return next(found, None)


def check_text(dataset: lance.LanceDataset, column: str) -> None:
    """Raises TableError for a column that cannot have a full-text index."""
    import pyarrow.types as kinds

    where, advice = str(dataset.uri), "table.full_text names `text` or kept columns of texts"
    if column not in dataset.schema.names:
        raise TableError(f"table.full_text: there is no column {column!r}", where=where, next=advice)
    kind = dataset.schema.field(column).type
    if not kinds.is_string(kind) and not kinds.is_large_string(kind):
        raise TableError(f"table.full_text: {column} is {kind}, not text", where=where, next=advice)


def _unindexed(dataset: lance.LanceDataset, name: str) -> int:
    return int(cast(int, dataset.stats.index_stats(name)["num_unindexed_rows"]))
