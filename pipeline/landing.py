"""From staged fragments to one committed version: nothing missing, state and quarantine first, then one commit.

Assumes: every effect bears the run id and replaces its own earlier attempt; readers see none of it before publishing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from conjoin.pipeline import state, store
from conjoin.pipeline.errors import ConservationError
from conjoin.pipeline.quarantine import replace_rows
from conjoin.pipeline.units import Record, file_of

if TYPE_CHECKING:
    from conjoin.pipeline.plan import Plan


def check_conserved(plan: Plan, records: Mapping[int, Record]) -> None:
    """Raises ConservationError unless every planned row is in a fragment or in quarantine, exactly once."""
    missing = [unit.number for unit in plan.units if unit.number not in records]
    if missing:
        raise ConservationError(f"{len(missing)} of {len(plan.units)} units have no record", where=f"run {plan.run_id}")
    for unit in plan.units:
        record = records[unit.number]
        written = record.fragment["physical_rows"] if isinstance(record.fragment, dict) else 0
        fits = record.planned == unit.rows == record.rows + record.excluded and written == record.rows
        if not fits or record.planned_ids != unit.ids:
            raise ConservationError(
                f"unit {unit.number}: {unit.rows} rows planned, {record.planned} read, {written} staged, "
                f"{record.excluded} in quarantine alone; ids {'agree' if record.planned_ids == unit.ids else 'differ'}",
                where=f"run {plan.run_id}",
                next="Start over with `conjoin run --full`",
            )


def prepare(uri: str, run: str, plan: Plan, records: Mapping[int, Record]) -> store.Commit:
    """Write state and quarantine of a run (its directory is `run`) and return the commit that makes them count."""
    check_conserved(plan, records)
    parts = (state.read_parquet(file_of(run, unit.number, "state.parquet")) for unit in plan.units)
    files = state.write_state(uri, plan.run_id, plan.files, parts)
    manifest = state.Manifest(
        run_id=plan.run_id,
        fingerprint=plan.fingerprint,
        encoder=plan.encoder,
        config=plan.config,
        plan=plan.digest,
        rows=sum(record.rows for record in records.values()),
        files=files,
        quarantine=(plan.run_id,),
    )
    state.write_manifest(uri, manifest)
    _fill_quarantine(uri, run, plan, records)
    return store.Commit(
        run_id=plan.run_id,
        schema=plan.schema,
        fragments=[records[unit.number].fragment for unit in plan.units if records[unit.number].fragment is not None],
        read_version=plan.base_version,
        properties={
            store.FINGERPRINT: plan.fingerprint,
            store.PLAN: plan.digest,
            store.STATE: state.manifest_path(plan.run_id),
        },
    )


def _fill_quarantine(uri: str, run: str, plan: Plan, records: Mapping[int, Record]) -> None:
    import pyarrow as pa

    bad = [unit.number for unit in plan.units if records[unit.number].quarantined]
    schema = state.read_parquet(file_of(run, plan.units[0].number, "bad.parquet")).schema
    tables = [state.read_parquet(file_of(run, number, "bad.parquet")) for number in bad]
    replace_rows(uri, plan.run_id, pa.concat_tables(tables) if tables else schema.empty_table())
