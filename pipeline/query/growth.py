"""Top-k queries whose nearest rows may drop out again (residual filters, joins, DISTINCT, QUALIFY): how many nearest
rows of the table they take is found by growing.

Assumes: the first rows of such a query depend on rows at most as far as they are. So once the outcome over the nearest
rows has LIMIT + OFFSET rows nearer than the farthest row read, more rows cannot change it.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlglot import exp

from conjoin.pipeline.query.analysis import Analysis
from conjoin.pipeline.query.functions import Measure, Rewritten
from conjoin.pipeline.query.parse import function_name
from conjoin.pipeline.query.questions import stands_alone

_RANKS = {"row_number", "rank", "dense_rank"}
_WHOLE = {
    "group": "rows are grouped",
    "having": "rows are grouped",
    "windows": "window functions",
    "sample": "a sample is drawn",
    "pivots": "PIVOT",
    "laterals": "LATERAL",
}
_MEASURE_FUNCTIONS = {"array_cosine_distance", "array_distance", "array_negative_inner_product"}


@dataclass(frozen=True, slots=True)
class Growth:
    """select: the query itself; need: LIMIT + OFFSET rows of its outcome; ties: further sort keys follow the distance;
    radius: no row farther than this can be in it."""

    select: exp.Select
    measure: Measure
    need: int
    ties: bool
    radius: float = float("inf")


def unstable(analysis: Analysis, rewritten: Rewritten, select: exp.Select, measure: Measure) -> str:
    """Why the first rows of a SELECT that sorts by a measure may depend on farther rows of the measured table; empty
    if they do not.
    """
    for clause, words in _WHOLE.items():
        if select.args.get(clause) or measure.reference.node.args.get(clause):
            return words
    for node in select.walk():
        own = node.find_ancestor(exp.Select) is select
        if isinstance(node, exp.Window) and own:
            if not _ranks_by(node, rewritten, measure, select):
                return f"{node.this.sql('duckdb')} OVER (...) needs every row"
        elif isinstance(node, exp.AggFunc) and _is_own_aggregate(analysis, node, select):
            return f"{function_name(node)}() needs every row"
        elif isinstance(node, exp.Unnest | exp.Explode | exp.Columns) and own:
            return f"{type(node).__name__.lower()} needs every row"
        elif isinstance(node, exp.Anonymous) and not _is_per_row(node):
            return f"{node.name}() may need every row"
    return "" if stands_alone(analysis, select) else "it depends on the query around it"


def _is_per_row(node: exp.Anonymous) -> bool:
    return bool(node.meta.get("per_row")) or node.name.lower() in _MEASURE_FUNCTIONS


def _is_own_aggregate(analysis: Analysis, node: exp.AggFunc, select: exp.Select) -> bool:
    """Whether an aggregate runs over the SELECT's own rows; in a subquery it does if its columns are from outside."""
    if isinstance(node.parent, exp.Window) and node.arg_key == "this" and function_name(node) in _RANKS:
        return False
    if node.find_ancestor(exp.Select) is select:
        return True
    origins = [analysis.origin(column) for column in node.find_all(exp.Column)]
    return any(origin is not None and origin[0].scope.expression is select for origin in origins)


def _ranks_by(node: exp.Window, rewritten: Rewritten, measure: Measure, select: exp.Select) -> bool:
    """row_number() and the like, nearest first by the same distance."""
    order = node.args.get("order")
    if function_name(node.this) not in _RANKS or order is None:
        return False
    found = _sorted_by(order.expressions[0], select, rewritten)
    same = found is not None and found.reference is measure.reference and found.column == measure.column
    return same and found is not None and found.wanted.name == measure.wanted.name


def _sorted_by(key: exp.Expr, select: exp.Select, rewritten: Rewritten) -> Measure | None:
    """The measure by which a window is sorted first, nearest first; a number is a constant there, not a position."""
    if not isinstance(key, exp.Ordered) or key.args.get("nulls_first") or key.args.get("with_fill"):
        return None
    node = key.this.unnest()
    if isinstance(node, exp.Column) and not node.table:
        named = [o for o in select.expressions if isinstance(o, exp.Alias) and o.alias.lower() == node.name.lower()]
        node = named[0].this.unnest() if len(named) == 1 else node
    measure = rewritten.measures.get(id(node))
    return measure if measure is not None and bool(key.args.get("desc")) == measure.similarity else None
