"""One actor of the pool: a unit's rows in, one staged fragment and its record out.

Assumes: a repeated unit gives the same rows and vectors; its record replaces the earlier one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute

from conjoin.encoders.spec import Json
from conjoin.pipeline import commits, edits, storage, store, units
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.chunks import Piece, Recipe, chunks
from conjoin.pipeline.errors import ConjoinError, ConservationError, EncoderError
from conjoin.pipeline.gathered import Cache, Gathered, Trouble
from conjoin.pipeline.plan import Plan, PlanRows, load_plan
from conjoin.pipeline.quarantine import quarantine_schema
from conjoin.pipeline.runs import run_directory
from conjoin.pipeline.state import parquet_bytes, state_schema

if TYPE_CHECKING:
    import lance

    from conjoin.pipeline.embedder import Embedder

MAX_TRIES = 3


@dataclass(frozen=True, slots=True)
class Order:
    """What an actor is told once.

    catalog: as the plan has it; version: of the table that edits read, 0 without a table; left: paths of files that
    changed since the plan; ahead: pieces that CPU tasks decode for it at a time; threads: torch's; attempt: names this
    start of the night.
    """

    catalog: Catalog
    run_id: str
    version: int = 0
    left: frozenset[str] = frozenset()
    ahead: int = 0
    threads: int = 1
    attempt: str = ""


class Stager:
    """Callable on batches {unit: (1,) int64}, as Ray Data's map_batches wants it."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._uri = order.catalog.table.path
        self._run = run_directory(self._uri, order.run_id)
        self._cache = Cache()

    # What may raise waits for the first unit: of an error in a constructor Ray says only that the actor died.
    @cached_property
    def _plan(self) -> Plan:
        return load_plan(self._run)

    @cached_property
    def _rows(self) -> PlanRows:
        return PlanRows(self._run, self._plan)

    @cached_property
    def _table(self) -> lance.LanceDataset:
        return store.open_version(self._uri, self._order.version)

    @cached_property
    def _embedder(self) -> Embedder:
        import torch

        from conjoin.pipeline.embedder import load

        torch.set_num_threads(self._order.threads)
        catalog = self._order.catalog
        embedder = load(catalog.encoder, precision=catalog.embed.precision)
        if embedder.fingerprint != self._plan.fingerprint:
            raise EncoderError(
                f"the encoder changed since the run was planned: {embedder.fingerprint[:12]} now, "
                f"{self._plan.fingerprint[:12]} then",
                where=catalog.encoder,
                next="Start over with `conjoin run --full`",
            )
        return embedder

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[int] | list[float]]:
        """Raises; never returns a status."""
        record = self.stage(int(batch["unit"][0]))
        return {
            "unit": [record.unit],
            "rows": [record.planned],
            "quarantined": [record.quarantined],
            "seconds": [record.seconds],
        }

    def stage(self, number: int) -> units.Record:
        """Embed and stage one unit, unless its record is there already."""
        unit = self._plan.units[number]
        done = units.read_record(self._run, number, self._plan.digest)
        if done is not None:
            return done
        started = time.monotonic()
        self._begin(number)
        rows = self._rows.read(number)
        if units.ids_digest(rows["id"]) != unit.ids:
            raise ConservationError(f"the plan's rows: unit {number} is not the planned one", where=self._run)
        rows, left = self._without_changed(rows)
        table, usable, troubles, state = self._read(unit, rows)
        fragment, fields = self._write(unit, rows, table, usable)
        bad = _quarantined(rows, troubles, self._plan)
        # Everything a record names first, the record last.
        storage.write_bytes(units.file_of(self._run, number, "state.parquet"), parquet_bytes(state))
        storage.write_bytes(units.file_of(self._run, number, "bad.parquet"), parquet_bytes(bad))
        inserts = unit.operation == units.INSERT
        kept = table.filter(pa.array(usable)) if inserts else table
        record = units.Record(
            unit=number,
            plan=self._plan.digest,
            planned=rows.num_rows,
            planned_ids=units.ids_digest(rows["id"]),
            rows=kept.num_rows,
            ids=units.ids_digest(kept["id"]),
            excluded=rows.num_rows - kept.num_rows,
            quarantined=len({trouble.row for trouble in troubles}),
            fragment=fragment,
            seconds=time.monotonic() - started,
            fields=tuple(fields),
            left=left,
        )
        units.write_record(self._run, record)
        return record

    def _without_changed(self, rows: pa.Table) -> tuple[pa.Table, tuple[str, ...]]:
        """The rows whose files are as planned, and the paths of the other files."""
        paths = [file.path for file in self._plan.files]
        gone = [number for number, path in enumerate(paths) if path in self._order.left]
        changed = pa.compute.is_in(rows["file"], pa.array(gone, pa.int32()))
        found = rows.filter(changed)["file"].unique().to_pylist()
        return rows.filter(pa.compute.invert(changed)), tuple(paths[number] for number in found)

    def _read(self, unit: units.Unit, rows: pa.Table) -> tuple[pa.Table, np.ndarray, list[Trouble], pa.Table]:
        """(all columns of the plan's schema that the unit has, usable rows (N,), troubles, state) of the rows."""
        plan = self._plan
        embedder = self._embedder if unit.embed else None
        towers = {name: embedder.spec.towers[name] for name in unit.embed} if embedder else {}
        gathered = Gathered(embedder, plan.schema, unit.embed, rows.num_rows, self._cache)
        # An actor's share of the CPUs, over the tasks that decode for it.
        threads = max(1, self._order.threads // max(1, self._order.ahead))
        recipe = Recipe(self._order.catalog.source, towers, plan.schema, plan.thumbnail_px, threads)
        for chunk in chunks(recipe, self._pieces(rows), self._order.ahead):
            gathered.add(chunk)
        if not rows.num_rows:
            return plan.schema.empty_table(), np.zeros(0, bool), [], _state(rows, rows, plan.modalities)
        table, usable, troubles = gathered.finish(self._carried(unit, rows))
        return table, usable, troubles, _state(rows, gathered.columns, plan.modalities)

    def _carried(self, unit: units.Unit, rows: pa.Table) -> pa.Table | None:
        """Columns of the modalities that keep their vectors, from the rows that the new ones replace."""
        names = {name for name in self._plan.modalities if name not in unit.embed}
        columns = [name for name in self._plan.schema.names if _modality_of(name) in names]
        if unit.operation == units.REWRITE or not columns:
            return None
        return edits.rows_at(self._table, rows["address"], columns)

    def _write(self, unit: units.Unit, rows: pa.Table, table: pa.Table, usable: np.ndarray) -> tuple[Json, list[int]]:
        """Stage the fragment, new or rewritten: (Lance's JSON, rewritten field ids)."""
        plan, change = self._plan, self._plan.change
        if unit.operation == units.REWRITE:
            wanted = pa.schema([plan.schema.field(name) for name in unit.columns])
            found = table.select(list(unit.columns)).cast(wanted)
            found = found.rename_columns([change.working_name(name) for name in unit.columns])
            found = found.add_column(0, "_rowaddr", rows["address"].cast(pa.uint64()))
            return edits.rewrite(self._table, unit.fragment, found) if found.num_rows else (None, [])
        found = table.select(plan.schema.names).filter(pa.array(usable)).cast(plan.schema)
        found = found.rename_columns(plan.working.names).cast(plan.working).combine_chunks()
        if not found.num_rows:
            return None, []
        mode: commits.Mode = "append" if not plan.whole else "overwrite" if plan.base_version else "create"
        return commits.stage(self._uri, found, mode=mode), []

    def _begin(self, number: int) -> None:
        """Ray restarts dead actors for ever; a unit that takes its actor along each time must end the night."""
        uri = units.file_of(self._run, number, "tries")
        before = storage.read_json(uri) if storage.exists(uri) else {}
        tries = int(str(before["tries"])) if before.get("attempt") == self._order.attempt else 0
        if tries >= MAX_TRIES:
            raise ConjoinError(
                f"unit {number} lost its worker {tries} times (out of memory?)",
                where=self._run,
                next="Give workers more memory or lower embed.actors; the same command resumes",
            )
        storage.write_json(uri, {"attempt": self._order.attempt, "tries": tries + 1})

    def _pieces(self, rows: pa.Table) -> list[Piece]:
        """Runs of rows in one row group, cut so that every decoding task has one."""
        most = -(-rows.num_rows // max(self._order.ahead, 1))
        return list(pieces_of(rows, [file.path for file in self._plan.files], most))


def _modality_of(column: str) -> str:
    """The modality that a column of the table belongs to, empty for kept columns and the id."""
    if column == "text":
        return "text"
    stem, _, end = column.rpartition("_")
    return stem if end in ("vec", "hash", "uri", "thumb") else ""


def pieces_of(rows: pa.Table, paths: Sequence[str], most: int) -> Iterator[Piece]:
    """Rows of the plan as pieces of at most `most` rows, each within one row group."""
    place = rows["file"].to_numpy().astype(np.int64) << 32 | rows["row_group"].to_numpy()
    bounds = np.flatnonzero(np.diff(place, prepend=-1, append=-1))
    positions, ids = rows["row"].to_numpy(), rows["id"].combine_chunks()
    for first, last in itertools.pairwise(bounds.tolist()):
        path, row_group = paths[rows["file"][first].as_py()], rows["row_group"][first].as_py()
        for start in range(first, last, most):
            stop = min(start + most, last)
            yield Piece(path, row_group, start, positions[start:stop], ids.slice(start, stop - start))


def _state(rows: pa.Table, columns: pa.Table, modalities: Sequence[str]) -> pa.Table:
    """Position, id and hashes: as just computed where the unit did, else as planned."""
    schema = state_schema(rows.schema.field("id").type, modalities)
    fresh = {name for name in columns.schema.names if name.endswith("_hash")}
    merged = [columns[name] if name in fresh else rows[name] for name in schema.names]
    return pa.table(merged, schema=schema)


def _quarantined(rows: pa.Table, troubles: Sequence[Trouble], plan: Plan) -> pa.Table:
    schema = quarantine_schema(rows.schema.field("id").type)
    paths = [file.path for file in plan.files]
    found = rows.take(pa.array([trouble.row for trouble in troubles], pa.int64())).to_pylist()
    entries = [
        {
            "id": row["id"],
            "modality": trouble.modality,
            "run_id": plan.run_id,
            "stage": trouble.stage,
            "reason": trouble.reason,
            "file": paths[row["file"]],
            "row_group": row["row_group"],
            "row": row["row"],
        }
        for trouble, row in zip(troubles, found, strict=True)
    ]
    return pa.Table.from_pylist(cast("list[dict[str, object]]", entries), schema)
