from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conjoin.pipeline.order import Order, chunks, share

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
