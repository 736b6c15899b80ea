"""How a table is doing: a night at work and how far it is, what is live, the last night, what is in quarantine.

Assumes: it only reads, from any machine that reaches the table; a night at work is known by its heartbeat.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, cast

from conjoin.pipeline import heartbeat, runs, storage, store
from conjoin.pipeline.errors import ConjoinError
from conjoin.pipeline.night import Night, read_night
from conjoin.pipeline.publish import Entry, history
from conjoin.pipeline.quarantine import read_quarantine

_LOOKED_AT = 5  # records, of nights that may have been made up for out of order


@dataclass(frozen=True, slots=True)
class Working:
    """A night that is not over. state: running, gone (its heartbeat stopped: killed?), ended (with `problem`) or
    unfinished (nobody is at it; the same command resumes).

    done, total: of the step; units_done of units: 0 before there is a plan; left_s: expected, None if not known.
    """

    run_id: str
    state: Literal["running", "gone", "ended", "unfinished"]
    units_done: int = 0
    units: int = 0
    step: str = ""
    done: float = 0
    total: float = 0
    unit: str = ""
    rows_per_s: float | None = None
    left_s: float | None = None
    host: str = ""
    pid: int = 0
    started: str = ""
    silent_s: float = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Status:
    """live_age_s: since it went live; quarantine: rows of live by stage; last: the newest night that is over."""

    table: str
    working: tuple[Working, ...]
    live: Entry | None
    live_age_s: float | None
    last: Night | None
    quarantine: Mapping[str, int]

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def look(uri: str) -> Status:
    """The state of the table at `uri` now; a table that is not there yet has nothing live. Raises StorageError."""
    live = next((entry for entry in history(uri) if entry.live), None)
    age = None if live is None else (dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(live.at)).total_seconds()
    return Status(uri, _working(uri), live, age, last_night(uri), _quarantine(uri, live))


def _quarantine(uri: str, live: Entry | None) -> dict[str, int]:
    rows = None if live is None else read_quarantine(uri)
    return {} if rows is None else dict(Counter(cast("list[str]", rows["stage"].to_pylist())).most_common())


def last_night(uri: str) -> Night | None:
    """The newest night that is over."""
    over = [run_id for run_id in runs.run_ids(uri) if run_id not in set(runs.unfinished(uri))]
    nights = [found for run_id in over[-_LOOKED_AT:] if (found := read_night(uri, run_id)) is not None]
    return max(nights, key=lambda night: (night.finished, over.index(night.run_id)), default=None)


def _working(uri: str) -> tuple[Working, ...]:
    unfinished = runs.unfinished(uri)
    over = set(runs.run_ids(uri)) - set(unfinished)  # one that its gates rejected has said why in its report
    beats = {beat.run_id: beat for beat in heartbeat.read_beats(uri) if beat.run_id not in over}
    waiting = [run_id for run_id in unfinished if run_id not in beats]
    found = [_at_work(uri, beat) for beat in beats.values()]
    return (*found, *(Working(run_id, "unfinished", *_units(uri, run_id)) for run_id in waiting))


def _at_work(uri: str, beat: heartbeat.Beat) -> Working:
    facts = beat.facts or {}
    return Working(
        beat.run_id,
        "ended" if beat.ended else "gone" if beat.stale else "running",
        *_units(uri, beat.run_id),
        step=beat.step,
        done=beat.done,
        total=beat.total,
        unit=beat.unit,
        rows_per_s=_number(facts.get("rows/s")),
        left_s=_number(facts.get("left_s")),
        host=beat.host,
        pid=beat.pid,
        started=beat.started,
        silent_s=round(beat.age_s, 1),
        problem=beat.ended,
    )


def _number(value: float | str | None) -> float | None:
    return None if value is None or isinstance(value, str) else float(value)


def _units(uri: str, run_id: str) -> tuple[int, int]:
    """Units that are done, and all of the plan's; zeros before there is one."""
    run = runs.run_directory(uri, run_id)
    try:
        units = cast("list[object]", storage.read_json(storage.join(run, "plan.json")).get("units", []))
    except ConjoinError:
        return 0, 0
    done = sum(path.endswith(".json") for path in storage.list_files(storage.join(run, "units")))
    return min(done, len(units)), len(units)


def find_run(uri: str, run_id: str | None) -> str:
    """A run that is over: the one named, or the newest. Raises TableError naming the newest few if there is none."""
    from conjoin.pipeline.errors import TableError

    over = [name for name in runs.run_ids(uri) if name not in set(runs.unfinished(uri))]
    if run_id is None:
        night = last_night(uri)
        if night is not None:
            return night.run_id
        store.open_version(uri, None)
        raise TableError("no night is over yet", where=uri, next="`conjoin status` says how far it is")
    if run_id in over:
        return run_id
    known = ", ".join(over[-5:]) or "none"
    raise TableError(f"no run {run_id!r} is over", where=uri, next=f"The newest are: {known}")
