"""The joint encoder: one tower per modality into one space, unit length, and a learned scale per pair of modalities.

Assumes: modality names are the keys of the spec's towers; any subset of modalities can be encoded alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from conjoin.encoders.options import TowerOptions
from conjoin.encoders.spec import EncoderSpec, Kind, Loss
from conjoin.encoders.towers import Inputs, Tower, build_tower

# CLIP (Radford et al. 2021, arXiv:2103.00020) starts at a temperature of 0.07, SigLIP (Zhai et al. 2023,
# arXiv:2303.15343) at a scale of 10 and a bias of -10. A triplet margin is in raw similarities: no scale.
_INITIAL_LOG_SCALE = {"infonce": math.log(1 / 0.07), "sigmoid": math.log(10)}
_INITIAL_BIAS = -10.0
# CLIP's clamp; released SigLIPs are above 100.
_MAX_LOG_SCALE = math.log(100)


class JointEncoder(nn.Module):
    """Towers by modality; every method takes one modality alone."""

    def __init__(self, spec: EncoderSpec, towers: Mapping[str, Tower]) -> None:
        super().__init__()
        if set(spec.towers) != set(towers):
            raise ValueError(f"the spec names {sorted(spec.towers)}, the towers are {sorted(towers)}")
        self.spec = spec
        self.towers = nn.ModuleDict({name: towers[name] for name in sorted(towers)})
        pairs = [pair_name(a, b) for a, b in combinations(sorted(towers), 2)]
        start = _INITIAL_LOG_SCALE.get(spec.loss)
        self.log_scales = nn.ParameterDict({} if start is None else {pair: torch.tensor(start) for pair in pairs})
        biased = pairs if spec.loss == "sigmoid" else []
        self.biases = nn.ParameterDict({pair: torch.tensor(_INITIAL_BIAS) for pair in biased})

    def tower(self, modality: str) -> Tower:
        """Raises ValueError naming the modalities there are."""
        if modality not in self.towers:
            raise ValueError(f"the encoder has no {modality!r} tower; it has {', '.join(self.towers)}")
        return cast(Tower, self.towers[modality])

    def collate(self, modality: str, values: Sequence[str | np.ndarray]) -> Inputs:
        """Decoded values (text: str; image: (size, size, 3) uint8; audio: (S,) float32) to one batch on the CPU."""
        return self.tower(modality).collate(values)

    def features(self, modality: str, inputs: Inputs) -> torch.Tensor:
        """Pooled backbone output (B, W): what may be kept while the backbone is frozen."""
        return self.tower(modality).features(inputs)

    def project(self, modality: str, features_BW: torch.Tensor) -> torch.Tensor:
        """Features to unit vectors (B, D), in float32 at least, whatever the autocast."""
        projected_BD = self.tower(modality).project(features_BW)
        return functional.normalize(projected_BD.to(torch.promote_types(projected_BD.dtype, torch.float32)), dim=-1)

    def encode(self, modality: str, inputs: Inputs) -> torch.Tensor:
        """Inputs to unit vectors (B, D)."""
        return self.project(modality, self.features(modality, inputs))

    def scale(self, a: str, b: str) -> torch.Tensor:
        """What similarities of two modalities are multiplied by in the loss, a scalar with gradient; 1 for triplet."""
        name = pair_name(a, b)
        return self.log_scales[name].exp() if name in self.log_scales else torch.ones(())

    def bias(self, a: str, b: str) -> torch.Tensor:
        """What the sigmoid loss adds to scaled similarities, a scalar with gradient; 0 for other losses."""
        name = pair_name(a, b)
        return self.biases[name] if name in self.biases else torch.zeros(())

    @torch.no_grad()
    def clamp_scales_(self) -> None:
        """Keep InfoNCE's scales in [1, 100]; call it after every optimizer step. Other losses need no clamp."""
        if self.spec.loss == "infonce":
            for log_scale in self.log_scales.values():
                log_scale.clamp_(0, _MAX_LOG_SCALE)


def pair_name(a: str, b: str) -> str:
    """The name of a pair of modalities, whichever comes first: `image_text`."""
    return "_".join(sorted((a, b)))


def build(
    towers: Mapping[str, TowerOptions],
    dim: int,
    captions: Sequence[str] = (),
    loss: Loss = "infonce",
    backbones: Mapping[str, nn.Module] | None = None,
) -> JointEncoder:
    """A new encoder; `captions` train the tokenizer of a built-in text tower; backbones: the caller's own, by modality.

    Raises ValueError naming the tower.
    """
    unknown = set(towers) - {"text", "image", "audio"}
    if unknown or not towers:
        raise ValueError(f"modalities are text, image and audio, not {sorted(unknown) or 'none'}")
    given = backbones or {}
    if homeless := sorted(set(given) - set(towers)):
        raise ValueError(f"a backbone for {homeless[0]} is given, but the source has no {homeless[0]}")
    built = {
        name: build_tower(cast(Kind, name), options, dim, captions, given.get(name)) for name, options in towers.items()
    }
    return JointEncoder(EncoderSpec(dim, {name: tower.spec for name, tower in built.items()}, loss), built)
