"""Units: fixed source positions that one actor embeds into one fragment, and the records that say they are done.

Assumes: a unit is a function of the plan alone; its record is written last, when everything it names is durable.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

from conjoin.encoders.spec import Json
from conjoin.pipeline import storage

if TYPE_CHECKING:
    import pyarrow as pa

UNIT_BYTES = 64 << 20
SMALLEST_UNIT = 2_000
UNITS_OF_A_SMALL_CATALOG = 8


INSERT, REWRITE = "insert", "rewrite"


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of a plan: rows that become a new fragment, or rows of a fragment whose columns get new values.

    ids: digest of the rows' ids in order; embed: modalities whose towers run, the others keep their vectors; columns:
    of a rewrite, by their final names; fragment: the one that is rewritten, -1 of an insert.
    """

    number: int
    operation: str
    rows: int
    ids: str
    embed: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    fragment: int = -1

    @classmethod
    def from_json(cls, raw: Mapping[str, object]) -> Unit:
        lists = {name: tuple(cast("list[str]", raw[name])) for name in ("embed", "columns")}
        return cls(**{**raw, **lists})  # type: ignore[arg-type]  # our own JSON, its digest checked


@dataclass(frozen=True, slots=True)
class Record:
    """What an actor left behind for one unit.

    planned, planned_ids: rows of the unit and the digest of their ids, as read from the source; rows, ids: the same of
    the rows in the fragment; excluded: planned rows that are in quarantine alone; quarantined: values in quarantine;
    fragment: Lance's JSON, None when no row was usable; fields: rewritten field ids of that fragment; left: paths of
    files that changed since the plan, whose rows were left to the next night; seconds: wall time.
    """

    unit: int
    plan: str
    planned: int
    planned_ids: str
    rows: int
    ids: str
    excluded: int
    quarantined: int
    fragment: Json
    seconds: float
    fields: tuple[int, ...] = ()
    left: tuple[str, ...] = ()

    @property
    def rows_per_s(self) -> float:
        return self.planned / max(self.seconds, 1e-9)


def unit_rows(wanted: int | str, num_rows: int, row_bytes: int) -> int:
    """Rows of one unit: `wanted`, or about 64 MB of output; finer for a small catalog, so that a kill costs little."""
    if isinstance(wanted, int):
        return wanted
    share = -(-num_rows // UNITS_OF_A_SMALL_CATALOG)
    return max(1, min(UNIT_BYTES // row_bytes, max(SMALLEST_UNIT, share)))


def cut(sizes: Sequence[int], rows: int) -> list[int]:
    """Rows of each unit, at most `rows`; sizes: of the row groups (their planned rows), in order.

    Row groups stay whole where they fit, since reading a part of one costs as much as reading all of it.
    """
    units: list[int] = []
    pending = 0
    for size in sizes:
        if pending and pending + size > rows:
            units.append(pending)
            pending = 0
        if size <= rows:
            pending += size
            continue
        parts = -(-size // rows)
        bounds = [size * part // parts for part in range(parts + 1)]
        units += [stop - start for start, stop in itertools.pairwise(bounds)]
    return [*units, pending] if pending else units


def ids_digest(ids: pa.Array | pa.ChunkedArray) -> str:
    """32 hex digits over the ids in their order; string and int64 ids never collide."""
    return hashlib.blake2b(json.dumps(ids.to_pylist(), ensure_ascii=True).encode(), digest_size=16).hexdigest()


def file_of(run: str, unit: int, what: str) -> str:
    """Where a unit's `json` (the record), `state.parquet` or `bad.parquet` lies."""
    return storage.join(run, "units", f"{unit:05d}.{what}")


def write_record(run: str, record: Record) -> None:
    storage.write_json(file_of(run, record.unit, "json"), asdict(record))


def read_records(run: str, plan: str) -> dict[int, Record]:
    """Records of a run's units by number; those of another plan digest do not count. Raises StorageError if torn."""
    found = [uri for uri in storage.list_files(storage.join(run, "units")) if uri.endswith(".json")]
    records = [_record(storage.read_json(uri)) for uri in found]
    return {record.unit: record for record in records if record.plan == plan}


def read_record(run: str, unit: int, plan: str) -> Record | None:
    uri = file_of(run, unit, "json")
    if not storage.exists(uri):
        return None
    record = _record(storage.read_json(uri))
    return record if record.plan == plan else None


def _record(raw: dict[str, object]) -> Record:
    fields = {name: value for name, value in raw.items() if name != "format"}
    lists = {name: tuple(cast("list[str]", fields.get(name, []))) for name in ("fields", "left")}
    return Record(**{**fields, **lists})  # type: ignore[arg-type]  # our own JSON, its format checked
