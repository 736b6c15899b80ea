"""Reading what a plan asks for: a Lance scan, or the nearest candidates by index or exact search.

Assumes: candidates carry the vector column; whoever sorts them computes exact distances from it, since the raw
distance of a quantised index is another number (lancedb#3530).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from conjoin.pipeline.index import Setting
from conjoin.pipeline.query.relations import projection

if TYPE_CHECKING:
    from conjoin.pipeline.query.planner import Read, TopK

# Rows x dimensions that a scan delivers to DuckDB within a few milliseconds (1,000 rows of 256: 8 ms on two cores).
_SCAN_FLOATS = 256_000
_SLACK = 16  # further candidates of an exact search, for ties at the last rank
_TIE = 1e-6  # distances of equal vectors differ by rounding only


@dataclass(frozen=True, slots=True)
class Choice:
    """How one read is done. rows: that pass the filter; fetch: candidates; nprobes: partitions looked at, at least."""

    way: Literal["scan", "exact", "index"]
    rows: int
    fetch: int = 0
    nprobes: int = 0
    filtered: bool = False


def choose(read: Read, settings: Mapping[str, Setting]) -> Choice:
    """settings: of the vector indexes of this version, by column."""
    dataset, top = read.reference.relation.dataset, read.top
    assert dataset is not None
    if top is None:
        return Choice("scan", 0)
    total = dataset.count_rows()
    rows = dataset.count_rows(read.filter) if read.filter else total
    need = max(top.need, 1)
    if rows * top.measure.column.dim <= _SCAN_FLOATS or need + _SLACK >= rows:
        return Choice("scan", rows)
    setting = settings.get(top.measure.column.name)
    if setting is None or need * setting.refine >= rows:
        return Choice("exact", rows, need + _SLACK)
    # More wanted rows lie in more partitions; so do the nearest of the few rows that pass a selective filter.
    wider = math.sqrt(max(need / 10, 1)) * math.sqrt(total / rows)
    probes = min(math.ceil(setting.nprobes * wider), setting.num_partitions)
    return Choice("index", rows, need * setting.refine, probes, read.filter is not None)


def scan(read: Read) -> object:
    """What DuckDB reads for this reference: a re-readable Lance scanner, or the frame."""
    relation = read.reference.relation
    if relation.dataset is None:
        assert relation.frame is not None
        return relation.frame.select(list(read.columns)) if isinstance(relation.frame, pa.Table) else relation.frame
    return relation.dataset.scanner(columns=projection(relation, read.columns), filter=read.filter)


def candidates(read: Read, choice: Choice, vector: np.ndarray) -> pa.Table | None:
    """Rows among which the nearest `need` are, (rows, columns of the read); None if only a scan can tell."""
    assert read.top is not None
    fetch = choice.fetch
    while fetch < choice.rows:
        found = _nearest(read, choice, vector, fetch)
        if found.num_rows < max(read.top.need, 1):
            return None  # null vectors, or a filter that an index search ran out of: the rest is for a scan
        if not _tied(found, read.top, vector) or found.num_rows < fetch:
            return found
        fetch *= 4
    return None


def _nearest(read: Read, choice: Choice, vector: np.ndarray, fetch: int) -> pa.Table:
    assert read.top is not None
    relation = read.reference.relation
    assert relation.dataset is not None
    query: dict[str, object] = {"column": read.top.measure.column.name, "q": vector, "k": fetch, "metric": "cosine"}
    if choice.way == "index":
        query |= {"minimum_nprobes": choice.nprobes, "refine_factor": 1}
        # Unfiltered: no more than that (lance#5637). Filtered: on until enough rows are found, or rows go missing.
        query |= {} if choice.filtered else {"maximum_nprobes": choice.nprobes}
    else:
        query["use_index"] = False
    columns = {**projection(relation, read.columns), "_distance": "_distance"}
    found = relation.dataset.to_table(columns=columns, nearest=query, filter=read.filter, prefilter=True)
    return found.drop_columns(["_distance"])


def _tied(found: pa.Table, top: TopK, vector: np.ndarray) -> bool:
    """Whether rows beyond the candidates may tie with the last wanted one, so that further sort keys would choose."""
    if not top.ties:
        return False
    column = found.column(top.measure.column.name).combine_chunks()
    stored = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1).astype(np.float32)
    distances = np.sort(1.0 - stored @ vector / np.linalg.norm(stored, axis=1))
    return bool(distances[-1] - distances[max(top.need, 1) - 1] <= _TIE)
