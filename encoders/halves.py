"""The joint classes of transformers: which towers are their halves, and how a linear head goes into a half's weights.

Assumes: a fold changes weights in place and is exact up to rounding; whoever folds compares the vectors afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class Pair:
    """A joint class of transformers and the towers of ours that are its halves.

    prefix: of a half's weights within the whole, by modality. fold: puts a linear head into a half's own weights, or
    says why it cannot; empty where it could.
    """

    whole: str
    halves: Mapping[str, str]
    prefix: Mapping[str, str]
    scales: tuple[str, ...]
    fold: Callable[[str, dict[str, torch.Tensor], nn.Linear], str]


def _fold_clip(modality: str, weights: dict[str, torch.Tensor], head: nn.Linear) -> str:
    """CLIP's projections have no bias: ours goes into the norm before them, through a projection of full rank."""
    norm, projection = {
        "text": ("text_model.final_layer_norm.bias", "text_projection.weight"),
        "image": ("vision_model.post_layernorm.bias", "visual_projection.weight"),
    }[modality]
    folded = head.weight.double() @ weights[projection].double()
    shift = torch.linalg.lstsq(folded, head.bias.double()[:, None], driver="gelsd").solution[:, 0]
    weights[projection] = folded.float()
    weights[norm] = (weights[norm].double() + shift).float()
    return ""


def _fold_siglip(modality: str, weights: dict[str, torch.Tensor], head: nn.Linear) -> str:
    if modality == "image":
        return "SigLIP's picture tower ends without a projection that could take its linear head"
    return _fold_last(weights, "head", head)


def _fold_clap(modality: str, weights: dict[str, torch.Tensor], head: nn.Linear) -> str:
    if head.in_features != head.out_features:
        return f"CLAP's projections are square, and its linear head goes to {head.out_features} dimensions"
    return _fold_last(weights, f"{modality}_projection.linear2", head)


def _fold_last(weights: dict[str, torch.Tensor], name: str, head: nn.Linear) -> str:
    weight, bias = weights[f"{name}.weight"].double(), weights[f"{name}.bias"].double()
    weights[f"{name}.weight"] = (head.weight.double() @ weight).float()
    weights[f"{name}.bias"] = (head.weight.double() @ bias + head.bias.double()).float()
    return ""


PAIRS = (
    Pair(
        "CLIPModel",
        {"text": "CLIPTextModelWithProjection", "image": "CLIPVisionModelWithProjection"},
        {"text": "", "image": ""},
        ("logit_scale",),
        _fold_clip,
    ),
    Pair(
        "SiglipModel",
        {"text": "SiglipTextModel", "image": "SiglipVisionModel"},
        {"text": "text_model.", "image": "vision_model."},
        ("logit_scale",),
        _fold_siglip,
    ),
    Pair(
        "ClapModel",
        {"text": "ClapTextModelWithProjection", "audio": "ClapAudioModelWithProjection"},
        {"text": "", "audio": ""},
        ("logit_scale_a", "logit_scale_t"),
        _fold_clap,
    ),
)
