"""A catalog: what a run needs to know, the sections of one run file side by side.

Assumes: it pickles, since every worker gets it; local paths in it are absolute, since workers have other directories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from conjoin.pipeline.storage import is_s3

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

    @property
    def paths(self) -> tuple[str, ...]:
        """The source's paths, one or several."""
        path = self.source.path
        return (path,) if isinstance(path, str) else tuple(path)

    def reading(self, paths: Sequence[str]) -> Catalog:
        """The same catalog with its source elsewhere."""
        return replace(self, source=self.source.model_copy(update={"path": list(paths)}))

    def absolute(self) -> Catalog:
        """The same with local paths made absolute."""
        table = self.table.model_copy(update={"path": absolute(self.table.path)})
        local = replace(self, encoder=absolute(self.encoder), table=table)
        return local.reading([absolute(path) for path in self.paths])


def absolute(uri: str) -> str:
    """A bucket's URI as it is; a local path from the root, without file://."""
    return uri.rstrip("/") if is_s3(uri) else str(Path(uri.removeprefix("file://")).absolute())
