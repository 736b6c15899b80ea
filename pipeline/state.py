"""What a published version knows of its source: per file the ids and content hashes, and the manifest naming them.

Assumes: a state file and a manifest are written once, before the commit whose properties name the manifest; so the
state that belongs to a version is found from the version, also after a rollback.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
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

    config: digest of what else decides its rows (columns, types); columns: of the source, in plain types;
    quarantine: runs whose rows in the quarantine table still hold.
    """

    run_id: str
    fingerprint: str
    encoder: str
    config: str
    plan: str
    rows: int
    files: tuple[FileState, ...]
    quarantine: tuple[str, ...]
    precision: str = "auto"
    columns: str = ""


def state_schema(id_type: pa.DataType, modalities: Iterable[str]) -> pa.Schema:
    """One row per source row: position, id, hash of each modality's value, of the kept columns and of changed_by."""
    import pyarrow as pa

    digest = pa.binary(HASH_BYTES)
    names = [f"{modality}_hash" for modality in modalities] + ["kept_hash", "changed_by_hash"]
    position = [pa.field("file", pa.int32()), pa.field("row_group", pa.int32()), pa.field("row", pa.int64())]
    return pa.schema([*position, pa.field("id", id_type), *(pa.field(name, digest) for name in names)])


def write_state(
    uri: str, run_id: str, files: Mapping[int, SourceFile], parts: Iterable[pa.Table]
) -> tuple[FileState, ...]:
    """Write one Parquet file per source file below `<bookkeeping>/state/<run id>`; one without rows gets none.

    parts: tables of `state_schema` in the order of files, `file` counting as `files` does; one source file's rows are
    held in memory at a time.
    """
    written = {number: _write(uri, f"state/{run_id}/{number:05d}.parquet", table) for number, table in _by_file(parts)}
    if stray := written.keys() - files.keys():
        raise TableError(f"state of files {sorted(stray)} that the plan does not name", where=f"{uri} run {run_id}")
    return tuple(FileState(file, written.get(number, "")) for number, file in files.items())


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


def state_file(uri: str, state: FileState) -> pa.Table:
    """The rows of one source file as some version of the table at `uri` knows them; no `file` column."""
    return read_parquet(storage.join(bookkeeping(uri), state.path))


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
    return _manifest(storage.read_json(storage.join(bookkeeping(str(dataset.uri)), path)))


def manifest_of_run(uri: str, run_id: str) -> Manifest:
    """The manifest that a run wrote. Raises StorageError if there is none."""
    return _manifest(storage.read_json(storage.join(bookkeeping(uri), manifest_path(run_id))))


def _manifest(value: dict[str, object]) -> Manifest:
    raw = cast("dict[str, str]", value)
    files = tuple(_file_state(entry) for entry in cast("list[dict[str, object]]", raw["files"]))
    names = ("run_id", "fingerprint", "encoder", "config", "plan")
    return Manifest(
        **{name: raw[name] for name in names},
        rows=int(raw["rows"]),
        files=files,
        quarantine=tuple(raw["quarantine"]),
        precision=raw.get("precision", "auto"),
        columns=raw.get("columns", ""),
    )


def _file_state(raw: dict[str, object]) -> FileState:
    return FileState(source_file(cast("dict[str, object]", raw["file"])), str(raw["path"]))


def source_file(raw: dict[str, object]) -> SourceFile:
    """A SourceFile from its JSON."""
    fields = {**raw, "row_groups": tuple(cast("list[int]", raw["row_groups"]))}
    return SourceFile(**fields)  # type: ignore[arg-type]  # our own JSON, its format checked
