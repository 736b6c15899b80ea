"""Reading what a plan asks for: a Lance scan, or the nearest candidates by index or exact search.

Assumes: candidates carry the vector column; whoever sorts them computes exact distances from it, since the raw
distance of a quantised index is another number (lancedb#3530).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from conjoin.pipeline.index import Setting
from conjoin.pipeline.query.planner import LARGEST_K
from conjoin.pipeline.query.relations import projection

if TYPE_CHECKING:
    from conjoin.pipeline.query.planner import Read

# Rows x dimensions that a scan delivers to DuckDB within a few milliseconds (1,000 rows of 256: 8 ms on two cores).
_SCAN_FLOATS = 256_000
_FEW_ROWS = 1_000  # of a scan that are held at once: they may have pictures
_SLACK = 16  # further candidates of an exact search, for ties at the last rank
_TIE = 1e-6  # distances of equal vectors differ by rounding only
_HALF_ERROR = 1e-3  # Lance's distances of half floats against those of the same numbers as floats; seen: 7e-5 at 64
_GROWING = 64  # rows that growth begins with
_GROWING_EXACT = 1024  # the same where every round looks at all vectors
_LARGEST_SHARE = 10  # growth ends in a scan beyond LARGEST_K rows and this part of the table
# Sorted distances of what an outcome has, for given rows.
Ask = Callable[[pa.Table], np.ndarray]


@dataclass(frozen=True, slots=True)
class Choice:
    """How one read is done. rows: that pass the filter, of total; trusted: so many nearest rows are asked for.

    setting: of the index; None for an exact search. widened: probes for more than that many rows.
    """

    way: Literal["scan", "exact", "index"]
    rows: int
    total: int = 0
    trusted: int = 0
    setting: Setting | None = None
    filtered: bool = False

    @property
    def fetch(self) -> int:
        """Candidates: those of a quantised index are in rough order, so that more are ranked exactly."""
        return self.trusted * self.setting.refine if self.setting else self.trusted + _SLACK

    @property
    def nprobes(self) -> int:
        """More wanted rows lie in more partitions; so do the nearest of the few rows that pass a selective filter."""
        if self.setting is None:
            return 0
        wider = math.sqrt(max(self.trusted / 10, 1)) * math.sqrt(self.total / max(self.rows, 1))
        return min(math.ceil(self.setting.nprobes * wider), self.setting.num_partitions)


@dataclass(frozen=True, slots=True)
class Nearest:
    """rows: the candidates; distances: theirs, exact, sorted. complete: no row with a usable vector is missing.

    edge: distance of the farthest candidate; sure: no row nearer than this is missing, as far as the index goes.
    """

    rows: pa.Table
    distances: np.ndarray
    complete: bool
    edge: float
    sure: float


def choose(read: Read, settings: Mapping[str, Setting]) -> Choice:
    """settings: of the vector indexes of this version, by column; none for an exact answer."""
    measure = read.measure
    if measure is None:
        return Choice("scan", 0)
    total, rows = (read.reference.relation.count(condition) for condition in (None, read.filter))
    setting = settings.get(measure.column.name)
    wanted = _first_size(read, exact=setting is None)
    if rows * measure.column.dim <= _SCAN_FLOATS or wanted + _SLACK >= rows:
        return Choice("scan", rows, total)
    if setting is None or wanted * setting.refine >= rows:
        return Choice("exact", rows, total, wanted, None, read.filter is not None)
    return Choice("index", rows, total, wanted, setting, read.filter is not None)


def _first_size(read: Read, *, exact: bool) -> int:
    if read.top is not None:
        return max(read.top.need, 1)
    need = read.growth.need if read.growth is not None else 2 * _GROWING
    return max(2 * need, _GROWING_EXACT if exact else _GROWING)


def scan(read: Read, choice: Choice | None = None) -> object:
    """What DuckDB reads for this reference: a re-readable Lance scanner, or the frame; the rows where they are few."""
    relation = read.reference.relation
    if relation.dataset is None:
        assert relation.frame is not None
        if isinstance(relation.frame, pa.Table):
            return relation.frame.select(list(read.columns))
        return relation.frame if relation.filters else relation.frame.scanner(columns=list(read.columns))
    scanner = relation.dataset.scanner(columns=projection(relation, read.columns), filter=read.filter)
    few = choice is not None and read.top is not None and choice.rows <= _FEW_ROWS
    return scanner.to_table() if few else scanner


def candidates(read: Read, choice: Choice, vector: np.ndarray) -> pa.Table | None:
    """Rows among which the nearest `need` are, (rows, columns of the read); None if only a scan can tell."""
    assert read.top is not None
    need, tie = max(read.top.need, 1), _TIE if read.top.ties else 0.0
    while choice.fetch < choice.rows:
        found = nearest(read, choice, vector)
        if found is None or len(found.distances) < need:
            return None  # null vectors: the rest is for a scan
        if found.complete or found.distances[need - 1] + tie <= found.edge - tie:
            return found.rows
        choice = replace(choice, trusted=choice.trusted * 4)
    return None


def grown(read: Read, choice: Choice, vector: np.ndarray, ask: Ask) -> pa.Table | None:
    """Rows whose outcome begins as that of the whole table does; None if only a scan can tell."""
    growth = read.growth
    assert growth is not None
    need, tie = growth.need, _TIE if growth.ties else 0.0
    while _may_grow(choice):
        found = nearest(read, choice, vector)
        if found is None:
            return None
        outcome = ask(found.rows)
        if len(outcome) >= need and (need == 0 or found.complete or outcome[need - 1] + tie <= found.sure):
            return found.rows
        if found.sure > growth.radius + _margin(read):
            return found.rows
        if found.complete:
            return None
        times = 1.5 * need / max(len(outcome), 1)
        choice = replace(choice, trusted=math.ceil(choice.trusted * min(max(times, 2), 8)))
    return None


def inside(read: Read, choice: Choice, vector: np.ndarray) -> pa.Table | None:
    """All rows within the radius, and some more; None if they are so many that a scan is quicker."""
    assert read.within is not None
    while _may_grow(choice):
        found = nearest(read, choice, vector)
        if found is None:
            return None
        if found.complete or found.sure > read.within.radius + _margin(read):
            return found.rows
        choice = replace(choice, trusted=choice.trusted * 4)
    return None


def _may_grow(choice: Choice) -> bool:
    most = max(LARGEST_K, choice.rows // _LARGEST_SHARE)
    return choice.trusted <= most and choice.fetch <= max(choice.rows // 2, 1)


def nearest(read: Read, choice: Choice, vector: np.ndarray) -> Nearest | None:
    """The candidates that a choice asks for; None where Lance cannot be trusted with them.

    A zero vector's distance is NaN, and among the rows behind a filter Lance lets such rows push out nearer ones.
    """
    found = _search(read, choice, vector, bounded=not choice.filtered)
    if found.num_rows < choice.fetch and choice.way == "index" and not choice.filtered:
        found = _search(read, choice, vector, bounded=False)  # the partitions looked at hold too few rows
    distances = _distances(read, found, vector)
    usable = distances[np.isfinite(distances)]
    if found.num_rows < choice.fetch:
        return Nearest(found, usable, True, math.inf, math.inf)
    if len(usable) < found.num_rows:
        return None
    if choice.setting is None:
        edge = float(usable[-1]) - (_HALF_ERROR if _is_half(read) else 0.0)
        return Nearest(found, usable, False, edge, edge)
    return Nearest(found, usable, False, float(usable[-1]), float(usable[choice.trusted - 1]))


def _search(read: Read, choice: Choice, vector: np.ndarray, *, bounded: bool) -> pa.Table:
    relation, measure = read.reference.relation, read.measure
    assert relation.dataset is not None
    assert measure is not None
    query: dict[str, object] = {"column": measure.column.name, "q": vector, "k": choice.fetch, "metric": "cosine"}
    if choice.way == "index":
        assert choice.setting is not None
        query |= {"minimum_nprobes": choice.nprobes}
        # All candidates are ranked exactly here: Lance has to do so only where some of them have exact distances.
        query |= {} if choice.setting.complete else {"refine_factor": 1}
        # Unfiltered: no more than that (lance#5637). Filtered: on until enough rows are found, or rows go missing.
        query |= {"maximum_nprobes": choice.nprobes} if bounded else {}
    else:
        query["use_index"] = False
    columns = {**projection(relation, dict.fromkeys([*read.columns, measure.column.name])), "_distance": "_distance"}
    found = relation.dataset.to_table(columns=columns, nearest=query, filter=read.filter, prefilter=True)
    return found.drop_columns(["_distance"])


def _distances(read: Read, found: pa.Table, vector: np.ndarray) -> np.ndarray:
    """Exact cosine distances of the rows that have a vector, sorted, NaN last."""
    assert read.measure is not None
    return np.sort(distances(found.column(read.measure.column.name), vector))


def distances(column: pa.ChunkedArray, vector: np.ndarray) -> np.ndarray:
    """Exact cosine distances to a unit vector, (N,) float32, of those that are not null; NaN for zeros."""
    there = column.combine_chunks().drop_null()
    stored_ND = there.flatten().to_numpy(zero_copy_only=False).reshape(len(there), len(vector)).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1.0 - stored_ND @ vector / np.linalg.norm(stored_ND, axis=1)


def _is_half(read: Read) -> bool:
    assert read.reference.relation.dataset is not None
    assert read.measure is not None
    kind = read.reference.relation.dataset.schema.field(read.measure.column.name).type
    return pa.types.is_float16(kind.value_type)


def _margin(read: Read) -> float:
    return _HALF_ERROR if _is_half(read) else 10 * _TIE
