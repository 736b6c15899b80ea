"""Hashes of a row's values: what the state remembers, so that a later night knows what changed.

Assumes: the planner and the workers hash alike, since both call this module. `source.uri_change` decides what stands
for a URI: its text (`immutable`), what its server says of it (`head`), or the bytes behind it (`content`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from conjoin.pipeline import utf8
from conjoin.pipeline.errors import StorageError
from conjoin.pipeline.fetch import CONCURRENCY, Fetcher
from conjoin.pipeline.records import HASH_BYTES, content_hash, content_hashes, kept_of, values_of

if TYPE_CHECKING:
    import pyarrow as pa

    from conjoin.pipeline.source import SourceConfig


def is_deep(config: SourceConfig, content: str) -> bool:
    """Whether hashing a modality costs much (bytes are read, servers are asked); content: see columns.Content."""
    return content == "bytes" or (content == "uri" and config.uri_change != "immutable")


def column_names(modalities: Sequence[str]) -> list[str]:
    """The hash columns of a state, in order."""
    return [*(f"{modality}_hash" for modality in modalities), "kept_hash", "changed_by_hash"]


def modality_hashes(config: SourceConfig, table: pa.Table, modality: str) -> tuple[list[object], pa.Array]:
    """(values to decode, their hashes), a row each, null where the record lacks the modality.

    Under `uri_change: content` a URI is fetched and its bytes are the value; one that cannot be fetched stays a URI
    with the hash of its text, so that decoding says why.
    """
    import pyarrow as pa

    found = values_of(config, table, modality)
    values = utf8.python_values(found)
    if modality == "text" or config.uri_change == "immutable" or not _has_uris(found.type):
        return values, content_hashes(found)
    if config.uri_change == "content":
        values = _of_each(values, _fetched)
        return values, pa.array([None if v is None else content_hash(v) for v in values], pa.binary(HASH_BYTES))
    stamped = _of_each(values, _stamped)
    return values, pa.array([None if v is None else content_hash(v) for v in stamped], pa.binary(HASH_BYTES))


def _has_uris(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind.value_type if pa.types.is_list(kind) else kind))


def _of_each(values: Sequence[object], read: Callable[[Fetcher, str], object]) -> list[object]:
    """`read` of every URI, lists item by item, many at a time."""
    fetcher = Fetcher()

    def one(value: object) -> object:
        if isinstance(value, list):
            return [one(item) for item in value]
        return read(fetcher, value) if isinstance(value, str) and value else value

    with ThreadPoolExecutor(CONCURRENCY, "uri") as pool:
        return list(pool.map(one, values))


def _fetched(fetcher: Fetcher, uri: str) -> object:
    try:
        return fetcher.fetch(uri)
    except StorageError:
        return uri


def _stamped(fetcher: Fetcher, uri: str) -> object:
    try:
        return [uri, fetcher.stamp(uri)]
    except StorageError:
        return uri


def row_hashes(config: SourceConfig, table: pa.Table) -> dict[str, pa.Array]:
    """`kept_hash` over the kept columns together and `changed_by_hash`; null without such columns."""
    import pyarrow as pa

    digest = pa.binary(HASH_BYTES)
    kept = kept_of(config, table)
    rows = zip(*(column.to_pylist() for column in kept.columns), strict=True)
    hashed = [_digest(row) for row in rows] if kept.num_columns else None
    return {
        "kept_hash": pa.array(hashed, digest) if hashed is not None else pa.nulls(table.num_rows, digest),
        "changed_by_hash": content_hashes(table[config.changed_by])
        if config.changed_by
        else pa.nulls(table.num_rows, digest),
    }


def _digest(row: tuple[object, ...]) -> bytes:
    return hashlib.blake2b(repr(row).encode(errors="surrogateescape"), digest_size=HASH_BYTES).digest()
