"""Nights that are killed, stopped and resumed: the same command again, every id exactly once, nothing done twice."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import living

from conjoin.jobs.config import read_run_file
from conjoin.jobs.nightly import run
from conjoin.pipeline import store
from conjoin.pipeline.embedder import load

DAY = dt.date(2026, 1, 2)
NUM_UNITS = 30
# The whole command; the process group dies by SIGKILL when a function is called for the nth time.
DIES_AT = """
import functools, importlib, os, signal, sys
module, path, nth = sys.argv.pop(1).split(":")
owner, calls = importlib.import_module(module), []
*outer, name = path.split(".")
owner = functools.reduce(getattr, outer, owner)
inner = getattr(owner, name)
def dying(*args, **options):
    calls.append(1)
    if len(calls) == int(nth):
        os.killpg(0, signal.SIGKILL)
    return inner(*args, **options)
setattr(owner, name, dying)
from conjoin.jobs.cli import main
main()
"""


@dataclass(frozen=True, slots=True)
class Catalog:
    """A run file over things in thirty units, and what its unfinished or finished night left on disk."""

    file: Path
    things: Any
    key: str

    @property
    def uri(self) -> str:
        return str(self.file.with_name("things.lance"))

    @property
    def words(self) -> list[str]:
        return ["run", str(self.file), "--date", str(DAY), "--json"]

    def units(self) -> Path:
        return Path(store.bookkeeping(self.uri)) / f"runs/things-{DAY}/units"

    def records(self) -> dict[str, tuple[int, str]]:
        """By unit: when its record was written, and its fragment."""
        found = {}
        for path in sorted(self.units().glob("*.json")):
            fragment = json.loads(path.read_text())["fragment"]
            found[path.name] = (path.stat().st_mtime_ns, fragment["files"][0]["path"] if fragment else "")
        return found

    def processes(self, name: str = "") -> list[int]:
        """Every living process of this catalog's commands, Ray's included, whose command line has `name` in it."""
        return living(self.key, name)


@pytest.fixture
def catalog(things: Any, run_file: Callable[..., Path], tmp_path: Path) -> Iterator[Catalog]:
    """Its processes are all gone afterwards."""
    pq.write_table(things.rows, tmp_path / "source.parquet", row_group_size=4)
    catalog = Catalog(run_file(str(tmp_path / "source.parquet"), unit_rows=4), things, uuid.uuid4().hex)
    yield catalog
    for pid in catalog.processes():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start(catalog: Catalog, conjoin: Any) -> Callable[..., Popen[str]]:
    """start(dies_at="") -> the command, running."""

    def start(dies_at: str = "") -> Popen[str]:
        command = type(conjoin)((sys.executable, "-c", DIES_AT, dies_at)) if dies_at else conjoin
        return command.start(*catalog.words, CONJOIN_TEST_KEY=catalog.key)

    return start


def wait_until(true: Callable[[], object], running: Popen[str] | None = None, most_s: float = 120) -> None:
    until = time.monotonic() + most_s
    while not true():
        if running is not None and running.poll() is not None:
            raise AssertionError(f"ended too early: {running.communicate()}")
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)


def finished(process: Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def kill_at(place: str, catalog: Catalog, start: Callable[..., Popen[str]]) -> dict[str, tuple[int, str]]:
    """The records that a killed night left."""
    code, out, err = finished(start(place))
    assert code == -signal.SIGKILL, (code, out, err)
    wait_until(lambda: not catalog.processes(), most_s=60)
    return catalog.records()


def assert_complete(catalog: Catalog) -> None:
    """Every id once, its vectors those of the encoder, one run that committed, published."""
    dataset = store.open_version(catalog.uri)
    table = dataset.to_table()
    assert table["id"].to_pylist() == catalog.things.landed
    config = read_run_file(catalog.file, [], DAY)
    usable = table.filter(table["text_vec"].is_valid())
    texts = usable["text"].to_pylist()
    found = usable["text_vec"].combine_chunks().flatten().to_numpy().reshape(len(texts), -1)
    np.testing.assert_allclose(found, load(str(config.encoder)).encode(text=texts), atol=1e-6)
    runs = [facts["run_id"] for _, facts in store.lineage(store.open_version(catalog.uri, None)) if "run_id" in facts]
    assert runs == [f"things-{DAY}"]


def assert_kept(before: dict[str, tuple[int, str]], catalog: Catalog) -> None:
    """What was done before is neither repeated nor written again, and it is what the table has."""
    after = catalog.records()
    assert len(after) == NUM_UNITS
    assert {name: after[name] for name in before} == before
    in_table = {file.path for part in store.open_version(catalog.uri).get_fragments() for file in part.data_files()}
    assert in_table == {path for _, path in after.values() if path}


def test_a_night_killed_among_its_units_goes_on(
    ray_session: None, catalog: Catalog, start: Callable[..., Popen[str]]
) -> None:
    before = kill_at("conjoin.pipeline.embed:_Tally.add:3", catalog, start)
    assert 3 <= len(before) < NUM_UNITS
    assert store.head(catalog.uri) is None
    assert run(read_run_file(catalog.file, [], DAY), DAY).status == "published"
    assert_kept(before, catalog)
    assert_complete(catalog)


def late(place: str, committed: bool, ident: str) -> Any:
    """A moment after all units are embedded; one before the commit and one after it are enough for CI."""
    marks = () if ident in ("commit", "publish") else (pytest.mark.slow,)
    return pytest.param(place, NUM_UNITS, committed, marks=marks, id=ident)


@pytest.mark.parametrize(
    ("place", "done", "committed"),
    [
        pytest.param("conjoin.pipeline.plan:freeze:1", 0, False, marks=pytest.mark.slow, id="plan"),
        pytest.param("conjoin.pipeline.workers:data_settings:1", 0, False, marks=pytest.mark.slow, id="no-unit"),
        pytest.param("conjoin.pipeline.embed:_Tally.add:20", 20, False, marks=pytest.mark.slow, id="some-units"),
        late("conjoin.pipeline.state:write_manifest:1", False, "state"),
        late("conjoin.pipeline.commits:commit:1", False, "commit"),
        late("conjoin.pipeline.index:build:1", True, "index"),
        late("conjoin.pipeline.publish:publish:1", True, "publish"),
        late("conjoin.pipeline.publish:_before:1", True, "published"),
        late("conjoin.pipeline.runs:finish:1", True, "report"),
    ],
)
def test_killed_anywhere_the_same_command_finishes(
    catalog: Catalog, start: Callable[..., Popen[str]], place: str, done: int, committed: bool
) -> None:
    before = kill_at(place, catalog, start)
    assert done <= len(before) <= (NUM_UNITS if done else 0)
    assert (store.head(catalog.uri) is not None) == committed
    code, out, err = finished(start())
    assert code == 0, err
    report = json.loads(out)
    assert (report["status"], report["run_id"], report["rows"]) == ("published", f"things-{DAY}", 118)
    assert_kept(before, catalog)
    assert_complete(catalog)
    assert json.loads(finished(start())[1])["status"] == "unchanged"


@pytest.mark.slow
def test_killed_again_and_again_it_still_finishes(catalog: Catalog, start: Callable[..., Popen[str]]) -> None:
    before: dict[str, tuple[int, str]] = {}
    for place in (
        "embed:_Tally.add:2",
        "embed:_Tally.add:5",
        "landing:prepare:1",
        "index:build:1",
        "publish:_before:1",
    ):
        after = kill_at(f"conjoin.pipeline.{place}", catalog, start)
        assert {name: after[name] for name in before} == before
        before = after
    code, _, err = finished(start())
    assert code == 0, err
    assert_kept(before, catalog)
    assert_complete(catalog)


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [False, True], ids=["SIGTERM", "ctrl-c"])
def test_a_stopped_night_says_how_far_it_is_and_resumes(
    catalog: Catalog, start: Callable[..., Popen[str]], to_all: bool
) -> None:
    process = start()
    wait_until(catalog.records, process)
    # A terminal sends Ctrl-C to every process of the group; kill and schedulers send SIGTERM to one.
    os.killpg(process.pid, signal.SIGINT) if to_all else process.terminate()
    code, out, err = finished(process)
    said = [
        line for line in err.splitlines() if "issues/53727" not in line and not line.startswith(("plan: ", "embed: "))
    ]
    assert (code, out, len(said)) == (130, "", 1), err
    wait_until(lambda: not catalog.processes(), most_s=60)
    before = catalog.records()
    found = re.search(rf"stopped: (\d+) of {NUM_UNITS} units of run things-{DAY} are done and stay", said[0])
    assert found is not None
    # an actor may finish the unit in its hands while the driver says goodbye
    assert 0 < int(found[1]) <= len(before) <= int(found[1]) + 1 < NUM_UNITS
    assert "The same command resumes" in said[0]
    assert finished(start())[0] == 0
    assert_kept(before, catalog)
    assert_complete(catalog)


@pytest.mark.slow
def test_a_killed_actor_is_replaced_and_the_night_goes_on(catalog: Catalog, start: Callable[..., Popen[str]]) -> None:
    process = start()
    wait_until(catalog.records, process)
    before = catalog.records()
    actors = catalog.processes("ray::MapWorker")
    assert actors
    for pid in actors:
        os.kill(pid, signal.SIGKILL)
    code, _, err = finished(process)
    assert code == 0, err
    assert not set(actors) & set(catalog.processes())
    assert_kept(before, catalog)
    assert_complete(catalog)


@pytest.mark.slow
def test_a_unit_that_always_kills_its_actor_ends_the_night(catalog: Catalog, start: Callable[..., Popen[str]]) -> None:
    rows = pa.concat_tables([catalog.things.rows] * 40)
    rows = rows.set_column(0, "id", pa.array([f"thing-{n}" for n in range(rows.num_rows)]))
    pq.write_table(rows, catalog.file.with_name("source.parquet"))
    text = catalog.file.read_text().replace("unit_rows: 4", "unit_rows: 100000")
    catalog.file.write_text(text)
    process = start()
    for count in (1, 2, 3):
        wait_until(lambda: tries(catalog) == count, process)  # noqa: B023  # waited for at once
        for pid in catalog.processes("ray::MapWorker"):
            os.kill(pid, signal.SIGKILL)
    code, _, err = finished(process)
    assert code == 1
    assert "unit 0 lost its worker 3 times" in err
    assert "the same command resumes" in err


def tries(catalog: Catalog) -> int:
    path = catalog.units() / "00000.tries"
    return int(json.loads(path.read_text())["tries"]) if path.exists() else 0
