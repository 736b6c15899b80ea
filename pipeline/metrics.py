"""Retrieval and zero-shot metrics: pure functions of scores; the suffixes are the legend of encoders/__init__.py.

Assumes: higher scores are better; what papers on CLIP call recall@k is hit@k here: the share of queries with at least
one right candidate among the first k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Counts = NDArray[np.int64]
_SCORES_AT_ONCE = 1 << 25  # 128 MB of float32: a block of queries against all candidates, never Q x N


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


def retrieval(
    queries_QD: Floats, candidates_ND: Floats, query_groups_Q: NDArray[np.int64], groups_N: NDArray[np.int64]
) -> Places:
    """Places of unit vectors by dot product; a candidate is right if its group is the query's. In blocks of queries."""
    step = max(1, _SCORES_AT_ONCE // max(1, len(candidates_ND)))
    blocks = [
        places(queries_QD[i : i + step] @ candidates_ND.T, query_groups_Q[i : i + step, None] == groups_N[None, :])
        for i in range(0, len(queries_QD), step)
    ]
    if not blocks:
        raise ValueError("no queries")
    return Places(
        np.concatenate([block.above_Q for block in blocks]),
        np.concatenate([block.tied_Q for block in blocks]),
        np.concatenate([block.right_Q for block in blocks]),
    )


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


def top_class(scores_NC: Floats) -> Counts:
    """(N,) the class of the highest score; the first of equals."""
    return scores_NC.argmax(axis=1)


@dataclass(frozen=True, slots=True)
class Chance:
    """What guessing earns: one class at random, or always the most frequent one."""

    uniform: float
    majority: float


def chance(labels_N: NDArray[np.int64], num_classes: int) -> Chance:
    """Accuracy of both ways of guessing on these labels."""
    return Chance(1 / num_classes, float(np.bincount(labels_N).max() / len(labels_N)))
