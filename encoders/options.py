"""What a recipe says about one tower before it exists.

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
