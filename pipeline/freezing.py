"""A draft becomes a plan: the rows of its units, and what else the night needs, written below its run.

Assumes: plan.json comes last, so a run whose files are not whole has no plan.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conjoin.pipeline import plan as plans
from conjoin.pipeline import storage
from conjoin.pipeline.cutting import INSERTED, REWRITTEN
from conjoin.pipeline.plan import Plan
from conjoin.pipeline.units import Unit, ids_digest

if TYPE_CHECKING:
    import pyarrow as pa

    from conjoin.pipeline.cutting import Cut
    from conjoin.pipeline.draft import Draft


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


def _by_where(cuts: Sequence[Cut]) -> Iterator[tuple[str, list[Cut]]]:
    groups: dict[str, list[Cut]] = {}
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
    working = f"{INSERTED} OR {REWRITTEN}"
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
    working = f"{INSERTED} OR {REWRITTEN} AND retold"
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
