"""The run file's `train` section: a recipe of towers, loss, batch and schedule, as frozen models.

Assumes: editing a recipe never re-embeds anything; what it says decides the weights, except BESIDE_THE_POINT.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from conjoin.pipeline.section import Section

# What these say changes nothing about the weights that come out.
BESIDE_THE_POINT = {"output", "workers", "validate_every", "checkpoint_every_s"}


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
    loss: Literal["infonce"] = "infonce"
    global_batch_size: int = Field(1024, ge=2, description="all workers together")
    epochs: float = Field(10, gt=0)
    lr: float = Field(5e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_grad_norm: float = Field(1.0, gt=0, description="longest gradient of a step, over all ranks and parameters")
    warmup: float = Field(0.05, ge=0, le=1, description="share of all steps")
    seed: int = 0
    workers: int = Field(1, ge=1, description="training workers; any number gives the same result")
    precision: Literal["auto", "float32", "bf16"] = "auto"
    validate_every: Literal["epoch"] | int = Field("epoch", description="steps between validations")
    checkpoint_every_s: float = Field(30, ge=0, description="at the next validation after so many seconds; 0: at each")

    def tower(self, modality: str) -> TowerConfig:
        """What the recipe says about a modality's tower, or the defaults."""
        return self.towers.get(modality, TowerConfig())
