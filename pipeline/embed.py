"""Ray Data actor pool: units of the plan in, staged fragments out.

Assumes: a unit's output depends on the plan and the encoder alone, never on who ran it or when.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from conjoin.pipeline.section import Section


class EmbedConfig(Section):
    """How the encoders run over the catalog."""

    precision: Literal["auto", "float32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, float32 elsewhere")
    max_bad_fraction: float = Field(0.001, ge=0, le=1, description="more quarantined rows than this stop the night")
    actors: Literal["auto"] | int = Field("auto", description="auto: one per GPU; one on a machine without")
    unit_rows: Literal["auto"] | int = Field(
        "auto", description="rows of one unit (one fragment); auto: about 64 MB of output"
    )
