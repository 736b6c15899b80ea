"""Source against state: what became of every row since the live version, compared in DuckDB in bounded memory.

Assumes: a file with the size and etag of the live manifest holds what its state says; it is left alone, or, where its
rows are wanted all the same (retries, a new encoder), recalled from its state without being opened.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from conjoin.pipeline import hashes, storage
from conjoin.pipeline.edits import addresses_of, wants_a_pass
from conjoin.pipeline.errors import SourceError, StorageError
from conjoin.pipeline.ids import check_ids
from conjoin.pipeline.progress import ShowProgress, silent
from conjoin.pipeline.sides import insert, load_new, load_old, look_deeper
from conjoin.pipeline.source import SourceFile
from conjoin.pipeline.state import FileState, Manifest

if TYPE_CHECKING:
    import duckdb
    import lance
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
    vector of it is computed anew), address (of the row in the live table; null where it has none, or where none is
    needed). Table `deleted`: id, address.
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
    load_old(comparison)
    load_new(comparison, progress)
    _check_unique(comparison)
    _join(comparison)
    look_deeper(comparison, progress)
    _tell_kinds(comparison)
    _find_addresses(comparison)


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
        named = "SELECT id FROM kinds WHERE kind NOT IN ('moved', 'unchanged') UNION ALL FROM gone"
        many = bool(question.anew) or wants_a_pass(
            question.live, _scalar(connection, f"SELECT count(*) FROM ({named})")
        )
        wanted = None if many else connection.cursor().sql(named).to_arrow_table().column(0)
        for table in addresses_of(question.live, wanted):
            insert(comparison, "places", table)
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
    # All of it: DuckDB refuses other work on a connection while an answer is not fetched to its end.
    ((count,),) = connection.execute(sql).fetchall()
    return int(count)
