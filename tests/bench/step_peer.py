"""sentence-transformers as a contender of train_step.py: `python step_peer.py KIND JOB.json`, a JSON line at the end.

`plain` has MultipleNegativesRankingLoss, `cached` its cached form; both symmetric. The clock runs over whole steps of
its trainer: PIL pictures in memory, of the final size, to normalised tensors, texts to ids, forward, backward, AdamW.
Assumes: the interpreter has sentence-transformers, datasets, accelerate and Pillow, but nothing of ours.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules.clip_model import CLIPModel
from transformers import TrainerCallback

_BOTH_WAYS = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
_SCALE = 1 / 0.07


class Clock(TrainerCallback):
    """Seconds since the training began, at the end of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.loss = 0.0

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(time.perf_counter() - self.started)

    def on_log(self, *_: object, logs: dict[str, Any], **__: object) -> None:
        self.loss = float(logs.get("loss", self.loss))


def dataset(job: dict[str, Any]) -> Dataset:
    """Pictures and texts by row number: neither is encoded on the way in, nor decoded at every epoch."""
    texts = json.loads(Path(job["folder"], "texts.json").read_text())
    pictures = [Image.fromarray(one) for one in np.load(Path(job["folder"], f"pixels-{job['size_px']}.npy"))]
    numbers = list(range(len(texts)))

    def chosen(rows: dict[str, list[int]]) -> dict[str, list[object]]:
        return {"image": [pictures[row] for row in rows["image"]], "text": [texts[row] for row in rows["text"]]}

    return Dataset.from_dict({"image": numbers, "text": numbers}).with_transform(chosen)


def main() -> None:
    kind, path = sys.argv[1:]
    job = json.loads(Path(path).read_text())
    torch.set_num_threads(job["threads"])
    model = SentenceTransformer(modules=[CLIPModel(job["towers"]["image"]["model"])], device="cpu")
    if kind == "plain":
        loss: torch.nn.Module = losses.MultipleNegativesRankingLoss(model, scale=_SCALE, **_BOTH_WAYS)
    else:
        loss = losses.CachedMultipleNegativesRankingLoss(
            model, scale=_SCALE, mini_batch_size=job["micro"], **_BOTH_WAYS
        )
    clock = Clock()
    with tempfile.TemporaryDirectory(dir=job["folder"]) as output:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=output,
            per_device_train_batch_size=job["batch"],
            max_steps=job["steps"],
            learning_rate=5e-4,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SentenceTransformerTrainer(
            model=model, args=arguments, train_dataset=dataset(job), loss=loss, callbacks=[clock]
        )
        trainer.train()
    print(json.dumps({"rows": [job["batch"]] * len(clock.ends), "ends": clock.ends, "loss": clock.loss}))


if __name__ == "__main__":
    main()
