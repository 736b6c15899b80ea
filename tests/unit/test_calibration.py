"""Curves from similarities to probabilities: against a plain search, on data whose curve is known, and on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conjoin.pipeline import calibration, metrics
from conjoin.pipeline.calibration import Curve, Pairs
from conjoin.pipeline.errors import EncoderError
from conjoin.pipeline.ranking import Side


def drawn(slope: float, bias: float, num: int = 40_000, seed: int = 0) -> Pairs:
    """Pairs of which the curve tells how many match; both classes about equally many."""
    rng = np.random.default_rng(seed)
    scores = rng.uniform(-0.2, 0.8, num)
    matches = rng.random(num) < Curve(slope, bias, 0, 0).relevance(scores)
    return Pairs(scores, matches, rng.integers(0, 2, num))


def side(num_groups: int, each: int, noise: float, seed: int) -> Side:
    """Unit vectors around one centre per group; the centres are the same for every seed."""
    centres = np.random.default_rng(99).normal(size=(num_groups, 16)).repeat(each, axis=0)
    found = centres + noise * np.random.default_rng(seed).normal(size=centres.shape)
    groups = np.random.default_rng(7).permutation(num_groups).repeat(each)
    return Side((found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32), groups)


def test_the_line_is_the_likeliest_one() -> None:
    rng = np.random.default_rng(1)
    scores, matches = rng.normal(size=60), rng.random(60) < 0.4
    scores = scores + matches
    right, wrong = int(matches.sum()), int((~matches).sum())

    def loss(slope: float, bias: float) -> float:
        total = 0.0
        for score, match in zip(scores, matches, strict=True):
            target = (right + 1) / (right + 2) if match else 1 / (wrong + 2)
            p = 1 / (1 + np.exp(-(slope * score + bias)))
            total -= (target * np.log(p) + (1 - target) * np.log(1 - p)) / (right if match else wrong)
        return total

    line = calibration.logistic(scores, matches)
    assert line is not None
    for step in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert loss(*line) < loss(line[0] + step[0], line[1] + step[1])


@pytest.mark.parametrize(("slope", "bias"), [(20.0, -6.0), (100.0, -30.0), (5.0, -1.5)])
def test_a_known_curve_is_found_again(slope: float, bias: float) -> None:
    pairs = drawn(slope, bias)
    curve = calibration.fit(pairs)
    assert curve is not None
    odds = np.log(pairs.matches_P.mean() / (1 - pairs.matches_P.mean()))  # what even weights take off
    assert curve.slope == pytest.approx(slope, rel=0.1)
    assert curve.bias + odds == pytest.approx(bias, rel=0.1, abs=0.2)
    assert curve.error < 0.01


def test_the_error_is_that_of_probabilities_and_frequencies() -> None:
    probabilities = np.array([0.1, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9])
    outcomes = np.array([0, 0, 0, 1, 1, 1, 1, 0], bool)
    assert metrics.calibration_error(probabilities, outcomes) == pytest.approx(0.15)
    assert metrics.calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0.0
    weights = np.array([1, 1, 1, 3, 1, 1, 1, 1.0])
    assert metrics.calibration_error(probabilities, outcomes, weights) == pytest.approx((0.4 * 6 + 0.15 * 4) / 10)


def test_separable_pairs_have_a_finite_curve() -> None:
    scores = np.concatenate([np.full(100, 0.9), np.full(100, 0.1)])
    line = calibration.logistic(scores, scores > 0.5)
    assert line is not None
    assert 5 < line[0] < 50
    assert Curve(*line, 0, 0).relevance(np.array([0.1, 0.5, 0.9])) == pytest.approx([0.01, 0.5, 0.99], abs=0.01)


@pytest.mark.parametrize(
    ("scores", "matches"),
    [([0.5, 0.5, 0.5], [1, 0, 1]), ([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0]), ([0.1, 0.2], [1, 1])],
    ids=["equal", "falling", "one class"],
)
def test_what_tells_nothing_gives_no_curve(scores: list[float], matches: list[int]) -> None:
    assert calibration.logistic(np.array(scores), np.array(matches, bool)) is None


def test_pairs_match_within_groups_only() -> None:
    left, right = side(80, 1, 0.2, 1), side(80, 3, 0.2, 2)
    pairs = calibration.draw(left, right, same=False)
    assert int(pairs.matches_P.sum()) == 80
    assert pairs.scores_P[pairs.matches_P].min() > 0.5 > np.quantile(pairs.scores_P[~pairs.matches_P], 0.9)


def test_a_value_is_not_its_own_match() -> None:
    alone, several = side(80, 1, 0.2, 1), side(80, 3, 0.2, 2)
    assert not calibration.draw(alone, alone, same=True).matches_P.any()
    pairs = calibration.draw(several, several, same=True)
    assert int(pairs.matches_P.sum()) == 240
    assert pairs.scores_P.max() < 1 - 1e-6
    twins = Side(several.vectors_ND[::3].repeat(3, axis=0), several.groups_N)
    assert not calibration.draw(twins, twins, same=True).matches_P.any()


def test_every_pair_of_modalities_that_can_be() -> None:
    sets = {"text": side(80, 1, 0.3, 1), "image": side(80, 2, 0.3, 2), "audio": side(10, 1, 0.3, 3)}
    curves = calibration.calibrate(sets)
    assert sorted(curves) == ["image_image", "image_text"]
    assert calibration.calibrate(sets) == curves
    low, high = curves["image_text"].relevance(np.array([0.0, 0.9]))
    assert low < 0.1 < 0.9 < high


def test_it_is_kept_beside_the_encoder_and_changes_no_fingerprint(tiny_encoder: Path, tmp_path: Path) -> None:
    import shutil

    from conjoin.pipeline.embedder import load, read_spec

    folder = shutil.copytree(tiny_encoder, tmp_path / "encoder")
    fingerprint = read_spec(folder)[1]
    assert calibration.read(str(folder), fingerprint) == {}
    curves = {"image_text": Curve(31.25, -9.5, 1234, 0.0125)}
    calibration.write(str(folder), fingerprint, curves, "made up")
    assert calibration.read(str(folder), fingerprint) == curves
    assert load(folder).fingerprint == fingerprint
    with pytest.raises(EncoderError, match="of another encoder"):
        calibration.read(str(folder), "f" * 32)


@pytest.mark.parametrize("text", ['{"fingerprint": "a"}', '{"fingerprint": "a", "pairs": {"x": 1}}'])
def test_a_torn_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(EncoderError, match=r"not a calibration.*--calibrate"):
        calibration.read(str(tmp_path), "a")
