"""A catalog: what a run needs to know, the sections of one run file side by side.

Assumes: it pickles, since every worker gets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conjoin.pipeline.embed import EmbedConfig
    from conjoin.pipeline.source import SourceConfig
    from conjoin.pipeline.store import TableConfig


@dataclass(frozen=True, slots=True)
class Catalog:
    """name: the table's name in SQL; encoder: the folder of a trained encoder, local or s3://."""

    name: str
    source: SourceConfig
    encoder: str
    table: TableConfig
    embed: EmbedConfig
