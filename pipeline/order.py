"""The order of training: (seed, epoch, step) to rows, whatever the number of workers; pure numpy.

Assumes: rows are counted in the order of the source (file, row group, row). Row groups are permuted, consecutive ones
joined to windows, and rows shuffled inside a window, so that reading stays nearly sequential. A step is the next
global batch, cut into chunks; chunk c belongs to rank c mod W. Resume is a step number. Where parts of the data have
weights, an epoch takes round(weight * rows) rows of each part, at least one, going round and round through the part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Positions = NDArray[np.int64]
NUM_CHUNKS = 64  # per step: the same for every W, and enough to share evenly among up to as many workers
WINDOW_ROWS = 8192
_CIRCLES = 1 << 32  # where an epoch's number stands in other seeds


@dataclass(frozen=True, slots=True)
class Weights:
    """How often a row is seen per epoch: by_part[part_N], each > 0."""

    part_N: Positions
    by_part: tuple[float, ...]

    @property
    def is_uneven(self) -> bool:
        return any(weight != 1 for weight in self.by_part)

    def quotas(self) -> list[int]:
        """Rows per epoch of each part that has any: round(weight * rows), halves up, and at least one."""
        sizes = np.bincount(self.part_N, minlength=len(self.by_part))
        return [
            max(1, int(weight * size + 0.5)) if size else 0 for weight, size in zip(self.by_part, sizes, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Order:
    """row_group_N: a number per row, equal for rows of one row group; window_rows: at least so many are shuffled."""

    row_group_N: Positions
    batch: int
    seed: int
    window_rows: int = WINDOW_ROWS
    weights: Weights | None = None

    @property
    def rows_per_epoch(self) -> int:
        """The same in every epoch; a row counts as often as it is seen."""
        return len(self.row_group_N) if self.weights is None else sum(self.weights.quotas())

    @property
    def steps_per_epoch(self) -> int:
        """The last one may be short."""
        return -(-self.rows_per_epoch // self.batch)

    def rows_of(self, step: int) -> int:
        """Rows of a step's global batch, counted from the start of training."""
        return min(self.batch, self.rows_per_epoch - step % self.steps_per_epoch * self.batch)

    def draw(self, step: int) -> int:
        """What random draws for the rows of a step depend on beside the seed: the epoch, or with weights the step.

        A row that is seen twice in an epoch is so seen with two augmentations, or two of its captions.
        """
        return step // self.steps_per_epoch if self.weights is None or not self.weights.is_uneven else step

    def windows(self, epoch: int) -> list[Positions]:
        """Every row as often as its weight says, in the windows that a reader can take one after another."""
        rng = np.random.default_rng([self.seed, epoch])
        windows: list[Positions] = []
        pending: list[Positions] = []
        for piece in self._pieces(epoch, rng):
            pending.append(piece)
            if sum(map(len, pending)) >= self.window_rows:
                windows.append(rng.permutation(np.concatenate(pending)))
                pending = []
        if pending:
            windows.append(rng.permutation(np.concatenate(pending)))
        return windows

    def _pieces(self, epoch: int, rng: np.random.Generator) -> list[Positions]:
        """Row groups, permuted. Of one that is seen k times, copy c lies in the c-th of k sections of the epoch."""
        pieces = self._row_groups()
        if self.weights is None or not self.weights.is_uneven:
            return [pieces[number] for number in rng.permutation(len(pieces))]
        times_N = self._times(epoch)
        times = np.array([times_N[piece].max() for piece in pieces])
        copies: list[Positions] = []
        keys: list[float] = []
        for copy in range(int(times.max())):
            for place, number in enumerate(rng.permutation(len(pieces))):
                if times[number] > copy:
                    copies.append(pieces[number][times_N[pieces[number]] > copy])
                    keys.append((copy + (place + 0.5) / len(pieces)) / times[number])
        return [copies[number] for number in np.argsort(keys, kind="stable")]

    def _row_groups(self) -> list[Positions]:
        starts = np.flatnonzero(np.diff(self.row_group_N, prepend=-1))
        return np.split(np.arange(len(self.row_group_N)), starts[1:])

    def _times(self, epoch: int) -> Positions:
        """How often each row is seen in an epoch (N,): over any epochs, rows of a part differ by one at most."""
        assert self.weights is not None
        times_N = np.zeros(len(self.row_group_N), dtype=np.int64)
        circles = self._circles()
        for circle, quota in zip(circles, self.weights.quotas(), strict=True):
            if quota:
                whole, rest = divmod(quota, len(circle))
                times_N[circle] = whole
                times_N[np.take(circle, np.arange(rest) + epoch * quota, mode="wrap")] += 1
        return times_N

    def _circles(self) -> list[Positions]:
        """Each part's rows in the order in which epochs go round: by row group, so that half of a part is half a read.

        Row groups and the rows in each are shuffled once, by the seed.
        """
        assert self.weights is not None
        pieces = self._row_groups()
        rng = np.random.default_rng([self.seed, _CIRCLES])
        shuffled = [rng.permutation(pieces[number]) for number in rng.permutation(len(pieces))]
        rows = np.concatenate(shuffled)
        parts = self.weights.part_N[rows]
        return [rows[parts == part] for part in range(len(self.weights.by_part))]

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
