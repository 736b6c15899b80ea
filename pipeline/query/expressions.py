"""Vectors that are computed: sums and weighted means of query vectors, and text(column), embedded in batches.

Assumes: a sum is made once per query, before anything is read, and has unit length again; a column's values are
embedded while DuckDB asks for them, each distinct one once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from sqlglot import exp

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.parse import shown
from conjoin.pipeline.query.scalar import Function

if TYPE_CHECKING:
    from conjoin.pipeline.query.vectors import QueryVectors
    from conjoin.pipeline.store import VectorColumn

Kind = Literal["text", "image", "audio", "id", "values", "sum"]
Leaf = Callable[[exp.Expr], tuple[Kind, object]]


@dataclass(frozen=True, slots=True)
class Term:
    """weight times a query vector; kind and value as in Wanted."""

    weight: float
    kind: Kind
    value: object


@dataclass(frozen=True, slots=True)
class EmbeddedColumn:
    """text(x) of a column's values. name: of its function in DuckDB; column: whose encoder embeds them."""

    name: str
    kind: Kind
    column: VectorColumn
    _known: dict[str, np.ndarray | None] = field(default_factory=dict, compare=False, repr=False)

    def stub(self) -> Function:
        """Of the same type; for a check against empty tables."""
        return Function(self.name, ("VARCHAR",), self._array, lambda values: pa.nulls(len(values), self._type))

    def function(self, vectors: QueryVectors) -> Function:
        """Null for null and for what has nothing to embed. Raises QueryError for what cannot be embedded."""

        def body(values: pa.Array | pa.ChunkedArray) -> pa.Array:
            found_ND, there_N = self.vectors_of(values.to_pylist(), vectors)
            flat = pa.array(found_ND.reshape(-1))
            return pa.FixedSizeListArray.from_arrays(flat, self.column.dim, mask=pa.array(~there_N))

        return Function(self.name, ("VARCHAR",), self._array, body)

    def vectors_of(self, values: list[str | None], vectors: QueryVectors) -> tuple[np.ndarray, np.ndarray]:
        """((N, D) float32 unit vectors, zeros where there is none; (N,) where there is one)."""
        fresh = [value for value in dict.fromkeys(values) if value is not None and value not in self._known]
        if fresh:
            self._known.update(zip(fresh, vectors.embed_many(self.kind, fresh, self.column), strict=True))
        found_ND = np.zeros((len(values), self.column.dim), np.float32)
        there_N = np.zeros(len(values), bool)
        for row, value in enumerate(values):
            vector = self._known.get(value) if value is not None else None
            if vector is not None:
                found_ND[row], there_N[row] = vector, True
        return found_ND, there_N

    @property
    def _array(self) -> str:
        return f"FLOAT[{self.column.dim}]"

    @property
    def _type(self) -> pa.DataType:
        return pa.list_(pa.float32(), self.column.dim)


def is_arithmetic(node: exp.Expr) -> bool:
    return isinstance(node.unnest(), exp.Add | exp.Sub | exp.Mul | exp.Div | exp.Neg)


def terms_of(node: exp.Expr, leaf: Leaf, bound: Mapping[str, object], taken: set[str]) -> tuple[Term, ...]:
    """`0.7 * text('a') - vector_of(3) / 2` as weighted vectors. leaf: kind and value of a single one.

    Raises QueryError where two vectors are multiplied or a number is added to one.
    """

    def walk(node: exp.Expr, weight: float) -> list[Term]:
        node = node.unnest()
        if isinstance(node, exp.Add | exp.Sub):
            sign = 1.0 if isinstance(node, exp.Add) else -1.0
            return [*walk(node.this, weight), *walk(node.expression, sign * weight)]
        if isinstance(node, exp.Neg):
            return walk(node.this, -weight)
        if isinstance(node, exp.Mul):
            left, right = number(node.this), number(node.expression)
            if (left is None) != (right is None):
                vector = node.expression if right is None else node.this
                return walk(vector, weight * (left if left is not None else right or 0.0))
        if isinstance(node, exp.Div) and (divisor := number(node.expression)) is not None:
            if divisor == 0:
                raise QueryError(f"{shown(node)} divides by zero")
            return walk(node.this, weight / divisor)
        if isinstance(node, exp.Mul | exp.Div) or number(node) is not None:
            raise QueryError(f"{shown(node)} is not a vector", next=_ARITHMETIC)
        return [Term(weight, *leaf(node))]

    def number(node: exp.Expr) -> float | None:
        node = node.unnest()
        if isinstance(node, exp.Neg):
            inner = number(node.this)
            return None if inner is None else -inner
        if isinstance(node, exp.Literal) and not node.is_string:
            return float(node.this)
        if isinstance(node, exp.Placeholder):
            value = bound.get(node.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                taken.add(node.name)
                return float(value)
            return None
        if isinstance(node, exp.Add | exp.Sub | exp.Mul | exp.Div):
            left, right = number(node.this), number(node.expression)
            if left is None or right is None or (isinstance(node, exp.Div) and right == 0):
                return None
            operations = {exp.Add: left + right, exp.Sub: left - right, exp.Mul: left * right}
            return operations[type(node)] if type(node) in operations else left / right
        return None

    return tuple(walk(node, 1.0))


_ARITHMETIC = "Vectors are added, subtracted, and multiplied or divided by numbers: 0.7 * text('a') + 0.3 * text('b')"


def combined(terms: tuple[Term, ...], make: Callable[[Term], np.ndarray], column: VectorColumn) -> np.ndarray:
    """(D,) float32 of unit length: the weighted sum's direction. Raises QueryError where the terms cancel out."""
    total_D = np.zeros(column.dim, np.float64)
    for term in terms:
        total_D += term.weight * make(term).astype(np.float64)
    size = sum(abs(term.weight) for term in terms)
    norm = float(np.linalg.norm(total_D))
    if not np.isfinite(norm):
        raise QueryError(f"the sum of vectors for {column.name} is not finite")
    if norm <= 1e-6 * max(size, 1e-300):
        raise QueryError(f"the vectors added for {column.name} cancel out: their sum has no direction")
    return np.asarray(total_D / norm, dtype=np.float32)
