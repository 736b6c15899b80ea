"""The run file's `upkeep` section: how much of a table's past stays, and when its files are put together.

Assumes: compaction.py and cleaning.py read it; readers of `live` see none of what it decides.
"""

from __future__ import annotations

from pydantic import Field

from conjoin.pipeline.section import Section

# Lance removes files that no version of the head's line names once they are so old, whatever tag a version beside the
# head bears: a tag `rejected-*` must be gone before.
ORPHAN_DAYS = 7


class Upkeep(Section):
    """How long things stay, and what a night may spend on putting files together."""

    keep_days: float = Field(30, ge=0, description="a published version stays so long ..")
    keep_versions: int = Field(7, ge=1, description=".. and so many of the newest stay in any case")
    keep_rejected_days: float = Field(
        5, ge=0, le=ORPHAN_DAYS - 1, description="versions that failed their gates, for who wants to look"
    )
    keep_run_days: float = Field(7, ge=0, description="plans and unit records of nights that are over")
    orphan_days: float = Field(ORPHAN_DAYS, ge=1, description="files that no version names, of nights that died")
    small_fragments: int = Field(16, ge=1, description="more fragments under 16 MB than these are put together")
    deleted_share: float = Field(0.2, gt=0, le=1, description="a fragment with more deleted rows is written anew")
    compact_mb: int = Field(1024, ge=0, description="what one night may put together; 0: nothing")
