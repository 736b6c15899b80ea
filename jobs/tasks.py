"""Training, evaluation and history as the command line and Python call them: a run file in, a report out.

Assumes: everything that is decided is in the run file; this only hands its sections to the stages that own them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

from conjoin.jobs.stopping import stoppable
from conjoin.pipeline.errors import ConfigError
from conjoin.pipeline.progress import ShowProgress, silent

if TYPE_CHECKING:
    import pyarrow as pa

    from conjoin.jobs.config import RunFile
    from conjoin.pipeline.evaluate import Evaluation
    from conjoin.pipeline.train import TrainReport


def train(config: RunFile, *, progress: ShowProgress = silent) -> TrainReport:
    """Train the run file's recipe; a finished run is returned as it is, an unfinished one goes on."""
    from conjoin.pipeline import train as stage
    from conjoin.pipeline import workers

    with stoppable():
        if config.cluster.address:
            workers.start(config.cluster.address)
        return stage.train(config.name, config.source, config.train, progress=progress)


def evaluate(
    config: RunFile,
    split: str | None = None,
    where: str | None = None,
    *,
    classify: str | None = None,
    templates: Sequence[str] = ("a {}",),
    progress: ShowProgress = silent,
) -> Evaluation:
    """A split of the source embedded now (`validation`, `test`), or the published table's rows.

    classify: a column whose values are zero-shot classes, put into the prompt templates.

    Raises ConfigError when both or an unknown split are named, or no encoder is.
    """
    from conjoin.pipeline.evaluate import Classes, evaluate_split, evaluate_table

    wanted = Classes(classify, tuple(templates)) if classify else None
    if split is None:
        return evaluate_table(config.table.path, where, group=config.source.group, classes=wanted)
    if where is not None or split not in ("validation", "test"):
        raise ConfigError("--split is validation or test, and goes without --where", next="--where is for the table")
    if config.encoder is None:
        raise ConfigError("the run file names no encoder", next="`conjoin train` makes one; then set `encoder:`")
    return evaluate_split(config.source, config.encoder, split, classes=wanted, progress=progress)


def history_rows(uri: str) -> pa.Table:
    """What was published and rolled back, newest first, as a table. Raises TableError if there is no table."""
    import pyarrow as pa

    from conjoin.pipeline.publish import Entry, history
    from conjoin.pipeline.store import open_version

    open_version(uri, None)
    rows = [asdict(entry) for entry in history(uri)]
    return pa.table({field.name: [row[field.name] for row in rows] for field in fields(Entry)})
