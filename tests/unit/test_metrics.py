from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conjoin.pipeline import metrics

# The fixture of big_vision's retrieval evaluator (distances; rows are images, two texts each).
DISTANCES = np.array(
    [
        [0.8, 0.8, 0.1, 0.5, 0.1, 0.2, 0.5, 0.1],
        [0.5, 0.4, 0.0, 0.0, 0.4, 0.2, 0.6, 0.4],
        [0.5, 0.4, 0.1, 0.5, 0.0, 0.8, 0.8, 0.3],
        [0.5, 0.4, 0.1, 0.5, 0.4, 0.2, 0.3, 0.3],
    ]
)
DISTANCES_TO_IMAGES = DISTANCES.copy()
DISTANCES_TO_IMAGES[0, 6] = 0.1
OWNERS = np.array([0, 0, 1, 1, 2, 2, 3, 3])
RIGHT = np.arange(4)[:, None] == OWNERS[None]


@pytest.mark.parametrize(
    ("scores", "right", "expected"),
    [(-DISTANCES, RIGHT, (0.5, 0.75, 1.0)), (-DISTANCES_TO_IMAGES.T, RIGHT.T, (0.375, 1.0, 1.0))],
    ids=["image-to-text", "text-to-image"],
)
def test_hit_at_k_of_big_vision(scores: np.ndarray, right: np.ndarray, expected: tuple[float, ...]) -> None:
    found = metrics.places(scores, right)
    assert tuple(metrics.hit_at(found, k).mean() for k in (1, 5, 10)) == pytest.approx(expected)


def test_all_tied_earns_what_guessing_earns() -> None:
    found = metrics.places(np.zeros((10, 10)), np.eye(10, dtype=bool))
    assert metrics.hit_at(found, 1) == pytest.approx(np.full(10, 0.1))
    assert metrics.hit_at(found, 3) == pytest.approx(np.full(10, 0.3))
    assert metrics.rank(found) == pytest.approx(np.full(10, 5.5))


def test_ties_with_two_right_candidates() -> None:
    found = metrics.places(np.array([[1.0, 1.0, 1.0, 1.0]]), np.array([[True, True, False, False]]))
    assert metrics.hit_at(found, 2)[0] == pytest.approx(1 - 1 / 6)  # of 6 pairs one holds no right candidate
    assert metrics.rank(found)[0] == pytest.approx(5 / 3)


@given(st.integers(0, 2**31), st.integers(2, 12), st.integers(1, 4))
def test_hit_and_rank_equal_a_loop_over_sorted_scores(seed: int, num: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permutation(num * num).reshape(num, num).astype(float)  # no ties
    labels = rng.integers(0, groups, num)
    found = metrics.places(scores, labels[:, None] == labels[None])
    for query in range(num):
        order = np.argsort(-scores[query])
        first = next(i for i, candidate in enumerate(order) if labels[candidate] == labels[query])
        assert metrics.rank(found)[query] == first + 1
        assert [metrics.hit_at(found, k)[query] for k in (1, 2, 5)] == [float(first < k) for k in (1, 2, 5)]


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    queries, candidates, groups = rng.normal(size=(30, 4)), rng.normal(size=(40, 4)), rng.integers(0, 9, 40)
    whole = metrics.retrieval(queries, candidates, groups[:30], groups)
    monkeypatch.setattr(metrics, "_SCORES_AT_ONCE", 100)
    for left, right in zip(
        (whole.above_Q, whole.tied_Q, whole.right_Q),
        (parts := metrics.retrieval(queries, candidates, groups[:30], groups))
        and (parts.above_Q, parts.tied_Q, parts.right_Q),
        strict=True,
    ):
        assert left.tolist() == right.tolist()


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        metrics.places(np.array([[np.nan, 1.0]]), np.array([[True, False]]))
    with pytest.raises(ValueError, match="query 1 has no right"):
        metrics.places(np.zeros((2, 2)), np.array([[True, False], [False, False]]))


def test_the_bootstrap_interval_covers_and_is_fixed_by_its_seed() -> None:
    values = np.r_[np.ones(350), np.zeros(650)]
    found = metrics.bootstrap(values)
    assert found == metrics.bootstrap(values)
    assert found.value == pytest.approx(0.35)
    half = 1.96 * np.sqrt(0.35 * 0.65 / 1000)
    assert (found.low, found.high) == pytest.approx((0.35 - half, 0.35 + half), abs=0.006)


def test_chance_levels() -> None:
    assert metrics.chance(np.array([0, 0, 0, 1]), 5) == metrics.Chance(0.2, 0.75)
