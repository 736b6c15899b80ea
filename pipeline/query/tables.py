"""Other tables that SQL can join: Parquet, CSV and Lance, by the names that the run file gives them.

Assumes: nothing is opened before a query names it; DuckDB reads the rows while it runs, and of Parquet only the columns
and row groups that it needs. Files of one table have the same columns; numbers are widened, nothing else is guessed.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from conjoin.pipeline import listing, storage, store
from conjoin.pipeline.columns import plain
from conjoin.pipeline.errors import QueryError, SourceError, StorageError, TableError
from conjoin.pipeline.query.relations import Relation, readable, table_relation
from conjoin.pipeline.storage import FileStat

if TYPE_CHECKING:
    import pyarrow.dataset as ds

Kind = Literal["Parquet", "CSV", "Lance"]
_FOOTERS_AT_ONCE = 8


class NamedTables:
    """paths by name: a file, a glob, a directory or a `.lance` table, local or s3://, or a list of files."""

    def __init__(self, paths: Mapping[str, str | Sequence[str]] | None = None) -> None:
        self.paths = {name: [path] if isinstance(path, str) else list(path) for name, path in (paths or {}).items()}
        self._by_lower = {name.lower(): name for name in self.paths}
        self._opened: dict[str, tuple[tuple[FileStat, ...], Relation]] = {}

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._by_lower

    def open(self, name: str) -> Relation:
        """As it is now. Raises QueryError for missing files and for files that do not have the same columns."""
        name = self._by_lower[name.lower()]
        paths = self.paths[name]
        try:
            if paths[0].rstrip("/").endswith(".lance"):
                return _lance_relation(name, paths)
            return self._files_relation(name, paths)
        except (SourceError, StorageError, TableError) as error:
            advice = f"Correct {name} in the run file's `tables`"
            raise QueryError(
                f"the table {name!r} cannot be opened: {error.what}", where=error.where, next=advice
            ) from None

    def _files_relation(self, name: str, paths: Sequence[str]) -> Relation:
        """Remembered as long as the listing stays the same."""
        found = [listing.training_files(path) for path in paths]
        kinds = sorted({kind for kind, _ in found})
        files = tuple(file for _, some in found for file in some)
        if kinds not in (["Parquet"], ["CSV"]):
            raise SourceError(f"it holds {' and '.join(kinds)} files", where=", ".join(paths))
        known = self._opened.get(name)
        if known is None or known[0] != files:
            dataset, filters = _dataset("Parquet" if kinds == ["Parquet"] else "CSV", files)
            relation = Relation(name, dataset.schema, frame=dataset, filters=filters, uri=", ".join(paths))
            known = self._opened[name] = (files, relation)
        return known[1]


class Relations(Mapping[str, Relation]):
    """What one query can name, by lower-case name; the run file's tables are opened when they are asked for."""

    def __init__(self, known: Mapping[str, Relation], others: NamedTables) -> None:
        self._known, self._others = dict(known), others

    def __getitem__(self, name: str) -> Relation:
        if name not in self._known:
            if name not in self._others:
                raise KeyError(name)
            self._known[name] = self._others.open(name)
        return self._known[name]

    def joined(self, more: Mapping[str, Relation]) -> Relations:
        """With further names; none is opened."""
        return Relations({**self._known, **more}, self._others)

    def __iter__(self) -> Iterator[str]:
        return iter({**self._known, **dict.fromkeys(map(str.lower, self._others.paths))})

    def __len__(self) -> int:
        return len(list(iter(self)))


def describe(relation: Relation) -> pa.Table:
    """One row per column: its name, type, and for a vector column what made it."""
    made = [relation.vectors.get(name) for name in relation.schema.names]
    facts = [
        f"{v.modality}, {v.dim} dimensions, {v.metric}, encoder {v.fingerprint[:12]} in {v.encoder or 'no folder'}"
        if v
        else ""
        for v in made
    ]
    return pa.table({"column": relation.schema.names, "type": [str(f.type) for f in relation.schema], "vector": facts})


def _lance_relation(name: str, paths: Sequence[str]) -> Relation:
    if len(paths) > 1:
        raise SourceError("a Lance table is one path, not a list", where=", ".join(paths))
    uri = paths[0].rstrip("/")
    dataset = store.open_version(uri, None)
    live = store.live_version(dataset)
    return table_relation(name, uri, dataset if live is None else store.open_version(uri, store.LIVE))


def _dataset(kind: Kind, files: Sequence[FileStat]) -> tuple[ds.FileSystemDataset, bool]:
    """All files as one, whose rows are not read, and whether conditions may be pushed into them."""
    import pyarrow.dataset as ds

    uris = [file.uri for file in files]
    paths, filesystem = [storage.filesystem(uri)[1] for uri in uris], _arrow_filesystem(uris[0])
    try:
        dataset = ds.dataset(paths, filesystem=filesystem, format=kind.lower())
        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:
            schemas = list(pool.map(lambda fragment: fragment.physical_schema, dataset.get_fragments()))
    except (pa.ArrowException, OSError) as error:
        explained = storage.explain(error, "read the files", uris[0])
        raise explained or SourceError(f"not {kind}: {storage.first_line(error)}", where=uris[0]) from error
    one = ds.dataset(paths, _one_schema(uris, schemas), format=kind.lower(), filesystem=filesystem)
    return one, not any(_is_view(field.type) for schema in schemas for field in schema)


def _is_view(kind: pa.DataType) -> bool:
    """Statistics of such columns are views too, and pyarrow has no comparison of views and strings."""
    return bool(pa.types.is_string_view(kind) or pa.types.is_binary_view(kind))


def _arrow_filesystem(uri: str) -> object:
    import pyarrow.fs

    if not storage.is_s3(uri):
        return pyarrow.fs.LocalFileSystem()
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(storage.filesystem(uri)[0]))


def _one_schema(uris: Sequence[str], schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns that every file has, in the first one's order. Raises SourceError naming two files that differ."""
    first = schemas[0]
    repeated = [name for name in first.names if [other.lower() for other in first.names].count(name.lower()) > 1]
    if repeated:
        raise SourceError(f"two columns are named {repeated[0]!r}, but for capitals", where=uris[0])
    for uri, schema in zip(uris, schemas, strict=True):
        differing = sorted(set(first.names) ^ set(schema.names))
        if differing:
            has, lacks = (uris[0], uri) if differing[0] in first.names else (uri, uris[0])
            what = f"its files differ: {posixpath.basename(has)} has a column {differing[0]!r}"
            raise SourceError(f"{what}, {posixpath.basename(lacks)} has none", where=lacks)
    return pa.schema(
        [pa.field(name, _one_type(name, uris, [s.field(name).type for s in schemas])) for name in first.names]
    )


def _one_type(name: str, uris: Sequence[str], kinds: Sequence[pa.DataType]) -> pa.DataType:
    plains = [readable(kind) if pa.types.is_fixed_size_list(kind) else readable(plain(kind)) for kind in kinds]
    try:
        fields = [pa.schema([pa.field(name, kind)]) for kind in dict.fromkeys(plains)]
        return reduce(_widened, fields).field(0).type
    except pa.ArrowException:
        other = next(at for at, kind in enumerate(plains) if kind != plains[0])
        what = f"its files differ: column {name!r} is {plains[0]} in {posixpath.basename(uris[0])}"
        raise SourceError(f"{what}, {plains[other]} in {posixpath.basename(uris[other])}", where=uris[other]) from None


def _widened(left: pa.Schema, right: pa.Schema) -> pa.Schema:
    return pa.unify_schemas([left, right], promote_options="permissive")
