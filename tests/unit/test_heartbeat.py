"""A night's sign of life: written whether a step speaks or not, gone after a good end, never in the way."""

from __future__ import annotations

import datetime as dt
import time
from pathlib import Path

import pytest

from conjoin.pipeline import heartbeat, runs, storage
from conjoin.pipeline.heartbeat import Heartbeat, read_beats
from conjoin.pipeline.progress import Progress


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "things.lance")


def until(uri: str, what: str, seconds: float = 5) -> heartbeat.Beat:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        beats = read_beats(uri)
        if beats and beats[0].step == what:
            return beats[0]
        time.sleep(0.01)
    raise AssertionError(f"no beat of step {what!r}")


def test_a_night_says_how_far_it_is(uri: str) -> None:
    seen: list[Progress] = []
    with Heartbeat(uri, "r1", seen.append, every_s=0.02) as beat:
        assert read_beats(uri)[0].step == ""
        beat.show(Progress("embed", 30, 120, facts={"rows/s": 15.5, "units": "1/4"}))
        found = until(uri, "embed")
        assert (found.run_id, found.done, found.total, found.unit) == ("r1", 30, 120, "rows")
        assert found.facts == {"rows/s": 15.5, "units": "1/4"}
        beat.step("index")
        first = until(uri, "index")
        time.sleep(0.1)
        assert until(uri, "index").at > first.at, "it beats while a step is silent"
        assert not first.stale
    assert read_beats(uri) == ()
    assert [event.step for event in seen] == ["embed"]


def test_a_night_that_raises_leaves_the_reason(uri: str) -> None:

    def night() -> None:
        with Heartbeat(uri, "r1") as beat:
            beat.step("commit")
            raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        night()
    (found,) = read_beats(uri)
    assert (found.step, found.ended, found.stale) == ("commit", "why", False)
    with Heartbeat(uri, "r1"):
        pass
    assert read_beats(uri) == ()


def test_one_that_was_killed_grows_stale(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    heart = Heartbeat(uri, "r1", every_s=100)
    heart.__enter__()  # and no end
    assert not read_beats(uri)[0].stale
    path = storage.join(runs.run_directory(uri, "r1"), "progress.json")
    before = (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=40)).isoformat()
    storage.write_json(path, {**storage.read_json(path), "at": before})
    found = read_beats(uri)[0]
    assert found.stale
    assert 39 < found.age_s < 60
    heart.__exit__(None, None, None)


def test_a_full_disk_does_not_stop_a_night(tmp_path: Path) -> None:
    (tmp_path / "things.conjoin").write_text("a file in the way")
    with Heartbeat(f"{tmp_path}/things.lance", "r1", every_s=0.01) as beat:
        beat.show(Progress("embed", 1, 2))
        time.sleep(0.05)


def test_a_bucket(s3: str) -> None:
    with Heartbeat(f"{s3}/things.lance", "r1", every_s=0.05) as beat:
        beat.step("index")
        assert until(f"{s3}/things.lance", "index").run_id == "r1"
    assert read_beats(f"{s3}/things.lance") == ()
