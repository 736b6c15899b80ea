"""What `conjoin status` sees, on a disk and in a bucket."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conjoin.pipeline import publish, runs, storage
from conjoin.pipeline.errors import TableError
from conjoin.pipeline.heartbeat import Heartbeat
from conjoin.pipeline.night import Night
from conjoin.pipeline.progress import Progress
from conjoin.pipeline.status import find_run, last_night, look


def planned(uri: str, run_id: str, units: int, done: int) -> None:
    run = runs.run_directory(uri, run_id)
    storage.write_json(storage.join(run, "plan.json"), {"units": [{"number": n} for n in range(units)]})
    for number in range(done):
        storage.write_json(storage.join(run, "units", f"{number:05d}.json"), {})
        storage.write_bytes(storage.join(run, "units", f"{number:05d}.state.parquet"), b"")


def over(uri: str, night: Night) -> None:
    planned(uri, night.run_id, 1, 1)
    runs.finish(uri, night.run_id, night.to_json())


def test_no_table_at_all(tmp_path: Path) -> None:
    found = look(f"{tmp_path}/none.lance")
    assert (found.working, found.live, found.live_age_s, found.last, found.quarantine) == ((), None, None, None, {})
    with pytest.raises(TableError, match="no table"):
        find_run(f"{tmp_path}/none.lance", None)


def test_a_running_night_beside_what_is_live(make_table: Callable[..., Any]) -> None:
    uri = str(make_table(20, dim=4, live=False).uri)
    publish.publish(uri, 1, "r-2026-01-01")
    over(uri, Night("r-2026-01-01", "published", version=1))
    planned(uri, "r-2026-01-02", 8, 3)
    with Heartbeat(uri, "r-2026-01-02", every_s=100) as beat:
        beat.show(Progress("embed", 30, 80, facts={"rows/s": 10.0, "left_s": 5.0, "units": "3/8"}))
        beat._write("")  # not to wait for the thread
        (work,) = look(uri).working
    assert (work.state, work.step, work.done, work.total) == ("running", "embed", 30, 80)
    assert (work.units_done, work.units, work.rows_per_s, work.left_s) == (3, 8, 10.0, 5.0)
    found = look(uri)
    assert [(work.run_id, work.state) for work in found.working] == [("r-2026-01-02", "unfinished")]
    assert found.live is not None
    assert found.live.run_id == "r-2026-01-01"
    assert found.live_age_s is not None
    assert 0 <= found.live_age_s < 60
    assert found.last is not None
    assert found.last.status == "published"


@pytest.mark.parametrize("ended", ["", "the disk is full"], ids=["killed", "failed"])
def test_a_night_that_is_dead(tmp_path: Path, ended: str) -> None:
    uri = f"{tmp_path}/things.lance"
    planned(uri, "r1", 4, 1)
    at = (dt.datetime.now(dt.UTC) - dt.timedelta(minutes=5)).isoformat()
    facts = {"run_id": "r1", "host": "h", "pid": 7, "started": at, "at": at, "step": "embed", "ended": ended}
    storage.write_json(storage.join(runs.run_directory(uri, "r1"), "progress.json"), facts)
    (work,) = look(uri).working
    assert (work.state, work.problem, work.units_done, work.units) == ("ended" if ended else "gone", ended, 1, 4)
    assert 299 < work.silent_s < 400


def test_a_rejected_night_is_over(tmp_path: Path) -> None:
    uri = f"{tmp_path}/things.lance"
    planned(uri, "r1", 1, 1)

    def night() -> None:
        with Heartbeat(uri, "r1"):
            runs.finish(uri, "r1", Night("r1", "rejected", problem="too few").to_json())
            raise ValueError("too few")

    with pytest.raises(ValueError, match="too few"):
        night()
    found = look(uri)
    assert (found.working, found.last and found.last.problem) == ((), "too few")


def test_nights_of_one_day_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    uri = f"{tmp_path}/things.lance"
    names = ["r-2026-01-01", *(f"r-2026-01-01.{n}" for n in range(2, 12)), "r-2026-01-02"]
    for name in names:
        over(uri, Night(name, "published"))
    assert runs.run_ids(uri) == names
    last = last_night(uri)
    assert last is not None
    assert last.run_id == find_run(uri, None) == "r-2026-01-02"
    over(uri, Night("r-2026-01-01.11", "rejected", finished="2026-02-01T00:00:00+00:00"))
    assert find_run(uri, None) == "r-2026-01-01.11"
    assert find_run(uri, "r-2026-01-01") == "r-2026-01-01"
    with pytest.raises(TableError, match=r"no run 'x' is over.*newest are: .*r-2026-01-02"):
        find_run(uri, "x")


def test_a_bucket(s3: str, make_table_at: Callable[..., Any]) -> None:
    uri = str(make_table_at(f"{s3}/things.lance", 20, 4, live=False).uri)
    publish.publish(uri, 1, "r1")
    planned(uri, "r2", 5, 2)
    with Heartbeat(uri, "r2", every_s=100):
        (work,) = look(uri).working
    assert (work.state, work.units_done, work.units) == ("running", 2, 5)
    assert (look(uri).live or work).run_id == "r1"
