"""A cross join of large tables is refused before it starts, with an estimate of what it would cost.

Assumes: tables that an equality joins, or whose neighbours are searched for (neighbours.py), do not multiply; a plain
LIMIT without an order ends a cross join early. A LATERAL subquery that looks at the rows beside it multiplies with them
whatever its LIMIT. Sizes of other subqueries and table functions are not known and count as one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pyarrow as pa
from sqlglot import exp

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.analysis import Analysis, Reference
from conjoin.pipeline.query.filters import conjuncts
from conjoin.pipeline.query.functions import Rewritten
from conjoin.pipeline.query.planner import Read

_MOST_PAIRS = 2e10  # some minutes of a count
_MOST_DISTANCES = 2e9  # the same where a distance is computed for each pair
_PAIRS_PER_S, _DISTANCES_PER_S = 2e8, 5e6  # of two cores


def check_crossings(analysis: Analysis, rewritten: Rewritten, reads: Sequence[Read]) -> None:
    """Raises QueryError for a SELECT whose FROM multiplies to more pairs than anybody waits for."""
    by_reference = {id(read.reference): read for read in reads}
    for scope in analysis.scopes:
        select = scope.expression
        if not isinstance(select, exp.Select) or not select.args.get("joins"):
            continue
        given = {alias: source for alias, source in analysis.sources(scope).items() if isinstance(source, Reference)}
        inner = _correlated(analysis, select)
        if _ends_early(select) and not any(inner.values()):
            continue
        given = {alias: source for sources in inner.values() for alias, source in sources.items()} | given
        own = {
            alias: by_reference[id(source)] for alias, source in given.items() if by_reference[id(source)].near is None
        }
        groups = _groups([select, *inner], given)
        with_distance = any(id(node) in rewritten.pairs for node in select.find_all(exp.Anonymous, exp.Sub))
        most, rate = (_MOST_DISTANCES, _DISTANCES_PER_S) if with_distance else (_MOST_PAIRS, _PAIRS_PER_S)
        if math.prod(_largest(own, groups, filtered=False)) <= most:
            continue
        sizes = _largest(own, groups, filtered=True)
        pairs = math.prod(sizes)
        if pairs > most:
            names, product = ", ".join(sorted(own)), " x ".join(f"{size:,}" for size in sizes if size > 1)
            advice = "Join them on a column, bound their distance, or add a LIMIT without ORDER BY"
            if any(inner.values()):
                advice = "Narrow either side with WHERE, or leave out the condition on the rows beside the subquery"
            raise QueryError(
                f"{names}: {product} rows make {pairs:.1g} pairs, {_duration(pairs / rate)} on two cores", next=advice
            )


def _ends_early(select: exp.Select) -> bool:
    """LIMIT rows are enough, whichever."""
    others = ("order", "group", "having", "distinct", "qualify", "windows")
    plain = not any(select.args.get(clause) for clause in others) and select.find(exp.AggFunc, exp.Window) is None
    return plain and select.args.get("limit") is not None


def _correlated(analysis: Analysis, select: exp.Select) -> dict[exp.Select, dict[str, Reference]]:
    """The subqueries joined to it that look at the rows beside them, with their tables by alias."""
    joined = [id(join.this.find(exp.Select)) for join in select.args["joins"]]
    return {
        scope.expression: {
            alias: source for alias, source in analysis.sources(scope).items() if isinstance(source, Reference)
        }
        for scope in analysis.scopes
        if isinstance(scope.expression, exp.Select) and id(scope.expression) in joined and scope.external_columns
    }


def _groups(selects: Sequence[exp.Select], given: Mapping[str, Reference]) -> dict[str, str]:
    """One name for all aliases that equalities join."""
    leader = {alias: alias for alias in given}

    def join(aliases: Sequence[str]) -> None:
        names = {leader[alias] for alias in aliases if alias in leader}
        for alias, name in leader.items():
            if name in names:
                leader[alias] = min(names)

    parts: list[exp.Expr] = []
    for select in selects:
        where = select.args.get("where")
        parts += conjuncts(where.this if where else None)
        for clause in select.args.get("joins") or []:
            parts += conjuncts(clause.args.get("on"))
            if clause.args.get("using") or clause.method:
                join(list(given))
    for part in parts:
        if isinstance(part.unnest(), exp.EQ | exp.NullSafeEQ):
            join([alias for column in part.find_all(exp.Column) for alias in _aliases(column, given)])
    return leader


def _aliases(column: exp.Column, given: Mapping[str, Reference]) -> list[str]:
    if column.table:
        return [column.table.lower()]
    return [alias for alias, source in given.items() if source.relation.column(column.name) is not None]


def _largest(own: Mapping[str, Read], groups: Mapping[str, str], *, filtered: bool) -> list[int]:
    """Rows of the largest table of each group."""
    sizes: dict[str, int] = {}
    for alias, read in own.items():
        sizes[groups[alias]] = max(sizes.get(groups[alias], 1), _rows(read, filtered=filtered))
    return list(sizes.values())


def _rows(read: Read, *, filtered: bool) -> int:
    relation = read.reference.relation
    if relation.dataset is not None:
        return relation.count(read.filter if filtered else None)
    return relation.frame.num_rows if isinstance(relation.frame, pa.Table) else 1


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:,.0f} {unit}"
    return f"about {seconds:,.0f} seconds"
