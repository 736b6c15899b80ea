"""How hard a query tries: as its index was made to, exactly, or to a recall that is measured at the first time.

Assumes: the setting that an index reports meets the recall it was built for, on average; another one is measured here,
on stored vectors that are moved a little, and remembered by who opened the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.index import Setting
from conjoin.pipeline.measures import leaning
from conjoin.pipeline.query.relations import Relation

if TYPE_CHECKING:
    import lance

_K = 10
_QUERIES = 32  # per vector column of the same encoder: words ask pictures otherwise than pictures do
_SEED = 20_261_126
_MOST_REFINE = 32
_EQUAL = 1e-6


@dataclass(frozen=True, slots=True)
class Effort:
    """exact: no index of vectors is used; recall: measured, None for what the index was built for."""

    exact: bool = False
    recall: float | None = None

    def applied(self, relation: Relation, settings: Mapping[str, Setting]) -> dict[str, Setting]:
        """The settings that reach the recall; a column of which none does is left out, and searched exactly."""
        if self.exact:
            return {}
        if self.recall is None:
            return dict(settings)
        assert relation.dataset is not None
        found = {}
        for column, setting in settings.items():
            reached = _tuned(relation, column, setting, self.recall) if column in relation.vectors else None
            if reached is not None:
                found[column] = reached
        return found


DEFAULT, EXACT = Effort(), Effort(exact=True)


def wanted_effort(*, exact: bool, recall: float | None) -> Effort:
    """Raises QueryError for a recall that is none."""
    if recall is not None and not 0 < recall <= 1:
        raise QueryError(f"recall is a share above 0 and up to 1, not {recall:g}")
    return EXACT if exact or recall == 1 else Effort(recall=recall)


def _tuned(relation: Relation, column: str, setting: Setting, target: float) -> Setting | None:
    """The cheapest setting that reaches the target, None if none does."""
    assert relation.dataset is not None
    queries_QD = _queries(relation, column)
    if not len(queries_QD):
        return setting
    kth_Q = [_similarities(relation.dataset, column, query, None)[-1] for query in queries_QD]
    refine = max(setting.refine // 4, 1)
    while refine <= _MOST_REFINE:
        whole = replace(setting, refine=refine, nprobes=setting.num_partitions)
        if _recall(relation.dataset, column, queries_QD, kth_Q, whole) >= target:
            probes = 1
            while probes < setting.num_partitions:
                tried = replace(whole, nprobes=probes)
                if _recall(relation.dataset, column, queries_QD, kth_Q, tried) >= target:
                    return tried
                probes = math.ceil(probes * 1.5)
            return whole
        refine *= 2
    return None


def _queries(relation: Relation, column: str) -> np.ndarray:
    """(Q, D) unit vectors: of rows spread over the table, those of the column itself as in pipeline/measures.py."""
    assert relation.dataset is not None
    rng, parts = np.random.default_rng(_SEED), []
    count = relation.dataset.count_rows()
    rows = np.sort(rng.choice(count, min(4 * _QUERIES, count), replace=False))
    for name, vector in relation.vectors.items():
        if vector.fingerprint == relation.vectors[column].fingerprint:
            stored = _matrix(relation.dataset.take(rows, columns=[name]).column(0).drop_null())[:_QUERIES]
            if name == column and len(stored):
                stored = leaning(stored, rng)
            parts.append(stored[np.linalg.norm(stored, axis=1) > 0] if len(stored) else stored)
    queries_QD = np.concatenate(parts)
    return np.asarray(queries_QD / np.linalg.norm(queries_QD, axis=1, keepdims=True), np.float32)


def _recall(
    dataset: lance.LanceDataset, column: str, queries_QD: np.ndarray, kth_Q: list[float], setting: Setting
) -> float:
    """Mean recall @10, less one standard error."""
    hits = [
        min(int((_similarities(dataset, column, query, setting) >= kth - _EQUAL).sum()), _K) / _K
        for query, kth in zip(queries_QD, kth_Q, strict=True)
    ]
    return float(np.mean(hits) - np.std(hits) / math.sqrt(len(hits)))


def _similarities(dataset: lance.LanceDataset, column: str, query: np.ndarray, setting: Setting | None) -> np.ndarray:
    """Of the ten nearest rows or the candidates, exact, descending; setting: None for exact search."""
    how: dict[str, object] = {"use_index": False, "k": _K}
    if setting is not None:
        probes = {"minimum_nprobes": setting.nprobes, "maximum_nprobes": setting.nprobes}
        how = {"k": _K * setting.refine, "refine_factor": 1, **probes}
    nearest = {"column": column, "q": query, "metric": "cosine", **how}
    found = _matrix(dataset.to_table(columns=[column, "_distance"], nearest=nearest).column(0))
    return np.sort(found @ query)[::-1]


def _matrix(vectors: pa.ChunkedArray) -> np.ndarray:
    width = vectors.type.list_size
    return vectors.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width)
