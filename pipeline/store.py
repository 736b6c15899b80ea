"""The Lance table: its schema, its versions and tags, which run made what; restored where the head is not live.

Assumes: only this module, commits.py and those that have a part of their own (index.py, publish.py, quarantine.py)
speak to Lance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from conjoin.pipeline import storage
from conjoin.pipeline.errors import ConjoinError, TableError
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
    except ValueError as error:
        if (trouble := storage.explain(error, "open the table", uri)) and trouble.retryable:
            raise trouble from error
        advice = "`conjoin run` publishes one" if version == LIVE else "`conjoin history` lists the versions"
        raise TableError(f"the table has no version {version!r}", where=uri, next=advice) from None


def head(uri: str) -> lance.LanceDataset | None:
    """The newest version, None without a table."""
    try:
        return _dataset(uri, None)
    except ValueError as error:
        if "was not found" in str(error):
            return None
        raise storage_error(error, "open the table", uri) from error


def _dataset(uri: str, version: str | int | None) -> lance.LanceDataset:
    import lance

    try:
        return lance.dataset(uri, version=version, storage_options=storage.lance_options(uri))
    except OSError as error:
        raise storage_error(error, "open the table", uri) from error


def storage_error(error: OSError | ValueError, verb: str, uri: str) -> ConjoinError:
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
        except (OSError, ValueError) as error:
            # Only a version that is gone ends the walk: a bucket that fails must not hide what a run committed.
            if (trouble := storage.explain(error, "read the history", str(dataset.uri))) and trouble.retryable:
                raise trouble from error
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
