"""Waves to what an audio backbone takes: zero-padded batches, or a transformers feature extractor's output.

Assumes: an extractor's output for a clip depends on that clip alone; where the library draws random crops or flags
random clips (CLAP), clips are cut to its length first and the flag is set to what is true.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from conjoin.encoders.spec import Json


def padded(waves: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """`waves` (B, S) float32, zeros beyond each end, and `num_samples` (B,) int64."""
    longest = max(1, max(len(wave) for wave in waves))
    batch = np.zeros((len(waves), longest), dtype=np.float32)
    for row, wave in zip(batch, waves, strict=True):
        row[: len(wave)] = wave
    lengths = torch.tensor([max(1, len(wave)) for wave in waves], dtype=torch.int64)
    return {"waves": torch.from_numpy(batch), "num_samples": lengths}


def extract(config: Mapping[str, Json], waves: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """The library's own features of every clip, and `num_samples` (B,).

    Backbones that take raw waves get them one by one later: their padding is not masked in every model.
    """
    extractor = _extractor(json.dumps(config["extractor"], sort_keys=True))
    rate = extractor.sampling_rate
    found = [extractor(wave, sampling_rate=rate, return_tensors="np") for wave in waves]
    name = extractor.model_input_names[0]
    rows = [np.asarray(output[name][0], dtype=np.float32) for output in found]
    inputs = padded(waves)
    if rows[0].ndim == 1:
        return padded(rows)
    del inputs["waves"]
    inputs[name] = torch.from_numpy(np.stack(rows))
    if "is_longer" in extractor.model_input_names:
        inputs["is_longer"] = torch.zeros(len(waves), 1, dtype=torch.bool)
    return inputs


def heard(num_samples_B: torch.Tensor, whole: int, num_positions: int) -> torch.Tensor:
    """Mask (B, F) of the positions that hold a clip and not the silence that fills it up to `whole` samples."""
    last_B = ((num_samples_B * num_positions + whole - 1) // whole).clamp(1, num_positions)
    return torch.arange(num_positions, device=num_samples_B.device)[None] < last_B[:, None]


@lru_cache(maxsize=8)
def _extractor(stored: str) -> Any:
    import transformers

    fields = json.loads(stored)
    cls = getattr(transformers, fields.pop("feature_extractor_type"))
    with warnings.catch_warnings():
        # AST was trained with more mel filters than its spectrum can fill; its library says so every time
        warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
        return cls.from_dict(fields)
