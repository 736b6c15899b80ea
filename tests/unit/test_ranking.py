"""Ranking cut into shards: where the cuts lie, and when Ray is not needed."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from conjoin.pipeline import metrics
from conjoin.pipeline.ranking import Side, shards


@pytest.mark.parametrize("num_queries", [1, 255, 256, 257, 5000, 200_000])
@pytest.mark.parametrize("num_cpus", [1, 2, 64])
def test_shards_cover_the_queries_once_in_whole_blocks(num_queries: int, num_cpus: int) -> None:
    cuts = shards(num_queries, num_cpus)
    assert [row for cut in cuts for row in range(cut.start, cut.stop)] == list(range(num_queries))
    assert all(cut.start % metrics.QUERIES_AT_ONCE == 0 and cut.stop > cut.start for cut in cuts)
    assert len(cuts) <= 4 * num_cpus


def test_a_side_in_the_order_of_its_groups_knows_where_its_rows_were() -> None:
    side = Side(np.arange(8.0).reshape(4, 2), np.array([3, 1, 3, 0]))
    ordered, order = side.ordered()
    assert ordered.groups_N.tolist() == [0, 1, 3, 3]
    assert order.tolist() == [3, 1, 0, 2]
    assert ordered.vectors_ND.tolist() == side.vectors_ND[order].tolist()
    assert ordered.ordered()[0] is ordered


def test_little_is_ranked_without_ray() -> None:
    script = """
import sys
import numpy as np
from conjoin.pipeline.ranking import Side, ranked
side = Side(np.eye(50), np.arange(50))
assert ranked(side, side).above_Q.sum() == 0
assert "ray" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
