"""Similarities to probabilities: a logistic curve per pair of modalities, fitted on held-out pairs.

Assumes: a matching pair and a random pair are equally likely before anything is compared, whatever a catalog's size:
so 0.5 says that the similarity is as frequent among matching pairs as among random ones. Curves rise: they change no
order. The file lies beside the encoder's spec and is no part of its fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations_with_replacement
from typing import cast

import numpy as np
from numpy.typing import NDArray

from conjoin.pipeline import metrics, storage
from conjoin.pipeline.errors import EncoderError, SourceError
from conjoin.pipeline.metrics import Floats
from conjoin.pipeline.ranking import Side

FILE = "calibration.json"
FEWEST_PAIRS = 50
_MOST_PAIRS = 20_000
_DRAWS = 8  # random pairs for each matching one
_SAME = 1 - 1e-6  # similarity of two values of one modality that are the same value
_STEPS, _CLOSE = 100, 1e-10


@dataclass(frozen=True, slots=True)
class Curve:
    """P(match | similarity s) = 1 / (1 + exp(-(slope s + bias))).

    error: expected calibration error, measured on pairs whose groups took no part in the fit.
    """

    slope: float
    bias: float
    num_pairs: int
    error: float

    def relevance(self, scores_N: Floats) -> Floats:
        """(N,) in 0..1."""
        return _logistic(self.slope * scores_N + self.bias)


@dataclass(frozen=True, slots=True)
class Pairs:
    """scores_P: similarities; matches_P: whether the two belong together; halves_P: 0 or 1, by group."""

    scores_P: Floats
    matches_P: NDArray[np.bool_]
    halves_P: NDArray[np.int64]


def pair_name(a: str, b: str) -> str:
    """`image_text`, whichever comes first; `image_image` for pictures against pictures."""
    return "_".join(sorted((a, b)))


def calibrate(sets: Mapping[str, Side]) -> dict[str, Curve]:
    """A curve for every pair of modalities that has enough matching pairs and tells them from random ones.

    Two values of one modality match where a group has several of them (variants of one product).
    """
    found = {}
    for a, b in combinations_with_replacement(sorted(sets), 2):
        pairs = draw(sets[a], sets[b], same=a == b)
        curve = fit(pairs) if int(pairs.matches_P.sum()) >= FEWEST_PAIRS else None
        if curve is not None:
            found[pair_name(a, b)] = curve
    return found


def draw(left: Side, right: Side, *, same: bool, seed: int = 0) -> Pairs:
    """One right answer drawn for each left value that has one, and _DRAWS random values of other groups."""
    rng = np.random.default_rng(seed)
    right, _ = right.ordered()
    left = right if same else left
    asked = np.arange(len(left))
    first, past = (np.searchsorted(right.groups_N, left.groups_N, side) for side in ("left", "right"))
    asked = asked[past - first > int(same)]
    if len(asked) > _MOST_PAIRS:
        asked = np.sort(rng.choice(asked, _MOST_PAIRS, replace=False))
    choices = past[asked] - first[asked]
    step = rng.integers(int(same), choices) if len(asked) else choices
    answers = first[asked] + ((asked - first[asked] if same else 0) + step) % choices
    scores = [_dots(left, asked, right, answers)]
    keep = [scores[0] < _SAME if same else np.ones(len(asked), bool)]
    for _ in range(_DRAWS):
        other = rng.integers(0, max(len(right), 1), len(asked))
        scores.append(_dots(left, asked, right, other))
        keep.append(left.groups_N[asked] != right.groups_N[other])
    matches = np.arange(len(scores)).repeat(len(asked)) == 0
    halves = np.tile(_halves(left.groups_N[asked], rng), len(scores))
    kept = np.concatenate(keep)
    return Pairs(np.concatenate(scores)[kept], matches[kept], halves[kept])


def _halves(groups_N: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    known, codes = np.unique(groups_N, return_inverse=True)
    return (rng.permutation(len(known)) % 2)[codes]


def _dots(left: Side, a_P: NDArray[np.int64], right: Side, b_P: NDArray[np.int64]) -> Floats:
    return np.einsum("pd,pd->p", left.vectors_ND[a_P], right.vectors_ND[b_P]).astype(np.float64)


def fit(pairs: Pairs) -> Curve | None:
    """The curve of all pairs; its error is of the halves, each by the other's curve. None where none rises."""
    line = logistic(pairs.scores_P, pairs.matches_P)
    if line is None:
        return None
    probabilities = np.zeros(len(pairs.scores_P))
    for half in (0, 1):
        inside = pairs.halves_P == half
        slope, bias = logistic(pairs.scores_P[~inside], pairs.matches_P[~inside]) or line
        probabilities[inside] = _logistic(slope * pairs.scores_P[inside] + bias)
    error = metrics.calibration_error(probabilities, pairs.matches_P, _weights(pairs.matches_P))
    return Curve(*line, int(pairs.matches_P.sum()), error)


def logistic(scores_N: Floats, matches_N: NDArray[np.bool_]) -> tuple[float, float] | None:
    """Slope and bias of greatest likelihood, both classes weighing the same; None unless the slope is positive.

    Platt 1999, with his softened targets, so that separable classes have a finite slope; by Newton's method.
    """
    num_right = int(matches_N.sum())
    if not 0 < num_right < len(matches_N) or float(scores_N.std()) == 0:
        return None
    mean, deviation = float(scores_N.mean()), float(scores_N.std())
    features_N2 = np.stack([(scores_N - mean) / deviation, np.ones(len(scores_N))], axis=1)
    targets_N = np.where(matches_N, (num_right + 1) / (num_right + 2), 1 / (len(matches_N) - num_right + 2))
    weights_N, line = _weights(matches_N), np.zeros(2)
    for _ in range(_STEPS):
        found_N = _logistic(features_N2 @ line)
        gradient = features_N2.T @ (weights_N * (found_N - targets_N))
        curvature = (features_N2 * (weights_N * found_N * (1 - found_N))[:, None]).T @ features_N2
        step = np.linalg.solve(curvature + 1e-9 * np.eye(2), gradient)
        line = line - step * min(1.0, 2.0 / float(np.abs(step).max() or 1.0))
        if float(np.abs(step).max()) < _CLOSE:
            break
    slope = float(line[0] / deviation)
    return (slope, float(line[1] - line[0] * mean / deviation)) if slope > 0 else None


def _weights(matches_N: NDArray[np.bool_]) -> Floats:
    """Each class weighs a half in all."""
    num_right = max(int(matches_N.sum()), 1)
    return np.where(matches_N, 0.5 / num_right, 0.5 / max(len(matches_N) - num_right, 1))


def _logistic(values_N: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(values_N / 2))  # never overflows


def keep(encoder: str, sets: Mapping[str, Side], rows: str) -> dict[str, Curve]:
    """Calibrate on held-out vectors and leave the curves beside the encoder; rows: which they are, in words.

    Raises SourceError where no pair of modalities can be calibrated.
    """
    from conjoin.pipeline.embedder import read_spec

    curves = calibrate(sets)
    if not curves:
        few = f"fewer than {FEWEST_PAIRS} matching pairs, or no more alike than random ones"
        advice = "Raise source.split in the run file, or name held-out rows with --where"
        raise SourceError(f"nothing to calibrate on: {few}", where=rows, next=advice)
    write(encoder, read_spec(encoder)[1], curves, rows)
    return curves


def write(encoder: str, fingerprint: str, curves: Mapping[str, Curve], rows: str) -> None:
    """Beside the encoder's spec, local or s3://."""
    pairs = {name: asdict(curve) for name, curve in sorted(curves.items())}
    storage.write_json(storage.join(encoder, FILE), {"fingerprint": fingerprint, "rows": rows, "pairs": pairs})


def read(encoder: str, fingerprint: str) -> dict[str, Curve]:
    """The curves of an encoder by pair_name; empty where it was never calibrated. Raises EncoderError."""
    path = storage.join(encoder, FILE)
    if not storage.exists(path):
        return {}
    stored = storage.read_json(path)
    if stored.get("fingerprint") != fingerprint:
        advice = "Run `conjoin evaluate --calibrate`"
        raise EncoderError("the calibration is of another encoder than the folder's", where=path, next=advice)
    try:
        rows = cast("dict[str, dict[str, float]]", stored["pairs"])
        return {
            name: Curve(float(row["slope"]), float(row["bias"]), int(row["num_pairs"]), float(row["error"]))
            for name, row in rows.items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EncoderError("not a calibration", where=path, next="Run `conjoin evaluate --calibrate`") from error
