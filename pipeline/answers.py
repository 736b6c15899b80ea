"""Fixed queries and the exact answers to them, kept up with the rows that come and go.

Assumes: vectors have unit length, so that a dot product is the cosine; rows come and go by id.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

K = 10
KEPT = 50  # nearest rows that are remembered, so that deletions leave K of them for a long time
EQUAL = 1e-6  # cosines of the same two vectors, computed in products of other shapes
NOTHING = np.float32(-2)  # below every cosine


@dataclass(frozen=True, slots=True)
class Answers:
    """What exact search says of Q queries.

    queries_QD: float32 unit vectors; askers: the modality each came from, equal ones together; ids_QK: the KEPT
    nearest rows, nearest first, None where fewer are known; similarities_QK: their cosines, NOTHING beside None;
    floor_Q: rows that are not listed are at most this similar, NOTHING where all rows are listed.
    """

    queries_QD: np.ndarray
    askers: tuple[str, ...]
    ids_QK: np.ndarray
    similarities_QK: np.ndarray
    floor_Q: np.ndarray

    def __len__(self) -> int:
        return len(self.queries_QD)

    @property
    def kth(self) -> np.ndarray:
        """Cosine of each query's K-th nearest row."""
        return self.similarities_QK[:, K - 1]

    @property
    def groups(self) -> Iterator[slice]:
        """The queries of each asker."""
        start = 0
        for _, group in groupby(self.askers):
            yield slice(start, start := start + len(list(group)))

    @property
    def short(self) -> np.ndarray:
        """Which queries do not know K rows any more, though there may be more."""
        known_Q = (self.similarities_QK > NOTHING).sum(axis=1)
        return (known_Q < K) & (self.floor_Q > NOTHING)

    def with_rows(self, ids: pa.Array, vectors_ND: np.ndarray) -> Answers:
        """The same after these rows came."""
        if not len(vectors_ND):
            return self
        scores_QN = self.queries_QD @ vectors_ND.T
        # What is not above a full list's last row, or not above all that is unknown, has no place in the list.
        limit_Q = np.maximum(self.floor_Q - EQUAL, self.similarities_QK[:, -1])
        found_QN = scores_QN >= limit_Q[:, None]
        ids_QK, similarities_QK = self.ids_QK.copy(), self.similarities_QK.copy()
        for query in np.flatnonzero(found_QN.any(axis=1)):
            rows = np.flatnonzero(found_QN[query])
            if len(rows) > KEPT:
                rows = rows[np.argpartition(-scores_QN[query, rows], KEPT - 1)[:KEPT]]
            merged = np.concatenate([similarities_QK[query], scores_QN[query, rows]])
            names = [*ids_QK[query], *ids.take(rows).to_pylist()]
            order = np.argsort(-merged, kind="stable")[:KEPT]
            similarities_QK[query] = merged[order]
            ids_QK[query] = [names[at] for at in order]
        floor_Q = np.maximum(self.floor_Q, similarities_QK[:, -1])
        return replace(self, ids_QK=ids_QK, similarities_QK=similarities_QK, floor_Q=floor_Q)

    def without(self, ids: pa.Array) -> Answers:
        """The same after these rows went."""
        import pyarrow as pa
        import pyarrow.compute as pc

        listed = pa.array(self.ids_QK.ravel().tolist(), ids.type)
        gone_QK = pc.is_in(listed, value_set=ids.drop_null()).to_numpy(zero_copy_only=False).reshape(self.ids_QK.shape)
        if not gone_QK.any():
            return self
        ids_QK = self.ids_QK.copy()
        ids_QK[gone_QK] = None
        similarities_QK = np.where(gone_QK, NOTHING, self.similarities_QK)
        order_QK = np.argsort(gone_QK, axis=1, kind="stable")
        return replace(
            self,
            ids_QK=np.take_along_axis(ids_QK, order_QK, axis=1),
            similarities_QK=np.take_along_axis(similarities_QK, order_QK, axis=1),
        )

    def forgotten(self, which_Q: np.ndarray) -> Answers:
        """These queries alone, with nothing known yet: feed them every row."""
        return unanswered(self.queries_QD[which_Q], [self.askers[at] for at in np.flatnonzero(which_Q)])

    def replaced(self, which_Q: np.ndarray, answers: Answers) -> Answers:
        """The same with other answers to some of the queries."""
        ids_QK, similarities_QK, floor_Q = self.ids_QK.copy(), self.similarities_QK.copy(), self.floor_Q.copy()
        ids_QK[which_Q], similarities_QK[which_Q] = answers.ids_QK, answers.similarities_QK
        floor_Q[which_Q] = answers.floor_Q
        return replace(self, ids_QK=ids_QK, similarities_QK=similarities_QK, floor_Q=floor_Q)


def unanswered(queries_QD: np.ndarray, askers: list[str]) -> Answers:
    """Queries of which nothing is known; `with_rows` of every row answers them."""
    shape = (len(queries_QD), KEPT)
    return Answers(
        queries_QD.astype(np.float32),
        tuple(askers),
        np.full(shape, None, dtype=object),
        np.full(shape, NOTHING, dtype=np.float32),
        np.full(len(queries_QD), NOTHING, dtype=np.float32),
    )
