"""Fragments staged on workers, one commit on the driver, the same commit beside the head for gates.

Assumes: nothing is visible before a commit. A commit is not idempotent in Lance: a run id is looked for before one is
made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from conjoin.encoders.spec import Json
from conjoin.pipeline import storage, store
from conjoin.pipeline.errors import ConservationError, TableError

if TYPE_CHECKING:
    import lance
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Edits:
    """What happens to fragments that exist. updated: as they will be, Lance's JSON; removed: of which nothing is left.

    fields: ids of rewritten fields; deleted: rows that go.
    """

    updated: Sequence[Json] = ()
    removed: Sequence[int] = ()
    fields: Sequence[int] = ()
    deleted: int = 0


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit of one run. read_version: the head when the run was planned, 0 without a table.

    Without `edits` the fragments become the whole table; with them they join the rows that are there.
    """

    run_id: str
    schema: pa.Schema
    fragments: Sequence[Json]
    read_version: int
    properties: Mapping[str, str]
    edits: Edits | None = None


Mode = Literal["create", "overwrite", "append"]


def stage(uri: str, table: pa.Table, *, mode: Mode) -> Json:
    """Write `table` as one uncommitted fragment and return Lance's JSON of it; nothing becomes visible.

    mode: `create` where no table exists yet, `append` to its columns (some may be left out), `overwrite` for columns of
    its own. Raises ConservationError if Lance wrote other rows than it got.
    """
    from lance.fragment import write_fragments

    # A table, never a reader: a retried write of a consumed reader loses rows (lance-ray#5290).
    try:
        fragments = write_fragments(
            table,
            uri,
            schema=table.schema,
            mode=mode,
            max_rows_per_file=max(table.num_rows, 1),
            data_storage_version=store.STORAGE_VERSION,
            storage_options=storage.lance_options(uri),
        )
    except OSError as error:
        raise store.storage_error(error, "stage a fragment", uri) from error
    if len(fragments) != 1 or fragments[0].physical_rows != table.num_rows:
        written = [fragment.physical_rows for fragment in fragments]
        raise ConservationError(f"{table.num_rows} rows staged, Lance wrote {written}", where=uri)
    return cast(Json, fragments[0].to_json())


def commit(uri: str, work: Commit) -> int:
    """Make the staged work part of the table, in one commit; returns its version. Repeating it changes nothing.

    Raises TableError if another run committed since `work.read_version`, ConservationError if rows are missing after.
    """
    done = store.committed(uri, work.run_id)
    if done is not None:
        return done
    _check_alone(uri, work)
    expected = _expected_rows(uri, work)
    dataset = _commit(uri, work, detached=False)
    _check_rows(dataset, expected, uri)
    return int(dataset.version)


def candidate(uri: str, work: Commit) -> lance.LanceDataset | None:
    """The same commit beside the head, readable and searchable for gates; None for a first version (Lance cannot)."""
    if store.head(uri) is None:
        return None
    expected = _expected_rows(uri, work)
    dataset = _commit(uri, work, detached=True)
    _check_rows(dataset, expected, uri)
    return dataset


def _expected_rows(uri: str, work: Commit) -> int:
    new = sum(_rows(fragment) for fragment in work.fragments)
    return new if work.edits is None else store.open_version(uri, None).count_rows() - work.edits.deleted + new


def _check_rows(dataset: lance.LanceDataset, expected: int, uri: str) -> None:
    found = dataset.count_rows()
    if found != expected:
        raise ConservationError(f"{expected} rows committed, {found} found", where=f"{uri} version {dataset.version}")


def _rows(fragment: Json) -> int:
    assert isinstance(fragment, dict)
    return int(cast(int, fragment["physical_rows"]))


def _check_alone(uri: str, work: Commit) -> None:
    """Index and clean-up versions above the planned one are fine; another run's are not."""
    dataset = store.head(uri)
    if dataset is None:
        return
    if work.read_version == 0:
        raise TableError(f"a table appeared while run {work.run_id} worked; nothing was committed", where=uri)
    for version, facts in store.lineage(dataset):
        if version <= work.read_version:
            return
        if store.RUN_ID in facts:
            raise TableError(
                f"run {facts[store.RUN_ID]} committed version {version} while this one worked; nothing was committed",
                where=f"{uri} run {work.run_id}",
                next="Run the same command again",
            )


def _commit(uri: str, work: Commit, *, detached: bool) -> lance.LanceDataset:
    import lance

    # Columns may have been added since the plan: an edit reads the head, which _check_alone vouches for.
    read_version = work.read_version if work.edits is None else int(store.open_version(uri, None).version)
    transaction = lance.Transaction(
        read_version=read_version,
        operation=operation_of(work),
        transaction_properties={**work.properties, store.RUN_ID: work.run_id},
    )
    try:
        return lance.LanceDataset.commit(
            uri,
            transaction,
            detached=detached,
            enable_stable_row_ids=False,
            storage_options=storage.lance_options(uri),
        )
    except OSError as error:
        raise store.storage_error(error, "commit", uri) from error


def operation_of(work: Commit) -> lance.LanceOperation.BaseOperation:
    import lance
    from lance.fragment import FragmentMetadata

    def parsed(fragments: Sequence[Json]) -> list[FragmentMetadata]:
        return [FragmentMetadata.from_json(json.dumps(fragment)) for fragment in fragments]

    if work.edits is None:
        return lance.LanceOperation.Overwrite(work.schema, parsed(work.fragments))
    return lance.LanceOperation.Update(
        removed_fragment_ids=list(work.edits.removed),
        updated_fragments=parsed(work.edits.updated),
        new_fragments=parsed(work.fragments),
        fields_modified=list(work.edits.fields),
        update_mode="rewrite_columns" if work.edits.fields else "rewrite_rows",
    )


def repeat(uri: str, transaction: lance.Transaction, dataset: lance.LanceDataset) -> int:
    """Commit on the head what was committed beside it, its properties too; `dataset` is the head it goes on."""
    import lance

    work = lance.Transaction(
        read_version=int(dataset.version),
        operation=transaction.operation,
        transaction_properties=transaction.transaction_properties,
    )
    try:
        return int(lance.LanceDataset.commit(uri, work, storage_options=storage.lance_options(uri)).version)
    except OSError as error:
        raise store.storage_error(error, "commit", uri) from error
