"""Runs of a table: their ids, their directories, which one is unfinished.

Assumes: a run exists once its plan.json does and is over once its report.json does.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

from conjoin.pipeline import storage
from conjoin.pipeline.store import bookkeeping

_PLAN, _REPORT = "plan.json", "report.json"


def run_directory(uri: str, run_id: str) -> str:
    """`<bookkeeping>/runs/<run id>`: plan.json, rows.parquet, units/, report.json."""
    return storage.join(bookkeeping(uri), "runs", run_id)


def run_ids(uri: str) -> list[str]:
    """Every run that was planned, by name and then by the number after it; of old ones only the report is left."""
    return sorted({*_with(uri, _PLAN), *_with(uri, _REPORT)}, key=_order)


def _order(run_id: str) -> tuple[str, int]:
    name, _, number = run_id.rpartition(".")
    return (name, int(number)) if name and number.isdigit() else (run_id, 1)


def unfinished(uri: str) -> list[str]:
    """Runs that were planned and are not over; at most one, unless somebody ran two at a time."""
    over = set(_with(uri, _REPORT))
    return [run_id for run_id in run_ids(uri) if run_id not in over]


def _with(uri: str, name: str) -> list[str]:
    found = storage.match_stats(storage.join(bookkeeping(uri), "runs", "*", name))
    return [stat.uri.rsplit("/", 2)[1] for stat in found]


def next_run_id(uri: str, name: str, date: dt.date) -> str:
    """<name>-<logical date>, with .2, .3 and so on for more work of the same day."""
    taken, first = set(run_ids(uri)), f"{name}-{date.isoformat()}"
    number = 1
    while (run_id := first if number == 1 else f"{first}.{number}") in taken:
        number += 1
    return run_id


def finish(uri: str, run_id: str, report: Mapping[str, object]) -> None:
    """Write report.json: the run is over, published or not."""
    storage.write_json(storage.join(run_directory(uri, run_id), _REPORT), dict(report))


def read_report(uri: str, run_id: str) -> dict[str, object]:
    return storage.read_json(storage.join(run_directory(uri, run_id), _REPORT))
