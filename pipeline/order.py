"""The order of training: (seed, epoch, step) to rows, whatever the number of workers; pure numpy.

Assumes: rows are counted in the order of the source (file, row group, row). Row groups are permuted, consecutive ones
joined to windows, and rows shuffled inside a window, so that reading stays nearly sequential. A step is the next
global batch, cut into chunks; chunk c belongs to rank c mod W. Resume is a step number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
NUM_CHUNKS = 64  # per step: the same for every W, and enough to share evenly among up to as many workers
WINDOW_ROWS = 8192


@dataclass(frozen=True, slots=True)
class Order:
    """row_group_N: a number per row, equal for rows of one row group; window_rows: at least so many are shuffled."""

    row_group_N: Positions
    batch: int
    seed: int
    window_rows: int = WINDOW_ROWS

    @property
    def steps_per_epoch(self) -> int:
        """The last one may be short."""
        return -(-len(self.row_group_N) // self.batch)

    def windows(self, epoch: int) -> list[Positions]:
        """Every row once, (N,) in all, in the windows that a reader can take one after another."""
        rng = np.random.default_rng([self.seed, epoch])
        starts = np.flatnonzero(np.diff(self.row_group_N, prepend=-1))
        pieces = np.split(np.arange(len(self.row_group_N)), starts[1:])
        windows: list[Positions] = []
        pending: list[Positions] = []
        for piece in rng.permutation(len(pieces)):
            pending.append(pieces[piece])
            if sum(map(len, pending)) >= self.window_rows:
                windows.append(rng.permutation(np.concatenate(pending)))
                pending = []
        if pending:
            windows.append(rng.permutation(np.concatenate(pending)))
        return windows

    def steps(self, epoch: int, first: int = 0) -> Iterator[Positions]:
        """The rows of each global batch of an epoch, from step `first` of the epoch on."""
        order = np.concatenate(self.windows(epoch))
        for start in range(first * self.batch, len(order), self.batch):
            yield order[start : start + self.batch]


def chunks(rows: Positions) -> list[Positions]:
    """A global batch cut into up to NUM_CHUNKS chunks whose sizes differ by one at most."""
    return [chunk for chunk in np.array_split(rows, NUM_CHUNKS) if len(chunk)]


def share(rows: Positions, rank: int, world: int) -> Positions:
    """What one rank computes of a global batch: chunks rank, rank + W, rank + 2 W, ..."""
    mine = chunks(rows)[rank::world]
    return np.concatenate(mine) if mine else rows[:0]
