"""The training loop of one rank: exact global gradients, AdamW, validation, checkpoints, and a watch on all of it.

Assumes: every rank runs the same steps over the same global batches; a rank may have no rows of a step. Gradients are
summed over ranks, because each rank's loss is its share of the global one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from conjoin.encoders import cached, ranks, sharded
from conjoin.encoders.objective import Encoded, Objective
from conjoin.pipeline import optimizer, storage
from conjoin.pipeline.calibration import Curve, calibrate
from conjoin.pipeline.checkpoints import Checkpoint, Progressed, Writer, newest
from conjoin.pipeline.errors import TrainError
from conjoin.pipeline.forward import Forward, Rows
from conjoin.pipeline.order import Order, Positions
from conjoin.pipeline.steps import Decoded, Raw, Reader, rank_steps, stream
from conjoin.pipeline.validation import Validation

if TYPE_CHECKING:
    from conjoin.encoders.joint import JointEncoder

Say = Callable[[Sequence[Mapping[str, float]]], None]


@dataclass(frozen=True, slots=True)
class Step:
    """What a callback is told on rank 0 after each step: the global batch's rows by position, figures, the encoder."""

    step: int
    total: int
    rows: Positions
    figures: Mapping[str, float]
    encoder: JointEncoder


# True: stop at the next validation.
Callback = Callable[[Step], "bool | None"]


class Loop:
    """One rank's training run. folder: of the run; say: takes records of figures, a step each (rank 0)."""

    def __init__(
        self, encoder: JointEncoder, forward: Forward, objective: Objective, folder: str, callbacks: Sequence[Callback]
    ) -> None:
        data, recipe, place = forward.data, forward.recipe, forward.place
        self.encoder, self.data, self.recipe, self.place = encoder, data, recipe, place
        self.forward, self.objective, self.folder, self.callbacks = forward, objective, folder, callbacks
        self.raws = tuple(Raw(n, spec) for n, spec in encoder.spec.towers.items() if n not in data.features)
        self.trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
        groups = optimizer.parameter_groups(encoder, recipe)
        # One pass over memory; it takes no mixture of spread and whole parameters.
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=not place.sharded)
        self.ema = optimizer.Ema(self.trained, recipe.ema) if recipe.ema else None
        self.order = Order(data.train.reading, recipe.global_batch_size, recipe.seed, weights=data.train.weights)
        self.total = max(1, round(recipe.epochs * self.order.steps_per_epoch))
        every = recipe.validate_every
        self.every = self.order.steps_per_epoch if every == "epoch" else every
        self.validation = Validation(forward, self.raws, recipe.validation_rows)
        self.progressed = Progressed(0)
        self.best: dict[str, torch.Tensor] = {}
        self.log: list[Mapping[str, float]] = []
        self.stopping = False

    def run(self, say: Say) -> Progressed:
        """Train from the newest checkpoint to the end. Raises TrainError when loss or gradient are not finite."""
        directory = storage.join(self.folder, "checkpoints")
        self._resume(directory)
        if self.place.rank == 0:
            say(self.log)
        if self.progressed.stopped:
            return self.progressed
        saved_at = started = time.monotonic()
        rows_done = 0
        with Writer(directory) as writer:
            for step, values in enumerate(self._batches(), self.progressed.step):
                record = self._step(step, values)
                rows_done += self.order.rows_of(step)
                record |= {"samples_per_s": rows_done / (time.monotonic() - started)}
                self.progressed = replace(self.progressed, step=step + 1)
                last = step + 1 == self.total
                due = last or (step + 1) % self.every == 0
                if due:
                    record |= self._validate()
                self.log.append(record)
                self._tell(step, record, say)
                if due:
                    self.stopping |= optimizer.should_stop(optimizer.scores(self.log), self.recipe.patience)
                    wanted = last or time.monotonic() - saved_at >= self.recipe.checkpoint_every_s
                    save, stop = self._agreed(wanted or self.stopping, self.stopping)
                    self.progressed = replace(self.progressed, stopped=stop)
                    if save:
                        self._save(writer)
                        saved_at = time.monotonic()
                    if stop:
                        break
        return self.progressed

    def _batches(self) -> Iterator[dict[str, Decoded | Positions]]:
        """Per step: the rank's rows, and the decoded values of towers that are trained whole."""
        where = (self.place.rank, self.place.world)
        first = self.progressed.step
        decoded: Iterator[Mapping[str, Decoded]] = iter(())
        if self.raws:
            reader = Reader(self.data.train, self.raws, self.recipe.seed, augment=True)
            decoded = stream(reader, self.order, first, self.total, where)
        for _, rows in rank_steps(self.order, first, self.total, where):
            yield {"rows": rows, **(next(decoded) if self.raws else {})}

    def _step(self, step: int, values: Mapping[str, Decoded | Positions]) -> dict[str, float]:
        """One optimizer step; returns its figures."""
        self.encoder.train()
        for parameter in self.trained.values():
            # zeros, not None: a rank without rows takes part in the sum
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.zero_()
        loss, alike = self._backward(step, values)
        norms = self._summed_norms(loss)
        norm = math.hypot(*norms.values())
        if not math.isfinite(float(loss) + norm):
            raise self._not_finite(step, float(loss))
        if norm > self.recipe.clip_grad_norm:
            for parameter in self.trained.values():
                assert parameter.grad is not None
                parameter.grad.mul_(self.recipe.clip_grad_norm / norm)
        lr = self.recipe.lr * optimizer.rate(step, self.total, self.recipe)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.optimizer.step()
        self.encoder.clamp_scales_()
        if self.ema:
            self.ema.update_(step + 1)
        figures = {"step": step + 1, "total": self.total, "loss": float(loss)}
        figures |= {"chance_loss": self.objective.chance(self.order.rows_of(step)), "lr": lr}
        figures |= {f"{pair}_scale": float(value.detach().exp()) for pair, value in self.encoder.log_scales.items()}
        figures |= {f"{name}_grad_norm": value for name, value in norms.items() if name}
        return {**figures, **{f"{name}_alike": value for name, value in alike.items()}}

    def _backward(self, step: int, values: Mapping[str, Decoded | Positions]) -> tuple[torch.Tensor, dict[str, float]]:
        """Gradients of this rank's share; returns the share, and how alike the vectors of a modality are."""
        rows = np.asarray(values["rows"])
        decoded = {name: value for name, value in values.items() if isinstance(value, Decoded)}
        parts = self.forward.parts(Rows(rows, decoded, (self.recipe.seed, self.order.draw(step))))
        groups = torch.from_numpy(self.data.train.group_N[rows]).to(self.place.device)
        alike: dict[str, float] = {}

        def share_of(vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
            for name, found in vectors.items():
                if len(found) > 1:  # the mean cosine of two of them
                    alike[name] = float(found.detach().mean(0).square().sum())
            encoded: dict[str, Encoded] = {name: parts[name].encoded(found) for name, found in vectors.items()}
            return self.objective.share(encoded, self.encoder, groups)

        def sync(name: str, on: bool) -> None:
            sharded.sync(self.encoder.tower(name).backbone, on)

        passes = {name: found.passes for name, found in parts.items()}
        return cached.backward(passes, share_of, self.place.device, sync), alike

    def _summed_norms(self, loss: torch.Tensor) -> dict[str, float]:
        """Sums gradients and loss over ranks; returns each tower's gradient norm, and under `` that of the rest."""
        gradients = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
        ranks.sum_([loss, *(g for g in gradients.values() if not sharded.is_spread(g))])
        groups: dict[str, list[torch.Tensor]] = {name: [] for name in ("", *self.encoder.spec.towers)}
        for name, gradient in gradients.items():
            first, _, rest = name.partition(".")
            groups[rest.partition(".")[0] if first == "towers" else ""].append(gradient)
        groups = {name: found for name, found in groups.items() if found or not name}
        return dict(zip(groups, sharded.norms(list(groups.values())), strict=True))

    def _not_finite(self, step: int, loss: float) -> TrainError:
        """The error, after the batch's ids are on disk."""
        from conjoin.pipeline.selection import ids_of

        where = storage.join(self.folder, "not_finite.json")
        if self.place.rank == 0:
            ids = ids_of(self.data.train, self._global_rows(step))
            storage.write_json(where, {"step": step + 1, "loss": str(loss), "ids": ids})
        return TrainError(
            f"loss or gradient are not finite at step {step + 1} (loss {loss})",
            where=where,
            next="The file names the records of the batch. Lower train.lr, or use precision: float32",
        )

    def _global_rows(self, step: int) -> Positions:
        epoch, inside = divmod(step, self.order.steps_per_epoch)
        return next(iter(self.order.steps(epoch, inside)))

    def _validate(self) -> dict[str, float]:
        """Figures on the validation rows; remembers the best parameters so far."""
        self.encoder.eval()
        with self.averaged():
            found = self.validation.run()
            if found.score is not None and found.score > self.progressed.best_score:
                self.progressed = replace(self.progressed, best_step=self.progressed.step, best_score=found.score)
                self.best = {name: p.detach().clone() for name, p in self.trained.items()}
        return dict(found.figures)

    def averaged(self) -> AbstractContextManager[None]:
        """The parameters are their moving averages in here, where the recipe keeps one."""
        return self.ema.swapped() if self.ema else nullcontext()

    def calibrated(self) -> dict[str, Curve]:
        """Of the best parameters on the validation rows; they replace the last ones, so this comes after all else."""
        self.encoder.eval()
        with torch.no_grad():
            for name, value in self.best.items():
                self.trained[name].copy_(value)
        with nullcontext() if self.best else self.averaged():
            return calibrate(self.validation.sides())

    def _tell(self, step: int, record: Mapping[str, float], say: Say) -> None:
        if self.place.rank != 0:
            return
        say([record])
        for callback in self.callbacks:
            told = Step(step + 1, self.total, self._global_rows(step), record, self.encoder)
            self.stopping = bool(callback(told)) or self.stopping

    def _agreed(self, save: bool, stop: bool) -> tuple[bool, bool]:
        """What rank 0 decides: clocks differ, and callbacks are asked there only."""
        flags = torch.tensor([save, stop], dtype=torch.int64, device=self.place.device)
        first = ranks.gather(flags[None], [1] * self.place.world)[0].tolist()
        return bool(first[0]), bool(first[1])

    def _save(self, writer: Writer) -> None:
        """Whole tensors, however they are spread: every rank takes part, rank 0 writes, beside the training."""
        tensors: dict[str, torch.Tensor] = dict(self.trained)
        for name, parameter in self.trained.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"optimizer.{name}.{slot}": value for slot, value in state.items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"ema.{name}": value for name, value in (self.ema.state() if self.ema else {}).items()}
        everything = {name: sharded.whole(tensor.detach()) for name, tensor in tensors.items()}
        if self.place.rank == 0:
            writer.write(Checkpoint(self.progressed, everything, list(self.log)))

    def _resume(self, directory: str) -> None:
        found = newest(directory)
        if found is None:
            return
        self.progressed, self.log = found.progressed, list(found.log)
        for name, parameter in self.trained.items():
            with torch.no_grad():
                parameter.copy_(sharded.like(found.tensors[name], parameter))
            prefix = f"optimizer.{name}."
            slots = {key.removeprefix(prefix): value for key, value in found.tensors.items() if key.startswith(prefix)}
            self.optimizer.state[parameter] = {
                slot: value if slot == "step" else sharded.like(value, parameter) for slot, value in slots.items()
            }
            if f"best.{name}" in found.tensors:
                self.best[name] = sharded.like(found.tensors[f"best.{name}"], parameter)
        if self.ema:
            self.ema.load_state({name: found.tensors[f"ema.{name}"] for name in self.trained})
