"""Progress on stderr: one live line per step on a terminal, a plain line now and then elsewhere.

Assumes: stdout belongs to data.
"""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from conjoin.pipeline.progress import Progress as Event

_PLAIN_EVERY_S = 10.0


class Screen:
    """A context manager whose `show` takes the pipeline's events."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[facts]}"),
        )
        self._bars = Progress(*columns, console=self._console, disable=not self._live)
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, tuple[float, float]] = {}
        # Ray prints warnings of its own to stdout
        self._stdout = redirect_stdout(sys.stderr)

    def __enter__(self) -> Screen:
        self._stdout.__enter__()
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        self._stdout.__exit__(kind, error, trace)

    def show(self, event: Event) -> None:
        """One event; steps appear in the order of their first event."""
        facts = "  ".join(f"{name} {_figure(value)}" for name, value in event.facts.items())
        if not self._live:
            self._plain(event, facts)
            return
        if event.step not in self._tasks:
            self._tasks[event.step] = self._bars.add_task(event.step, total=event.total, unit=event.unit, facts="")
        self._bars.update(self._tasks[event.step], completed=event.done, total=event.total, facts=facts)

    def _plain(self, event: Event, facts: str) -> None:
        now, finished = time.monotonic(), event.done >= event.total
        said_at, said_done = self._said.get(event.step, (0.0, -1.0))
        if (now - said_at < _PLAIN_EVERY_S and not finished) or event.done == said_done:
            return
        self._said[event.step] = (now, event.done)
        print(f"{event.step}: {event.done:,.0f}/{event.total:,.0f} {event.unit}  {facts}".rstrip(), file=sys.stderr)


def _figure(value: float | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
