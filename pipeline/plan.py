"""Source against state: what a run will do, cut into units, frozen on disk before anything is done.

Assumes: planning reads, decides and writes nothing but the plan; plan.json is written last, so that a plan with it is
whole. A frozen plan never changes: a killed run resumes it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from conjoin.pipeline import storage, utf8
from conjoin.pipeline.errors import SourceError, TableError
from conjoin.pipeline.runs import run_directory
from conjoin.pipeline.units import Slice, Unit, cut, ids_digest, unit_rows

if TYPE_CHECKING:
    import lance
    import pyarrow as pa
    import pyarrow.parquet as pq

    from conjoin.encoders.spec import EncoderSpec
    from conjoin.pipeline.catalog import Catalog
    from conjoin.pipeline.source import SourceFile, SourceSchema
    from conjoin.pipeline.state import Manifest

NEW = "new"
AUTO_THUMBNAIL_PX = 96
# Above this many bytes of vectors float16 halves the table; recall@10 barely moves (the index re-ranks).
FLOAT16_FROM_BYTES = 8 << 30
_READERS = 8
_SHOWN = 3

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class Survey:
    """What there is tonight, found without reading a row; config: digest of what else decides the table's rows."""

    files: tuple[SourceFile, ...]
    spec: EncoderSpec
    fingerprint: str
    config: str


@dataclass(frozen=True, slots=True)
class Plan:
    """A frozen plan. path: of the source that night; base_version: the table's head then, 0 without a table.

    digest: of all the rest.
    """

    run_id: str
    path: tuple[str, ...]
    fingerprint: str
    encoder: str
    config: str
    base_version: int
    thumbnail_px: int
    schema: pa.Schema
    files: tuple[SourceFile, ...]
    units: tuple[Unit, ...]
    digest: str = ""

    @property
    def rows(self) -> int:
        return sum(unit.rows for unit in self.units)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by operation."""
        found: Counter[str] = Counter()
        for unit in self.units:
            found[unit.operation] += unit.rows
        return dict(found)

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that get vectors."""
        return tuple(name.removesuffix("_vec") for name in self.schema.names if name.endswith("_vec"))


def survey(catalog: Catalog, known: Mapping[str, SourceFile] | None = None) -> Survey:
    """List the source and read the encoder's spec. known: files by path that need not be opened if unchanged.

    Raises SourceError, EncoderError or ConfigError where the two do not fit.
    """
    from conjoin.pipeline.embedder import read_spec
    from conjoin.pipeline.source import list_source

    spec, fingerprint = read_spec(catalog.encoder)
    if not _modalities(catalog, spec):
        raise SourceError(
            f"the encoder embeds {', '.join(spec.towers)}, the source gives {', '.join(catalog.source.modalities)}",
            where=catalog.encoder,
            next="Name a column for one of the encoder's modalities",
        )
    return Survey(list_source(catalog.source, known), spec, fingerprint, _config_digest(catalog))


def _modalities(catalog: Catalog, spec: EncoderSpec) -> tuple[str, ...]:
    return tuple(name for name in catalog.source.modalities if name in spec.towers)


def _config_digest(catalog: Catalog) -> str:
    source = catalog.source.model_dump(include={"id", "image", "text", "audio", "changed_by", "keep"})
    table = catalog.table.model_dump(include={"vector_dtype", "thumbnail_px"})
    return _digest({**source, **table, "precision": catalog.embed.precision})


def _digest(value: Mapping[str, object]) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def is_current(manifest: Manifest | None, found: Survey) -> bool:
    """Whether a version already holds just this: same files, encoder and configuration."""
    if manifest is None or (manifest.fingerprint, manifest.config) != (found.fingerprint, found.config):
        return False
    return {entry.file for entry in manifest.files} == set(found.files)


def check_resumable(plan: Plan, found: Survey) -> None:
    """Raises SourceError or TableError naming what changed since an unfinished plan; new files do not matter."""
    advice = "Start over with `conjoin run --full`"
    listed = {file.path: file for file in found.files}
    names = [name for name in in_order(plan.files, lambda file: _difference(file, listed)) if name]
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise SourceError(
            f"the source changed since unfinished run {plan.run_id} was planned: {'; '.join(names[:_SHOWN])}{more}",
            next=advice,
        )
    if (plan.fingerprint, plan.config) != (found.fingerprint, found.config):
        what = "another encoder" if plan.fingerprint != found.fingerprint else "other columns, types or precision"
        raise TableError(f"unfinished run {plan.run_id} was planned with {what}", next=advice)


def _difference(file: SourceFile, listed: Mapping[str, SourceFile]) -> str:
    """What became of a planned file, empty if nothing; tonight's listing may be of another day's directory."""
    if file.path in listed:
        return "" if listed[file.path] == file else f"{file.path} changed"
    now = storage.list_stats(file.path)
    if not now:
        return f"{file.path} is gone"
    return "" if (now[0].size_bytes, now[0].etag) == (file.size_bytes, file.etag) else f"{file.path} changed"


def plan_run(catalog: Catalog, run_id: str, found: Survey, *, full: bool) -> Plan:
    """Decide and freeze: every row of the source is embedded anew. Readers of the table notice nothing.

    full: replace whatever conjoin put into the table. Raises SourceError for ids that are null, repeated or of mixed
    types, TableError for a table that is somebody else's, another encoder's or another source's.
    """
    from conjoin.pipeline.ids import check_ids
    from conjoin.pipeline.quarantine import check_quarantine
    from conjoin.pipeline.source import schema_of
    from conjoin.pipeline.store import check_fits, check_ours

    head = check_ours(catalog.table.path)
    check_quarantine(catalog.table.path)
    columns = schema_of(catalog.source)
    schema, thumbnail_px = _lay_out(catalog, found, columns, head)
    if head is not None and not full:
        check_fits(head, schema)
    num_rows = sum(file.num_rows for file in found.files)
    rows = unit_rows(catalog.embed.unit_rows, num_rows, row_bytes(schema, thumbnail_px))
    target = run_directory(catalog.table.path, run_id)
    spool = tempfile.gettempdir()
    with storage.explaining("spool the plan", spool), tempfile.TemporaryDirectory(prefix="conjoin-plan-") as folder:
        slices = list(cut([file.row_groups for file in found.files], rows))
        units = _write_rows(catalog, found.files, slices, schema.field("id").type, Path(folder) / "rows.parquet")
        check_ids(catalog.source, found.files, _planned_ids(Path(folder) / "rows.parquet"))
        storage.copy_tree(folder, target)
    base = 0 if head is None else int(head.version)
    plan = Plan(
        run_id=run_id,
        path=catalog.paths,
        fingerprint=found.fingerprint,
        encoder=catalog.encoder,
        config=found.config,
        base_version=base,
        thumbnail_px=thumbnail_px,
        schema=schema,
        files=found.files,
        units=units,
    )
    return _freeze(plan, target)


def _lay_out(
    catalog: Catalog, found: Survey, columns: SourceSchema, head: lance.LanceDataset | None
) -> tuple[pa.Schema, int]:
    """The table's schema, and the side of thumbnails in pixels (0: none)."""
    import pyarrow as pa

    from conjoin.pipeline.store import Layout, table_schema

    modalities = _modalities(catalog, found.spec)
    uris = tuple(name for name in modalities if columns.contents[name] == "uri")
    wanted = catalog.table.thumbnail_px
    auto = AUTO_THUMBNAIL_PX if "image" not in uris else 0
    thumbnail_px = (auto if wanted == "auto" else wanted) if "image" in modalities else 0
    layout = Layout(
        id_type=columns.arrow.field(catalog.source.id).type,
        kept=pa.schema([columns.arrow.field(name) for name in dict.fromkeys(catalog.source.keep)]),
        modalities=modalities,
        uris=uris,
        thumbnails=thumbnail_px > 0,
        vector_type=_vector_type(catalog, found, head, len(modalities)),
        fingerprint=found.fingerprint,
        encoder=catalog.encoder,
    )
    return table_schema(layout), thumbnail_px


def _vector_type(catalog: Catalog, found: Survey, head: lance.LanceDataset | None, columns: int) -> pa.DataType:
    """`auto` is decided when the table is created and stays."""
    import pyarrow as pa

    from conjoin.pipeline.store import vector_columns

    name: str = catalog.table.vector_dtype
    if name == "auto" and head is not None:
        name = "float16" if head.schema.field(next(iter(vector_columns(head)))).type.value_type == pa.float16() else ""
    elif name == "auto":
        num_bytes = sum(file.num_rows for file in found.files) * columns * found.spec.dim * 4
        name = "float16" if num_bytes >= FLOAT16_FROM_BYTES else ""
    return pa.list_(pa.float16() if name == "float16" else pa.float32(), found.spec.dim)


def row_bytes(schema: pa.Schema, thumbnail_px: int) -> int:
    """About what one row takes in the table; text and kept columns are guessed."""
    vectors = [field.type for field in schema if field.name.endswith("_vec")]
    return 200 + sum(kind.list_size * kind.value_type.bit_width // 8 for kind in vectors) + thumbnail_px**2 // 4


def _write_rows(
    catalog: Catalog, files: Sequence[SourceFile], slices: Iterable[Sequence[Slice]], id_type: pa.DataType, out: Path
) -> tuple[Unit, ...]:
    """One row group per unit: (unit, file, row_group, row, id), so that an actor reads only its own."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(pieces: list[tuple[int, Slice]]) -> list[tuple[int, pa.Table]]:
        first = pieces[0][1]
        whole = _rows_of(catalog, files[first.file].path, first, id_type)
        return [(number, whole.slice(piece.start, piece.stop - piece.start)) for number, piece in pieces]

    pieces = [(number, piece) for number, unit in enumerate(slices) for piece in unit]
    row_groups = (list(some) for _, some in groupby(pieces, lambda pair: (pair[1].file, pair[1].row_group)))
    tables = (pair for pairs in in_order(row_groups, read) for pair in pairs)
    units = []
    with pq.ParquetWriter(out, rows_schema(id_type), compression="zstd") as writer:
        for number, parts in groupby(tables, itemgetter(0)):
            table = pa.concat_tables([part for _, part in parts])
            table = table.add_column(0, "unit", pa.array([number] * table.num_rows, pa.int32()))
            writer.write_table(table, row_group_size=table.num_rows)
            units.append(Unit(number, NEW, table.num_rows, ids_digest(table["id"])))
    return tuple(units)


def rows_schema(id_type: pa.DataType) -> pa.Schema:
    """The plan's rows: `file` counts the plan's files, `row` is the position in the row group."""
    import pyarrow as pa

    position = {"unit": pa.int32(), "file": pa.int32(), "row_group": pa.int32(), "row": pa.int64()}
    return pa.schema([*(pa.field(name, kind) for name, kind in position.items()), pa.field("id", id_type)])


def _rows_of(catalog: Catalog, path: str, piece: Slice, id_type: pa.DataType) -> pa.Table:
    """Positions and ids of the whole row group that `piece` lies in."""
    import numpy as np
    import pyarrow as pa

    from conjoin.pipeline.source import read_rows

    ids = read_rows(catalog.source, path, piece.row_group, [catalog.source.id])[catalog.source.id]
    if utf8.checked(ids) is not ids:
        where = f"{path} row group {piece.row_group}"
        raise SourceError(f"source.id: column {catalog.source.id!r} holds an id that is not UTF-8", where=where)
    names = rows_schema(id_type).names[1:]
    fixed = [pa.array(np.full(len(ids), value, np.int32)) for value in (piece.file, piece.row_group)]
    return pa.table([*fixed, pa.array(np.arange(len(ids))), ids.cast(id_type)], names=names)


def _planned_ids(rows: Path) -> Iterator[pa.ChunkedArray]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(rows) as file:
        for unit in range(file.num_row_groups):
            yield file.read_row_group(unit, columns=["id"])["id"]


def in_order(items: Iterable[_In], read: Callable[[_In], _Out]) -> Iterator[_Out]:
    """`read` of every item, a few threads ahead of the consumer, in the order of the items."""
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[Future[_Out]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > _READERS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _freeze(plan: Plan, target: str) -> Plan:
    body = _body(plan)
    digest = _digest(body)
    storage.write_json(storage.join(target, "plan.json"), {**body, "counts": plan.counts, "digest": digest})
    return load_plan(target)


def _body(plan: Plan) -> dict[str, object]:
    fields = asdict(plan)
    fields["schema"] = base64.b64encode(plan.schema.serialize().to_pybytes()).decode()
    return {name: value for name, value in fields.items() if name != "digest"}


def load_plan(run: str) -> Plan:
    """The frozen plan of a run directory. Raises StorageError if there is none, TableError if it was tampered with."""
    import pyarrow as pa

    from conjoin.pipeline.state import source_file

    raw = storage.read_json(storage.join(run, "plan.json"))
    digest = str(raw.pop("digest"))
    body = {name: value for name, value in raw.items() if name not in ("format", "counts")}
    if _digest(body) != digest:
        raise TableError("plan.json does not match its digest", where=run, next="Remove this run's directory")
    files = cast("list[dict[str, object]]", body.pop("files"))
    units = cast("list[dict[str, object]]", body.pop("units"))
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(str(body.pop("schema")))))
    path = tuple(cast("list[str]", body.pop("path")))
    return Plan(
        **body,  # type: ignore[arg-type]  # our own JSON, its digest checked
        path=path,
        schema=schema,
        files=tuple(source_file(file) for file in files),
        units=tuple(Unit(**unit) for unit in units),  # type: ignore[arg-type]  # the same
        digest=digest,
    )


def open_rows(run: str) -> pq.ParquetFile:
    """The plan's rows, row group u for unit u; keep it open to read several units."""
    import pyarrow.parquet as pq

    fs, path = storage.filesystem(storage.join(run, "rows.parquet"))
    return pq.ParquetFile(path, filesystem=fs)
