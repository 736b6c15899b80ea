"""Retrieval and zero-shot metrics: pure functions of scores; the suffixes are the legend of encoders/__init__.py.

Assumes: higher scores are better; what papers on CLIP call recall@k is hit@k here: the share of queries with at least
one right candidate among the first k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Counts = NDArray[np.int64]
# A tile of 256 x 4,096 float32 scores is 4 MB: it stays in the cache while it is compared and counted.
QUERIES_AT_ONCE, _CANDIDATES_AT_ONCE = 256, 4096
_SCORES_AT_ONCE = QUERIES_AT_ONCE * _CANDIDATES_AT_ONCE


@dataclass(frozen=True, slots=True)
class Places:
    """Where each query's best right candidate stands: (Q,) counts of candidates.

    above: scored higher than it; tied: scored the same, itself included; right: the right ones among the tied.
    Ties are broken at random, in expectation: a constant score earns what guessing earns.
    """

    above_Q: Counts
    tied_Q: Counts
    right_Q: Counts

    def __len__(self) -> int:
        return len(self.above_Q)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean or median over queries with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def places(scores_QN: Floats, right_QN: NDArray[np.bool_]) -> Places:
    """Raises ValueError for a query without a right candidate, or NaN scores."""
    if np.isnan(scores_QN).any():
        raise ValueError("scores hold NaN")
    if not right_QN.any(axis=1).all():
        raise ValueError(f"query {int((~right_QN.any(axis=1)).argmax())} has no right candidate")
    best_Q1 = np.where(right_QN, scores_QN, -np.inf).max(axis=1, keepdims=True)
    tied_QN = scores_QN == best_Q1
    return Places((scores_QN > best_Q1).sum(1), tied_QN.sum(1), (tied_QN & right_QN).sum(1))


def retrieval(queries_QD: Floats, candidates_ND: Floats, query_groups_Q: Counts, groups_N: Counts) -> Places:
    """Places of unit vectors by dot product; a candidate is right if its group is the query's.

    In tiles of at most QUERIES_AT_ONCE x 4,096 scores, whatever Q and N. Queries and candidates that come in the order
    of their groups are not copied; then any cut at a multiple of QUERIES_AT_ONCE gives the same counts, bit for bit.
    Raises ValueError for no queries, a query without a right candidate, or NaN.
    """
    _check_rankable(queries_QD, candidates_ND, query_groups_Q, groups_N)
    order_Q, order_N = group_order(query_groups_Q), group_order(groups_N)
    if order_Q is not None:
        queries_QD, query_groups_Q = queries_QD[order_Q], query_groups_Q[order_Q]
    if order_N is not None:
        candidates_ND, groups_N = candidates_ND[order_N], groups_N[order_N]
    counts_Q3 = np.zeros((len(queries_QD), 3), dtype=np.int64)
    for start in range(0, len(queries_QD), QUERIES_AT_ONCE):
        some = slice(start, start + QUERIES_AT_ONCE)
        block = _Block(queries_QD[some], query_groups_Q[some], candidates_ND, groups_N)
        counts_Q3[some if order_Q is None else order_Q[some]] = block.counts()
    return Places(*counts_Q3.T)


def group_order(groups_N: Counts) -> Counts | None:
    """The stable order that brings equal groups together, ascending; None if they are in it."""
    return None if (groups_N[:-1] <= groups_N[1:]).all() else np.argsort(groups_N, kind="stable")


def _check_rankable(queries_QD: Floats, candidates_ND: Floats, query_groups_Q: Counts, groups_N: Counts) -> None:
    if not len(queries_QD):
        raise ValueError("no queries")
    if np.isnan(queries_QD).any() or np.isnan(candidates_ND).any():
        raise ValueError("vectors hold NaN")
    lost_Q = ~np.isin(query_groups_Q, groups_N)
    if lost_Q.any():
        raise ValueError(f"query {int(lost_Q.argmax())} has no right candidate")


class _Block:
    """A block of queries against all candidates, both in the order of their groups, a tile of scores at a time.

    The tiles that hold right candidates are few, since equal groups lie together: they are scored once for the best
    right score, and again, to the same bits, when everything is counted against it.
    """

    def __init__(self, queries_QD: Floats, query_groups_Q: Counts, candidates_ND: Floats, groups_N: Counts) -> None:
        self._queries_QD, self._query_groups_Q1 = queries_QD, query_groups_Q[:, None]
        self._candidates_ND, self._groups_N = candidates_ND, groups_N
        self._first = int(np.searchsorted(groups_N, query_groups_Q[0], "left"))
        self._past = int(np.searchsorted(groups_N, query_groups_Q[-1], "right"))
        self._tiles = [slice(at, at + _CANDIDATES_AT_ONCE) for at in range(0, len(groups_N), _CANDIDATES_AT_ONCE)]
        kind = np.result_type(queries_QD, candidates_ND)
        self._room = np.empty(len(queries_QD) * min(_CANDIDATES_AT_ONCE, len(groups_N)), kind)

    def counts(self) -> Counts:
        """(Q, 3): above, tied, and the right ones among the tied."""
        num_queries = len(self._queries_QD)
        best_Q1 = np.full((num_queries, 1), -np.inf)
        for tile in filter(self._may_be_right, self._tiles):
            scores_QT = self._scores(tile)
            best_Q1 = np.maximum(best_Q1, scores_QT.max(1, where=self._right(tile), initial=-np.inf, keepdims=True))
        counts_Q3 = np.zeros((num_queries, 3), dtype=np.int64)
        best_Q1 = best_Q1.astype(self._room.dtype)
        for tile in self._tiles:
            scores_QT = self._scores(tile)
            tied_QT = scores_QT == best_Q1
            counts_Q3[:, 0] += _count(scores_QT > best_Q1)
            counts_Q3[:, 1] += _count(tied_QT)
            if self._may_be_right(tile):
                counts_Q3[:, 2] += _count(tied_QT & self._right(tile))
        return counts_Q3

    def _may_be_right(self, tile: slice) -> bool:
        return tile.start < self._past and tile.stop > self._first

    def _right(self, tile: slice) -> NDArray[np.bool_]:
        return self._query_groups_Q1 == self._groups_N[tile][None, :]

    def _scores(self, tile: slice) -> Floats:
        some_TD = self._candidates_ND[tile]
        shape = (len(self._queries_QD), len(some_TD))
        return np.matmul(self._queries_QD, some_TD.T, out=self._room[: shape[0] * shape[1]].reshape(shape))


def _count(which_QT: NDArray[np.bool_]) -> Counts:
    """Per row; five times as fast as numpy's own sum along an axis."""
    return np.array([np.count_nonzero(row_T) for row_T in which_QT], dtype=np.int64)


def hits(
    queries_QD: Floats, candidates_ND: Floats, query_groups_Q: Counts, groups_N: Counts, ks: Sequence[int] = (1, 5, 10)
) -> dict[int, Floats]:
    """hit@k of every query, {k: (Q,)}, by `retrieval`: its mean is the figure, and shards of queries concatenate."""
    found = retrieval(queries_QD, candidates_ND, query_groups_Q, groups_N)
    return {k: hit_at(found, k) for k in ks}


def hit_at(found: Places, k: int) -> Floats:
    """(Q,) probability that a right candidate is among the first k: 1 - C(t - r, m) / C(t, m) over m free slots."""
    free_Q = np.minimum(k - found.above_Q, found.tied_Q)
    wrong_Q = found.tied_Q - found.right_Q
    missed_Q = np.ones(len(found))
    for slot in range(int(free_Q.max(initial=0))):
        share_Q = (wrong_Q - slot) / np.maximum(found.tied_Q - slot, 1)
        missed_Q = np.where(slot < free_Q, missed_Q * np.maximum(share_Q, 0), missed_Q)
    return 1 - missed_Q


def rank(found: Places) -> Floats:
    """(Q,) expected rank of the best right candidate, from 1: the first of r among t tied is at (t + 1) / (r + 1)."""
    return found.above_Q + (found.tied_Q + 1) / (found.right_Q + 1)


def reciprocal_rank(found: Places) -> Floats:
    """(Q,) one over the expected rank; its mean is MRR."""
    return 1 / rank(found)


def bootstrap(values_Q: Floats, of: Callable[..., Floats] = np.mean, *, seed: int = 0, draws: int = 1000) -> Estimate:
    """`of` the values with its percentile interval over resampled queries (Efron 1979). `of` takes an axis."""
    if not len(values_Q):
        raise ValueError("no values")
    rng = np.random.default_rng(seed)
    block = max(1, (1 << 22) // len(values_Q))
    drawn = [
        of(values_Q[rng.integers(0, len(values_Q), (min(block, draws - i), len(values_Q)))], axis=1)
        for i in range(0, draws, block)
    ]
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    return Estimate(float(of(values_Q, axis=0)), float(low), float(high))


def nearest_class(vectors_ND: Floats, classes_CD: Floats) -> Counts:
    """(N,) the class of the highest dot product, the first of equals; in blocks of rows."""
    step = max(1, _SCORES_AT_ONCE // len(classes_CD))
    blocks = [(vectors_ND[at : at + step] @ classes_CD.T).argmax(axis=1) for at in range(0, len(vectors_ND), step)]
    return np.concatenate([np.zeros(0, dtype=np.int64), *blocks])


@dataclass(frozen=True, slots=True)
class Chance:
    """What guessing earns: one class at random, or always the most frequent one."""

    uniform: float
    majority: float


def chance(labels_N: NDArray[np.int64], num_classes: int) -> Chance:
    """Accuracy of both ways of guessing on these labels."""
    return Chance(1 / num_classes, float(np.bincount(labels_N).max() / len(labels_N)))


def calibration_error(
    probabilities_N: Floats, outcomes_N: NDArray[np.bool_], weights_N: Floats | None = None, bins: int = 15
) -> float:
    """Expected calibration error (Guo et al. 2017): mean distance of probability and frequency over equal bins."""
    weights_N = np.ones(len(probabilities_N)) if weights_N is None else weights_N
    places_N = np.clip((probabilities_N * bins).astype(np.int64), 0, bins - 1)
    sums_B = np.bincount(places_N, weights_N * (probabilities_N - outcomes_N), minlength=bins)
    return float(np.abs(sums_B).sum() / weights_N.sum())
