"""The built-in backbones: a small text transformer, a picture CNN and an audio CNN, trained from scratch.

Assumes: no dropout and no normalisation over the batch or over padding, so that a row's features do not depend on
the rows beside it, on micro-batches or on the number of workers.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

_GROUP = 16


class TextTransformer(nn.Module):
    """Pre-norm transformer: ids and mask, both (B, L), to hidden states (B, L, W)."""

    def __init__(self, vocabulary: int, max_tokens: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(max_tokens, width))
        self.layers = nn.ModuleList(_Layer(width) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.tokens(input_ids) + self.positions[: input_ids.shape[1]]
        seen = attention_mask.bool()[:, None, None, :]
        for layer in self.layers:
            hidden = layer(hidden, seen)
        out: torch.Tensor = self.norm(hidden)
        return out


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = max(1, width // 64)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        out: torch.Tensor = x + self.down(functional.gelu(self.up(self.mlp_norm(x))))
        return out


class ImageCnn(nn.Module):
    """Residual CNN with group-norm: (B, 3, H, W) normalised pixels to (B, W), W = 8 * width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        stages, channels = [], width
        for factor in (1, 2, 4, 8):
            stages.append(_Residual(channels, width * factor, 1 if factor == 1 else 2))
            channels = width * factor
        self.stages = nn.Sequential(*stages)
        self.norm = _group_norm(channels)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.stages(self.stem(pixel_values.contiguous(memory_format=torch.channels_last)))
        return functional.relu(self.norm(hidden)).mean((2, 3))


class _Residual(nn.Module):
    """Pre-activation block (He et al. 2016, arXiv:1603.05027)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _group_norm(inputs), _group_norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = stride == 1 and inputs == outputs
        self.skip = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = functional.relu(self.norm1(x))
        out: torch.Tensor = self.conv2(functional.relu(self.norm2(self.conv1(active))))
        return out + (x if self.skip is None else self.skip(active))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, channels // _GROUP), channels)


class AudioCnn(nn.Module):
    """Residual convolutions over time: log-mel (B, M, F) and frame counts (B,) to (B, 2 * width): mean and maximum.

    Normalised per frame, and frames beyond a clip's end are zeroed before every convolution: padding is silence that
    no layer can see.
    """

    def __init__(self, num_mels: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(num_mels)
        self.stem = nn.Conv1d(num_mels, width, 5, 2, 2)
        self.layers = nn.ModuleList(_TimeBlock(width, 2 if index % 2 else 1) for index in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, mel_BMF: torch.Tensor, num_frames_B: torch.Tensor) -> torch.Tensor:
        normed = self.input_norm(mel_BMF.transpose(1, 2)).transpose(1, 2)
        hidden = self.stem(normed * _inside(num_frames_B, normed))
        frames_B = _halved(num_frames_B)
        for layer in self.layers:
            hidden = layer(hidden * _inside(frames_B, hidden))
            frames_B = _halved(frames_B) if layer.stride == 2 else frames_B
        hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        inside = _inside(frames_B, hidden)
        mean = (hidden * inside).sum(2) / frames_B[:, None]
        peak = hidden.masked_fill(inside == 0, -torch.inf).amax(2)
        return torch.cat([mean, peak], dim=1)


class _TimeBlock(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv1d(width, width, 5, stride, 2)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skip = x[:, :, :: self.stride]
        hidden = self.norm(self.conv(x).transpose(1, 2))
        mixed: torch.Tensor = self.down(functional.gelu(self.up(hidden))).transpose(1, 2)
        return skip + mixed


def _halved(frames_B: torch.Tensor) -> torch.Tensor:
    return (frames_B + 1) // 2


def _inside(frames_B: torch.Tensor, x_BCF: torch.Tensor) -> torch.Tensor:
    """1 on a clip's own frames, 0 on padding: (B, 1, F)."""
    positions = torch.arange(x_BCF.shape[2], device=x_BCF.device)
    return (positions[None, None] < frames_B[:, None, None]).to(x_BCF.dtype)
