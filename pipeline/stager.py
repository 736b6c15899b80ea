"""One actor of the pool: a unit's rows in, one staged fragment and its record out.

Assumes: a repeated unit gives the same rows and vectors; its record replaces the earlier one.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

from conjoin.encoders.spec import Json
from conjoin.pipeline import storage, store, units
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.chunks import Piece, Recipe, chunks
from conjoin.pipeline.errors import ConjoinError, ConservationError, EncoderError
from conjoin.pipeline.gathered import Gathered, Trouble
from conjoin.pipeline.plan import Plan, load_plan, open_rows
from conjoin.pipeline.quarantine import quarantine_schema
from conjoin.pipeline.runs import run_directory
from conjoin.pipeline.state import parquet_bytes, state_schema

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from conjoin.pipeline.embedder import Embedder

MAX_TRIES = 3


@dataclass(frozen=True, slots=True)
class Order:
    """What an actor is told once.

    ahead: pieces that CPU tasks decode for it at a time; threads: torch's; attempt: names this start of the night.
    """

    catalog: Catalog
    run_id: str
    ahead: int
    threads: int
    attempt: str = ""


class Stager:
    """Callable on batches {unit: (1,) int64}, as Ray Data's map_batches wants it."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._uri = order.catalog.table.path
        self._run = run_directory(self._uri, order.run_id)

    # What may raise waits for the first unit: of an error in a constructor Ray says only that the actor died.
    @cached_property
    def _plan(self) -> Plan:
        return load_plan(self._run)

    @cached_property
    def _rows(self) -> pq.ParquetFile:
        return open_rows(self._run)

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
        rows = self._rows.read_row_group(number)
        if units.ids_digest(rows["id"]) != unit.ids:
            raise ConservationError(f"rows.parquet: unit {number} is not the planned one", where=self._run)
        plan, source = self._plan, self._order.catalog.source
        towers = {name: self._embedder.spec.towers[name] for name in plan.modalities}
        gathered = Gathered(self._embedder, plan.schema, plan.modalities, rows.num_rows)
        # An actor's share of the CPUs, over the tasks that decode for it.
        threads = max(1, self._order.threads // max(1, self._order.ahead))
        recipe = Recipe(source, towers, plan.schema, plan.thumbnail_px, threads)
        for chunk in chunks(recipe, self._pieces(rows), self._order.ahead):
            gathered.add(chunk)
        return self._leave(unit, rows, gathered, started)

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

    def _leave(self, unit: units.Unit, rows: pa.Table, gathered: Gathered, started: float) -> units.Record:
        """Everything a record names first, the record last."""
        table, troubles = gathered.finish()
        fragment: Json = None
        if table.num_rows:
            fragment = store.stage(self._uri, table, first=self._plan.base_version == 0)
        state = _state(rows, gathered.columns, self._plan.modalities)
        storage.write_bytes(units.file_of(self._run, unit.number, "state.parquet"), parquet_bytes(state))
        bad = _quarantined(rows, troubles, self._plan)
        storage.write_bytes(units.file_of(self._run, unit.number, "bad.parquet"), parquet_bytes(bad))
        record = units.Record(
            unit=unit.number,
            plan=self._plan.digest,
            planned=rows.num_rows,
            planned_ids=units.ids_digest(gathered.columns["id"]),
            rows=table.num_rows,
            ids=units.ids_digest(table["id"]),
            excluded=rows.num_rows - table.num_rows,
            quarantined=len({trouble.row for trouble in troubles}),
            fragment=fragment,
            seconds=time.monotonic() - started,
        )
        units.write_record(self._run, record)
        return record


def pieces_of(rows: pa.Table, paths: Sequence[str], most: int) -> Iterator[Piece]:
    """Rows of the plan as pieces of at most `most` rows, each within one row group."""
    import numpy as np

    place = rows["file"].to_numpy().astype(np.int64) << 32 | rows["row_group"].to_numpy()
    bounds = np.flatnonzero(np.diff(place, prepend=-1, append=-1))
    positions, ids = rows["row"].to_numpy(), rows["id"].combine_chunks()
    for first, last in itertools.pairwise(bounds.tolist()):
        path, row_group = paths[rows["file"][first].as_py()], rows["row_group"][first].as_py()
        for start in range(first, last, most):
            stop = min(start + most, last)
            yield Piece(path, row_group, start, positions[start:stop], ids.slice(start, stop - start))


def _state(rows: pa.Table, columns: pa.Table, modalities: Iterable[str]) -> pa.Table:
    import pyarrow as pa

    schema = state_schema(rows.schema.field("id").type, modalities)
    merged = [rows[name] if name in rows.schema.names else columns[name] for name in schema.names]
    return pa.table(merged, schema=schema)


def _quarantined(rows: pa.Table, troubles: Sequence[Trouble], plan: Plan) -> pa.Table:
    import pyarrow as pa

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
