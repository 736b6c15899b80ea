"""Values in, batches out: longest first, each under a budget of padded tokens, pixels or samples.

Assumes: batches depend on the values and the budget alone, so that the same list always makes the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from conjoin.encoders.towers import Tower

# Per batch, by kind of tower. A GPU wants many times more than a CPU; its out-of-memory is met by halving.
CPU_BUDGET = {"text": 8_192, "image": 32 * 128**2, "audio": 16 * 16_000 * 10}
GPU_BUDGET = {"text": 131_072, "image": 256 * 224**2, "audio": 128 * 16_000 * 10}
MAX_ROWS = 4_096


@dataclass(frozen=True, slots=True)
class Batch:
    """rows: positions of its values in the list; inputs: what the tower takes, on the CPU."""

    rows: np.ndarray
    inputs: dict[str, torch.Tensor]

    def halves(self) -> tuple[Batch, Batch]:
        middle = len(self.rows) // 2
        first = Batch(self.rows[:middle], {name: tensor[:middle] for name, tensor in self.inputs.items()})
        return first, Batch(self.rows[middle:], {name: tensor[middle:] for name, tensor in self.inputs.items()})


def batches(tower: Tower, values: Sequence[str | np.ndarray], budget: int) -> Iterator[Batch]:
    """Every value in exactly one batch. budget: padded tokens, pixels or samples of a batch, by the tower's kind."""
    if tower.spec.kind == "text":
        yield from _of_texts(tower, values, budget)
        return
    lengths = np.array([tower.length(value) for value in values], dtype=np.int64)
    for rows in cut(lengths, budget):
        yield Batch(rows, tower.collate([values[row] for row in rows]))


def cut(lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Positions, longest first (ties in order), cut where rows x longest would exceed the budget; never empty."""
    order = np.argsort(-lengths, kind="stable")
    found, start = [], 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        stop = start + min(MAX_ROWS, max(1, budget // longest))
        found.append(order[start:stop])
        start = stop
    return found


def _of_texts(tower: Tower, texts: Sequence[str | np.ndarray], budget: int) -> Iterator[Batch]:
    """Tokenised once, in windows of like numbers of characters; the exact lengths then come with the tokens."""
    characters = np.array([len(text) for text in texts], dtype=np.int64)
    by_size = np.argsort(-characters, kind="stable")
    for start in range(0, len(texts), MAX_ROWS):
        window = by_size[start : start + MAX_ROWS]
        inputs = tower.collate([texts[row] for row in window])
        mask_BL = inputs["attention_mask"]
        for rows in cut(mask_BL.sum(1).numpy(), budget):
            used_L = mask_BL[rows].any(0)
            yield Batch(window[rows], {name: tensor[rows][:, used_L] for name, tensor in inputs.items()})
