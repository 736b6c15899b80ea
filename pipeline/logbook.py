"""The log of a training run: `log.jsonl` in its folder, progress for who watches, and the trackers of `train.log`.

Assumes: the driver keeps it, and the Sink of pipeline/rank.py carries the records of rank 0 to it; a record has `step`
and `total`, and one that comes again (after a restart) says the same as before.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from conjoin.pipeline import storage
from conjoin.pipeline.errors import StorageError
from conjoin.pipeline.progress import Progress, ShowProgress
from conjoin.pipeline.recipe import TrainConfig
from conjoin.pipeline.trackers import TrackedRun, Tracker, first_line, open_trackers

Figures = Mapping[str, float]
Drain = Callable[[], Sequence[dict[str, float]]]

_POLL_S = 0.5
_WRITE_EVERY_S = 5.0
_NOT_FIGURES = ("step", "total")
_SHOWN = ("loss", "samples_per_s")


class Log:
    """A context manager that writes in the background. `last`: the latest value of every figure.

    drain: the records that came since it was called last; warn: what to say of the latest figures, empty for nothing.
    """

    def __init__(
        self, folder: str, drain: Drain, recipe: TrainConfig, progress: ShowProgress, warn: Callable[[Figures], str]
    ) -> None:
        self._folder, self._drain, self._recipe = folder, drain, recipe
        self._progress, self._warn = progress, warn
        self._uri = storage.join(folder, "log.jsonl")
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.last: dict[str, float] = {}
        self._records: dict[int, Figures] = {}
        self._trackers: dict[str, Tracker] = {}
        self._troubles: dict[str, str] = {}
        self._written_at = time.monotonic()

    @property
    def trouble(self) -> str:
        """What could not be written, and is missing now; empty if nothing is."""
        return "; ".join(self._troubles.values())

    def __enter__(self) -> Log:
        """Raises ConfigError if a tracker cannot be opened."""
        self._records = _read(self._uri)
        run = TrackedRun(self._folder, self._recipe.model_dump(mode="json"), max(self._records, default=0))
        self._trackers = open_trackers(self._recipe.log, run)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self._take()
        finally:
            for name in list(self._trackers):
                self._told(name, lambda tracker: tracker.close(kind is None))

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                self._take()
            except StorageError as error:
                # Written whole each time: the next attempt, or the last one, makes it good.
                self._troubles["log.jsonl"] = str(error)

    def _take(self) -> None:
        for record in self._drain():
            self._records[int(record["step"])] = record
            self.last |= record
            self._show(record)
        if self._records and (self._stop.is_set() or time.monotonic() - self._written_at >= _WRITE_EVERY_S):
            self._written_at = time.monotonic()
            self._write()

    def _show(self, record: Figures) -> None:
        facts: dict[str, float | str] = {n: v for n, v in self.last.items() if n in _SHOWN or "_hit" in n}
        if warning := "; ".join(filter(None, (self._warn(self.last), self.trouble))):
            facts["warning"] = warning
        self._progress(Progress("train", record["step"], record["total"], "steps", facts))

    def _write(self) -> None:
        """Trackers first: what `log.jsonl` has, they have, or a killed process would leave a gap in them."""
        for name in list(self._trackers):
            self._told(name, self._newer)
        lines = "".join(f"{json.dumps(record)}\n" for _, record in sorted(self._records.items()))
        storage.write_bytes(self._uri, lines.encode())
        self._troubles.pop("log.jsonl", None)

    def _newer(self, tracker: Tracker) -> None:
        steps = {step: self._records[step] for step in sorted(self._records) if step > tracker.after}
        if steps:
            figures = {
                step: {name: value for name, value in record.items() if name not in _NOT_FIGURES}
                for step, record in steps.items()
            }
            tracker.write(figures)
            tracker.after = max(steps)

    def _told(self, name: str, action: Callable[[Tracker], None]) -> None:
        """A tracker that fails is left alone from then on and named: nobody loses a training run to a chart."""
        try:
            action(self._trackers[name])
        except Exception as error:
            del self._trackers[name]
            self._troubles[name] = f"{name} is not written any more: {first_line(error)}"


def _read(uri: str) -> dict[int, Figures]:
    """What an earlier process wrote, by step."""
    if not storage.exists(uri):
        return {}
    records = [json.loads(line) for line in storage.read_bytes(uri).decode().splitlines()]
    return {int(record["step"]): record for record in records}
