from __future__ import annotations

import tracemalloc

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


# Its other matrix: everyone's right ones are the nearest.
PERFECT = np.array(
    [
        [0.0, 0.0, 0.1, 0.5, 0.1, 0.2, 0.5, 0.1],
        [0.5, 0.4, 0.0, 0.0, 0.4, 0.2, 0.6, 0.4],
        [0.5, 0.4, 0.1, 0.5, 0.0, 0.0, 0.8, 0.3],
        [0.5, 0.4, 0.1, 0.5, 0.3, 0.2, 0.0, 0.0],
    ]
)


@pytest.mark.parametrize(
    ("scores", "right", "expected"),
    [
        (-DISTANCES, RIGHT, (0.5, 0.75, 1.0)),
        (-DISTANCES_TO_IMAGES.T, RIGHT.T, (0.375, 1.0, 1.0)),
        (-PERFECT, RIGHT, (1.0, 1.0, 1.0)),
        (-PERFECT.T, RIGHT.T, (1.0, 1.0, 1.0)),
    ],
    ids=["image-to-text", "text-to-image", "perfect-image-to-text", "perfect-text-to-image"],
)
def test_hit_at_k_of_big_vision(scores: np.ndarray, right: np.ndarray, expected: tuple[float, ...]) -> None:
    found = metrics.places(scores, right)
    assert tuple(metrics.hit_at(found, k).mean() for k in (1, 5, 10)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "owners", "expected"),
    [
        (-DISTANCES, (np.arange(4), OWNERS), (0.5, 0.75, 1.0)),
        (-DISTANCES_TO_IMAGES.T, (OWNERS, np.arange(4)), (0.375, 1, 1)),
    ],
    ids=["image-to-text", "text-to-image"],
)
def test_hits_of_vectors_on_big_visions_fixture(
    scores: np.ndarray, owners: tuple[np.ndarray, np.ndarray], expected: tuple[float, ...]
) -> None:
    found = metrics.hits(scores, np.eye(scores.shape[1]), *owners)  # products with the axes are the scores
    assert tuple(found[k].mean() for k in (1, 5, 10)) == pytest.approx(expected)


def test_all_tied_earns_what_guessing_earns() -> None:
    found = metrics.places(np.zeros((10, 10)), np.eye(10, dtype=bool))
    assert metrics.hit_at(found, 1) == pytest.approx(np.full(10, 0.1))
    assert metrics.hit_at(found, 3) == pytest.approx(np.full(10, 0.3))
    assert metrics.rank(found) == pytest.approx(np.full(10, 5.5))


@pytest.mark.parametrize("num", [10, 1003, 4999])
def test_a_collapsed_encoder_earns_what_guessing_earns(num: int) -> None:
    """Equal vectors, whose products no edge of a tile may round otherwise."""
    vector = np.random.default_rng(0).normal(size=37).astype(np.float32)
    same, ids = np.tile(vector / np.linalg.norm(vector), (num, 1)), np.arange(num)
    found = metrics.hits(same[:10], same, ids[:10], ids, (1, 5))
    assert found[1] == pytest.approx(np.full(10, 1 / num))
    assert found[5] == pytest.approx(np.full(10, 5 / num))


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


def as_lists(found: metrics.Places) -> list[list[int]]:
    return [found.above_Q.tolist(), found.tied_Q.tolist(), found.right_Q.tolist()]


def coarse(seed: int, num_queries: int, num_candidates: int, groups: int) -> tuple[np.ndarray, ...]:
    """Small whole numbers, whose products are exact and often equal; every query has a right candidate."""
    rng = np.random.default_rng(seed)
    queries, candidates = (rng.integers(-2, 3, (num, 5)).astype(np.float32) for num in (num_queries, num_candidates))
    groups_N = rng.integers(0, groups, num_candidates)
    return queries, candidates, rng.choice(groups_N, num_queries), groups_N


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 60), st.integers(1, 9), st.integers(1, 9))
def test_tiles_of_any_size_count_what_the_whole_matrix_counts(
    seed: int, num_queries: int, num_candidates: int, rows: int, columns: int
) -> None:
    queries, candidates, query_groups, groups = coarse(seed, num_queries, num_candidates, 7)
    whole = metrics.places(queries @ candidates.T, query_groups[:, None] == groups[None])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "QUERIES_AT_ONCE", rows)
        patch.setattr(metrics, "_CANDIDATES_AT_ONCE", columns)
        assert as_lists(metrics.retrieval(queries, candidates, query_groups, groups)) == as_lists(whole)


def test_no_tile_of_scores_is_larger_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 million scores: the largest tile asked for, and the peak of memory, stay those of one tile."""
    asked: list[tuple[int, ...]] = []
    scores_of = metrics._Block._scores

    def watched(self: metrics._Block, tile: slice) -> np.ndarray:
        scores = scores_of(self, tile)
        asked.append(scores.shape)
        return scores

    monkeypatch.setattr(metrics._Block, "_scores", watched)
    monkeypatch.setattr(metrics, "QUERIES_AT_ONCE", 64)
    monkeypatch.setattr(metrics, "_CANDIDATES_AT_ONCE", 256)
    inputs = coarse(0, 3000, 3000, 1000)
    tracemalloc.start()
    metrics.retrieval(*inputs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(rows for rows, _ in asked) == 64
    assert max(columns for _, columns in asked) == 256
    assert sum(rows * columns for rows, columns in asked) < 1.5 * 3000 * 3000
    assert peak < 1 << 20  # the matrix would be 36 MB


def test_sorted_inputs_are_not_copied_and_cuts_at_blocks_are_exact() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(900, 6)).astype(np.float32)
    groups = np.sort(rng.integers(0, 300, 900))
    assert metrics.group_order(groups) is None
    whole = metrics.retrieval(vectors, vectors[::-1].copy(), groups, groups[::-1].copy())
    cut = [
        metrics.retrieval(vectors[at : at + 256], vectors[::-1].copy(), groups[at : at + 256], groups[::-1].copy())
        for at in range(0, 900, 256)
    ]
    assert as_lists(whole) == [[count for part in cut for count in as_lists(part)[n]] for n in range(3)]


def test_hits_of_shards_are_the_hits_of_the_whole() -> None:
    queries, candidates, query_groups, groups = coarse(1, 50, 70, 9)
    whole = metrics.hits(queries, candidates, query_groups, groups)
    assert set(whole) == {1, 5, 10}
    for k, expected in whole.items():
        shards = [metrics.hits(queries[n::3], candidates, query_groups[n::3], groups, (k,))[k] for n in range(3)]
        assert np.mean(np.concatenate(shards)) == pytest.approx(expected.mean())
        assert shards[1].tolist() == expected[1::3].tolist()


def test_the_nearest_class_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors, classes = rng.normal(size=(50, 4)), rng.normal(size=(7, 4))
    expected = (vectors @ classes.T).argmax(1)
    monkeypatch.setattr(metrics, "_SCORES_AT_ONCE", 20)
    assert metrics.nearest_class(vectors, classes).tolist() == expected.tolist()
    assert metrics.nearest_class(vectors[:0], classes).shape == (0,)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        metrics.places(np.array([[np.nan, 1.0]]), np.array([[True, False]]))
    with pytest.raises(ValueError, match="query 1 has no right"):
        metrics.places(np.zeros((2, 2)), np.array([[True, False], [False, False]]))
    two = np.eye(2)
    with pytest.raises(ValueError, match="NaN"):
        metrics.retrieval(two, two * np.nan, np.arange(2), np.arange(2))
    with pytest.raises(ValueError, match="query 1 has no right"):
        metrics.retrieval(two, two, np.array([0, 5]), np.arange(2))
    with pytest.raises(ValueError, match="no queries"):
        metrics.retrieval(two[:0], two, np.arange(0), np.arange(2))


def test_the_bootstrap_interval_covers_and_is_fixed_by_its_seed() -> None:
    values = np.r_[np.ones(350), np.zeros(650)]
    found = metrics.bootstrap(values)
    assert found == metrics.bootstrap(values)
    assert found.value == pytest.approx(0.35)
    half = 1.96 * np.sqrt(0.35 * 0.65 / 1000)
    assert (found.low, found.high) == pytest.approx((0.35 - half, 0.35 + half), abs=0.006)


def test_chance_levels() -> None:
    assert metrics.chance(np.array([0, 0, 0, 1]), 5) == metrics.Chance(0.2, 0.75)
