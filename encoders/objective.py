"""What a training step minimises: one loss over a weighted graph of pairs of modalities, over the rows of all ranks.

Assumes: each rank calls with its own rows and sums losses and gradients over ranks afterwards (a wrapper that averages
them gives 1/W of both). Every rank takes part in every call, with zero rows if it has none, and calls backward if any
does. The gradient is exact for every parameter, scales and biases included, at any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, combinations
from typing import Literal, Protocol

import torch

from conjoin.encoders import losses, ranks
from conjoin.encoders.losses import Among, Negatives, OneWay
from conjoin.encoders.spec import Loss

# 8 MB of float32 similarities at a time; a tile's temporaries are a few times that
_TILE_ELEMENTS = 1 << 21

PairLoss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Scaled(Protocol):
    """What a joint encoder gives for a pair of modalities."""

    def scale(self, a: str, b: str) -> torch.Tensor: ...
    def bias(self, a: str, b: str) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Encoded:
    """One modality of this rank's rows: the unit vectors of those rows where present_B is true, in their order."""

    vectors_BD: torch.Tensor
    present_B: torch.Tensor


@dataclass(frozen=True, slots=True)
class Objective:
    """same_group: records of one group are left out (`mask`), count as right (`positive`) or as wrong (`negative`).

    weights: by pair of modalities, in any order of the two; pairs it does not name are not trained, all are if it is
    empty. matryoshka: prefixes of the vectors that are trained along, in dimensions. custom: a loss of the user's own,
    called with all ranks' rows (a_ND, b_ND, scale, group_N), its mean over rows returned.
    """

    loss: Loss = "infonce"
    same_group: Literal["mask", "positive", "negative"] = "mask"
    weights: Mapping[frozenset[str], float] = field(default_factory=dict)
    matryoshka: Sequence[int] = ()
    margin: float = 0.2
    negatives: Negatives = "hardest"
    custom: PairLoss | None = None
    tile_elements: int = _TILE_ELEMENTS

    def pairs(self, modalities: Sequence[str]) -> dict[tuple[str, str], float]:
        """The trained pairs and their shares of the loss, which sum to 1."""
        found = {
            (a, b): self.weights.get(frozenset((a, b)), 0.0) if self.weights else 1.0
            for a, b in combinations(modalities, 2)
        }
        total = sum(found.values())
        return {pair: weight / total for pair, weight in found.items() if weight > 0}

    def share(self, encoded: Mapping[str, Encoded], scaled: Scaled, group_B: torch.Tensor) -> torch.Tensor:
        """This rank's share of the loss; group_B: (B,) int64 of its rows."""
        batch = _Batch.gathered(encoded, group_B)
        pairs = self.pairs(list(encoded))
        parts = [weight * self._pair(batch, pair, scaled) for pair, weight in pairs.items()]
        # a rank without rows still has a graph, so that its backward takes part in the collectives
        return torch.stack(parts).sum() + 0 * torch.stack([vectors.sum() for vectors in batch.vectors.values()]).sum()

    def chance(self, num_rows: int) -> float:
        """The loss of vectors that tell nothing apart, in a batch of so many pairs."""
        if self.loss == "triplet":
            return 2 * self.margin
        if self.loss == "sigmoid":
            # the best constant probability is 1/N: N times its entropy
            return math.log(num_rows) + (num_rows - 1) * math.log(num_rows / max(num_rows - 1, 1))
        return math.log(num_rows)

    def _pair(self, batch: _Batch, pair: tuple[str, str], scaled: Scaled) -> torch.Tensor:
        both_N = batch.column(pair[0]) & batch.column(pair[1])
        a, b = (batch.rows_of(name, both_N) for name in pair)
        group_N = None if self.same_group == "negative" else batch.group_N[both_N]
        first = int(both_N[: batch.start].sum())
        mine = slice(first, first + int(both_N[batch.start : batch.stop].sum()))
        scale, bias = scaled.scale(*pair).to(a.device), scaled.bias(*pair).to(a.device)
        if self.custom is not None:
            return self._custom(a, b, scale, batch.group_N[both_N]) / ranks.world()
        same: losses.Same = "positive" if self.same_group == "positive" else "mask"

        def tile_loss(rows: slice, given: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
            """One way after the other: together they would keep two gradients of a modality."""
            a_ND, b_ND, scale, bias = given
            place = slice(mine.start + rows.start, mine.start + rows.stop)
            way, among = self._bound(scale, bias), Among(place.start, group_N, same)
            share = 0.5 if self.loss == "infonce" else 1.0
            yield share * way(a_ND[place], b_ND, among=among)
            if self.loss != "sigmoid":
                yield share * way(b_ND[place], a_ND, among=among)

        tile = max(1, self.tile_elements // max(len(b), 1))
        return losses.tiled(tile_loss, mine.stop - mine.start, tile, (a, b, scale, bias))

    def _bound(self, scale: torch.Tensor, bias: torch.Tensor) -> OneWay:
        way: OneWay
        if self.loss == "infonce":
            way = partial(losses.infonce, scale=scale)
        elif self.loss == "sigmoid":
            way = partial(losses.sigmoid, scale=scale, bias=bias)
        else:
            way = partial(losses.triplet, margin=self.margin, negatives=self.negatives)
        if not self.matryoshka:
            return way
        return losses.matryoshka(way, self.matryoshka, [1 / len(self.matryoshka)] * len(self.matryoshka))

    def _custom(
        self, a_ND: torch.Tensor, b_ND: torch.Tensor, scale: torch.Tensor, group_N: torch.Tensor
    ) -> torch.Tensor:
        assert self.custom is not None
        dims = self.matryoshka or [a_ND.shape[1]]
        parts = [self.custom(losses.prefix(a_ND, d), losses.prefix(b_ND, d), scale, group_N) for d in dims]
        return torch.stack(parts).mean()


@dataclass(frozen=True, slots=True)
class _Batch:
    """The rows of all ranks, by rank. vectors: of each modality's present rows, in the order of the batch; present_NM,
    group_N: of all N rows; start and stop: this rank's."""

    vectors: Mapping[str, torch.Tensor]
    present_NM: torch.Tensor
    group_N: torch.Tensor
    start: int
    stop: int

    @classmethod
    def gathered(cls, encoded: Mapping[str, Encoded], group_B: torch.Tensor) -> _Batch:
        present_BM = torch.stack([found.present_B for found in encoded.values()], dim=1)
        counts = ranks.gather_counts(len(group_B), group_B.device)
        facts = ranks.gather(torch.cat([present_BM.to(torch.int64), group_B[:, None]], dim=1), counts)
        present_NM = facts[:, :-1].bool()
        vectors = {name: losses.exact(found.vectors_BD) for name, found in encoded.items()}
        if len(counts) > 1:
            per_rank = [present_NM[end - count : end].sum(0).tolist() for end, count in _ends(counts)]
            vectors = _of_all_ranks(vectors, per_rank)
        start = sum(counts[: ranks.rank()])
        return cls(vectors, present_NM, facts[:, -1], start, start + counts[ranks.rank()])

    def column(self, name: str) -> torch.Tensor:
        """Which rows have this modality (N,)."""
        return self.present_NM[:, list(self.vectors).index(name)]

    def rows_of(self, name: str, both_N: torch.Tensor) -> torch.Tensor:
        """The vectors of one modality of the rows that are wanted, all of which have it."""
        wanted = both_N[self.column(name)]
        return self.vectors[name] if bool(wanted.all()) else self.vectors[name][wanted]


def _of_all_ranks(vectors: Mapping[str, torch.Tensor], per_rank: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """Each modality's rows of all ranks; per_rank: how many each has of each modality.

    One collective for all modalities: several could run backward in another order on another rank.
    """
    gathered_TD = ranks.gather_with_grad(torch.cat(list(vectors.values())), [sum(rows) for rows in per_rank])
    blocks = torch.split(gathered_TD, [count for rows in per_rank for count in rows])
    return {name: torch.cat(blocks[number :: len(vectors)]) for number, name in enumerate(vectors)}


def _ends(counts: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(accumulate(counts), counts, strict=True))
