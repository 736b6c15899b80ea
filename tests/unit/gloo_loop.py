"""One rank of test_fit.py: `python gloo_loop.py RANK WORLD STORE FOLDER PARALLEL STEPS` trains on from FOLDER's
checkpoint to STEPS, saves another one, and writes the trained tensors to FOLDER/RANK.pt.

Assumes: no Ray; a rank's rows are decoded values made here, in float64, so that what differs is a mistake.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from conjoin.encoders import sharded
from conjoin.encoders.joint import build
from conjoin.encoders.options import TowerOptions
from conjoin.pipeline.checkpoints import Writer
from conjoin.pipeline.custom import Custom
from conjoin.pipeline.fit import Callback, Loop
from conjoin.pipeline.forward import Data, Forward, Place
from conjoin.pipeline.mixture import Part
from conjoin.pipeline.order import share
from conjoin.pipeline.rank import objective
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.selection import Selection
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.steps import Decoded

NUM_ROWS = 22
RECIPE = TrainConfig.model_validate(
    {"dim": 8, "global_batch_size": 9, "epochs": 2, "lr": 1e-2, "towers": {"text": {"dropout": 0.3}}}
)
TEXTS = [f"{'a very long and ' * (i % 4)}thing number {i}" for i in range(NUM_ROWS)]
PICTURES = np.random.default_rng(0).integers(0, 255, (NUM_ROWS, 16, 16, 3)).astype(np.uint8)
HAS_PICTURE = np.arange(NUM_ROWS) % 5 != 4


def loop(folder: Path, place: Place, micro: int, callbacks: Sequence[Callback] = (), **changes: object) -> Loop:
    """A loop over the made rows, resumed from the folder's newest checkpoint."""
    recipe = RECIPE.model_copy(update=changes)
    towers = {"image": TowerOptions(size_px=16, width=8), "text": TowerOptions(width=16, max_tokens=16)}
    encoder = build(towers, 8, TEXTS, recipe.loss).double()
    zeros = np.zeros(NUM_ROWS, np.int64)
    source = SourceConfig(path="made.parquet", id="id", group="group", image="image", text="text")
    columns = (zeros, zeros, np.arange(NUM_ROWS), np.arange(NUM_ROWS) // 2)
    rows = Selection((Part(source, "Parquet", (), ()),), ("made.parquet",), (0,), *columns)
    if place.sharded:
        for name in encoder.spec.towers:
            backbone = encoder.tower(name).backbone
            sharded.shard(backbone, list(getattr(backbone, "layers", getattr(backbone, "stages", []))), place.device)
    forward = Forward(encoder, Data(rows, rows.taken(zeros[:0]), {}), recipe, place, micro)
    found = Loop(encoder, forward, objective(recipe, Custom()), str(folder), callbacks)
    found._resume(f"{folder}/checkpoints")
    return found


def train_to(found: Loop, steps: int) -> None:
    """What Loop.run does, with rows that are decoded here."""
    from dataclasses import replace

    for step in range(found.progressed.step, steps):
        rows = share(found._global_rows(step), found.place.rank, found.place.world)
        there = HAS_PICTURE[rows]
        values = {
            "rows": rows,
            "image": Decoded(list(PICTURES[rows[there]]), there),
            "text": Decoded([TEXTS[row] for row in rows], np.ones(len(rows), bool)),
        }
        found.log.append(found._step(step, values))
        found.progressed = replace(found.progressed, step=step + 1)


def save(found: Loop, folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint in the folder; returns the trained tensors, whole."""
    with Writer(f"{folder}/checkpoints") as writer:
        found._save(writer)
    return {name: sharded.whole(p.detach()).clone() for name, p in found.trained.items()}


def main() -> None:
    rank, world, store, folder, parallel, steps = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    place = Place(int(rank), int(world), torch.device("cpu"), "float32", parallel == "fsdp")
    found = loop(Path(folder), place, micro=2)
    train_to(found, int(steps))
    tensors = save(found, Path(folder))
    torch.save({"tensors": tensors, "losses": [record["loss"] for record in found.log]}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
