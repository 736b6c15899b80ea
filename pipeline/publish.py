"""One tag move; rollback; history.

Assumes: readers use the tag `live`; nothing is visible to them before it moves. Lance tags have no compare-and-set, so
two publishers are kept apart by numbered leases that are read again just before and just after a move; the moment
between the last look and the move itself stays open, and the one who was overtaken there finds out and says so.
"""

from __future__ import annotations

import datetime as dt
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from conjoin.pipeline import storage, store
from conjoin.pipeline.errors import TableError

if TYPE_CHECKING:
    import lance

PREVIOUS = "previous"


@dataclass(frozen=True, slots=True)
class Entry:
    """One move of `live`, as history keeps it. number: increasing over all moves; at: UTC, ISO 8601."""

    number: int
    action: Literal["publish", "rollback"]
    run_id: str
    version: int
    before: int | None
    num_rows: int
    at: str
    live: bool = False


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to move tags until somebody takes a higher number."""

    uri: str
    number: int
    owner: str


def take_lease(uri: str, owner: str) -> Lease:
    """The next number, higher than everybody's; whoever held a lower one is overtaken from now on."""
    while True:
        number = max(_numbers(_lease_directory(uri)), default=0) + 1
        unique = uuid.uuid4().hex  # a repeated PUT must recognise its own
        text = json.dumps({"format": storage.FORMAT, "owner": owner, "at": _now(), "unique": unique}).encode()
        if storage.create_bytes(storage.join(_lease_directory(uri), f"{number:08d}.json"), text):
            return Lease(uri, number, owner)


def check_lease(lease: Lease) -> None:
    """Raises TableError if another publisher took over."""
    newest = max(_numbers(_lease_directory(lease.uri)), default=0)
    if newest > lease.number:
        path = storage.join(_lease_directory(lease.uri), f"{newest:08d}.json")
        other = storage.read_json(path)["owner"]
        raise TableError(
            f"run {other} took over while run {lease.owner} was publishing",
            where=lease.uri,
            next="Look at `conjoin history`; run again if this run should win",
        )


def publish(uri: str, version: int, run_id: str, lease: Lease | None = None) -> Entry:
    """Point `live` at a version and `previous` at the one before. A run id publishes once; repeats change nothing.

    Raises TableError if the version is gone or another publisher took over.
    """
    known = next((entry for entry in history(uri) if (entry.action, entry.run_id) == ("publish", run_id)), None)
    if known is not None:
        return known
    return _move(uri, version, "publish", run_id, lease or take_lease(uri, run_id))


def rollback(uri: str, to: int | str | None = None) -> Entry:
    """Point `live` back at `previous`, at a version that was live before, or at what a run published.

    A second rollback without `to` undoes the first. Raises TableError if there is nothing to go back to.
    """
    dataset = store.open_version(uri, None)
    version = _rollback_target(uri, dataset, to)
    run_id = next((e.run_id for e in history(uri) if e.version == version), "")
    return _move(uri, version, "rollback", run_id, take_lease(uri, f"rollback to {version}"))


def _rollback_target(uri: str, dataset: lance.LanceDataset, to: int | str | None) -> int:
    if to is None:
        tag = dataset.tags.list().get(PREVIOUS)
        if tag is None:
            raise TableError("nothing to roll back to: only one version was ever published", where=uri)
        return int(tag["version"])
    if isinstance(to, str) and not to.isdigit():
        found = next((entry for entry in history(uri) if entry.run_id == to), None)
        if found is None:
            raise TableError(f"no run {to!r} was ever published", where=uri, next="`conjoin history` lists the runs")
        return found.version
    version = int(to)
    if all(entry.version != version for entry in history(uri)):
        raise TableError(
            f"version {version} was never published", where=uri, next="`conjoin history` lists the versions that were"
        )
    return version


def history(uri: str) -> tuple[Entry, ...]:
    """Every move of `live`, newest first; the newest one of the version that is live now is marked."""
    base = _history_directory(uri)
    raw = [storage.read_json(path) for path in storage.list_files(base) if path.endswith(".json")]
    entries = sorted((_entry(row) for row in raw), key=lambda entry: -entry.number)
    dataset = store.head(uri) if entries else None
    live = store.live_version(dataset) if dataset is not None else None
    marked = next((entry.number for entry in entries if entry.version == live), None)
    return tuple(_marked(entry) if entry.number == marked else entry for entry in entries)


def _entry(raw: Mapping[str, object]) -> Entry:
    return Entry(**{key: value for key, value in raw.items() if key != "format"})  # type: ignore[arg-type]  # as written


def _marked(entry: Entry) -> Entry:
    return Entry(**{**asdict(entry), "live": True})


def _move(uri: str, version: int, action: Literal["publish", "rollback"], run_id: str, lease: Lease) -> Entry:
    target = store.open_version(uri, version)
    tags = target.tags.list()
    live = int(tags[store.LIVE]["version"]) if store.LIVE in tags else None
    check_lease(lease)
    if live is not None and live != version:  # equal: the run died between its tags and its record
        _point(target, PREVIOUS, live, tags)
    if live != version:
        _point(target, store.LIVE, version, tags)
    check_lease(lease)
    before = _before(target, version)
    entry = Entry(lease.number, action, run_id, version, before, target.count_rows(), _now())
    record = {key: value for key, value in asdict(entry).items() if key != "live"}
    name = f"{lease.number:08d}-{action}-{re.sub(r'[^A-Za-z0-9._-]', '_', run_id) or version}.json"
    storage.write_json(storage.join(_history_directory(uri), name), record)
    return _marked(entry)


def _before(dataset: lance.LanceDataset, version: int) -> int | None:
    tag = dataset.tags.list().get(PREVIOUS)
    return None if tag is None or tag["version"] == version else int(tag["version"])


def _point(dataset: lance.LanceDataset, tag: str, version: int, tags: Mapping[str, object]) -> None:
    """Move or make a tag. There is no compare-and-set: the last writer wins, hence the lease around it."""
    if tag in tags:
        dataset.tags.update(tag, version)
    else:
        dataset.tags.create(tag, version)


def _lease_directory(uri: str) -> str:
    return storage.join(store.bookkeeping(uri), "lease")


def _history_directory(uri: str) -> str:
    return storage.join(store.bookkeeping(uri), "history")


def _numbers(directory: str) -> Sequence[int]:
    names = [path.rsplit("/", 1)[1] for path in storage.list_files(directory)]
    return [int(name.removesuffix(".json")) for name in names if re.fullmatch(r"\d+\.json", name)]


def _now() -> str:
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
