"""TensorBoard, MLflow and Weights & Biases, the real packages: a run that goes on has every step once."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from conjoin.pipeline.errors import ConfigError
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.trackers import TrackedRun, check, open_trackers

STEPS = {step: {"loss": 5.0 - step, "text_image_hit10": step / 10} for step in range(1, 8)}


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


def tracked(folder: str, logged: int = 0) -> TrackedRun:
    return TrackedRun(folder, TrainConfig.model_validate({"dim": 8, "towers": {"text": {}}}).model_dump(), logged)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "WANDB_PROJECT", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return str(tmp_path / "shapes-1f2e3d4c")


def write(name: Any, run: TrackedRun, steps: Sequence[int], *, finished: bool = True) -> int:
    """What one process does; returns the step after which it went on."""
    tracker = open_trackers([name], run)[name]
    after = tracker.after
    tracker.write({step: STEPS[step] for step in steps if step > after})
    tracker.close(finished)
    return after


def test_a_run_knows_its_name_its_catalog_and_a_flat_recipe() -> None:
    run = tracked("s3://bucket/encoders/big-shapes-1f2e3d4c/")
    assert (run.name, run.catalog) == ("big-shapes-1f2e3d4c", "big-shapes")
    assert run.settings["towers.text.model"] == "builtin"
    assert run.settings["dim"] == 8
    assert "path" not in run.settings  # null


def events(folder: str) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(folder)
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


@needs("tensorboard")
def test_tensorboard_shows_a_step_once_however_often_it_was_written(folder: str) -> None:
    write("tensorboard", tracked(folder), [1, 2, 3, 4, 5], finished=False)
    # log.jsonl was a little behind when the process was killed: 4 and 5 come again
    assert write("tensorboard", tracked(folder, logged=3), [1, 2, 3, 4, 5, 6, 7]) == 3
    shown = events(f"{folder}/tensorboard")
    assert set(shown) == {"loss", "text_image_hit10"}
    assert shown["loss"] == [(step, pytest.approx(5.0 - step)) for step in range(1, 8)]


@needs("tensorboard")
def test_tensorboard_of_a_bucket_is_sent_there(s3: str, folder: str, tmp_path: Path) -> None:
    from conjoin.pipeline import storage

    write("tensorboard", tracked(f"{s3}/encoders/shapes-1f2e3d4c"), [1, 2, 3])
    write("tensorboard", tracked(f"{s3}/encoders/shapes-1f2e3d4c", logged=3), [4])
    storage.copy_tree(f"{s3}/encoders/shapes-1f2e3d4c/tensorboard", str(tmp_path / "copy"))
    assert [step for step, _ in events(str(tmp_path / "copy"))["loss"]] == [1, 2, 3, 4]


@needs("mlflow", "sqlalchemy", "alembic")
def test_mlflow_goes_on_with_the_same_run_where_it_stopped(folder: str) -> None:
    from mlflow import MlflowClient

    write("mlflow", tracked(folder), [1, 2, 3, 4, 5], finished=False)
    kept = json.loads((Path(folder) / "mlflow.json").read_text())
    client = MlflowClient(tracking_uri=kept["uri"])
    assert client.get_run(kept["run"]).info.status == "KILLED"
    assert write("mlflow", tracked(folder, logged=3), [1, 2, 3, 4, 5, 6, 7]) == 5
    run = client.get_run(kept["run"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "shapes-1f2e3d4c")
    assert run.data.params["towers.text.model"] == "builtin"
    history = client.get_metric_history(kept["run"], "loss")
    assert [(one.step, one.value) for one in history] == [(step, 5.0 - step) for step in range(1, 8)]
    experiment = client.get_experiment_by_name("shapes")
    assert len(client.search_runs([experiment.experiment_id])) == 1


@needs("mlflow", "sqlalchemy", "alembic")
def test_an_mlflow_run_that_somebody_deleted_is_begun_again(folder: str) -> None:
    from mlflow import MlflowClient

    write("mlflow", tracked(folder), [1, 2, 3], finished=False)
    kept = json.loads((Path(folder) / "mlflow.json").read_text())
    client = MlflowClient(tracking_uri=kept["uri"])
    client.delete_run(kept["run"])
    assert write("mlflow", tracked(folder, logged=3), [1, 2, 3, 4]) == 0
    again = json.loads((Path(folder) / "mlflow.json").read_text())["run"]
    assert again != kept["run"]
    assert len(client.get_metric_history(again, "loss")) == 4


def messages(file: Path) -> Iterator[bytes]:
    """Of an offline run: a log in blocks of 32 KB as LevelDB's, after a header of 7 bytes."""
    data, at, message = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield message
            message = b""


def wandb_rows(folder: str) -> dict[str, list[tuple[int, float]]]:
    """By the id of the run: step and loss, out of the offline files."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(Path(folder).glob("wandb/offline-run-*/*.wandb")):
        run_id = ""
        for message in messages(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            run_id = record.run.run_id or run_id
            row = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if row:
                found.setdefault(run_id, []).append((int(row["_step"]), float(row["loss"])))
    return found


@needs("wandb")
def test_wandb_goes_on_with_the_same_id(folder: str) -> None:
    write("wandb", tracked(folder), [1, 2, 3], finished=False)
    assert write("wandb", tracked(folder, logged=3), [1, 2, 3, 4, 5]) == 3
    rows = wandb_rows(folder)
    assert [name.rpartition("-")[0] for name in rows] == ["shapes-1f2e3d4c"]
    assert next(iter(rows.values())) == [(step, 5.0 - step) for step in range(1, 6)]


@needs("wandb")
def test_wandb_without_a_key_is_an_error_before_anything_starts(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    wandb.teardown()  # it has read the environment
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"has no key.*WANDB_MODE=offline"):
        check(["wandb"], folder)
    wandb.teardown()


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb"])
def test_a_missing_package_is_named_with_what_to_install(
    name: Any, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted: None if wanted == name else real(wanted))
    with pytest.raises(ConfigError, match=rf'{name} is not installed.*pip install "conjoin\[{name}\]"'):
        check([name], folder)


@needs("mlflow", "sqlalchemy", "alembic")
def test_mlflow_of_a_bucket_needs_a_server(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="Set MLFLOW_TRACKING_URI"):
        check(["mlflow"], "s3://bucket/encoders/shapes-1f2e3d4c")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    check(["mlflow"], "s3://bucket/encoders/shapes-1f2e3d4c")


@needs("mlflow")
def test_a_server_that_cannot_be_reached_is_an_error_before_training(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match="mlflow cannot be opened") as raised:
        open_trackers(["mlflow"], tracked(folder))
    assert "127.0.0.1" in str(raised.value)
    assert "secret" not in str(raised.value)
