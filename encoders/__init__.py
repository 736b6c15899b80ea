"""What the numbers are: specs, transforms, towers, losses, checkpoints. Pure torch: no ray, no lance, no duckdb.

Shape suffixes used in names here and in pipeline/metrics.py: B batch, N candidates, Q queries, D embedding,
W backbone width, L tokens, C H W image, S audio samples, F frames, M mel bins.

Assumes: names are loaded on first use, so that reading a spec does not import torch.
"""

from __future__ import annotations

import importlib

_NAMES = {
    "AudioTransform": "spec",
    "EncoderSpec": "spec",
    "ImageTransform": "spec",
    "TextTransform": "spec",
    "TowerSpec": "spec",
    "TowerOptions": "options",
    "JointEncoder": "joint",
    "build": "joint",
    "fingerprint": "checkpoint",
    "import_encoder": "imported",
    "load": "checkpoint",
    "read_spec": "checkpoint",
    "save": "checkpoint",
}
__all__ = list(_NAMES)  # built from the table above


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_NAMES)
