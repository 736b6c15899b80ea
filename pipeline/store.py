"""The Lance table: stage fragments on workers, commit once on the driver, open a version or tag; quarantine.

Assumes: only this module knows of fragments and transactions.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from conjoin.pipeline.section import Section


class TableConfig(Section):
    """Where the vectors go; `<directory or bucket>/<name>.lance` is a plain Lance dataset."""

    path: str = Field(description="<directory or bucket>/<name>.lance")
    vector_dtype: Literal["auto", "float32", "float16"] = Field("auto", description="decided when the table is created")
    thumbnail_px: Literal["auto"] | int = Field("auto", description="auto: 96 where the source holds bytes; 0: none")
    ann_recall: float = Field(0.99, gt=0, le=1, description="recall@10 that an approximate index must reach")
