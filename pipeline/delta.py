"""The delta between two published versions as Parquet, for whoever serves search elsewhere: upserts, deletes, manifest.

Assumes: `manifest.json` is written last, so that a folder with it is whole; rows are compared by id, so what was only
moved or compacted is not in a delta. Memory does not grow with the table: ids spill to disk, values come in batches.
"""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conjoin.pipeline import storage, store
from conjoin.pipeline.difference import ADDRESS, BATCH_ROWS, Difference, difference
from conjoin.pipeline.edits import rows_at
from conjoin.pipeline.errors import TableError
from conjoin.pipeline.publish import history

if TYPE_CHECKING:
    import duckdb
    import lance
    import numpy as np
    import pyarrow as pa

NOTHING = "0"  # as --since: every row is an upsert
MANIFEST = "manifest.json"
PART_BYTES = 256 << 20  # of Arrow memory; a Parquet part is smaller
_GROUP_BYTES = 32 << 20
_MEMORY = "512MB"


@dataclass(frozen=True, slots=True)
class Point:
    """One end of a delta; version 0 is the empty table."""

    version: int
    run_id: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class DeltaFile:
    """One Parquet part below the delta's folder."""

    path: str
    kind: str
    rows: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What was written. added_columns, dropped_columns: the schema's part of the change.

    Rows that have no value in an added column are not upserts on its account.
    """

    table: str
    to: str
    since: Point
    until: Point
    upserts: int
    deletes: int
    added_columns: tuple[str, ...]
    dropped_columns: tuple[str, ...]
    files: tuple[DeltaFile, ...]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def export_delta(uri: str, to: str, *, since: str, until: str = store.LIVE, part_bytes: int = PART_BYTES) -> Delta:
    """Write `upserts-N.parquet` (whole rows), `deletes-N.parquet` (ids) and the manifest into the folder `to`.

    since, until: a tag, a version number or a run id, published; since may be "0", nothing. Raises TableError for a
    version that is gone or never was published, and for a folder that holds anything else than a killed export.
    """
    before = None if since == NOTHING else published(uri, since)
    after = published(uri, until)
    _make_room(to)
    found = difference(before, after)
    with tempfile.TemporaryDirectory(prefix="conjoin-delta-") as folder:
        matched = _match(found, Path(folder))
        deletes = list(_write(to, "deletes", after.schema.field("id"), _deleted(matched), part_bytes))
        upserts = itertools.chain(_rewritten(found), _moved(found, matched))
        files = (*deletes, *_write(to, "upserts", after.schema, upserts, part_bytes))
        matched.close()
    delta = Delta(
        table=uri,
        to=to,
        since=Point(0, "", 0) if before is None else _point(before),
        until=_point(after),
        upserts=sum(file.rows for file in files if file.kind == "upserts"),
        deletes=sum(file.rows for file in files if file.kind == "deletes"),
        added_columns=tuple(n for n in after.schema.names if before is not None and n not in before.schema.names),
        dropped_columns=found.dropped,
        files=files,
    )
    storage.write_json(storage.join(to, MANIFEST), {**delta.to_json(), "schema": _described(after.schema)})
    _note(delta)
    return delta


def _note(delta: Delta) -> None:
    """So that whoever must forget an id is told where it was sent."""
    to = storage.absolute(delta.to)
    name = hashlib.blake2b(to.encode(), digest_size=8).hexdigest()
    path = storage.join(store.bookkeeping(delta.table), "exports", f"{name}.json")
    storage.write_json(path, {"to": to, "since": delta.since.version, "until": delta.until.version})


def exports_of(uri: str) -> list[str]:
    """Folders that deltas of a table were written to; some may be gone."""
    found = storage.list_files(storage.join(store.bookkeeping(uri), "exports"))
    return [str(storage.read_json(path)["to"]) for path in found]


def published(uri: str, name: str) -> lance.LanceDataset:
    """A version that readers saw or see, by tag, number or run id. Raises TableError saying what is wrong with it."""
    moves = [entry for entry in history(uri) if entry.action != "rejected"]
    ran = next((entry.version for entry in moves if entry.run_id == name), None)
    number = int(name) if name.isdigit() else ran
    if number is not None and moves and all(entry.version != number for entry in moves):
        raise TableError(
            f"version {number} was never published", where=uri, next="`conjoin history` lists the versions that were"
        )
    try:
        return store.open_version(uri, number if number is not None else name)
    except TableError as error:
        if number is None or store.head(uri) is None:
            raise
        advice = "Export everything instead, with --since 0; `upkeep.keep_days` says how long versions stay"
        raise TableError(f"version {number} was cleaned up", where=uri, next=advice) from error


def _make_room(to: str) -> None:
    """Parts without a manifest are of an export that was killed; they go."""
    names = {path: path.rsplit("/", 1)[1] for path in storage.list_files(to)}
    ours = [path for path, name in names.items() if name.startswith(("upserts-", "deletes-"))]
    if len(ours) != len(names):
        raise TableError("the folder for the export holds something already", where=to, next="Give --to another folder")
    for path in ours:
        storage.remove(path)


def _point(dataset: lance.LanceDataset) -> Point:
    run_id = store.run_of(dataset).get(store.RUN_ID, "")
    return Point(int(dataset.version), run_id, dataset.count_rows())


def _described(schema: pa.Schema) -> list[dict[str, object]]:
    def facts(field: pa.Field) -> dict[str, str]:
        return {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}

    return [{"name": field.name, "type": str(field.type), "metadata": facts(field)} for field in schema]


def _match(found: Difference, folder: Path) -> duckdb.DuckDBPyConnection:
    """Tables `gone` and `come` (id, address) of what was removed and added, on disk."""
    import duckdb
    import pyarrow as pa

    settings = {"memory_limit": _MEMORY, "temp_directory": str(folder / "spill"), "preserve_insertion_order": "false"}
    connection = duckdb.connect(str(folder / "ids.duckdb"), config=settings)
    kind = "BIGINT" if pa.types.is_integer(found.after.schema.field("id").type) else "VARCHAR"
    wanted = ["id", ADDRESS]
    for name, batches in (("gone", found.removed_rows(wanted)), ("come", found.added_rows(wanted))):
        connection.execute(f"CREATE TABLE {name} (id {kind}, address UBIGINT)")
        for batch in batches:
            connection.register("batch", pa.Table.from_batches([batch]))
            connection.execute(f"INSERT INTO {name} SELECT * FROM batch")  # noqa: S608
    return connection


def _deleted(matched: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    yield from _streamed(matched, "SELECT id FROM gone ANTI JOIN come USING (id) ORDER BY id")


def _streamed(matched: duckdb.DuckDBPyConnection, query: str) -> Iterator[pa.Table]:
    import pyarrow as pa

    for batch in matched.sql(query).to_arrow_reader(BATCH_ROWS):
        yield pa.Table.from_batches([batch])


def _moved(found: Difference, matched: duckdb.DuckDBPyConnection) -> Iterator[pa.Table]:
    """Added rows, without those that equal a removed one of the same id."""
    names = found.after.schema.names
    query = "SELECT come.address AS now, gone.address AS was FROM come LEFT JOIN gone USING (id) ORDER BY now"
    for pairs in _streamed(matched, query):
        now, was = pairs["now"].combine_chunks(), pairs["was"].combine_chunks()
        rows = rows_at(found.after, now, names)
        keep = was.is_null().to_numpy(zero_copy_only=False)
        if not keep.all():
            assert found.before is not None
            both = ~keep
            known = [name for name in names if name in found.before.schema.names]
            then = rows_at(found.before, was.drop_null(), known)
            keep[both] = _differ(then, rows.filter(both))
        yield rows.filter(keep)


def _rewritten(found: Difference) -> Iterator[pa.Table]:
    """Rows in both versions of whose rewritten columns some value changed."""
    import pyarrow as pa

    if not found.rewritten:
        return
    names = list(found.rewritten)
    for then, now in found.rewritten_rows([*names, ADDRESS]):
        known = [name for name in names if name in then.schema.names]
        changed = _differ(pa.Table.from_batches([then.select(known)]), pa.Table.from_batches([now.select(names)]))
        if changed.any():
            yield rows_at(found.after, now[ADDRESS].filter(changed), found.after.schema.names)


def _differ(then: pa.Table, now: pa.Table) -> np.ndarray:
    """(N,) bool: whether any value of a row differs; a column that was not there counts as null."""
    import numpy as np
    import pyarrow as pa

    found = np.zeros(now.num_rows, bool)
    for name in now.schema.names:
        here = now[name].combine_chunks()
        there = then[name].combine_chunks() if name in then.schema.names else pa.nulls(len(here), here.type)
        found |= _values_differ(there, here)
    return found


def _values_differ(then: pa.Array, now: pa.Array) -> np.ndarray:
    """(N,) bool; nulls equal nulls, NaN equals NaN, and a value of another type is another value."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    here, there = (array.is_valid().to_numpy(zero_copy_only=False) for array in (then, now))
    both, found = here & there, here != there
    if not both.any():
        return found
    if then.type != now.type:
        return found | both
    then, now = then.filter(both), now.filter(both)
    if pa.types.is_fixed_size_list(then.type) and pa.types.is_floating(then.type.value_type):
        shape = (len(now), now.type.list_size)
        before, after = (array.flatten().to_numpy(zero_copy_only=False).reshape(shape) for array in (then, now))
        found[both] = ((before != after) & ~(np.isnan(before) & np.isnan(after))).any(axis=1)
    elif pa.types.is_nested(then.type):
        # repr: NaN in a list must equal itself.
        found[both] = [repr(a) != repr(b) for a, b in zip(then.to_pylist(), now.to_pylist(), strict=True)]
    elif pa.types.is_floating(then.type):
        before, after = then.to_numpy(), now.to_numpy()
        found[both] = (before != after) & ~(np.isnan(before) & np.isnan(after))
    else:
        found[both] = pc.not_equal(then, now).to_numpy(zero_copy_only=False)
    return found


def _write(
    to: str, kind: str, schema: pa.Schema | pa.Field, tables: Iterable[pa.Table], part_bytes: int
) -> Iterator[DeltaFile]:
    """Parts of at most about `part_bytes`, each whole or not there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([schema]) if isinstance(schema, pa.Field) else schema
    waiting = _grouped(tables, min(_GROUP_BYTES, part_bytes))
    for number in itertools.count():
        first = next(waiting, None)
        if first is None:
            return
        name, rows, size = f"{kind}-{number:05d}.parquet", 0, 0
        with storage.writing(storage.join(to, name)) as path:
            with pq.ParquetWriter(path, schema, compression="zstd") as out:
                for table in itertools.chain([first], waiting):
                    out.write_table(table.cast(schema))
                    rows, size = rows + table.num_rows, size + table.nbytes
                    if size >= part_bytes:
                        break
            written = Path(path).stat().st_size
        yield DeltaFile(name, kind, rows, written)


def _grouped(tables: Iterable[pa.Table], num_bytes: int) -> Iterator[pa.Table]:
    """The same rows in tables of about `num_bytes`: few changed rows of each of many batches make one row group."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    for table in tables:
        if table.num_rows:
            waiting.append(table)
        if sum(some.nbytes for some in waiting) >= num_bytes:
            yield pa.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pa.concat_tables(waiting)
