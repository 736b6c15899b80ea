"""`conjoin run`: the ordered steps of a night; each is skipped if its run id already did it.

Assumes: every step is safe to repeat, so a killed night is the same command again. Whoever starts a night last takes
the lease; an earlier one that still works finds out before its next effect and stops.
"""

from __future__ import annotations

import datetime as dt
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import pyarrow as pa

from conjoin.jobs import tonight as steps
from conjoin.jobs.stopping import stoppable
from conjoin.pipeline import commits, landing, runs, storage, store
from conjoin.pipeline.catalog import Catalog
from conjoin.pipeline.compaction import compact
from conjoin.pipeline.draft import base_of, drafting
from conjoin.pipeline.embed import embed
from conjoin.pipeline.errors import ConfigError, GateError, Interrupted
from conjoin.pipeline.estimate import check_limits, estimate, last_rate
from conjoin.pipeline.forecast import Forecast, forecast
from conjoin.pipeline.freezing import freeze
from conjoin.pipeline.heartbeat import Heartbeat
from conjoin.pipeline.hook import run_hook
from conjoin.pipeline.night import Night
from conjoin.pipeline.plan import Plan, changed_since, load_plan
from conjoin.pipeline.progress import ShowProgress, silent
from conjoin.pipeline.publish import Lease, check_lease, publish, take_lease
from conjoin.pipeline.retries import due
from conjoin.pipeline.state import read_manifest
from conjoin.pipeline.store import canary_uri
from conjoin.pipeline.survey import is_current, survey
from conjoin.pipeline.units import read_records

if TYPE_CHECKING:
    from conjoin.jobs.config import RunFile
    from conjoin.pipeline.draft import Base

_T = TypeVar("_T")


def run(
    config: RunFile,
    date: dt.date | None = None,
    *,
    full: bool = False,
    limit: int | None = None,
    progress: ShowProgress = silent,
) -> Night:
    """Bring the table up to date with the source and publish it.

    date: the logical date, today by default; full: make the whole table anew, whatever is published, and start over
    where an unfinished run cannot be resumed; limit: a canary night, the first so many rows into a scratch table
    `<name>__canary.lance`, made anew each time. Raises the ConjoinError of the step that failed; Interrupted on Ctrl-C.
    """
    catalog = _catalog(config)
    catalog = catalog if limit is None else _canary(catalog)
    uri = catalog.table.path
    with _saying_how_far(uri):
        lease = _lease(catalog) if storage.exists(store.bookkeeping(uri)) else None
        report = None
        for plan in _resumable(uri, full=full):
            report = _night(steps.Tonight(config, catalog, plan, lease or _lease(catalog), progress))
        clock = steps.Clock()
        run_id = runs.next_run_id(uri, catalog.name, date or dt.date.today())  # noqa: DTZ011
        with Heartbeat(uri, run_id, progress, planning=True) as heart:
            heart.step("survey")
            base = clock("survey", lambda: base_of(uri, full=full and report is None))
            found = clock("survey", lambda: survey(catalog, base.known))
            again = _due(catalog, base)
            if again is None and is_current(base.manifest, found, catalog.embed.precision):
                return report or _unchanged(uri)
            heart.step("plan")
            with clock.timing("plan"), drafting(catalog, found, base, again, limit, heart.show) as draft:
                _check_limits(config, draft.embedded, found.fingerprint)
                lease = lease or _lease(catalog)
                plan = freeze(draft, run_id, runs.run_directory(uri, run_id))
        return _night(steps.Tonight(config, catalog, plan, lease, progress, clock))


def plan(config: RunFile, *, full: bool = False) -> Forecast:
    """What `run` would do now; nothing is written. `over` says which of the limits it would break.

    Raises SourceError, TableError or EncoderError for what would stop the night before it starts.
    """
    catalog = _catalog(config)
    base = base_of(catalog.table.path, full=full, restoring=False)
    found = survey(catalog, base.known)
    with drafting(catalog, found, base, _due(catalog, base)) as draft:
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


def _lease(catalog: Catalog) -> Lease:
    return take_lease(catalog.table.path, f"{catalog.name} on {socket.gethostname()}, process {os.getpid()}")


def _night(tonight: steps.Tonight) -> Night:
    """The steps of one planned run, in order."""
    uri, plan, clock = tonight.uri, tonight.plan, tonight.clock
    tonight.records = read_records(tonight.directory, plan.digest)
    with Heartbeat(uri, plan.run_id, tonight.progress) as heart:

        def step(name: str, action: Callable[[], _T]) -> _T:
            check_lease(tonight.lease)
            heart.step(name)
            return clock(name, action)

        try:
            if store.committed(uri, plan.run_id) is None:
                attempt = step("columns", lambda: steps.attempt(tonight))
                planned = plan.catalog(tonight.catalog)
                tonight.records = step("embed", lambda: embed(planned, plan, attempt, progress=heart.show))
                work = step("state", lambda: landing.prepare(uri, tonight.directory, plan, tonight.records))
                candidate = step("candidate", lambda: commits.candidate(uri, work))
                if candidate is not None:
                    tonight.gates = step("gates", lambda: steps.judge(tonight, candidate))
                step("commit", lambda: commits.commit(uri, work))
            step("columns", lambda: steps.swap(tonight))
            step("compact", lambda: compact(uri, tonight.config.upkeep))
            tonight.indexes = step("index", lambda: steps.index(tonight))
            tonight.gates = step("gates on the head", lambda: steps.judge_head(tonight))
            version = int(store.open_version(uri, None).version)
            entry = step("publish", lambda: publish(uri, version, plan.run_id, tonight.lease))
        except GateError as error:
            steps.rejected(tonight, error)
        heart.step("hook")
        hook = clock("hook", lambda: run_hook(tonight.config.publish, uri, entry))
    found = steps.write(uri, replace(steps.report(tonight, "published", version, entry), hook=hook))
    return steps.housekeep(tonight, found)


def _resumable(uri: str, *, full: bool) -> Iterator[Plan]:
    """Unfinished runs, oldest first; one whose base is live no more (a rollback), or any with `full`, is abandoned."""
    for run_id in runs.unfinished(uri):
        plan = load_plan(runs.run_directory(uri, run_id))
        problem = _obstacle(uri, plan, full=full)
        if not problem:
            yield plan
            continue
        runs.finish(uri, run_id, Night(run_id, "abandoned", uri, problem=problem).to_json())


def _obstacle(uri: str, plan: Plan, *, full: bool) -> str:
    """Why an unfinished plan is given up, empty if it is finished first."""
    live = steps.live(uri)
    live_run = "" if live is None else store.run_of(live).get(store.RUN_ID, "")
    if not plan.whole and live_run not in (plan.base_run, plan.run_id):
        return f"built on run {plan.base_run}, live is {live_run or 'nothing'}"
    if store.committed(uri, plan.run_id) is not None:
        return ""
    if full:
        return "started over by --full"
    if not read_records(runs.run_directory(uri, plan.run_id), plan.digest) and changed_since(plan, {}):
        return "the source changed before the first unit was done"
    return ""


def _unchanged(uri: str) -> Night:
    """The report of a night with nothing to do: what is live."""
    dataset = store.open_version(uri)
    facts, manifest = store.run_of(dataset), read_manifest(dataset)
    assert manifest is not None
    return Night(
        run_id=facts[store.RUN_ID],
        status="unchanged",
        table=uri,
        version=int(dataset.version),
        rows=manifest.rows,
        fingerprint=manifest.fingerprint,
        encoder=manifest.encoder,
    )


def _check_limits(config: RunFile, rows: int, fingerprint: str) -> None:
    """Raises GateError when the plan is expected to exceed the limits; nothing was begun then."""
    rate = last_rate(config.table.path, fingerprint)
    if rate is not None:
        check_limits(estimate(rows, rate, config.cluster.gpus, config.cluster.price_per_gpu_hour), config.limits)


def _due(catalog: Catalog, base: Base) -> pa.Table | None:
    """Quarantined values to try again tonight, None if there are none."""
    return None if base.manifest is None else due(catalog.table.path, base.manifest, catalog.embed.retries)


def _catalog(config: RunFile) -> Catalog:
    if config.encoder is None:
        raise ConfigError("the run file names no encoder", next="`conjoin train` makes one; then set `encoder:`")
    return Catalog(config.name, config.source, config.encoder, config.table, config.embed).absolute()


def _canary(catalog: Catalog) -> Catalog:
    """The same with a table of its own, without what an earlier canary left there."""
    uri = canary_uri(catalog.table.path)
    for path in (uri, store.bookkeeping(uri), store.quarantine_uri(uri)):
        storage.remove(path)
    return replace(catalog, table=catalog.table.model_copy(update={"path": uri}))


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
