"""What a query can name: the Lance table at one pinned version, and frames given by name; nothing else exists.

Assumes: names are compared without case, as DuckDB does.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pyarrow as pa

from conjoin.pipeline import store
from conjoin.pipeline.errors import QueryError

if TYPE_CHECKING:
    import lance
    import pyarrow.dataset as ds

_COUNTS = 1_000


@dataclass(frozen=True, slots=True)
class Relation:
    """A table as SQL sees it. schema: float16 vectors appear as float32, since DuckDB has no half floats.

    dataset: the Lance table at its pinned version, None for a frame; frame: the rows of a frame, or the files of a
    named table, which DuckDB reads by itself; None for a Lance table.
    filters: whether DuckDB may push conditions into those files.
    """

    name: str
    schema: pa.Schema
    dataset: lance.LanceDataset | None = None
    frame: pa.Table | ds.Dataset | None = None
    filters: bool = True
    vectors: Mapping[str, store.VectorColumn] = field(default_factory=dict)
    uri: str = ""
    counted: dict[str | None, int] = field(default_factory=dict, compare=False, repr=False)

    def count(self, condition: str | None = None) -> int:
        """Rows of the Lance table that pass a filter; counted once, since a version never changes."""
        assert self.dataset is not None
        if condition not in self.counted:
            if len(self.counted) >= _COUNTS:
                self.counted.clear()
            self.counted[condition] = int(self.dataset.count_rows(condition))
        return self.counted[condition]

    def column(self, name: str) -> str | None:
        """The column's own spelling, None if there is none of that name."""
        lower = name.lower()
        return next((column for column in self.schema.names if column.lower() == lower), None)


def table_relation(name: str, uri: str, dataset: lance.LanceDataset) -> Relation:
    schema = pa.schema([pa.field(f.name, readable(f.type), f.nullable) for f in dataset.schema])
    return Relation(name, schema, dataset=dataset, vectors=store.vector_columns(dataset), uri=uri)


def frame_relation(name: str, value: object) -> Relation:
    """An Arrow table, pandas or polars frame, or list of dicts. Raises QueryError for anything else."""
    frame = _arrow(name, value)
    schema = pa.schema([pa.field(f.name, readable(f.type), f.nullable) for f in frame.schema])
    vectors = store.columns_of_schema(frame.schema)
    return Relation(name, schema, frame=frame.cast(schema), vectors=vectors)


def _arrow(name: str, value: object) -> pa.Table:
    try:
        if isinstance(value, pa.Table):
            return value
        if isinstance(value, pa.RecordBatch):
            return pa.Table.from_batches([value])
        if hasattr(value, "to_arrow"):
            return value.to_arrow()
        if type(value).__name__ == "DataFrame":
            return pa.Table.from_pandas(value, preserve_index=False)
        if isinstance(value, list) and all(isinstance(row, Mapping) for row in value):
            return pa.Table.from_pylist(value)
    except (pa.ArrowException, TypeError) as error:
        raise QueryError(f"the frame {name!r} does not convert to Arrow: {error}") from error
    kind = type(value).__name__
    raise QueryError(f"the frame {name!r} is a {kind}", next="Pass an Arrow table, a DataFrame or a list of dicts")


def readable(kind: pa.DataType) -> pa.DataType:
    """The type in which DuckDB can read a column."""
    if pa.types.is_fixed_size_list(kind) and pa.types.is_float16(kind.value_type):
        return pa.list_(pa.float32(), kind.list_size)
    if pa.types.is_float16(kind):
        return pa.float32()
    return kind


def projection(relation: Relation, columns: Iterable[str]) -> dict[str, str]:
    """{column: Lance expression} of a scan; half floats are widened in it."""
    assert relation.dataset is not None
    return {name: _widened(name, relation.dataset.schema.field(name).type) for name in columns}


def _widened(name: str, kind: pa.DataType) -> str:
    quoted = f"`{name}`"
    if pa.types.is_fixed_size_list(kind) and pa.types.is_float16(kind.value_type):
        return f"arrow_cast({quoted}, 'FixedSizeList({kind.list_size}, Float32)')"
    return f"arrow_cast({quoted}, 'Float32')" if pa.types.is_float16(kind) else quoted


def nearest_name(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or the known names when none is near."""
    names = sorted(set(known))
    near = difflib.get_close_matches(name.lower(), [n.lower() for n in names], 1, 0.6)
    if near:
        return f"; did you mean {next(n for n in names if n.lower() == near[0])!r}?"
    return f"; known: {', '.join(names[:20])}" if names else ""
