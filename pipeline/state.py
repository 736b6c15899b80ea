"""What a published version knows of its source: per file the ids and content hashes, and the manifest naming them.

Assumes: a state file and a manifest are written once, before the commit whose properties name the manifest; so the
state that belongs to a version is found from the version, also after a rollback.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, cast

from conjoin.pipeline import storage
from conjoin.pipeline.errors import TableError
from conjoin.pipeline.source import SourceFile
from conjoin.pipeline.store import HASH_BYTES, STATE, bookkeeping, run_of

if TYPE_CHECKING:
    import lance
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class FileState:
    """A source file as it was read, and the file below the bookkeeping directory with the state of its rows."""

    file: SourceFile
    path: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a version came from.

    config: digest of what else decides its rows (columns, types, precision); quarantine: runs whose rows in the
    quarantine table still hold.
    """

    run_id: str
    fingerprint: str
    encoder: str
    config: str
    plan: str
    rows: int
    files: tuple[FileState, ...]
    quarantine: tuple[str, ...]


def state_schema(id_type: pa.DataType, modalities: Iterable[str]) -> pa.Schema:
    """One row per source row: position, id, hash of each modality's value, of the kept columns and of changed_by."""
    import pyarrow as pa

    digest = pa.binary(HASH_BYTES)
    names = [f"{modality}_hash" for modality in modalities] + ["kept_hash", "changed_by_hash"]
    position = [pa.field("file", pa.int32()), pa.field("row_group", pa.int32()), pa.field("row", pa.int64())]
    return pa.schema([*position, pa.field("id", id_type), *(pa.field(name, digest) for name in names)])


def write_state(uri: str, run_id: str, files: Iterable[SourceFile], parts: Iterable[pa.Table]) -> tuple[FileState, ...]:
    """Write one Parquet file per source file below `<bookkeeping>/state/<run id>`.

    parts: tables of `state_schema` in the order of the plan, `file` counting `files`; one source file's rows are held
    in memory at a time.
    """
    known = list(files)
    written = [
        FileState(known[number], _write(uri, f"state/{run_id}/{number:05d}.parquet", table))
        for number, table in _by_file(parts)
    ]
    if len(written) != sum(1 for file in known if file.num_rows):
        raise TableError(f"state of {len(written)} source files out of {len(known)}", where=f"{uri} run {run_id}")
    empty = [FileState(file, "") for file in known if not file.num_rows]
    return tuple(written + empty)


def _by_file(parts: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """The rows of each source file together: parts come in file order, one may end a file and begin others."""
    import pyarrow as pa
    import pyarrow.compute as pc

    pending: list[pa.Table] = []
    current = -1
    for part in parts:
        for number in pc.unique(part["file"]).to_pylist():
            if number != current and pending:
                yield current, pa.concat_tables(pending)
                pending = []
            current = number
            pending.append(part.filter(pc.equal(part["file"], number)))
    if pending:
        yield current, pa.concat_tables(pending)


def _write(uri: str, path: str, table: pa.Table) -> str:
    storage.write_bytes(storage.join(bookkeeping(uri), path), parquet_bytes(table.drop_columns(["file"])))
    return path


def parquet_bytes(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()


def read_parquet(uri: str) -> pa.Table:
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(storage.read_bytes(uri)))


def manifest_path(run_id: str) -> str:
    """Where a run's manifest lies below the bookkeeping directory; its commit names it."""
    return f"state/{run_id}/manifest.json"


def write_manifest(uri: str, manifest: Manifest) -> None:
    storage.write_json(storage.join(bookkeeping(uri), manifest_path(manifest.run_id)), asdict(manifest))


def read_manifest(dataset: lance.LanceDataset) -> Manifest | None:
    """The manifest of this version of a table; None if no run of ours filled it. Raises StorageError if it is gone."""
    path = run_of(dataset).get(STATE)
    if path is None:
        return None
    raw = cast("dict[str, str]", storage.read_json(storage.join(bookkeeping(str(dataset.uri)), path)))
    files = tuple(_file_state(entry) for entry in cast("list[dict[str, object]]", raw["files"]))
    names = ("run_id", "fingerprint", "encoder", "config", "plan")
    return Manifest(
        **{name: raw[name] for name in names},
        rows=int(raw["rows"]),
        files=files,
        quarantine=tuple(raw["quarantine"]),
    )


def _file_state(raw: dict[str, object]) -> FileState:
    return FileState(source_file(cast("dict[str, object]", raw["file"])), str(raw["path"]))


def source_file(raw: dict[str, object]) -> SourceFile:
    """A SourceFile from its JSON."""
    fields = {**raw, "row_groups": tuple(cast("list[int]", raw["row_groups"]))}
    return SourceFile(**fields)  # type: ignore[arg-type]  # our own JSON, its format checked
