"""What one row of a tower costs in memory while it is trained, seen by counting what autograd keeps.

Assumes: the largest value that the transform lets through stands for all: a full-length text or clip, a whole picture.
"""

from __future__ import annotations

import numpy as np
import torch

from conjoin.encoders.towers import Tower

_ROWS = 2


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

    inputs = {name: value.to(device) for name, value in tower.collate([tower.sample(longest=True)] * num_rows).items()}
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
