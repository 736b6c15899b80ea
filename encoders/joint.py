"""The joint encoder: one tower per modality into one space, unit length, and a learned scale.

Assumes: modality names are the keys of the spec's towers; any subset of modalities can be encoded alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from conjoin.encoders.options import TowerOptions
from conjoin.encoders.spec import EncoderSpec, Kind
from conjoin.encoders.towers import Inputs, Tower, build_tower

# CLIP's (Radford et al. 2021, arXiv:2103.00020): the temperature starts at 0.07 and the scale stays below 100.
_INITIAL_LOG_SCALE = math.log(1 / 0.07)
_MAX_LOG_SCALE = math.log(100)


class JointEncoder(nn.Module):
    """Towers by modality; every method takes one modality alone."""

    def __init__(self, spec: EncoderSpec, towers: Mapping[str, Tower]) -> None:
        super().__init__()
        if set(spec.towers) != set(towers):
            raise ValueError(f"the spec names {sorted(spec.towers)}, the towers are {sorted(towers)}")
        self.spec = spec
        self.towers = nn.ModuleDict({name: towers[name] for name in sorted(towers)})
        self.log_scale = nn.Parameter(torch.tensor(_INITIAL_LOG_SCALE))

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

    @property
    def scale(self) -> torch.Tensor:
        """What similarities are multiplied by in the loss, a scalar with gradient."""
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_scale_(self) -> None:
        """Keep the scale in [1, 100]; call it after every optimizer step."""
        self.log_scale.clamp_(0, _MAX_LOG_SCALE)


def build(towers: Mapping[str, TowerOptions], dim: int, captions: Sequence[str] = ()) -> JointEncoder:
    """A new encoder; `captions` train the tokenizer of a built-in text tower. Raises ValueError naming the tower."""
    unknown = set(towers) - {"text", "image", "audio"}
    if unknown or not towers:
        raise ValueError(f"modalities are text, image and audio, not {sorted(unknown) or 'none'}")
    built = {name: build_tower(cast(Kind, name), options, dim, captions) for name, options in towers.items()}
    return JointEncoder(EncoderSpec(dim, {name: tower.spec for name, tower in built.items()}), built)
