"""How long work reports itself: a stage tells how far it is; who shows it is the caller's matter.

Assumes: a callback is cheap and never raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Progress:
    """step: `plan`, `embed`, `features`, `train`, ...; done and total in `unit`; facts: latest figures by name."""

    step: str
    done: float
    total: float
    unit: str = "rows"
    facts: Mapping[str, float | str] = field(default_factory=dict)


ShowProgress = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """For callers who do not watch."""
