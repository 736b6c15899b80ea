"""The training loop of one rank: forward, exact global loss, summed gradients, AdamW, validation, checkpoints.

Assumes: every rank runs the same steps over the same global batches; a rank may have no rows of a step. Gradients are
summed over ranks, because each rank's loss is its share of the global one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist

from conjoin.encoders.losses import symmetric_infonce
from conjoin.encoders.transforms import drop_features
from conjoin.pipeline import checkpoints, metrics
from conjoin.pipeline.checkpoints import Checkpoint, Progressed
from conjoin.pipeline.errors import TrainError
from conjoin.pipeline.order import Order, Positions
from conjoin.pipeline.steps import Decoded, Raw, Reader, Values, rank_steps, stream

if TYPE_CHECKING:
    from conjoin.encoders.joint import JointEncoder
    from conjoin.pipeline.features import Features
    from conjoin.pipeline.recipe import TrainConfig
    from conjoin.pipeline.selection import Selection
    from conjoin.pipeline.source import SourceConfig

Say = Callable[[Sequence[Mapping[str, float]]], None]
_MAX_VALIDATION = 2048
_EMBED_AT_ONCE = 256
_LENGTHS = 4
_VALIDATION_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Data:
    """Training and validation rows, and the features of frozen towers over both (training rows first)."""

    source: SourceConfig
    train: Selection
    validation: Selection
    features: Mapping[str, Features]


@dataclass(frozen=True, slots=True)
class Place:
    """Who this rank is and where it computes."""

    rank: int
    world: int
    device: torch.device
    precision: str


class Loop:
    """One rank's training run; `directory` holds the checkpoints, `say` takes a record of figures per step (rank 0)."""

    def __init__(self, encoder: JointEncoder, data: Data, recipe: TrainConfig, place: Place) -> None:
        self.encoder, self.data, self.recipe, self.place = encoder.to(place.device), data, recipe, place
        self.raws = tuple(Raw(n, spec) for n, spec in encoder.spec.towers.items() if n not in data.features)
        _freeze(encoder, set(data.features))
        self.trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(_groups(self.trained, recipe.weight_decay), lr=recipe.lr)
        self.order = Order(data.train.reading, recipe.global_batch_size, recipe.seed)
        self.total = max(1, round(recipe.epochs * self.order.steps_per_epoch))
        every = recipe.validate_every
        self.every = self.order.steps_per_epoch if every == "epoch" else every
        self.progressed = Progressed(0)
        self.best: dict[str, torch.Tensor] = {}
        self.log: list[Mapping[str, float]] = []
        self.validation: dict[int, Mapping[str, Decoded]] = {}
        self.room = _VALIDATION_BYTES

    def run(self, directory: str, say: Say) -> Progressed:
        """Train from the newest checkpoint to the end. Raises TrainError when the loss is not finite."""
        self._resume(directory)
        if self.place.rank == 0:
            say(self.log)
        saved_at = started = time.monotonic()
        rows_done = 0
        for step, values in enumerate(self._batches(), self.progressed.step):
            loss = self._step(step, values)
            rows_done += min(self.recipe.global_batch_size, len(self.data.train))
            record = {"step": step + 1, "total": self.total, "loss": loss, "scale": self._scale()}
            record |= {"chance_loss": self._chance(step)}
            record |= {"samples_per_s": rows_done / (time.monotonic() - started)}
            last = step + 1 == self.total
            due = last or (step + 1) % self.every == 0
            self.progressed = Progressed(step + 1, self.progressed.best_step, self.progressed.best_score)
            if due:
                record |= self._validate()
            self.log.append(record)
            if self.place.rank == 0:
                say([record])
                if due and (last or time.monotonic() - saved_at >= self.recipe.checkpoint_every_s):
                    self._save(directory)
                    saved_at = time.monotonic()
        return self.progressed

    def _batches(self) -> Iterator[dict[str, Decoded | Positions]]:
        """Per step: the rank's rows, and the decoded values of towers that are trained whole."""
        where = (self.place.rank, self.place.world)
        first = self.progressed.step
        decoded: Iterator[Mapping[str, Decoded]] = iter(())
        if self.raws:
            reader = Reader(self.data.source, self.data.train, self.raws, self.recipe.seed, augment=True)
            decoded = stream(reader, self.order, first, self.total, where)
        for _, rows in rank_steps(self.order, first, self.total, where):
            yield {"rows": rows, **(next(decoded) if self.raws else {})}

    def _step(self, step: int, values: Mapping[str, Decoded | Positions]) -> float:
        """One optimizer step; returns the loss over the global batch."""
        rows = np.asarray(values["rows"])
        self.encoder.train()
        decoded = {name: value for name, value in values.items() if isinstance(value, Decoded)}
        share = self._loss(rows, decoded, step // self.order.steps_per_epoch)
        self.optimizer.zero_grad(set_to_none=False)
        torch.autograd.backward(share)
        loss = _sum_over_ranks(list(self.trained.values()), share.detach())
        if not math.isfinite(loss):
            raise TrainError(f"the loss is {loss} at step {step + 1}", next="Lower train.lr, or use precision: float32")
        torch.nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.clip_grad_norm)
        rate = _schedule(step, self.total, self.recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * rate
        self.optimizer.step()
        self.encoder.clamp_scales_()
        return loss

    def _scale(self) -> float:
        """The largest scale of a pair."""
        return max(float(log_scale.exp()) for log_scale in self.encoder.log_scales.values())

    def _chance(self, step: int) -> float:
        """The loss of vectors that tell nothing apart: ln of the rows in this step's batch."""
        rest = len(self.data.train) - step % self.order.steps_per_epoch * self.recipe.global_batch_size
        return math.log(min(self.recipe.global_batch_size, rest))

    def _loss(self, rows: Positions, decoded: Mapping[str, Decoded], epoch: int) -> torch.Tensor:
        """This rank's share: the mean over pairs of modalities, each over the records that have both."""
        encoded = {}
        for number, name in enumerate(self.encoder.spec.towers):
            features, present = self._features(name, rows, decoded, (self.recipe.seed, epoch))
            rate = self.recipe.tower(name).dropout
            if rate:
                keys = _row_keys((self.recipe.seed, epoch, number), rows[present.cpu().numpy()])
                features = drop_features(features, torch.from_numpy(keys).to(features.device), rate)
            encoded[name] = self.encoder.project(name, features), present
        groups = torch.from_numpy(self.data.train.group_N[rows]).to(self.place.device)
        pairs = list(combinations(encoded, 2))
        shares = []
        for a, b in pairs:
            both = encoded[a][1] & encoded[b][1]
            left, right = encoded[a][0][both[encoded[a][1]]], encoded[b][0][both[encoded[b][1]]]
            group = groups[both] if self.data.source.group else None
            shares.append(symmetric_infonce(left, right, self.encoder.scale(a, b), group))
        return torch.stack(shares).sum() / len(pairs)

    def _features(
        self, name: str, rows: Positions, decoded: Mapping[str, Decoded], drawn_by: tuple[int, int] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled backbone outputs of the rows that have this modality, and which rows do (B,).

        drawn_by: seed and epoch of a training step; None for validation, whose rows follow the training rows.
        """
        device = self.place.device
        if name in self.data.features:
            kept = self.data.features[name]
            content = kept.pick(rows, drawn_by, 0 if drawn_by else len(self.data.train))
            features = torch.from_numpy(np.ascontiguousarray(kept.values_CW[content[content >= 0]]))
            return features.to(device), torch.from_numpy(content >= 0).to(device)
        found = decoded[name]
        present = torch.from_numpy(found.present).to(device)
        if not found.values:
            return torch.zeros(0, self.encoder.spec.towers[name].width, device=device), present
        parts = _by_length(found.values)
        with torch.autocast(device.type, torch.bfloat16) if self.place.precision == "bf16" else nullcontext():
            done = [self._pooled(name, [found.values[place] for place in part]) for part in parts]
        back = torch.from_numpy(np.argsort(np.concatenate(parts))).to(device)
        return torch.cat(done)[back], present

    def _pooled(self, name: str, values: Values) -> torch.Tensor:
        """(B, W) float32 of a tower that is trained whole."""
        inputs = {key: value.to(self.place.device) for key, value in self.encoder.collate(name, values).items()}
        return self.encoder.features(name, inputs).float()

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """hit@1/5/10 both ways on up to 2,048 validation rows; remembers the best parameters so far."""
        rows = np.arange(min(_MAX_VALIDATION, len(self.data.validation)))
        if self.place.rank != 0 or len(rows) < 2:
            return {}
        self.encoder.eval()
        vectors = self._embed_validation(rows)
        groups = self.data.validation.group_N[rows]
        record: dict[str, float] = {}
        for a, b in [(a, b) for a in vectors for b in vectors if a != b]:
            both = vectors[a][1] & vectors[b][1]
            if not both.any():
                continue
            left, right = (vectors[m][0][both[vectors[m][1]]] for m in (a, b))
            found = metrics.retrieval(left, right, groups[both], groups[both])
            record |= {f"{a}_{b}_hit{k}": float(metrics.hit_at(found, k).mean()) for k in (1, 5, 10)}
        hits = [value for name, value in record.items() if name.endswith("hit10")]
        score = float(np.mean(hits)) if hits else -math.inf
        if score > self.progressed.best_score:
            self.progressed = Progressed(self.progressed.step, self.progressed.step, score)
            self.best = {name: p.detach().clone() for name, p in self.trained.items()}
        return record

    def _embed_validation(self, rows: Positions) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        done: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {name: [] for name in self.encoder.spec.towers}
        for start in range(0, len(rows), _EMBED_AT_ONCE):
            piece = rows[start : start + _EMBED_AT_ONCE]
            decoded = self._decoded_validation(piece)
            for name, parts in done.items():
                features, present = self._features(name, piece, decoded, None)
                parts.append((self.encoder.project(name, features), present))
        return {
            n: (torch.cat([p[0] for p in ps]).cpu().numpy(), torch.cat([p[1] for p in ps]).cpu().numpy())
            for n, ps in done.items()
        }

    def _decoded_validation(self, piece: Positions) -> Mapping[str, Decoded]:
        """The same rows at every validation: decoded once where they fit into memory."""
        if not self.raws or int(piece[0]) in self.validation:
            return self.validation.get(int(piece[0]), {})
        reader = Reader(self.data.source, self.data.validation, self.raws, self.recipe.seed, augment=False)
        decoded = reader.read(piece, 0)
        self.room -= sum(value.num_bytes for value in decoded.values())
        if self.room >= 0:
            self.validation[int(piece[0])] = decoded
        return decoded

    def _save(self, directory: str) -> None:
        tensors: dict[str, torch.Tensor] = dict(self.trained)
        for name, parameter in self.trained.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"optimizer.{name}.{slot}": value for slot, value in state.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        checkpoints.write(directory, Checkpoint(self.progressed, tensors, self.log))

    def _resume(self, directory: str) -> None:
        found = checkpoints.newest(directory)
        if found is None:
            return
        self.progressed, self.log = found.progressed, list(found.log)
        for name, parameter in self.trained.items():
            parameter.data.copy_(found.tensors[name])
            prefix = f"optimizer.{name}."
            slots = {key.removeprefix(prefix): value for key, value in found.tensors.items() if key.startswith(prefix)}
            self.optimizer.state[parameter] = {
                slot: value if slot == "step" else value.to(self.place.device) for slot, value in slots.items()
            }
        best = {name: found.tensors[f"best.{name}"] for name in self.trained if f"best.{name}" in found.tensors}
        self.best = {name: value.to(self.place.device) for name, value in best.items()}


def _by_length(values: Values) -> list[Positions]:
    """Places of a batch's values in up to _LENGTHS parts of like lengths: short clips are not padded to long ones."""
    lengths = np.array([len(value) for value in values])
    order = np.argsort(lengths, kind="stable")
    if lengths.max() < 2 * max(lengths.min(), 1):
        return [order]
    return [part for part in np.array_split(order, _LENGTHS) if len(part)]


def _row_keys(drawn_by: tuple[int, int, int], rows: Positions) -> Positions:
    """A random number per row (B,) int64, the same whatever else is in the batch; drawn_by: seed, epoch, tower."""
    base = np.random.SeedSequence(drawn_by).generate_state(1, np.uint64)[0]
    return (rows.astype(np.uint64) + base).view(np.int64)


def _freeze(encoder: JointEncoder, frozen: set[str]) -> None:
    for name in encoder.spec.towers:
        if name in frozen:
            encoder.tower(name).freeze_backbone()


def _groups(trained: Mapping[str, torch.nn.Parameter], decay: float) -> list[dict[str, object]]:
    """No weight decay on biases, norms and the scale: everything with fewer than two dimensions."""
    return [
        {"params": [p for p in trained.values() if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]


def _schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up, then a cosine to zero; 1 is the peak rate."""
    warm = max(1, round(warmup * total))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _sum_over_ranks(parameters: list[torch.nn.Parameter], share: torch.Tensor) -> float:
    """Gradients and the loss, summed in one collective; returns the global loss."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return float(share)
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([grad.reshape(-1).float() for grad in grads] + [share.reshape(1).float()])
    dist.all_reduce(flat)
    start = 0
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = flat[start : start + grad.numel()].view_as(grad).to(grad.dtype)
        start += grad.numel()
    return float(flat[-1])
