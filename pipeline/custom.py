"""A researcher's own parts of a training: backbones, a loss, callbacks; and what of them decides the weights.

Assumes: they are Python that the workers can import, or pickle by value; nothing of them is stored but names and
hashes.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from conjoin.pipeline.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from conjoin.encoders.objective import PairLoss
    from conjoin.pipeline.fit import Callback


@dataclass(frozen=True, slots=True)
class Custom:
    """towers: backbones by modality, which get what the built-in ones of that modality get (encoders/backbones.py);
    loss: called with all ranks' rows (a_ND, b_ND, scale, group_N), returns the mean over rows; callbacks: called on
    rank 0 after each step, True stops the training at the next validation."""

    towers: Mapping[str, nn.Module] = field(default_factory=dict)
    loss: PairLoss | None = None
    callbacks: Sequence[Callback] = ()

    def digests(self) -> dict[str, str]:
        """Of everything that decides the weights: the source of loss and towers, and the towers' first weights."""
        found = {f"tower {name}": _digest_of(type(tower)) + _weights(tower) for name, tower in self.towers.items()}
        return found if self.loss is None else {**found, "loss": _digest_of(self.loss)}


def _digest_of(function: object) -> str:
    try:
        text = inspect.getsource(function)  # type: ignore[arg-type]  # anything else is a TypeError
    except (OSError, TypeError) as error:
        what = f"the source of {function!r} cannot be read, so nothing would tell its changes apart"
        raise ConfigError(what, next="Define it in a file") from error
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _weights(tower: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
