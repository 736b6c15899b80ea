"""Training on real Ray Train: the number of workers changes nothing, a killed run goes on to the same weights."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline.errors import TrainError
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.source import SourceConfig, Split
from conjoin.pipeline.train import TrainReport, train

COLOURS = ("red", "green", "blue", "black", "orange", "purple")
SHAPES = ("circle", "square", "bar", "cross")


@pytest.fixture(scope="module")
def shapes(draw_shape: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 shapes, every other drawn twice, with captions such as `a red circle`, in five row groups."""
    rng = np.random.default_rng(0)
    pairs = [(COLOURS[i % 6], SHAPES[i // 6 % 4]) for i in range(240)]
    pictures = [[draw_shape(*pair, rng) for _ in range(1 + i % 2)] for i, pair in enumerate(pairs)]
    table = pa.table(
        {
            "id": [f"s{i}" for i in range(240)],
            "image": pa.array(pictures, pa.list_(pa.binary())),
            "caption": [f"a {colour} {shape}" for colour, shape in pairs],
        }
    )
    path = tmp_path_factory.mktemp("shapes") / "shapes.parquet"
    pq.write_table(table, path, row_group_size=50)
    return path


def source(path: Path) -> SourceConfig:
    return SourceConfig(path=str(path), id="id", image="image", text="caption")


def recipe(out: Path, **changes: object) -> TrainConfig:
    towers = {
        "image": {"model": "builtin", "tune": "head", "size_px": 16, "dropout": 0.2},
        "text": {"model": "builtin", "tune": "all", "max_tokens": 12},
    }
    base = {"output": str(out), "towers": towers, "dim": 16, "global_batch_size": 48, "epochs": 4, "lr": 3e-3}
    return TrainConfig.model_validate({**base, **changes})


def losses(folder: str) -> list[float]:
    lines = (Path(folder) / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.fixture(scope="module")
def trained(ray_session: None, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainReport]:
    """20 steps on one worker: where, and its report."""
    out = tmp_path_factory.mktemp("one")
    return out, train("shapes", source(shapes), recipe(out))


OTHERWISE: dict[int, dict[str, object]] = {
    2: {"parallel": "fsdp", "micro_batch_size": 7},
    3: {"min_workers": 1, "gradient_checkpointing": True},
}


def test_one_two_and_three_workers_give_the_same_curve(
    trained: tuple[Path, TrainReport], shapes: Path, tmp_path: Path
) -> None:
    one = losses(trained[1].folder)
    assert len(one) == trained[1].steps == 20
    assert one[-1] < one[0] - 0.1
    for workers, otherwise in OTHERWISE.items():
        report = train("shapes", source(shapes), recipe(tmp_path / str(workers), workers=workers, **otherwise))
        assert np.abs(np.array(losses(report.folder)) - one).max() < 1e-4, workers


def test_a_frozen_backbone_stays_as_it_was(trained: tuple[Path, TrainReport]) -> None:
    from conjoin.encoders.checkpoint import load

    before, after = load(Path(trained[1].folder) / "initial"), load(Path(trained[1].encoder))
    frozen = before.tower("image").backbone.state_dict()
    for name, value in after.tower("image").backbone.state_dict().items():
        assert value.equal(frozen[name]), name
    assert not after.tower("image").head.weight.equal(before.tower("image").head.weight)
    assert not next(after.tower("text").backbone.parameters()).equal(next(before.tower("text").backbone.parameters()))
    assert trained[1].metrics["text_image_hit10"] > 0


def test_the_best_encoder_is_calibrated_on_its_validation_rows(ray_session: None, shapes: Path, tmp_path: Path) -> None:
    from conjoin.pipeline import calibration

    held_out = source(shapes).model_copy(update={"split": Split(validation=0.5, test=0)})
    report = train("shapes", held_out, recipe(tmp_path, workers=2, parallel="fsdp", epochs=8, lr=1e-2, ema=0.9))
    curve = calibration.read(report.encoder, report.fingerprint)["image_text"]
    assert 90 < curve.num_pairs < 150
    assert curve.slope > 0
    assert curve.error < 0.2
    assert not (Path(report.folder) / "last" / "calibration.json").exists()


def test_a_finished_run_is_returned(trained: tuple[Path, TrainReport], shapes: Path) -> None:
    started = time.monotonic()
    assert train("shapes", source(shapes), recipe(trained[0])) == trained[1]
    assert time.monotonic() - started < 5


def test_nothing_to_train_on_is_an_error(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="0 of 240 rows"):
        train("shapes", source(shapes), recipe(tmp_path, where="caption = 'none'"))


TOWERS = """
from torch import nn

class Flat(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.arguments = {"width": width}
        self.layer = nn.Linear(16 * 16 * 3, width)

    def forward(self, pixel_values):
        return self.layer(pixel_values.flatten(1))
"""
OWN = """
import os

import conjoin as cj
import my_towers
import torch

torch.manual_seed(0)  # of the user's own module
SEEN = os.path.abspath("seen.txt")  # the workers are elsewhere

def squares(a_ND, b_ND, scale, group_N):
    same = (group_N[:, None] == group_N[None, :]).to(a_ND.dtype)
    return ((a_ND @ b_ND.T - same) ** 2).mean()

steps = []

def note(step):
    with open(SEEN, "a") as file:
        file.write(f"{step.step} {step.figures['loss']:.4f} {len(step.rows)}\\n")
    return step.step >= 8

config = cj.config("conjoin.yaml")
report = cj.train(config, towers={"image": my_towers.Flat(32)}, loss=squares, callbacks=[note])
print(report.to_json())
encoder = cj.load(report.encoder)
assert encoder.encode(text=["a red circle"]).shape == (1, 16)
assert encoder.spec.towers["image"].config["class"] == "my_towers:Flat"
"""


def test_own_towers_loss_and_callbacks_as_a_user_writes_them(ray_session: None, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "my_towers.py").write_text(TOWERS)
    (tmp_path / "research.py").write_text(OWN)
    (tmp_path / "conjoin.yaml").write_text(
        f"name: shapes\nsource: {{path: {shapes}, id: id, image: image, text: caption}}\n"
        "table: {path: shapes.lance}\n"
        "train: {dim: 16, global_batch_size: 48, epochs: 4, validate_every: 2, lr: 2.0e-5, "
        "towers: {image: {size_px: 16}}}\n"
    )
    done = subprocess.run([sys.executable, "research.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in (tmp_path / "seen.txt").read_text().splitlines()]
    assert [int(line[0]) for line in lines] == list(range(1, 9)), "the callback stops it at a validation"
    assert float(lines[-1][1]) < float(lines[0][1])


SCRIPT = """
import sys
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.source import SourceConfig
from conjoin.pipeline.train import train
source, recipe = SourceConfig.model_validate_json(sys.argv[1]), TrainConfig.model_validate_json(sys.argv[2])
print(train("shapes", source, recipe).encoder)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(ray_session: None, shapes: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    settings = {"checkpoint_every_s": 0, "validate_every": 1, "epochs": 12}
    whole = train("shapes", source(shapes), recipe(tmp_path / "whole", **settings))
    broken = recipe(tmp_path / "broken", **settings)
    command = [sys.executable, "-c", SCRIPT, source(shapes).model_dump_json(), broken.model_dump_json()]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while not list((tmp_path / "broken").glob("*/checkpoints/*5/state.json")):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    import os

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    resumed = train("shapes", source(shapes), broken)
    assert resumed.steps == whole.steps
    left, right = (load_file(Path(report.folder) / "last" / "model.safetensors") for report in (whole, resumed))
    for name, value in left.items():
        assert (value.float() - right[name].float()).abs().max() <= 1e-6, name
    assert len(losses(resumed.folder)) == whole.steps


RUN_FILE = """
name: shapes
source: {{path: "{bucket}/shapes.parquet", id: id, image: image, text: caption, keep: [caption]}}
table: {{path: "{bucket}/vectors/shapes.lance"}}
train:
  output: "{bucket}/encoders"
  towers:
    image: {{model: builtin, tune: head, size_px: 16}}
    text: {{model: builtin, max_tokens: 12}}
  dim: 16
  global_batch_size: 48
  epochs: 1
"""


@pytest.mark.slow
def test_everything_in_a_bucket(shapes: Path, s3: str, conjoin: Any, tmp_path: Path) -> None:
    """Source, features, checkpoints, encoder and table: trained, run, run again in full and asked, by the command."""
    import s3fs

    s3fs.S3FileSystem().put(str(shapes), f"{s3}/shapes.parquet")
    file = tmp_path / "conjoin.yaml"
    file.write_text(RUN_FILE.format(bucket=s3))

    def command(*words: str) -> Any:
        done = conjoin.run(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    report = command("train", str(file))
    assert report["encoder"].startswith(f"{s3}/encoders/shapes-")
    assert command("train", str(file)) == report
    assert report["steps"] == 5
    encoder = f"encoder={report['encoder']}"
    first = command("run", str(file), "--set", encoder)
    assert (first["status"], first["rows"]) == ("published", 240)
    again = command("run", str(file), "--set", encoder, "--full")
    assert (again["status"], again["rows"]) == ("published", 240)
    assert command("run", str(file), "--set", encoder)["status"] == "unchanged"
    assert [entry["live"] for entry in command("history", str(file))] == [True, False]
    sql = "SELECT caption, distance(text_vec, text('a red circle')) AS d FROM shapes ORDER BY d LIMIT 1"
    found = command("query", str(file), sql)
    assert found[0]["caption"] == "a red circle"
    assert found[0]["d"] < 1e-5
