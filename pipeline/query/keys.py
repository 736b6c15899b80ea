"""Semi-joins: a small set of keys on the other side of a join, pushed into the search or scan of a table as IN.

Assumes: keys come from rows that are all read (a scan, a frame, a query of its own), never from candidates that may
still grow; DuckDB evaluates the join itself once more, so keys only spare rows that cannot match.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.types as t
from sqlglot import exp
from sqlglot.optimizer.scope import Scope

from conjoin.pipeline.query.analysis import Analysis, Reference
from conjoin.pipeline.query.filters import Resolve, conjuncts, translate
from conjoin.pipeline.query.questions import Question, distinct, stands_alone

MOST_KEYS = 10_000  # a filter of 10,000 keys costs 25 ms, with or without an index on the column
_WORTH = 0.5  # keys that leave more than this share of a table are not pushed


@dataclass(frozen=True, slots=True)
class KeySet:
    """Values that a column must have one of. query: what has them in its column `key` (None: its only one).

    partner: the table they come from, None for a query of its own; source: that in words.
    """

    column: str
    query: exp.Query
    key: str | None
    partner: Reference | None
    source: str

    def question(self) -> Question:
        """After the tables have their names inside DuckDB. One more than MOST_KEYS tells that there are too many."""
        return distinct(self.query, self.key, MOST_KEYS + 1)


def find_keys(analysis: Analysis, reference: Reference, own: Resolve, others: Sequence[exp.Expr]) -> list[KeySet]:
    """Key sets of a reference below which its WHERE may be applied. own: resolves its columns; others: conjuncts of its
    WHERE that stay in DuckDB.
    """
    select = reference.scope.expression
    if not isinstance(select, exp.Select):
        return []
    found = list(_from_subqueries(analysis, own, others))
    for part in [*others, *_joined_on(select)]:
        if isinstance(part, exp.EQ):
            for here, there in ((part.this, part.expression), (part.expression, part.this)):
                found += _from_column(analysis, reference, own, (here.unnest(), there.unnest()))
    for name, source in _joined_using(analysis, select, reference):
        column = reference.relation.column(name)
        if column is not None:
            found += _of_source(analysis, source, column, name)
    return found


def as_filter(column: str, kind: pa.DataType, keys: pa.Array) -> str | None:
    """`column IN (...)` for Lance, None if the types differ, since DuckDB would convert one of them."""
    same = (t.is_string(kind) and (t.is_string(keys.type) or t.is_large_string(keys.type))) or (
        t.is_integer(kind) and t.is_integer(keys.type)
    )
    if not same:
        return None
    values = [value for value in keys.to_pylist() if value is not None]
    if not values:
        return "false"
    literals = [exp.Literal.string(v) if isinstance(v, str) else exp.convert(v) for v in values]
    condition = exp.In(this=exp.column(column, quoted=True), expressions=literals)
    return translate(condition, lambda _: (column, kind))


def is_worth(count: int, num_rows: int) -> bool:
    return count <= MOST_KEYS and count < _WORTH * num_rows


def _from_subqueries(analysis: Analysis, own: Resolve, parts: Sequence[exp.Expr]) -> Iterator[KeySet]:
    for part in parts:
        query = part.args.get("query") if isinstance(part, exp.In) else None
        inner = query.unnest() if isinstance(query, exp.Expr) else None
        if not isinstance(inner, exp.Query) or not isinstance(part.this.unnest(), exp.Column):
            continue
        column = own(part.this.unnest())
        if column and len(inner.selects) == 1 and stands_alone(analysis, inner):
            yield KeySet(column[0], inner, None, None, "a subquery")


def _joined_on(select: exp.Select) -> Iterator[exp.Expr]:
    """Conjuncts in ON of inner and semi-joins, which every row of the reference that is left fulfils."""
    for join in select.args.get("joins") or []:
        if not join.side and join.kind.upper() in ("", "INNER", "SEMI"):
            yield from conjuncts(join.args.get("on"))


def _joined_using(
    analysis: Analysis, select: exp.Select, reference: Reference
) -> Iterator[tuple[str, Reference | Scope | None]]:
    by_alias = analysis.sources(reference.scope)
    for join in select.args.get("joins") or []:
        if join.side or join.kind.upper() not in ("", "INNER", "SEMI"):
            continue
        other = select.args["from_"].this if join.this is reference.node else join.this
        for name in join.args.get("using") or []:
            yield name.name, by_alias.get(other.alias_or_name.lower())


def _from_column(
    analysis: Analysis, reference: Reference, own: Resolve, sides: tuple[exp.Expr, exp.Expr]
) -> list[KeySet]:
    here, there = sides
    if not isinstance(here, exp.Column) or not isinstance(there, exp.Column):
        return []
    column = own(here)
    if column is None or own(there) is not None or analysis.scope_of_column.get(id(there)) is not reference.scope:
        return []
    sources = analysis.sources(reference.scope)
    if there.table:
        return _of_source(analysis, sources.get(there.table.lower()), column[0], there.name)
    having = [s for s in sources.values() if isinstance(s, Reference) and s.relation.column(there.name)]
    plain = all(isinstance(source, Reference) for source in sources.values())
    return _of_source(analysis, having[0], column[0], there.name) if plain and len(having) == 1 else []


def _of_source(analysis: Analysis, source: Reference | Scope | None, column: str, key: str) -> list[KeySet]:
    if isinstance(source, Reference):
        if source.node.args.get("sample") or source.node.alias_column_names or source.relation.column(key) is None:
            return []
        return [KeySet(column, rows_of(analysis, source), key, source, source.relation.name)]
    if isinstance(source, Scope) and isinstance(source.expression, exp.Query):
        parent = source.expression.parent
        renamed = isinstance(parent, exp.CTE | exp.Subquery) and parent.alias_column_names
        if not renamed and stands_alone(analysis, source.expression):
            return [KeySet(column, source.expression, key, None, "a query")]
    return []


def rows_of(analysis: Analysis, reference: Reference) -> exp.Select:
    """A table's own rows by the name it will have, with the conditions that are about it alone."""
    select = reference.scope.expression
    where = select.args.get("where") if isinstance(select, exp.Select) else None
    parts = [part for part in conjuncts(where.this if where else None) if _is_about(analysis, reference, part)]
    table = exp.Table(this=exp.to_identifier(reference.name, quoted=True))
    alias = exp.TableAlias(this=exp.to_identifier(reference.alias, quoted=True))
    table.set("alias", alias)
    return exp.select("*").from_(table).where(*[part.copy() for part in parts])


def _is_about(analysis: Analysis, reference: Reference, part: exp.Expr) -> bool:
    columns = list(part.find_all(exp.Column))
    nested = part.find(exp.Query, exp.AggFunc, exp.Window)
    return bool(columns) and nested is None and all(owns(analysis, reference, column) for column in columns)


def owns(analysis: Analysis, reference: Reference, column: exp.Column) -> bool:
    """Whether a column in the reference's scope is its own; not where another source might have it too."""
    if len(column.parts) > 2 or analysis.scope_of_column.get(id(column)) is not reference.scope:
        return False
    if reference.relation.column(column.name) is None:
        return False
    if column.table:
        return column.table.lower() == reference.alias.lower()
    others = [s for s in analysis.sources(reference.scope).values() if s is not reference]
    return all(isinstance(s, Reference) and s.relation.column(column.name) is None for s in others)
