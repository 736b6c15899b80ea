"""Memory of a row, counted from what autograd keeps, and the micro-batch that fits."""

from __future__ import annotations

import pytest
import torch

from conjoin.encoders.footprint import bytes_per_row, micro_batch_size
from conjoin.encoders.options import TowerOptions
from conjoin.encoders.towers import build_tower


def test_a_row_costs_at_least_its_pixels_and_first_maps() -> None:
    tower = build_tower("image", TowerOptions(size_px=32, width=8), 8)
    least = 4 * 3 * 32 * 32 + 4 * 8 * 16 * 16  # normalised pixels, what the stem gives
    assert least < bytes_per_row(tower) < 60 * least


def test_longer_texts_and_larger_pictures_cost_more() -> None:
    short, long = (build_tower("text", TowerOptions(width=32, max_tokens=n), 8, ["a"]) for n in (8, 32))
    small, large = (build_tower("image", TowerOptions(size_px=n, width=8), 8) for n in (16, 32))
    assert bytes_per_row(long) > 3 * bytes_per_row(short)
    assert bytes_per_row(large) > 3 * bytes_per_row(small)


def test_it_leaves_no_gradient_and_no_random_state_behind() -> None:
    tower = build_tower("image", TowerOptions(size_px=16, width=8), 8)
    state = torch.get_rng_state()
    bytes_per_row(tower)
    assert torch.get_rng_state().equal(state)
    assert all(parameter.grad is None for parameter in tower.parameters())


@pytest.mark.parametrize(
    ("per_row", "budget", "most", "rows"),
    [(10, 1000, 64, 64), (10, 1000, 100, 100), (10, 1000, 101, 64), (10, 5, 8, 1), (1, 1 << 40, 0, 1)],
)
def test_the_largest_power_of_two_that_fits_or_all(per_row: int, budget: int, most: int, rows: int) -> None:
    assert micro_batch_size(per_row, budget, most) == rows
