"""What a training is about to do, said before it starts: rows, steps, memory, what learns, and repeated texts.

Assumes: memory is an estimate per worker from what autograd keeps of one row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from conjoin.encoders.joint import JointEncoder
    from conjoin.encoders.spec import Json
    from conjoin.pipeline.forward import Data
    from conjoin.pipeline.recipe import TrainConfig

_MANY_REPEATS = 0.1
_FLOAT = 4
_ADAMW = 3 * _FLOAT  # gradient and two moments


@dataclass(frozen=True, slots=True)
class Preflight:
    """repeated_texts: share of rows (of a sample of them, if they are many) whose text another one has too; of those
    unmasked_texts: in another group, so that they count as negatives. bytes_per_row: kept for the backward pass by the
    towers whose backbone learns; memory_bytes: of one worker, without its inputs.
    """

    rows: int
    groups: int
    validation_rows: int
    repeated_texts: float
    unmasked_texts: float
    steps: int
    steps_per_epoch: int
    global_batch_size: int
    workers: int
    parameters: int
    trained_parameters: int
    bytes_per_row: int
    memory_bytes: int

    def to_json(self) -> dict[str, Json]:
        return cast("dict[str, Json]", asdict(self))

    def facts(self) -> dict[str, float | str]:
        """For people, in a line."""
        frozen = 1 - self.trained_parameters / max(self.parameters, 1)
        found: dict[str, float | str] = {
            "rows": f"{self.rows:,}",
            "steps": f"{self.steps:,} of {self.global_batch_size:,}",
            "frozen": f"{frozen:.0%} of {self.parameters / 1e6:.1f}M parameters",
            "memory": f"{self.memory_bytes / 1e9:.1f} GB a worker",
        }
        if self.repeated_texts:
            found["repeated texts"] = f"{self.repeated_texts:.0%}"
        if warning := self.warning():
            found["warning"] = warning
        return found

    def warning(self) -> str:
        """What had better be looked at first; empty if nothing."""
        if self.rows < self.global_batch_size:
            return f"{self.rows:,} rows are less than one batch of {self.global_batch_size:,}"
        if self.unmasked_texts > _MANY_REPEATS:
            return (
                f"{self.unmasked_texts:.0%} of the texts repeat and are each other's negatives: name a column that is "
                "equal for them in source.group"
            )
        return ""


def look(encoder: JointEncoder, data: Data, recipe: TrainConfig) -> Preflight:
    """encoder: as it is trained, on the CPU. Reads texts of the source, to see how many repeat."""
    from conjoin.encoders.footprint import bytes_per_row
    from conjoin.pipeline.captions import duplicates
    from conjoin.pipeline.order import Order

    repeats = duplicates(data.train)
    unmasked = repeats.repeated if recipe.same_group == "negative" else repeats.apart
    order = Order(data.train.reading, recipe.global_batch_size, recipe.seed, weights=data.train.weights)
    raws = [name for name in encoder.spec.towers if name not in data.features]
    per_row = sum(bytes_per_row(encoder.tower(name)) for name in raws)
    sizes = _sizes(encoder)
    spread = recipe.workers if recipe.parallel == "fsdp" else 1
    local = -(-recipe.global_batch_size // recipe.workers)
    micro = local if recipe.micro_batch_size == "auto" else min(local, recipe.micro_batch_size)
    state = (sizes["all"] * _FLOAT + sizes["trained"] * _ADAMW) // spread
    return Preflight(
        rows=len(data.train),
        groups=repeats.groups,
        validation_rows=len(data.validation),
        repeated_texts=repeats.repeated,
        unmasked_texts=unmasked,
        steps=max(1, round(recipe.epochs * order.steps_per_epoch)),
        steps_per_epoch=order.steps_per_epoch,
        global_batch_size=recipe.global_batch_size,
        workers=recipe.workers,
        parameters=sizes["all"],
        trained_parameters=sizes["trained"],
        bytes_per_row=per_row,
        memory_bytes=state + micro * per_row,
    )


def _sizes(encoder: JointEncoder) -> Mapping[str, int]:
    parameters = list(encoder.parameters())
    return {
        "all": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
    }
