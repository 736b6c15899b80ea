"""Training runs: select, compute features of frozen towers, fit on Ray Train, write the encoder; resumable.

Assumes: pipeline/order.py decides which rows make a step; workers only compute (pipeline/fit.py). A run's folder is
named after its recipe and data, so that the same command finds it again: `train.json` first, `report.json` last.
"""

from __future__ import annotations

import hashlib
import json
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
from conjoin.pipeline.progress import ShowProgress, silent
from conjoin.pipeline.recipe import BESIDE_THE_POINT, TrainConfig
from conjoin.pipeline.symptoms import symptom

if TYPE_CHECKING:
    from conjoin.encoders.spec import Json
    from conjoin.pipeline.features import Features
    from conjoin.pipeline.forward import Data
    from conjoin.pipeline.selection import Selection
    from conjoin.pipeline.source import SourceConfig, SourceFile

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
    from conjoin.pipeline import workers
    from conjoin.pipeline.selection import select
    from conjoin.pipeline.source import list_source

    started = time.monotonic()
    source = source if recipe.path is None else source.model_copy(update={"path": recipe.path})
    custom = custom or Custom()
    _check_towers(source, recipe)
    files = list_source(source)
    digest = _digest(source, recipe, files, custom)
    folder = storage.join(storage.absolute(recipe.output), f"{name}-{digest[:8]}")
    if storage.exists(storage.join(folder, "report.json")):
        raw = storage.read_json(storage.join(folder, "report.json"))
        return TrainReport(**{key: value for key, value in raw.items() if key != "format"})  # type: ignore[arg-type]
    trackers.check(recipe.log, folder)
    storage.write_json(storage.join(folder, "train.json"), _description(source, recipe, files))
    rows = select(source, files, recipe.where, progress)
    initial = storage.join(folder, "initial")
    if not storage.exists(storage.join(initial, "spec.json")):
        _build(source, recipe, rows["train"], initial, custom)
    workers.start()
    try:
        features = _features(source, recipe, rows, initial, progress)
        data = _data(source, rows, features)
        log = _fit(data, recipe, folder, custom, progress)
    except KeyboardInterrupt:
        raise Interrupted("training stopped", where=folder, next="The same command goes on where it stopped") from None
    warning = "; ".join(filter(None, (symptom(log.last, recipe.loss), log.trouble)))
    return _finish(folder, len(data.train), log.last, warning, time.monotonic() - started)


def _check_towers(source: SourceConfig, recipe: TrainConfig) -> None:
    unknown = sorted(set(recipe.towers) - set(source.modalities))
    if unknown:
        raise ConfigError(
            f"train.towers names {unknown[0]!r}, which the source does not give", next="Name its column in source"
        )
    if len(source.modalities) < 2:
        given = ", ".join(source.modalities) or "none"
        raise ConfigError(
            f"training joins two modalities or more, the source gives {given}", next="Name a second column"
        )


def _digest(source: SourceConfig, recipe: TrainConfig, files: Sequence[SourceFile], custom: Custom) -> str:
    """Of everything that decides the weights: recipe, columns, split, and the files by path, size and etag."""
    fields = source.model_dump(mode="json", include={"id", "group", "image", "text", "audio", "split"})
    fields |= recipe.model_dump(mode="json", exclude=BESIDE_THE_POINT)
    fields["custom"] = custom.digests()
    fields["files"] = [(file.path, file.size_bytes, file.etag) for file in files]
    return hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=16).hexdigest()


def _description(source: SourceConfig, recipe: TrainConfig, files: Sequence[SourceFile]) -> dict[str, object]:
    return {
        "source": source.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "files": [asdict(file) for file in files],
    }


def _build(source: SourceConfig, recipe: TrainConfig, rows: Selection, folder: str, custom: Custom) -> None:
    """The untrained encoder, saved, so that every worker starts from the same weights."""
    from conjoin.encoders.joint import build
    from conjoin.encoders.options import TowerOptions
    from conjoin.pipeline.checkpoints import save_encoder

    towers = {name: recipe.tower(name) for name in source.modalities}
    options = {
        name: TowerOptions(**tower.model_dump(exclude={"tune", "dropout"}), seed=recipe.seed)
        for name, tower in towers.items()
    }
    needs_captions = "text" in towers and towers["text"].model == "builtin"
    try:
        captions = _captions(source, rows) if needs_captions else ()
        encoder = build(options, recipe.dim, captions, recipe.loss, custom.towers)
    except (ValueError, OSError) as error:
        raise EncoderError(f"the towers cannot be built: {error}", next="Check train.towers") from error
    save_encoder(encoder, folder, {})


def _captions(source: SourceConfig, rows: Selection) -> list[str]:
    import numpy as np

    from conjoin.pipeline.features import reading_units
    from conjoin.pipeline.source import columns_of, python_values, read_rows, values_of

    found: list[str] = []
    for unit in reading_units(rows, np.arange(min(len(rows), _TOKENIZER_CAPTIONS))):
        at = np.array(unit["rows"])
        table = read_rows(source, str(unit["file"]), int(str(unit["row_group"])), columns_of(source, "text"), at)
        for value in python_values(values_of(source, table, "text")):
            found += [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
    return found


def _features(
    source: SourceConfig, recipe: TrainConfig, rows: Mapping[str, Selection], initial: str, progress: ShowProgress
) -> dict[str, Features]:
    """Of every tower whose backbone is frozen, over training and validation rows."""
    from conjoin.pipeline import workers
    from conjoin.pipeline.embedder import load
    from conjoin.pipeline.features import Frozen, compute

    frozen = [name for name in source.modalities if recipe.tower(name).tune == "head"]
    if not frozen:
        return {}
    from conjoin.encoders.checkpoint import backbone_fingerprint

    encoder = load(initial, device="cpu").encoder
    both = rows["train"].followed_by(rows["validation"])
    found = {}
    for name in frozen:
        key = backbone_fingerprint(encoder.tower(name))
        directory = storage.join(storage.absolute(recipe.output), "features", key)
        found[name] = compute(Frozen(initial, name, directory, source), both, max(1, workers.num_gpus()), progress)
    return found


def _data(source: SourceConfig, rows: Mapping[str, Selection], features: Mapping[str, Features]) -> Data:
    from conjoin.pipeline.forward import Data

    return Data(source, rows["train"], rows["validation"], dict(features))


def _fit(data: Data, recipe: TrainConfig, folder: str, custom: Custom, progress: ShowProgress) -> Log:
    """Run the loop on the workers; returns what it said."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from conjoin.pipeline.rank import Job, Sink, work

    sink = ray.remote(num_cpus=0)(Sink).remote()
    warn = partial(symptom, loss=recipe.loss)
    log = Log(folder, lambda: ray.get(sink.drain.remote()), recipe, progress, warn)
    gpu = ray.cluster_resources().get("GPU", 0) >= (recipe.min_workers or recipe.workers)
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // recipe.workers)
    job = Job(ray.put(data), recipe, folder, sink, cpus, _bytes_per_row(folder, data), custom)
    with tempfile.TemporaryDirectory(prefix="conjoin-train-") as scratch, log:
        trainer = TorchTrainer(
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


def _bytes_per_row(folder: str, data: Data) -> int:
    """What a row of the towers that are trained whole costs in memory, seen on this machine."""
    from conjoin.encoders.footprint import bytes_per_row
    from conjoin.pipeline.embedder import load

    encoder = load(storage.join(folder, "initial"), device="cpu").encoder
    return sum(bytes_per_row(encoder.tower(name)) for name in encoder.spec.towers if name not in data.features)


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
