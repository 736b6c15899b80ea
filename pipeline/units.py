"""Units: fixed source positions that one actor embeds into one fragment, and the records that say they are done.

Assumes: a unit is a function of the plan alone; its record is written last, when everything it names is durable.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from conjoin.encoders.spec import Json
from conjoin.pipeline import storage

if TYPE_CHECKING:
    import pyarrow as pa

UNIT_BYTES = 64 << 20
SMALLEST_UNIT = 2_000
UNITS_OF_A_SMALL_CATALOG = 8


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows [start, stop) of one row group; `file` counts the plan's files."""

    file: int
    row_group: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Unit:
    """One unit of a plan: `operation` says what happens to its rows; `ids` is the digest of their ids in order."""

    number: int
    operation: str
    rows: int
    ids: str


@dataclass(frozen=True, slots=True)
class Record:
    """What an actor left behind for one unit.

    planned, planned_ids: rows of the unit and the digest of their ids, as read from the source;
    rows, ids: the same of the rows in the fragment; excluded: planned rows that are in quarantine alone;
    quarantined: values in quarantine; fragment: Lance's JSON, None when no row was usable; seconds: wall time.
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

    @property
    def rows_per_s(self) -> float:
        return self.planned / max(self.seconds, 1e-9)


def unit_rows(wanted: int | str, num_rows: int, row_bytes: int) -> int:
    """Rows of one unit: `wanted`, or about 64 MB of output; finer for a small catalog, so that a kill costs little."""
    if isinstance(wanted, int):
        return wanted
    share = -(-num_rows // UNITS_OF_A_SMALL_CATALOG)
    return max(1, min(UNIT_BYTES // row_bytes, max(SMALLEST_UNIT, share)))


def cut(row_groups: Sequence[Sequence[int]], rows: int) -> Iterator[tuple[Slice, ...]]:
    """Units of at most `rows` rows; row_groups: for each file the rows of each row group.

    Row groups stay whole where they fit, since reading a part of one costs as much as reading all of it.
    """
    pending: list[Slice] = []
    for file, group, size in ((f, g, n) for f, sizes in enumerate(row_groups) for g, n in enumerate(sizes) if n):
        if pending and _count(pending) + size > rows:
            yield tuple(pending)
            pending = []
        parts = -(-size // rows)
        bounds = [size * part // parts for part in range(parts + 1)]
        pieces = [Slice(file, group, a, b) for a, b in itertools.pairwise(bounds)]
        if parts > 1:
            yield from ((piece,) for piece in pieces)
        else:
            pending += pieces
    if pending:
        yield tuple(pending)


def _count(slices: Sequence[Slice]) -> int:
    return sum(piece.stop - piece.start for piece in slices)


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
    return Record(**fields)  # type: ignore[arg-type]  # our own JSON, its format checked
