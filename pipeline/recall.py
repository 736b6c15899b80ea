"""How well and how fast a vector index answers, against exact answers that are kept; the cheapest setting that is good
enough.

Assumes: the answers are those of the version that is asked.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from conjoin.pipeline.answers import EQUAL, Answers, K
from conjoin.pipeline.measures import matrix

if TYPE_CHECKING:
    import lance

_REFINES = (2, 4, 8, 16, 32)
FEWEST_PROBES, FEWEST_REFINE = 2, _REFINES[0]


@dataclass(frozen=True, slots=True)
class Setting:
    """How a query uses a vector index: partitions to look at, candidates per wanted row.

    complete: every row is in it, so that all candidates come in one rough order; those of rows that are not would be
    compared by exact distances, which are another number (lancedb#3530).
    """

    nprobes: int
    refine: int
    num_partitions: int
    complete: bool = False


@dataclass(frozen=True, slots=True)
class Reached:
    """What a setting gives. recall: mean @10; worst: mean of the worst group of askers; bound: that less one standard
    error; latency_ms: median of one query."""

    setting: Setting
    recall: float
    worst: float
    bound: float
    latency_ms: float


def tune(dataset: lance.LanceDataset, column: str, answers: Answers, least: Setting, target: float) -> Reached | None:
    """The cheapest setting, from `least` up, whose bound reaches the target; None if none does."""
    partitions = least.num_partitions
    for refine in (refine for refine in _REFINES if refine >= least.refine):
        whole = reach(dataset, column, answers, Setting(partitions, refine, partitions))
        if whole.bound < target:
            continue
        probes = least.nprobes
        while probes < partitions:
            found = reach(dataset, column, answers, Setting(probes, refine, partitions))
            if found.bound >= target:
                return found
            probes = math.ceil(probes * 1.5)
        return whole
    return None


def reach(dataset: lance.LanceDataset, column: str, answers: Answers, setting: Setting) -> Reached:
    """Ask every query with one setting."""
    recalls, times = [], []
    for query_D, kth in zip(answers.queries_QD, answers.kth, strict=True):
        start = time.perf_counter()
        found = dataset.to_table(
            columns=[column, "_distance"],
            nearest={
                "column": column,
                "q": query_D,
                "k": K * setting.refine,
                "metric": "cosine",
                "minimum_nprobes": setting.nprobes,
                "maximum_nprobes": setting.nprobes,
                "refine_factor": 1,
            },
        )
        times.append(time.perf_counter() - start)
        similarities = matrix(found.column(0).combine_chunks()) @ query_D
        recalls.append(min(int((similarities >= kth - EQUAL).sum()), K) / K)
    groups = [recalls[group] for group in answers.groups]
    worst = min(float(np.mean(group)) for group in groups)
    bound = min(float(np.mean(group) - np.std(group) / math.sqrt(len(group))) for group in groups)
    return Reached(setting, float(np.mean(recalls)), worst, bound, float(np.median(times) * 1000))
