"""What a recipe says about one tower: how it is made, and what of it learns.

Assumes: None and `auto` mean the model's own value; what was chosen in the end is in the tower's spec.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class TowerOptions:
    """model: builtin, efficientnet-lite0, `package:NAME`, a local directory or a hub name.

    max_tokens: `own` is as many as a pretrained model reads; None is 64, or fewer where it reads fewer.
    width: of the built-in backbones: 256 (text), 32 (picture, widening to 8 times that) and 192 (audio) by default.
    """

    model: str = "builtin"
    pooling: Literal["auto", "mean", "cls", "last"] = "auto"
    head: Literal["linear", "mlp", "none"] = "linear"
    items: Literal["first", "mean"] = "first"
    size_px: int | None = None
    max_tokens: int | Literal["own"] | None = None
    max_s: float | None = None
    width: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Tuning:
    """What of a tower learns beside its head, and how; it leaves no trace in a saved encoder.

    tune: all, head (nothing else), last:N (the last N blocks and what follows them) or lora (adapters in every block).
    lora_rank, lora_alpha: an adapter adds alpha / rank * B A to a weight, B starting at zero; seed: of A.
    """

    tune: str = "all"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    seed: int = 0
