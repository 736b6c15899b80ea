"""Ids of the whole source: unique and never null, checked in bounded memory.

Assumes: an id is the key of everything below; a source that repeats one is refused as a whole, not quarantined.
"""

from __future__ import annotations

import bisect
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from conjoin.pipeline.errors import SourceError, StorageError

if TYPE_CHECKING:
    import pyarrow as pa

    from conjoin.pipeline.source import SourceConfig, SourceFile

_SHOWN = 5
_MEMORY = "1GB"
_QUERY = """
    SELECT id, count(*) AS num, min(position) AS first, max(position) AS last FROM ids
    GROUP BY id HAVING num > 1 OR id IS NULL ORDER BY first
"""


def check_ids(config: SourceConfig, files: Sequence[SourceFile], ids: Iterable[pa.ChunkedArray] | None = None) -> None:
    """Raises SourceError naming the first ids that are null or occur more than once, with their files and rows.

    ids: all of them in the order of the files, if the caller has them already. Rows count from 0 within their file.
    DuckDB groups on disk what does not fit into 1 GB.
    """
    import duckdb
    import pyarrow as pa

    from conjoin.pipeline.source import schema_of

    kind = schema_of(config).arrow.field(config.id).type
    schema = pa.schema([("id", kind), ("position", pa.int64())])
    failed: list[Exception] = []
    batches = _batches(schema, _read(config, files) if ids is None else ids)
    reader = pa.RecordBatchReader.from_batches(schema, _noting(batches, failed))
    with tempfile.TemporaryDirectory(prefix="conjoin-ids-") as spill, duckdb.connect() as connection:
        connection.execute(f"SET memory_limit = '{_MEMORY}'; SET temp_directory = '{spill}'")
        connection.register("ids", reader)
        try:
            wrong = connection.execute(_QUERY).fetchall()
        except duckdb.Error as error:
            if failed:
                raise failed[0] from None
            what = f"cannot compare the ids: {str(error).splitlines()[0]}"
            raise StorageError(what, where=spill, next="Free space in the directory that TMPDIR names") from error
    if not wrong:
        return
    nulls = [row for row in wrong if row[0] is None]
    places = _Places(files)
    if nulls:
        _, num, first, last = nulls[0]
        rows = places.name(first) if num == 1 else f"{places.name(first)} to {places.name(last)}"
        what = f"source.id: column {config.id!r} is null in {num} row(s), {rows}"
        raise SourceError(what, next="Give every row an id, or leave those rows out of the source")
    shown = "; ".join(f"{row[0]!r}: {places.name(row[2])} and {places.name(row[3])}" for row in wrong[:_SHOWN])
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    what = f"source.id: {len(wrong)} id(s) of column {config.id!r} occur more than once: {shown}{more}"
    raise SourceError(what, next="Make the ids unique, or choose another column as source.id")


def _batches(schema: pa.Schema, ids: Iterable[pa.ChunkedArray]) -> Iterator[pa.RecordBatch]:
    import numpy as np
    import pyarrow as pa

    start = 0
    for some in ids:
        position = pa.array(np.arange(start, start + len(some)))
        yield from pa.table([some, position], schema=schema).to_batches()
        start += len(some)


def _read(config: SourceConfig, files: Sequence[SourceFile]) -> Iterator[pa.ChunkedArray]:
    from conjoin.pipeline.source import read_rows

    for file in files:
        for row_group in range(len(file.row_groups)):
            yield read_rows(config, file.path, row_group, [config.id])[config.id]


def _noting(batches: Iterator[pa.RecordBatch], failed: list[Exception]) -> Iterator[pa.RecordBatch]:
    """DuckDB reports an error of its input as text only: keep the error itself."""
    try:
        yield from batches
    except Exception as error:
        failed.append(error)
        raise


class _Places:
    """Global row positions as "file row n"."""

    def __init__(self, files: Sequence[SourceFile]) -> None:
        self._files = files
        self._starts = [0, *accumulate(file.num_rows for file in files)]

    def name(self, position: int) -> str:
        at = bisect.bisect_right(self._starts, position) - 1
        return f"{self._files[at].path} row {position - self._starts[at]}"
