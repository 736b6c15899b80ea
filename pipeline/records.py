"""Rows of the source as records: each modality's values, groups, splits, content hashes; pure functions of a table.

Assumes: a table comes from source.read_rows, with plain types (no dictionaries, no large strings). Strings may hold
invalid UTF-8, since Parquet does not check: `utf8.python_values` gives those rows as bytes, and decoding names them. So
a row's value and hash never depend on its neighbours.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from conjoin.pipeline import listing, template, utf8

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from conjoin.pipeline.source import SourceConfig, Split

HASH_BYTES = 16
_ABSOLUTE = r"^([A-Za-z][A-Za-z0-9+.-]*://|/|data:)"
_MODALITY_FIELDS = ("image", "text", "audio")


def columns_of(config: SourceConfig, modality: str) -> list[str]:
    """The columns a modality is made of: one, or those of the text template, each once."""
    column = getattr(config, modality)
    if column is None:
        return []
    if modality == "text" and "{" in column:
        return list(dict.fromkeys(template.parts(column)[0]))
    return [column]


def all_columns(config: SourceConfig) -> list[str]:
    """Every column the run file names, each once: id, group, changed_by, the modalities', kept."""
    named = [config.id, *(name for name in (config.group, config.changed_by) if name)]
    for modality in _MODALITY_FIELDS:
        named += columns_of(config, modality)
    return list(dict.fromkeys(named + config.keep))


def values_of(config: SourceConfig, table: pa.Table, modality: str) -> pa.Array | pa.ChunkedArray:
    """One value per row: text rendered, bytes and lists as they are, relative URIs made absolute, null where missing.

    Text may hold invalid UTF-8: take it with `utf8.python_values`. A Hugging Face {bytes, path} struct gives its bytes.
    """
    import pyarrow as pa

    column = getattr(config, modality)
    if modality == "text":
        if "{" in column:
            return template.render(column, table)
        values = table[column]
        return values.cast(pa.string(), safe=False) if pa.types.is_binary(values.type) else values
    values = _unpacked(table[column])
    if utf8.checked(values) is not values:
        values = utf8.repaired(utf8.checked(values))
    if pa.types.is_string(values.type):
        return _absolute(values, listing.base_directory(config.path))
    if pa.types.is_list(values.type) and pa.types.is_string(values.type.value_type):
        base = listing.base_directory(config.path)
        rows = [row if row is None else _absolute(pa.array(row, pa.string()), base) for row in values.to_pylist()]
        return pa.array([row if row is None else row.to_pylist() for row in rows], values.type)
    return values


def uris_of(config: SourceConfig, table: pa.Table, modality: str) -> pa.Array | pa.ChunkedArray | None:
    """What `<modality>_uri` keeps: the URI, of a list the first; None if the source gives bytes or text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if modality == "text":
        return None
    values = values_of(config, table, modality)
    if pa.types.is_string(values.type):
        return values
    if pa.types.is_list(values.type) and pa.types.is_string(values.type.value_type):
        return pc.list_element(pc.list_slice(values, 0, 1, return_fixed_size_list=True), 0)
    return None


def kept_of(config: SourceConfig, table: pa.Table) -> pa.Table:
    """The kept columns; invalid UTF-8 becomes U+FFFD, so that whatever reads the table later can."""
    kept = table.select(list(dict.fromkeys(config.keep)))
    for position, name in enumerate(kept.column_names):
        checked = utf8.checked(kept[name])
        if checked.type != kept[name].type:
            kept = kept.set_column(position, name, utf8.repaired(checked))
    return kept


def _unpacked(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Bytes of a {bytes, path} struct, its path where it has no bytes at all; any other column as it is."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_struct(column.type):
        return column
    names = [column.type.field(position).name for position in range(column.type.num_fields)]
    if "bytes" in names:
        inner = pc.struct_field(column, "bytes")
        if "path" not in names or inner.null_count < len(inner):
            return inner
    return pc.struct_field(column, "path")


def _absolute(uris: pa.Array | pa.ChunkedArray, base: str) -> pa.Array | pa.ChunkedArray:
    import pyarrow.compute as pc

    stripped = pc.utf8_trim_whitespace(uris)
    whole = pc.or_(pc.match_substring_regex(stripped, _ABSOLUTE), pc.equal(stripped, ""))
    if pc.all(whole, min_count=0).as_py():
        return stripped
    return pc.if_else(whole, stripped, pc.binary_join_element_wise(base, stripped, "/"))


def group_values(config: SourceConfig, table: pa.Table) -> pa.Array | pa.ChunkedArray:
    """The group of every row; without `group`, and where it is null, the id. Strings, or the id's own type."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if config.group is None:
        return table[config.id]
    return pc.coalesce(table[config.group].cast(pa.string()), table[config.id].cast(pa.string()))


def split_of(groups: pa.Array | pa.ChunkedArray, split: Split, seed: int = 0) -> np.ndarray:
    """ "train", "validation" or "test" per group: a function of the group and the seed alone, (N,) of str."""
    import numpy as np

    key = seed.to_bytes(8, "little", signed=True)
    drawn = [
        int.from_bytes(
            hashlib.blake2b(str(group).encode(errors="surrogateescape"), digest_size=8, key=key).digest(), "little"
        )
        for group in utf8.python_values(groups)
    ]
    share = np.asarray(drawn, dtype=np.uint64).astype(np.float64) / 2.0**64
    held_out = np.where(share < split.validation + split.test, "test", "train")
    return np.where(share < split.validation, "validation", held_out)


def content_hash(value: object) -> bytes:
    """16 bytes of blake2b over one value: bytes, text, number, or a list of these; equal values, equal hash."""
    return _hasher(value).digest()


def _hasher(value: object) -> hashlib.blake2b:
    hasher = hashlib.blake2b(digest_size=HASH_BYTES)
    if isinstance(value, bytes | bytearray | memoryview):
        hasher.update(b"b")
        hasher.update(value)
    elif isinstance(value, str):
        hasher.update(b"s" + value.encode(errors="surrogateescape"))
    elif isinstance(value, list | tuple):
        hasher.update(b"l" + b"".join(content_hash(item) for item in value))
    else:
        hasher.update(b"o" + repr(value).encode())
    return hasher


def content_hashes(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """`content_hash` of every row as fixed_size_binary(16), null where the value is null."""
    import pyarrow as pa

    hashes = [None if value is None else content_hash(value) for value in utf8.python_values(values)]
    return pa.array(hashes, pa.binary(HASH_BYTES))
