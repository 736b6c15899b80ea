"""Thirty SIGKILLs at random moments: of the driver, of a worker that embeds, of the whole process group."""

from __future__ import annotations

import datetime as dt
import os
import random
import signal
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from processes import living
from shop import same

from conjoin.jobs.config import read_run_file
from conjoin.jobs.nightly import run
from conjoin.pipeline import embed, publish, store

DAY = dt.date(2026, 1, 2)
NUM_KILLS = 30
LATEST_S = {"first": 18.0, "second": 7.0}  # a little longer than such a night takes
MOST_KILLS = 4  # of one night
TARGETS = ("driver", "worker", "group")


@dataclass
class Trial:
    """Nights of one new table and the reference of each: what an uninterrupted night made of the same source."""

    folder: Path
    key: str
    start: Callable[[Path], Popen[str]]
    rng: random.Random
    wanted: list[pa.Table] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)

    @property
    def uri(self) -> str:
        return f"{self.folder}/things.lance"

    def reference(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An uninterrupted night beside, from the same source, in this process."""
        number = len(self.wanted)
        config = read_run_file(file, [("table.path", f"{self.folder}/reference{number}.lance")], DAY)
        with monkeypatch.context() as patch:
            patch.setattr(embed, "_run_units", embed._run_here)
            assert run(config, DAY).status == "published"
        self.wanted.append(store.open_version(config.table.path).to_table().sort_by("id"))

    def night(self, file: Path, kind: str, left: int) -> None:
        """Killed up to `left` and MOST_KILLS times, begun again, at last finished; `live` is looked at all the time."""
        for _ in range(min(left, MOST_KILLS)):
            process = self.start(file)
            self.wait(process, self.rng.uniform(0.3, LATEST_S[kind]))
            if process.poll() is None:
                self.kill(process, f"{kind}: ")
            if process.poll() == 0:
                break
        process = self.start(file)
        self.wait(process, 120)
        out, err = process.communicate(timeout=10)
        assert process.returncode == 0, (out, err)
        assert same(self.live(), self.wanted[-1])
        head = store.open_version(self.uri, None).to_table().sort_by("id")
        assert same(head, self.wanted[-1])
        assert len(set(head["id"].to_pylist())) == head.num_rows

    def kill(self, process: Popen[str], kind: str) -> None:
        target = self.rng.choice(TARGETS)
        workers = living(self.key, "ray::MapWorker")
        if target == "worker" and workers:
            for pid in workers:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.done[kind + "worker"] += 1
            self.wait(process, 120)
            assert process.returncode == 0, process.communicate()  # it replaced the worker and went on
            return
        if target == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        self.done[kind + ("group" if target == "group" else "driver")] += 1
        process.communicate(timeout=60)
        self.look()
        self.wait_for_nobody()

    def wait(self, process: Popen[str], seconds: float) -> None:
        until = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < until:
            self.look()
            time.sleep(0.1)

    def wait_for_nobody(self) -> None:
        """Ray's own processes end by themselves once their driver is gone."""
        until = time.monotonic() + 240
        while living(self.key):
            assert time.monotonic() < until, "processes of a killed night live on"
            time.sleep(0.1)

    def live(self) -> pa.Table | None:
        head = store.head(self.uri)
        if head is None or store.live_version(head) is None:
            return None
        return store.open_version(self.uri).to_table().sort_by("id")

    def look(self) -> None:
        """What readers see was published by a night that passed its gates."""
        found = self.live()
        if found is None:
            assert len(self.wanted) == 1, "live is gone"
            return
        assert any(same(found, wanted) for wanted in self.wanted[-2:])


@pytest.fixture
def key() -> Iterator[str]:
    """In the environment of every process that a test starts; none of them outlives it."""
    made = uuid.uuid4().hex
    yield made
    for pid in living(made):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def changed(rows: pa.Table) -> pa.Table:
    """Captions, prices, rows that go and rows that come."""
    captions = [text if n % 3 or not text else f"{text} again" for n, text in enumerate(rows["caption"].to_pylist())]
    prices = [price + n % 2 for n, price in enumerate(rows["price"].to_pylist())]
    ids = [f"other-{n}" if n % 11 == 5 else key for n, key in enumerate(rows["id"].to_pylist())]
    for name, values in (("caption", captions), ("price", prices), ("id", ids)):
        rows = rows.set_column(rows.schema.get_field_index(name), name, pa.array(values, rows.schema.field(name).type))
    return rows


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_thirty_kills_change_nothing(
    things: Any,
    run_file_in: Callable[..., Path],
    tmp_path: Path,
    conjoin: Any,
    key: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(file: Path) -> Popen[str]:
        return conjoin.start("run", str(file), "--date", str(DAY), "--json", CONJOIN_TEST_KEY=key)

    rng, done = random.Random(5), Counter[str]()
    number = 0
    while (left := NUM_KILLS - sum(done.values())) > 0:
        folder = tmp_path / f"table{number}"
        folder.mkdir()
        source = folder / "source.parquet"
        file = run_file_in(folder, str(source), unit_rows=4)
        trial = Trial(folder, key, start, rng)
        for kind, rows in (("first", things.rows), ("second", changed(things.rows))):
            pq.write_table(rows, source, row_group_size=4)
            trial.reference(file, monkeypatch)
            trial.night(file, kind, left - sum(trial.done.values()))
        assert [entry.action for entry in publish.history(trial.uri)] == ["publish"] * 2
        done += trial.done
        number += 1
        print(f"{number} tables, {sum(done.values())} kills: {dict(done)}", flush=True)
    assert sum(done.values()) == NUM_KILLS
