"""What a night is doing right now, in a small file of its run that anybody can read: `conjoin status` does.

Assumes: nothing depends on it. It is written by a thread every few seconds, whether the step at work says anything or
not, so one that grows old means that the night's process is gone. Failures to write it are ignored.
"""

from __future__ import annotations

import datetime as dt
import os
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import cast

from conjoin.pipeline import runs, storage
from conjoin.pipeline.errors import ConjoinError
from conjoin.pipeline.progress import Progress, ShowProgress, silent

EVERY_S = 3.0
STALE_AFTER_S = 30.0
_NAME = "progress.json"
_PLANNING = "planning"  # in place of a run's directory as long as there is no plan; run ids end in a date


@dataclass(frozen=True, slots=True)
class Beat:
    """done, total: of the step, in `unit`, zero where it does not say; facts: its latest figures; at, started: UTC.

    ended: why the process stopped, empty while it runs.
    """

    run_id: str
    host: str
    pid: int
    started: str
    at: str
    step: str = ""
    done: float = 0
    total: float = 0
    unit: str = "rows"
    facts: Mapping[str, float | str] | None = None
    ended: str = ""

    @property
    def age_s(self) -> float:
        """Seconds since it was written, by this machine's clock."""
        return (dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(self.at)).total_seconds()

    @property
    def stale(self) -> bool:
        """Whether the process is gone: it did not end, and does not write any more."""
        return not self.ended and self.age_s > STALE_AFTER_S


class Heartbeat:
    """A context around a night, and its ShowProgress: events go on to `show`.

    with Heartbeat(uri, run_id, progress) as beat: embed(..., progress=beat.show); beat.step("index"); ...

    A night that ends well takes its file away; one that raises leaves the reason in it. While it is `planning` nothing
    of it lasts: the file is written only once that takes some seconds, and goes in any case.
    """

    def __init__(
        self,
        uri: str,
        run_id: str,
        show: ShowProgress = silent,
        every_s: float | None = None,
        *,
        planning: bool = False,
    ) -> None:
        self._path = storage.join(runs.run_directory(uri, _PLANNING if planning else run_id), _NAME)
        self._run_id, self._show, self._every_s, self._planning = run_id, show, every_s or EVERY_S, planning
        self._started = _now()
        self._event = Progress("", 0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if not self._planning:
            self._write("")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if error is not None and not self._planning:
            self._write(str(error) or type(error).__name__)
            return
        with suppress(ConjoinError, OSError):
            storage.remove(self._path)

    def show(self, event: Progress) -> None:
        """The latest event; the thread writes it."""
        self._event = event
        self._show(event)

    def step(self, name: str) -> None:
        """A step begins that reports no progress of its own."""
        self._event = Progress(name, 0, 0)

    def _beat(self) -> None:
        while not self._stop.wait(self._every_s):
            self._write("")

    def _write(self, ended: str) -> None:
        event = self._event
        beat = Beat(
            run_id=self._run_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=self._started,
            at=_now(),
            step=event.step,
            done=event.done,
            total=event.total,
            unit=event.unit,
            facts=dict(event.facts),
            ended=ended,
        )
        with suppress(ConjoinError, OSError):
            storage.write_json(self._path, asdict(beat))


def read_beats(uri: str) -> tuple[Beat, ...]:
    """What nights of a table wrote that are at work, or did not end well; the newest first."""
    found = storage.match_stats(storage.join(runs.run_directory(uri, "*"), _NAME))
    beats = [beat for stat in found if (beat := _read(stat.uri)) is not None]
    return tuple(sorted(beats, key=lambda beat: beat.at, reverse=True))


def _read(path: str) -> Beat | None:
    """None if it went while we looked."""
    try:
        raw = storage.read_json(path)
    except ConjoinError:
        return None
    fields = {name: value for name, value in raw.items() if name != "format"}
    return Beat(**cast("dict[str, str]", fields))  # type: ignore[arg-type]  # our own JSON, its format checked


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="milliseconds")
