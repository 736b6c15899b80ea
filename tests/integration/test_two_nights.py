"""Two nights started together over one table: one wins, the other says so and ends; nothing is lost or doubled."""

from __future__ import annotations

import datetime as dt
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shop import same

from conjoin.jobs.config import read_run_file
from conjoin.jobs.nightly import run
from conjoin.pipeline import embed, publish, store

DAY = dt.date(2026, 1, 2)
# The command as it is, but embedding in its own process: two Rays would only take the time of two cores.
HERE = """
from conjoin.pipeline import embed
embed._run_units = embed._run_here
from conjoin.jobs.cli import main
main()
"""
# What the loser says: overtaken before a step, overtaken by a commit, or its run was finished by the other.
SAYS = ("took over from", "committed version", "a table appeared while")


def captioned(rows: pa.Table, number: int) -> pa.Table:
    captions = [text and f"{text} {number}" for text in rows["caption"].to_pylist()]
    return rows.set_column(2, "caption", pa.array(captions, pa.string()))


def reference(file: Path, where: Path, monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    """What a lone night makes of the source."""
    config = read_run_file(file, [("table.path", str(where))], DAY)
    with monkeypatch.context() as patch:
        patch.setattr(embed, "_run_units", embed._run_here)
        run(config, DAY)
    return store.open_version(config.table.path).to_table().sort_by("id")


def race(conjoin: Any, file: Path, pause_s: float) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of two commands, the second started so much later."""
    words = ("run", str(file), "--date", str(DAY), "--json")
    processes = [conjoin.start(*words)]
    time.sleep(pause_s)
    processes.append(conjoin.start(*words))
    return [(process.wait(240), *process.communicate()) for process in processes]


def check(ended: list[tuple[int, str, str]], uri: str, wanted: pa.Table, published: int) -> str:
    """One published, the other was refused or had nothing left to do; returns what the other said."""
    won = [json.loads(out)["status"] for code, out, _ in ended if code == 0]
    assert won, ended
    assert won.count("published") == 1, ended
    assert same(store.open_version(uri).to_table().sort_by("id"), wanted)
    assert same(store.open_version(uri, None).to_table().sort_by("id"), wanted)
    assert len([entry for entry in publish.history(uri) if entry.action == "publish"]) == published
    lost = [err.strip().splitlines()[-1] for code, _, err in ended if code]
    assert all(any(words in line for words in SAYS) for line in lost), lost
    return lost[0] if lost else f"exit 0, {sorted(won)[-1]}"


def tries(
    count: int, things: Any, run_file: Callable[..., Path], folder: Path, conjoin: Any, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """So many races of nights that each change every caption; what the losers said."""
    source, rng, said = folder / "source.parquet", random.Random(count), []
    file = run_file(str(source), unit_rows=4)
    pq.write_table(things.rows, source, row_group_size=4)
    reference(file, folder / "things.lance", monkeypatch)
    for number in range(count):
        pq.write_table(captioned(things.rows, number), source, row_group_size=4)
        wanted = reference(file, folder / f"alone{number}.lance", monkeypatch)
        ended = race(type(conjoin)((sys.executable, "-c", HERE)), file, rng.choice((0, 0, 0.2, 1, 2)))
        said.append(check(ended, str(folder / "things.lance"), wanted, number + 2))
    return said


def test_of_two_nights_one_wins(
    things: Any, run_file: Callable[..., Path], tmp_path: Path, conjoin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries(1, things, run_file, tmp_path, conjoin, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_times_of_two_nights_one_wins(
    things: Any, run_file: Callable[..., Path], tmp_path: Path, conjoin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for line in tries(10, things, run_file, tmp_path, conjoin, monkeypatch):
        print(line)


@pytest.mark.slow
def test_of_two_first_nights_one_wins(
    things: Any, run_file: Callable[..., Path], tmp_path: Path, conjoin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through Ray, onto a table that is not there yet."""
    pq.write_table(things.rows, tmp_path / "source.parquet", row_group_size=4)
    file = run_file(str(tmp_path / "source.parquet"), unit_rows=4)
    wanted = reference(file, tmp_path / "alone.lance", monkeypatch)
    print(check(race(conjoin, file, 0), str(tmp_path / "things.lance"), wanted, 1))
