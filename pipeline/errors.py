"""The error tree. Every error says what, where (path, row id, version) and what to do next, and it pickles.

    ConjoinError
    +-- ConfigError          the run file, an option or a variable
    +-- SourceError          the catalog: missing files or columns, wrong types, ids
    |   +-- BadRecord        one value of one record; caught in decode.py and quarantined
    +-- StorageError         a file system or bucket; retryable where a repeat may help
    +-- EncoderError         an encoder folder, a fingerprint, a tower that does not fit
    +-- TableError           the Lance table and its versions
    |   +-- ConservationError   rows in and rows out differ; nothing was committed
    +-- GateError            a gate failed; nothing was published
    +-- QueryError           SQL that cannot be answered, with the place
    +-- TrainError           a training run that cannot go on
    +-- Interrupted          Ctrl-C or SIGTERM; the same command resumes

Assumes: workers raise and never return a status; retries look only at `.retryable`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conjoin.pipeline.gates import GateResult


class ConjoinError(Exception):
    """what: one sentence. where: path, row id or version. next: what to do now."""

    retryable = False

    def __init__(self, what: str, *, where: str = "", next: str = "") -> None:  # noqa: A002
        super().__init__(what)
        self.what, self.where, self.next = what, where, next

    def __str__(self) -> str:
        text = self.what if not self.where else f"{self.what} [{self.where}]"
        stop = "" if text.endswith(("?", ".")) else "."
        return text if not self.next else f"{text}{stop} {self.next}"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.next, self.retryable)


def _rebuild(kind: type[ConjoinError], what: str, where: str, next_step: str, retryable: bool) -> ConjoinError:
    error = kind(what, where=where, next=next_step)
    error.retryable = retryable
    return error


class ConfigError(ConjoinError):
    """The run file, an option or a variable is wrong."""


class SourceError(ConjoinError):
    """The catalog cannot be read as the run file describes it."""


class BadRecord(SourceError):
    """One value of one record is unusable; decode.py turns it into a quarantined row with this reason."""


class StorageError(ConjoinError):
    """A file system or bucket refused or failed."""


class EncoderError(ConjoinError):
    """An encoder folder is missing, torn, too new, or does not fit."""


class TableError(ConjoinError):
    """The Lance table, one of its versions or tags."""


class ConservationError(TableError):
    """Rows in and rows out differ; nothing was committed."""


class GateError(ConjoinError):
    """A gate failed; nothing was published. results: of all gates, those that passed too."""

    def __init__(self, what: str, *, where: str = "", next: str = "", results: tuple[GateResult, ...] = ()) -> None:  # noqa: A002
        super().__init__(what, where=where, next=next)
        self.results = results

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_gate, (self.what, self.where, self.next, self.results)


def _rebuild_gate(what: str, where: str, next_step: str, results: tuple[GateResult, ...]) -> GateError:
    return GateError(what, where=where, next=next_step, results=results)


class QueryError(ConjoinError):
    """The SQL cannot be answered."""


class TrainError(ConjoinError):
    """The training run cannot go on."""


class Interrupted(ConjoinError):
    """Ctrl-C or SIGTERM; the same command resumes."""
