"""Retrieval over many vectors, ranked by Ray tasks where there is much to do and here where there is not.

Assumes: candidates fit into the memory of one machine, scores never do. Queries are cut at whole blocks of
metrics.retrieval, so that every cut gives the same counts on like processors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from conjoin.pipeline import metrics
from conjoin.pipeline.metrics import Counts, Floats, Places
from conjoin.pipeline.progress import Progress, ShowProgress, silent

if TYPE_CHECKING:
    import ray

# About ten seconds of one core at 64 dimensions; for less, starting Ray would cost more than it gives.
SHARDED_SCORES = 1 << 32
_SHARDS_PER_CPU = 4


@dataclass(frozen=True, slots=True)
class Side:
    """Queries or candidates: unit vectors_ND; groups_N: codes, equal where one is a right answer to the other."""

    vectors_ND: Floats
    groups_N: Counts

    def __len__(self) -> int:
        return len(self.vectors_ND)

    def cut(self, rows: slice) -> Side:
        return Side(self.vectors_ND[rows], self.groups_N[rows])

    def ordered(self) -> tuple[Side, Counts]:
        """In the order of the groups, and where each row was."""
        order_N = metrics.group_order(self.groups_N)
        if order_N is None:
            return self, np.arange(len(self))
        return Side(self.vectors_ND[order_N], self.groups_N[order_N]), order_N


def ranked(queries: Side, candidates: Side, *, address: str | None = None, progress: ShowProgress = silent) -> Places:
    """metrics.retrieval, on every CPU of the cluster at `address` (default: of this machine) when Q x N is large.

    Raises ValueError as metrics.retrieval does, ConjoinError when a worker died.
    """
    if len(queries) * len(candidates) < SHARDED_SCORES:
        return metrics.retrieval(queries.vectors_ND, candidates.vectors_ND, queries.groups_N, candidates.groups_N)
    from conjoin.pipeline import workers

    workers.start(address)
    import ray

    (queries, order_Q), (candidates, _) = queries.ordered(), candidates.ordered()
    rank = ray.remote(num_cpus=1, max_retries=3)(_rank)
    kept = ray.put(candidates)
    cuts = shards(len(queries), workers.num_cpus())
    waiting = {rank.remote(queries.cut(rows), kept): rows for rows in cuts}
    counts_Q3 = np.zeros((len(queries), 3), dtype=np.int64)
    done = 0
    try:
        for rows, found in _finished(waiting):
            counts_Q3[order_Q[rows]] = np.stack([found.above_Q, found.tied_Q, found.right_Q], axis=1)
            done += len(found)
            progress(Progress("rank", done, len(queries), "queries"))
    except ray.exceptions.RayError as error:
        raise workers.failure(error, "a ranking worker died", next="Give the machine more memory") from error
    finally:
        for unfinished in waiting:
            ray.cancel(unfinished)
    return Places(*counts_Q3.T)


def _finished(waiting: dict[ray.ObjectRef, slice]) -> Iterator[tuple[slice, Places]]:
    """Rows and their places as tasks end; each leaves `waiting`."""
    import ray

    while waiting:
        ended, _ = ray.wait(list(waiting), num_returns=1)
        yield waiting.pop(ended[0]), ray.get(ended[0])


def shards(num_queries: int, num_cpus: int) -> list[slice]:
    """Cuts at multiples of metrics.QUERIES_AT_ONCE, a few for each CPU, so that none waits long for the slowest."""
    num_blocks = -(-num_queries // metrics.QUERIES_AT_ONCE)
    wanted = min(num_blocks, num_cpus * _SHARDS_PER_CPU)
    bounds = [num_blocks * number // wanted * metrics.QUERIES_AT_ONCE for number in range(wanted + 1)]
    return [slice(a, min(b, num_queries)) for a, b in pairwise(bounds)]


def _rank(queries: Side, candidates: Side) -> Places:
    return metrics.retrieval(queries.vectors_ND, candidates.vectors_ND, queries.groups_N, candidates.groups_N)
