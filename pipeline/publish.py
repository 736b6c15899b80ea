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

from conjoin.pipeline import commits, storage, store
from conjoin.pipeline.errors import TableError

if TYPE_CHECKING:
    import lance

PREVIOUS = "previous"
REJECTED = "rejected-"  # begins the tag of a version that failed its gates; the run follows
DETACHED = 1 << 63  # versions beside the head are numbered from here on


Action = Literal["publish", "rollback", "forced", "rejected"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One move of `live`, or a version that was rejected, as history keeps it.

    number: increasing over all moves, a rejection bears that of the move before it; at: UTC, ISO 8601.
    """

    number: int
    action: Action
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
            f"{other} took over from {lease.owner}",
            where=lease.uri,
            next="Nothing is lost, the other one goes on; `conjoin status` shows it. Run again if this one should win",
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
    run_id = next((e.run_id for e in _moves(uri) if e.version == version), "")
    return _move(uri, version, "rollback", run_id, take_lease(uri, f"rollback to {version}"))


def _rollback_target(uri: str, dataset: lance.LanceDataset, to: int | str | None) -> int:
    if to is None:
        tag = dataset.tags.list().get(PREVIOUS)
        if tag is None:
            raise TableError("nothing to roll back to: only one version was ever published", where=uri)
        return int(tag["version"])
    if isinstance(to, str) and not to.isdigit():
        found = next((entry for entry in _moves(uri) if entry.run_id == to), None)
        if found is None:
            raise TableError(f"no run {to!r} was ever published", where=uri, next="`conjoin history` lists the runs")
        return found.version
    version = int(to)
    if all(entry.version != version for entry in _moves(uri)):
        raise TableError(
            f"version {version} was never published", where=uri, next="`conjoin history` lists the versions that were"
        )
    return version


def history(uri: str) -> tuple[Entry, ...]:
    """Every move of `live` and every rejection, newest first; the newest move to what is live now is marked."""
    base = _history_directory(uri)
    raw = [storage.read_json(path) for path in storage.list_files(base) if path.endswith(".json")]
    entries = sorted((_entry(row) for row in raw), key=_order, reverse=True)
    dataset = store.head(uri) if entries else None
    live = store.live_version(dataset) if dataset is not None else None
    marked = next((entry for entry in entries if entry.version == live and entry.action != "rejected"), None)
    return tuple(_marked(entry) if entry is marked else entry for entry in entries)


def _order(entry: Entry) -> tuple[int, bool, str]:
    return entry.number, entry.action == "rejected", entry.at


def _moves(uri: str) -> list[Entry]:
    return [entry for entry in history(uri) if entry.action != "rejected"]


def _entry(raw: Mapping[str, object]) -> Entry:
    return Entry(**{key: value for key, value in raw.items() if key != "format"})  # type: ignore[arg-type]  # as written


def _marked(entry: Entry) -> Entry:
    return Entry(**{**asdict(entry), "live": True})


def _move(uri: str, version: int, action: Action, run_id: str, lease: Lease) -> Entry:
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
    _write_entry(uri, entry, f"{lease.number:08d}-{action}-{_plain(run_id) or version}")
    return _marked(entry)


def _write_entry(uri: str, entry: Entry, name: str) -> None:
    record = {key: value for key, value in asdict(entry).items() if key != "live"}
    storage.write_json(storage.join(_history_directory(uri), f"{name}.json"), record)


def _plain(run_id: str) -> str:
    """A run id as a part of a file's or a tag's name."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", run_id)


def reject(uri: str, version: int, run_id: str) -> Entry:
    """Tag a version that failed its gates `rejected-<run>`, beside the head or on it; repeating it changes nothing.

    A later rejection of the same run (its head after its candidate) moves the tag. Raises TableError if it is gone.
    """
    target = store.open_version(uri, version)
    tags, tag = target.tags.list(), REJECTED + _plain(run_id)
    if tag not in tags or int(tags[tag]["version"]) != version:
        _point(target, tag, version, tags)
    for entry in history(uri):
        if (entry.action, entry.run_id, entry.version) == ("rejected", run_id, version):
            return entry
    # No lease of its own: that would overtake whoever publishes.
    number = max(_numbers(_lease_directory(uri)), default=0)
    entry = Entry(number, "rejected", run_id, version, store.live_version(target), target.count_rows(), _now())
    _write_entry(uri, entry, f"{number:08d}-rejected-{_plain(run_id)}-{version}")
    return entry


def find_rejected(uri: str, target: str) -> Entry:
    """The newest rejection that still stands, by its run or version. Raises TableError naming those that do."""
    tags = store.open_version(uri, None).tags.list()
    kept = [
        entry
        for entry in history(uri)
        if entry.action == "rejected" and _version_of(tags, REJECTED + _plain(entry.run_id)) == entry.version
    ]
    found = next((entry for entry in kept if target in (entry.run_id, str(entry.version))), None)
    if found is not None:
        return found
    names = ", ".join(sorted({entry.run_id for entry in kept})) or "none"
    advice = f"Rejected runs are: {names}. A version that was live before comes back with `conjoin rollback --to`"
    raise TableError(f"no rejected run or version {target!r}", where=uri, next=advice)


def land(uri: str, rejected: Entry) -> int:
    """A rejected version as one on the head's line: itself, or its commit repeated there; returns that version.

    Raises TableError if live is not what it was built on any more, since the rows of the nights between would be lost.
    """
    if rejected.version < DETACHED:
        return rejected.version
    done = store.committed(uri, rejected.run_id)
    if done is not None:
        return done
    transaction = store.open_version(uri, rejected.version).read_transaction(rejected.version)
    store.restore(uri)
    head = store.open_version(uri, None)
    _check_base(uri, rejected, int(transaction.read_version), head)
    return commits.repeat(uri, transaction, head)


def _check_base(uri: str, rejected: Entry, base_version: int, head: lance.LanceDataset) -> None:
    """The fragments that a rejected commit was made of are those of the head, which is live's content now."""
    advice = "Raise the gate in the run file and run again"
    if any(name.endswith("__next") for name in store.open_version(uri, rejected.version).schema.names):
        raise TableError(
            f"run {rejected.run_id} was rejected before its new columns were ready", where=uri, next=advice
        )
    try:
        base = store.open_version(uri, base_version)
    except TableError:
        base = None
    if base is None or _fragments(base) != _fragments(head):
        what = f"live has moved on since run {rejected.run_id} was rejected"
        raise TableError(what, where=uri, next=advice)


def _fragments(dataset: lance.LanceDataset) -> list[object]:
    return [fragment.metadata.to_json() for fragment in dataset.get_fragments()]


def force(uri: str, version: int, run_id: str) -> Entry:
    """Point `live` at a version of the head's line that its gates rejected; history names it `forced`.

    The tag `rejected-<run>` goes. Raises TableError if the version is gone or another publisher took over.
    """
    entry = next((entry for entry in history(uri) if entry.live), None)
    if entry is None or (entry.action, entry.run_id, entry.version) != ("forced", run_id, version):
        entry = _move(uri, version, "forced", run_id, take_lease(uri, f"forcing {run_id}"))
    target = store.open_version(uri, None)
    if (tag := REJECTED + _plain(run_id)) in target.tags.list():
        target.tags.delete(tag)
    return entry


def _version_of(tags: Mapping[str, Mapping[str, object]], tag: str) -> int | None:
    return int(str(tags[tag]["version"])) if tag in tags else None


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
