"""The run file's `train` section: a recipe of towers, loss, batch and schedule, as frozen models.

Assumes: editing a recipe never re-embeds anything; what it says decides the weights, except BESIDE_THE_POINT.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_serializer, model_validator

from conjoin.encoders.options import TowerOptions, Tuning
from conjoin.pipeline import template
from conjoin.pipeline.section import Section

# What these say changes nothing about the weights that come out.
BESIDE_THE_POINT = {
    *("output", "workers", "min_workers", "parallel", "micro_batch_size", "gradient_checkpointing"),
    *("validate_every", "validation_rows", "checkpoint_every_s", "log"),
}
_OPTIONS = {field.name for field in fields(TowerOptions)} - {"seed"}
_TUNE = r"^(all|head|lora|last:[1-9][0-9]*)$"

# What an entry of `path` may name for itself.
COLUMNS = ("id", "group", "image", "text", "audio")

TrackerName = Literal["tensorboard", "mlflow", "wandb"]


class TowerConfig(Section):
    """One tower of the recipe."""

    model: str = Field(
        "builtin", description="builtin | efficientnet-lite0 | package:NAME | a local directory | a hub name"
    )
    tune: str = Field("all", pattern=_TUNE, description="all | head (frozen backbone) | last:N (blocks) | lora")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="rate of a block, as a share of the next one's; 1: the same"
    )
    lora_rank: int = Field(8, ge=1, le=1024, description="of the adapters that tune: lora trains")
    lora_alpha: float = Field(16.0, gt=0, description="adapters add alpha / rank times their product")
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    head: Literal["linear", "mlp", "none"] = Field("linear", description="none: the backbone's own vectors")
    items: Literal["first", "mean"] = Field("first", description="of a list of values: what embedding takes")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the backbone's features that a training step hides")
    size_px: int | None = Field(None, ge=16, le=1024, description="image side; default: the model's own")
    max_tokens: int | None = Field(None, ge=4, le=8192, description="text length; default 64")
    max_s: float | None = Field(None, gt=0, le=120, description="audio length in seconds; default 10")

    @property
    def frozen(self) -> bool:
        """Nothing of the backbone learns: its features may be computed once."""
        return self.tune == "head"

    def options(self, seed: int) -> TowerOptions:
        """How the tower is made."""
        return TowerOptions(**self.model_dump(include=_OPTIONS), seed=seed)

    def tuning(self, seed: int) -> Tuning:
        """What of it learns."""
        return Tuning(self.tune, self.lora_rank, self.lora_alpha, seed)

    @model_validator(mode="after")
    def _nothing_idle(self) -> TowerConfig:
        """Fields that would do nothing are mistakes."""
        if self.frozen and self.layer_decay != 1:
            raise ValueError("layer_decay does nothing with tune: head; remove it, or tune: all, last:N or lora")
        if self.tune != "lora" and (self.lora_rank, self.lora_alpha) != (8, 16.0):
            raise ValueError(f"lora_rank and lora_alpha do nothing with tune: {self.tune}; remove them, or tune: lora")
        return self


class TrainPath(Section):
    """Some of the training data, with columns of its own; a column that is not named is the source's."""

    path: str = Field(description="Parquet, CSV or WebDataset tars: a file, a glob, {000..331}, or a directory")
    weight: float = Field(1, gt=0, description="how often a row is seen per epoch: 2 is twice, 0.5 every other epoch")
    id: str | None = Field(None, description="default: the source's; of a tar, __key__")
    group: str | None = Field(None, description="default: the source's; of a tar, none. null: this path has none")
    image: str | None = Field(None, description="default: the source's; null: this path has none")
    text: str | None = Field(None, description="default: the source's; null: this path has none")
    audio: str | None = Field(None, description="default: the source's; null: this path has none")

    @field_validator("text")
    @classmethod
    def _template(cls, text: str | None) -> str | None:
        return text if text is None else template.checked(text)

    @property
    def named(self) -> dict[str, str | None]:
        """The columns that the run file names here, nulls included."""
        columns = [name for name in COLUMNS if name in self.model_fields_set]
        return {name: getattr(self, name) for name in columns if name != "id" or self.id is not None}

    @model_serializer
    def _said(self) -> dict[str, str | float | None]:
        """Without what the run file leaves out: null would say that the path lacks it."""
        return {"path": self.path, "weight": self.weight, **self.named}


def _shape(path: object) -> str:
    """So that an error names the wrong key of an entry, and not everything that the entry could have been."""
    return "<path>" if isinstance(path, str) else "<list>" if isinstance(path, list) else "<columns>"


_Path = Annotated[str, Tag("<path>")]
_Columns = Annotated[TrainPath, Tag("<columns>")]
_List = Annotated[list[Annotated[_Path | _Columns, Discriminator(_shape)]], Tag("<list>")]
_Paths = Annotated[_Path | _Columns | _List, Discriminator(_shape)]


class TrainConfig(Section):
    """A recipe: editing it never re-embeds anything."""

    path: _Paths | None = Field(
        None, description="default: the source; paths may have columns of their own, and in a list weights"
    )
    where: str | None = Field(None, description="SQL condition over columns: rows that may be trained on")
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
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="of the rate after warm-up: cosine to zero | wsd (stable, then a cooldown) | constant"
    )
    warmup: float = Field(0.05, ge=0, le=1, description="share of all steps")
    cooldown: float = Field(0.2, gt=0, le=1, description="share of all steps, the last ones; of schedule: wsd")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of a moving average of the parameters, validated and kept instead of them"
    )
    patience: int | None = Field(None, ge=1, description="stop after so many validations without a better hit@10")
    seed: int = 0
    workers: int = Field(1, ge=1, description="training workers; any number gives the same result")
    min_workers: int | None = Field(None, ge=1, description="go on with fewer when machines are lost; default: workers")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="each worker holds all parameters, or its share (FSDP2)"
    )
    precision: Literal["auto", "float32", "bf16"] = "auto"
    gradient_checkpointing: bool = Field(False, description="run blocks again in the backward pass instead of storing")
    compile: bool = Field(False, description="compile backbones that learn; steps get faster after slow first ones")
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
        if self.compile and self.parallel == "fsdp":
            raise ValueError("compile does not go with parallel: fsdp (torch 2.13 fails on it); choose one")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> TrainConfig:
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup {self.warmup} and cooldown {self.cooldown} are more than the whole run")
        if self.schedule != "wsd" and self.cooldown != 0.2:
            raise ValueError(f"cooldown does nothing with schedule: {self.schedule}; remove it, or schedule: wsd")
        return self

    def tower(self, modality: str) -> TowerConfig:
        """What the recipe says about a modality's tower, or the defaults."""
        return self.towers.get(modality, TowerConfig())
