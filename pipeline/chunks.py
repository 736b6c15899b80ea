"""Rows of a unit, read and decoded in bounded memory: by CPU tasks ahead of the actor, or by the actor itself.

Assumes: chunks come in the order of the unit's rows, whoever decoded them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from conjoin.encoders.spec import AudioTransform, ImageTransform, TowerSpec
from conjoin.pipeline import hashes
from conjoin.pipeline.decode import Decoded, decode
from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.source import (
    SourceConfig,
    columns_of,
    kept_of,
    read_batches,
    uris_of,
)

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

# Two chunks of every decoding task may wait in the object store.
CHUNK_BYTES = 32 << 20
CHUNK_ROWS = 2048
WAITING_CHUNKS = 2
# A task that has no CPU after this long may never get one, if every CPU is held by an actor that waits like us.
PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decoding needs. schema: the table's; thumbnail_px: 0 for none; threads: of one piece, 0: all CPUs."""

    source: SourceConfig
    towers: Mapping[str, TowerSpec]
    schema: pa.Schema
    thumbnail_px: int
    threads: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a unit that lie in one row group: `start` is the first one's position in the unit; ids as planned."""

    path: str
    row_group: int
    start: int
    rows: np.ndarray
    ids: pa.Array


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive rows of a unit from position `start`.

    columns: the table's columns but vectors and thumbnails, and the hashes of the state; decoded: by modality; a value
    that an earlier row of the same piece has too is left out, its hash tells.
    """

    start: int
    columns: pa.Table
    decoded: Mapping[str, Decoded]


def chunks(recipe: Recipe, pieces: Sequence[Piece], ahead: int) -> Iterator[Chunk]:
    """Every chunk of the pieces in order; ahead: how many pieces CPU tasks decode at a time, 0: decode here.

    Never waits for a CPU that does not come: after PATIENCE_S the rest is decoded here.
    """
    if not ahead:
        for piece in pieces:
            yield from decode_piece(recipe, piece)
        return
    import ray

    shared, todo = ray.put(recipe), deque(pieces)
    running: deque[tuple[Piece, ray.ObjectRefGenerator]] = deque()
    try:
        while todo or running:
            while todo and len(running) < ahead:
                piece = todo.popleft()
                running.append((piece, _start(shared, piece)))
            piece, stream = running[0]
            if not ray.wait([stream], timeout=PATIENCE_S)[0]:
                yield from chunks(recipe, [piece for piece, _ in running] + list(todo), 0)
                return
            next(stream)  # the sign that it runs
            for reference in stream:
                yield _unshared(ray.get(reference))
            running.popleft()
    finally:
        for _, stream in running:
            ray.cancel(stream)


def _unshared(chunk: Chunk) -> Chunk:
    """Columns stay as long as the unit; as views of shared memory they would keep the chunk's pixels there too."""
    import pyarrow as pa

    copy = pa.BufferOutputStream()
    with pa.ipc.new_stream(copy, chunk.columns.schema) as out:
        out.write_table(chunk.columns)
    return replace(chunk, columns=pa.ipc.open_stream(copy.getvalue()).read_all())


def _start(recipe: object, piece: Piece) -> Iterator[object]:
    import ray

    task = ray.remote(_decode_task).options(
        num_cpus=1,
        num_returns="streaming",
        _generator_backpressure_num_objects=WAITING_CHUNKS,
        max_retries=2,
    )
    return cast("Iterator[object]", task.remote(recipe, piece))


def _decode_task(recipe: Recipe, piece: Piece) -> Iterator[Chunk | None]:
    yield None
    yield from decode_piece(recipe, piece)


def decode_piece(recipe: Recipe, piece: Piece) -> Iterator[Chunk]:
    """Read and decode; raises SourceError if the rows are not those that were planned."""
    source = recipe.source
    names = [source.id, *source.keep, *([source.changed_by] if source.changed_by else [])]
    names += [name for modality in recipe.towers for name in columns_of(source, modality)]
    seen: dict[str, set[bytes]] = {modality: set() for modality in recipe.towers}
    done = 0
    for table in read_batches(source, piece.path, piece.row_group, names, piece.rows, _batch_rows(recipe.towers)):
        ids = table[source.id].cast(recipe.schema.field("id").type)
        if ids.combine_chunks() != piece.ids.slice(done, table.num_rows):
            raise SourceError(
                "ids differ from the plan: the file was replaced while the run read it",
                where=f"{piece.path} row group {piece.row_group}",
                next="Run again: the file's other rows are then left to the next night",
            )
        yield _chunk(recipe, piece.start + done, table.set_column(0, source.id, ids), seen)
        done += table.num_rows


def _batch_rows(towers: Mapping[str, TowerSpec]) -> int:
    """Rows whose decoded values stay below CHUNK_BYTES."""
    largest = max((_value_bytes(tower) for tower in towers.values()), default=1)
    return max(1, min(CHUNK_ROWS, CHUNK_BYTES // largest))


def _value_bytes(tower: TowerSpec) -> int:
    """The most that one decoded value takes."""
    transform = tower.transform
    if isinstance(transform, ImageTransform):
        return 3 * transform.size_px**2
    if isinstance(transform, AudioTransform):
        return int(4 * transform.max_s * transform.sample_rate_hz)
    return 16 * transform.max_tokens


def _chunk(recipe: Recipe, start: int, table: pa.Table, seen: Mapping[str, set[bytes]]) -> Chunk:
    columns = _kept_columns(recipe, table)
    decoded = {}
    for modality, tower in recipe.towers.items():
        values, found = hashes.modality_hashes(recipe.source, table, modality)
        columns[f"{modality}_hash"] = found
        if modality == "text":
            columns["text"] = _as_embedded(values, tower)
        if f"{modality}_uri" in recipe.schema.names:
            uris = uris_of(recipe.source, table, modality)  # None where this file's column has no type at all
            columns[f"{modality}_uri"] = _no_texts(table.num_rows) if uris is None else uris
        thumbnail_px = recipe.thumbnail_px if modality == "image" else 0
        fresh = _once(values, found, seen[modality])
        decoded[modality] = decode(tower, fresh, thumbnail_px=thumbnail_px, threads=recipe.threads)
    return Chunk(start, _table(columns), decoded)


def _no_texts(count: int) -> pa.Array:
    import pyarrow as pa

    return pa.nulls(count, pa.string())


def _table(columns: Mapping[str, pa.Array | pa.ChunkedArray]) -> pa.Table:
    import pyarrow as pa

    return pa.table(dict(columns))


def _kept_columns(recipe: Recipe, table: pa.Table) -> dict[str, pa.Array | pa.ChunkedArray]:
    """id, kept columns in the table's types, kept_hash and changed_by_hash."""
    source, kept = recipe.source, kept_of(recipe.source, table)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {"id": table[source.id]}
    for name in kept.column_names:
        columns[name] = kept[name].cast(recipe.schema.field(name).type)
    return columns | hashes.row_hashes(source, table)


def _once(values: Sequence[object], hashes: pa.Array, seen: set[bytes]) -> list[object]:
    """None in place of a value that was decoded before."""
    fresh = []
    for value, digest in zip(values, hashes.to_pylist(), strict=True):
        fresh.append(None if digest is None or digest in seen else value)
        if digest is not None:
            seen.add(digest)
    return fresh


def _as_embedded(values: Sequence[object], tower: TowerSpec) -> pa.Array:
    """The text column: of a list the first text, or all of them on lines of their own where their mean is embedded."""
    import pyarrow as pa

    def text(value: object) -> str | None:
        if isinstance(value, list):
            parts = [item for item in value if isinstance(item, str)]
            return "\n".join(parts[:1] if tower.items == "first" else parts) if parts else None
        return value if isinstance(value, str) else None

    return pa.array([text(value) for value in values], pa.string())
