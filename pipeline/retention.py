"""Which versions of a table stay: the head, tagged ones, those published lately, and what their history is read from.

Assumes: a version's run is found by walking down to its commit (store.lineage), so every version on that way stays
with it; no run is under way or unfinished while versions go.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from conjoin.pipeline import store
from conjoin.pipeline.publish import DETACHED, REJECTED, history

if TYPE_CHECKING:
    import lance

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
    for version in tuple(kept):
        kept |= set(made_of(store.open_version(uri, version))) & stamps.keys()
    return Retention(frozenset(kept), tuple(sorted(stamps.keys() - kept)), old)


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


def made_of(dataset: lance.LanceDataset) -> Iterator[int]:
    """The versions from this one down to the commit of its run, restored ones and the Restores themselves included."""
    import lance

    version = int(dataset.version)
    while version > 0:
        yield version
        try:
            transaction = dataset.read_transaction(version)
        except TypeError:  # as in store.lineage: a compaction
            transaction = None
        except (OSError, ValueError):
            return
        if transaction is not None and isinstance(transaction.operation, lance.LanceOperation.Restore):
            version = int(transaction.operation.version)
            continue
        if version >= DETACHED or (transaction and store.RUN_ID in (transaction.transaction_properties or {})):
            return
        version -= 1
