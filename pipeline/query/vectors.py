"""Query vectors: words, pictures, sounds, rows and plain numbers to unit vectors, by the encoder of their column.

Assumes: encoders load on first use and stay loaded; torch is imported by them alone.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.expressions import combined
from conjoin.pipeline.query.filters import equals
from conjoin.pipeline.query.relations import Relation

if TYPE_CHECKING:
    from conjoin.pipeline.embedder import Embedder
    from conjoin.pipeline.query.expressions import Term
    from conjoin.pipeline.query.functions import Wanted
    from conjoin.pipeline.store import VectorColumn

_REMEMBERED = 1000


class QueryVectors:
    """Makes query vectors; keeps encoders and the last thousand embedded values."""

    def __init__(self) -> None:
        self._encoders: dict[str, Embedder] = {}
        self._made: OrderedDict[tuple[str, str, str | bytes], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def make(self, wanted: Wanted) -> np.ndarray:
        """(D,) float32 of unit length. Raises QueryError or EncoderError."""
        if wanted.kind == "values":
            return unit(wanted.value, wanted.column)
        if wanted.kind == "id":
            return _stored(wanted.relation, wanted.column, wanted.value)
        if wanted.kind == "sum":
            terms = cast("tuple[Term, ...]", wanted.value)
            part = replace(wanted, name="", parameter=None)
            return combined(terms, lambda t: self.make(replace(part, kind=t.kind, value=t.value)), wanted.column)
        if not isinstance(wanted.value, str | bytes):
            raise QueryError(f"{wanted.kind}() takes text{'' if wanted.kind == 'text' else ', a path or bytes'}")
        key = (wanted.column.fingerprint, wanted.kind, wanted.value)
        with self._lock:
            if key not in self._made:
                self._made[key] = self._embed(wanted.kind, wanted.value, wanted.column)
            self._made.move_to_end(key)
            while len(self._made) > _REMEMBERED:
                self._made.popitem(last=False)
            return self._made[key]

    def embed_many(self, modality: str, values: Sequence[str], column: VectorColumn) -> list[np.ndarray | None]:
        """(D,) float32 of unit length for each, None where there is nothing to embed. Raises QueryError."""
        with self._lock:
            encoder = self._with_tower(modality, column)
        wanted = [value for value in values if value.strip()]
        embedded = encoder.embed(modality, wanted)
        if embedded.bad:
            first = embedded.bad[0]
            raise QueryError(f"{modality}() of a column: {wanted[first.position]!r}: {first.reason}")
        rows = {value: row for row, value in enumerate(wanted) if embedded.present[row]}
        return [unit(embedded.vectors[rows[value]], column) if value in rows else None for value in values]

    def _with_tower(self, modality: str, column: VectorColumn) -> Embedder:
        encoder = self.encoder(column)
        if modality not in encoder.spec.towers:
            towers = ", ".join(encoder.spec.towers)
            raise QueryError(
                f"the encoder of {column.name} has no {modality} tower, only {towers}", where=column.encoder
            )
        return encoder

    def _embed(self, modality: str, value: str | bytes, column: VectorColumn) -> np.ndarray:
        encoder = self._with_tower(modality, column)
        embedded = encoder.embed(modality, [value])
        if embedded.bad or not embedded.present[0]:
            reason = embedded.bad[0].reason if embedded.bad else "nothing to embed"
            shown = repr(value) if isinstance(value, str) else f"{len(value)} bytes"
            raise QueryError(f"{modality}({shown}): {reason}")
        return unit(embedded.vectors[0], column)

    def encoder(self, column: VectorColumn) -> Embedder:
        """The column's own, loaded once. Raises QueryError, EncoderError."""
        if column.fingerprint not in self._encoders:
            self._encoders[column.fingerprint] = matching_encoder(column)
        return self._encoders[column.fingerprint]


def matching_encoder(column: VectorColumn) -> Embedder:
    """The encoder that made a column. Raises QueryError if its folder holds another now, EncoderError without it."""
    from conjoin.pipeline.embedder import load

    if not column.encoder:
        raise QueryError(f"{column.name} does not say where its encoder is kept", next="Pass a vector instead")
    encoder = load(column.encoder)
    if encoder.fingerprint != column.fingerprint:
        raise QueryError(
            f"{column.name} was made by encoder {column.fingerprint[:12]}, but the folder now holds "
            f"{encoder.fingerprint[:12]}: their vectors cannot be compared",
            where=column.encoder,
            next="Put the old encoder back, or re-embed the table with `conjoin run`",
        )
    return encoder


def unit(value: object, column: VectorColumn) -> np.ndarray:
    """A list of numbers as a unit vector. Raises QueryError for another dimension, zeros, NaN or infinity."""
    try:
        vector = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise QueryError(f"the vector for {column.name} is not a list of numbers") from error
    if vector.shape != (column.dim,):
        shape = vector.shape[0] if vector.ndim == 1 else vector.shape
        raise QueryError(f"{column.name} has {column.dim} dimensions, the vector given has {shape}")
    if not np.isfinite(vector).all():
        raise QueryError(f"the vector for {column.name} contains NaN or infinity")
    norm = float(np.linalg.norm(vector))
    if norm == 0.0:
        raise QueryError(f"the vector for {column.name} is zero: it has no direction")
    return np.asarray(vector / norm, dtype=np.float32)


def _stored(relation: Relation, column: VectorColumn, key: object) -> np.ndarray:
    name = relation.column("id")
    if relation.dataset is None or name is None:
        raise QueryError(f"vector_of() needs a table with ids; {relation.name} has none")
    condition = equals(name, relation.schema.field(name).type, key)
    if condition is None:
        raise QueryError(f"vector_of({key!r}): ids of {relation.name} are of type {relation.schema.field(name).type}")
    rows = relation.dataset.to_table(columns=[column.name], filter=condition, limit=1)
    if rows.num_rows == 0:
        raise QueryError(f"vector_of({key!r}): {relation.name} has no such id")
    values: pa.Scalar = rows.column(0)[0]
    if not values.is_valid:
        raise QueryError(f"vector_of({key!r}): that row has no {column.name}", next=f"It lacks the {column.modality}")
    return unit(values.as_py(), column)
