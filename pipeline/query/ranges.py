"""Conditions such as `distance(column, vector) < 0.3`: only rows within a radius of one vector are read.

Assumes: DuckDB evaluates the condition itself once more, so a radius may be a little too large, never too small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sqlglot import exp

from conjoin.pipeline.query.analysis import Reference
from conjoin.pipeline.query.functions import Measure

_UPPER: Mapping[type[exp.Expr], bool] = {exp.LT: True, exp.LTE: True, exp.GT: False, exp.GTE: False}
_COSINE = "array_cosine_distance"


@dataclass(frozen=True, slots=True)
class Within:
    """Rows whose cosine distance from one vector is at most radius."""

    measure: Measure
    radius: float


class Measured(Protocol):
    """What stands for `distance(...)` or `similarity(...)`."""

    @property
    def similarity(self) -> bool: ...


M = TypeVar("M", bound=Measured)


def find_within(parts: Sequence[exp.Expr], measures: Mapping[int, Measure], reference: Reference) -> list[Within]:
    """The ranges among the conjuncts of a reference's WHERE, the narrowest first."""
    bounds = [bound for part in parts if (bound := bound_of(part, measures))]
    found = [Within(measure, radius) for measure, radius in bounds if measure.reference is reference]
    return sorted(found, key=lambda within: within.radius)


def bound_of(part: exp.Expr, measures: Mapping[int, M]) -> tuple[M, float] | None:
    """The measure that a condition bounds from above, and the radius as a cosine distance."""
    part = part.unnest()
    if isinstance(part, exp.Between):
        low, high = _number(part.args["low"]), _number(part.args["high"])
        return _bounded(part.this, measures, upper=high, lower=low)
    if type(part) not in _UPPER:
        return None
    upper = _UPPER[type(part)]
    left, right = part.this.unnest(), part.expression.unnest()
    if _number(left) is not None:
        left, right, upper = right, left, not upper
    bound = _number(right)
    return _bounded(left, measures, upper=bound if upper else None, lower=None if upper else bound)


def _bounded(
    node: exp.Expr, measures: Mapping[int, M], *, upper: float | None, lower: float | None
) -> tuple[M, float] | None:
    node = node.unnest()
    measure = measures.get(id(node))
    if measure is None:
        return None
    computed = node.expression.unnest() if measure.similarity and isinstance(node, exp.Sub) else node
    if not isinstance(computed, exp.Anonymous) or computed.name.lower() != _COSINE:
        return None  # another metric, or a calibrated similarity
    if measure.similarity:
        return None if lower is None else (measure, 1.0 - lower)
    return None if upper is None else (measure, upper)


def _number(node: exp.Expr) -> float | None:
    node = node.unnest()
    sign, digits = (-1.0, node.this.unnest()) if isinstance(node, exp.Neg) else (1.0, node)
    if not isinstance(digits, exp.Literal) or digits.is_string:
        return None
    try:
        return sign * float(digits.this)
    except ValueError:
        return None
