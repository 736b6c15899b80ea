"""`conjoin run`: the ordered steps of a night; each is skipped if its run id already did it.

Assumes: every step is safe to repeat, so a killed night is the same command again.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar

from conjoin.jobs.stopping import stoppable
from conjoin.pipeline import landing, runs, store
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.errors import ConfigError, ConjoinError, GateError, Interrupted
from conjoin.pipeline.estimate import check_limits, estimate, last_rate
from conjoin.pipeline.plan import Plan, Survey, check_resumable, is_current, load_plan, plan_run, survey
from conjoin.pipeline.progress import ShowProgress, silent
from conjoin.pipeline.state import Manifest, read_manifest
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
        started = time.monotonic()
        try:
            return action()
        finally:
            self.seconds[step] = round(time.monotonic() - started, 3)


def run(
    config: RunFile, date: dt.date | None = None, *, full: bool = False, progress: ShowProgress = silent
) -> RunReport:
    """Bring the table up to date with the source and publish it.

    date: the logical date, today by default; full: embed every row again, whatever is published, and start over where
    an unfinished run cannot be resumed. Raises the ConjoinError of the step that failed; Interrupted on Ctrl-C.
    """
    catalog = _catalog(config)
    uri = catalog.table.path
    with _saying_how_far(uri):
        live, clock = _live_manifest(uri), _Clock()
        known = {entry.file.path: entry.file for entry in live.files} if live else {}
        found = clock("survey", lambda: survey(catalog, known))
        report = None
        for plan in _resumable(uri, found, full=full):
            report = _night(config, catalog, plan, clock, progress)
        if is_current(_live_manifest(uri), found) and (report is not None or not full):
            return report or _unchanged(uri)
        run_id = runs.next_run_id(uri, catalog.name, date or dt.date.today())  # noqa: DTZ011
        plan = clock("plan", lambda: plan_run(catalog, run_id, found, full=full))
        return _night(config, catalog, plan, clock, progress)


def _night(config: RunFile, catalog: Catalog, plan: Plan, clock: _Clock, progress: ShowProgress) -> RunReport:
    """embed and stage -> gates on the candidate -> commit -> index -> gates -> publish -> report."""
    from conjoin.pipeline.embed import embed
    from conjoin.pipeline.gates import Expected, GateResult, check_gates, check_indexed
    from conjoin.pipeline.index import build
    from conjoin.pipeline.publish import publish

    catalog = catalog.reading(plan.path)
    uri, run = catalog.table.path, runs.run_directory(catalog.table.path, plan.run_id)
    records = read_records(run, plan.digest)

    def expected() -> Expected:
        columns = tuple(name for name in plan.schema.names if name.endswith("_vec"))
        return Expected(sum(record.rows for record in records.values()), plan.fingerprint, columns)

    checked: tuple[GateResult, ...] = ()
    if store.committed(uri, plan.run_id) is None:
        _check_limits(config, plan, records)
    try:
        if store.committed(uri, plan.run_id) is None:
            records = clock("embed", lambda: embed(catalog, plan, address=config.cluster.address, progress=progress))
            work = clock("state", lambda: landing.prepare(uri, run, plan, records))
            candidate = clock("candidate", lambda: store.candidate(uri, work))
            if candidate is not None:
                checked = clock("gates", lambda: check_gates(candidate, expected(), config.gates, _live(uri), catalog))
            clock("commit", lambda: store.commit(uri, work))
        indexes = clock("index", lambda: build(uri, config.table))
        head = store.open_version(uri, None)
        clock(
            "gates on the head",
            lambda: check_indexed(head, expected(), config.gates, catalog, _live(uri), checked),
        )
        version = int(store.open_version(uri, None).version)
        clock("publish", lambda: publish(uri, version, plan.run_id))
    except GateError as error:
        _rejected(uri, plan, records, clock, error)
    report = _report(plan, records, clock, version, tuple(asdict(index) for index in indexes))
    runs.finish(uri, plan.run_id, report.to_json())
    return report


def _check_limits(config: RunFile, plan: Plan, records: Mapping[int, Record]) -> None:
    """Raises GateError when what is left of the plan is expected to exceed the limits; nothing was begun then."""
    rate = last_rate(config.table.path, plan.fingerprint)
    if rate is not None:
        rows = plan.rows - sum(record.planned for record in records.values())
        check_limits(estimate(rows, rate, config.cluster.gpus, config.cluster.price_per_gpu_hour), config.limits)


def _report(
    plan: Plan, records: Mapping[int, Record], clock: _Clock, version: int, indexes: tuple[Mapping[str, object], ...]
) -> RunReport:
    seconds = sum(record.seconds for record in records.values())
    return RunReport(
        run_id=plan.run_id,
        status="published",
        version=version,
        rows=sum(record.rows for record in records.values()),
        quarantined=sum(record.quarantined for record in records.values()),
        units=len(plan.units),
        fingerprint=plan.fingerprint,
        encoder=plan.encoder,
        rows_per_s=round(plan.rows / max(seconds, 1e-9), 1),
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


def _resumable(uri: str, found: Survey, *, full: bool) -> Iterator[Plan]:
    """Unfinished runs, oldest first. With `full`, one that cannot be resumed is abandoned instead of an error."""
    for run_id in runs.unfinished(uri):
        plan = load_plan(runs.run_directory(uri, run_id))
        try:
            if store.committed(uri, run_id) is None:
                check_resumable(plan, found)
        except ConjoinError as error:
            if not full:
                raise
            runs.finish(uri, run_id, RunReport(run_id, "abandoned", problem=str(error)).to_json())
            continue
        yield plan


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


def _live_manifest(uri: str) -> Manifest | None:
    dataset = store.head(uri)
    if dataset is None or store.live_version(dataset) is None:
        return None
    return read_manifest(store.open_version(uri))


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
