"""Source against state: what a run would do, frozen and cut into units.

Assumes: planning is pure: it reads, decides and writes nothing but the plan itself.
"""

from __future__ import annotations

from pydantic import Field

from conjoin.pipeline.section import Section


class Limits(Section):
    """A plan above these does not start."""

    hours: float | None = Field(None, gt=0)
    cost: float | None = Field(None, gt=0)
