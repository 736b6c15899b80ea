"""Source against state: what became of every row since the live version, compared in DuckDB in bounded memory.

Assumes: a file with the size and etag of the live manifest holds what its state says; it is left alone, or, where its
rows are wanted all the same (retries, a new encoder), recalled from its state without being opened.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from conjoin.pipeline import hashes, storage, utf8
from conjoin.pipeline.edits import addresses_of
from conjoin.pipeline.errors import SourceError, StorageError
from conjoin.pipeline.ids import check_ids
from conjoin.pipeline.parallel import in_order
from conjoin.pipeline.progress import Progress, ShowProgress, silent
from conjoin.pipeline.source import SourceFile, columns_of, read_batches, read_rows
from conjoin.pipeline.state import FileState, Manifest, state_file
from conjoin.pipeline.store import HASH_BYTES

if TYPE_CHECKING:
    import duckdb
    import lance
    import numpy as np
    import pyarrow as pa

    from conjoin.pipeline.columns import SourceSchema
    from conjoin.pipeline.source import SourceConfig

_MEMORY = "1GB"
_BATCH_ROWS = 50_000
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Question:
    """What is compared. live: its manifest and dataset, None on a first night; due: (id, modality) to try again.

    anew: modalities whose vectors are all computed again, so that rows of unchanged files are wanted too; reread: the
    run file's columns changed, so that every file is opened; limit: the first so many rows only.
    """

    source: SourceConfig
    columns: SourceSchema
    files: tuple[SourceFile, ...]
    modalities: tuple[str, ...]
    manifest: Manifest | None = None
    live: lance.LanceDataset | None = None
    due: pa.Table | None = None
    anew: tuple[str, ...] = ()
    reread: bool = False
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Files:
    """Numbers of the plan's files, by what is done with them; gone: states of files that are in the source no more."""

    opened: tuple[int, ...]
    recalled: tuple[int, ...]
    skipped: tuple[int, ...]
    gone: tuple[FileState, ...]


@dataclass(slots=True)
class Comparison:
    """The compared rows, in DuckDB until the `comparing` block ends.

    Table `rows`: file, row_group, row, id, kind ('new', 'changed', 'kept', 'moved', 'unchanged'), the new
    hashes (null: not known before the row is read), `was_<hash>` of the old ones, `changed_<modality>`, retold (some
    vector of it is computed anew), address (of the row in the live table, null where it has none). Table `deleted`:
    id, address.
    """

    question: Question
    files: Files
    connection: duckdb.DuckDBPyConnection
    folder: Path
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def hash_names(self) -> list[str]:
        return hashes.column_names(self.question.modalities)

    def stream(self, sql: str) -> Iterator[pa.RecordBatch]:
        """Batches of an answer, in order."""
        yield from self.connection.cursor().sql(sql).to_arrow_reader(_BATCH_ROWS)


def sort_files(question: Question) -> Files:
    """Which files must be opened, which can be recalled from their state, which are left alone."""
    known = {state.file.path: state for state in question.manifest.files} if question.manifest else {}
    wanted = _files_of_due(question)
    opened, recalled, skipped = [], [], []
    for number, file in enumerate(question.files):
        state = known.get(file.path)
        if state is None or state.file != file or question.reread:
            opened.append(number)
        elif question.anew or file.path in wanted:
            recalled.append(number)
        else:
            skipped.append(number)
    paths = {file.path for file in question.files}
    gone = tuple(state for path, state in known.items() if path not in paths)
    return Files(tuple(opened), tuple(recalled), tuple(skipped), gone)


def _files_of_due(question: Question) -> set[str]:
    return set() if question.due is None else set(cast("list[str]", question.due["file"].to_pylist()))


@contextmanager
def comparing(question: Question, progress: ShowProgress = silent) -> Iterator[Comparison]:
    """Compare; what does not fit into 1 GB of memory is spilled to the directory that TMPDIR names.

    Raises SourceError for ids that are null, repeated, not UTF-8 or taken by a row of an unopened file.
    """
    import duckdb

    spool = tempfile.gettempdir()
    with (
        storage.explaining("spool the comparison", spool),
        tempfile.TemporaryDirectory(prefix="conjoin-plan-") as folder,
        duckdb.connect(str(Path(folder, "plan.duckdb"))) as connection,
    ):
        connection.execute(f"SET memory_limit = '{_MEMORY}'; SET temp_directory = '{folder}'; SET threads = 4")
        connection.execute("SET preserve_insertion_order = false; SET enable_progress_bar = false")
        comparison = Comparison(question, sort_files(question), connection, Path(folder))
        try:
            _fill(comparison, progress)
            yield comparison
        except duckdb.Error as error:
            what = f"cannot compare the source with its state: {str(error).splitlines()[0]}"
            advice = "Free space in the directory that TMPDIR names"
            raise StorageError(what, where=folder, next=advice) from error


def _fill(comparison: Comparison, progress: ShowProgress) -> None:
    _load_old(comparison)
    _load_new(comparison, progress)
    _check_unique(comparison)
    _join(comparison)
    _look_deeper(comparison, progress)
    _tell_kinds(comparison)
    _find_addresses(comparison)


def _schema(comparison: Comparison, *, placed: bool = True) -> pa.Schema:
    import pyarrow as pa

    question = comparison.question
    place = [("file", pa.int32()), ("row_group", pa.int32()), ("row", pa.int64())] if placed else []
    digests = [(name, pa.binary(HASH_BYTES)) for name in comparison.hash_names]
    return pa.schema([*place, ("id", question.columns.arrow.field(question.source.id).type), *digests])


def _create(comparison: Comparison, name: str, schema: pa.Schema) -> None:
    comparison.connection.register("__empty", schema.empty_table())
    comparison.connection.execute(f"CREATE TABLE {name} AS FROM __empty")
    comparison.connection.unregister("__empty")


def _insert(comparison: Comparison, name: str, table: pa.Table) -> None:
    comparison.connection.register("__some", table)
    comparison.connection.execute(f"INSERT INTO {name} SELECT * FROM __some")
    comparison.connection.unregister("__some")


def _load_old(comparison: Comparison) -> None:
    """Table `old`: what the states of opened, recalled and vanished files remember; file -1: of none of tonight's."""
    _create(comparison, "old", _schema(comparison))
    question = comparison.question
    if question.manifest is None:
        return
    numbers = {question.files[n].path: n for n in (*comparison.files.opened, *comparison.files.recalled)}
    for state in question.manifest.files:
        gone = state in comparison.files.gone
        if state.path and (gone or state.file.path in numbers):
            table = _recalled(comparison, state, -1 if gone else numbers[state.file.path])
            _insert(comparison, "old", table)


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


def _load_new(comparison: Comparison, progress: ShowProgress) -> None:
    """Table `now`: every row of opened and recalled files; hashes that cost much are null so far."""
    _create(comparison, "now", _schema(comparison))
    question = comparison.question
    groups = [(n, g) for n in comparison.files.opened for g in range(len(question.files[n].row_groups))]
    total, done = sum(question.files[number].num_rows for number in comparison.files.opened), 0
    for table in in_order(groups, lambda place: _read(comparison, *place)):
        _insert(comparison, "now", table)
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


def _check_unique(comparison: Comparison) -> None:
    question, files = comparison.question, comparison.files
    numbers = [*files.opened, *files.recalled]
    wrong = comparison.connection.execute(
        "SELECT 1 FROM (SELECT id FROM now GROUP BY id HAVING count(*) > 1 OR id IS NULL) LIMIT 1"
    ).fetchone()
    if wrong:
        named = sorted(numbers)
        sql = "SELECT id FROM now WHERE file = {} ORDER BY row_group, row"
        ids = (batch.column(0) for n in named for batch in comparison.stream(sql.format(n)))
        check_ids(question.source, [question.files[n] for n in named], ids)


def _join(comparison: Comparison) -> None:
    """Table `joined`: now beside old, settled where a deep hash may be taken over without a look."""
    names = comparison.hash_names
    was = ", ".join(f"o.{name} AS was_{name}" for name in names)
    recalled = ", ".join(map(str, comparison.files.recalled)) or "-2"
    by = comparison.question.source.changed_by is not None
    settled = f"n.file IN ({recalled})" + (" OR coalesce(n.changed_by_hash = o.changed_by_hash, false)" if by else "")
    comparison.connection.execute(
        f"CREATE TABLE joined AS SELECT n.*, {was}, o.id IS NOT NULL AS known, "
        f"o.file IS DISTINCT FROM n.file AS moved, ({settled}) AS settled FROM now n LEFT JOIN old o USING (id)"
    )
    comparison.connection.execute(
        "CREATE TABLE gone AS SELECT id FROM old o WHERE NOT EXISTS (SELECT 1 FROM now n WHERE n.id = o.id); "
        "DROP TABLE now; DROP TABLE old"
    )


def _look_deeper(comparison: Comparison, progress: ShowProgress) -> None:
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
                _insert(comparison, "deep", table)
        connection.execute(
            f"UPDATE joined j SET {name} = d.hash FROM deep d "
            "WHERE (j.file, j.row_group, j.row) = (d.file, d.row_group, d.row)"
        )


def _rows_of(comparison: Comparison, place: tuple[int, int], condition: str) -> np.ndarray:
    """Positions in one row group, ascending, of joined rows that meet a condition."""
    file, row_group = place
    sql = f"SELECT row FROM joined WHERE file = {file} AND row_group = {row_group} AND {condition} ORDER BY row"
    return cast("np.ndarray", comparison.connection.execute(sql).fetchnumpy()["row"])


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


def _tell_kinds(comparison: Comparison) -> None:
    """`changed_<modality>` and `kind` of every row; rows that are due count as changed."""
    question, connection = comparison.question, comparison.connection
    if question.due is not None:
        connection.register("due", question.due)
    changed = {m: f"known AND {m}_hash IS DISTINCT FROM was_{m}_hash" for m in question.modalities}
    if question.live is not None:  # a modality that the table lacks is no change: its column is filled for all rows
        changed |= {m: "false" for m in question.anew if f"{m}_vec" not in question.live.schema.names}
    if question.due is not None:
        for m in changed:
            changed[m] = f"({changed[m]}) OR (known AND id IN (SELECT id FROM due WHERE modality IN ('{m}', '')))"
    flags = ", ".join(f"({condition}) AS changed_{m}" for m, condition in changed.items())
    any_changed = " OR ".join(f"changed_{m}" for m in question.modalities)
    connection.execute(
        f"CREATE TABLE kinds AS SELECT *, CASE WHEN NOT known THEN 'new' WHEN {any_changed} THEN 'changed' "
        "WHEN kept_hash IS DISTINCT FROM was_kept_hash THEN 'kept' WHEN moved THEN 'moved' "
        "ELSE 'unchanged' END AS kind "
        f"FROM (SELECT *, {flags} FROM joined); DROP TABLE joined"
    )


def _find_addresses(comparison: Comparison) -> None:
    """Where tonight's rows lie in the live table; new ids that lie there belong to a file nobody opened."""
    question, connection = comparison.question, comparison.connection
    connection.execute("CREATE TABLE places (id " + _sql_type(comparison) + ", address UBIGINT)")
    if question.live is not None:
        wanted = None
        if not question.anew:
            named = "SELECT id FROM kinds WHERE kind NOT IN ('moved', 'unchanged') UNION ALL FROM gone"
            wanted = connection.cursor().sql(named).to_arrow_table().column(0)
        for table in addresses_of(question.live, wanted):
            _insert(comparison, "places", table)
    retold = "known" if question.anew else "false"
    connection.execute(
        f"CREATE TABLE rows AS SELECT k.*, {retold} AS retold, p.address FROM kinds k LEFT JOIN places p USING (id); "
        "CREATE TABLE deleted AS SELECT g.id, p.address FROM gone g LEFT JOIN places p USING (id); "
        "DROP TABLE kinds; DROP TABLE gone; DROP TABLE places"
    )
    taken = connection.execute(
        "SELECT id, file FROM rows WHERE kind = 'new' AND address IS NOT NULL ORDER BY file, row_group, row"
    ).fetchmany(_SHOWN)
    if taken:
        shown = "; ".join(f"{key!r} in {question.files[file].path}" for key, file in taken)
        what = f"source.id: new rows bear ids that rows of other, unchanged files have: {shown}"
        raise SourceError(what, next="Make the ids unique over all files")
    found = connection.execute("SELECT kind, count(*) FROM rows GROUP BY kind").fetchall()
    comparison.counts = {str(kind): int(count) for kind, count in found}
    comparison.counts["deleted"] = _scalar(connection, "SELECT count(*) FROM deleted")


def _sql_type(comparison: Comparison) -> str:
    import pyarrow as pa

    question = comparison.question
    return "BIGINT" if pa.types.is_int64(question.columns.arrow.field(question.source.id).type) else "VARCHAR"


def _scalar(connection: duckdb.DuckDBPyConnection, sql: str) -> int:
    row = connection.execute(sql).fetchone()
    assert row is not None
    return int(row[0])
