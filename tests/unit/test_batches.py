"""Batches: every value once, longest first, each within its budget."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conjoin.encoders.checkpoint import load
from conjoin.encoders.joint import JointEncoder
from conjoin.pipeline import batches as module
from conjoin.pipeline.batches import Batch, batches, cut


@pytest.fixture(scope="module")
def encoder(small_encoder: Path) -> JointEncoder:
    return load(small_encoder)


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 200))
def test_a_cut_holds_every_position_once_within_the_budget(lengths: list[int], budget: int) -> None:
    found = cut(np.array(lengths, dtype=np.int64), budget)
    flat = [int(row) for rows in found for row in rows]
    assert sorted(flat) == list(range(len(lengths)))
    assert flat == sorted(flat, key=lambda row: -lengths[row])
    for rows in found:
        assert len(rows) == 1 or len(rows) * max(1, max(lengths[row] for row in rows)) <= budget


def test_a_cut_has_a_limit_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 3)
    assert [len(rows) for rows in cut(np.zeros(7, np.int64), 10**9)] == [3, 3, 1]


def test_texts_are_padded_to_their_batch_only(encoder: JointEncoder) -> None:
    texts = ["a", "red apple on a blue car", "cat", "b", "a cat on a mat " * 9]
    made = list(batches(encoder.tower("text"), texts, 32))
    assert sorted(int(row) for batch in made for row in batch.rows) == [0, 1, 2, 3, 4]
    assert int(made[0].rows[0]) == 4
    assert made[0].inputs["input_ids"].shape[1] == 16  # max_tokens
    for batch in made:
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
        assert ids.shape == mask.shape
        assert bool(mask.any(0).all())
        assert ids.numel() <= 32
        for row, position in enumerate(batch.rows):
            alone = encoder.tower("text").collate([texts[position]])["input_ids"][0]
            assert ids[row][mask[row].bool()].tolist() == alone.tolist()


def test_windows_of_texts_lose_nothing(encoder: JointEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 4)
    texts = ["word " * (n % 5 + 1) for n in range(11)]
    made = list(batches(encoder.tower("text"), texts, 10**6))
    assert sorted(int(row) for batch in made for row in batch.rows) == list(range(11))


def test_pictures_and_sounds_fill_their_budget(encoder: JointEncoder) -> None:
    pixels = [np.full((16, 16, 3), n, np.uint8) for n in range(5)]
    pictures = list(batches(encoder.tower("image"), pixels, 2 * 16**2))
    assert [batch.rows.tolist() for batch in pictures] == [[0, 1], [2, 3], [4]]
    assert [int(value) for batch in pictures for value in batch.inputs["pixels"][:, 0, 0, 0]] == [0, 1, 2, 3, 4]
    waves = [np.ones(size, np.float32) for size in (100, 900, 300)]
    sounds = list(batches(encoder.tower("audio"), waves, 1_000))
    assert [batch.rows.tolist() for batch in sounds] == [[1], [2, 0]]
    assert sounds[1].inputs["num_samples"].tolist() == [300, 100]


def test_no_values_make_no_batch(encoder: JointEncoder) -> None:
    for name in ("text", "image", "audio"):
        assert list(batches(encoder.tower(name), [], 100)) == []


def test_halves_are_the_whole(encoder: JointEncoder) -> None:
    whole = next(batches(encoder.tower("text"), ["a", "b", "c"], 10**6))
    first, second = whole.halves()
    assert isinstance(first, Batch)
    assert np.concatenate([first.rows, second.rows]).tolist() == whole.rows.tolist()
    assert [len(part.inputs["input_ids"]) for part in (first, second)] == [1, 2]
