"""A plan in the making: what changed, and how the work is cut into units; nothing durable is written until `freeze`.

Assumes: one draft at a time in a process; the comparison lies on disk and is gone when the block ends.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from conjoin.pipeline import hashes, storage
from conjoin.pipeline import plan as plans
from conjoin.pipeline.comparison import Comparison, Question, comparing
from conjoin.pipeline.layout import Change, change_of, lay_out, row_bytes
from conjoin.pipeline.plan import Plan
from conjoin.pipeline.progress import ShowProgress, silent
from conjoin.pipeline.quarantine import check_quarantine
from conjoin.pipeline.source import columns_of_files
from conjoin.pipeline.state import read_manifest
from conjoin.pipeline.store import (
    check_ours,
    columns_of_schema,
    live_version,
    open_version,
    restore,
    vector_columns,
)
from conjoin.pipeline.units import INSERT, REWRITE, Unit, cut, ids_digest, unit_rows

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

    from conjoin.pipeline.catalog import Catalog
    from conjoin.pipeline.source import SourceFile
    from conjoin.pipeline.state import Manifest
    from conjoin.pipeline.survey import Survey


@dataclass(frozen=True, slots=True)
class Base:
    """What a plan builds on: the live version and its manifest, none of both where the whole table is made anew.

    head: the table as it is, None if there is no table.
    """

    head: lance.LanceDataset | None = None
    live: lance.LanceDataset | None = None
    manifest: Manifest | None = None

    @property
    def known(self) -> dict[str, SourceFile]:
        """Files of the live version by path."""
        return {} if self.manifest is None else {entry.file.path: entry.file for entry in self.manifest.files}


def base_of(uri: str, *, full: bool = False, restoring: bool = True) -> Base:
    """What a plan builds on; a head that is not the live version's content is restored to it first.

    full: nothing, the whole table is made anew; restoring: False leaves the head alone, to look only.
    Raises TableError for a table that is somebody else's.
    """
    head = check_ours(uri)
    check_quarantine(uri)
    if head is None or full or live_version(head) is None:
        return Base(head)
    if restoring:
        restore(uri)
    live = open_version(uri)
    manifest = read_manifest(live)
    return Base(open_version(uri, None), live if manifest else None, manifest)


@dataclass(frozen=True)  # no slots: cached_property needs a __dict__
class Draft:
    """anew: modalities whose vectors are all computed again; schema, change: of the table's columns."""

    catalog: Catalog
    found: Survey
    base: Base
    comparison: Comparison
    schema: pa.Schema
    change: Change
    thumbnail_px: int
    anew: tuple[str, ...]

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.comparison.question.modalities

    @property
    def kept(self) -> tuple[str, ...]:
        """Kept columns, as the table calls them."""
        return tuple(dict.fromkeys(self.catalog.source.keep))

    @cached_property
    def units(self) -> tuple[_Cut, ...]:
        """All the work in order, without the rows."""
        rows = sum(file.num_rows for file in self.found.files)
        size = unit_rows(self.catalog.embed.unit_rows, rows, row_bytes(self.schema, self.thumbnail_px))
        return (*_inserts(self, size), *_rewrites(self))

    @property
    def embedded(self) -> int:
        """Rows that some tower looks at."""
        return sum(piece.rows for piece in self.units if piece.embed)

    def distinct(self, modality: str) -> int | None:
        """Different contents that a tower will see; None where only reading them tells."""
        selected = f"FROM rows WHERE {self._seen_by(modality)}"
        if self.base.manifest is None:
            return None
        if self._is_deep(modality) and _scalar(
            self.comparison, f"SELECT count(*) {selected} AND {modality}_hash IS NULL"
        ):
            return None
        return _scalar(self.comparison, f"SELECT count(DISTINCT {modality}_hash) {selected}")

    def addresses(self) -> int:
        """URIs that workers will fetch, equal ones of one night counted once where known."""
        contents = self.comparison.question.columns.contents
        uris = [m for m in self.modalities if contents[m] == "uri"]
        rows = {m: sum(piece.rows for piece in self.units if m in piece.embed) for m in uris}
        return sum(rows[m] if (known := self.distinct(m)) is None else min(known, rows[m]) for m in uris)

    def bytes_of_recalled(self) -> int:
        """About what workers read of files that planning left closed."""
        total = 0.0
        for number in self.comparison.files.recalled:
            file = self.found.files[number]
            sql = f"SELECT count(*) FROM rows WHERE file = {number} AND ({_INSERTED} OR {_REWRITTEN})"
            total += file.size_bytes * _scalar(self.comparison, sql) / max(file.num_rows, 1)
        return round(total)

    def _is_deep(self, modality: str) -> bool:
        return hashes.is_deep(self.catalog.source, self.comparison.question.columns.contents[modality])

    def _seen_by(self, modality: str) -> str:
        bit = 1 << self.modalities.index(modality)
        again = f" OR {_REWRITTEN}" if modality in self.anew else ""
        return f"(({_INSERTED} AND {_mask(self)} & {bit} > 0){again})"

    def counts(self) -> dict[str, int]:
        """Rows by what becomes of them; of a modality that is computed anew `again`, of retries `due`."""
        counts = dict(self.comparison.counts)
        counts["skipped"] = sum(self.found.files[n].num_rows for n in self.comparison.files.skipped)
        for modality in self.modalities:
            sql = f"SELECT count(*) FROM rows WHERE kind = 'changed' AND changed_{modality}"
            counts[f"changed_{modality}"] = _scalar(self.comparison, sql)
        if self.anew:
            counts["again"] = _scalar(self.comparison, f"SELECT count(*) FROM rows WHERE {_REWRITTEN}")
        due = self.comparison.question.due
        counts["due"] = 0 if due is None else due.num_rows
        return counts


@dataclass(frozen=True, slots=True)
class _Cut:
    """A unit without its rows. where: SQL that selects the rows of its kind, in their order; rows: how many."""

    operation: str
    rows: int
    where: str
    embed: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    fragment: int = -1


@contextmanager
def drafting(
    catalog: Catalog,
    found: Survey,
    base: Base,
    due: pa.Table | None = None,
    limit: int | None = None,
    progress: ShowProgress = silent,
) -> Iterator[Draft]:
    """Compare the source with what `base` holds. due: (id, modality, file) of quarantined values to try again.

    limit: look at the first so many rows only, for a table that is made anew.
    Raises SourceError for ids that are null, repeated or of mixed types, TableError for columns that do not fit.
    """
    from conjoin.pipeline.survey import modalities_of

    manifest = base.manifest
    columns = columns_of_files(catalog.source, found.files, *_known_columns(manifest, found))
    modalities = modalities_of(catalog, found.spec)
    schema, thumbnail_px = lay_out(catalog, found, columns, base.head)
    anew = _anew(catalog, found, base, schema)
    change = Change() if base.live is None else change_of(base.live, schema, anew=bool(anew) and not _added(base, anew))
    question = Question(
        source=catalog.source,
        columns=columns,
        files=found.files,
        modalities=modalities,
        manifest=manifest,
        live=base.live,
        due=due,
        anew=anew,
        reread=manifest is not None and manifest.config != found.config,
        limit=limit,
    )
    with comparing(question, progress) as comparison:
        yield Draft(catalog, found, base, comparison, schema, change, thumbnail_px, anew)


def _known_columns(manifest: Manifest | None, found: Survey) -> tuple[pa.Schema | None, set[SourceFile]]:
    """Columns that the live version was read with, and the files that need no opening to know theirs."""
    if manifest is None or not manifest.columns or manifest.config != found.config:
        return None, set()
    return plans.schema_of_text(manifest.columns), {state.file for state in manifest.files}


def _anew(catalog: Catalog, found: Survey, base: Base, schema: pa.Schema) -> tuple[str, ...]:
    """Modalities that get new vectors for all rows: of another encoder all, else those that the table lacks."""
    if base.live is None or base.manifest is None:
        return ()
    before, after = vector_columns(base.live), columns_of_schema(schema)
    same = base.manifest.fingerprint == found.fingerprint and base.manifest.precision == catalog.embed.precision
    kinds = all(base.live.schema.field(n).type == schema.field(n).type for n in after if n in before)
    wanted = [name for name in after if name not in before] if same and kinds else list(after)
    return tuple(name.removesuffix("_vec") for name in wanted)


def _added(base: Base, anew: Sequence[str]) -> bool:
    """Whether the modalities that are computed anew are only those that the table lacks."""
    assert base.live is not None
    return not any(f"{modality}_vec" in base.live.schema.names for modality in anew)


_INSERTED = "(kind IN ('new', 'changed') OR (retold AND address IS NULL))"
_REWRITTEN = "(address IS NOT NULL AND kind NOT IN ('new', 'changed') AND (retold OR kind = 'kept'))"


def _mask(draft: Draft) -> str:
    """SQL: a bit per modality whose tower runs for an inserted row."""
    whole = (1 << len(draft.modalities)) - 1
    bits = [f"(CASE WHEN changed_{m} THEN {1 << bit} ELSE 0 END)" for bit, m in enumerate(draft.modalities)]
    again = sum(1 << bit for bit, m in enumerate(draft.modalities) if m in draft.anew)
    return f"(CASE WHEN kind = 'new' OR address IS NULL THEN {whole} ELSE ({' + '.join(bits)}) | {again} END)"


def _inserts(draft: Draft, size: int) -> Iterator[_Cut]:
    mask = _mask(draft)
    by = "mask, file, row_group"
    sql = f"SELECT {mask} AS mask, count(*) FROM rows WHERE {_INSERTED} GROUP BY {by} ORDER BY {by}"
    groups: dict[int, list[int]] = {}
    for number, count in draft.comparison.connection.execute(sql).fetchall():
        groups.setdefault(int(number), []).append(int(count))
    for number, sizes in groups.items():
        embed = tuple(m for bit, m in enumerate(draft.modalities) if number >> bit & 1)
        where = f"{_INSERTED} AND {mask} = {number} ORDER BY file, row_group, row"
        yield from (_Cut(INSERT, rows, where, embed) for rows in cut(sizes, size))


def _rewrites(draft: Draft) -> Iterator[_Cut]:
    """One unit per fragment: all its rows for a new encoder, else the rows whose kept columns changed."""
    sql = (
        f"SELECT address >> 32 AS fragment, count(*), count(*) FILTER (kind = 'kept') FROM rows WHERE {_REWRITTEN} "
        "GROUP BY fragment ORDER BY fragment"
    )
    again = [f"{modality}_vec" for modality in draft.anew]
    added = [name for name in draft.change.added if name in draft.schema.names and name not in draft.kept]
    for fragment, count, num_kept in draft.comparison.connection.execute(sql).fetchall():
        columns = dict.fromkeys([*again, *added, *(draft.kept if num_kept else ())])
        where = f"{_REWRITTEN} ORDER BY address >> 32, file, row_group, row"
        yield _Cut(REWRITE, int(count), where, draft.anew, tuple(columns), int(fragment))


def freeze(draft: Draft, run_id: str, run: str) -> Plan:
    """Write the rows of the units and what else the night needs below `run`, then plan.json."""
    catalog, found, base = draft.catalog, draft.found, draft.base
    folder = f"plan-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory(prefix="conjoin-rows-") as local:
        with storage.explaining("spool the plan", local):
            units = _write_rows(draft, Path(local))
            _write_rest(draft, Path(local))
        storage.copy_tree(local, storage.join(run, folder))
    files = draft.comparison.files
    plan = Plan(
        run_id=run_id,
        source=catalog.source.model_dump_json(),
        fingerprint=found.fingerprint,
        encoder=catalog.encoder,
        precision=catalog.embed.precision,
        config=found.config,
        base_version=0 if base.head is None else int(base.head.version),
        base_run="" if base.manifest is None else base.manifest.run_id,
        thumbnail_px=draft.thumbnail_px,
        schema=draft.schema,
        columns=draft.comparison.question.columns.arrow,
        change=draft.change,
        folder=folder,
        files=found.files,
        stated=tuple(sorted((*files.opened, *files.recalled))),
        units=units,
        counts=draft.counts(),
    )
    return plans.freeze(plan, run)


def rows_schema(id_type: pa.DataType, hash_names: Sequence[str]) -> pa.Schema:
    """Rows of units: `file` counts the plan's files, `row` is the position in the row group.

    address: of the row that the new one replaces or that is rewritten; `was_<hash>`: as the live version knows it.
    """
    import pyarrow as pa

    position = {"unit": pa.int32(), "file": pa.int32(), "row_group": pa.int32(), "row": pa.int64()}
    digests = [pa.field(f"{before}{name}", pa.binary(16)) for before in ("", "was_") for name in hash_names]
    return pa.schema([*position.items(), ("id", id_type), ("address", pa.uint64()), *digests])


def _write_rows(draft: Draft, folder: Path) -> tuple[Unit, ...]:
    """One row group per unit, so that an actor reads only its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    question = draft.comparison.question
    schema = rows_schema(question.columns.arrow.field(question.source.id).type, draft.comparison.hash_names)
    units: list[Unit] = []
    names = ", ".join(schema.names[1:])
    with pq.ParquetWriter(folder / f"{plans.ROWS}.parquet", schema, compression="zstd") as writer:
        for where, group in _by_where(draft.units):
            rows = _Rows(draft.comparison.stream(f"SELECT {names} FROM rows WHERE {where}"))
            for piece in group:
                table = rows.take(piece.rows)
                unit = pa.array([len(units)] * table.num_rows, pa.int32())
                table = table.add_column(0, "unit", unit).cast(schema)
                writer.write_table(table, row_group_size=max(table.num_rows, 1))
                digest = ids_digest(table["id"])
                units.append(
                    Unit(len(units), piece.operation, piece.rows, digest, piece.embed, piece.columns, piece.fragment)
                )
    return tuple(units)


def _by_where(cuts: Sequence[_Cut]) -> Iterator[tuple[str, list[_Cut]]]:
    groups: dict[str, list[_Cut]] = {}
    for piece in cuts:
        groups.setdefault(piece.where, []).append(piece)
    yield from groups.items()


class _Rows:
    """A stream of batches, taken in tables of any number of rows."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._batches = batches
        self._rest: pa.Table | None = None

    def take(self, count: int) -> pa.Table:
        import pyarrow as pa

        parts = [] if self._rest is None else [self._rest]
        while sum(part.num_rows for part in parts) < count:
            parts.append(pa.Table.from_batches([next(self._batches)]))
        whole = pa.concat_tables(parts)
        self._rest = whole.slice(count)
        return whole.slice(0, count)


def _write_rest(draft: Draft, folder: Path) -> None:
    """Rows that only the state hears of, rows that leave the table, and what stays in quarantine."""
    hashes = ", ".join(draft.comparison.hash_names)
    working = f"{_INSERTED} OR {_REWRITTEN}"
    _write(
        draft,
        folder / f"{plans.UNCHANGED}.parquet",
        f"SELECT file, row_group, row, id, {hashes} FROM rows WHERE NOT coalesce({working}, false) "
        "ORDER BY file, row_group, row",
    )
    _write(draft, folder / f"{plans.DELETED}.parquet", "SELECT id, address FROM deleted ORDER BY address")
    _write_quarantine(draft, folder / f"{plans.QUARANTINED}.parquet")


def _write_quarantine(draft: Draft, path: Path) -> None:
    """Troubles of rows that no unit touches; where their file was opened, at their place of tonight."""
    import pyarrow as pa

    from conjoin.pipeline.quarantine import quarantine_schema, read_quarantine

    base, connection = draft.base, draft.comparison.connection
    before = None if base.live is None else read_quarantine(str(base.live.uri), int(base.live.version))
    if before is None:
        before = quarantine_schema(_id_type(draft)).empty_table()
    connection.register("troubles", before.set_column(0, "id", before["id"].cast(_id_type(draft), safe=False)))
    paths = [file.path for file in draft.found.files]
    connection.register("paths", pa.table({"file": list(range(len(paths))), "path": paths}))
    working = f"{_INSERTED} OR {_REWRITTEN} AND retold"
    _write(
        draft,
        path,
        "SELECT t.* REPLACE (coalesce(p.path, t.file) AS file, coalesce(r.row_group, t.row_group) AS row_group, "
        "coalesce(r.row, t.row) AS row) FROM troubles t LEFT JOIN rows r ON r.id = t.id "
        "LEFT JOIN paths p ON p.file = r.file "
        f"WHERE NOT coalesce({working}, false) AND t.id NOT IN (SELECT id FROM deleted)",
    )


def _id_type(draft: Draft) -> pa.DataType:
    return draft.schema.field("id").type


def _write(draft: Draft, path: Path, sql: str) -> None:
    draft.comparison.connection.execute(f"COPY ({sql}) TO '{path}' (FORMAT parquet, COMPRESSION zstd)")


def _scalar(comparison: Comparison, sql: str) -> int:
    row = comparison.connection.execute(sql).fetchone()
    assert row is not None
    return int(row[0])
