"""Retrieval on the validation rows while training: embedded and ranked in shares by all ranks, never as N x N scores.

Assumes: every rank calls `run` at the same steps; the figures are the same on every rank, whatever their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from conjoin.encoders import ranks
from conjoin.pipeline import metrics
from conjoin.pipeline.forward import Forward, Rows
from conjoin.pipeline.order import Positions
from conjoin.pipeline.ranking import Side
from conjoin.pipeline.steps import Decoded, Raw, Reader

KS = (1, 5, 10)
_EMBED_AT_ONCE = 256
_KEPT_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Validated:
    """figures: `<query>_<candidate>_hit<k>`; score: the mean hit@10, what `best` and early stopping go by, or None."""

    figures: Mapping[str, float]
    score: float | None


class Validation:
    """The first `most` validation rows; decoded values are kept where they fit into memory."""

    def __init__(self, forward: Forward, raws: tuple[Raw, ...], most: int) -> None:
        self._forward, self._raws = forward, raws
        self._rows = np.arange(min(most, len(forward.data.validation)))
        self._decoded: dict[int, Mapping[str, Decoded]] = {}
        self._room = _KEPT_BYTES

    @torch.no_grad()
    def run(self) -> Validated:
        """hit@1/5/10 both ways of every pair of modalities over the records that have both."""
        if len(self._rows) < 2:
            return Validated({}, None)
        vectors = self._vectors()
        groups = self._forward.data.validation.group_N[self._rows]
        figures: dict[str, float] = {}
        for a, b in [(a, b) for a in vectors for b in vectors if a != b]:
            both = vectors[a][1] & vectors[b][1]
            if both.any():
                left, right = (vectors[name][0][both[vectors[name][1]]] for name in (a, b))
                figures |= {f"{a}_{b}_hit{k}": hit for k, hit in self._hits(left, right, groups[both]).items()}
        hits = [value for name, value in figures.items() if name.endswith("hit10")]
        return Validated(figures, float(np.mean(hits)) if hits else None)

    @torch.no_grad()
    def sides(self) -> dict[str, Side]:
        """Vectors and groups by modality, of the rows that have it; the same on every rank."""
        if len(self._rows) < 2:
            return {}
        groups = self._forward.data.validation.group_N[self._rows]
        return {name: Side(vectors, groups[there]) for name, (vectors, there) in self._vectors().items()}

    def _hits(self, queries_ND: np.ndarray, candidates_ND: np.ndarray, groups_N: Positions) -> dict[int, float]:
        """Of all queries; this rank looks for its share of them."""
        place = self._forward.place
        mine = np.array_split(np.arange(len(queries_ND)), place.world)[place.rank]
        sums = torch.zeros(len(KS), dtype=torch.float64)
        if len(mine):
            hits = metrics.hits(queries_ND[mine], candidates_ND, groups_N[mine], groups_N, KS)
            sums += torch.tensor([float(hits[k].sum()) for k in KS], dtype=torch.float64)
        if place.world > 1:
            shared = sums.to(place.device)
            ranks.sum_([shared])
            sums = shared.cpu()
        return {k: float(value) / len(queries_ND) for k, value in zip(KS, sums, strict=True)}

    def _vectors(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By modality the vectors of all ranks' rows that have it, in the order of the rows, and which rows do."""
        place = self._forward.place
        shares = np.array_split(self._rows, place.world)
        pieces = np.array_split(shares[place.rank], -(-len(shares[0]) // _EMBED_AT_ONCE))
        done = [self._forward.vectors(Rows(piece, self._values(piece), None)) for piece in pieces]
        found = {}
        for name in self._forward.encoder.spec.towers:
            local = torch.cat([piece[name].vectors_BD for piece in done])
            present = torch.cat([piece[name].present_B for piece in done]).to(torch.int64)
            counts = ranks.gather_counts(len(local), local.device)
            everywhere = ranks.gather(local, counts).cpu().numpy()
            there = ranks.gather(present, [len(share) for share in shares]).bool().cpu().numpy()
            found[name] = (everywhere, there)
        return found

    def _values(self, piece: Positions) -> Mapping[str, Decoded]:
        if not self._raws:
            return {}
        key = int(piece[0]) if len(piece) else -1
        if key in self._decoded:
            return self._decoded[key]
        data = self._forward.data
        decoded = Reader(data.validation, self._raws, 0, augment=False).read(piece, 0)
        self._room -= sum(value.num_bytes for value in decoded.values())
        if self._room >= 0:
            self._decoded[key] = decoded
        return decoded
