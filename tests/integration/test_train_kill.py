"""Training under SIGKILL: of a worker, of the driver, of all; the same command again ends at the same weights.

CONJOIN_KILLS=20 python -m pytest tests/integration/test_train_kill.py -m slow makes twenty kills instead of five.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

SCRIPT = """
import json, os, sys, time
from conjoin.pipeline.custom import Custom
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.train import train

source, recipe = SourceConfig.model_validate_json(sys.argv[1]), TrainConfig.model_validate_json(sys.argv[2])
seen = sys.argv[3]

def note(step):
    # one write per line, so that a kill leaves whole lines
    with open(seen, "a") as file:
        file.write(json.dumps({"pid": os.getpid(), "step": step.step, "rows": step.rows.tolist()}) + chr(10))
    time.sleep(0.05)

print(train("shapes", source, recipe, custom=Custom(callbacks=(note,))).encoder)
"""
ROWS, BATCH, EPOCHS = 60, 16, 10
STEPS = EPOCHS * -(-ROWS // BATCH)


@dataclass(frozen=True, slots=True)
class Run:
    """One training and where it leaves what."""

    data: Path
    out: Path

    def start(self) -> subprocess.Popen[bytes]:
        source = {"path": str(self.data), "id": "id", "image": "image", "text": "caption"}
        split = {"validation": 0.1, "test": 0}
        towers = {"image": {"size_px": 16, "dropout": 0.2}, "text": {"max_tokens": 12}}
        recipe = {"output": str(self.out), "towers": towers, "dim": 8, "global_batch_size": BATCH, "epochs": EPOCHS}
        often = {"validate_every": 3, "checkpoint_every_s": 0, "workers": 2, "micro_batch_size": 5}
        words = [json.dumps({**source, "split": split}), json.dumps({**recipe, **often}), str(self.seen)]
        self.out.mkdir(exist_ok=True)
        with (self.out / "stderr.txt").open("ab") as log:
            command = [sys.executable, "-c", SCRIPT, *words]
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    @property
    def seen(self) -> Path:
        return self.out / "seen.jsonl"

    def lines(self) -> list[dict[str, object]]:
        text = self.seen.read_text() if self.seen.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def steps_by_now(self) -> int:
        return max((int(str(line["step"])) for line in self.lines()), default=0)

    def wait_for(self, step: int, process: subprocess.Popen[bytes]) -> None:
        while self.steps_by_now() < step:
            assert process.poll() is None, (self.out / "stderr.txt").read_text()[-2000:]
            time.sleep(0.02)

    def finish(self) -> None:
        process = self.start()
        assert process.wait(timeout=300) == 0, (self.out / "stderr.txt").read_text()[-2000:]

    def weights(self) -> dict[str, np.ndarray]:
        from safetensors.numpy import load_file

        return dict(load_file(next(self.out.glob("*/last/model.safetensors"))))


def kill_worker(run: Run, process: subprocess.Popen[bytes]) -> None:
    os.kill(int(str(run.lines()[-1]["pid"])), signal.SIGKILL)


def kill_driver(run: Run, process: subprocess.Popen[bytes]) -> None:
    os.kill(process.pid, signal.SIGKILL)


def kill_both(run: Run, process: subprocess.Popen[bytes]) -> None:
    kill_worker(run, process)
    kill_all(process)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """The driver and everything it has started: Ray's own processes too, so that none of them outlives the test."""
    if process.poll() is None or process.returncode == -signal.SIGKILL:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
    process.wait()


KILLS: dict[str, Callable[[Run, subprocess.Popen[bytes]], None]] = {
    "worker": kill_worker,
    "driver": kill_driver,
    "both": kill_both,
}


@pytest.fixture(scope="module")
def data(draw_shape: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    pairs = [(("red", "green", "blue")[i % 3], ("circle", "square", "bar", "cross")[i // 3 % 4]) for i in range(66)]
    rows = {
        "id": [f"s{i}" for i in range(66)],
        "image": [draw_shape(*pair, rng) for pair in pairs],
        "caption": [f"a {colour} {shape} number {i}" for i, (colour, shape) in enumerate(pairs)],
    }
    path = tmp_path_factory.mktemp("shapes") / "shapes.parquet"
    pq.write_table(pa.table(rows), path, row_group_size=13)
    return path


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted run."""
    run = Run(data, tmp_path_factory.mktemp("whole"))
    run.finish()
    return run


def check(run: Run, whole: Run) -> None:
    """The same weights, and every row once in every epoch, whatever was done twice."""
    for name, value in whole.weights().items():
        assert np.abs(value.astype(np.float64) - run.weights()[name]).max() <= 1e-6, name
    by_step = {int(str(line["step"])): line["rows"] for line in run.lines()}
    assert by_step == {int(str(line["step"])): line["rows"] for line in whole.lines()}
    per_epoch = len(by_step) // EPOCHS
    for epoch in range(EPOCHS):
        rows = [row for step in range(epoch * per_epoch, (epoch + 1) * per_epoch) for row in by_step[step + 1]]  # type: ignore[attr-defined]
        assert sorted(rows) == list(range(len(rows)))
    log = (next(run.out.glob("*/log.jsonl"))).read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, len(by_step) + 1))


def killed(run: Run, plan: Iterator[tuple[str, int]]) -> int:
    """Kills at each (what, step) of the plan, starting the command again where it died; returns how many struck."""
    process, struck = run.start(), 0
    for what, step in plan:
        run.wait_for(max(step, run.steps_by_now() + 1), process)
        KILLS[what](run, process)
        struck += 1
        if what != "worker":
            kill_all(process)
            process = run.start()
    assert process.wait(timeout=300) == 0, (run.out / "stderr.txt").read_text()[-2000:]
    return struck


def test_a_worker_the_driver_and_both_are_killed(whole: Run, data: Path, tmp_path: Path) -> None:
    run = Run(data, tmp_path)
    assert killed(run, iter([("worker", 6), ("driver", 14), ("both", 25)])) == 3
    check(run, whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_at_random(whole: Run, data: Path, tmp_path: Path) -> None:
    left, runs = int(os.environ.get("CONJOIN_KILLS", "5")), 0
    rng = random.Random(time.time_ns())
    while left > 0:
        run = Run(data, tmp_path / str(runs))
        steps = sorted(rng.sample(range(1, 36), min(left, 5)))
        plan = [(rng.choice(list(KILLS)), step) for step in steps]
        print(plan)
        left -= killed(run, iter(plan))
        check(run, whole)
        runs += 1
