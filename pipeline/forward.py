"""Rows to unit vectors, in micro-batches: from kept features where the backbone is frozen, else from decoded values.

Assumes: what is drawn at random for a row depends on (seed, epoch, row) alone, so that micro-batches and ranks change
nothing. Short values are not padded to long ones: a micro-batch holds values of like length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from conjoin.encoders import ranks
from conjoin.encoders.cached import Part
from conjoin.encoders.objective import Encoded
from conjoin.encoders.transforms import drop_features
from conjoin.pipeline.order import Positions
from conjoin.pipeline.steps import Decoded, Values

if TYPE_CHECKING:
    from conjoin.encoders.joint import JointEncoder
    from conjoin.pipeline.features import Features
    from conjoin.pipeline.recipe import TrainConfig
    from conjoin.pipeline.selection import Selection

_LENGTHS = 4


@dataclass(frozen=True, slots=True)
class Data:
    """Training and validation rows, and the features of frozen towers over both (training rows first)."""

    train: Selection
    validation: Selection
    features: Mapping[str, Features]


@dataclass(frozen=True, slots=True)
class Place:
    """Who this rank is and where it computes; sharded: parameters are spread over ranks."""

    rank: int
    world: int
    device: torch.device
    precision: str
    sharded: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows of one rank. drawn_by: seed and Order.draw while training; None for validation, whose rows follow the
    training rows. decoded: of the towers whose backbone is trained."""

    positions: Positions
    decoded: Mapping[str, Decoded]
    drawn_by: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Parts:
    """The forward passes of one modality: their rows come out in the order `order`; present_B as in Encoded."""

    passes: Sequence[Part]
    order: Positions
    present_B: torch.Tensor

    def encoded(self, vectors_BD: torch.Tensor) -> Encoded:
        """The passes' outputs, one after another, put back into the order of the rows."""
        if (np.diff(self.order) > 0).all():
            return Encoded(vectors_BD, self.present_B)
        back = torch.from_numpy(np.argsort(self.order)).to(vectors_BD.device)
        return Encoded(vectors_BD[back], self.present_B)


class Forward:
    """An encoder and what feeds it on one rank; micro: rows of a forward pass."""

    def __init__(self, encoder: JointEncoder, data: Data, recipe: TrainConfig, place: Place, micro: int) -> None:
        self.encoder, self.data, self.recipe, self.place, self.micro = encoder, data, recipe, place, micro

    def parts(self, rows: Rows) -> dict[str, Parts]:
        """Every modality's forward passes over these rows; the same number on every rank where ranks must agree."""
        found = {name: self._parts(name, rows) for name in self.encoder.spec.towers}
        if not self.place.sharded:
            return found
        counts = ranks.gather(self._counts(found), [1] * self.place.world).amax(0).tolist()
        return {
            name: self._padded(name, parts, most) for (name, parts), most in zip(found.items(), counts, strict=True)
        }

    def vectors(self, rows: Rows) -> dict[str, Encoded]:
        """The same, computed at once."""
        return {name: p.encoded(torch.cat([part() for part in p.passes])) for name, p in self.parts(rows).items()}

    def _parts(self, name: str, rows: Rows) -> Parts:
        if name in self.data.features:
            return self._kept(name, rows)
        found = rows.decoded[name]
        owners = rows.positions[found.present]
        lengths = np.array([len(value) for value in found.values], dtype=np.int64)
        order = np.argsort(lengths, kind="stable")
        some = _cut(order, self.micro)
        passes = [partial(self._forward, name, [found.values[p] for p in at], owners[at], rows.drawn_by) for at in some]
        return Parts(passes, order, torch.from_numpy(found.present).to(self.place.device))

    def _kept(self, name: str, rows: Rows) -> Parts:
        kept = self.data.features[name]
        content = kept.pick(rows.positions, rows.drawn_by, 0 if rows.drawn_by else len(self.data.train))
        there = content >= 0
        owners, chosen = rows.positions[there], content[there]

        def project(at: Positions) -> torch.Tensor:
            features = torch.from_numpy(kept.values_CW[chosen[at]]).to(self.place.device)
            return self._project(name, features, owners[at], rows.drawn_by)

        order = np.arange(len(chosen))
        passes = [partial(project, at) for at in _cut(order, self.micro)]
        return Parts(passes, order, torch.from_numpy(there).to(self.place.device))

    def _forward(self, name: str, values: Values, owners: Positions, drawn_by: tuple[int, int] | None) -> torch.Tensor:
        if not values:
            width = self.encoder.spec.towers[name].width
            return self.encoder.project(name, torch.zeros(0, width, device=self.place.device))
        # where parameters are spread, each call needs all ranks: one call a pass
        pieces = [np.arange(len(values))] if self.place.sharded else _by_length(values)
        with (
            torch.autocast(self.place.device.type, torch.bfloat16) if self.place.precision == "bf16" else nullcontext()
        ):
            pooled = torch.cat([self._pooled(name, [values[place] for place in piece]) for piece in pieces])
        return self._project(name, pooled, owners, drawn_by)

    def _pooled(self, name: str, values: Values) -> torch.Tensor:
        """(B, W), in float32 at least, of a tower whose backbone is trained."""
        inputs = {key: value.to(self.place.device) for key, value in self.encoder.collate(name, values).items()}
        pooled = self.encoder.features(name, inputs)
        return pooled.to(torch.promote_types(pooled.dtype, torch.float32))

    def _project(
        self, name: str, features_BW: torch.Tensor, owners: Positions, drawn_by: tuple[int, int] | None
    ) -> torch.Tensor:
        rate = self.recipe.tower(name).dropout
        if rate and drawn_by:
            number = list(self.encoder.spec.towers).index(name)
            keys = torch.from_numpy(_row_keys((*drawn_by, number), owners)).to(features_BW.device)
            features_BW = drop_features(features_BW, keys, rate)
        return self.encoder.project(name, features_BW)

    def _counts(self, found: Mapping[str, Parts]) -> torch.Tensor:
        return torch.tensor([[len(parts.passes) for parts in found.values()]], device=self.place.device)

    def _padded(self, name: str, parts: Parts, most: int) -> Parts:
        """Passes over nothing at the end: where parameters are spread, each pass needs all ranks."""
        if name in self.data.features:
            return parts

        def nothing() -> torch.Tensor:
            blank = self.encoder.tower(name).sample(longest=False)
            return self._forward(name, [blank], np.zeros(1, np.int64), None)[:0]

        empty = not len(parts.order)  # its only pass does not reach the backbone
        passes = [] if empty else list(parts.passes)
        return Parts(passes + [nothing] * (max(most, 1) - len(passes)), parts.order, parts.present_B)


def _cut(order: Positions, micro: int) -> list[Positions]:
    return [order[start : start + micro] for start in range(0, max(len(order), 1), micro)]


def _by_length(values: Values) -> list[Positions]:
    """Places of values, which come by length, in up to _LENGTHS pieces of like lengths."""
    places = np.arange(len(values))
    if len(values[-1]) < 2 * max(len(values[0]), 1):
        return [places]
    return [piece for piece in np.array_split(places, _LENGTHS) if len(piece)]


def _row_keys(drawn_by: tuple[int, int, int], rows: Positions) -> Positions:
    """A random number per row (B,) int64, the same whatever else is in the batch; drawn_by: seed, epoch, tower."""
    base = np.random.SeedSequence(drawn_by).generate_state(1, np.uint64)[0]
    return (rows.astype(np.uint64) + base).view(np.int64)
