"""Erasure: an id leaves the live version, every older one that holds it, and all that conjoin wrote down about it.

Assumes: nobody else works on the table (a lease is held, no run is unfinished). The new version is complete and
published before anything older goes, so a killed erasure is the same command again. The source is its owner's: an id
that is still there comes back, hence the look at it first.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from conjoin.pipeline import cleaning, commits, compaction, edits, measures, runs, state, storage, store
from conjoin.pipeline.delta import exports_of
from conjoin.pipeline.errors import StorageError, TableError
from conjoin.pipeline.full_text import index_texts
from conjoin.pipeline.index import incomplete
from conjoin.pipeline.night import Night
from conjoin.pipeline.publish import DETACHED, PREVIOUS, REJECTED, check_lease, publish, take_lease
from conjoin.pipeline.quarantine import replace_rows, rows_of
from conjoin.pipeline.retention import manifests_of
from conjoin.pipeline.traces import Check, Tracer, in_parquet, in_source, keys_of, prove, without

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

    from conjoin.pipeline.publish import Lease
    from conjoin.pipeline.source import SourceConfig

_OURS = (store.LIVE, PREVIOUS)


@dataclass(frozen=True, slots=True)
class Erasure:
    """What was done. version: live since then; rows: erased from live; warnings: what conjoin cannot reach."""

    table: str
    ids: tuple[str, ...]
    version: int
    rows: int
    versions_dropped: tuple[int, ...]
    tags_removed: tuple[str, ...]
    files_removed: int
    files_redacted: int
    warnings: tuple[str, ...]
    proof: tuple[Check, ...]

    @property
    def proven(self) -> bool:
        return not any(check.found for check in self.proof)

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "proven": self.proven}


def forget(uri: str, ids: Sequence[str], source: SourceConfig | None = None, *, anyway: bool = False) -> Erasure:
    """Erase ids and prove it.

    source: of the run file, to see whether the ids are still there; anyway: erase them even so. Raises TableError
    where a run is unfinished, where somebody's tag keeps a version that holds an id, where the source still has one.
    """
    head = store.open_version(uri, None)
    tracer = Tracer(uri, keys_of(head, ids))
    _check_free(uri, tracer)
    warnings = _look_at_source(uri, tracer, source, anyway=anyway)
    lease = take_lease(uri, "forget")
    store.restore(uri)
    rows = _leave_live(uri, tracer, lease)
    check_lease(lease)
    versions, tags = _drop_versions(uri, tracer)
    removed, redacted = _clean_books(uri, tracer)
    _rewrite_quarantine(uri, tracer)
    return Erasure(
        table=uri,
        ids=tuple(ids),
        version=int(store.open_version(uri).version),
        rows=rows,
        versions_dropped=versions,
        tags_removed=tags,
        files_removed=removed,
        files_redacted=redacted,
        warnings=(*warnings, *_sent(uri, tracer)),
        proof=prove(tracer, _left(uri)),
    )


def _check_free(uri: str, tracer: Tracer) -> None:
    if unfinished := runs.unfinished(uri):
        raise TableError(f"run {unfinished[0]} is not over", where=uri, next="`conjoin run` ends it; then forget")
    for name, version in _tags(uri).items():
        ours = name in _OURS or name.startswith(REJECTED)
        if not ours and _holds(store.open_version(uri, version), tracer):
            advice = f"Remove the tag, or move it: lance.dataset(..).tags.delete({name!r})"
            raise TableError(f"the tag {name} keeps version {version}, which holds the id", where=uri, next=advice)


def _tags(uri: str) -> dict[str, int]:
    tags = store.open_version(uri, None).tags.list()
    return {str(name): int(tag["version"]) for name, tag in tags.items()}


def _holds(dataset: lance.LanceDataset, tracer: Tracer) -> bool:
    """In its rows, deleted ones too, or in the state it came from."""
    return bool(tracer.fragments(dataset)) or bool(tracer.state_files(_state_paths(dataset)))


def _state_paths(dataset: lance.LanceDataset) -> list[str]:
    try:
        manifest = state.read_manifest(dataset)
    except StorageError:  # a version whose state went before it
        return []
    books = store.bookkeeping(str(dataset.uri))
    paths = [entry.path for entry in manifest.files] if manifest else []
    return [path for path in paths if path and storage.exists(storage.join(books, path))]


def _look_at_source(uri: str, tracer: Tracer, source: SourceConfig | None, *, anyway: bool) -> list[str]:
    """Warnings. Raises TableError for an id that the next night would bring back."""
    there, unknown = in_source(uri, tracer, source)
    if there and not anyway:
        more = f" and {len(there) - 1} more files" if len(there) > 1 else ""
        advice = "Take it out there first and forget again; `--anyway` erases it now, and a night that reads the file"
        raise TableError(f"still in the source: {there[0]}{more}", where=uri, next=f"{advice} again brings it back")
    return [f"still in the source, a night that reads it again brings it back: {path}" for path in there] + [
        f"changed since the last night and not looked into, since no run file was given: {path}" for path in unknown
    ]


def _leave_live(uri: str, tracer: Tracer, lease: Lease) -> int:
    """A new version without the ids, published, where live holds them; returns the rows that went."""
    live = store.open_version(uri)
    manifest = state.read_manifest(live)
    held = manifest is not None and _in_quarantine(uri, manifest, tracer)
    if not _holds(live, tracer) and not held:
        return 0
    gone = _delete(uri, tracer)
    dirty = tracer.fragments(store.open_version(uri, None))
    if dirty:
        compaction.rewrite(uri, dirty)
    _reindex(uri)
    check_lease(lease)
    run_id = runs.next_run_id(uri, "forget", dt.datetime.now(dt.UTC).date())
    _stamp(uri, run_id, manifest, tracer)
    version = int(store.open_version(uri, None).version)
    publish(uri, version, run_id, lease)
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    runs.finish(uri, run_id, Night(run_id, "forgotten", uri, finished=now, version=version).to_json())
    return gone


def _in_quarantine(uri: str, manifest: state.Manifest, tracer: Tracer) -> bool:
    found = rows_of(uri, manifest)
    return found is not None and found.num_rows != _without(found, tracer).num_rows


def _without(rows: pa.Table, tracer: Tracer) -> pa.Table:
    """The rows of other ids; the quarantine's ids may be strings where the table's are numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    ids = rows["id"].cast(pa.string())
    return rows.filter(pc.invert(pc.is_in(ids, pa.array([str(key) for key in tracer.keys]))))


def _delete(uri: str, tracer: Tracer) -> int:
    """Mark the ids' rows of the head as deleted; returns how many."""
    import lance
    import numpy as np

    head = store.open_version(uri, None)
    found = head.scanner(columns=["id"], filter=tracer.where, with_row_address=True, use_scalar_index=False).to_table()
    addresses = np.sort(found["_rowaddr"].to_numpy().astype(np.uint64))
    if not len(addresses):
        return 0
    updated, removed = edits.merged({}, edits.delete(head, addresses))
    work = commits.Commit(
        "", head.schema, [], int(head.version), {}, commits.Edits(updated, removed, [], len(addresses))
    )
    transaction = lance.Transaction(read_version=int(head.version), operation=commits.operation_of(work))
    with storage.explaining("commit", uri):
        lance.LanceDataset.commit(uri, transaction, storage_options=storage.lance_options(uri))
    return len(addresses)


def _reindex(uri: str) -> None:
    """Scalar and full-text indexes, which hold ids and words, are built anew; vector indexes follow rewritten rows."""
    head = store.open_version(uri, None)
    found = [index for index in head.describe_indices() if "Vector" not in index.type_url]
    texts = [str(index.field_names[0]) for index in found if index.index_type.upper() in ("INVERTED", "FTS")]
    for index in found:
        store.open_version(uri, None).drop_index(index.name)
    for index in found:
        if index.field_names[0] not in texts:
            kind = index.index_type.upper()
            store.open_version(uri, None).create_scalar_index(index.field_names[0], kind, name=index.name)
    index_texts(uri, texts)
    if missing := incomplete(store.open_version(uri, None)):
        raise TableError(f"rows are missing in the indexes {', '.join(missing)}", where=uri, next="Forget again")


def _stamp(uri: str, run_id: str, manifest: state.Manifest | None, tracer: Tracer) -> None:
    """An empty commit that bears a run of its own: its state and quarantine are the live ones without the ids."""
    head = store.open_version(uri, None)
    if manifest is None:
        return
    files = tuple(_state_without(uri, run_id, number, entry, tracer) for number, entry in enumerate(manifest.files))
    state.write_manifest(
        uri, replace(manifest, run_id=run_id, rows=head.count_rows(), files=files, quarantine=(run_id,))
    )
    bad = rows_of(uri, manifest)
    if bad is not None:
        kept = _without(bad, tracer)
        position = kept.schema.get_field_index("run_id")
        import pyarrow as pa

        replace_rows(uri, run_id, kept.set_column(position, "run_id", pa.array([run_id] * len(kept), pa.string())))
    facts = {**store.run_of(store.open_version(uri)), store.STATE: state.manifest_path(run_id)}
    facts.pop(store.RUN_ID, None)
    commits.commit(uri, commits.Commit(run_id, head.schema, [], int(head.version), facts, commits.Edits()))


def _state_without(uri: str, run_id: str, number: int, entry: state.FileState, tracer: Tracer) -> state.FileState:
    if not tracer.state_files([entry.path]):
        return entry
    path = f"state/{run_id}/{number:05d}.parquet"
    kept = _without(state.state_file(uri, entry), tracer)
    storage.write_bytes(storage.join(store.bookkeeping(uri), path), state.parquet_bytes(kept))
    return state.FileState(entry.file, path)


def _drop_versions(uri: str, tracer: Tracer) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Versions that hold an id, and tags on them; then every file that nothing names any more."""
    head = store.open_version(uri, None)
    numbers = [int(version["version"]) for version in head.versions()]
    dirty = {number for number in numbers if _holds(store.open_version(uri, number), tracer)}
    beside = {number for number in _tags(uri).values() if number >= DETACHED}
    dirty |= {number for number in beside if _holds(store.open_version(uri, number), tracer)}
    tags = tuple(sorted(name for name, version in _tags(uri).items() if version in dirty))
    with storage.explaining("drop old versions", uri):
        for name in tags:
            head.tags.delete(name)
        old = sorted(dirty - beside)
        if old:
            head.cleanup_old_versions(versions=old)
        for stat in list(cleaning.orphans(uri, set(_tags(uri).values()), -1.0)):
            storage.remove(stat.uri)
    return tuple(sorted(dirty)), tags


def _left(uri: str) -> Iterator[lance.LanceDataset]:
    """Every version there is, of the quarantine too."""
    for table in (uri, store.quarantine_uri(uri)):
        dataset = store.head(table)
        if dataset is not None:
            tagged = {int(tag["version"]) for tag in dataset.tags.list().values()}
            for number in sorted(tagged | {int(version["version"]) for version in dataset.versions()}):
                yield store.open_version(table, number)


def _clean_books(uri: str, tracer: Tracer) -> tuple[int, int]:
    """(files removed, files redacted): state nobody names, measures, plans and units; words in what else there is."""
    kept = [int(dataset.version) for dataset in _left(uri) if str(dataset.uri) == uri or _same(dataset, uri)]
    gone = list(cleaning.state_left(uri, manifests_of(uri, kept), (), -1.0))
    gone += [stat for stat, _ in cleaning.plans_left(uri, ())]
    for stat in gone:
        storage.remove(stat.uri)
    removed, redacted = len(gone) + measures.drop(uri), 0
    books = store.bookkeeping(uri)
    for path in storage.list_files(books):
        data = storage.read_bytes(path)
        if path.endswith((".json", ".jsonl")):
            kept_data = without(data, tracer.keys)
            if kept_data != data:
                storage.write_bytes(path, kept_data)
                redacted += 1
        elif not path.endswith(".parquet"):
            if without(data, tracer.keys) != data:  # a page, which is made again from its report
                storage.remove(path)
                removed += 1
        elif "/state/" not in path and in_parquet(data, tracer.keys):
            storage.remove(path)
            removed += 1
    return removed, redacted


def _same(dataset: lance.LanceDataset, uri: str) -> bool:
    return store.bookkeeping(str(dataset.uri)) == store.bookkeeping(storage.absolute(uri))


def _rewrite_quarantine(uri: str, tracer: Tracer) -> None:
    """The quarantine in one new version without the ids, and no other."""
    import lance

    target = store.quarantine_uri(uri)
    dataset = store.head(target)
    if dataset is None:
        return
    with storage.explaining("rewrite the quarantine", target):
        rows = _without(dataset.to_table(), tracer)
        lance.write_dataset(
            rows,
            target,
            mode="overwrite",
            data_storage_version=store.STORAGE_VERSION,
            storage_options=storage.lance_options(target),
        )
        fresh = store.open_version(target, None)
        fresh.cleanup_old_versions(older_than=dt.timedelta(0), delete_unverified=True)


def _sent(uri: str, tracer: Tracer) -> Iterator[str]:
    """Exports that hold an id."""
    for folder in exports_of(uri):
        parts = [path for path in storage.list_files(folder) if path.endswith(".parquet")]
        if any(in_parquet(storage.read_bytes(path), tracer.keys) for path in parts):
            yield f"an export holds it, and so may whoever read it: {folder}"
