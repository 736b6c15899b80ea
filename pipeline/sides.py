"""The two sides of a comparison as DuckDB's tables: what states remember, what the source holds, hashes of both.

Assumes: comparison.py says in which order; hashes that cost much are null until `look_deeper`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from conjoin.pipeline import hashes, utf8
from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.parallel import in_order
from conjoin.pipeline.progress import Progress, ShowProgress
from conjoin.pipeline.source import columns_of, read_batches, read_rows
from conjoin.pipeline.state import FileState, state_file
from conjoin.pipeline.store import HASH_BYTES

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from conjoin.pipeline.comparison import Comparison, Question

_BATCH_ROWS = 50_000


def _schema(comparison: Comparison) -> pa.Schema:
    import pyarrow as pa

    question = comparison.question
    place = [("file", pa.int32()), ("row_group", pa.int32()), ("row", pa.int64())]
    digests = [(name, pa.binary(HASH_BYTES)) for name in comparison.hash_names]
    return pa.schema([*place, ("id", question.columns.arrow.field(question.source.id).type), *digests])


def _create(comparison: Comparison, name: str, schema: pa.Schema) -> None:
    comparison.connection.register("__empty", schema.empty_table())
    comparison.connection.execute(f"CREATE TABLE {name} AS FROM __empty")
    comparison.connection.unregister("__empty")


def insert(comparison: Comparison, name: str, table: pa.Table) -> None:
    """Add rows to one of DuckDB's tables."""
    comparison.connection.register("__some", table)
    comparison.connection.execute(f"INSERT INTO {name} SELECT * FROM __some")
    comparison.connection.unregister("__some")


def load_old(comparison: Comparison) -> None:
    """Table `old`: what the states of opened, recalled and vanished files remember; file -1: of none of tonight's."""
    _create(comparison, "old", _schema(comparison))
    question = comparison.question
    if question.manifest is None:
        return
    numbers = {question.files[n].path: n for n in (*comparison.files.opened, *comparison.files.recalled)}
    gone = {state.file.path for state in comparison.files.gone}
    for state in question.manifest.files:
        path = state.file.path
        if state.path and (path in gone or path in numbers):
            table = _recalled(comparison, state, -1 if path in gone else numbers[path])
            insert(comparison, "old", table)


def _recalled(comparison: Comparison, state: FileState, number: int) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    assert comparison.question.live is not None
    table = state_file(str(comparison.question.live.uri), state)
    schema = _schema(comparison)
    columns = {"file": pa.array(np.full(table.num_rows, number, np.int32))}
    for name in schema.names[1:]:
        absent = name not in table.schema.names
        columns[name] = pa.nulls(table.num_rows, schema.field(name).type) if absent else table[name]
    return pa.table(columns).cast(schema)


def load_new(comparison: Comparison, progress: ShowProgress) -> None:
    """Table `now`: every row of opened and recalled files; hashes that cost much are null so far."""
    _create(comparison, "now", _schema(comparison))
    question = comparison.question
    groups = [(n, g) for n in comparison.files.opened for g in range(len(question.files[n].row_groups))]
    total, done = sum(question.files[number].num_rows for number in comparison.files.opened), 0
    for table in in_order(groups, lambda place: _read(comparison, *place)):
        insert(comparison, "now", table)
        done += table.num_rows
        progress(Progress("plan", done, total))
    if question.limit is not None:
        comparison.connection.execute(
            "DELETE FROM now WHERE (file, row_group, row) NOT IN "
            f"(SELECT (file, row_group, row) FROM now ORDER BY file, row_group, row LIMIT {question.limit})"
        )
    numbers = ", ".join(map(str, comparison.files.recalled)) or "-2"
    comparison.connection.execute(f"INSERT INTO now SELECT * FROM old WHERE file IN ({numbers})")


def _read(comparison: Comparison, number: int, row_group: int) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    question, schema = comparison.question, _schema(comparison)
    source, path = question.source, question.files[number].path
    cheap = [] if question.manifest is None else [m for m in question.modalities if not _is_deep(question, m)]
    rest = [] if question.manifest is None else [*source.keep, *([source.changed_by] if source.changed_by else [])]
    names = [source.id, *rest, *(name for m in cheap for name in columns_of(source, m))]
    table = read_rows(source, path, row_group, names)
    ids = table[source.id]
    if utf8.checked(ids) is not ids:
        where = f"{path} row group {row_group}"
        raise SourceError(f"source.id: column {source.id!r} holds an id that is not UTF-8", where=where)
    size = table.num_rows
    columns: dict[str, object] = {name: pa.nulls(size, schema.field(name).type) for name in comparison.hash_names}
    columns |= {f"{m}_hash": hashes.modality_hashes(source, table, m)[1] for m in cheap}
    columns |= hashes.row_hashes(source, table) if question.manifest is not None else {}
    place = {"file": np.full(size, number, np.int32), "row_group": np.full(size, row_group, np.int32)}
    columns |= {**{k: pa.array(v) for k, v in place.items()}, "row": pa.array(np.arange(size)), "id": ids}
    return pa.table({name: columns[name] for name in schema.names}).cast(schema)


def _is_deep(question: Question, modality: str) -> bool:
    return hashes.is_deep(question.source, question.columns.contents[modality])


def look_deeper(comparison: Comparison, progress: ShowProgress) -> None:
    """Hashes that cost much: taken over where settled, computed for known rows, left to the worker for new ones."""
    question, connection = comparison.question, comparison.connection
    for modality in [m for m in question.modalities if _is_deep(question, m)]:
        name = f"{modality}_hash"
        connection.execute(f"UPDATE joined SET {name} = was_{name} WHERE known AND settled")
        unsettled = "known AND NOT settled"
        places = connection.execute(
            f"SELECT DISTINCT file, row_group FROM joined WHERE {unsettled} ORDER BY ALL"
        ).fetchall()
        if not places:
            continue
        connection.execute("CREATE OR REPLACE TABLE deep (file INTEGER, row_group INTEGER, row BIGINT, hash BLOB)")
        wanted = (_rows_of(comparison, place, unsettled) for place in places)
        look, rows = partial(_deep, question, modality), zip(places, wanted, strict=True)
        # Of URIs many are asked for at a time already.
        found = in_order(rows, look) if question.columns.contents[modality] == "bytes" else map(look, rows)
        for done, tables in enumerate(found, 1):
            progress(Progress(f"compare {modality}", done, len(places), "row groups"))
            for table in tables:
                insert(comparison, "deep", table)
        connection.execute(
            f"UPDATE joined j SET {name} = d.hash FROM deep d "
            "WHERE (j.file, j.row_group, j.row) = (d.file, d.row_group, d.row)"
        )


def _rows_of(comparison: Comparison, place: tuple[int, int], condition: str) -> np.ndarray:
    """Positions in one row group, ascending, of joined rows that meet a condition."""
    import numpy as np

    file, row_group = place
    sql = f"SELECT row FROM joined WHERE file = {file} AND row_group = {row_group} AND {condition} ORDER BY row"
    return np.array(comparison.connection.execute(sql).fetchnumpy()["row"])


def _deep(question: Question, modality: str, wanted: tuple[tuple[int, int], np.ndarray]) -> list[pa.Table]:
    """Hashes of some rows of one row group; their values, which may be large, are gone when it returns."""
    import numpy as np
    import pyarrow as pa

    (file, row_group), rows = wanted
    done, found, names = 0, [], columns_of(question.source, modality)
    for table in read_batches(question.source, question.files[file].path, row_group, names, rows, _BATCH_ROWS):
        size = table.num_rows
        _, digests = hashes.modality_hashes(question.source, table, modality)
        place = (pa.array(np.full(size, value, np.int32)) for value in (file, row_group))
        columns = [*place, pa.array(rows[done : done + size]), digests.cast(pa.binary())]
        found.append(pa.table(columns, names=["file", "row_group", "row", "hash"]))
        done += size
    return found
