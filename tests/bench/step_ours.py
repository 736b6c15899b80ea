"""One contender of train_step.py in a process of its own: `python step_ours.py KIND JOB.json`, a JSON line at the end.

`bare` is the plain torch step, `step` our step with decoded values in memory, `whole` our training on Ray; `memory`
is `step` with the process's peak. Assumes: the job's folder was filled by train_step.prepare.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

if TYPE_CHECKING:
    from conjoin.encoders.joint import JointEncoder
    from conjoin.pipeline.fit import Loop
    from conjoin.pipeline.recipe import TrainConfig


@dataclass(frozen=True, slots=True)
class Job:
    """micro: rows of a forward pass; towers: as in a run file; size_px: of the pictures in memory."""

    folder: str
    towers: Mapping[str, Mapping[str, object]]
    size_px: int
    dim: int
    batch: int
    micro: int
    steps: int
    workers: int
    threads: int

    @property
    def texts(self) -> list[str]:
        found: list[str] = json.loads(Path(self.folder, "texts.json").read_text())
        return found

    @property
    def pixels(self) -> np.ndarray:
        return np.load(Path(self.folder, f"pixels-{self.size_px}.npy"))

    def batches(self, num_rows: int) -> Iterator[np.ndarray]:
        """Rows of each step, epoch after epoch; rows come again where a batch is larger than the data."""
        rng = np.random.default_rng(0)
        order = np.concatenate([rng.permutation(num_rows) for _ in range(-(-self.steps * self.batch // num_rows))])
        yield from order[: self.steps * self.batch].reshape(self.steps, self.batch)


def built(job: Job) -> JointEncoder:
    from conjoin.encoders.joint import build
    from conjoin.encoders.options import TowerOptions

    return build({name: TowerOptions(**options) for name, options in job.towers.items()}, job.dim, job.texts)


def bare(job: Job) -> dict[str, object]:
    """Towers, symmetric InfoNCE and AdamW; pixels are uint8 and texts are token ids before the clock starts."""
    encoder, texts, pixels = built(job), job.texts, job.pixels
    model = _Clip(job, encoder) if "model" in job.towers["image"] else encoder
    log_scale = encoder.log_scales["image_text"]
    parameters = [p for p in model.parameters() if p is not log_scale] + [log_scale]
    inputs = [
        {
            "image": {"pixels": torch.from_numpy(pixels[rows])},
            "text": encoder.collate("text", [texts[row] for row in rows]),
        }
        for rows in job.batches(len(texts))
    ]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4)
    ends, started = [], time.perf_counter()
    for step in inputs:
        optimizer.zero_grad()
        image, text = (model.encode(name, value) for name, value in step.items())
        logits = log_scale.exp() * image @ text.T
        own = torch.arange(len(logits))
        loss = (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2
        loss.backward()
        optimizer.step()
        ends.append(time.perf_counter() - started)
    return {"rows": [job.batch] * job.steps, "ends": ends, "loss": float(loss)}


class _Clip(torch.nn.Module):
    """The library's own model, called without anything of ours."""

    def __init__(self, job: Job, encoder: JointEncoder) -> None:
        from transformers import CLIPModel

        super().__init__()
        self.model = CLIPModel.from_pretrained(str(job.towers["image"]["model"]))
        self.model.logit_scale.requires_grad_(False)
        transform = encoder.spec.towers["image"].transform
        self.mean, self.std = torch.tensor(transform.mean), torch.tensor(transform.std)

    def encode(self, name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if name == "text":
            found = self.model.get_text_features(**inputs)
        else:
            values = (inputs["pixels"].float() / 255 - self.mean) / self.std
            found = self.model.get_image_features(values.permute(0, 3, 1, 2))
        return functional.normalize(getattr(found, "pooler_output", found), dim=-1)


def step(job: Job) -> dict[str, object]:
    """Loop._step; reading and decoding are over before the clock starts."""
    loop, texts, pixels = _loop(job), job.texts, job.pixels
    ends, started, loss = [], time.perf_counter(), 0.0
    for number, rows in enumerate(job.batches(len(texts))):
        loss = loop._step(number, _values(rows, texts, pixels))["loss"]
        ends.append(time.perf_counter() - started)
    return {"rows": [job.batch] * job.steps, "ends": ends, "loss": loss}


def memory(job: Job) -> dict[str, object]:
    """The same on a batch of the job's size, whose values are copies of their own; bytes, seconds of the last step."""
    loop, texts, pixels = _loop(job, rows=job.batch), job.texts, job.pixels
    values = _values(np.arange(job.batch) % len(texts), texts, pixels, np.arange(job.batch))
    size = sum(values[name].num_bytes for name in ("image", "text"))
    before = _peak_bytes()
    for number in range(job.steps):
        started = time.perf_counter()
        loop._step(number, values)
    seconds = time.perf_counter() - started
    return {"peak": _peak_bytes(), "before": before, "inputs": size, "seconds": seconds}


def _peak_bytes() -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) << 10


def _loop(job: Job, rows: int = 0) -> Loop:
    """A loop over rows in memory, without Ray."""
    from conjoin.pipeline.custom import Custom
    from conjoin.pipeline.fit import Loop
    from conjoin.pipeline.forward import Data, Forward, Place
    from conjoin.pipeline.mixture import Part
    from conjoin.pipeline.rank import objective
    from conjoin.pipeline.selection import Selection
    from conjoin.pipeline.source import SourceConfig

    recipe, num_rows = _recipe(job), rows or len(job.texts)
    zeros, every = np.zeros(num_rows, np.int64), np.arange(num_rows)
    source = SourceConfig(path="made.parquet", id="id", image="image", text="caption")
    part = Part(source, "Parquet", (), ())
    selection = Selection((part,), ("made.parquet",), (0,), zeros, zeros, every, every)
    encoder = built(job)
    place = Place(0, 1, torch.device("cpu"), "float32")
    forward = Forward(encoder, Data(selection, selection.taken(zeros[:0]), {}), recipe, place, job.micro)
    return Loop(encoder, forward, objective(recipe, Custom()), job.folder, ())


def _values(rows: np.ndarray, texts: list[str], pixels: np.ndarray, positions: np.ndarray | None = None) -> dict:
    from conjoin.pipeline.steps import Decoded

    there = np.ones(len(rows), bool)
    return {
        "rows": rows if positions is None else positions,
        "image": Decoded([pixels[row].copy() for row in rows], there),
        "text": Decoded([texts[row] for row in rows], there),
    }


def _recipe(job: Job, **more: object) -> TrainConfig:
    from conjoin.pipeline.recipe import TrainConfig

    fields = {"dim": job.dim, "global_batch_size": job.batch, "micro_batch_size": job.micro, "towers": job.towers}
    return TrainConfig.model_validate({**fields, "workers": job.workers, "precision": "float32", **more})


def whole(job: Job) -> dict[str, object]:
    """conjoin.pipeline.train.train, with a checkpoint in the middle; times from its log."""
    import tempfile

    from conjoin.pipeline.source import SourceConfig, Split
    from conjoin.pipeline.train import train

    source = SourceConfig(
        path=str(Path(job.folder, "rows.parquet")),
        id="id",
        image="image",
        text="caption",
        split=Split(validation=0, test=0),
    )
    steps_per_epoch = -(-len(job.texts) // job.batch)
    with tempfile.TemporaryDirectory(dir=job.folder) as output:
        recipe = _recipe(
            job,
            output=output,
            epochs=job.steps / steps_per_epoch,
            validate_every=max(1, job.steps // 2),
            checkpoint_every_s=0,
        )
        report = train("bench", source, recipe)
        log = [json.loads(line) for line in Path(report.folder, "log.jsonl").read_text().splitlines()]
    per_epoch = [min(job.batch, report.rows - start) for start in range(0, report.rows, job.batch)]
    rows = [per_epoch[number % len(per_epoch)] for number in range(len(log))]
    ends = [sum(rows[: number + 1]) / record["samples_per_s"] for number, record in enumerate(log)]
    return {"rows": rows, "ends": ends, "loss": log[-1]["loss"]}


def main() -> None:
    kind, path = sys.argv[1:]
    job = Job(**json.loads(Path(path).read_text()))
    torch.set_num_threads(job.threads)
    print(json.dumps({"bare": bare, "step": step, "memory": memory, "whole": whole}[kind](job)))


if __name__ == "__main__":
    main()
