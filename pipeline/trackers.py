"""Where a training run's figures are shown besides `log.jsonl`: TensorBoard, MLflow, Weights & Biases.

Assumes: one driver writes a run's figures, steps ascending; a run that goes on in another process goes on in the same
place, without a step that is there already.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conjoin.pipeline import storage
from conjoin.pipeline.errors import ConfigError
from conjoin.pipeline.recipe import TrackerName

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Figures = Mapping[str, float]
_LOCAL_STORE = ("sqlalchemy", "alembic")
_METRICS_AT_ONCE, _PARAMETERS_AT_ONCE = 1000, 100  # what MLflow's server takes
_COPY_EVERY_S = 60.0


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A training run. folder: local or s3://, named <catalog>-<digest>; recipe: as a tree of plain values.

    logged: the last step of its `log.jsonl`, 0 for none.
    """

    folder: str
    recipe: Mapping[str, object]
    logged: int = 0

    @property
    def name(self) -> str:
        return self.folder.rstrip("/").rsplit("/", 1)[-1]

    @property
    def catalog(self) -> str:
        return self.name.rpartition("-")[0] or self.name

    @property
    def settings(self) -> dict[str, str | float]:
        """The recipe, flat: `towers.image.model`."""
        return dict(_flat(self.recipe))


def _flat(tree: Mapping[str, object], above: str = "") -> list[tuple[str, str | float]]:
    found: list[tuple[str, str | float]] = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{above}{name}.")
        elif value is not None:
            found.append((f"{above}{name}", value if isinstance(value, str | int | float) else str(value)))
    return found


class Tracker(Protocol):
    """One place. `after`: the last step that it has, 0 for none."""

    after: int

    def write(self, steps: Mapping[int, Figures]) -> None:
        """Steps later than `after`, ascending."""

    def close(self, finished: bool, /) -> None:
        """finished: False for a run that stopped on the way and may go on."""


def check(names: Sequence[TrackerName], folder: str) -> None:
    """Raises ConfigError for a tracker that cannot be opened: a package, a key or an address is missing."""
    for name in names:
        needed = [name, *(_LOCAL_STORE if name == "mlflow" and not _mlflow_server() else ())]
        missing = [package for package in needed if importlib.util.find_spec(package) is None]
        if missing:
            raise ConfigError(
                f"train.log names {name}, and {missing[0]} is not installed", next=f'pip install "conjoin[{name}]"'
            )
    if "mlflow" in names and storage.is_s3(folder) and not _mlflow_server():
        advice = "Set MLFLOW_TRACKING_URI, or let train.output be local"
        raise ConfigError("MLflow keeps its runs in a database, which a bucket cannot hold", where=folder, next=advice)
    if "wandb" in names:
        _check_wandb()


def _check_wandb() -> None:
    import wandb

    online = wandb.setup().settings.mode in ("online", "shared")
    if online and not wandb.login(prompt=False, verify=False):
        raise ConfigError("Weights & Biases has no key", next="`wandb login`, or set WANDB_MODE=offline")


def first_line(error: Exception) -> str:
    """What a library says, without the user and password of an address."""
    return _without_password(storage.first_line(error))


def _without_password(text: str) -> str:
    return re.sub(r"(:/{1,2})[^/@\s]+@", r"\1", text)


def open_trackers(names: Sequence[TrackerName], run: TrackedRun) -> dict[str, Tracker]:
    """Those that are named, going on where they stopped.

    Raises ConfigError as `check` does, and when a server cannot be reached.
    """
    check(names, run.folder)
    kinds: dict[str, type[TensorBoard] | type[Mlflow] | type[Wandb]] = {
        "tensorboard": TensorBoard,
        "mlflow": Mlflow,
        "wandb": Wandb,
    }
    opened: dict[str, Tracker] = {}
    for name in names:
        try:
            opened[name] = kinds[name](run)
        except Exception as error:
            for other in opened.values():
                other.close(False)
            what = f"{name} cannot be opened: {first_line(error)}"
            raise ConfigError(what, next="Mend it, or take it out of train.log") from error
    return opened


class TensorBoard:
    """Event files at <run folder>/tensorboard; of a bucket, a local copy that is sent now and then and at the end."""

    def __init__(self, run: TrackedRun) -> None:
        self.after = run.logged
        self._target = storage.join(run.folder, "tensorboard")
        self._scratch = (
            tempfile.TemporaryDirectory(prefix="conjoin-tensorboard-") if storage.is_s3(run.folder) else None
        )
        self._folder = self._scratch.name if self._scratch else self._target
        self._settings = run.settings
        self._writer: SummaryWriter | None = None
        self._copied_at = time.monotonic()

    def write(self, steps: Mapping[int, Figures]) -> None:
        for step, figures in steps.items():
            for name, value in figures.items():
                self._opened(step).add_scalar(name, value, step)
        if self._writer is not None:
            self._writer.flush()
        if time.monotonic() - self._copied_at >= _COPY_EVERY_S:
            self._copy()

    def _opened(self, step: int) -> SummaryWriter:
        """Made at the first step, so that steps of a killed process that come again are shown once."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder, purge_step=step if self.after else None)
            if not self.after:
                rows = "\n".join(f"| {name} | {value} |" for name, value in self._settings.items())
                self._writer.add_text("recipe", f"| field | value |\n| --- | --- |\n{rows}", 0)
        return self._writer

    def _copy(self) -> None:
        if self._scratch is not None:
            self._copied_at = time.monotonic()
            storage.copy_tree(self._folder, self._target)

    def close(self, _finished: bool) -> None:
        if self._writer is not None:
            self._writer.close()
            self._copy()
        if self._scratch is not None:
            self._scratch.cleanup()


class Mlflow:
    """A run of the experiment <catalog>, at MLFLOW_TRACKING_URI or in `mlflow.db` beside the run folders."""

    def __init__(self, run: TrackedRun) -> None:
        for name in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        parent = run.folder.rstrip("/").rsplit("/", 1)[0]
        self._uri = _mlflow_server() or f"sqlite:///{parent}/mlflow.db"
        self._client = MlflowClient(tracking_uri=self._uri)
        self._kept = storage.join(run.folder, "mlflow.json")
        found = self._find()
        self._id = found or self._create(run)
        self.after = self._last_step() if found else 0

    def _find(self) -> str | None:
        """The run that an earlier process began, if the store still has it."""
        from mlflow.exceptions import MlflowException

        if not storage.exists(self._kept):
            return None
        kept = storage.read_json(self._kept)
        if kept["uri"] != _without_password(self._uri):
            return None
        try:
            found = self._client.get_run(str(kept["run"]))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if found.info.lifecycle_stage != "active":
            return None
        self._client.update_run(found.info.run_id, status="RUNNING")
        return str(found.info.run_id)

    def _create(self, run: TrackedRun) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.catalog
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        created = str(self._client.create_run(experiment_id, run_name=run.name).info.run_id)
        parameters = [Param(key, str(value)[:6000]) for key, value in run.settings.items()]
        for start in range(0, len(parameters), _PARAMETERS_AT_ONCE):
            self._client.log_batch(created, params=parameters[start : start + _PARAMETERS_AT_ONCE])
        storage.write_json(self._kept, {"uri": _without_password(self._uri), "run": created})
        return created

    def _last_step(self) -> int:
        if "loss" not in self._client.get_run(self._id).data.metrics:
            return 0
        return max(metric.step for metric in self._client.get_metric_history(self._id, "loss"))

    def write(self, steps: Mapping[int, Figures]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        figures = [Metric(name, value, now, step) for step, record in steps.items() for name, value in record.items()]
        for start in range(0, len(figures), _METRICS_AT_ONCE):
            self._client.log_batch(self._id, metrics=figures[start : start + _METRICS_AT_ONCE])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, status="FINISHED" if finished else "KILLED")


def _mlflow_server() -> str | None:
    return os.environ.get("MLFLOW_TRACKING_URI")


class Wandb:
    """A run of the project <catalog> (or WANDB_PROJECT), its id made of the run folder's name and place."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        place = hashlib.blake2b(run.folder.rstrip("/").encode(), digest_size=4).hexdigest()
        local = None if storage.is_s3(run.folder) else run.folder
        if local is not None:
            Path(local).mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(
            id=f"{re.sub('[^A-Za-z0-9_-]', '-', run.name)[-100:]}-{place}",
            project=os.environ.get("WANDB_PROJECT") or run.catalog,
            name=run.name,
            dir=local,
            config=dict(run.settings),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Of an offline run the server knows nothing yet; what went before is in log.jsonl.
        self.after = run.logged if self._run.offline else max(0, int(self._run.step) - 1)

    def write(self, steps: Mapping[int, Figures]) -> None:
        for step, figures in steps.items():
            self._run.log(dict(figures), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
