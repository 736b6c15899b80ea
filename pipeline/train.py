"""Training runs: select, compute features of frozen towers, fit on Ray Train, write the encoder; resumable.

Assumes: pipeline/order.py decides which rows make a step; workers only compute (pipeline/fit.py). A run's folder is
named after its recipe and data, so that the same command finds it again: `train.json` first, `report.json` last.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

from conjoin.pipeline import storage, trackers
from conjoin.pipeline.custom import Custom
from conjoin.pipeline.errors import ConfigError, EncoderError, Interrupted, TrainError
from conjoin.pipeline.logbook import Log
from conjoin.pipeline.progress import Progress, ShowProgress, silent
from conjoin.pipeline.recipe import BESIDE_THE_POINT, TrainConfig
from conjoin.pipeline.symptoms import symptom

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

    from conjoin.encoders.spec import Json
    from conjoin.pipeline.features import Features
    from conjoin.pipeline.forward import Data
    from conjoin.pipeline.mixture import Part
    from conjoin.pipeline.preflight import Preflight
    from conjoin.pipeline.selection import Selection
    from conjoin.pipeline.source import SourceConfig

_TOKENIZER_CAPTIONS = 200_000
# Of lost workers, each of which costs a start of Ray Train and the steps since the last checkpoint.
_MAX_FAILURES = 8


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a finished run left behind; encoder: the folder to name in the run file; seconds: of the last command."""

    folder: str
    encoder: str
    fingerprint: str
    rows: int
    steps: int
    seconds: float
    samples_per_s: float
    metrics: Mapping[str, float]
    warning: str = ""

    def to_json(self) -> dict[str, Json]:
        return cast("dict[str, Json]", asdict(self))

    def lines(self) -> list[str]:
        """For people."""
        hits = "  ".join(f"{name} {value:.3f}" for name, value in self.metrics.items())
        return [
            f"trained {self.steps} steps on {self.rows:,} rows in {self.seconds:.0f} s "
            f"({self.samples_per_s:,.0f} rows/s in the loop)",
            *([hits] if hits else []),
            *([f"warning: {self.warning}"] if self.warning else []),
            f"name it in the run file as `encoder: {self.encoder}`",
        ]


def train(
    name: str,
    source: SourceConfig,
    recipe: TrainConfig,
    *,
    custom: Custom | None = None,
    progress: ShowProgress = silent,
) -> TrainReport:
    """Train an encoder; a finished run is returned as it is, an unfinished one goes on where it stopped.

    custom: the caller's own backbones, loss and callbacks.

    Raises SourceError, ConfigError or TrainError for data or a recipe that cannot be trained, Interrupted on Ctrl-C.
    """
    from conjoin.pipeline import mixture, workers
    from conjoin.pipeline.selection import select

    started = time.monotonic()
    custom = custom or Custom()
    parts = mixture.parts(source, recipe)
    digest = _digest(source, recipe, parts, custom)
    folder = storage.join(storage.absolute(recipe.output), f"{name}-{digest[:8]}")
    if storage.exists(storage.join(folder, "report.json")):
        raw = storage.read_json(storage.join(folder, "report.json"))
        return TrainReport(**{key: value for key, value in raw.items() if key != "format"})  # type: ignore[arg-type]
    trackers.check(recipe.log, folder)
    storage.write_json(storage.join(folder, "train.json"), _description(source, recipe, parts))
    initial = storage.join(folder, "initial")
    try:
        parts = mixture.converted(parts, storage.join(storage.absolute(recipe.output), "data"), progress)
        rows = select(parts, recipe.where, progress)
        if not storage.exists(storage.join(initial, "spec.json")):
            _build(recipe, rows["train"], initial, custom)
        workers.start()
        features = _features(recipe, rows, initial, progress)
        data = _data(rows, features)
        ahead = _look(data, recipe, folder, progress)
        log = _fit(data, recipe, folder, custom, ahead.bytes_per_row, progress)
    except KeyboardInterrupt:
        raise Interrupted("training stopped", where=folder, next="The same command goes on where it stopped") from None
    warning = "; ".join(filter(None, (symptom(log.last, recipe.loss), log.trouble)))
    return _finish(folder, len(data.train), log.last, warning, time.monotonic() - started)


def _digest(source: SourceConfig, recipe: TrainConfig, parts: Sequence[Part], custom: Custom) -> str:
    """Of everything that decides the weights: recipe, columns, split, and the files by path, size and etag."""
    from conjoin.pipeline.mixture import stamps

    fields = source.model_dump(mode="json", include={"id", "group", "image", "text", "audio", "split"})
    fields |= recipe.model_dump(mode="json", exclude=BESIDE_THE_POINT)
    fields["custom"] = custom.digests()
    fields["files"] = stamps(parts)
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16).hexdigest()


def _description(source: SourceConfig, recipe: TrainConfig, parts: Sequence[Part]) -> dict[str, object]:
    from conjoin.pipeline.mixture import stamps

    return {
        "source": source.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "files": stamps(parts),
    }


def _build(recipe: TrainConfig, rows: Selection, folder: str, custom: Custom) -> None:
    """The untrained encoder, saved, so that every worker starts from the same weights."""
    from conjoin.encoders.joint import build
    from conjoin.pipeline.captions import captions
    from conjoin.pipeline.checkpoints import save_encoder

    towers = {name: recipe.tower(name) for name in rows.modalities}
    options = {name: tower.options(recipe.seed) for name, tower in towers.items()}
    needs_captions = "text" in towers and towers["text"].model == "builtin"
    try:
        texts = captions(rows, _TOKENIZER_CAPTIONS) if needs_captions else ()
        encoder = build(options, recipe.dim, texts, recipe.loss, custom.towers)
    except (ValueError, OSError) as error:
        raise EncoderError(f"the towers cannot be built: {error}", next="Check train.towers") from error
    save_encoder(encoder, folder, {})


def _features(
    recipe: TrainConfig, rows: Mapping[str, Selection], initial: str, progress: ShowProgress
) -> dict[str, Features]:
    """Of every tower whose backbone is frozen, over training and validation rows."""
    from conjoin.pipeline import workers
    from conjoin.pipeline.embedder import load
    from conjoin.pipeline.features import Frozen, compute

    frozen = [name for name in rows["train"].modalities if recipe.tower(name).frozen]
    if not frozen:
        return {}
    from conjoin.encoders.checkpoint import backbone_fingerprint

    encoder = load(initial, device="cpu").encoder
    both = rows["train"].followed_by(rows["validation"])
    found = {}
    for name in frozen:
        key = backbone_fingerprint(encoder.tower(name))
        directory = storage.join(storage.absolute(recipe.output), "features", key)
        found[name] = compute(Frozen(initial, name, directory), both, max(1, workers.num_gpus()), progress)
    return found


def _data(rows: Mapping[str, Selection], features: Mapping[str, Features]) -> Data:
    from conjoin.pipeline.forward import Data

    return Data(rows["train"], rows["validation"], dict(features))


def _look(data: Data, recipe: TrainConfig, folder: str, progress: ShowProgress) -> Preflight:
    """What is about to be done: shown, and left in the run's folder. Raises EncoderError for what cannot be tuned."""
    from conjoin.pipeline.embedder import load
    from conjoin.pipeline.preflight import look
    from conjoin.pipeline.rank import prepared

    encoder = prepared(load(storage.join(folder, "initial"), device="cpu").encoder, recipe)
    ahead = look(encoder, data, recipe)
    storage.write_json(storage.join(folder, "preflight.json"), dict(ahead.to_json()))
    progress(Progress("ahead", len(data.train), len(data.train), facts=ahead.facts()))
    return ahead


def _fit(
    data: Data, recipe: TrainConfig, folder: str, custom: Custom, bytes_per_row: int, progress: ShowProgress
) -> Log:
    """Run the loop on the workers; returns what it said."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from conjoin.pipeline.rank import Job, Sink, work

    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how soon an end is noticed
    sink = ray.remote(num_cpus=0)(Sink).remote()
    warn = partial(symptom, loss=recipe.loss)
    log = Log(folder, lambda: ray.get(sink.drain.remote()), recipe, progress, warn)
    gpu = ray.cluster_resources().get("GPU", 0) >= (recipe.min_workers or recipe.workers)
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // recipe.workers)
    job = Job(ray.put(data), recipe, folder, sink, cpus, bytes_per_row, custom)
    with tempfile.TemporaryDirectory(prefix="conjoin-train-") as scratch, log:
        trainer = _trainer_class()(
            work,
            train_loop_config={"job": job},
            scaling_config=ScalingConfig(
                num_workers=(recipe.min_workers, recipe.workers) if recipe.min_workers else recipe.workers,
                use_gpu=gpu,
                resources_per_worker={"CPU": 0.25, **({"GPU": 1} if gpu else {})},
            ),
            run_config=RunConfig(storage_path=scratch, failure_config=FailureConfig(max_failures=_MAX_FAILURES)),
        )
        try:
            trainer.fit()
        except Exception as error:
            raise _cause(error) from error
        if failed := ray.get(sink.failed.remote()):
            raise failed
    return log


def _trainer_class() -> type[TorchTrainer]:
    """Ray's own, but on a Ray of this process without the actor that outlives it to tidy up.

    That one asks the dashboard whether the controller lives. Where there is none it waits for an answer until its
    timeout, and the end of each training with it: 12 of the 34 s that five steps took.
    """
    from ray.train.torch import TorchTrainer

    from conjoin.pipeline import workers

    if not workers.started_here():
        return TorchTrainer

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[object]:
            found = super()._create_default_callbacks()
            return [callback for callback in found if type(callback).__name__ != "PlacementGroupCleanerCallback"]

    return Trainer


def _cause(error: BaseException) -> BaseException:
    """Our own error out of Ray's wrappers, or a TrainError that says what the worker said."""
    seen: BaseException | None = error
    while seen is not None:
        for found in (seen, *getattr(seen, "worker_failures", {}).values()):
            inner = getattr(found, "cause", found)
            if isinstance(inner, TrainError | ConfigError | EncoderError):
                return inner
        seen = seen.__cause__ or seen.__context__
    return TrainError(f"a training worker failed: {str(error).strip().splitlines()[-1]}")


def _finish(folder: str, rows: int, figures: Mapping[str, float], warning: str, seconds: float) -> TrainReport:
    from conjoin.pipeline.embedder import read_spec

    encoder = storage.join(folder, "best")
    report = TrainReport(
        folder=folder,
        encoder=encoder,
        fingerprint=read_spec(encoder)[1],
        rows=rows,
        steps=int(figures.get("step", 0)),
        seconds=seconds,
        samples_per_s=figures.get("samples_per_s", 0.0),
        metrics={name: value for name, value in figures.items() if "_hit" in name},
        warning=warning,
    )
    storage.write_json(storage.join(folder, "report.json"), asdict(report))
    return report
