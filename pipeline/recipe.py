"""The run file's `train` section: a recipe of towers, loss, batch and schedule, as frozen models.

Assumes: editing a recipe never re-embeds anything; what it says decides the weights, except BESIDE_THE_POINT.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from conjoin.pipeline.section import Section

# What these say changes nothing about the weights that come out.
BESIDE_THE_POINT = {
    *("output", "workers", "min_workers", "parallel", "micro_batch_size"),
    *("validate_every", "validation_rows", "checkpoint_every_s", "log"),
}

TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class TowerConfig(Section):
    """One tower of the recipe."""

    model: str = Field(
        "builtin", description="builtin | efficientnet-lite0 | package:NAME | a local directory | a hub name"
    )
    tune: Literal["all", "head"] = Field("all", description="all | head (frozen backbone)")
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    head: Literal["linear", "mlp", "none"] = Field("linear", description="none: the backbone's own vectors")
    items: Literal["first", "mean"] = Field("first", description="of a list of values: what embedding takes")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the backbone's features that a training step hides")
    size_px: int | None = Field(None, ge=16, le=1024, description="image side; default: the model's own")
    max_tokens: int | None = Field(None, ge=4, le=8192, description="text length; default 64")
    max_s: float | None = Field(None, gt=0, le=120, description="audio length in seconds; default 10")


class TrainConfig(Section):
    """A recipe: editing it never re-embeds anything."""

    path: str | list[str] | None = Field(None, description="default: the source")
    where: str | None = Field(None, description="SQL condition over the source's columns: rows that may be trained on")
    output: str = Field("encoders", description="a folder per training run is made below it")
    towers: dict[str, TowerConfig] = Field(default_factory=dict, description="per modality; default: builtin")
    dim: int = Field(256, ge=2, le=8192)
    loss: Literal["infonce", "sigmoid", "triplet"] = "infonce"
    same_group: Literal["mask", "positive", "negative"] = Field(
        "mask", description="records of one group: left out of each other's negatives, counted as right, or as wrong"
    )
    pairs: dict[str, float] = Field(
        default_factory=dict, description="trained pairs of modalities and weights (image-text: 1); default: all alike"
    )
    matryoshka: list[int] = Field(default_factory=list, description="shorter prefixes of the vectors to train along")
    margin: float = Field(0.2, gt=0, le=2, description="triplet: of cosine similarity")
    negatives: Literal["hardest", "semi-hard"] = Field("hardest", description="triplet: which one of the global batch")
    global_batch_size: int = Field(1024, ge=2, description="all workers together")
    micro_batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="per worker and forward pass; never changes the result"
    )
    epochs: float = Field(10, gt=0)
    lr: float = Field(5e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad_norm: float = Field(1.0, gt=0, description="longest gradient of a step, over all ranks and parameters")
    warmup: float = Field(0.05, ge=0, le=1, description="share of all steps")
    seed: int = 0
    workers: int = Field(1, ge=1, description="training workers; any number gives the same result")
    min_workers: int | None = Field(None, ge=1, description="go on with fewer when machines are lost; default: workers")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="each worker holds all parameters, or its share (FSDP2)"
    )
    precision: Literal["auto", "float32", "bf16"] = "auto"
    validate_every: Literal["epoch"] | int = Field("epoch", description="steps between validations")
    validation_rows: int = Field(2048, ge=2, description="at most so many of the validation split")
    log: list[TrackerName] = Field(
        default_factory=list, description="where figures go besides log.jsonl: tensorboard, mlflow, wandb"
    )
    checkpoint_every_s: float = Field(30, ge=0, description="at the next validation after so many seconds; 0: at each")

    @field_validator("pairs")
    @classmethod
    def _two_each(cls, pairs: dict[str, float]) -> dict[str, float]:
        for name, weight in pairs.items():
            first, _, second = name.partition("-")
            if not {first, second} <= {"image", "text", "audio"} or first == second:
                raise ValueError(f"{name!r} is no pair of modalities; write image-text, audio-text or audio-image")
            if weight < 0:
                raise ValueError(f"the weight of {name} is below 0")
        if pairs and not any(pairs.values()):
            raise ValueError("every pair has the weight 0")
        return pairs

    @model_validator(mode="after")
    def _prefixes(self) -> TrainConfig:
        if any(not 1 <= dim <= self.dim for dim in self.matryoshka):
            raise ValueError(f"train.matryoshka: prefixes are between 1 and dim, {self.dim}")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError("train.min_workers is above train.workers")
        return self

    def tower(self, modality: str) -> TowerConfig:
        """What the recipe says about a modality's tower, or the defaults."""
        return self.towers.get(modality, TowerConfig())
