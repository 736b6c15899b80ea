from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conjoin.pipeline.order import Order, Weights, chunks, share

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def order(sizes: list[int], batch: int, seed: int = 0, window: int = 50) -> Order:
    return Order(np.repeat(np.arange(len(sizes)), sizes), batch, seed, window)


@given(SIZES, st.integers(2, 70), st.integers(0, 5))
def test_every_row_once_an_epoch(sizes: list[int], batch: int, epoch: int) -> None:
    plan = order(sizes, batch)
    steps = list(plan.steps(epoch))
    assert len(steps) == plan.steps_per_epoch
    assert [len(step) for step in steps[:-1]] == [batch] * (len(steps) - 1)
    assert sorted(np.concatenate(steps)) == list(range(sum(sizes)))


@given(st.integers(1, 500), st.integers(1, 9))
def test_ranks_share_a_batch_whatever_their_number(num: int, world: int) -> None:
    rows = np.random.default_rng(0).permutation(num)
    parts = [share(rows, rank, world) for rank in range(world)]
    assert sorted(np.concatenate(parts)) == list(range(num))
    assert max(map(len, parts)) - min(map(len, parts)) <= max(map(len, chunks(rows))) + world


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    sizes = [30] * 9
    assert np.array_equal(
        np.concatenate(list(order(sizes, 32).steps(1))), np.concatenate(list(order(sizes, 32).steps(1)))
    )
    assert not np.array_equal(
        np.concatenate(list(order(sizes, 32).steps(1))), np.concatenate(list(order(sizes, 32).steps(2)))
    )
    assert not np.array_equal(next(order(sizes, 32, seed=1).steps(0)), next(order(sizes, 32, seed=2).steps(0)))


@pytest.mark.parametrize("first", [0, 1, 5, 8])
def test_resume_is_a_step_number(first: int) -> None:
    plan = order([30] * 9, 32)
    whole = list(plan.steps(3))
    assert [step.tolist() for step in plan.steps(3, first)] == [step.tolist() for step in whole[first:]]


def test_a_window_holds_whole_row_groups() -> None:
    plan = order([10] * 8, 16, window=25)
    for window in plan.windows(0)[:-1]:
        groups = plan.row_group_N[window]
        assert len(set(groups.tolist())) == 3
        assert all((groups == group).sum() == 10 for group in set(groups.tolist()))


def test_without_weights_the_order_is_what_it_was_before_there_were_any() -> None:
    sizes = [30, 1, 17, 50, 8, 41, 12, 33, 25]
    rows = np.repeat(np.arange(9), sizes)
    for weights in (None, Weights((rows > 4).astype(np.int64), (1.0, 1.0))):
        steps = [step for epoch in range(3) for step in Order(rows, 32, 7, 60, weights).steps(epoch)]
        digest = hashlib.sha256(np.concatenate(steps).astype("<i8").tobytes()).hexdigest()
        assert digest.startswith("d39940450edc1f921c0d77cb5cbafc44")


WEIGHTS = st.floats(0.05, 4, allow_nan=False)


def mixed(sizes: list[int], weights: tuple[float, float], batch: int = 32, seed: int = 0) -> Order:
    """The first half of the row groups is part 0, the rest part 1."""
    plain = order(sizes, batch, seed)
    part_N = (plain.row_group_N >= len(sizes) / 2).astype(np.int64)
    return Order(plain.row_group_N, batch, seed, plain.window_rows, Weights(part_N, weights))


def seen(plan: Order, epochs: range) -> np.ndarray:
    """How often each row is seen."""
    steps = [step for epoch in epochs for step in plan.steps(epoch)]
    return np.bincount(np.concatenate(steps), minlength=len(plan.row_group_N))


@given(SIZES, WEIGHTS, WEIGHTS, st.integers(0, 4), st.integers(1, 4))
def test_rows_of_a_part_are_seen_alike_over_any_epochs(
    sizes: list[int], first: float, second: float, start: int, num: int
) -> None:
    plan = mixed(sizes, (first, second))
    assert plan.weights is not None
    counts = seen(plan, range(start, start + num))
    assert counts.sum() == num * plan.rows_per_epoch
    for part, quota in enumerate(plan.weights.quotas()):
        mine = counts[plan.weights.part_N == part]
        assert mine.sum() == num * quota
        assert not len(mine) or mine.max() - mine.min() <= 1


def test_a_weight_of_two_is_twice_and_a_half_every_other_epoch() -> None:
    plan = mixed([20, 21, 19, 20], (2.0, 0.5))
    assert plan.weights is not None
    part_N = plan.weights.part_N
    assert plan.rows_per_epoch == 82 + 20
    for epoch in range(3):
        assert seen(plan, range(epoch, epoch + 1))[part_N == 0].tolist() == [2] * 41
        assert len(list(plan.steps(epoch))) == plan.steps_per_epoch == 4
    one, other = seen(plan, range(1))[part_N == 1], seen(plan, range(1, 2))[part_N == 1]
    assert one.sum() == 20
    assert (one + other >= 1).all()
    assert not np.array_equal(one, seen(mixed([20, 21, 19, 20], (2.0, 0.5), seed=1), range(1))[part_N == 1])


def test_half_of_a_part_is_half_of_its_row_groups() -> None:
    plan = mixed([50] * 40, (1.0, 0.5))
    for epoch in range(2):
        rows = np.concatenate(list(plan.steps(epoch)))
        assert len(set(plan.row_group_N[rows].tolist())) == 20 + 10


def test_the_copies_of_a_row_lie_apart_and_parts_are_mixed() -> None:
    plan = mixed([50] * 40, (2.0, 1.0), batch=100)
    assert plan.weights is not None
    steps = list(plan.steps(0))
    halves = [np.concatenate(steps[: len(steps) // 2]), np.concatenate(steps[len(steps) // 2 :])]
    for half in halves:
        assert np.mean(np.bincount(half, minlength=2000)[plan.weights.part_N == 0] == 1) > 0.9
        assert 0.25 < np.mean(plan.weights.part_N[half] == 1) < 0.42


def test_weights_leave_the_rest_of_the_rules_as_they_are() -> None:
    plan = mixed([30, 17, 41, 12], (1.5, 0.4))
    whole = list(plan.steps(3))
    assert [step.tolist() for step in plan.steps(3, 2)] == [step.tolist() for step in whole[2:]]
    assert [plan.rows_of(3 * plan.steps_per_epoch + number) for number in range(len(whole))] == [*map(len, whole)]
    assert plan.draw(plan.steps_per_epoch + 1) == plan.steps_per_epoch + 1
    assert order([30], 8).draw(5) == 1
