"""Training, evaluation and history as the command line and Python call them: a run file in, a report out.

Assumes: everything that is decided is in the run file; this only hands its sections to the stages that own them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from conjoin.jobs.stopping import stoppable
from conjoin.pipeline.errors import ConfigError, Interrupted
from conjoin.pipeline.progress import ShowProgress, silent

if TYPE_CHECKING:
    from torch import nn

    from conjoin.encoders.objective import PairLoss
    from conjoin.jobs.config import RunFile
    from conjoin.pipeline.evaluate import Classes, Evaluation, Measure
    from conjoin.pipeline.fit import Callback
    from conjoin.pipeline.night import Night
    from conjoin.pipeline.publish import Entry
    from conjoin.pipeline.store import TableConfig
    from conjoin.pipeline.train import TrainReport


def train(
    config: RunFile,
    *,
    towers: Mapping[str, nn.Module] | None = None,
    loss: PairLoss | None = None,
    callbacks: Sequence[Callback] = (),
    progress: ShowProgress = silent,
) -> TrainReport:
    """Train the run file's recipe; a finished run is returned as it is, an unfinished one goes on.

    towers: backbones of your own by modality, instead of the recipe's models: importable torch modules, called as the
    built-in ones are (encoders/backbones.py). loss: of all rows of a pair of modalities, (a_ND, b_ND, scale, group_N)
    to its mean; instead of the recipe's. callbacks: called after each step with its number, rows and figures.
    """
    from conjoin.pipeline import train as stage
    from conjoin.pipeline import workers
    from conjoin.pipeline.custom import Custom

    with stoppable():
        if config.cluster.address:
            workers.start(config.cluster.address)
        custom = Custom(dict(towers or {}), loss, tuple(callbacks))
        return stage.train(config.name, config.source, config.train, custom=custom, progress=progress)


def evaluate(
    config: RunFile,
    split: str | None = None,
    where: str | None = None,
    *,
    classify: str | Classes | None = None,
    queries: int | None = None,
    progress: ShowProgress = silent,
) -> Evaluation:
    """A split of the source embedded now on Ray (`validation`, `test`), or the published table's rows.

    classify: a column whose values are zero-shot classes, or Classes with prompt templates. queries: at most so many
    in each direction, drawn at random; 0: all; default: evaluate.MAX_QUERIES.

    Raises ConfigError when both or an unknown split are named, or no encoder is.
    """
    from conjoin.pipeline.evaluate import MAX_QUERIES, Classes, Measure

    classes = Classes(classify) if isinstance(classify, str) else classify
    measure = Measure(MAX_QUERIES if queries is None else queries, classes, config.cluster.address)
    return _measured(config, split, where, measure, progress)


def calibrate(
    config: RunFile, split: str | None = None, where: str | None = None, *, progress: ShowProgress = silent
) -> Evaluation:
    """The same, and SQL's relevance() is fitted to what is found and left beside the encoder.

    On the validation split, another one, or the published table's rows that `where` names: rows that no training saw.
    Raises SourceError where they are too few.
    """
    from conjoin.pipeline.evaluate import Measure

    split = split or (None if where else "validation")
    return _measured(config, split, where, Measure(address=config.cluster.address, calibrate=True), progress)


def _measured(
    config: RunFile, split: str | None, where: str | None, measure: Measure, progress: ShowProgress
) -> Evaluation:
    from conjoin.pipeline.catalog import Catalog
    from conjoin.pipeline.evaluate import evaluate_split, evaluate_table

    if split is None:
        return evaluate_table(config.table.path, where, group=config.source.group, measure=measure, progress=progress)
    if where is not None or split not in ("validation", "test"):
        raise ConfigError("--split is validation or test, and goes without --where", next="--where is for the table")
    if config.encoder is None:
        raise ConfigError("the run file names no encoder", next="`conjoin train` makes one; then set `encoder:`")
    catalog = Catalog(config.name, config.source, config.encoder, config.table, config.embed).absolute()
    with stoppable():
        try:
            return evaluate_split(catalog, split, measure=measure, progress=progress)
        except KeyboardInterrupt:
            raise Interrupted("evaluation stopped", next="The same command starts it over") from None


def history_entries(uri: str, last: int = 0) -> list[dict[str, object]]:
    """What was published, rolled back, forced and rejected, newest first, with what its night counted and measured.

    last: at most so many, 0 for all. Raises TableError if there is no table.
    """
    from conjoin.pipeline.night import read_night
    from conjoin.pipeline.parallel import in_order
    from conjoin.pipeline.publish import history
    from conjoin.pipeline.store import open_version

    open_version(uri, None)
    entries = history(uri)[: last or None]
    run_ids = list(dict.fromkeys(entry.run_id for entry in entries if entry.run_id))
    nights = dict(zip(run_ids, in_order(run_ids, lambda run_id: read_night(uri, run_id)), strict=True))
    return [_with_figures(asdict(entry), nights.get(entry.run_id)) for entry in entries]


def _with_figures(entry: dict[str, object], night: Night | None) -> dict[str, object]:
    names = ("new", "changed", "deleted")
    counts: dict[str, object] = {name: None if night is None else night.counts.get(name) for name in names}
    counts["quarantined"] = None if night is None else night.quarantined
    return {**entry, **counts, "figures": {} if night is None else night.measured}


def force(table: TableConfig, target: str) -> Entry:
    """Make live what its gates rejected, by run id or version; a candidate beside the head lands and is indexed first.

    Repeating it changes nothing. Raises TableError if there is no such version, or live has moved on since.
    """
    from conjoin.pipeline.index import build
    from conjoin.pipeline.publish import DETACHED, find_rejected, history, land
    from conjoin.pipeline.publish import force as move
    from conjoin.pipeline.store import open_version

    live = next((entry for entry in history(table.path) if entry.live), None)
    if live is not None and live.action == "forced" and target in (live.run_id, str(live.version)):
        return live
    rejected = find_rejected(table.path, target)
    version = land(table.path, rejected)
    if rejected.version >= DETACHED:
        build(table.path, table)
        version = int(open_version(table.path, None).version)
    return move(table.path, version, rejected.run_id)
