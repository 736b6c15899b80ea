"""Traces of ids: where a table, its bookkeeping, its quarantine and its exports still hold them, and the proof of none.

Assumes: a fragment's data may hold a row that its deletion file hides, so fragments are searched with their deleted
rows; compressed files are decoded, not only searched byte by byte.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from conjoin.encoders.spec import Json
from conjoin.pipeline import state, storage, store
from conjoin.pipeline.difference import fragments_by_file
from conjoin.pipeline.errors import TableError

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

    from conjoin.pipeline.source import SourceConfig

REDACTED = "(forgotten)"
_BLOCK = 8 << 20
_ID_FIELDS = {"id", "ids", "example_id"}
# What conjoin says about itself, never about a row.
_FACTS = {
    "run_id",
    "runs",
    "status",
    "action",
    "kind",
    "name",
    "owner",
    "path",
    "table",
    "to",
    "fingerprint",
    "encoder",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One part of the proof: what was searched, how much of it, where an id was found, and what does not count."""

    what: str
    searched: int
    found: tuple[str, ...] = ()
    note: str = ""


@dataclass(slots=True)
class Tracer:
    """Ids, and which data files are known to hold them or not, so that versions that share files are read once."""

    uri: str
    keys: Sequence[str | int]
    _known: dict[str, bool] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """A filter for Lance."""
        literals = [str(key) if isinstance(key, int) else "'" + key.replace("'", "''") + "'" for key in self.keys]
        return f"id IN ({', '.join(literals)})"

    def fragments(self, dataset: lance.LanceDataset) -> set[int]:
        """Fragments of a version whose data hold one of the ids, in rows that are deleted too."""
        found = set()
        for path, fragment in fragments_by_file(dataset).items():
            if path not in self._known:
                rows = fragment.scanner(
                    columns=["id"], filter=self.where, include_deleted_rows=True, with_row_id=True
                ).to_table()
                self._known[path] = rows.num_rows > 0
            if self._known[path]:
                found.add(fragment.fragment_id)
        return found

    def state_files(self, paths: Iterable[str]) -> set[str]:
        """Of Parquet files below the bookkeeping directory those that hold one of the ids."""
        found = set()
        for path in filter(None, paths):
            if path not in self._known:
                uri = storage.join(store.bookkeeping(self.uri), path)
                self._known[path] = in_parquet(storage.read_bytes(uri), self.keys)
            if self._known[path]:
                found.add(path)
        return found


def in_source(uri: str, tracer: Tracer, source: SourceConfig | None) -> tuple[list[str], list[str]]:
    """(source files that hold one of the ids, files that changed since the last night and could not be looked into).

    source: of the run file, without which only files as the last night read them are known.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    manifest = state.read_manifest(store.open_version(uri))
    if manifest is None:
        return [], []
    there, changed = [], []
    for entry in manifest.files:
        now = storage.list_stats(entry.file.path)
        if now and (now[0].size_bytes, now[0].etag) != (entry.file.size_bytes, entry.file.etag):
            changed.append(entry.file.path)
        elif now and tracer.state_files([entry.path]):
            there.append(entry.file.path)
    if source is None:
        return there, changed
    from conjoin.pipeline.source import list_source, read_rows

    known = {entry.file.path: entry.file for entry in manifest.files}
    wanted = pa.array([str(key) for key in tracer.keys])
    for file in list_source(source, known):
        if file.path not in known or file.path in changed:
            groups = (read_rows(source, file.path, n, [source.id])[source.id] for n in range(len(file.row_groups)))
            if any(pc.any(pc.is_in(ids.cast(pa.string()), wanted)).as_py() for ids in groups):
                there.append(file.path)
    return there, []


def keys_of(dataset: lance.LanceDataset, ids: Sequence[str]) -> tuple[str | int, ...]:
    """Ids in the type that the table's have. Raises TableError for words where ids are numbers."""
    import pyarrow as pa

    if not pa.types.is_integer(dataset.schema.field("id").type):
        return tuple(ids)
    try:
        return tuple(int(word) for word in ids)
    except ValueError:
        raise TableError(f"ids of this table are numbers, not {', '.join(ids)}", where=str(dataset.uri)) from None


def in_parquet(data: bytes, keys: Sequence[str | int]) -> bool:
    """Whether any column of a Parquet file, lists included, holds one of the ids as a value."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(io.BytesIO(data)) as file:
        for number in range(file.num_row_groups):
            group = file.read_row_group(number)
            if any(_in_column(column, keys) for column in group.columns):
                return True
    return False


def _in_column(column: pa.ChunkedArray, keys: Sequence[str | int]) -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _in_column(pc.list_flatten(column), keys)
    wanted = [key for key in keys if isinstance(key, int) == pa.types.is_integer(kind)]
    if not wanted or not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_int64(kind)):
        return False
    return bool(pc.any(pc.is_in(column, pa.array(wanted, kind))).as_py())


def without(data: bytes, keys: Sequence[str | int]) -> bytes:
    """A JSON file's bytes with the ids out of it; the same bytes where it names none.

    An id counts as a word of its own in a text, a number only where a field holds ids.
    """
    try:
        value = json.loads(data)
    except ValueError:
        return _pattern(keys).sub(REDACTED.encode(), data)
    found = _without(value, keys, "")
    return data if found == value else json.dumps(found, indent=1, sort_keys=True).encode()


def _without(value: Json, keys: Sequence[str | int], name: str) -> Json:
    if isinstance(value, dict):
        return {key: _without(item, keys, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_without(item, keys, name) for item in value]
    if isinstance(value, str) and name not in _FACTS:
        return _pattern(keys).sub(REDACTED.encode(), value.encode()).decode()
    return REDACTED if name in _ID_FIELDS and value in keys else value


def _pattern(keys: Sequence[str | int]) -> re.Pattern[bytes]:
    """The ids as words of their own; those that are numbers only as a whole text."""
    words = [re.escape(str(key).encode()) for key in keys]
    free = [rb"(?<![\w-])" + word + rb"(?![\w-])" for word in words if not word.isdigit()]
    return re.compile(b"|".join([*free, *(rb"\A" + word + rb"\Z" for word in words)]))


def prove(tracer: Tracer, versions: Iterable[lance.LanceDataset]) -> tuple[Check, ...]:
    """Search everything that is left: versions by query, Parquet and JSON by value, every file byte by byte."""
    uri = tracer.uri
    there = list(versions)
    fresh = Tracer(uri, tracer.keys)
    queried = [
        f"version {dataset.version} of {dataset.uri}"
        for dataset in there
        if fresh.fragments(dataset) or _answers(dataset, fresh)
    ]
    books = storage.list_files(store.bookkeeping(uri))
    decoded = [path for path in books if path.endswith(".parquet")]
    held = [path for path in decoded if in_parquet(storage.read_bytes(path), fresh.keys)]
    texts = [path for path in books if not path.endswith(".parquet")]
    said = [path for path in texts if without(data := storage.read_bytes(path), fresh.keys) != data]
    checks = [
        Check("versions, their deleted rows and their id index, by query", len(there), tuple(queried)),
        Check("Parquet files of the bookkeeping, by value", len(decoded), tuple(held)),
        Check("other files of the bookkeeping, by word", len(texts), tuple(said)),
    ]
    words = [key.encode() for key in fresh.keys if isinstance(key, str)]
    if words:
        files = [*storage.list_files(uri), *storage.list_files(store.quarantine_uri(uri))]
        hits = [path for path in files if _has_bytes(path, words)]
        others = any(_inside_others(dataset, words) for dataset in there) if hits else False
        what = "files of the table and the quarantine, byte by byte"
        note = f"{len(hits)} hold these bytes within values of other rows" if others else ""
        checks.append(Check(what, len(files), () if others else tuple(hits), note))
    return tuple(checks)


def _answers(dataset: lance.LanceDataset, tracer: Tracer) -> bool:
    """Whether a query that may use the id index finds one of the ids."""
    return dataset.count_rows(tracer.where) > 0


def _has_bytes(path: str, words: Sequence[bytes]) -> bool:
    fs, name = storage.filesystem(path)
    overlap = max(len(word) for word in words) - 1
    with fs.open(name, "rb") as file:
        tail = b""
        while block := file.read(_BLOCK):
            block = tail + block
            if any(word in block for word in words):
                return True
            tail = block[-overlap:] if overlap else b""
    return False


def _inside_others(dataset: lance.LanceDataset, words: Sequence[bytes]) -> bool:
    """Whether values of other rows contain these bytes: id `a1` is found in the bytes of id `a12`."""
    return any(_any_contains(rows, words) for rows in _texts(dataset))


def _texts(dataset: lance.LanceDataset) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    names = [field.name for field in dataset.schema if pa.types.is_string(field.type)]
    yield from dataset.scanner(columns=names).to_batches()


def _any_contains(rows: pa.RecordBatch, words: Sequence[bytes]) -> bool:
    import pyarrow.compute as pc

    return any(pc.any(pc.match_substring(column, word.decode())).as_py() for column in rows.columns for word in words)
