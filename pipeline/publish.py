"""Gates, then one tag move; rollback; history.

Assumes: readers use the tag `live`; nothing is visible to them before it moves.
"""

from __future__ import annotations

from pydantic import Field

from conjoin.pipeline.section import Section


class Gates(Section):
    """What must hold before readers see a version."""

    row_change: float = Field(0.05, ge=0, description="largest relative change of the row count against live")
    duplicate_vectors: float = Field(
        0.5, ge=0, le=1, description="largest share of vectors that equal another one of different content"
    )
