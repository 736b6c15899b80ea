"""What goes wrong in joint training, told from a step's figures: pure functions.

Assumes: figures are those of pipeline/fit.py: step, total, loss, chance_loss, and per pair, tower or modality
`<pair>_scale`, `<modality>_grad_norm` and `<modality>_alike`.
"""

from __future__ import annotations

from collections.abc import Mapping

# Stuck at ln B is how a joint training fails most often: too high a rate, collapsed vectors.
_EARLY_STEPS, _EARLY_SHARE = 40, 0.2
_LARGEST_SCALE = 99.9
_ALIKE = 0.98


def symptom(figures: Mapping[str, float], loss: str = "infonce") -> str:
    """The worst thing to say of a training so far and what to try, in one sentence; empty if there is nothing."""
    if figures.get("step", 0) < max(_EARLY_STEPS, figures.get("total", 0) * _EARLY_SHARE):
        return ""
    return (
        _stuck(figures) or _unmoved(figures) or _collapsed(figures) or (_clamped(figures) if loss == "infonce" else "")
    )


def _stuck(figures: Mapping[str, float]) -> str:
    loss, chance = figures.get("loss", 0.0), figures.get("chance_loss", 0.0)
    if not 0.98 * chance < loss < 1.02 * chance:
        return ""
    return f"the loss is still {loss:.2f}, no better than guessing: lower train.lr"


def _unmoved(figures: Mapping[str, float]) -> str:
    for name, norm in _of("_grad_norm", figures).items():
        if norm == 0:
            return f"the {name} tower gets no gradient: is it in train.pairs, and do its records have a partner?"
    return ""


def _collapsed(figures: Mapping[str, float]) -> str:
    for name, alike in _of("_alike", figures).items():
        if alike > _ALIKE:
            return f"all vectors of {name} are nearly the same (mean cosine {alike:.2f}): lower train.lr"
    return ""


def _clamped(figures: Mapping[str, float]) -> str:
    for name, scale in _of("_scale", figures).items():
        if scale >= _LARGEST_SCALE:
            pair = name.replace("_", "-")
            return f"the scale of {pair} is at its limit of 100: pairs that are easily told apart, or an overfit"
    return ""


def _of(ending: str, figures: Mapping[str, float]) -> dict[str, float]:
    return {name.removesuffix(ending): value for name, value in figures.items() if name.endswith(ending)}
