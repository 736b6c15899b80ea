"""What a reading command or `cj.open` is given: a run file, a table's path, or a directory with one table.

Assumes: a run file is read only where one is named, so that opening a table's own path stays quick.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conjoin.pipeline.query import open_table

if TYPE_CHECKING:
    from conjoin.pipeline.query import Table


def open_target(
    path: str | Path,
    version: str | int | None = "live",
    name: str | None = None,
    tables: Mapping[str, str | Sequence[str]] | None = None,
) -> Table:
    """A table for queries: of a run file with its `tables`, by its own path, or the only one of a directory.

    version: a tag (`live`, `previous`), a number, or None for the newest, published or not; name: what SQL calls it;
    tables: Parquet, CSV and Lance paths by the name that SQL may join them under, besides the run file's.
    Raises ConfigError for the run file, TableError if there is no such table or version.
    """
    target = str(path).rstrip("/")
    if target.endswith(".lance") or "://" in target or Path(target).is_dir():
        return open_table(target, version, name, tables)
    from conjoin.jobs.config import load

    config = load(target)
    named = {name: table.path for name, table in config.tables.items()}
    return open_table(config.table.path, version, name or config.name, {**named, **(tables or {})})


def open_given(target: str) -> Table:
    """For a command, which takes a run file or a table's path and no directory. Raises as open_target does."""
    if not target.rstrip("/").endswith(".lance") and ("://" in target or Path(target).is_dir()):
        from conjoin.jobs.config import table_of

        table_of(target)  # says why not
    return open_target(target)
