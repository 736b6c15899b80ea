"""From staged units to one committed version: nothing missing, state and quarantine first, then one commit.

Assumes: every effect bears the run id and replaces its own earlier attempt; readers see none of it before publishing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from conjoin.pipeline import commits, edits, state, storage, store
from conjoin.pipeline import plan as plans
from conjoin.pipeline.errors import ConservationError
from conjoin.pipeline.quarantine import quarantine_schema, replace_rows
from conjoin.pipeline.units import INSERT, REWRITE, Record, file_of, ids_digest

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from conjoin.pipeline.plan import Plan

_BATCH_ROWS = 50_000
_MEMORY = "1GB"


def check_conserved(run: str, plan: Plan, records: Mapping[int, Record]) -> None:
    """Raises ConservationError unless every planned row is staged, in quarantine or left out by name, exactly once."""
    missing = [unit.number for unit in plan.units if unit.number not in records]
    if missing:
        raise ConservationError(f"{len(missing)} of {len(plan.units)} units have no record", where=f"run {plan.run_id}")
    for unit in plan.units:
        record = records[unit.number]
        ids, rows = (unit.ids, unit.rows) if not record.left else _not_left(run, plan, record)
        written = record.fragment["physical_rows"] if isinstance(record.fragment, dict) else 0
        whole = unit.operation == REWRITE or written == record.rows
        if not (record.planned == rows == record.rows + record.excluded and whole) or record.planned_ids != ids:
            raise ConservationError(
                f"unit {unit.number}: {rows} rows planned, {record.planned} read, {written} staged, "
                f"{record.excluded} in quarantine alone; ids {'agree' if record.planned_ids == ids else 'differ'}",
                where=f"run {plan.run_id}",
                next="Start over with `conjoin run --full`",
            )


def _not_left(run: str, plan: Plan, record: Record) -> tuple[str, int]:
    """Digest and number of the ids of a unit without the rows of files that changed meanwhile."""
    rows = _kept_rows(run, plan, record)
    return ids_digest(rows["id"]), rows.num_rows


def _kept_rows(run: str, plan: Plan, record: Record, *, left: bool = False) -> pa.Table:
    """The plan's rows of a unit that it did, or those that it left."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = plans.PlanRows(run, plan).read(record.unit)
    numbers = [number for number, file in enumerate(plan.files) if file.path in record.left]
    of_left = pc.is_in(rows["file"], pa.array(numbers, pa.int32()))
    return rows.filter(of_left if left else pc.invert(of_left))


def prepare(uri: str, run: str, plan: Plan, records: Mapping[int, Record]) -> commits.Commit:
    """Write state, quarantine and edits of a run (its directory is `run`); returns the commit that makes them count."""
    check_conserved(run, plan, records)
    gone = None if plan.whole else _gone(run, plan, records)
    _write_state(uri, run, plan, records, num_gone=0 if gone is None else len(gone))
    _fill_quarantine(uri, run, plan, records)
    inserted = [records[unit.number].fragment for unit in plan.units if unit.operation == INSERT]
    return commits.Commit(
        run_id=plan.run_id,
        schema=plan.schema,
        fragments=[fragment for fragment in inserted if fragment is not None],
        read_version=plan.base_version,
        properties={
            store.FINGERPRINT: plan.fingerprint,
            store.PLAN: plan.digest,
            store.STATE: state.manifest_path(plan.run_id),
        },
        edits=None if gone is None else _edits(uri, run, plan, records, gone),
    )


def _write_state(uri: str, run: str, plan: Plan, records: Mapping[int, Record], *, num_gone: int) -> None:
    """State files of the files that were opened, then the manifest, which takes the others over from the base run."""
    base = None if plan.whole else state.manifest_of_run(uri, plan.base_run)
    before = {} if base is None else {entry.file.path: entry for entry in base.files}
    stated = {number: plan.files[number] for number in plan.stated}
    with _stated_rows(run, plan, records) as rows:
        written = state.write_state(uri, plan.run_id, stated, rows)
    kept = [before[file.path] for number, file in enumerate(plan.files) if number not in stated]
    inserted = sum(records[unit.number].rows for unit in plan.units if unit.operation == INSERT)
    state.write_manifest(
        uri,
        state.Manifest(
            run_id=plan.run_id,
            fingerprint=plan.fingerprint,
            encoder=plan.encoder,
            config=plan.config,
            plan=plan.digest,
            rows=(0 if base is None else base.rows) - num_gone + inserted,
            files=tuple(sorted([*written, *kept], key=lambda entry: entry.file.path)),
            quarantine=(plan.run_id,),
            precision=plan.precision,
            columns=plans.text_of_schema(plan.columns),
        ),
    )


@contextmanager
def _stated_rows(run: str, plan: Plan, records: Mapping[int, Record]) -> Iterator[Iterator[pa.Table]]:
    """The state of every opened file in order: rows that nothing touched, rows of units, rows left as they were."""
    import duckdb

    schema = state.state_schema(plan.schema.field("id").type, plan.modalities)
    with (
        storage.explaining("spool the state", tempfile.gettempdir()),
        tempfile.TemporaryDirectory(prefix="conjoin-state-") as folder,
        duckdb.connect(str(Path(folder, "state.duckdb"))) as connection,
    ):
        connection.execute(f"SET memory_limit = '{_MEMORY}'; SET temp_directory = '{folder}'")
        connection.execute("SET preserve_insertion_order = false")
        connection.register("rows", schema.empty_table())
        connection.execute("CREATE TABLE stated AS FROM rows")
        for table in _parts_of_state(run, plan, records, schema.names):
            connection.register("rows", table)
            connection.execute("INSERT INTO stated FROM rows")
        found = connection.sql("FROM stated ORDER BY file, row_group, row").to_arrow_reader(_BATCH_ROWS)
        yield (pa_table.cast(schema) for pa_table in map(_table, found))


def _table(batch: pa.RecordBatch) -> pa.Table:
    import pyarrow as pa

    return pa.Table.from_batches([batch])


def _parts_of_state(run: str, plan: Plan, records: Mapping[int, Record], names: Sequence[str]) -> Iterator[pa.Table]:
    yield state.read_parquet(plans.file_of_plan(run, plan, plans.UNCHANGED)).select(list(names))
    for unit in plan.units:
        yield state.read_parquet(file_of(run, unit.number, "state.parquet")).select(list(names))
        if records[unit.number].left:
            yield _as_they_were(_kept_rows(run, plan, records[unit.number], left=True), names)


def _as_they_were(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """The old state of rows that were left; those that the live version does not know are left out."""
    import pyarrow.compute as pc

    digests = [name for name in names if name.endswith("_hash")]
    old = rows.select([name if name not in digests else f"was_{name}" for name in names]).rename_columns(list(names))
    known = [pc.is_valid(old[name]) for name in digests]
    any_known = known[0]
    for more in known[1:]:
        any_known = pc.or_(any_known, more)
    return old.filter(any_known)


def _edits(uri: str, run: str, plan: Plan, records: Mapping[int, Record], gone: np.ndarray) -> commits.Edits:
    """Deletions and rewrites of existing fragments, staged once: a repeated landing finds them written down."""
    path = storage.join(run, "edits.json")
    if storage.exists(path):
        raw = cast("dict[str, list[int]]", storage.read_json(path))
        return commits.Edits(raw["updated"], raw["removed"], raw["fields"], int(cast(int, raw["deleted"])))
    head = store.open_version(uri, None)
    rewritten = [records[unit.number] for unit in plan.units if unit.operation == REWRITE]
    fragments = {plan.units[r.unit].fragment: r.fragment for r in rewritten if r.fragment is not None}
    updated, removed = edits.merged(fragments, edits.delete(head, gone))
    fields = sorted({field for record in rewritten for field in record.fields})
    found = commits.Edits(updated, removed, fields, len(gone))
    storage.write_json(path, asdict(found))
    return found


def _gone(run: str, plan: Plan, records: Mapping[int, Record]) -> np.ndarray:
    """Addresses of rows that leave the table or are replaced, (N,) uint64."""
    import numpy as np

    parts = [_deleted(run, plan)["address"].drop_null()]
    for unit in plan.units:
        if unit.operation == INSERT and not plan.whole:
            parts.append(_kept_rows(run, plan, records[unit.number])["address"].drop_null())
    return np.concatenate([part.to_numpy().astype(np.uint64) for part in parts])


def _deleted(run: str, plan: Plan) -> pa.Table:
    return state.read_parquet(plans.file_of_plan(run, plan, plans.DELETED))


def _fill_quarantine(uri: str, run: str, plan: Plan, records: Mapping[int, Record]) -> None:
    """Tonight's troubles, and earlier ones of rows that nobody touched."""
    import pyarrow as pa

    earlier = state.read_parquet(plans.file_of_plan(run, plan, plans.QUARANTINED))
    schema = quarantine_schema(plan.schema.field("id").type)
    tables = [_of_run(earlier, plan.run_id, schema)]
    bad = [unit.number for unit in plan.units if records[unit.number].quarantined]
    tables += [state.read_parquet(file_of(run, number, "bad.parquet")) for number in bad]
    replace_rows(uri, plan.run_id, pa.concat_tables([table.cast(schema) for table in tables]))


def _of_run(rows: pa.Table, run_id: str, schema: pa.Schema) -> pa.Table:
    import pyarrow as pa

    position = rows.schema.get_field_index("run_id")
    return rows.set_column(position, "run_id", pa.array([run_id] * rows.num_rows, pa.string())).select(schema.names)
