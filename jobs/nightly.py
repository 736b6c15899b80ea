"""`conjoin run`: the ordered steps of a night; each is skipped if its run id already did it.

Assumes: every step is safe to repeat, so a killed night is the same command again.
"""

from __future__ import annotations

import datetime as dt
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar

import pyarrow as pa

from conjoin.jobs.stopping import stoppable
from conjoin.pipeline import landing, runs, store
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.draft import base_of, drafting, due_rows, freeze
from conjoin.pipeline.edits import add_columns, swap_columns
from conjoin.pipeline.embed import Attempt, embed
from conjoin.pipeline.errors import ConfigError, GateError, Interrupted
from conjoin.pipeline.estimate import check_limits, estimate, last_rate
from conjoin.pipeline.forecast import Forecast, forecast
from conjoin.pipeline.index import build
from conjoin.pipeline.plan import Plan, changed_since, load_plan
from conjoin.pipeline.progress import ShowProgress, silent
from conjoin.pipeline.publish import Expected, Lease, check_gates, check_lease, publish, take_lease
from conjoin.pipeline.state import manifest_of_run, read_manifest
from conjoin.pipeline.survey import is_current, survey
from conjoin.pipeline.units import Record, read_records

if TYPE_CHECKING:
    import lance

    from conjoin.jobs.config import RunFile

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RunReport:
    """One night. seconds: by step; rows_per_s: of embedding, per wall second of this attempt's actors.

    status: `published`, `unchanged` (nothing to do), `rejected` (a gate failed) or `abandoned` (--full started over).
    """

    run_id: str
    status: Literal["published", "unchanged", "rejected", "abandoned"]
    version: int = 0
    rows: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    quarantined: int = 0
    units: int = 0
    fingerprint: str = ""
    encoder: str = ""
    rows_per_s: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    indexes: tuple[Mapping[str, object], ...] = ()
    problem: str = ""

    def to_json(self) -> dict[str, object]:
        return asdict(self)


class _Clock:
    """Seconds by step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

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


def run(
    config: RunFile, date: dt.date | None = None, *, full: bool = False, progress: ShowProgress = silent
) -> RunReport:
    """Bring the table up to date with the source and publish it.

    date: the logical date, today by default; full: make the whole table anew, whatever is published, and start over
    where an unfinished run cannot be resumed. Raises the ConjoinError of the step that failed; Interrupted on Ctrl-C.
    """
    catalog = _catalog(config)
    uri = catalog.table.path
    with _saying_how_far(uri):
        night = _Night(
            config, catalog, take_lease(uri, f"{catalog.name} of {socket.gethostname()}"), _Clock(), progress
        )
        report = None
        for plan in _resumable(night, full=full):
            report = _finish(night, plan)
        base = night.clock("survey", lambda: base_of(uri, full=full and report is None))
        found = night.clock("survey", lambda: survey(catalog, base.known))
        due = due_rows(base)
        if due is None and is_current(base.manifest, found, catalog.embed.precision):
            return report or _unchanged(uri)
        run_id = runs.next_run_id(uri, catalog.name, date or dt.date.today())  # noqa: DTZ011
        with night.clock.timing("plan"), drafting(catalog, found, base, due) as draft:
            _check_limits(config, draft.embedded, found.fingerprint)
            plan = freeze(draft, run_id, runs.run_directory(uri, run_id))
        return _finish(night, plan)


def plan(config: RunFile, *, full: bool = False) -> Forecast:
    """What `run` would do now; nothing is written. `over` says which of the limits it would break.

    Raises SourceError, TableError or EncoderError for what would stop the night before it starts.
    """
    catalog = _catalog(config)
    base = base_of(catalog.table.path, full=full, restoring=False)
    found = survey(catalog, base.known)
    with drafting(catalog, found, base, due_rows(base)) as draft:
        rate = last_rate(catalog.table.path, found.fingerprint)
        if rate is None:
            return forecast(draft)
        cluster = config.cluster
        expected = estimate(draft.embedded, rate, cluster.gpus, cluster.price_per_gpu_hour)
        try:
            check_limits(expected, config.limits)
        except GateError as error:
            return forecast(draft, expected, error.what)
        return forecast(draft, expected)


@dataclass(frozen=True, slots=True)
class _Night:
    """What every step needs."""

    config: RunFile
    catalog: Catalog
    lease: Lease
    clock: _Clock
    progress: ShowProgress


def _finish(night: _Night, plan: Plan) -> RunReport:
    """embed and stage -> candidate and its gates -> commit -> swap columns -> index -> gates -> publish -> report."""
    uri, clock, gates = night.catalog.table.path, night.clock, night.config.gates
    run, records = runs.run_directory(uri, plan.run_id), read_records(runs.run_directory(uri, plan.run_id), plan.digest)
    try:
        if store.committed(uri, plan.run_id) is None:
            attempt = clock("columns", lambda: _attempt(night, plan, resumed=bool(records)))
            records = clock(
                "embed",
                lambda: embed(plan.catalog(night.catalog), plan, attempt, progress=night.progress),
            )
            work = clock("state", lambda: landing.prepare(uri, run, plan, records))
            candidate = clock("candidate", lambda: store.candidate(uri, work))
            if candidate is not None and not plan.change.renamed:
                clock("gates", lambda: check_gates(candidate, _expected(uri, plan), gates, _live(uri)))
            check_lease(night.lease)
            clock("commit", lambda: store.commit(uri, work))
        clock(
            "swap", lambda: swap_columns(store.open_version(uri, None), plan.change.dropped, dict(plan.change.renamed))
        )
        check_lease(night.lease)
        indexes = clock("index", lambda: build(uri, night.config.table))
        indexed = store.open_version(uri, None)
        clock("gates on the head", lambda: check_gates(indexed, _expected(uri, plan), gates, _live(uri)))
        version = int(store.open_version(uri, None).version)
        clock("publish", lambda: publish(uri, version, plan.run_id, night.lease))
    except GateError as error:
        _rejected(uri, plan, records, clock, error)
    report = _report(plan, records, clock, version, tuple(asdict(index) for index in indexes))
    report = replace(report, rows=manifest_of_run(uri, plan.run_id).rows)
    runs.finish(uri, plan.run_id, report.to_json())
    return report


def _expected(uri: str, plan: Plan) -> Expected:
    columns = tuple(name for name in plan.schema.names if name.endswith("_vec"))
    return Expected(manifest_of_run(uri, plan.run_id).rows, plan.fingerprint, columns)


def _attempt(night: _Night, plan: Plan, *, resumed: bool) -> Attempt:
    """Columns that edits will fill are there first; files that changed since the plan are left to the next night."""
    uri = night.catalog.table.path
    head = store.head(uri)
    if head is not None and not plan.whole:
        check_lease(night.lease)
        add_columns(head, pa.schema([plan.working.field(name) for name in plan.change.added]))
        head = store.open_version(uri, None)
    left = frozenset(changed_since(plan, {}) if resumed else ())
    version = 0 if head is None else int(head.version)
    return Attempt(version, left, night.config.cluster.address, lambda: check_lease(night.lease))


def _check_limits(config: RunFile, rows: int, fingerprint: str) -> None:
    """Raises GateError when the plan is expected to exceed the limits; nothing was begun then."""
    rate = last_rate(config.table.path, fingerprint)
    if rate is not None:
        check_limits(estimate(rows, rate, config.cluster.gpus, config.cluster.price_per_gpu_hour), config.limits)


def _report(
    plan: Plan, records: Mapping[int, Record], clock: _Clock, version: int, indexes: tuple[Mapping[str, object], ...]
) -> RunReport:
    seconds = sum(record.seconds for record in records.values())
    embedded = sum(records[unit.number].planned for unit in plan.units if unit.embed and unit.number in records)
    return RunReport(
        run_id=plan.run_id,
        status="published",
        version=version,
        counts={kind: count for kind, count in plan.counts.items() if count},
        quarantined=sum(record.quarantined for record in records.values()),
        units=len(plan.units),
        fingerprint=plan.fingerprint,
        encoder=plan.encoder,
        rows_per_s=round(embedded / max(seconds, 1e-9), 1),
        seconds=clock.seconds,
        indexes=indexes,
    )


def _rejected(uri: str, plan: Plan, records: Mapping[int, Record], clock: _Clock, error: GateError) -> NoReturn:
    quarantined = sum(record.quarantined for record in records.values())
    report = RunReport(
        plan.run_id,
        "rejected",
        quarantined=quarantined,
        units=len(plan.units),
        fingerprint=plan.fingerprint,
        encoder=plan.encoder,
        seconds=clock.seconds,
        problem=str(error),
    )
    runs.finish(uri, plan.run_id, report.to_json())
    raise error


def _resumable(night: _Night, *, full: bool) -> Iterator[Plan]:
    """Unfinished runs, oldest first; one whose base is live no more (a rollback), or any with `full`, is abandoned."""
    uri = night.catalog.table.path
    for run_id in runs.unfinished(uri):
        plan = load_plan(runs.run_directory(uri, run_id))
        problem = "" if store.committed(uri, run_id) and not full else _obstacle(uri, plan, full=full)
        if _is_stale(uri, plan):
            problem = f"built on run {plan.base_run}, live is {_live_run(uri) or 'nothing'}"
        if not problem:
            yield plan
            continue
        runs.finish(uri, run_id, RunReport(run_id, "abandoned", problem=problem).to_json())


def _obstacle(uri: str, plan: Plan, *, full: bool) -> str:
    """Why an uncommitted plan is given up, empty if it is finished first."""
    if full and store.committed(uri, plan.run_id) is None:
        return "started over by --full"
    if not read_records(runs.run_directory(uri, plan.run_id), plan.digest) and changed_since(plan, {}):
        return "the source changed before the first unit was done"
    return ""


def _is_stale(uri: str, plan: Plan) -> bool:
    return not plan.whole and _live_run(uri) not in (plan.base_run, plan.run_id)


def _live_run(uri: str) -> str:
    live = _live(uri)
    return "" if live is None else store.run_of(live).get(store.RUN_ID, "")


def _unchanged(uri: str) -> RunReport:
    """The report of a night with nothing to do: what is live."""
    dataset = store.open_version(uri)
    facts, manifest = store.run_of(dataset), read_manifest(dataset)
    assert manifest is not None
    return RunReport(
        run_id=facts[store.RUN_ID],
        status="unchanged",
        version=int(dataset.version),
        rows=manifest.rows,
        fingerprint=manifest.fingerprint,
        encoder=manifest.encoder,
    )


def _live(uri: str) -> lance.LanceDataset | None:
    """What readers see now, None before the first publish."""
    dataset = store.head(uri)
    return None if dataset is None or store.live_version(dataset) is None else store.open_version(uri)


def _catalog(config: RunFile) -> Catalog:
    if config.encoder is None:
        raise ConfigError("the run file names no encoder", next="`conjoin train` makes one; then set `encoder:`")
    return Catalog(config.name, config.source, config.encoder, config.table, config.embed).absolute()


@contextmanager
def _saying_how_far(uri: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the night between two effects; what is done stays."""
    try:
        with stoppable():
            yield
    except KeyboardInterrupt:
        raise Interrupted(f"stopped: {_how_far(uri)}", where=uri, next="The same command resumes") from None


def _how_far(uri: str) -> str:
    for run_id in runs.unfinished(uri):
        run = runs.run_directory(uri, run_id)
        plan = load_plan(run)
        done = len(read_records(run, plan.digest))
        return f"{done} of {len(plan.units)} units of run {run_id} are done and stay"
    return "nothing was begun"
