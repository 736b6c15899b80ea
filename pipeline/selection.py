"""Which rows may be trained on: the split by group and the recipe's `where`, read from cheap columns only.

Assumes: rows are listed in the order of the source, so that a position here is a fixed (file, row group, row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from conjoin.pipeline import utf8
from conjoin.pipeline.errors import ConfigError, TrainError
from conjoin.pipeline.progress import Progress, ShowProgress

if TYPE_CHECKING:
    import pyarrow as pa

    from conjoin.pipeline.source import SourceConfig, SourceFile

Positions = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows of the source by position: files[file_N], row_group_N and row_N within it, group_N (int64, equal = same)."""

    files: tuple[str, ...]
    file_N: Positions
    row_group_N: Positions
    row_N: Positions
    group_N: Positions

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def reading(self) -> Positions:
        """A number per row, equal for rows of one row group."""
        return np.unique(np.stack([self.file_N, self.row_group_N]), axis=1, return_inverse=True)[1].reshape(-1)

    def followed_by(self, other: Selection) -> Selection:
        """The rows of both, of the same files."""
        names = ("file_N", "row_group_N", "row_N", "group_N")
        return Selection(self.files, *(np.concatenate([getattr(self, name), getattr(other, name)]) for name in names))


def select(
    source: SourceConfig, files: Sequence[SourceFile], where: str | None, progress: ShowProgress
) -> dict[str, Selection]:
    """Rows by split: train, validation, test. `where` chooses among all of them.

    Raises ConfigError for a condition that cannot be evaluated, TrainError if it leaves nothing to train on.
    """
    from conjoin.pipeline.source import group_values, read_rows, split_of

    columns = [source.id, *([source.group] if source.group else []), *_columns_of_condition(where, files[0].path)]
    parts: list[tuple[NDArray[np.str_], NDArray[np.int64]]] = []
    total, done = sum(file.num_rows for file in files), 0
    for number, file in enumerate(files):
        for row_group in range(len(file.row_groups)):
            rows = read_rows(source, file.path, row_group, columns)
            groups = group_values(source, rows)
            kept = np.flatnonzero(_holds(rows, where))
            codes = _codes(groups)
            position = np.stack([np.full(len(kept), number), np.full(len(kept), row_group), kept, codes[kept]])
            parts.append((split_of(groups, source.split)[kept], position.astype(np.int64)))
            done += rows.num_rows
            progress(Progress("select", done, total))
    splits, positions = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts], axis=1)
    paths = tuple(file.path for file in files)
    found = {name: Selection(paths, *positions[:, splits == name]) for name in ("train", "validation", "test")}
    if len(found["train"]) < 2:
        chosen = f" where {where}" if where else ""
        raise TrainError(
            f"{len(found['train'])} of {total} rows{chosen} are for training", next="Training needs two or more"
        )
    return found


def _codes(groups: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """64 bits of each group's hash: equal for equal groups in all files."""
    from conjoin.pipeline.source import content_hash

    known: dict[object, int] = {}
    return np.array(
        [
            known.setdefault(g, int.from_bytes(content_hash(str(g))[:8], "little", signed=True))
            for g in utf8.python_values(groups)
        ],
        dtype=np.int64,
    )


def _columns_of_condition(where: str | None, file: str) -> list[str]:
    if where is None:
        return []
    import sqlglot
    from sqlglot import exp

    from conjoin.pipeline.source import column_names

    try:
        condition = sqlglot.parse_one(where, read="duckdb", into=exp.Condition)
    except sqlglot.errors.ParseError as error:
        raise ConfigError(f"train.where is not SQL: {str(error).splitlines()[0]}", where=where) from error
    names = list(dict.fromkeys(column.name for column in condition.find_all(exp.Column)))
    there = {name.lower(): name for name in column_names(file)}
    for name in names:
        if name.lower() not in there:
            raise ConfigError(
                f"train.where names an unknown column {name!r}", where=file, next=f"It has {', '.join(there.values())}"
            )
    return [there[name.lower()] for name in names]


def _readable(rows: pa.Table) -> pa.Table:
    """Invalid UTF-8 as U+FFFD: DuckDB would refuse the whole row group."""
    for position, name in enumerate(rows.column_names):
        checked = utf8.checked(rows[name])
        if checked is not rows[name] and checked.type != rows[name].type:
            rows = rows.set_column(position, name, utf8.repaired(checked))
    return rows


def _holds(rows: pa.Table, where: str | None) -> NDArray[np.bool_]:
    """Where the condition is true; null counts as false."""
    if where is None:
        return np.ones(rows.num_rows, dtype=bool)
    import duckdb

    safe = {"enable_external_access": False, "python_enable_replacements": False, "lock_configuration": True}
    with duckdb.connect(config=safe) as db:
        db.register("rows", _readable(rows))
        try:
            held = db.sql(f"SELECT coalesce(({where}), false) AS held FROM rows").to_arrow_table()  # noqa: S608
        except duckdb.Error as error:
            raise ConfigError(f"train.where cannot be evaluated: {str(error).splitlines()[0]}", where=where) from error
    return np.asarray(held["held"].combine_chunks().to_numpy(zero_copy_only=False), dtype=bool)


def ids_of(source: SourceConfig, rows: Selection, positions: Positions) -> list[str]:
    """The ids of some rows, in this order, as text."""
    from conjoin.pipeline.features import reading_units
    from conjoin.pipeline.source import read_rows

    found: dict[int, str] = {}
    for unit in reading_units(rows, positions):
        where = (str(unit["file"]), int(str(unit["row_group"])))
        table = read_rows(source, *where, [source.id], np.array(unit["rows"]))
        values = utf8.python_values(table[source.id])
        found |= dict(zip(np.array(unit["position"]).tolist(), map(str, values), strict=True))
    return [found[int(position)] for position in positions]
