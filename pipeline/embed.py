"""Ray Data actor pool: units of the plan in, staged fragments and their records out.

Assumes: a unit's output depends on the plan and the encoder alone, never on who ran it or when.
"""

from __future__ import annotations

import gc
import math
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from conjoin.pipeline import storage
from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.progress import Progress, ShowProgress, silent
from conjoin.pipeline.runs import run_directory
from conjoin.pipeline.section import Section
from conjoin.pipeline.units import Record, Unit, file_of, read_records

if TYPE_CHECKING:
    from conjoin.pipeline.catalog import Catalog
    from conjoin.pipeline.plan import Plan

_SHOWN_REASONS = 3
_HERE_S = 8.0  # of towers; Ray and its first actor take about 11 s to start on two cores


class EmbedConfig(Section):
    """How the encoders run over the catalog."""

    precision: Literal["auto", "float32", "bf16"] = Field("auto", description="auto: bf16 on a GPU, float32 elsewhere")
    max_bad_fraction: float = Field(0.001, ge=0, le=1, description="more quarantined rows than this stop the night")
    retries: int = Field(7, ge=0, description="nights that try again what could not be fetched; repair asks for more")
    actors: Literal["auto"] | int = Field("auto", description="auto: one per GPU; one on a machine without")
    unit_rows: Literal["auto"] | int = Field(
        "auto", description="rows of one unit (one fragment); auto: about 64 MB of output"
    )


@dataclass(frozen=True, slots=True)
class Pool:
    """actors: each with `gpus` GPUs; threads: torch's, per actor; ahead: CPU tasks that decode for one actor."""

    actors: int
    gpus: int
    threads: int
    ahead: int


def pool_for(wanted: int | str, cpus: int, gpus: int) -> Pool:
    """One actor per GPU, else one. An actor holds one CPU; the others decode for it.

    Where no CPU is left over (one CPU, or as many actors as CPUs) actors decode in their own thread, so that none
    waits for a task that cannot start.
    """
    on_gpu = gpus > 0
    actors = wanted if isinstance(wanted, int) else max(gpus, 1)
    actors = max(1, min(actors, cpus, gpus if on_gpu else cpus))
    return Pool(actors, int(on_gpu), max(1, cpus // actors), max(0, cpus - actors) // actors)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a plan. version: of the table that edits read, 0 without one; left: paths of files that changed
    since the plan; address: of a Ray cluster; check: called after every unit, it may end the night; rows_per_s: of an
    earlier night, 0 if not known.
    """

    version: int = 0
    left: frozenset[str] = frozenset()
    address: str | None = None
    check: Callable[[], None] = lambda: None
    rows_per_s: float = 0.0


def embed(catalog: Catalog, plan: Plan, attempt: Attempt, *, progress: ShowProgress = silent) -> dict[int, Record]:
    """Embed and stage every unit of the plan that has no record yet; returns all records by unit.

    Joins Ray at `attempt.address`, or starts it here, only if there is enough for a tower to do. Raises SourceError
    when more rows are unusable than `embed.max_bad_fraction` allows, and whatever a worker raised.
    """
    run = run_directory(catalog.table.path, plan.run_id)
    records = read_records(run, plan.digest)
    waiting = [unit.number for unit in plan.units if unit.number not in records]
    tally = _Tally(catalog, plan, run, progress)
    tally.restore(records.values())
    if waiting:
        here = is_little([plan.units[number] for number in waiting], attempt, run)
        for row in (_run_here if here else _run_units)(catalog, plan, waiting, attempt):
            tally.add(row)
            attempt.check()
    return read_records(run, plan.digest)


def is_little(units: Sequence[Unit], attempt: Attempt, run: str) -> bool:
    """Whether this process is done before Ray would have started: no tower runs, or for a few seconds by last rate.

    A unit that was begun before may have killed who was at it: that is for a worker.
    """
    rows = sum(unit.rows for unit in units if unit.embed)
    if not rows:
        return True
    quick = attempt.address is None and rows < attempt.rows_per_s * _HERE_S
    return quick and not any(storage.exists(file_of(run, unit.number, "tries")) for unit in units)


class _Tally:
    """How far the night is, and whether too much of it is unusable."""

    def __init__(self, catalog: Catalog, plan: Plan, run: str, progress: ShowProgress) -> None:
        self._plan, self._run, self._progress = plan, run, progress
        self._allowed = math.ceil(catalog.embed.max_bad_fraction * plan.rows)
        self._rows = self._before = self._quarantined = self._units = 0
        self._started = time.monotonic()

    def restore(self, records: Iterable[Record]) -> None:
        """Units of an earlier attempt: they count as done, not towards the rate."""
        for record in records:
            self._count(record.planned, record.quarantined)
        self._before = self._rows
        self._check()
        self._show()

    def add(self, row: Mapping[str, float]) -> None:
        self._count(int(row["rows"]), int(row["quarantined"]))
        self._check()
        self._show()

    def _count(self, rows: int, quarantined: int) -> None:
        self._rows += rows
        self._quarantined += quarantined
        self._units += 1

    def _show(self) -> None:
        seconds = time.monotonic() - self._started
        facts: dict[str, float | str] = {"units": f"{self._units}/{len(self._plan.units)}"}
        if self._rows > self._before:
            facts["rows/s"] = rate = (self._rows - self._before) / seconds
            facts["left_s"] = (self._plan.rows - self._rows) / rate
        if self._quarantined:
            facts["quarantined"] = self._quarantined
        self._progress(Progress("embed", self._rows, self._plan.rows, facts=facts))

    def _check(self) -> None:
        if self._quarantined > self._allowed:
            raise SourceError(
                f"{self._quarantined:,} of {self._plan.rows:,} rows cannot be embedded, {self._allowed:,} may: "
                f"{'; '.join(_reasons(self._run, self._plan))}",
                where=self._run,
                next="Mend these records, or raise embed.max_bad_fraction and run again",
            )


def _reasons(run: str, plan: Plan) -> list[str]:
    """The first few troubles, by unit: id, modality and reason."""
    from conjoin.pipeline.state import read_parquet

    found: list[str] = []
    for unit in plan.units:
        uri = file_of(run, unit.number, "bad.parquet")
        if len(found) >= _SHOWN_REASONS:
            break
        if storage.exists(uri):
            rows = read_parquet(uri).slice(0, _SHOWN_REASONS - len(found)).to_pylist()
            found += [f"{row['id']} ({row['modality'] or 'record'}): {row['reason']}" for row in rows]
    return found


def _run_here(catalog: Catalog, plan: Plan, numbers: Sequence[int], attempt: Attempt) -> Iterator[Mapping[str, float]]:
    """Units in this process: starting Ray would take longer."""
    from conjoin.pipeline.stager import Order, Stager

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    stager = Stager(
        Order(catalog, plan.run_id, attempt.version, attempt.left, threads=threads, attempt=uuid.uuid4().hex)
    )
    for record in map(stager.stage, numbers):
        yield {"rows": record.planned, "quarantined": record.quarantined}


def _run_units(catalog: Catalog, plan: Plan, numbers: Sequence[int], attempt: Attempt) -> Iterator[Mapping[str, float]]:
    """Units through the pool, in whatever order they finish."""
    from conjoin.pipeline import workers
    from conjoin.pipeline.stager import Order, Stager

    workers.start(attempt.address)
    import ray.data

    pool = pool_for(catalog.embed.actors, workers.num_cpus(), workers.num_gpus())
    order = Order(
        catalog, plan.run_id, attempt.version, attempt.left, pool.ahead, pool.threads, attempt=uuid.uuid4().hex
    )
    with workers.data_settings():
        units = ray.data.from_items([{"unit": number} for number in numbers], override_num_blocks=len(numbers))
        done = units.map_batches(
            Stager,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(pool.actors, len(numbers))),
            fn_constructor_args=(order,),
            num_cpus=1,
            num_gpus=pool.gpus,
        )
        try:
            yield from done.iter_rows()
            return
        except ray.exceptions.RayError as error:
            advice = "Give it more memory or lower embed.actors; the same command resumes"
            failure = workers.failure(error, "an embedding worker died", where=catalog.table.path, next=advice)
    # Ray Data lets go of actors and their CPUs when its executor is collected; frames of its errors hold that back,
    # and the next night of this process would wait for CPUs.
    gc.collect()
    raise failure
