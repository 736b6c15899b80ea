"""Golden queries: words and the ids that must be among the first ten, asked in this version and in live.

Assumes: the version is indexed, or small enough for exact search; each version is asked with the encoder of its own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from conjoin.pipeline import storage, store
from conjoin.pipeline.errors import ConfigError, EncoderError
from conjoin.pipeline.gates import GateResult, Subject
from conjoin.pipeline.index import Setting, settings

if TYPE_CHECKING:
    import lance

    from conjoin.pipeline.embedder import Embedder

K = 10
_SEARCHED = ("image", "text", "audio")  # whose vectors a query looks at, unless told: the first that the table has
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Query:
    """words, the ids of which one must be found, and the vector column to look at: empty for the table's own choice."""

    words: str
    expected: frozenset[str]
    column: str = ""


def read_queries(path: str) -> tuple[Query, ...]:
    """Raises ConfigError for a file without the columns query and expected, or a row without one of them."""
    text = storage.read_bytes(path).decode("utf-8-sig", errors="replace")
    rows = csv.DictReader(io.StringIO(text))
    advice = "Its columns are query, expected (ids separated by |) and, if wanted, column"
    if not {"query", "expected"} <= set(rows.fieldnames or ()):
        raise ConfigError(f"gates.golden: the columns are {', '.join(rows.fieldnames or ())}", where=path, next=advice)
    found = []
    for number, row in enumerate(rows, start=2):
        ids = frozenset(part.strip() for part in (row["expected"] or "").split("|") if part.strip())
        if not (row["query"] or "").strip() or not ids:
            raise ConfigError(f"gates.golden: line {number} lacks a query or an id", where=path, next=advice)
        found.append(Query(row["query"].strip(), ids, (row.get("column") or "").strip()))
    if not found:
        raise ConfigError("gates.golden: there is no query in it", where=path, next=advice)
    return tuple(found)


def gates(subject: Subject) -> list[GateResult]:
    """One gate over all golden queries; none where the run file names no file of them."""
    path = subject.gates.golden
    if path is None or subject.catalog is None:
        return []
    queries, load = read_queries(path), cache(_loader(subject))
    now = _hits(subject.dataset, queries, load)
    try:
        before = _hits(subject.live, queries, load) if subject.live is not None else now
    except EncoderError:
        before = now  # live's encoder is gone: there is nothing to compare with
    mean, drop, limit = now.mean(), before.mean() - now.mean(), subject.gates.hit_at_10_drop
    lost = [query.words for query, a, b in zip(queries, before, now, strict=True) if a and not b]
    names = ", ".join(repr(words) for words in lost[:_SHOWN]) + (
        f" and {len(lost) - _SHOWN} more" * (len(lost) > _SHOWN)
    )
    detail = (
        f"{int(now.sum())} of {len(queries)} golden queries find an expected id among the first {K}, in live "
        f"{int(before.sum())}; allowed is a drop of {limit:.1%}{f'; lost: {names}' if lost else ''}"
    )
    advice = f"Look at these queries with `conjoin search`; correct {path} where ids are gone for good"
    passed = bool(drop <= limit + 1e-9)
    return [GateResult("golden queries", passed, detail, advice, float(mean), float(before.mean() - limit))]


def _loader(subject: Subject) -> Callable[[str, str], Embedder]:
    """The encoder of a fingerprint, from tonight's folder or the one that a column names."""
    assert subject.catalog is not None
    catalog = subject.catalog

    def load(fingerprint: str, folder: str) -> Embedder:
        from conjoin.pipeline.embedder import load as load_folder

        tonight = fingerprint == subject.expected.fingerprint
        found = load_folder(catalog.encoder if tonight else folder, precision=catalog.embed.precision)
        if found.fingerprint != fingerprint:
            raise EncoderError(
                f"the encoder is {found.fingerprint[:12]}, the column needs {fingerprint[:12]}", where=folder
            )
        return found

    return load


def _hits(dataset: lance.LanceDataset, queries: Sequence[Query], load: Callable[[str, str], Embedder]) -> np.ndarray:
    """(Q,) bool: whether an expected id is among the first K."""
    columns, indexed = store.vector_columns(dataset), settings(str(dataset.uri), dataset)
    found = np.zeros(len(queries), bool)
    by_column: dict[str, list[int]] = {}
    for number, query in enumerate(queries):
        by_column.setdefault(_column(query, columns), []).append(number)
    for name, numbers in by_column.items():
        column = columns[name]
        vectors = load(column.fingerprint, column.encoder).encode(text=[queries[number].words for number in numbers])
        for number, vector in zip(numbers, vectors, strict=True):
            found[number] = bool(_nearest(dataset, name, vector, indexed.get(name)) & queries[number].expected)
    return found


def _column(query: Query, columns: Mapping[str, store.VectorColumn]) -> str:
    if query.column:
        if query.column not in columns:
            what = f"gates.golden: there is no vector column {query.column!r}"
            raise ConfigError(what, next=f"The table has {', '.join(columns)}")
        return query.column
    by_modality = {column.modality: name for name, column in columns.items()}
    return next(by_modality[modality] for modality in _SEARCHED if modality in by_modality)


def _nearest(dataset: lance.LanceDataset, column: str, vector: np.ndarray, setting: Setting | None) -> set[str]:
    """Ids of the K nearest rows, as readers find them."""
    nearest: dict[str, object] = {"column": column, "q": vector, "k": K, "metric": "cosine"}
    if setting is None:
        nearest["use_index"] = False
    else:
        probes = {"minimum_nprobes": setting.nprobes, "maximum_nprobes": setting.nprobes}
        nearest |= {**probes, "refine_factor": setting.refine}
    found = dataset.to_table(columns=["id", "_distance"], nearest=nearest)
    return {str(name) for name in found["id"].to_pylist()}
