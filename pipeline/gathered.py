"""What an actor has of a unit so far: columns, vectors, troubles; decoded values wait here until they fill a batch.

Assumes: chunks are added in the unit's order and cover it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from conjoin.pipeline.decode import Decoded

if TYPE_CHECKING:
    from conjoin.pipeline.chunks import Chunk
    from conjoin.pipeline.embedder import Embedder

# Vectors of contents that an actor met in earlier units, per modality; a full cache starts anew.
CACHE_BYTES = 128 << 20
# Short texts are sorted by length over the whole unit; pictures are embedded chunk by chunk.
FLUSH_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Trouble:
    """A value that could not be used; row: its position in the unit; modality empty: the record has no value at all."""

    row: int
    modality: str
    stage: str
    reason: str


@dataclass(slots=True)
class _Waiting:
    """Decoded values not embedded yet; owners index `rows`, which are positions in the unit."""

    rows: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    values: list[str | np.ndarray] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    num_bytes: int = 0


class Cache:
    """Vectors by content hash, so that one actor embeds equal contents once in a night."""

    def __init__(self) -> None:
        self._vectors: dict[str, dict[bytes, np.ndarray]] = {}

    def get(self, modality: str, digest: bytes) -> np.ndarray | None:
        """(D,) float32."""
        return self._vectors.get(modality, {}).get(digest)

    def put(self, modality: str, digest: bytes, vector: np.ndarray) -> None:
        known = self._vectors.setdefault(modality, {})
        if len(known) * vector.nbytes >= CACHE_BYTES:
            known.clear()
        known[digest] = vector


class _Vectors:
    """One modality of a unit. Equal contents share the vector (and the trouble) of the first row that has them."""

    def __init__(self, embedder: Embedder, modality: str, num_rows: int, cache: Cache) -> None:
        self._embedder, self._cache = embedder, cache
        self._modality = modality
        self._vectors = np.zeros((num_rows, embedder.spec.dim), np.float32)
        self._present = np.zeros(num_rows, bool)
        self._first = np.arange(num_rows)
        self._row_of: dict[bytes, int] = {}
        self._waiting = _Waiting()
        self._reasons: dict[int, tuple[str, str]] = {}
        self._thumbnails: dict[int, bytes | None] = {}

    def add(self, start: int, hashes: Sequence[bytes | None], decoded: Decoded) -> None:
        fresh = {}
        for offset, digest in enumerate(hashes):
            row = start + offset
            if digest is None:
                continue
            self._first[row] = self._row_of.setdefault(digest, row)
            if self._first[row] != row:
                continue
            if decoded.thumbnails:
                self._thumbnails[row] = decoded.thumbnails[offset]
            vector = self._cache.get(self._modality, digest)
            if vector is not None:
                self._vectors[row], self._present[row] = vector, True
                continue
            fresh[offset] = len(self._waiting.rows)
            self._waiting.rows.append(row)
            self._waiting.hashes.append(digest)
        for bad in decoded.bad:
            if bad.position in fresh:
                self._reasons[start + bad.position] = (bad.stage, bad.reason)
        for value, owner in zip(decoded.values, decoded.owners.tolist(), strict=True):
            if owner in fresh:
                self._waiting.values.append(value)
                self._waiting.owners.append(fresh[owner])
                self._waiting.num_bytes += len(value) if isinstance(value, str) else value.nbytes
        if self._waiting.num_bytes >= FLUSH_BYTES:
            self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, _Waiting()
        if not waiting.values:
            return
        owners = np.asarray(waiting.owners, np.int64)
        decoded = Decoded(waiting.values, owners, (), [])
        embedded = self._embedder.embed_decoded(self._modality, decoded, len(waiting.rows))
        rows = np.asarray(waiting.rows, np.int64)
        self._vectors[rows] = embedded.vectors
        self._present[rows] = embedded.present
        for digest, vector, present in zip(waiting.hashes, embedded.vectors, embedded.present.tolist(), strict=True):
            if present:
                self._cache.put(self._modality, digest, np.array(vector))
        for bad in embedded.bad:
            self._reasons[waiting.rows[bad.position]] = (bad.stage, bad.reason)

    def finish(self) -> tuple[np.ndarray, np.ndarray, list[Trouble], list[bytes | None]]:
        """Vectors (N, D) float32, present (N,), troubles in row order, thumbnails (N,)."""
        self._flush()
        firsts = self._first.tolist()
        troubles = [
            Trouble(row, self._modality, *self._reasons[first])
            for row, first in enumerate(firsts)
            if first in self._reasons
        ]
        thumbnails = [self._thumbnails.get(first) for first in firsts]
        return self._vectors[self._first], self._present[self._first], troubles, thumbnails


class Gathered:
    """The unit as a table, growing: its columns, and a vector per embedded modality."""

    def __init__(
        self,
        embedder: Embedder | None,
        schema: pa.Schema,
        modalities: Sequence[str],
        num_rows: int,
        cache: Cache | None = None,
    ) -> None:
        """modalities: whose towers run, with `embedder`; none where only other columns are read."""
        self._schema = schema
        self._num_rows = num_rows
        self._parts: list[pa.Table] = []
        cache = cache or Cache()
        self._by_modality = (
            {} if embedder is None else {name: _Vectors(embedder, name, num_rows, cache) for name in modalities}
        )

    def add(self, chunk: Chunk) -> None:
        """Keep the chunk's columns and embed its values, at once or with later ones."""
        self._parts.append(chunk.columns)
        for modality, vectors in self._by_modality.items():
            hashes = chunk.columns[f"{modality}_hash"].to_pylist()
            vectors.add(chunk.start, hashes, chunk.decoded[modality])

    @property
    def columns(self) -> pa.Table:
        """Columns of all rows added so far."""
        return pa.concat_tables(self._parts)

    def finish(self, carried: pa.Table | None = None) -> tuple[pa.Table, np.ndarray, list[Trouble]]:
        """All rows in the order of the unit, which of them have some vector (N,), and every trouble by row.

        carried: columns of the modalities that keep their vectors, a row each.
        """
        table = self.columns
        if table.num_rows != self._num_rows:
            raise AssertionError(f"{table.num_rows} rows gathered, {self._num_rows} planned")
        if carried is not None:
            for name, values in zip(carried.column_names, carried.columns, strict=True):
                table = table.append_column(name, values)
        troubles: list[Trouble] = []
        for modality, vectors in self._by_modality.items():
            matrix, present, found, thumbnails = vectors.finish()
            troubles += found
            column = f"{modality}_vec"
            table = table.append_column(column, _vector_array(matrix, present, self._schema.field(column).type))
            if f"{modality}_thumb" in self._schema.names:
                table = table.append_column(f"{modality}_thumb", pa.array(thumbnails, pa.binary()))
        usable = np.zeros(self._num_rows, bool)
        for name in [name for name in table.column_names if name.endswith("_vec")]:
            usable |= table[name].is_valid().to_numpy()
        troubled = {trouble.row for trouble in troubles}
        if self._by_modality:
            empty = [row for row in np.flatnonzero(~usable).tolist() if row not in troubled]
            troubles += [Trouble(row, "", "read", "no value in any modality") for row in empty]
        return table, usable, sorted(troubles, key=lambda trouble: (trouble.row, trouble.modality))


def _vector_array(vectors_ND: np.ndarray, present: np.ndarray, kind: pa.DataType) -> pa.Array:
    flat = vectors_ND.astype(kind.value_type.to_pandas_dtype(), copy=False).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind, mask=pa.array(~present))
