"""relevance(): a similarity as a probability, by the curve that the encoder's calibration keeps for two modalities.

Assumes: curves rise, so that the most relevant rows are the nearest; a calibration belongs to one fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sqlglot import exp

from conjoin.pipeline import calibration
from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.analysis import Analysis
from conjoin.pipeline.query.functions import Measure, Rewritten, name_outputs
from conjoin.pipeline.query.parse import function_name, shown
from conjoin.pipeline.store import VectorColumn

_MADE_BY = {"text": "text", "image": "image", "audio": "audio"}


@dataclass(frozen=True, slots=True)
class Expanded:
    """A relevance() that now is a curve over a similarity; node: without parentheses."""

    node: exp.Expr
    alone: bool


def expand(analysis: Analysis) -> tuple[Expanded, ...]:
    """Replace every relevance(column, vector) in the tree by its curve over similarity(column, vector).

    Raises QueryError where the encoder is not calibrated for the two modalities.
    """
    nodes = [node for node in analysis.tree.find_all(exp.Anonymous) if function_name(node) == "relevance"]
    name_outputs(nodes)
    return tuple(_expand(analysis, node) for node in nodes)


def measured(rewritten: Rewritten, found: Sequence[Expanded]) -> Rewritten:
    """With the measures of the similarities under their curves' names too, so that nearest rows answer their order.

    Not where further sort keys follow: far above the curve all relevances are 1, which is a tie that distances break.
    """
    more: dict[int, Measure] = {}
    for expanded in found:
        inner = (rewritten.measures.get(id(node)) for node in expanded.node.walk())
        if expanded.alone and (measure := next((m for m in inner if m), None)):
            more[id(expanded.node)] = measure
    return replace(rewritten, measures={**rewritten.measures, **more})


def _expand(analysis: Analysis, node: exp.Anonymous) -> Expanded:
    where = shown(node)
    if len(node.expressions) != 2:
        raise QueryError("relevance() takes a vector column and a vector", where=where)
    sides = [argument.unnest() for argument in node.expressions]
    column = next((found for side in sides if (found := _vector(analysis, side))), None)
    if column is None:
        raise QueryError("relevance() needs a vector column", where=where)
    other = sides[1] if _vector(analysis, sides[0]) else sides[0]
    curve = _curve(column, _modality(analysis, other, column, where))
    select = node.find_ancestor(exp.Select)
    order = select.args.get("order") if select is not None else None
    similarity = exp.Anonymous(this="similarity", expressions=[argument.pop() for argument in list(node.expressions)])
    power = exp.Sub(this=_double(-curve.bias), expression=exp.Mul(this=_double(curve.slope), expression=similarity))
    divisor = exp.Paren(this=exp.Add(this=_double(1), expression=exp.Exp(this=power)))
    made = exp.Div(this=_double(1), expression=divisor)
    node.replace(exp.Paren(this=made))
    return Expanded(made, order is None or len(order.expressions) == 1)


def _curve(column: VectorColumn, modality: str) -> calibration.Curve:
    if not column.encoder:
        raise QueryError(f"{column.name} does not say where its encoder is kept, and so not its calibration")
    curves: Mapping[str, calibration.Curve] = calibration.read(column.encoder, column.fingerprint)
    name = calibration.pair_name(column.modality, modality)
    if name in curves:
        return curves[name]
    advice = "Run `conjoin evaluate --calibrate` with the run file; similarity() and distance() need no calibration"
    if curves and column.modality == modality:
        advice = "It needs several values of one modality in a group (source.group in the run file)"
    what = f"relevance() of {column.modality} and {modality} is not calibrated"
    raise QueryError(what, where=column.encoder, next=advice)


def _vector(analysis: Analysis, node: exp.Expr) -> VectorColumn | None:
    origin = analysis.origin(node) if isinstance(node, exp.Column) else None
    return origin[0].relation.vectors.get(origin[1]) if origin else None


def _modality(analysis: Analysis, node: exp.Expr, column: VectorColumn, where: str) -> str:
    """Of what the column is compared with, whatever arithmetic it is made by."""
    found = {other.modality for part in node.find_all(exp.Column) if (other := _vector(analysis, part))}
    for part in node.find_all(exp.Anonymous):
        name = function_name(part)
        found |= {_MADE_BY[name]} if name in _MADE_BY else {column.modality} if name == "vector_of" else set()
    if len(found) != 1:
        kinds = " and ".join(sorted(found)) or "numbers"
        advice = "Compare with text('...'), image('...'), vector_of(id) or a column; or use similarity()"
        raise QueryError(f"relevance() cannot be told for a vector of {kinds}", where=where, next=advice)
    return found.pop()


def _double(value: float) -> exp.Expr:
    """With an exponent, so that DuckDB computes in doubles and not in decimals."""
    number = exp.Literal.number(f"{abs(value):.17e}")
    return exp.Neg(this=number) if value < 0 else number
