"""How parameters move: AdamW's groups, the rate of a step, the moving average, and when to stop.

Assumes: pure functions of the recipe, the step and the log, so that a resumed run, on any rank, decides the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

from conjoin.encoders import sharded, tuning

if TYPE_CHECKING:
    from conjoin.encoders.joint import JointEncoder
    from conjoin.pipeline.recipe import TrainConfig

# Position, class and mask embeddings and the probe of attention pooling are more than vectors in shape only.
_UNDECAYED = re.compile(r"position|pos_emb|relative_|(cls|class|mask|distillation|register)_(token|emb)|probe|bias")


def parameter_groups(encoder: JointEncoder, recipe: TrainConfig) -> list[dict[str, Any]]:
    """AdamW's groups of what learns; a step's rate is `recipe.lr * rate(...) * group["lr_factor"]`.

    No weight decay on biases, norms, scales, positions. Layer-wise decay as in BEiT (Bao et al. 2021,
    arXiv:2106.08254): a block's factor is layer_decay times the next one's; what follows the blocks has factor 1.
    """
    factors = _lr_factors(encoder, recipe)
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim >= 2 and not _UNDECAYED.search(name)
            key = (factors.get(name, 1.0), recipe.weight_decay if decayed else 0.0)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "lr": recipe.lr * factor, "lr_factor": factor, "weight_decay": decay}
        for (factor, decay), params in groups.items()
    ]


def _lr_factors(encoder: JointEncoder, recipe: TrainConfig) -> dict[str, float]:
    found = {}
    for modality in encoder.spec.towers:
        backbone, decay = encoder.tower(modality).backbone, recipe.tower(modality).layer_decay
        top = len(tuning.blocks(backbone)) + 1
        for name, depth in tuning.depths(backbone).items():
            found[f"towers.{modality}.backbone.{name}"] = decay ** (top - depth)
    return found


def rate(step: int, total: int, recipe: TrainConfig) -> float:
    """The share of the peak rate at a step, from 0 to total - 1: linear warm-up, then the recipe's schedule.

    wsd: the last steps cool down by 1 - sqrt, the best of the shapes in Haegele et al. 2024, arXiv:2405.18392.
    """
    warm = max(1, round(recipe.warmup * total))
    if step < warm:
        return (step + 1) / warm
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
    cooling = max(1, round(recipe.cooldown * total))
    if recipe.schedule == "wsd" and step > total - cooling:
        return 1 - math.sqrt((step - (total - cooling)) / cooling)
    return 1.0


class Ema:
    """An exponential moving average of parameters by name, on their device and spread over ranks as they are."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = dict(parameters), decay
        self._averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def update_(self, step: int) -> None:
        """Take in the parameters after so many steps; early on the average follows them closely."""
        decay = min(self._decay, (1 + step) / (10 + step))
        averages = [sharded.local(average) for average in self._averages.values()]
        current = [sharded.local(parameter.detach()) for parameter in self._parameters.values()]
        take_in = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch has no types here
        take_in(averages, current, step)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The parameters are the averages in here, exactly themselves afterwards; the optimizer must not step."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # in place, one at a time: FSDP2 and compiled code keep the storage that they saw first
        for name, parameter in self._parameters.items():
            average = self._averages[name]
            before = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(before)

    def state(self) -> dict[str, torch.Tensor]:
        """The averages by name, for a checkpoint; not while swapped."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on from a checkpoint's averages, whole tensors. Raises KeyError for a name that it lacks."""
        for name, average in self._averages.items():
            average.copy_(sharded.like(tensors[name], average))


def scores(log: Iterable[Mapping[str, float]]) -> list[float]:
    """The mean hit@10 over the directions of every record that has some, in the log's order."""
    hits = [[value for name, value in record.items() if name.endswith("_hit10")] for record in log]
    return [sum(found) / len(found) for found in hits if found]


def should_stop(validations: Sequence[float], patience: int | None) -> bool:
    """Whether the best score is `patience` validations old or older; an equal score is not a better one."""
    if patience is None or not validations:
        return False
    best = max(range(len(validations)), key=lambda place: (validations[place], -place))
    return len(validations) - 1 - best >= patience
