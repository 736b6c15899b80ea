"""Paired Parquet, local or on S3: which files, which columns, their rows, a Ray Dataset over exactly those files.

Assumes: the source is never modified. Paths of files are absolute (or s3://), so that every worker reads the same one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import Field, field_validator

from conjoin.pipeline import columns, listing, storage, template
from conjoin.pipeline.columns import SourceSchema
from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.parquet import Footer, open_file, read_footers, reading
from conjoin.pipeline.records import (
    all_columns,
    columns_of,
    content_hash,
    content_hashes,
    group_values,
    kept_of,
    split_of,
    uris_of,
    values_of,
)
from conjoin.pipeline.section import Section
from conjoin.pipeline.utf8 import python_values

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray.data

__all__ = [
    "SourceConfig",
    "SourceFile",
    "SourceSchema",
    "Split",
    "all_columns",
    "check_source",
    "column_names",
    "columns_of",
    "columns_of_files",
    "content_hash",
    "content_hashes",
    "dataset",
    "files_of",
    "first_rows",
    "group_values",
    "kept_of",
    "list_source",
    "python_values",
    "read_batches",
    "read_rows",
    "schema_of",
    "split_of",
    "uris_of",
    "values_of",
]

_BATCH_ROWS = 1024
_BATCH_BYTES = 64 << 20
_T = TypeVar("_T")


class Split(Section):
    """Shares of all groups; the rest is for training."""

    validation: float = Field(0.05, ge=0, lt=1)
    test: float = Field(0.05, ge=0, lt=1)


class SourceConfig(Section):
    """Where the catalog lies and which columns make a record."""

    path: str | list[str] = Field(description="a file, a glob, a directory, or a list; local or s3://")
    id: str = Field(description="the key column: unique, string or integer")
    group: str | None = Field(
        None, description="variants of one thing: never each other's negatives, never split apart"
    )
    changed_by: str | None = Field(
        None, description="a column that changes when the record does; default: content hashes"
    )
    image: str | None = Field(None, description="bytes, file path, s3://, http(s)://, or a list of them")
    text: str | None = Field(None, description='a column or a template over columns: "{title}. {brand}"')
    audio: str | None = Field(None, description="bytes or URI, like image")
    keep: list[str] = Field(default_factory=list, description="columns copied to the table")
    uri_change: Literal["immutable", "head", "content"] = Field(
        "immutable", description="when a URI's value counts as changed"
    )
    split: Split = Field(default_factory=Split, description="shares by a hash of the group or id")

    @field_validator("text")
    @classmethod
    def _template(cls, text: str | None) -> str | None:
        return text if text is None else template.checked(text)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities this source gives, in a fixed order."""
        return tuple(name for name in ("image", "text", "audio") if getattr(self, name) is not None)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One Parquet file; row_groups: the number of rows of each row group, in order."""

    path: str
    size_bytes: int
    etag: str
    num_rows: int
    row_groups: tuple[int, ...]


def list_source(config: SourceConfig, known: Mapping[str, SourceFile] | None = None) -> tuple[SourceFile, ...]:
    """Every file of the source with the rows of its row groups; the columns of all opened files are checked.

    known: files of an earlier night by path; one whose size and etag are unchanged is not opened again.
    Raises SourceError for missing files, empty globs, table formats, no rows, missing columns and wrong types.
    """
    return files_of(config, listing.parquet_files(config.path), known)


def files_of(
    config: SourceConfig, stats: Sequence[storage.FileStat], known: Mapping[str, SourceFile] | None = None
) -> tuple[SourceFile, ...]:
    """`list_source` of files that are listed already."""
    unopened = {stat: old for stat in stats if (old := (known or {}).get(stat.uri)) and _is_same(old, stat)}
    to_open = [stat for stat in stats if stat not in unopened]
    footers = read_footers(to_open)
    if footers:
        columns.unify(config, [(stat.uri, footer.schema) for stat, footer in footers.items()])
    files = tuple(unopened[stat] if stat in unopened else _file(stat, footers[stat]) for stat in stats)
    if not any(file.num_rows for file in files):
        raise SourceError(f"no rows in {len(files)} file(s)", where=_shown(config.path))
    return files


def schema_of(config: SourceConfig) -> SourceSchema:
    """The columns that the run file names, with the one plain type that fits all files.

    Raises SourceError naming the file and the column that is missing or of a wrong type.
    """
    footers = read_footers(listing.parquet_files(config.path))
    return columns.unify(config, [(stat.uri, footer.schema) for stat, footer in footers.items()])


def columns_of_files(
    config: SourceConfig, files: Sequence[SourceFile], known: pa.Schema | None, unopened: Collection[SourceFile]
) -> SourceSchema:
    """`schema_of` of listed files; those in `unopened` are known to have the columns `known`.

    Raises SourceError naming the file whose columns differ.
    """
    to_open = [storage.FileStat(file.path, file.size_bytes, file.etag) for file in files if file not in unopened]
    earlier = [] if known is None else [(columns.LIVE_VERSION, known)]
    return columns.unify(config, [*earlier, *((stat.uri, foot.schema) for stat, foot in read_footers(to_open).items())])


def column_names(file: str) -> list[str]:
    """Every column of one file. Raises SourceError if it is gone or no Parquet."""

    def read() -> list[str]:
        with open_file(file) as parquet:
            return list(parquet.schema_arrow.names)

    return reading(read, file)


def first_rows(file: str, most: int) -> pa.Table:
    """The first rows of a file, all columns as they are. Raises SourceError if it is gone or no Parquet."""
    import pyarrow as pa

    def read() -> pa.Table:
        with open_file(file) as parquet:
            rows = next(parquet.iter_batches(most), None)
            return parquet.schema_arrow.empty_table() if rows is None else pa.Table.from_batches([rows])

    return reading(read, file)


def check_source(config: SourceConfig) -> SourceSchema:
    """Files exist and have rows, columns exist and their types fit; without reading a row."""
    list_source(config)
    return schema_of(config)


def read_rows(
    config: SourceConfig, file: str, row_group: int, columns: Sequence[str], rows: np.ndarray | None = None
) -> pa.Table:
    """Rows of one row group in plain types (see columns.plain); rows: positions within it, ascending, default all.

    Only the wanted rows are kept in memory. Raises SourceError if the file is gone, torn, or has other columns.
    """
    return reading(lambda: _read_rows(config, file, row_group, list(dict.fromkeys(columns)), rows), file)


def read_batches(
    config: SourceConfig, file: str, row_group: int, columns: Sequence[str], rows: np.ndarray, batch_rows: int
) -> Iterator[pa.Table]:
    """`read_rows` as tables of at most `batch_rows` rows, one in memory at a time; a repeated read goes on in place.

    Where values are large on average (pictures, long texts) tables have fewer rows, about _BATCH_BYTES.
    """
    names = list(dict.fromkeys(columns))
    stream: Iterator[pa.Table] | None = None
    done = 0

    def following() -> pa.Table | None:
        nonlocal stream
        try:
            stream = stream or _stream(config, file, row_group, names, (rows[done:], batch_rows))
            return next(stream, None)
        except Exception:
            stream = None
            raise

    while (table := reading(following, file)) is not None:
        done += table.num_rows
        yield table


def _stream(
    config: SourceConfig, file: str, row_group: int, names: list[str], wanted: tuple[np.ndarray, int]
) -> Iterator[pa.Table]:
    rows, batch_rows = wanted
    with open_file(file) as parquet:
        _check_whole(parquet, file, row_group, names)
        most = max(1, min(batch_rows, _BATCH_BYTES // _row_bytes(parquet, row_group, names)))
        for batch in _picked(parquet, file, row_group, names, (rows, most)):
            yield _in_plain_types(config, file, batch, names)


def row_group_bytes(file: str, row_group: int, columns: Sequence[str]) -> int:
    """Bytes of a row group in these columns, decompressed, as the footer counts them."""

    def read() -> int:
        with open_file(file) as parquet:
            _check_whole(parquet, file, row_group, list(columns))
            return _row_bytes(parquet, row_group, list(columns)) * parquet.metadata.row_group(row_group).num_rows

    return reading(read, file)


def _row_bytes(parquet: pq.ParquetFile, row_group: int, names: list[str]) -> int:
    """Bytes of an average row in these columns, as the footer counts them; at least 1."""
    group = parquet.metadata.row_group(row_group)
    columns = [group.column(position) for position in range(group.num_columns)]
    wanted = [column for column in columns if f"{column.path_in_schema}.".startswith(tuple(f"{n}." for n in names))]
    return max(1, sum(column.total_uncompressed_size for column in wanted) // max(group.num_rows, 1))


def _read_rows(config: SourceConfig, file: str, row_group: int, names: list[str], rows: np.ndarray | None) -> pa.Table:
    import pyarrow as pa

    with open_file(file) as parquet:
        _check_whole(parquet, file, row_group, names)
        if rows is None:
            table = parquet.read_row_group(row_group, columns=names)
        else:
            pieces = list(_picked(parquet, file, row_group, names, (rows, _BATCH_ROWS)))
            empty = pa.schema([parquet.schema_arrow.field(name) for name in names]).empty_table()
            table = pa.concat_tables(pieces) if pieces else empty
    return _in_plain_types(config, file, table, names)


def _check_whole(parquet: pq.ParquetFile, file: str, row_group: int, names: list[str]) -> None:
    missing = sorted(set(names) - set(parquet.schema_arrow.names))
    if missing:
        raise SourceError(f"no column {missing[0]!r}", where=file, next="Was the file replaced? Run again")
    if row_group >= parquet.num_row_groups:
        raise SourceError(f"no row group {row_group}", where=file, next="Was the file replaced? Run again")


def _in_plain_types(config: SourceConfig, file: str, table: pa.Table, names: list[str]) -> pa.Table:
    import pyarrow as pa

    types = {name: columns.plain_id if name == config.id else columns.plain for name in names}
    fields = [(name, types[name](table.schema.field(name).type)) for name in names]
    try:
        found = table.select(names).cast(pa.schema(fields))
    except pa.ArrowInvalid as error:
        raise SourceError(f"a value does not fit its type: {storage.first_line(error)}", where=file) from error
    for name in names:
        _check_nested(found[name], name, file)
    return found


def _check_nested(column: pa.ChunkedArray, name: str, file: str) -> None:
    """Text in structs and maps cannot be mended row by row, as single texts and lists of them are."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_list(column.type) else column.type
    if not pa.types.is_nested(kind):
        return
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        what = f"column {name!r} of type {column.type} holds text that is not UTF-8"
        raise SourceError(what, where=file, next="Write the file again, or leave the column out") from error


def _picked(
    parquet: pq.ParquetFile, file: str, row_group: int, names: list[str], wanted: tuple[np.ndarray, int]
) -> Iterator[pa.Table]:
    """Batch by batch, so that a few rows of a large row group cost little memory; wanted: rows, rows of a batch."""
    import numpy as np
    import pyarrow as pa

    rows, batch_rows = wanted
    start = last = 0
    for batch in parquet.iter_batches(batch_rows, row_groups=[row_group], columns=names):
        first, last = np.searchsorted(rows, (start, start + len(batch)))
        if last > first:
            yield pa.Table.from_batches([batch.take(pa.array(rows[first:last] - start))])
        start += len(batch)
        if last == len(rows):
            return
    if last != len(rows):
        what = f"row group {row_group} has {start} rows, not {int(rows[-1]) + 1}"
        raise SourceError(what, where=file, next="Was the file replaced? Run again")


def dataset(config: SourceConfig, columns: Sequence[str] | None = None) -> ray.data.Dataset:
    """A Ray Dataset over exactly the files of `list_source`; columns default to those the run file names.

    Types are as in the files. Rows are in no particular order: pipeline/order.py decides where order matters.
    """
    import pyarrow.fs
    import ray.data

    files = [file.path for file in list_source(config)]
    fs, _ = storage.filesystem(files[0])
    return ray.data.read_parquet(
        [storage.filesystem(file)[1] for file in files],
        filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)),
        columns=list(columns or all_columns(config)),
        partitioning=None,
    )


def _file(stat: storage.FileStat, footer: Footer) -> SourceFile:
    return SourceFile(stat.uri, stat.size_bytes, stat.etag, sum(footer.row_groups), footer.row_groups)


def _is_same(file: SourceFile, stat: storage.FileStat) -> bool:
    return (file.size_bytes, file.etag) == (stat.size_bytes, stat.etag)


def _shown(path: str | list[str]) -> str:
    return path if isinstance(path, str) else ", ".join(path[:3]) + (", ..." if len(path) > 3 else "")
