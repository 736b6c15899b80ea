"""Which versions of a table stay: the head, tagged ones, those published lately, and what their history is read from.

Assumes: a version's run is found by walking down to its commit (store.lineage), so every version on that way stays
with it; no run is under way or unfinished while versions go.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conjoin.pipeline import store
from conjoin.pipeline.publish import DETACHED, REJECTED, history
from conjoin.pipeline.state import manifest_of_run

if TYPE_CHECKING:
    import lance

    from conjoin.pipeline.state import Manifest
    from conjoin.pipeline.upkeep import Upkeep

# Readers of the head, not of a tag, may still be at work on what was the head an hour ago.
GRACE_DAYS = 1.0


@dataclass(frozen=True, slots=True)
class Retention:
    """What stays and goes. kept: versions that stay, tagged ones beside the head too; tags: `rejected-*` to remove."""

    kept: frozenset[int]
    versions: tuple[int, ...]
    tags: tuple[str, ...]


def retention(uri: str, upkeep: Upkeep, now: dt.datetime) -> Retention:
    """Decide by the run file's section; reads tags, history and transactions, no row."""
    head = store.open_version(uri, None)
    tags, stamps = head.tags.list(), _stamps(head)
    old = tuple(sorted(name for name, tag in tags.items() if _is_old(name, tag, upkeep, now)))
    kept = {int(tag["version"]) for name, tag in tags.items() if name not in old} | {int(head.version)}
    kept |= _published(uri, upkeep, now) & stamps.keys()
    kept |= {version for version, stamp in stamps.items() if (now - stamp).total_seconds() < GRACE_DAYS * 86_400}
    line = Line(head)
    for version in tuple(kept):
        kept |= set(line.walk(version)[0]) & stamps.keys()
    return Retention(frozenset(kept), tuple(sorted(stamps.keys() - kept)), old)


def manifests_of(uri: str, versions: Iterable[int]) -> Iterator[Manifest]:
    """The manifests of the runs that these versions come from, each once."""
    line, seen = Line(store.open_version(uri, None)), set()
    for version in versions:
        facts = line.walk(version)[1]
        run_id = facts.get(store.RUN_ID)
        if run_id is not None and store.STATE in facts and run_id not in seen:
            seen.add(run_id)
            yield manifest_of_run(uri, run_id)


def _stamps(head: lance.LanceDataset) -> dict[int, dt.datetime]:
    """When each version of the head's line was made; Lance gives local time."""
    return {int(version["version"]): version["timestamp"].astimezone(dt.UTC) for version in head.versions()}


def _is_old(name: str, tag: Mapping[str, object], upkeep: Upkeep, now: dt.datetime) -> bool:
    made = tag["created_at"]
    assert isinstance(made, dt.datetime)
    return name.startswith(REJECTED) and (now - made).total_seconds() > upkeep.keep_rejected_days * 86_400


def _published(uri: str, upkeep: Upkeep, now: dt.datetime) -> set[int]:
    """Versions that were live: the newest, and those that were made live lately."""
    moves = [entry for entry in history(uri) if entry.action != "rejected"]
    newest = list(dict.fromkeys(entry.version for entry in moves))[: upkeep.keep_versions]
    late = dt.timedelta(days=upkeep.keep_days)
    return {*newest, *(entry.version for entry in moves if now - dt.datetime.fromisoformat(entry.at) <= late)}


class Line:
    """What versions were made of, each transaction read once however many versions lead over it."""

    def __init__(self, head: lance.LanceDataset) -> None:
        self._head = head
        self._known: dict[int, tuple[int, Mapping[str, str]]] = {}

    def walk(self, version: int) -> tuple[list[int], Mapping[str, str]]:
        """(versions from this one down to its run's commit, Restores and what they restored too; the commit's facts).

        The facts are empty where the walk ends without a run, as store.run_of's are.
        """
        met: list[int] = []
        facts: Mapping[str, str] = {}
        while version > 0 and not facts:
            met.append(version)
            version, facts = self._step(version)
        return met, facts

    def _step(self, version: int) -> tuple[int, Mapping[str, str]]:
        """(the version below, 0 at the end; the facts of a run's commit)."""
        if version not in self._known:
            self._known[version] = self._read(version)
        return self._known[version]

    def _read(self, version: int) -> tuple[int, Mapping[str, str]]:
        import lance

        below = 0 if version >= DETACHED else version - 1
        dataset = store.open_version(str(self._head.uri), version) if version >= DETACHED else self._head
        try:
            transaction = dataset.read_transaction(version)
        except TypeError:  # as in store.lineage: a compaction
            return below, {}
        except (OSError, ValueError):
            return 0, {}
        if transaction is None:
            return below, {}
        if isinstance(transaction.operation, lance.LanceOperation.Restore):
            return int(transaction.operation.version), {}
        facts = transaction.transaction_properties or {}
        return below, facts if store.RUN_ID in facts else {}
