"""What the steps of one planned run do and find out; nightly.py says in which order.

Assumes: each is safe to repeat.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, NoReturn, TypeVar

import pyarrow as pa

from conjoin.pipeline import cleaning, edits, night_page, runs, store
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.embed import Attempt
from conjoin.pipeline.errors import ConjoinError, GateError
from conjoin.pipeline.estimate import last_rate
from conjoin.pipeline.full_text import index_texts
from conjoin.pipeline.gates import Expected, GateResult, check_gates, check_indexed
from conjoin.pipeline.index import build
from conjoin.pipeline.night import Night, bytes_of
from conjoin.pipeline.plan import Plan, changed_since
from conjoin.pipeline.progress import ShowProgress
from conjoin.pipeline.publish import Entry, Lease, check_lease, reject
from conjoin.pipeline.quarantine import groups_of, rows_of
from conjoin.pipeline.state import manifest_of_run
from conjoin.pipeline.units import Record

if TYPE_CHECKING:
    import lance

    from conjoin.jobs.config import RunFile

_T = TypeVar("_T")


class Clock:
    """Seconds by step, and when the first began."""

    def __init__(self) -> None:
        self.started, self.seconds = _now(), dict[str, float]()

    def __call__(self, step: str, action: Callable[[], _T]) -> _T:
        with self.timing(step):
            return action()

    @contextmanager
    def timing(self, step: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[step] = round(self.seconds.get(step, 0) + time.monotonic() - started, 3)


@dataclass(slots=True)
class Tonight:
    """What the steps of one run need, and what they find out."""

    config: RunFile
    catalog: Catalog
    plan: Plan
    lease: Lease
    progress: ShowProgress
    clock: Clock = field(default_factory=Clock)
    records: Mapping[int, Record] = field(default_factory=dict)
    candidate: int = 0
    gates: tuple[GateResult, ...] = ()
    indexes: tuple[Mapping[str, object], ...] = ()

    @property
    def uri(self) -> str:
        return self.catalog.table.path

    @property
    def directory(self) -> str:
        return runs.run_directory(self.uri, self.plan.run_id)


def attempt(tonight: Tonight) -> Attempt:
    """Columns that edits will fill are there first; files that changed since the plan are left to the next night."""
    plan, head = tonight.plan, store.head(tonight.uri)
    if head is not None and not plan.whole:
        edits.add_columns(head, pa.schema([plan.working.field(name) for name in plan.change.added]))
        head = store.open_version(tonight.uri, None)
    left = frozenset(changed_since(plan, {}) if tonight.records else ())
    version = 0 if head is None else int(head.version)
    rate = last_rate(tonight.uri, plan.fingerprint) or 0.0
    return Attempt(version, left, tonight.config.cluster.address, lambda: check_lease(tonight.lease), rate)


def judge(tonight: Tonight, candidate: lance.LanceDataset) -> tuple[GateResult, ...]:
    """Gates on the candidate beside the head. Raises GateError."""
    tonight.candidate = int(candidate.version)
    planned, gates = tonight.plan.catalog(tonight.catalog), tonight.config.gates
    return check_gates(candidate, _expected(tonight), gates, live(tonight.uri), planned)


def judge_head(tonight: Tonight) -> tuple[GateResult, ...]:
    """Gates on the indexed head, what the candidate showed among them. Raises GateError."""
    head, planned = store.open_version(tonight.uri, None), tonight.plan.catalog(tonight.catalog)
    return check_indexed(
        head, _expected(tonight), tonight.config.gates, planned, live(tonight.uri), earlier=tonight.gates
    )


def swap(tonight: Tonight) -> None:
    """A new encoder's columns take the place of the old ones; columns that are kept no more go."""
    change = tonight.plan.change
    edits.swap_columns(store.open_version(tonight.uri, None), change.dropped, dict(change.renamed))
    edits.describe(store.open_version(tonight.uri, None), tonight.plan.schema.metadata or {})


def index(tonight: Tonight) -> tuple[Mapping[str, object], ...]:
    """Indexes of texts, ids and vectors brought up to the head; their reports."""
    texts = index_texts(tonight.uri, tonight.config.table.full_text)
    vectors = build(tonight.uri, tonight.config.table)
    return (*(asdict(text) for text in texts), *(asdict(index) for index in vectors))


def _expected(tonight: Tonight) -> Expected:
    """What the gates hold the version against; where rows were left or have no usable value, ids are not counted."""
    uri, plan, records = tonight.uri, tonight.plan, tonight.records.values()
    manifest = manifest_of_run(uri, plan.run_id)
    bad = rows_of(uri, manifest)
    columns = tuple(name for name in plan.schema.names if name.endswith("_vec"))
    known = not plan.whole and not any(record.left or record.excluded for record in records)
    quarantined = 0 if bad is None else len(bad["id"].unique())
    added = plan.counts["new"] if known and "new" in plan.counts and not quarantined else None
    return Expected(manifest.rows, plan.fingerprint, columns, added, None, quarantined)


def rejected(tonight: Tonight, error: GateError) -> NoReturn:
    """Tag what failed, give plain readers of the head the live rows again, and write down why."""
    uri, run_id = tonight.uri, tonight.plan.run_id
    tonight.gates = error.results
    version = store.committed(uri, run_id)
    number = tonight.candidate if version is None else int(store.open_version(uri, None).version)
    entry = reject(uri, number, run_id)
    if live(uri) is not None:
        store.restore(uri)
    write(uri, replace(report(tonight, "rejected", number, entry), problem=str(error)))
    raise error


def report(tonight: Tonight, status: str, version: int, entry: Entry) -> Night:
    """The record of the night. version: made tonight; entry: the move of `live`, or the rejection."""
    uri, plan, records = tonight.uri, tonight.plan, tonight.records
    manifest = manifest_of_run(uri, plan.run_id)
    bad = rows_of(uri, manifest)
    seconds = sum(record.seconds for record in records.values())
    embedded = sum(records[unit.number].planned for unit in plan.units if unit.embed and unit.number in records)
    return Night(
        run_id=plan.run_id,
        status=status,
        table=uri,
        source=tuple(plan.catalog(tonight.catalog).paths),
        started=tonight.clock.started,
        finished=_now(),
        version=version,
        previous=entry.before or 0,
        base=plan.base_version,
        rows=manifest.rows,
        units=len(plan.units),
        quarantined=0 if bad is None else len(bad["id"].unique()),
        bytes_written=bytes_of([record.fragment for record in records.values()]),
        rows_per_s=round(embedded / max(seconds, 1e-9), 1),
        fingerprint=plan.fingerprint,
        encoder=plan.encoder,
        counts={kind: count for kind, count in plan.counts.items() if count},
        gates=tonight.gates,
        seconds=tonight.clock.seconds,
        indexes=tonight.indexes,
        troubles=() if bad is None else groups_of(bad),
        left=tuple(sorted({path for record in records.values() for path in record.left})),
    )


def write(uri: str, night: Night) -> Night:
    """The page first: a run is over once its report is there."""
    night_page.write(uri, night)
    runs.finish(uri, night.run_id, night.to_json())
    return night


def housekeep(tonight: Tonight, night: Night) -> Night:
    """What the table's past left behind goes, as `upkeep` says; the night is over and stays so if that fails."""
    try:
        items = tonight.clock("housekeep", lambda: cleaning.housekeep(tonight.uri, tonight.config.upkeep))
    except ConjoinError as error:
        return write(tonight.uri, replace(night, problem=f"published; housekeeping is left to the next night: {error}"))
    return write(tonight.uri, replace(night, cleaned=items, seconds=tonight.clock.seconds))


def live(uri: str) -> lance.LanceDataset | None:
    """What readers see now, None before the first publish."""
    dataset = store.head(uri)
    return None if dataset is None or store.live_version(dataset) is None else store.open_version(uri)


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
