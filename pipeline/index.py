"""Indexes of a table: one on id always, one per vector column where exact search would be too slow, measured.

Assumes: the head version is complete and no other run works on it; building makes new versions of the same rows.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

from conjoin.pipeline import storage, store
from conjoin.pipeline.errors import TableError

if TYPE_CHECKING:
    import lance
    import numpy as np

# Rows x dimensions up to which exact top-10 is fast enough to need no index: about 50 ms on two cores.
# `python tests/bench/query.py exact`, 256 float32 dimensions: 20,000 rows 32 ms, 50,000 rows 61 to 77 ms.
EXACT_FLOATS = 10_000_000
# IVF_SQ, measured at 100,000 x 256 (EfficientNet vectors of icons, 128 partitions; `tests/bench/query.py kinds`):
#   IVF_SQ    build  5 s,  26 MB, recall@10 .997 at 4.7 ms (16 probes, refine 2), 1.00 at 4.9 ms (32 probes)
#   IVF_FLAT  build  4 s, 103 MB, recall@10 .997 at 5.5 ms (16 probes),           1.00 at 7.0 ms
#   IVF_PQ    build 65 s,   7 MB, recall@10 .995 at 7.0 ms (16 probes, refine 4), 1.00 at 12 ms
KIND = "IVF_SQ"
_K = 10
_QUERIES = 64  # per group of queries
_REFINES = (2, 4, 8, 16, 32)
_SEED = 20_240_601
_UNMEASURED = (64, 8)  # nprobes and refine for an index without a report (built by somebody else)
_EQUAL = 1e-6  # cosine distances of the same two vectors, computed by two programs


@dataclass(frozen=True, slots=True)
class IndexReport:
    """One index. kind: BTREE, IVF_SQ, or `none` where exact search answers; recall: @10 against exact search.

    nprobes, refine: the cheapest measured setting that reaches the target; latency_ms: median of one query with it.
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


@dataclass(frozen=True, slots=True)
class Setting:
    """How a query uses a vector index: partitions to look at, candidates per wanted row."""

    nprobes: int
    refine: int
    num_partitions: int


@dataclass(frozen=True, slots=True)
class _Sample:
    """Queries and what exact search says of them. kth_Q: cosine similarity of the tenth row; groups: who asked."""

    queries_QD: np.ndarray
    kth_Q: np.ndarray
    groups: tuple[slice, ...]


def build(uri: str, config: store.TableConfig, *, exact_floats: int = EXACT_FLOATS) -> tuple[IndexReport, ...]:
    """Build or extend every index of the head version and write `<bookkeeping>/index/<version>.json`.

    Repeating it on an indexed version returns the same reports. Raises TableError if rows stay unindexed.
    """
    dataset = store.open_version(uri, None)
    known = _read(uri, int(dataset.version))
    if known is not None:
        return known
    reports = [_index_ids(dataset)]
    for column in store.vector_columns(dataset).values():
        reports.append(_index_vectors(uri, column, config.ann_recall, exact_floats))
    dataset = store.open_version(uri, None)
    _check_complete(dataset)
    rows = [asdict(report) for report in reports]
    storage.write_json(_path(uri, int(dataset.version)), {"version": int(dataset.version), "indexes": rows})
    return tuple(reports)


def settings(uri: str, dataset: lance.LanceDataset) -> Mapping[str, Setting]:
    """How to use the vector indexes that this version has, by column; from the newest report not after it."""
    columns = [i.field_names[0] for i in dataset.describe_indices() if "Vector" in i.type_url]
    if not columns:
        return {}
    names = [path.rsplit("/", 1)[1].removesuffix(".json") for path in storage.list_files(_directory(uri))]
    measured = max((int(n) for n in names if n.isdigit() and int(n) <= dataset.version), default=None)
    reports = (_read(uri, measured) if measured else None) or ()
    found = {r.column: Setting(r.nprobes, r.refine, r.num_partitions) for r in reports if r.nprobes}
    return {column: found.get(column) or _default(dataset, column) for column in columns}


def _default(dataset: lance.LanceDataset, column: str) -> Setting:
    names = [i.name for i in dataset.describe_indices() if i.field_names == [column]]
    parts = cast("list[dict[str, int]]", _statistics(dataset, names[0])["indices"])
    return Setting(*_UNMEASURED, max(part["num_partitions"] for part in parts))


def _directory(uri: str) -> str:
    return storage.join(store.bookkeeping(uri), "index")


def _path(uri: str, version: int) -> str:
    return storage.join(_directory(uri), f"{version}.json")


def _read(uri: str, version: int) -> tuple[IndexReport, ...] | None:
    path = _path(uri, version)
    if not storage.exists(path):
        return None
    rows = cast("list[dict[str, object]]", storage.read_json(path)["indexes"])
    return tuple(IndexReport(**row) for row in rows)  # type: ignore[arg-type]  # as written by build()


def _index_ids(dataset: lance.LanceDataset) -> IndexReport:
    start = time.perf_counter()
    if "id_idx" not in _names(dataset):
        dataset.create_scalar_index("id", "BTREE", name="id_idx")
    elif _unindexed(dataset, "id_idx"):
        dataset.optimize.optimize_indices(index_names=["id_idx"])
    return IndexReport("id", "BTREE", dataset.count_rows(), seconds=time.perf_counter() - start)


def _names(dataset: lance.LanceDataset) -> set[str]:
    return {index.name for index in dataset.describe_indices()}


def _unindexed(dataset: lance.LanceDataset, name: str) -> int:
    return int(cast(int, _statistics(dataset, name)["num_unindexed_rows"]))


def _statistics(dataset: lance.LanceDataset, name: str) -> dict[str, object]:
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")  # unset, Lance warns on stderr
    return cast("dict[str, object]", dataset.stats.index_stats(name))


def _check_complete(dataset: lance.LanceDataset) -> None:
    for name in _names(dataset):
        if missing := _unindexed(dataset, name):
            raise TableError(
                f"{missing} rows are not in the index {name}", where=f"{dataset.uri} version {dataset.version}"
            )


def _index_vectors(uri: str, column: store.VectorColumn, target: float, exact_floats: int) -> IndexReport:
    start = time.perf_counter()
    dataset, name = store.open_version(uri, None), f"{column.name}_idx"
    num_rows = dataset.count_rows()
    if num_rows * column.dim > exact_floats:
        num_rows = dataset.count_rows(f"`{column.name}` IS NOT NULL")
    if num_rows * column.dim <= exact_floats:
        if name in _names(dataset):
            dataset.drop_index(name)
        return IndexReport(column.name, "none", num_rows, recall=1.0, seconds=time.perf_counter() - start)
    partitions = num_partitions(num_rows)
    sample = _sample(dataset, column)
    fresh = name not in _names(dataset)
    if not fresh:
        # A delta index: merging everything took 35 s at 1M rows after 1,000 changed ones, a delta 0.06 s.
        dataset.optimize.optimize_indices(index_names=[name], num_indices_to_merge=0)
        found = _tune(store.open_version(uri, None), column, sample, partitions, target)
    if fresh or found is None:
        dataset = store.open_version(uri, None)
        dataset.create_index(column.name, KIND, name=name, metric="cosine", num_partitions=partitions, replace=True)
        found = _tune(store.open_version(uri, None), column, sample, partitions, target)
    seconds = time.perf_counter() - start
    if found is None:
        store.open_version(uri, None).drop_index(name)
        return IndexReport(column.name, "none", num_rows, recall=1.0, seconds=seconds)
    setting, recall, latency_ms = found
    return IndexReport(
        column.name, KIND, num_rows, partitions, setting.nprobes, setting.refine, recall, latency_ms, seconds
    )


def num_partitions(num_rows: int) -> int:
    """126 at 100,000 rows, 400 at a million; finer cuts needed more probes for the same recall and time."""
    return max(round(0.4 * math.sqrt(num_rows)), 4)


def _tune(
    dataset: lance.LanceDataset, column: store.VectorColumn, sample: _Sample, partitions: int, target: float
) -> tuple[Setting, float, float] | None:
    """The cheapest setting whose recall reaches the target in every group of queries; None if none does."""
    for refine in _REFINES:
        whole = _measure(dataset, column, sample, Setting(partitions, refine, partitions))
        if whole[0] < target:
            continue
        probes = 2
        while probes < partitions:
            setting = Setting(probes, refine, partitions)
            bound, recall, latency_ms = _measure(dataset, column, sample, setting)
            if bound >= target:
                return setting, recall, latency_ms
            probes = math.ceil(probes * 1.5)
        return Setting(partitions, refine, partitions), whole[1], whole[2]
    return None


def _measure(
    dataset: lance.LanceDataset, column: store.VectorColumn, sample: _Sample, setting: Setting
) -> tuple[float, float, float]:
    """(recall of the worst group less one standard error, mean recall, median milliseconds of a query)."""
    import numpy as np

    recalls, times = [], []
    for query, kth in zip(sample.queries_QD, sample.kth_Q, strict=True):
        start = time.perf_counter()
        found = dataset.to_table(
            columns=[column.name, "_distance"],
            nearest={
                "column": column.name,
                "q": query,
                "k": _K * setting.refine,
                "metric": "cosine",
                "minimum_nprobes": setting.nprobes,
                "maximum_nprobes": setting.nprobes,
                "refine_factor": 1,
            },
        )
        times.append(time.perf_counter() - start)
        similarities = _matrix(found.column(0), column.dim) @ query
        recalls.append(min(int((similarities >= kth - _EQUAL).sum()), _K) / _K)
    means = [(np.mean(recalls[group]), np.std(recalls[group])) for group in sample.groups]
    bounds = [mean - deviation / math.sqrt(_QUERIES) for mean, deviation in means]
    return float(min(bounds)), float(np.mean(recalls)), float(np.median(times) * 1000)


def _sample(dataset: lance.LanceDataset, column: store.VectorColumn) -> _Sample:
    """Queries from every column of the same encoder: words asking pictures differ from pictures asking pictures.

    Vectors of the column itself are moved by a random step of half their length, so that none is its own answer.
    """
    import numpy as np

    rng = np.random.default_rng(_SEED)
    rows = np.sort(rng.choice(dataset.count_rows(), min(4 * _QUERIES, dataset.count_rows()), replace=False))
    groups, parts, done = [], [], 0
    for other in store.vector_columns(dataset).values():
        if other.fingerprint != column.fingerprint:
            continue
        queries = _queries(dataset, other, rows)
        if other.name == column.name:
            step = rng.normal(size=queries.shape).astype(np.float32)
            queries = queries + 0.5 * step / np.linalg.norm(step, axis=1, keepdims=True)
        if len(queries):
            parts.append(queries / np.linalg.norm(queries, axis=1, keepdims=True))
            groups.append(slice(done, done := done + len(queries)))
    queries_QD = np.concatenate(parts)
    return _Sample(queries_QD, _kth(dataset, column, queries_QD), tuple(groups))


def _queries(dataset: lance.LanceDataset, column: store.VectorColumn, rows: np.ndarray) -> np.ndarray:
    """Vectors of the rows; of the first rows that have one where most have none."""
    found = dataset.take(rows, columns=[column.name]).column(0).drop_null()
    if len(found) < _QUERIES:
        present = f"`{column.name}` IS NOT NULL"
        found = dataset.to_table(columns=[column.name], filter=present, limit=_QUERIES).column(0)
    return _matrix(found, column.dim)[:_QUERIES]


def _kth(dataset: lance.LanceDataset, column: store.VectorColumn, queries_QD: np.ndarray) -> np.ndarray:
    """Similarity of each query's tenth nearest row, by one exact pass over the column."""
    import numpy as np

    best_QK = np.full((len(queries_QD), _K), -2.0, dtype=np.float32)
    for vectors_ND in _batches(dataset, column):
        best_QK = np.partition(np.concatenate([best_QK, queries_QD @ vectors_ND.T], axis=1), -_K, axis=1)[:, -_K:]
    return best_QK.min(axis=1)


def _batches(dataset: lance.LanceDataset, column: store.VectorColumn) -> Iterator[np.ndarray]:
    for batch in dataset.to_batches(columns=[column.name], batch_size=8192):
        yield _matrix(batch.column(0).drop_null(), column.dim)


def _matrix(vectors: object, dim: int) -> np.ndarray:
    """Arrow vectors without nulls to (N, D) float32."""
    import numpy as np
    import pyarrow as pa

    column = vectors.combine_chunks() if isinstance(vectors, pa.ChunkedArray) else vectors
    assert isinstance(column, pa.Array)
    return column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, dim)
