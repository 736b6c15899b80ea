"""From a resolved query to what is read from Lance: a scan per table, or the nearest candidates for a top-k.

Assumes: whatever is read, DuckDB evaluates the whole query on it (but the plainest search, ranked.py): filters that are
pushed down are evaluated again, and ORDER BY and LIMIT see exact distances. So a plan decides speed, and a top-k plan
must deliver enough candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
from sqlglot import exp

from conjoin.pipeline.query.analysis import Analysis, Reference
from conjoin.pipeline.query.filters import conjuncts, translate
from conjoin.pipeline.query.functions import Measure, Rewritten
from conjoin.pipeline.query.growth import Growth, unstable
from conjoin.pipeline.query.keys import KeySet, find_keys, owns
from conjoin.pipeline.query.parse import shown
from conjoin.pipeline.query.ranges import Within, find_within

if TYPE_CHECKING:
    from conjoin.pipeline.query.neighbours import Near

# A top-k beyond this is answered by a scan: candidates would be most of a table.
LARGEST_K = 5_000


@dataclass(frozen=True, slots=True)
class TopK:
    """Nearest rows for one vector. need: LIMIT + OFFSET; ties: further sort keys follow the distance."""

    measure: Measure
    need: int
    ties: bool


@dataclass(frozen=True, slots=True)
class Read:
    """What one reference reads. filter: pushed into Lance; kept: conditions that only DuckDB evaluates, as text.

    One of top (the nearest rows alone answer), growth (some of them may drop out again), within (a range) and near (the
    same for many vectors) leads to a search, none of them to a scan; reason: why, in plain words. keys: semi-joins that
    may narrow growth, range or scan.
    """

    reference: Reference
    columns: tuple[str, ...]
    filter: str | None
    kept: tuple[str, ...]
    top: TopK | None
    reason: str
    growth: Growth | None = None
    within: Within | None = None
    keys: tuple[KeySet, ...] = ()
    near: Near | None = None

    @property
    def measure(self) -> Measure | None:
        """What a search goes by."""
        led = self.top or self.growth or self.within
        return led.measure if led else None

    @property
    def order(self) -> tuple[Measure, int] | None:
        """The distance that sorts the SELECT, and its LIMIT + OFFSET; None for a range or a scan."""
        led = self.top or self.growth
        return (led.measure, led.need) if led else None


def plan_reads(analysis: Analysis, rewritten: Rewritten) -> tuple[Read, ...]:
    """One Read per table reference; frames are given whole."""
    return tuple(_plan(analysis, rewritten, reference) for reference in analysis.references.values())


def _plan(analysis: Analysis, rewritten: Rewritten, reference: Reference) -> Read:
    columns = tuple(name for name in reference.relation.schema.names if name in reference.columns)
    columns = columns or (_cheapest(reference.relation.schema),)
    if reference.relation.dataset is None:
        reason = f"files of {reference.relation.uri}" if reference.relation.uri else "a frame given by name"
        return Read(reference, columns, None, (), None, reason)
    pushed, kept = split(analysis, reference)
    text = " AND ".join(pushed) or None
    words = tuple(shown(node) for node in kept)
    top, reason = _top(rewritten, reference, kept)
    if top is not None or not isinstance(reference.scope.expression, exp.Select) or not pushable(reference):
        return Read(reference, columns, text, words, top, reason)
    keys = tuple(find_keys(analysis, reference, lambda column: _own_column(analysis, reference, column), kept))
    ranges = find_within(kept, rewritten.measures, reference)
    growth = _growth(analysis, rewritten, reference, ranges)
    if growth is not None:
        return Read(reference, columns, text, words, None, _causes(growth.select, kept), growth, None, keys)
    within = ranges[0] if ranges else None
    reason = f"rows within {within.radius:g} of one vector" if within else reason
    return Read(reference, columns, text, words, None, reason, None, within, keys)


def _growth(analysis: Analysis, rewritten: Rewritten, reference: Reference, ranges: Sequence[Within]) -> Growth | None:
    """A top-k some of whose rows may drop out, None if it is none."""
    select = reference.scope.expression
    measure = _first_key(select, rewritten) if isinstance(select, exp.Select) else None
    limit, offset = count_of(select.args.get("limit")), count_of(select.args.get("offset"), missing=0)
    if (
        not isinstance(select, exp.Select)
        or measure is None
        or measure.reference is not reference
        or limit is None
        or offset is None
    ):
        return None
    if limit + offset > LARGEST_K or unstable(analysis, rewritten, select, measure):
        return None
    radii = [found.radius for found in ranges if found.measure.wanted.name == measure.wanted.name]
    ties = len(select.args["order"].expressions) > 1
    return Growth(select, measure, limit + offset, ties, min(radii, default=math.inf))


_DROPPING = {"joins": "tables are joined", "distinct": "DISTINCT", "qualify": "QUALIFY"}


def _causes(select: exp.Select, kept: Sequence[exp.Expr]) -> str:
    """Why nearest rows may drop out."""
    causes = [words for clause, words in _DROPPING.items() if select.args.get(clause)]
    causes += [f"only DuckDB can evaluate {shown(kept[0])}"] if kept else []
    return "; ".join(causes) or "not every row may be shown"


def _cheapest(schema: pa.Schema) -> str:
    """Something to count rows by."""
    flat = [f for f in schema if not pa.types.is_nested(f.type) and not pa.types.is_binary(f.type)]
    return flat[0].name if flat else schema.names[0]


def split(analysis: Analysis, reference: Reference) -> tuple[list[str], list[exp.Expr]]:
    """The conjuncts of the reference's own WHERE: translated ones as Lance filters, and the others."""
    select = reference.scope.expression
    where = select.args.get("where") if isinstance(select, exp.Select) else None
    parts = conjuncts(where.this if where else None)
    if not parts or not pushable(reference):
        return [], parts

    def resolve(column: exp.Column) -> tuple[str, pa.DataType] | None:
        return _own_column(analysis, reference, column)

    translated = [(part, translate(part, resolve)) for part in parts]
    return [text for _, text in translated if text], [part for part, text in translated if not text]


def pushable(reference: Reference) -> bool:
    """Whether a WHERE may be applied before the joins: not below an outer join's optional side, not below a sample."""
    select = reference.scope.expression
    if reference.node.args.get("sample") or select.args.get("sample") or reference.node.alias_column_names:
        return False
    joins = select.args.get("joins") or []
    sides = {(join.side.upper(), join.method.upper()) for join in joins}
    source = select.args.get("from_")
    if source is not None and source.this is reference.node:
        return sides <= {("", ""), ("LEFT", "")} and not reference.node.args.get("joins")
    own = reference.node.parent
    kinds = {join.kind.upper() for join in joins}
    return (
        isinstance(own, exp.Join) and own.parent is select and sides <= {("", "")} and kinds <= {"", "INNER", "CROSS"}
    )


def _own_column(analysis: Analysis, reference: Reference, column: exp.Column) -> tuple[str, pa.DataType] | None:
    dataset, name = reference.relation.dataset, reference.relation.column(column.name)
    if dataset is None or name is None or not owns(analysis, reference, column):
        return None
    return name, dataset.schema.field(name).type


def _top(rewritten: Rewritten, reference: Reference, kept: list[exp.Expr]) -> tuple[TopK | None, str]:
    select = reference.scope.expression
    if not isinstance(select, exp.Select):
        return None, "not a plain SELECT"
    why_not = obstacle(select, reference)
    if why_not:
        return None, why_not
    measure = _first_key(select, rewritten)
    if measure is None or measure.reference is not reference:
        return None, "ORDER BY does not start with the distance to one vector"
    if kept:
        return None, f"only DuckDB can evaluate {shown(kept[0])}"
    limit, offset = count_of(select.args.get("limit")), count_of(select.args.get("offset"), missing=0)
    if limit is None or offset is None:
        return None, "LIMIT is not a plain number"
    if limit + offset > LARGEST_K:
        return None, f"LIMIT + OFFSET is above {LARGEST_K}"
    return TopK(measure, limit + offset, len(select.args["order"].expressions) > 1), "nearest rows first, with a LIMIT"


_CLAUSES = {
    "joins": "tables are joined",
    "laterals": "tables are joined",
    "group": "rows are grouped",
    "having": "rows are grouped",
    "distinct": "DISTINCT",
    "qualify": "QUALIFY",
    "windows": "window functions",
    "sample": "a sample is drawn",
    "pivots": "PIVOT",
}


def obstacle(select: exp.Select, reference: Reference, passing: frozenset[int] = frozenset()) -> str:
    """Why the best rows alone cannot answer this SELECT; empty if they can. passing: ids of nodes not looked into."""
    for clause, words in _CLAUSES.items():
        if select.args.get(clause) or reference.node.args.get(clause):
            return words
    source = select.args.get("from_")
    if source is None or source.this is not reference.node or reference.node.alias_column_names:
        return "more than one plain table"
    if not select.args.get("order") or not select.args.get("limit"):
        return "no ORDER BY with LIMIT"
    for node in select.walk(prune=lambda node: isinstance(node, exp.With) or id(node) in passing):
        if isinstance(node, exp.AggFunc | exp.Window | exp.Unnest | exp.Explode | exp.Columns):
            return f"{type(node).__name__.lower()} needs every row"
        if isinstance(node, exp.Subquery | exp.Query) and node is not select:
            return "a subquery"
        per_row = node.meta.get("per_row") or node.name.lower() == "array_cosine_distance"
        if isinstance(node, exp.Anonymous) and not per_row:
            return f"{node.name}() may need every row"
    return ""


def _first_key(select: exp.Select, rewritten: Rewritten) -> Measure | None:
    """The measure that sorts first, nearest first."""
    key = sort_key(select)
    measure = rewritten.measures.get(id(key[0])) if key else None
    return measure if measure is not None and key is not None and key[1] == measure.similarity else None


def sort_key(select: exp.Select) -> tuple[exp.Expr, bool] | None:
    """What sorts first, through an alias or a position too, and whether it descends; None where nulls come first."""
    order = select.args.get("order")
    key = order.expressions[0] if order else None
    if not isinstance(key, exp.Ordered) or key.args.get("nulls_first") or key.args.get("with_fill"):
        return None
    node = key.this.unnest()
    if isinstance(node, exp.Literal) and not node.is_string and node.this.isdigit():
        position = int(node.this) - 1
        starred = any(output.is_star for output in select.expressions[: position + 1])
        node = select.expressions[position].unalias() if not starred and position < len(select.expressions) else node
    elif isinstance(node, exp.Column) and not node.table:
        named = [o for o in select.expressions if isinstance(o, exp.Alias) and o.alias.lower() == node.name.lower()]
        node = named[0].this if len(named) == 1 else node
    return node.unnest(), bool(key.args.get("desc"))


def count_of(node: exp.Expr | None, *, missing: int | None = None) -> int | None:
    """The number of a LIMIT or OFFSET, None if it is a percentage or an expression."""
    if node is None:
        return missing
    value = node.expression
    options = node.args.get("limit_options")
    if options is not None or not isinstance(value, exp.Literal) or value.is_string or not value.this.isdigit():
        return None
    return int(value.this)
