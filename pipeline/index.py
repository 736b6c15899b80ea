"""Indexes of a table: one on id always, one per vector column where exact search would be too slow, measured.

Assumes: the head version is complete and no other run works on it; building makes new versions of the same rows. The
exact answers that recall is measured against are kept (measures.py), so that no night reads a whole column for them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, cast

from conjoin.pipeline import storage, store
from conjoin.pipeline.errors import TableError
from conjoin.pipeline.measures import Measure, measure
from conjoin.pipeline.recall import FEWEST_PROBES, FEWEST_REFINE, Reached, Setting, reach, tune

if TYPE_CHECKING:
    import lance

# Lance says of every delta which partitions got no row.
os.environ.setdefault("LANCE_LOG", "warn,lance::index::vector::builder=error")

__all__ = [
    "EXACT_FLOATS",
    "KIND",
    "IndexReport",
    "Setting",
    "build",
    "incomplete",
    "measured",
    "num_partitions",
    "settings",
]

# Rows x dimensions up to which exact top-10 is fast enough to need no index: about 50 ms on two cores.
# `python tests/bench/index_kinds.py DIR`, 256 float32 dimensions: 20,000 rows 32 ms, 50,000 rows 61 to 77 ms.
EXACT_FLOATS = 10_000_000
# IVF_SQ, measured at 100,000 x 256 (EfficientNet vectors of icons, 128 partitions; `tests/bench/index_kinds.py`):
#   IVF_SQ    build  5 s,  26 MB, recall@10 .997 at 4.7 ms (16 probes, refine 2), 1.00 at 4.9 ms (32 probes)
#   IVF_FLAT  build  4 s, 103 MB, recall@10 .997 at 5.5 ms (16 probes),           1.00 at 7.0 ms
#   IVF_PQ    build 65 s,   7 MB, recall@10 .995 at 7.0 ms (16 probes, refine 4), 1.00 at 12 ms
KIND = "IVF_SQ"
_UNMEASURED = (64, 8)  # nprobes and refine for an index without a report (built by somebody else)
# Upkeep: a night adds a delta, which costs what the night changed. Deltas are merged when there are this many, or when
# latency has left that of the last build or merge; partitions are cut anew when the table has outgrown them.
MOST_PARTS = 9
_SLOWER, _SLOWER_MS = 2.0, 5.0
_OUTGROWN = 4


@dataclass(frozen=True, slots=True)
class IndexReport:
    """One index. kind: BTREE, IVF_SQ, or `none` where exact search answers; recall: @10 against exact search.

    nprobes, refine: the cheapest measured setting that reaches the target; latency_ms: median of one query with it.
    action: built, merged, extended (a delta), or kept; parts: the index and its deltas; built_rows, built_ms: rows when
    its partitions were cut, latency after the last build or merge.
    """

    column: str
    kind: str
    num_rows: int
    num_partitions: int = 0
    nprobes: int = 0
    refine: int = 0
    recall: float | None = None
    latency_ms: float | None = None
    seconds: float = 0.0
    fingerprint: str = ""
    action: str = ""
    parts: int = 0
    built_rows: int = 0
    built_ms: float = 0.0

    @property
    def setting(self) -> Setting:
        return Setting(self.nprobes, self.refine, self.num_partitions)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A column to index; measure: what is known of it; before: the report of the version this one was made from."""

    uri: str
    column: store.VectorColumn
    measure: Measure
    target: float
    before: IndexReport | None

    def open(self) -> lance.LanceDataset:
        return store.open_version(self.uri, None)


def build(
    uri: str, config: store.TableConfig, columns: Sequence[str] | None = None, *, exact_floats: int = EXACT_FLOATS
) -> tuple[IndexReport, ...]:
    """Build or extend every index of the head version and write `<bookkeeping>/index/<version>.json`.

    columns: these vector columns alone (a new encoder's, before it is renamed). Repeating it on an indexed version
    returns the same reports. Raises TableError if rows stay unindexed.
    """
    dataset = store.open_version(uri, None)
    vectors = store.vector_columns(dataset)
    names = ["id", *vectors] if columns is None else list(columns)
    known = _read(uri, int(dataset.version))
    if known is not None and set(names) <= {report.column for report in known}:
        return known
    before = {_key(report.column, report.fingerprint): report for report in _reports_before(uri, dataset)}
    measures = measure(dataset, _live(uri, dataset))
    reports = [_index_ids(dataset)] if columns is None else []
    for column in (vectors[name] for name in names if name in vectors):
        kept = measures.of(column)
        assert kept is not None
        wanted = _Wanted(uri, column, kept, config.ann_recall, before.get(_key(column.name, column.fingerprint)))
        reports.append(_index_vectors(wanted, exact_floats))
    dataset = store.open_version(uri, None)
    _check_complete(dataset, None if columns is None else names)
    rows = [asdict(report) for report in reports]
    storage.write_json(_path(uri, int(dataset.version)), {"version": int(dataset.version), "indexes": rows})
    return tuple(reports)


def _key(column: str, fingerprint: str) -> tuple[str, str]:
    """A report follows its column through the renaming."""
    return column.removesuffix(store.NEXT), fingerprint


def _live(uri: str, dataset: lance.LanceDataset) -> lance.LanceDataset | None:
    return None if store.live_version(dataset) is None else store.open_version(uri)


def settings(uri: str, dataset: lance.LanceDataset) -> Mapping[str, Setting]:
    """How to use the vector indexes that this version has, by column; from the newest report not after it."""
    names = {i.field_names[0]: i.name for i in dataset.describe_indices() if "Vector" in i.type_url}
    if not names:
        return {}
    newest = max((number for number in _versions(uri) if number <= dataset.version), default=None)
    reports = (_read(uri, newest) if newest else None) or ()
    found = {r.column.removesuffix(store.NEXT): r.setting for r in reports if r.nprobes}
    found |= {r.column: r.setting for r in reports if r.nprobes}
    known = {column: found.get(column) or _default(dataset, column) for column in names}
    return {
        column: replace(setting, complete=not _unindexed(dataset, names[column])) for column, setting in known.items()
    }


def measured(dataset: lance.LanceDataset) -> tuple[IndexReport, ...]:
    """Reports of the vector indexes of this very version; measured now where nothing was when they were built."""
    uri = str(dataset.uri)
    kept = {report.column: report for report in _read(uri, int(dataset.version)) or ()}
    found = []
    for name, setting in settings(uri, dataset).items():
        column = store.vector_columns(dataset).get(name)
        report = kept.get(name)
        if column is not None and (report is None or report.recall is None):
            known = measure(dataset, _live(uri, dataset)).of(column)
            assert known is not None
            reached = reach(dataset, name, known.answers, setting)
            report = IndexReport(
                name,
                KIND,
                known.count,
                recall=reached.recall,
                latency_ms=reached.latency_ms,
                fingerprint=column.fingerprint,
            )
        if report is not None:
            found.append(report)
    return tuple(found)


def _default(dataset: lance.LanceDataset, column: str) -> Setting:
    name = _name_of(dataset, column)
    assert name is not None
    return Setting(*_UNMEASURED, _num_partitions(dataset, name))


def _num_partitions(dataset: lance.LanceDataset, name: str) -> int:
    return max(part["num_partitions"] for part in _parts(dataset, name))


def _parts(dataset: lance.LanceDataset, name: str) -> list[dict[str, int]]:
    """The index and its deltas."""
    return cast("list[dict[str, int]]", _statistics(dataset, name)["indices"])


def _directory(uri: str) -> str:
    return storage.join(store.bookkeeping(uri), "index")


def _path(uri: str, version: int) -> str:
    return storage.join(_directory(uri), f"{version}.json")


def _versions(uri: str) -> set[int]:
    """Versions with a report."""
    names = [path.rsplit("/", 1)[1].removesuffix(".json") for path in storage.list_files(_directory(uri))]
    return {int(name) for name in names if name.isdigit()}


def _read(uri: str, version: int) -> tuple[IndexReport, ...] | None:
    path = _path(uri, version)
    if not storage.exists(path):
        return None
    rows = cast("list[dict[str, object]]", storage.read_json(path)["indexes"])
    return tuple(IndexReport(**row) for row in rows)  # type: ignore[arg-type]  # as written by build()


def _reports_before(uri: str, dataset: lance.LanceDataset) -> tuple[IndexReport, ...]:
    """The newest report of a version that this one was made from; a version that was undone is none of them."""
    there = _versions(uri)
    found = next((version for version, _ in store.lineage(dataset) if version in there), None) if there else None
    return (_read(uri, found) if found is not None else None) or ()


def _index_ids(dataset: lance.LanceDataset) -> IndexReport:
    start, action = time.perf_counter(), "kept"
    if "id_idx" not in _names(dataset):
        dataset.create_scalar_index("id", "BTREE", name="id_idx")
        action = "built"
    elif _unindexed(dataset, "id_idx"):
        action = _extend(dataset, "id_idx")
    return IndexReport("id", "BTREE", dataset.count_rows(), seconds=time.perf_counter() - start, action=action)


def _extend(dataset: lance.LanceDataset, name: str) -> str:
    """A delta of what is not indexed yet, or one index of all parts where there are many."""
    parts = _num_parts(dataset, name)
    merge = parts if parts >= MOST_PARTS else 0
    # Merging everything took 35 s at 1M rows after 1,000 changed ones, a delta 0.06 s.
    dataset.optimize.optimize_indices(index_names=[name], num_indices_to_merge=merge)
    return "merged" if merge else "extended"


def _num_parts(dataset: lance.LanceDataset, name: str) -> int:
    return int(cast(int, _statistics(dataset, name)["num_indices"]))


def _names(dataset: lance.LanceDataset) -> set[str]:
    return {index.name for index in dataset.describe_indices()}


def _name_of(dataset: lance.LanceDataset, column: str) -> str | None:
    """The vector index of a column; its name may be older than the column's."""
    found = (i for i in dataset.describe_indices() if i.field_names == [column] and "Vector" in i.type_url)
    return next((index.name for index in found), None)


def _unindexed(dataset: lance.LanceDataset, name: str) -> int:
    return int(cast(int, _statistics(dataset, name)["num_unindexed_rows"]))


def _statistics(dataset: lance.LanceDataset, name: str) -> dict[str, object]:
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")  # unset, Lance warns on stderr
    return cast("dict[str, object]", dataset.stats.index_stats(name))


def incomplete(dataset: lance.LanceDataset) -> Mapping[str, int]:
    """Rows that are not in an index, by the index's name."""
    found = {name: _unindexed(dataset, name) for name in sorted(_names(dataset))}
    return {name: missing for name, missing in found.items() if missing}


def _check_complete(dataset: lance.LanceDataset, columns: Sequence[str] | None) -> None:
    for name, missing in incomplete(dataset).items():
        if columns is None or name in {_name_of(dataset, column) for column in columns}:
            raise TableError(
                f"{missing} rows are not in the index {name}", where=f"{dataset.uri} version {dataset.version}"
            )


def _index_vectors(wanted: _Wanted, exact_floats: int) -> IndexReport:
    start = time.perf_counter()
    column, num_rows = wanted.column, wanted.measure.count
    if num_rows * column.dim > exact_floats:
        report = _kept_up(wanted)
        if report is not None:
            return replace(report, seconds=time.perf_counter() - start)
    dataset = wanted.open()
    if (name := _name_of(dataset, column.name)) is not None:
        dataset.drop_index(name)
    seconds = time.perf_counter() - start
    return IndexReport(column.name, "none", num_rows, recall=1.0, seconds=seconds, fingerprint=column.fingerprint)


def _kept_up(wanted: _Wanted) -> IndexReport | None:
    """The index as it is and a delta; merged, then built anew, only where what is measured asks for it.

    None if no index of this kind reaches the target.
    """
    dataset, before, num_rows = wanted.open(), wanted.before, wanted.measure.count
    name = _name_of(dataset, wanted.column.name)
    built_rows = (before.built_rows if before else 0) or num_rows
    if name is None or num_rows > _OUTGROWN * built_rows:
        return _built(wanted)
    action = _extend(dataset, name) if _unindexed(dataset, name) else "kept"
    setting = before.setting if before and before.nprobes else None
    reached = _reached(wanted, name, setting)
    if _needs_merging(wanted.open(), name, reached, before):
        parts = _num_parts(wanted.open(), name)
        wanted.open().optimize.optimize_indices(index_names=[name], num_indices_to_merge=parts)
        action, reached = "merged", _reached(wanted, name, setting)
    if reached is None:
        return _built(wanted)
    fresh = action == "merged" or not (before and before.built_ms)
    built_ms = reached.latency_ms if fresh or before is None else before.built_ms
    return _report(wanted, name, reached, (action, built_rows, built_ms))


def _needs_merging(dataset: lance.LanceDataset, name: str, reached: Reached | None, before: IndexReport | None) -> bool:
    if _num_parts(dataset, name) == 1:
        return False
    if reached is None:
        return True
    normal_ms = before.built_ms if before else 0.0
    return bool(normal_ms) and reached.latency_ms > _SLOWER * normal_ms + _SLOWER_MS


def _reached(wanted: _Wanted, name: str, setting: Setting | None) -> Reached | None:
    """With the setting of the night before if it still does; else with the cheapest above it that does.

    A setting is chosen with a standard error to spare and kept without: chosen anew it takes 20 s at a million rows.
    """
    dataset, column, answers = wanted.open(), wanted.column.name, wanted.measure.answers
    partitions = _num_partitions(dataset, name)
    least = Setting(FEWEST_PROBES, FEWEST_REFINE, partitions)
    if setting is not None:
        found = reach(dataset, column, answers, setting)
        if found.worst >= wanted.target:
            return found
        least = Setting(math.ceil(setting.nprobes * 1.5), setting.refine, partitions)
    return tune(dataset, column, answers, least, wanted.target)


def _built(wanted: _Wanted) -> IndexReport | None:
    """A new index over all rows, in place of the one there is."""
    dataset, column, num_rows = wanted.open(), wanted.column, wanted.measure.count
    name = _name_of(dataset, column.name) or _new_name(dataset, column)
    dataset.create_index(
        column.name, KIND, name=name, metric="cosine", num_partitions=num_partitions(num_rows), replace=True
    )
    reached = _reached(wanted, name, None)
    return _report(wanted, name, reached, ("built", num_rows, reached.latency_ms)) if reached else None


def _new_name(dataset: lance.LanceDataset, column: store.VectorColumn) -> str:
    """An index keeps its name when its column is renamed: the next encoder's must have another."""
    name = f"{column.name.removesuffix(store.NEXT)}_idx"
    return (
        name if name not in _names(dataset) else f"{column.name.removesuffix(store.NEXT)}_{column.fingerprint[:12]}_idx"
    )


def _report(wanted: _Wanted, name: str, reached: Reached, made: tuple[str, int, float]) -> IndexReport:
    setting, (action, built_rows, built_ms) = reached.setting, made
    return IndexReport(
        wanted.column.name,
        KIND,
        wanted.measure.count,
        setting.num_partitions,
        setting.nprobes,
        setting.refine,
        reached.recall,
        reached.latency_ms,
        fingerprint=wanted.column.fingerprint,
        action=action,
        parts=_num_parts(wanted.open(), name),
        built_rows=built_rows,
        built_ms=built_ms,
    )


def num_partitions(num_rows: int) -> int:
    """126 at 100,000 rows, 400 at a million; finer cuts needed more probes for the same recall and time."""
    return max(round(0.4 * math.sqrt(num_rows)), 4)
