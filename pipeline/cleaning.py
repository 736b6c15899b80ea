"""Cleaning: what a table's past leaves behind and nobody needs, counted first and deleted when told.

Assumes: `rubbish` reads only; `clean` deletes what it found and may be repeated. Nothing that `live`, `previous`, a
kept version or an unfinished run needs is ever among it. Lance deletes files that no version of the head's line names
after seven days by itself whenever versions go, so nothing of the table goes while a run is unfinished.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from conjoin.pipeline import runs, storage, store
from conjoin.pipeline.publish import DETACHED
from conjoin.pipeline.retention import GRACE_DAYS, manifests_of, retention

if TYPE_CHECKING:
    import lance

    from conjoin.pipeline.state import Manifest
    from conjoin.pipeline.storage import FileStat
    from conjoin.pipeline.upkeep import Upkeep

_DAY_S = 86_400.0
_OF_A_NIGHT = 500  # versions, or files of a kind, that go at the end of a night
_LEASES = 3  # the newest ones stay, so that numbers go on increasing
_PLAN_FILES = {"plan.json", "edits.json"}
_OURS = ("data/", "_deletions/", "_transactions/", "_indices/", "_versions/d")


@dataclass(frozen=True, slots=True)
class Item:
    """One kind of rubbish; size_bytes: what deleting it frees; deleted: whether it is gone."""

    kind: str
    count: int
    size_bytes: int
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Rubbish:
    """What may go. held: why nothing of the table itself may; quarantine: rows of runs that no kept version names."""

    uri: str
    tags: tuple[str, ...] = ()
    versions: tuple[int, ...] = ()
    version_bytes: int = 0
    orphans: tuple[FileStat, ...] = ()
    state: tuple[FileStat, ...] = ()
    plans: tuple[FileStat, ...] = ()
    leases: tuple[FileStat, ...] = ()
    quarantine_runs: tuple[str, ...] = ()
    quarantine_rows: int = 0
    held: str = ""

    def items(self, deleted: Collection[str] = ()) -> tuple[Item, ...]:
        """By kind, what there is anything of. deleted: kinds that are gone."""
        files = {
            "files that no version names": self.orphans,
            "state that no kept version names": self.state,
            "plans and units of nights that are over": self.plans,
            "old leases": self.leases,
        }
        found = [
            Item("tags of rejected versions", len(self.tags), 0),
            Item("old versions", len(self.versions), self.version_bytes),
            Item("quarantined rows of old nights", self.quarantine_rows, 0),
            *(Item(kind, len(stats), sum(stat.size_bytes for stat in stats)) for kind, stats in files.items()),
        ]
        return tuple(replace(item, deleted=item.kind in deleted) for item in found if item.count)


def rubbish(uri: str, upkeep: Upkeep, now: dt.datetime | None = None) -> Rubbish:
    """Find what may go, from listings, manifests and transactions. Raises TableError without a table."""
    now = now or dt.datetime.now(dt.UTC)
    late_s = (now - dt.datetime.now(dt.UTC)).total_seconds()
    unfinished = runs.unfinished(uri)
    decided = retention(uri, upkeep, now)
    manifests = list(manifests_of(uri, decided.kept))
    left = _quarantined(uri, {run for manifest in manifests for run in manifest.quarantine} | set(unfinished))
    found = Rubbish(
        uri,
        state=tuple(state_left(uri, manifests, unfinished, GRACE_DAYS * _DAY_S - late_s)),
        plans=tuple(_plans(uri, upkeep, unfinished, late_s)),
        leases=tuple(_leases(uri, late_s)),
        quarantine_runs=left[0],
        quarantine_rows=left[1],
    )
    if unfinished:
        return replace(found, held=f"run {unfinished[0]} is not over; `conjoin run` ends it")
    return replace(
        found,
        tags=decided.tags,
        versions=decided.versions,
        version_bytes=_version_bytes(uri, decided.versions),
        orphans=tuple(orphans(uri, decided.kept, upkeep.orphan_days * _DAY_S - late_s)),
    )


def clean(found: Rubbish, *, orphans: bool = True) -> tuple[Item, ...]:
    """Delete what was found; orphans: also files that no version names. Returns what is gone and what is left."""
    uri = found.uri
    with storage.explaining("clean the table", uri):
        head = store.open_version(uri, None)
        for tag in set(found.tags) & head.tags.list().keys():
            head.tags.delete(tag)
        if found.versions:
            head.cleanup_old_versions(versions=list(found.versions))
        if found.quarantine_runs:
            _clean_quarantine(uri, found.quarantine_runs)
    for stat in (*(found.orphans if orphans else ()), *found.state, *found.plans, *found.leases):
        storage.remove(stat.uri)
    kinds = {item.kind for item in found.items()} - ({"files that no version names"} if not orphans else set())
    return found.items(kinds)


def housekeep(uri: str, upkeep: Upkeep) -> tuple[Item, ...]:
    """A night's own share, when it is over: the oldest so many of each kind, but files that no version names are only
    counted. What is left is for the next nights, or for `conjoin clean`.
    """
    found = rubbish(uri, upkeep)
    versions = found.versions[:_OF_A_NIGHT]
    share = replace(
        found,
        versions=versions,
        version_bytes=found.version_bytes if versions == found.versions else _version_bytes(uri, versions),
        state=found.state[:_OF_A_NIGHT],
        plans=found.plans[:_OF_A_NIGHT],
        leases=found.leases[:_OF_A_NIGHT],
    )
    return clean(share, orphans=False)


def _version_bytes(uri: str, versions: Collection[int]) -> int:
    if not versions:
        return 0
    head = store.open_version(uri, None)
    found = head.explain_cleanup_old_versions(versions=list(versions), error_if_tagged_old_versions=False)
    return int(found.stats.bytes_removed)


def orphans(uri: str, kept: Collection[int], min_age_s: float) -> Iterator[FileStat]:
    """Files of the table that neither a version of the head's line nor a kept version beside it names."""
    head = store.open_version(uri, None)
    named = {path for batch in head.tracked_files() for path in batch.column("path").to_pylist()}
    for version in kept:
        if version >= DETACHED:
            named |= set(_files_of(store.open_version(uri, version)))
    for stat, age_s in storage.list_ages(uri):
        path = _below(uri, stat.uri)
        if path.startswith(_OURS) and path not in named and age_s > min_age_s:
            yield stat


def _below(uri: str, path: str) -> str:
    return path.removeprefix(uri if storage.is_s3(uri) else storage.absolute(uri)).lstrip("/")


def _files_of(dataset: lance.LanceDataset) -> Iterator[str]:
    """What a version beside the head consists of; Lance's own listing does not know it."""
    version = int(dataset.version)
    yield f"_versions/d{version}.manifest"
    transaction = dataset.read_transaction(version)
    if transaction is not None:
        yield f"_transactions/{transaction.read_version}-{transaction.uuid}.txn"
    for fragment in dataset.get_fragments():
        yield from (f"data/{file.path}" for file in fragment.data_files())
        if (deletions := fragment.deletion_file()) is not None:
            yield deletions


def state_left(
    uri: str, manifests: Iterable[Manifest], unfinished: Collection[str], min_age_s: float
) -> Iterator[FileStat]:
    """State files of runs that none of the manifests is of, but for those whose files one of them names."""
    base = storage.join(store.bookkeeping(uri), "state")
    runs_kept, named = set(unfinished), set()
    for manifest in manifests:
        runs_kept.add(manifest.run_id)
        named |= {entry.path for entry in manifest.files}
    for stat, age_s in storage.list_ages(base):
        path = _below(base, stat.uri)
        if age_s > min_age_s and path.split("/", 1)[0] not in runs_kept and f"state/{path}" not in named:
            yield stat


def _plans(uri: str, upkeep: Upkeep, unfinished: Collection[str], late_s: float) -> Iterator[FileStat]:
    """What runs that are over, or died before their plan was whole, left long enough ago."""
    over = set(runs.run_ids(uri)) - set(unfinished)
    for stat, age_s in plans_left(uri, unfinished):
        days = upkeep.keep_run_days if _run_of(uri, stat.uri) in over else upkeep.orphan_days
        if age_s + late_s > days * _DAY_S:
            yield stat


def _run_of(uri: str, path: str) -> str:
    return _below(storage.join(store.bookkeeping(uri), "runs"), path).partition("/")[0]


def plans_left(uri: str, unfinished: Collection[str]) -> Iterator[tuple[FileStat, float]]:
    """(file, its age in seconds) of runs that are not at work, beside their reports and pages."""
    base = storage.join(store.bookkeeping(uri), "runs")
    over = set(runs.run_ids(uri)) - set(unfinished)
    for stat, age_s in storage.list_ages(base):
        run, _, path = _below(base, stat.uri).partition("/")
        reported = run in over and "/" not in path and path not in _PLAN_FILES
        if run not in unfinished and not reported:
            yield stat, age_s


def _leases(uri: str, late_s: float) -> Iterator[FileStat]:
    found = storage.list_ages(storage.join(store.bookkeeping(uri), "lease"))
    for stat, age_s in found[:-_LEASES]:
        if age_s + late_s > GRACE_DAYS * _DAY_S:
            yield stat


def _quarantined(uri: str, kept: Collection[str]) -> tuple[tuple[str, ...], int]:
    """(runs that no kept version names, their rows)."""
    dataset = store.head(store.quarantine_uri(uri))
    if dataset is None:
        return (), 0
    there = set(dataset.to_table(columns=["run_id"])["run_id"].unique().to_pylist())
    gone = tuple(sorted(there - set(kept)))
    return gone, dataset.count_rows(_of_runs(gone)) if gone else 0


def _of_runs(run_ids: Iterable[str]) -> str:
    return "run_id IN (" + ", ".join("'" + run.replace("'", "''") + "'" for run in run_ids) + ")"


def _clean_quarantine(uri: str, run_ids: Iterable[str]) -> None:
    dataset = store.open_version(store.quarantine_uri(uri), None)
    dataset.delete(_of_runs(run_ids))
    dataset.optimize.compact_files(materialize_deletions_threshold=0.1)
    dataset.cleanup_old_versions(older_than=dt.timedelta(days=GRACE_DAYS))
