"""What one row of a tower costs in memory while it is trained, seen by counting what autograd keeps.

Assumes: the largest value that the transform lets through stands for all: a full-length text or clip, a whole picture.
"""

from __future__ import annotations

import numpy as np
import torch

from conjoin.encoders.spec import AudioTransform, ImageTransform, TextTransform
from conjoin.encoders.towers import Tower

_ROWS = 2


def largest_value(tower: Tower) -> str | np.ndarray:
    """A value as long as the tower's transform lets any be."""
    transform = tower.spec.transform
    if isinstance(transform, TextTransform):
        return "a " * transform.max_tokens
    if isinstance(transform, ImageTransform):
        return np.zeros((transform.size_px, transform.size_px, 3), np.uint8)
    assert isinstance(transform, AudioTransform)
    return np.zeros(round(transform.max_s * transform.sample_rate_hz), np.float32)


def smallest_value(tower: Tower) -> str | np.ndarray:
    """A value that costs little, for a forward pass whose result nobody needs."""
    transform = tower.spec.transform
    if isinstance(transform, AudioTransform):
        return np.zeros(min(transform.sample_rate_hz, round(transform.max_s * transform.sample_rate_hz)), np.float32)
    return "a" if isinstance(transform, TextTransform) else largest_value(tower)


def bytes_per_row(tower: Tower) -> int:
    """Bytes kept for the backward pass per row, inputs included; the forward pass is made on the tower's device."""
    few, more = (_kept(tower, rows) for rows in (_ROWS, 2 * _ROWS))
    return max(1, (more - few) // _ROWS)


def _kept(tower: Tower, num_rows: int) -> int:
    parameters = {p.untyped_storage().data_ptr() for p in tower.parameters()}
    device = next(tower.parameters()).device
    seen: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = {name: value.to(device) for name, value in tower.collate([largest_value(tower)] * num_rows).items()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        # the graph must live until all is counted, or its memory is used again at the same address
        kept = tower.project(tower.features(inputs))
    del kept
    return sum(seen.values()) + sum(value.nbytes for value in inputs.values())


def micro_batch_size(per_row: int, budget: int, most: int) -> int:
    """Rows of a forward pass within `budget` bytes: all of `most` if they fit, else a power of two, 1 at least."""
    if per_row * most <= budget:
        return max(1, most)
    return 1 << max(0, int(np.log2(max(1, budget // per_row))))
