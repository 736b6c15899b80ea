"""EXPLAIN and EXPLAIN ANALYZE: how a query is answered, in plain words and as data.

Assumes: rows are counted, not guessed; the recall is that of this very query, answered once more without an index.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa

from conjoin.pipeline.query.result import Result
from conjoin.pipeline.query.search import Choice, choose

if TYPE_CHECKING:
    import lance

    from conjoin.pipeline.index import Setting
    from conjoin.pipeline.query.planner import Read
    from conjoin.pipeline.query.sources import Gathered

_EQUAL = 1e-6
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Step:
    """How one table is read. way: `index search`, `exact nearest-neighbour search`, `exact scan`, or `given`.

    rows: that pass the pushed filter; residual: conditions that only DuckDB evaluates; keys: where a narrower filter
    comes from while the query runs; unindexed_rows: searched as well, without the index.
    """

    table: str
    version: int | None
    way: str
    why: str
    columns: tuple[str, ...]
    rows: int | None = None
    pushed: str | None = None
    residual: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    vector: str | None = None
    metric: str | None = None
    fingerprint: str | None = None
    index: str | None = None
    unindexed_rows: int | None = None
    candidates: int | None = None
    probes: int | None = None
    partitions: int | None = None
    text: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Times:
    """Milliseconds: query vectors, searches and their growth, the finish (DuckDB with the scans it pulls)."""

    embed_ms: float
    search_ms: float
    finish_ms: float


@dataclass(frozen=True, slots=True)
class Measured:
    """What answering took. recall: the share of the exact answer's rows that were found; read: what became of each
    table's plan.
    """

    times: Times
    num_rows: int
    recall: float
    read: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Explanation:
    """steps: one per table of the query; measured: of EXPLAIN ANALYZE."""

    steps: tuple[Step, ...]
    measured: Measured | None = None

    def __str__(self) -> str:
        return "\n".join([*[line for step in self.steps for line in _lines(step)], *self._measured()])

    __repr__ = __str__

    def __contains__(self, text: str) -> bool:
        """Whether its words are among the lines."""
        return text in str(self)

    def to_json(self) -> str:
        """{format, steps: [...], measured: {...} or null}, indented."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1)

    def result(self) -> Result:
        """One line a row, in a column named `explain`."""
        versions = {step.table: step.version for step in self.steps if step.version is not None}
        return Result(pa.table({"explain": pa.array(str(self).splitlines(), pa.string())}), versions)

    def _measured(self) -> list[str]:
        if (found := self.measured) is None:
            return []
        times = found.times
        return [
            *found.read,
            f"{found.num_rows:,} rows; query vectors {times.embed_ms:.1f} ms, search {times.search_ms:.1f} ms, "
            f"finishing {times.finish_ms:.1f} ms",
            f"recall of this query against its exact answer: {found.recall:.4g}",
        ]


def _lines(step: Step) -> list[str]:
    if step.version is None:
        return [f"{step.table}: {step.why}, {len(step.columns)} columns"]
    how = f", {step.candidates:,} candidates" if step.candidates else ""
    how += f" from {step.probes} of {step.partitions} partitions" if step.probes else ""
    facts = [f"columns {', '.join(step.columns)}"]
    if step.rows is not None:
        facts.append(f"rows {step.rows:,}")
    if step.vector:
        unindexed = f", {step.unindexed_rows:,} rows not in it" if step.index else ""
        facts.append(f"vectors {step.vector}, {step.metric}, encoder {(step.fingerprint or '')[:12]}")
        facts.append(f"index {step.index or 'none'}{unindexed}")
    facts += [f"filter in Lance: {step.pushed}"] if step.pushed else []
    facts += [f"filter in Lance while it runs: {keys}" for keys in step.keys]
    facts += [f"filter in DuckDB: {' AND '.join(step.residual)}"] if step.residual else []
    return [
        f"{step.table} version {step.version}: {step.way}{how} ({step.why})",
        *[f"  {fact}" for fact in (*facts, *step.text)],
    ]


def explain_read(read: Read, settings: Mapping[str, Setting], text: Sequence[str] = (), *, exact: bool) -> Step:
    """settings: of the indexes that may be used; text: what a full-text index does, in lines; exact: as asked for."""
    relation = read.reference.relation
    if relation.dataset is None:
        return Step(relation.name, None, "given", read.reason, read.columns)
    choice = choose(read, settings)
    rows = choice.rows if read.measure else relation.count(read.filter)
    keys = tuple(f"`{keys.column}` IN keys of {keys.source}, if they are few" for keys in read.keys)
    step = Step(
        relation.name,
        int(relation.dataset.version),
        _WAYS[choice.way] if read.near is None else "batched nearest-neighbour search",
        _why(read, choice, exact=exact),
        read.columns,
        rows,
        read.filter,
        read.kept,
        keys,
        text=tuple(text),
    )
    return step if read.measure is None else _with_vectors(step, read, choice)


_WAYS = {"scan": "exact scan", "exact": "exact nearest-neighbour search", "index": "index search"}


def _with_vectors(step: Step, read: Read, choice: Choice) -> Step:
    dataset, measure = read.reference.relation.dataset, read.measure
    assert dataset is not None
    assert measure is not None
    name = _index_of(dataset, measure.column.name)
    setting = choice.setting
    return replace(
        step,
        vector=measure.column.name,
        metric=measure.column.metric,
        fingerprint=measure.column.fingerprint,
        index=name,
        unindexed_rows=_unindexed(dataset, name) if name else None,
        candidates=choice.fetch if choice.way != "scan" else None,
        probes=choice.nprobes if setting else None,
        partitions=setting.num_partitions if setting else None,
    )


def _why(read: Read, choice: Choice, *, exact: bool) -> str:
    if read.measure is None:
        return read.reason
    if choice.way == "scan":
        return f"{read.reason}, but a scan of {choice.rows:,} is quicker"
    more = ["grown until LIMIT is met"] if read.growth else ["grown until the radius is met"] if read.within else []
    if choice.way == "exact":
        more.append("exact is asked for" if exact else "no index in use")
    return "; ".join([read.reason, *more])


def _index_of(dataset: lance.LanceDataset, column: str) -> str | None:
    found = [i.name for i in dataset.describe_indices() if "Vector" in i.type_url and i.field_names == [column]]
    return found[0] if found else None


def _unindexed(dataset: lance.LanceDataset, name: str) -> int:
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")  # unset, Lance warns on stderr
    return int(cast(int, dataset.stats.index_stats(name)["num_unindexed_rows"]))


def told(gathered: Gathered) -> str:
    """What became of a plan when it ran."""
    read, choice = gathered.read, gathered.choice
    keys = "".join(f", {count:,} keys of {source}" for source, count in gathered.keys.items())
    if gathered.rows is not None:
        return f"{read.reference.relation.name}: {gathered.rows:,} candidates were read{keys}"
    fell = " after a search could not tell" if choice is not None and choice.way != "scan" else ""
    return f"{read.reference.relation.name}: scanned{fell}{keys}"


class Clock:
    """Milliseconds between laps, by stage."""

    def __init__(self) -> None:
        self._last, self._laps = time.perf_counter(), dict[str, float]()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self._laps[stage], self._last = (now - self._last) * 1000, now

    def times(self) -> Times:
        return Times(*(self._laps.get(stage, 0.0) for stage in ("embed", "search", "finish")))


def recall_of_distances(found: np.ndarray | None, exact: np.ndarray | None) -> float | None:
    """Share of the exact answer's rows that were found, ties at its end counting as any of them; None without."""
    if found is None or exact is None:
        return None
    if not len(exact):
        return 1.0
    return min(int((found <= exact.max() + _EQUAL).sum()), len(exact)) / len(exact)


def recall_of_rows(found: pa.Table, exact: pa.Table) -> float:
    """Share of the exact answer's rows that are in the other, each as often as it occurs."""
    if not exact.num_rows:
        return 1.0
    rows = [Counter(map(repr, zip(*table.to_pydict().values(), strict=True))) for table in (found, exact)]
    return (rows[0] & rows[1]).total() / exact.num_rows
