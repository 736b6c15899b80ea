"""Questions that a plan asks DuckDB on the way to the answer: how near an outcome is, which keys a table has.

Assumes: they are built from the tree after its tables got their names inside DuckDB, and see the same sources as the
answer itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlglot import exp

from conjoin.pipeline.query.analysis import Analysis, Reference
from conjoin.pipeline.query.functions import Measure
from conjoin.pipeline.query.parse import DIALECT

_DISTANCE = "__distance"


@dataclass(frozen=True, slots=True)
class Question:
    """SQL for DuckDB. tables: names that it reads; parameters: names whose values it needs."""

    sql: str
    tables: frozenset[str]
    parameters: frozenset[str]


def outcome(select: exp.Select, measure: Measure, need: int) -> Question:
    """The cosine distances of the first `need` rows of a SELECT that sorts by a measure, without its OFFSET."""
    inner = select.copy()
    column = exp.column(measure.column.name, table=measure.reference.alias, quoted=True)
    array = exp.DataType.build(f"FLOAT[{measure.column.dim}]", dialect=DIALECT)
    vector = exp.cast(exp.Placeholder(this=measure.wanted.name), array)
    distance = exp.Anonymous(this="array_cosine_distance", expressions=[column, vector])
    inner.select(exp.alias_(distance, _DISTANCE, quoted=True), copy=False)
    inner.set("offset", None)
    inner.limit(need, copy=False)
    return question(exp.select(exp.column(_DISTANCE, quoted=True)).from_(inner.subquery("__outcome")))


def distinct(query: exp.Query, column: str | None, most: int) -> Question:
    """The distinct values of one column of a query (None: of its only one), at most `most` of them."""
    wanted = exp.column(column, quoted=True) if column is not None else exp.Star()
    return question(exp.select(wanted).distinct().from_(query.copy().subquery("__keys")).limit(most))


def question(query: exp.Query) -> Question:
    tables = {table.name for table in query.find_all(exp.Table)}
    parameters = {placeholder.name for placeholder in query.find_all(exp.Placeholder)}
    return Question(query.sql(DIALECT), frozenset(tables), frozenset(parameters))


def stands_alone(analysis: Analysis, query: exp.Query) -> bool:
    """Whether a part of the tree can be asked by itself: no WITH and no column from outside of it."""
    inside = {id(node) for node in query.walk()}
    own = [scope for scope in analysis.scopes if id(scope.expression) in inside]
    named = {cte.alias.lower() for cte in query.find_all(exp.CTE)}
    for table in query.find_all(exp.Table):
        is_cte = id(table) not in analysis.references and isinstance(table.this, exp.Identifier)
        if is_cte and table.name.lower() not in named:
            return False
    sources = [analysis.sources(scope) for scope in own]
    aliases = {alias for found in sources for alias in found}
    columns = {
        name.lower()
        for found in sources
        for source in found.values()
        if isinstance(source, Reference)
        for name in source.relation.schema.names
    }
    outputs = {output.alias_or_name.lower() for select in query.find_all(exp.Select) for output in select.selects}
    for column in query.find_all(exp.Column):
        first = column.parts[0].name.lower()
        known = first in aliases if len(column.parts) > 1 else first in columns | outputs | aliases
        if not known:
            return False
    return True
