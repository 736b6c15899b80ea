"""Which rows may be trained on: the split by group and the recipe's `where`, read from cheap columns only.

Assumes: training rows are listed in the order of the parts and their files, so that a position here is a fixed (file,
row group, row). Every part is split by its own groups or ids; equal groups are one group, whatever part they are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from conjoin.pipeline import utf8
from conjoin.pipeline.errors import ConfigError, TrainError
from conjoin.pipeline.mixture import Part, modalities
from conjoin.pipeline.order import Positions, Weights
from conjoin.pipeline.progress import Progress, ShowProgress

if TYPE_CHECKING:
    import pyarrow as pa

    from conjoin.pipeline.source import SourceConfig


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows by position: files[file_N], row_group_N and row_N within it, group_N (int64, equal = same).

    parts[part_of_file[f]] says how file f is read.
    """

    parts: tuple[Part, ...]
    files: tuple[str, ...]
    part_of_file: tuple[int, ...]
    file_N: Positions
    row_group_N: Positions
    row_N: Positions
    group_N: Positions

    def __len__(self) -> int:
        return len(self.row_N)

    @property
    def reading(self) -> Positions:
        """A number per row, equal for rows of one row group."""
        most = int(self.row_group_N.max(initial=0)) + 1
        return np.unique(self.file_N * most + self.row_group_N, return_inverse=True)[1].reshape(-1)

    @property
    def weights(self) -> Weights:
        """How often each row is seen per epoch."""
        part_N = np.array(self.part_of_file, dtype=np.int64)[self.file_N]
        return Weights(part_N, tuple(part.weight for part in self.parts))

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """By part."""
        return tuple(part.source for part in self.parts)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that any part gives."""
        return modalities(self.parts)

    def followed_by(self, other: Selection) -> Selection:
        """The rows of both, of the same files."""
        return self._with([np.concatenate(pair) for pair in zip(self._rows(), other._rows(), strict=True)])

    def taken(self, positions: Positions) -> Selection:
        """These rows, in this order."""
        return self._with([values[positions] for values in self._rows()])

    def interleaved(self) -> Selection:
        """The same rows, so that any first of them are of all parts in proportion; of one part: as they are."""
        part_N = self.weights.part_N
        keys = np.zeros(len(self))
        for part in range(len(self.parts)):
            mine = np.flatnonzero(part_N == part)
            keys[mine] = (np.arange(len(mine)) + 0.5) / max(len(mine), 1)
        return self.taken(np.argsort(keys, kind="stable"))

    def _rows(self) -> list[Positions]:
        return [self.file_N, self.row_group_N, self.row_N, self.group_N]

    def _with(self, rows: Sequence[Positions]) -> Selection:
        return Selection(self.parts, self.files, self.part_of_file, *rows)


def select(parts: Sequence[Part], where: str | None, progress: ShowProgress) -> dict[str, Selection]:
    """Rows by split: train, validation, test. `where` chooses among all of them, in parts that have its columns.

    Training rows are in the order of the source, the others interleaved.
    Raises ConfigError for a condition that cannot be evaluated, TrainError if it leaves nothing to train on.
    """
    conditions = _conditions(parts, where)
    files = [(number, file) for number, part in enumerate(parts) for file in part.files]
    read: list[tuple[NDArray[np.str_], NDArray[np.int64]]] = []
    total, done = sum(file.num_rows for _, file in files), 0
    for number, (part, file) in enumerate(files):
        for row_group in range(len(file.row_groups)):
            splits, kept, codes = _read(parts[part], (file.path, row_group), conditions[part])
            position = np.stack([np.full(len(kept), number), np.full(len(kept), row_group), kept, codes])
            read.append((splits, position.astype(np.int64)))
            done += file.row_groups[row_group]
            progress(Progress("select", done, total))
    splits, positions = np.concatenate([one[0] for one in read]), np.concatenate([one[1] for one in read], axis=1)
    names = tuple(parts), tuple(file.path for _, file in files), tuple(part for part, _ in files)
    found = {name: Selection(*names, *positions[:, splits == name]) for name in ("train", "validation", "test")}
    if len(found["train"]) < 2:
        chosen = f" where {where}" if where else ""
        raise TrainError(
            f"{len(found['train'])} of {total} rows{chosen} are for training", next="Training needs two or more"
        )
    return {name: rows if name == "train" else rows.interleaved() for name, rows in found.items()}


@dataclass(frozen=True, slots=True)
class _Condition:
    """What `train.where` means for one part; text None: it has none of the columns, and every row holds."""

    text: str | None
    columns: tuple[str, ...] = ()


def _read(
    part: Part, where: tuple[str, int], condition: _Condition
) -> tuple[NDArray[np.str_], Positions, NDArray[np.int64]]:
    """Splits, positions and group codes of the rows of a row group that the condition keeps; where: file, row group."""
    from conjoin.pipeline.source import group_values, read_rows, split_of

    source = part.source
    named = [source.id, *([source.group] if source.group else []), *condition.columns]
    rows = read_rows(source, *where, named)
    groups = group_values(source, rows)
    kept = np.flatnonzero(_holds(rows, condition.text))
    codes = _codes(groups)
    if part.has_own_ids:
        by_id = np.asarray(rows[source.group].is_null()) if source.group else np.ones(rows.num_rows, dtype=bool)
        codes[by_id] ^= _salt(part)
    return split_of(groups, source.split)[kept], kept, codes[kept]


def _codes(groups: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    """64 bits of each group's hash: equal for equal groups in all files."""
    known: dict[object, int] = {}
    return np.array(
        [known.setdefault(g, _code(str(g))) for g in utf8.python_values(groups)],
        dtype=np.int64,
    )


def _code(text: str) -> int:
    from conjoin.pipeline.source import content_hash

    return int.from_bytes(content_hash(text)[:8], "little", signed=True)


def _salt(part: Part) -> int:
    """Keeps the ids of a part apart from equal ones of other parts, which name other things."""
    return _code(str(part.source.path))


def _conditions(parts: Sequence[Part], where: str | None) -> list[_Condition]:
    """For each part; those that have none of the columns keep all rows, unless that is so of every part."""
    if where is None:
        return [_Condition(None)] * len(parts)
    found: list[_Condition] = []
    errors: list[ConfigError] = []
    names = _names_in(where)
    for part in parts:
        try:
            found.append(_Condition(where, tuple(_columns_of_condition(names, part.files[0].path))))
        except ConfigError as error:
            if _has_any(names, part.files[0].path):
                raise
            errors.append(error)
            found.append(_Condition(None))
    if len(errors) == len(parts):
        raise errors[0]
    return found


def _names_in(where: str) -> list[str]:
    import sqlglot
    from sqlglot import exp

    try:
        condition = sqlglot.parse_one(where, read="duckdb", into=exp.Condition)
    except sqlglot.errors.ParseError as error:
        raise ConfigError(f"train.where is not SQL: {str(error).splitlines()[0]}", where=where) from error
    return list(dict.fromkeys(column.name for column in condition.find_all(exp.Column)))


def _there(file: str) -> dict[str, str]:
    from conjoin.pipeline.source import column_names

    return {name.lower(): name for name in column_names(file)}


def _has_any(names: Sequence[str], file: str) -> bool:
    return any(name.lower() in _there(file) for name in names)


def _columns_of_condition(names: Sequence[str], file: str) -> list[str]:
    there = _there(file)
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


def ids_of(rows: Selection, positions: Positions) -> list[str]:
    """The ids of some rows, in this order, as text."""
    from conjoin.pipeline.features import reading_units
    from conjoin.pipeline.source import read_rows

    found: dict[int, str] = {}
    for unit in reading_units(rows, np.unique(positions)):
        source = rows.sources[int(str(unit["source"]))]
        where = (str(unit["file"]), int(str(unit["row_group"])))
        table = read_rows(source, *where, [source.id], np.array(unit["rows"]))
        values = utf8.python_values(table[source.id])
        found |= dict(zip(np.array(unit["position"]).tolist(), map(str, values), strict=True))
    return [found[int(position)] for position in positions]
