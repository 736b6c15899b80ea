"""One rank of a training run, inside Ray Train: encoder, place, micro-batches and loop; rank 0 saves what comes out.

Assumes: every rank starts from the same saved encoder. What is trained is named alike in every process, so that
checkpoints and the saved encoders are made from tensors by name, however a rank holds them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conjoin.encoders import sharded, tuning
from conjoin.encoders.footprint import micro_batch_size
from conjoin.encoders.objective import Objective
from conjoin.pipeline import calibration, storage
from conjoin.pipeline.checkpoints import save_encoder
from conjoin.pipeline.errors import EncoderError, TrainError
from conjoin.pipeline.fit import Loop
from conjoin.pipeline.forward import Data, Forward, Place

if TYPE_CHECKING:
    from conjoin.encoders.joint import JointEncoder
    from conjoin.encoders.towers import Tower
    from conjoin.pipeline.custom import Custom
    from conjoin.pipeline.recipe import TrainConfig

# Of the machine's or the card's memory: the rest is for parameters, inputs and everybody else.
_CPU_SHARE, _GPU_SHARE = 0.25, 0.6


@dataclass(frozen=True, slots=True)
class Job:
    """What every rank is given. data: a reference in Ray's object store; bytes_per_row: of all trained towers."""

    data: Any
    recipe: TrainConfig
    folder: str
    sink: Any
    threads: int
    bytes_per_row: int
    custom: Custom


def work(config: dict[str, Job]) -> None:
    """Run one rank to the end. Raises what Ray may try again; what would fail again is left in the sink."""
    import ray

    job = config["job"]
    torch.set_num_threads(job.threads)
    try:
        loop = _loop(job, _place(job.recipe))
        loop.run(lambda records: ray.get(job.sink.put.remote(records)))
    except (TrainError, EncoderError) as error:  # the same on every rank, and at every try
        ray.get(job.sink.fail.remote(error))
        return
    _save(loop, job)


def _loop(job: Job, place: Place) -> Loop:
    import ray

    from conjoin.pipeline.embedder import load

    encoder = prepared(load(storage.join(job.folder, "initial"), device="cpu").encoder, job.recipe)
    encoder = encoder.to(place.device)
    data: Data = ray.get(job.data)
    for name in encoder.spec.towers:
        if name not in data.features:
            _lay_out(encoder.tower(name), job.recipe, place)
    forward = Forward(encoder, data, job.recipe, place, _micro(job, place))
    return Loop(encoder, forward, objective(job.recipe, job.custom), job.folder, job.custom.callbacks)


def objective(recipe: TrainConfig, custom: Custom) -> Objective:
    """The recipe's loss over its pairs."""
    weights = {frozenset(name.split("-")): weight for name, weight in recipe.pairs.items()}
    prefixes = sorted({recipe.dim, *recipe.matryoshka}, reverse=True) if recipe.matryoshka else []
    return Objective(
        loss=recipe.loss,
        same_group=recipe.same_group,
        weights=weights,
        matryoshka=prefixes,
        margin=recipe.margin,
        negatives=recipe.negatives,
        custom=custom.loss,
    )


def prepared(encoder: JointEncoder, recipe: TrainConfig) -> JointEncoder:
    """The encoder with only those parameters trainable that the recipe tunes; the same names in every process.

    Raises EncoderError for more blocks than a backbone has, or adapters without their package.
    """
    for name in encoder.spec.towers:
        try:
            tuning.freeze(encoder.tower(name), recipe.tower(name).tuning(recipe.seed))
        except ValueError as error:
            raise EncoderError(f"the {name} tower cannot be tuned so: {error}", next="Check train.towers") from error
    return encoder


def _lay_out(tower: Tower, recipe: TrainConfig, place: Place) -> None:
    """Where the tower's activations and parameters are kept; in this order, before there is an optimizer."""
    if recipe.gradient_checkpointing:
        tuning.checkpoint_activations(tower)
    if place.sharded:
        stack = [block for block in tuning.blocks(tower.backbone) if block is not tower.backbone]
        sharded.shard(tower.backbone, stack, place.device)
    if recipe.compile:
        try:
            tuning.compile_(tower)
        except ValueError as error:
            raise EncoderError(str(error), next="Leave train.compile out") from error


def memory_bytes() -> int:
    """Of this machine, or of the container that this process may use."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    except (OSError, ValueError):
        return total


def _place(recipe: TrainConfig) -> Place:
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    precision = recipe.precision if recipe.precision != "auto" else ("bf16" if device.type == "cuda" else "float32")
    world = context.get_world_size()
    spread = recipe.parallel == "fsdp" and world > 1
    return Place(context.get_world_rank(), world, device, precision, spread)


def _micro(job: Job, place: Place) -> int:
    if job.recipe.micro_batch_size != "auto":
        return job.recipe.micro_batch_size
    import ray.train

    most = -(-job.recipe.global_batch_size // place.world)
    if place.device.type == "cuda":
        budget = int(torch.cuda.mem_get_info(place.device)[0] * _GPU_SHARE)
    else:
        budget = int(memory_bytes() * _CPU_SHARE / ray.train.get_context().get_local_world_size())
    return micro_batch_size(job.bytes_per_row, budget, most)


def _save(loop: Loop, job: Job) -> None:
    """`last` and `best`: ordinary encoders, made anew from the first one and the tensors that were trained.

    `best` is calibrated as well.
    """
    from conjoin.pipeline.embedder import read_spec

    with loop.averaged():
        last = {name: sharded.whole(p.detach()).clone() for name, p in loop.trained.items()}
    best = {name: sharded.whole(p) for name, p in loop.best.items()} or last
    if loop.place.rank == 0:
        _write(job, "last", last, loop.progressed.step)
        _write(job, "best", best, loop.progressed.best_step)
    curves = loop.calibrated()
    if loop.place.rank == 0 and curves:
        folder = storage.join(job.folder, "best")
        calibration.write(folder, read_spec(folder)[1], curves, "validation rows of its training")
    if loop.place.world > 1:
        torch.distributed.barrier()


def _write(job: Job, name: str, tensors: Mapping[str, torch.Tensor], step: int) -> None:
    from conjoin.pipeline.embedder import load

    encoder = prepared(load(storage.join(job.folder, "initial"), device="cpu").encoder, job.recipe)
    with torch.no_grad():
        for parameter, value in encoder.named_parameters():
            if parameter in tensors:
                value.copy_(tensors[parameter])
    save_encoder(encoder, storage.join(job.folder, name), {"step": step})


class Sink:
    """Where rank 0 leaves its records for the driver; an actor, so that the two may be on different machines."""

    def __init__(self) -> None:
        self._records: list[dict[str, float]] = []
        self._error: TrainError | EncoderError | None = None

    def put(self, records: Sequence[dict[str, float]]) -> None:
        self._records += records

    def drain(self) -> list[dict[str, float]]:
        drained, self._records = self._records, []
        return drained

    def fail(self, error: TrainError | EncoderError) -> None:
        self._error = error

    def failed(self) -> TrainError | EncoderError | None:
        return self._error
