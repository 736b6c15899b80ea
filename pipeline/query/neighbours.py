"""Rows near to rows: which table of a query is read only where it is near to vectors that the rest of it gives.

Two shapes are found: a LATERAL (or correlated) subquery with the nearest k of each, and a join on
`distance(a.vec, b.vec) < r`. Their vectors are gathered first and searched for together (pairs.py); DuckDB then sees
the found rows with a column more that says which vector each is near to, and evaluates everything once more.

Assumes: the rows that a search leaves out would not be in the answer; a condition that could drop a found row (but one
that drops at most one for each vector, `b.id <> a.id`) leaves the table to DuckDB alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from sqlglot import exp

from conjoin.pipeline.query.analysis import Analysis, Reference
from conjoin.pipeline.query.filters import conjuncts
from conjoin.pipeline.query.functions import Pair, Rewritten
from conjoin.pipeline.query.keys import rows_of
from conjoin.pipeline.query.pairs import KEY
from conjoin.pipeline.query.parse import DIALECT
from conjoin.pipeline.query.planner import LARGEST_K, Read, count_of, obstacle, pushable, sort_key, split
from conjoin.pipeline.query.questions import Question, question, stands_alone
from conjoin.pipeline.query.ranges import bound_of


@dataclass(frozen=True, slots=True)
class Near:
    """need: rows for each vector, 0 for a radius; ties: further sort keys follow; both: so many may drop out again.

    select, join: where the vectors come from: the whole FROM before that join, or only `source`, a table of it.
    """

    pair: Pair
    need: int
    radius: float
    ties: bool
    select: exp.Select
    join: exp.Join | None
    source: Reference | None
    analysis: Analysis

    @property
    def beside(self) -> Reference | None:
        """The table whose vectors are looked for, None where a value is embedded."""
        return self.pair.other[0] if self.pair.other is not None else None

    @property
    def id_column(self) -> str | None:
        return self.beside.relation.column("id") if self.beside is not None else None

    @property
    def key(self) -> exp.Expr:
        """What tells the vectors apart: the id of their row, without ids they themselves, or what is embedded."""
        if self.beside is not None and self.id_column is not None:
            return exp.column(self.id_column, table=self.beside.alias, quoted=True)
        if self.pair.other is not None:
            reference, name = self.pair.other
            array = exp.DataType.build(f"FLOAT[{self.pair.column.dim}]", dialect=DIALECT)
            return exp.cast(exp.column(name, table=reference.alias, quoted=True), array)
        assert self.pair.embedded is not None
        return self.pair.embedded[1].copy()

    @property
    def key_field(self) -> pa.Field:
        kind: pa.DataType = pa.string()
        if self.beside is not None:
            kind = pa.list_(pa.float32(), self.pair.column.dim)
        if self.beside is not None and self.id_column is not None:
            kind = self.beside.relation.schema.field(self.id_column).type
        return pa.field(KEY, kind)

    @property
    def reason(self) -> str:
        """In plain words."""
        what = f"the {self.need:,} nearest to each" if self.need else f"rows within {self.radius:g} of each"
        if self.pair.other is not None:
            return f"{what} {self.pair.other[1]} of {self.pair.other[0].alias}, all at once"
        assert self.pair.embedded is not None
        return f"{what} value of {self.pair.embedded[1].sql(DIALECT)}, all at once"

    def question(self) -> Question:
        """The distinct keys, and the vectors of other rows; after the tables have their names inside DuckDB."""
        outputs = [exp.alias_(self.key, KEY, quoted=True)]
        if self.pair.other is not None:
            reference, name = self.pair.other
            array = exp.DataType.build(f"FLOAT[{self.pair.column.dim}]", dialect=DIALECT)
            vector = exp.cast(exp.column(name, table=reference.alias, quoted=True), array)
            outputs.append(exp.alias_(vector, "__vector"))
        if self.source is not None:
            return question(rows_of(self.analysis, self.source).select(*outputs, append=False).distinct())
        found = exp.select(*outputs).distinct()
        for part in ("with_", "from_"):
            if (given := self.select.args.get(part)) is not None:
                found.set(part, given.copy())
        before = self.select.args["joins"][: self.select.args["joins"].index(self.join)]
        found.set("joins", [join.copy() for join in before])
        return question(found)


def with_neighbours(analysis: Analysis, rewritten: Rewritten, reads: Sequence[Read]) -> dict[str, Near]:
    """By the name of the table; adds to the tree the condition that ties a found row to its vector."""
    found: dict[str, Near] = {}
    if not rewritten.pairs:
        return found
    for read in reads:
        reference = read.reference
        if read.measure is not None or reference.relation.dataset is None:
            continue
        planned = _nearest(analysis, rewritten, reference) or _within(analysis, rewritten, reference)
        if planned is None or any(near.pair.reference is planned[0].beside for near in found.values()):
            continue
        near, place = planned
        if not _expand_stars(analysis, reference):
            continue
        column = exp.column(KEY, table=reference.alias, quoted=True)
        _add(place, exp.NullSafeEQ(this=column, expression=near.key))
        found[reference.name] = near
    return found


def _nearest(analysis: Analysis, rewritten: Rewritten, reference: Reference) -> tuple[Near, exp.Expr] | None:
    """A subquery beside its vectors that sorts by their distance; and where its condition goes."""
    select = reference.scope.expression
    key = sort_key(select) if isinstance(select, exp.Select) else None
    if key is None or not isinstance(select, exp.Select) or obstacle(select, reference) or not pushable(reference):
        return None
    pair = next((p for p in rewritten.pairs.get(id(key[0]), ()) if p.reference is reference), None)
    limit, offset = count_of(select.args.get("limit")), count_of(select.args.get("offset"), missing=0)
    if pair is None or key[1] != pair.similarity or limit is None or offset is None:
        return None
    dropping = split(analysis, reference)[1]
    if not all(_drops_one(part, reference) for part in dropping) or limit + offset + len(dropping) > LARGEST_K:
        return None
    outer = _beside(select)
    if outer is None or outer[1].side.upper() not in ("", "LEFT"):
        return None
    above, join = outer
    if not (above is analysis.tree or stands_alone(analysis, above)) or not _given_before(pair, above, join, reference):
        return None
    ties = len(select.args["order"].expressions) > 1
    need = limit + offset + len(dropping)
    return Near(pair, max(need, 1), math.inf, ties, above, join, None, analysis), select


def _beside(select: exp.Select) -> tuple[exp.Select, exp.Join] | None:
    """The SELECT that a subquery is joined in."""
    node = select.parent
    while isinstance(node, exp.Subquery | exp.Lateral):
        node = node.parent
    return (node.parent, node) if isinstance(node, exp.Join) and isinstance(node.parent, exp.Select) else None


def _given_before(pair: Pair, above: exp.Select, join: exp.Join, reference: Reference) -> bool:
    """Whether the vectors come from what stands before the join in the same FROM."""
    joins = above.args["joins"]
    before = [above.args["from_"].this, *(j.this for j in joins[: joins.index(join)])]
    names = {node.alias_or_name.lower() for node in before}
    if pair.other is not None:
        return pair.other[0].scope.expression is above and pair.other[0].alias.lower() in names
    assert pair.embedded is not None
    value = pair.embedded[1]
    columns = list(value.find_all(exp.Column))
    if value.find(exp.Query, exp.Placeholder):
        return False
    return all(c.table.lower() in names if c.table else reference.relation.column(c.name) is None for c in columns)


def _drops_one(part: exp.Expr, reference: Reference) -> bool:
    """`b.id <> a.id`: at most one row of b is not wanted for each a."""
    part = part.unnest()
    if not isinstance(part, exp.NEQ):
        return False
    alias = reference.alias.lower()
    for here, there in ((part.this, part.expression), (part.expression, part.this)):
        own = isinstance(here, exp.Column) and (here.table.lower(), here.name.lower()) == (alias, "id")
        if own and isinstance(there, exp.Column) and there.table.lower() not in ("", alias):
            return True
    return False


def _within(analysis: Analysis, rewritten: Rewritten, reference: Reference) -> tuple[Near, exp.Expr] | None:
    """A table joined to those vectors of another that lie within a radius; and where its condition goes."""
    select = reference.scope.expression
    if not isinstance(select, exp.Select) or select.args.get("sample") or reference.node.args.get("sample"):
        return None
    first: Mapping[int, Pair] = {at: pairs[0] for at, pairs in rewritten.pairs.items()}
    for part, place in _conditions(select, reference):
        bound = bound_of(part, first)
        if bound is None:
            continue
        pairs = rewritten.pairs[next(at for at, pair in first.items() if pair is bound[0])]
        for pair in pairs:
            source = _source(analysis, pair, reference)
            if source is None or pair.reference is not reference or reference.node.alias_column_names:
                continue
            if not _other_is_larger(reference, source):
                return Near(pair, 0, bound[1], False, select, None, source, analysis), place
    return None


def _conditions(select: exp.Select, reference: Reference) -> list[tuple[exp.Expr, exp.Expr]]:
    """Conjuncts that every joined row of the reference fulfils, with the clause that each stands in."""
    joins = select.args.get("joins") or []
    found: list[tuple[exp.Expr, exp.Expr]] = []
    own = next((join for join in joins if join.this is reference.node), None)
    if own is not None and own.side.upper() in ("", "LEFT") and own.kind.upper() in ("", "INNER"):
        found += [(part, own) for part in conjuncts(own.args.get("on"))]
    if pushable(reference) and all(not join.side and join.kind.upper() in ("", "INNER", "CROSS") for join in joins):
        where = select.args.get("where")
        found += [(part, select) for part in conjuncts(where.this if where else None)]
        others = [join for join in joins if join is not own]
        found += [(part, select) for join in others for part in conjuncts(join.args.get("on"))]
    return found


def _source(analysis: Analysis, pair: Pair, reference: Reference) -> Reference | None:
    """The one table beside the reference whose rows give the vectors."""
    if pair.other is not None:
        other = pair.other[0]
        return other if other is not reference and other.scope is reference.scope else None
    assert pair.embedded is not None
    value = pair.embedded[1]
    sources = {c.table.lower() for c in value.find_all(exp.Column)}
    found = analysis.sources(reference.scope).get(next(iter(sources))) if len(sources) == 1 else None
    usable = isinstance(found, Reference) and found is not reference and not value.find(exp.Query, exp.Placeholder)
    return found if usable and isinstance(found, Reference) else None


def _other_is_larger(reference: Reference, source: Reference) -> bool:
    """Of two tables that can be searched the larger one is; of equals the later one."""
    if source.relation.dataset is None or not pushable(source):
        return False
    sizes = source.relation.count(), reference.relation.count()
    return sizes[0] > sizes[1] or (sizes[0] == sizes[1] and source.name > reference.name)


def _add(place: exp.Expr, condition: exp.Expr) -> None:
    if isinstance(place, exp.Select):
        place.where(condition, copy=False)
    elif isinstance(place, exp.Join):
        place.on(condition, copy=False)


def _expand_stars(analysis: Analysis, reference: Reference) -> bool:
    """`*` and `b.*` become the columns that the user knows; False where that cannot be done."""
    select = reference.scope.expression
    stars = [output for output in select.expressions if output.is_star]
    if not stars:
        return True
    if any(join.args.get("using") or join.method for join in select.args.get("joins") or []):
        return False
    sources = analysis.sources(reference.scope)
    outputs: list[exp.Expr] = []
    for output in select.expressions:
        if not output.is_star:
            outputs.append(output)
            continue
        star = output if isinstance(output, exp.Star) else output.this
        aliases = [output.table.lower()] if isinstance(output, exp.Column) else list(sources)
        plain = [s for alias in aliases if isinstance(s := sources.get(alias), Reference)]
        if len(plain) != len(aliases) or any(star.args.get(part) for part in ("except_", "replace", "rename")):
            return False
        outputs += [exp.column(n, table=s.alias, quoted=True) for s in plain for n in s.relation.schema.names]
    select.set("expressions", outputs)
    return True
