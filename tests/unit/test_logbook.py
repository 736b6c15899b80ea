"""The log of a run: every step once in log.jsonl, whatever comes again; a tracker that fails takes nothing with it."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from conjoin.pipeline import logbook
from conjoin.pipeline.logbook import Log
from conjoin.pipeline.progress import Progress, silent
from conjoin.pipeline.rank import Sink
from conjoin.pipeline.recipe import BESIDE_THE_POINT, TrainConfig

with_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="not installed: tensorboard"
)


def no_warning(_: Mapping[str, float]) -> str:
    return ""


def record(step: int, loss: float | None = None) -> dict[str, float]:
    return {"step": step, "total": 9, "loss": 9.0 - step if loss is None else loss, "chance_loss": 3.0}


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_every_step_is_written_once_in_order(tmp_path: Path) -> None:
    sink = Sink()
    with Log(str(tmp_path), sink.drain, TrainConfig(), silent, no_warning) as log:
        sink.put([record(1), record(2)])
        sink.put([record(1), record(2), record(3)])  # a worker that was started again says all of it again
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert log.last == record(3)
    assert log.trouble == ""


def test_a_run_that_goes_on_keeps_what_is_there(tmp_path: Path) -> None:
    for steps in ([1, 2, 3, 4], [3, 4, 5]):
        sink = Sink()
        with Log(str(tmp_path), sink.drain, TrainConfig(), silent, no_warning):
            sink.put([record(step) for step in steps])
    assert lines(tmp_path) == [record(step) for step in range(1, 6)]


def test_records_are_shown_and_written_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logbook, "_POLL_S", 0.01)
    monkeypatch.setattr(logbook, "_WRITE_EVERY_S", 0.0)
    sink = Sink()
    seen: list[Progress] = []

    def warn(figures: Mapping[str, float]) -> str:
        return "no better than guessing" if figures["loss"] > 7 else ""

    with Log(str(tmp_path), sink.drain, TrainConfig(), seen.append, warn):
        sink.put([record(1), record(2)])
        until = time.monotonic() + 10
        while not (tmp_path / "log.jsonl").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        assert len(lines(tmp_path)) == 2
    assert seen[0] == Progress("train", 1, 9, "steps", {"loss": 8.0, "warning": "no better than guessing"})
    assert seen[1] == Progress("train", 2, 9, "steps", {"loss": 7.0})


def test_a_disk_that_fails_for_a_while_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logbook, "_POLL_S", 0.01)
    monkeypatch.setattr(logbook, "_WRITE_EVERY_S", 0.0)
    folder, sink = tmp_path / "run", Sink()
    with Log(str(folder), sink.drain, TrainConfig(), silent, no_warning) as log:
        folder.write_text("a file where the folder should be")
        sink.put([record(1)])
        until = time.monotonic() + 10
        while not log.trouble:
            assert time.monotonic() < until
            time.sleep(0.01)
        folder.unlink()
        sink.put([record(2)])
    assert [line["step"] for line in lines(folder)] == [1, 2]
    assert log.trouble == ""


@with_tensorboard
def test_a_tracker_gets_the_figures_of_every_step_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = TrainConfig(log=["tensorboard"])
    for steps in ([1, 2, 3], [1, 2, 3, 4]):
        sink = Sink()
        with Log(str(tmp_path), sink.drain, recipe, silent, no_warning):
            sink.put([record(step) for step in steps])
    found = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == {"loss", "chance_loss"}
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(s, 9.0 - s) for s in (1, 2, 3, 4)]


@with_tensorboard
def test_a_tracker_that_fails_is_named_and_the_log_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logbook, "_POLL_S", 0.01)
    monkeypatch.setattr(logbook, "_WRITE_EVERY_S", 0.0)
    sink = Sink()
    seen: list[Progress] = []
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with Log(str(tmp_path), sink.drain, TrainConfig(log=["tensorboard"]), seen.append, no_warning) as log:
        sink.put([record(1)])
        until = time.monotonic() + 20
        while not log.trouble:
            assert time.monotonic() < until
            time.sleep(0.01)
        sink.put([record(2)])
    assert "tensorboard is not written any more" in log.trouble
    assert "tensorboard is not written" in str(seen[-1].facts["warning"])
    assert len(lines(tmp_path)) == 2


def test_where_figures_go_does_not_make_another_run() -> None:
    assert "log" in BESIDE_THE_POINT
