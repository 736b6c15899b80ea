"""Features of frozen towers: which content a record is trained on."""

from __future__ import annotations

import numpy as np

from conjoin.pipeline.features import Features, draw_item, items_of

# records: one content, none, a list of three, one content
KEPT = Features(np.zeros((4, 2), np.float32), np.array([0, 1, 2, 3, 1]), np.array([0, 1, 1, 4, 5]))
ROWS = np.arange(4)


def test_without_a_draw_the_first_content_stands_for_a_record() -> None:
    assert KEPT.pick(ROWS, None).tolist() == [0, -1, 1, 1]
    assert KEPT.pick(np.array([1, 0]), None, offset=2).tolist() == [1, 1]


def test_a_draw_takes_one_of_a_list_by_seed_and_epoch() -> None:
    drawn = [KEPT.pick(ROWS, (0, epoch)).tolist() for epoch in range(40)]
    assert {picked[2] for picked in drawn} == {1, 2, 3}
    assert all(picked[:2] == [0, -1] and picked[3] == 1 for picked in drawn)
    assert drawn == [KEPT.pick(ROWS, (0, epoch)).tolist() for epoch in range(40)]
    assert drawn != [KEPT.pick(ROWS, (1, epoch)).tolist() for epoch in range(40)]
    assert KEPT.pick(ROWS[::-1], (0, 5)).tolist() == drawn[5][::-1]


def test_a_record_whose_list_ends_the_table_is_not_read_beyond() -> None:
    kept = Features(np.zeros((1, 2), np.float32), np.array([0]), np.array([0, 1, 1]))
    assert kept.pick(np.array([1, 0]), None).tolist() == [-1, 0]


def test_the_items_of_a_value() -> None:
    assert items_of(None) == items_of([]) == items_of([None]) == []
    assert items_of("a") == items_of(["a", None]) == ["a"]
    assert 0 <= draw_item((0, 1), 2, 3) < 3
