"""The Lance table: stage fragments on workers, commit once on the driver, open a version or tag.

Assumes: only this module (and index.py, publish.py, quarantine.py for their own parts) speaks to Lance; a commit is
not idempotent, so a run id is looked for before one is made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from pydantic import Field

from conjoin.encoders.spec import Json
from conjoin.pipeline import storage
from conjoin.pipeline.errors import ConjoinError, ConservationError, TableError
from conjoin.pipeline.section import Section

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

LIVE = "live"
NEXT = "__next"  # the end of a new encoder's column until it takes the old one's name
STORAGE_VERSION = "2.2"  # explicit, so that every fragment of a table is read by the same rules
HASH_BYTES = 16
PREFIX = "conjoin:"
RUN_ID, FINGERPRINT, PLAN, STATE = "run_id", "fingerprint", "plan_digest", "state_manifest"


# Names that Lance or LanceDB give to columns of their own.
_RESERVED = {"_rowid", "_rowaddr", "_rowoffset", "_distance", "_score", "_relevance_score"}


class TableConfig(Section):
    """Where the vectors go; `<directory or bucket>/<name>.lance` is a plain Lance dataset."""

    path: str = Field(description="<directory or bucket>/<name>.lance")
    vector_dtype: Literal["auto", "float32", "float16"] = Field("auto", description="decided when the table is created")
    thumbnail_px: Literal["auto"] | int = Field("auto", description="auto: 96 where the source holds bytes; 0: none")
    ann_recall: float = Field(0.99, gt=0, le=1, description="recall@10 that an approximate index must reach")
    full_text: tuple[str, ...] = Field((), description="columns that bm25() and hybrid() search: text, or kept ones")


@dataclass(frozen=True, slots=True)
class VectorColumn:
    """A vector column and the encoder it came from; `encoder` is the folder's URI when the table was filled."""

    name: str
    modality: str
    fingerprint: str
    dim: int
    metric: str
    encoder: str


@dataclass(frozen=True, slots=True)
class Layout:
    """What decides the table's schema.

    kept: the source's fields that are copied, in plain types; uris: the modalities that the source gives as URIs.
    """

    id_type: pa.DataType
    kept: pa.Schema
    modalities: tuple[str, ...]
    uris: tuple[str, ...]
    thumbnails: bool
    vector_type: pa.DataType
    fingerprint: str
    encoder: str


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


def bookkeeping(uri: str) -> str:
    """`<dir>/<name>.conjoin`: plans, records, state, index reports and history of the table at `uri`."""
    return f"{_stem(uri)}.conjoin"


def quarantine_uri(uri: str) -> str:
    return f"{_stem(uri)}__quarantine.lance"


def canary_uri(uri: str) -> str:
    """The scratch table of `conjoin run --limit`."""
    return f"{_stem(uri)}__canary.lance"


def _stem(uri: str) -> str:
    return uri.rstrip("/").removesuffix(".lance")


def table_schema(layout: Layout) -> pa.Schema:
    """The table's schema (DESIGN, The table). Raises TableError if a kept column bears one of the table's own names."""
    import pyarrow as pa

    own = [pa.field("text", pa.string())] if "text" in layout.modalities else []
    own += [pa.field(f"{name}_uri", pa.string()) for name in layout.uris]
    own += [pa.field("image_thumb", pa.binary())] if layout.thumbnails else []
    own += [pa.field(f"{name}_hash", pa.binary(HASH_BYTES)) for name in layout.modalities]
    own += [
        pa.field(f"{name}_vec", layout.vector_type, metadata=_vector_metadata(layout, name))
        for name in layout.modalities
    ]
    _check_names(layout.kept.names, {"id", *(field.name for field in own)})
    return pa.schema(
        [pa.field("id", layout.id_type, nullable=False), *(field.remove_metadata() for field in layout.kept), *own]
    )


def _check_names(kept: Sequence[str], own: set[str]) -> None:
    """Kept columns that Lance takes, and that SQL, which knows no capitals, tells from each other and from ours."""
    advice = "Leave it out of keep, or rename it"
    seen = {name.lower(): "the table has a column {!r} of its own" for name in own | _RESERVED}
    for name in kept:
        if not name or "." in name:
            raise TableError(f"keep: a column of a table cannot be named {name!r}", next=advice)
        if why := seen.get(name.lower()):
            raise TableError(f"keep: {why.format(name)}", next=advice)
        seen[name.lower()] = "{!r} is there twice, but for capitals"


def _vector_metadata(layout: Layout, modality: str) -> dict[str, str]:
    facts = {
        "fingerprint": layout.fingerprint,
        "modality": modality,
        "metric": "cosine",
        "dim": str(layout.vector_type.list_size),
        "encoder": layout.encoder,
    }
    return {PREFIX + name: value for name, value in facts.items()}


def vector_columns(dataset: lance.LanceDataset) -> dict[str, VectorColumn]:
    """The vector columns of a table by name, from the metadata of their fields; empty for a table of somebody else."""
    return columns_of_schema(dataset.schema)


def columns_of_schema(schema: pa.Schema) -> dict[str, VectorColumn]:
    found = {}
    for field in schema:
        raw = {key.decode().removeprefix(PREFIX): value.decode() for key, value in (field.metadata or {}).items()}
        if "fingerprint" in raw:
            found[field.name] = VectorColumn(
                field.name, raw["modality"], raw["fingerprint"], int(raw["dim"]), raw["metric"], raw["encoder"]
            )
    return found


def open_version(uri: str, version: str | int | None = LIVE) -> lance.LanceDataset:
    """A table at a tag, a version number, or None for the newest. Raises TableError saying which part is missing."""
    dataset = head(uri)
    if dataset is None:
        raise TableError("no table", where=uri, next="`conjoin run` makes it")
    if version is None:
        return dataset
    try:
        return _dataset(uri, version)
    except ValueError:
        advice = "`conjoin run` publishes one" if version == LIVE else "`conjoin history` lists the versions"
        raise TableError(f"the table has no version {version!r}", where=uri, next=advice) from None


def head(uri: str) -> lance.LanceDataset | None:
    """The newest version, None without a table."""
    try:
        return _dataset(uri, None)
    except ValueError as error:
        if "was not found" in str(error):
            return None
        raise _storage_error(error, "open the table", uri) from error


def _dataset(uri: str, version: str | int | None) -> lance.LanceDataset:
    import lance

    try:
        return lance.dataset(uri, version=version, storage_options=storage.lance_options(uri))
    except OSError as error:
        raise _storage_error(error, "open the table", uri) from error


def _storage_error(error: OSError | ValueError, verb: str, uri: str) -> ConjoinError:
    """Lance reports S3's answers as ValueError too; what is no trouble of storage is the table's own."""
    explained = storage.explain(error, verb, uri)
    return explained or TableError(f"cannot {verb}: {storage.first_line(error)}", where=uri)


def live_version(dataset: lance.LanceDataset) -> int | None:
    tag = dataset.tags.list().get(LIVE)
    return None if tag is None else int(tag["version"])


def lineage(dataset: lance.LanceDataset) -> Iterator[tuple[int, Mapping[str, str]]]:
    """(version, commit properties) of what made `dataset`, newest first; a Restore leads on to what it restored.

    Versions undone by a Restore are not met; the walk ends where old versions were cleaned up.
    """
    import lance

    version = int(dataset.version)
    while version > 0:
        try:
            transaction = dataset.read_transaction(version)
        except TypeError:  # pylance 14 cannot describe a compaction that remapped an index; that is no run's commit
            transaction = None
        except (OSError, ValueError):
            return
        if transaction is not None and isinstance(transaction.operation, lance.LanceOperation.Restore):
            version = int(transaction.operation.version)
            continue
        yield version, (transaction.transaction_properties or {}) if transaction else {}
        version -= 1


def restore(uri: str) -> int | None:
    """Make the head the live version's content again (a rejected night, a rollback, a stranger's rows).

    Returns the new head's version; None if there was nothing to do. Raises TableError if somebody else committed
    meanwhile, and what they committed is the head again then.
    """
    head_, live = open_version(uri, None), open_version(uri)
    newest = next((version for version, _ in lineage(head_)), None)
    if newest == int(live.version):
        return None
    with storage.explaining("restore the live version", uri):
        live.restore()
    restored = int(live.version)
    if restored == int(head_.version) + 1:
        return restored
    # Lance lets a Restore win over whatever came between the look and the commit, even with max_retries=0.
    with storage.explaining("give the head back", uri):
        open_version(uri, restored - 1).restore()
    raise TableError(
        f"somebody committed version {restored - 1} while live was restored; that is the head again",
        where=uri,
        next="Nothing is lost; see that one night at a time runs, and run the same command again",
    )


def run_of(dataset: lance.LanceDataset) -> Mapping[str, str]:
    """Commit properties (run_id, fingerprint, plan_digest, state_manifest) of the run that filled this version.

    Empty if no run of ours did.
    """
    return next((facts for _, facts in lineage(dataset) if RUN_ID in facts), {})


def committed(uri: str, run_id: str) -> int | None:
    """The version that a run committed, if it belongs to the head and is not older than the live run."""
    dataset = head(uri)
    if dataset is None:
        return None
    live = live_version(dataset) or 0
    for version, facts in lineage(dataset):
        if facts.get(RUN_ID) == run_id:
            return version
        if version <= live and RUN_ID in facts:
            return None
    return None


def check_ours(uri: str) -> lance.LanceDataset | None:
    """The head of a table that conjoin made, None without one. Raises TableError for somebody else's table."""
    dataset = head(uri)
    if dataset is not None and not vector_columns(dataset):
        raise TableError(
            "this table was not made by conjoin: no column bears an encoder's fingerprint; nothing was changed",
            where=uri,
            next="Give table.path another name",
        )
    return dataset


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
            data_storage_version=STORAGE_VERSION,
            storage_options=storage.lance_options(uri),
        )
    except OSError as error:
        raise _storage_error(error, "stage a fragment", uri) from error
    if len(fragments) != 1 or fragments[0].physical_rows != table.num_rows:
        written = [fragment.physical_rows for fragment in fragments]
        raise ConservationError(f"{table.num_rows} rows staged, Lance wrote {written}", where=uri)
    return cast(Json, fragments[0].to_json())


def commit(uri: str, work: Commit) -> int:
    """Make the staged work part of the table, in one commit; returns its version. Repeating it changes nothing.

    Raises TableError if another run committed since `work.read_version`, ConservationError if rows are missing after.
    """
    done = committed(uri, work.run_id)
    if done is not None:
        return done
    _check_alone(uri, work)
    expected = _expected_rows(uri, work)
    dataset = _commit(uri, work, detached=False)
    _check_rows(dataset, expected, uri)
    return int(dataset.version)


def candidate(uri: str, work: Commit) -> lance.LanceDataset | None:
    """The same commit beside the head, readable and searchable for gates; None for a first version (Lance cannot)."""
    if head(uri) is None:
        return None
    expected = _expected_rows(uri, work)
    dataset = _commit(uri, work, detached=True)
    _check_rows(dataset, expected, uri)
    return dataset


def _expected_rows(uri: str, work: Commit) -> int:
    new = sum(_rows(fragment) for fragment in work.fragments)
    return new if work.edits is None else open_version(uri, None).count_rows() - work.edits.deleted + new


def _check_rows(dataset: lance.LanceDataset, expected: int, uri: str) -> None:
    found = dataset.count_rows()
    if found != expected:
        raise ConservationError(f"{expected} rows committed, {found} found", where=f"{uri} version {dataset.version}")


def _rows(fragment: Json) -> int:
    assert isinstance(fragment, dict)
    return int(cast(int, fragment["physical_rows"]))


def _check_alone(uri: str, work: Commit) -> None:
    """Index and clean-up versions above the planned one are fine; another run's are not."""
    dataset = head(uri)
    if dataset is None:
        return
    if work.read_version == 0:
        raise TableError(f"a table appeared while run {work.run_id} worked; nothing was committed", where=uri)
    for version, facts in lineage(dataset):
        if version <= work.read_version:
            return
        if RUN_ID in facts:
            raise TableError(
                f"run {facts[RUN_ID]} committed version {version} while this one worked; nothing was committed",
                where=f"{uri} run {work.run_id}",
                next="Run the same command again",
            )


def _commit(uri: str, work: Commit, *, detached: bool) -> lance.LanceDataset:
    import lance

    # Columns may have been added since the plan: an edit reads the head, which _check_alone vouches for.
    read_version = work.read_version if work.edits is None else int(open_version(uri, None).version)
    transaction = lance.Transaction(
        read_version=read_version,
        operation=operation_of(work),
        transaction_properties={**work.properties, RUN_ID: work.run_id},
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
        raise _storage_error(error, "commit", uri) from error


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
        raise _storage_error(error, "commit", uri) from error
