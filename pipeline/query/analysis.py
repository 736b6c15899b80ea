"""Who is who in a query: every table in a FROM, the columns it must deliver, and where a column comes from.

Assumes: names are resolved loosely (a column may be counted for two tables that have it): too many columns cost time,
too few would be wrong. DuckDB itself binds the query in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sqlglot import exp
from sqlglot.errors import OptimizeError
from sqlglot.optimizer.scope import Scope, traverse_scope

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.relations import Relation, nearest_name


@dataclass(slots=True)
class Reference:
    """One table in one FROM. name: what it is called inside DuckDB; alias: what the query calls it."""

    name: str
    alias: str
    node: exp.Table
    relation: Relation
    scope: Scope
    columns: set[str] = field(default_factory=set)


@dataclass(slots=True)
class Analysis:
    """references by the id of their node; scopes innermost first."""

    tree: exp.Query
    scopes: list[Scope]
    references: dict[int, Reference]
    scope_of_column: dict[int, Scope]

    def sources(self, scope: Scope) -> dict[str, Reference | Scope | None]:
        """What a scope selects from, by lower-case alias; None for a table function."""
        return {
            alias.lower(): source if isinstance(source, Scope) else self.references.get(id(source))
            for alias, (_, source) in _selected(scope).items()
        }

    def origin(self, column: exp.Column, scope: Scope | None = None) -> tuple[Reference, str] | None:
        """The table and column that a column is an unchanged copy of, None if that cannot be told."""
        scope = scope or self.scope_of_column.get(id(column))
        name, table = column.name, column.table.lower()
        while scope is not None:
            for alias, source in self.sources(scope).items():
                if table and alias != table:
                    continue
                found = self._origin_in(source, name)
                if found or table:
                    return found
            scope = scope.parent
        return None

    def _origin_in(self, source: Reference | Scope | None, name: str) -> tuple[Reference, str] | None:
        if isinstance(source, Reference):
            column = None if source.node.alias_column_names else source.relation.column(name)
            return (source, column) if column else None
        return self._origin_of_output(source, name) if isinstance(source, Scope) else None

    def _origin_of_output(self, scope: Scope, name: str) -> tuple[Reference, str] | None:
        query = scope.expression
        if not isinstance(query, exp.Query):
            return None
        names = query.parent.alias_column_names if isinstance(query.parent, exp.CTE | exp.Subquery) else []
        shown = [*names, *[output.alias_or_name for output in query.selects[len(names) :]]]
        position = next((i for i, output in enumerate(shown) if output.lower() == name.lower()), None)
        if isinstance(query, exp.SetOperation):
            sides = [self._origin_at(branch, position) for branch in scope.set_operation_scopes]
            return sides[0] if len({_fingerprint(side) for side in sides}) == 1 else None
        found = self._origin_at(scope, position)
        if found is None and position is None and query.is_star:
            return next((f for s in self.sources(scope).values() if (f := self._origin_in(s, name))), None)
        return found

    def _origin_at(self, scope: Scope, position: int | None) -> tuple[Reference, str] | None:
        """Where the output at a position comes from; None below a star, which shifts positions."""
        query = scope.expression
        outputs = query.selects if isinstance(query, exp.Query) else []
        if position is None or position >= len(outputs) or any(output.is_star for output in outputs[: position + 1]):
            return None
        inner = outputs[position].unalias()
        return self.origin(inner, scope) if isinstance(inner, exp.Column) else None


def _fingerprint(side: tuple[Reference, str] | None) -> str | None:
    vector = side and side[0].relation.vectors.get(side[1])
    return vector.fingerprint if vector else None


def analyse(tree: exp.Query, relations: Mapping[str, Relation]) -> Analysis:
    """Resolve the tables of a query. relations are by lower-case name. Raises QueryError for an unknown table."""
    try:
        scopes = traverse_scope(tree)
        selected = [(scope, node, source) for scope in scopes for node, source in _selected(scope).values()]
    except OptimizeError as error:
        raise QueryError(f"the query cannot be resolved: {error}", next="Give every table its own alias") from None
    analysis = Analysis(tree, scopes, {}, {})
    for scope, _, source in selected:
        if isinstance(source, exp.Table) and isinstance(source.this, exp.Identifier):
            _refer(analysis, scope, source, relations)
    known = {id(node) for _, node, _ in selected}
    for table in tree.find_all(exp.Table):
        if id(table) not in known and isinstance(table.this, exp.Identifier):
            _relation(table, relations)
            raise QueryError(f"{table.sql('duckdb')} stands where tables are not read", next="Use it in FROM or JOIN")
    for scope in scopes:
        for column in scope.columns:
            analysis.scope_of_column.setdefault(id(column), scope)
    _place_shadowed(analysis)
    for select in tree.find_all(exp.Select):
        _expand_exclusions(analysis, select)
    _count_columns(analysis)
    return analysis


def _selected(scope: Scope) -> dict[str, tuple[exp.Expr, exp.Table | Scope]]:
    """What stands in FROM and JOIN, by alias; unlike sqlglot's own, with the right side of SEMI and ANTI joins."""
    found: dict[str, tuple[exp.Expr, exp.Table | Scope]] = {}
    for alias, node in scope.references:
        if alias in found:
            raise OptimizeError(f"Alias already used: {alias}")
        if alias in scope.sources:
            found[alias] = (node, scope.sources[alias])
    return found


def _place_shadowed(analysis: Analysis) -> None:
    """Columns in ORDER BY that an output's name shadows: inside an expression DuckDB means the table's."""
    by_query = {id(scope.expression): scope for scope in analysis.scopes}
    for column in analysis.tree.find_all(exp.Column):
        select = column.find_ancestor(exp.Select)
        if select is not None and (scope := by_query.get(id(select))):
            analysis.scope_of_column.setdefault(id(column), scope)


def _refer(analysis: Analysis, scope: Scope, table: exp.Table, relations: Mapping[str, Relation]) -> None:
    if id(table) not in analysis.references:
        name = f"__t{len(analysis.references)}"
        relation = _relation(table, relations)
        analysis.references[id(table)] = Reference(name, table.alias_or_name, table, relation, scope)


def _relation(table: exp.Table, relations: Mapping[str, Relation]) -> Relation:
    relation = relations.get(table.name.lower())
    if relation is None:
        raise QueryError(f"there is no table {table.name!r}{nearest_name(table.name, relations)}")
    return relation


def _expand_exclusions(analysis: Analysis, select: exp.Select) -> None:
    """`* EXCLUDE (image_vec)` over one table becomes its columns, so that what is excluded is not read."""
    source = select.args.get("from_")
    reference = analysis.references.get(id(source.this)) if source else None
    if reference is None or select.args.get("joins") or select.args.get("laterals"):
        return
    for star in [node for node in select.expressions if isinstance(node, exp.Star)]:
        excluded = {node.name.lower() for node in star.args.get("except_") or []}
        names = {name.lower() for name in reference.relation.schema.names}
        if not excluded or not excluded <= names or star.args.get("replace") or star.args.get("rename"):
            continue
        kept = [name for name in reference.relation.schema.names if name.lower() not in excluded]
        outputs = [exp.column(name, table=reference.alias, quoted=True) for name in kept]
        at = select.expressions.index(star)
        select.set("expressions", [*select.expressions[:at], *outputs, *select.expressions[at + 1 :]])


def _count_columns(analysis: Analysis) -> None:
    """Fill `columns` of every reference: what the query may name, everything where a star or a pivot stands."""
    references = list(analysis.references.values())
    whole = (exp.Pivot, exp.PositionalColumn)
    everything = any(isinstance(node, whole) for node in analysis.tree.walk())
    for reference in references:
        if everything or _needs_all(reference):
            reference.columns.update(reference.relation.schema.names)
        else:
            reference.columns.update(_named(analysis.tree, reference, {other.alias.lower() for other in references}))


def _needs_all(reference: Reference) -> bool:
    select = reference.scope.expression
    if reference.node.alias_column_names or any(j.args.get("method") for j in select.args.get("joins") or []):
        return True
    for node in select.walk():
        if isinstance(node, exp.Star) and not isinstance(node.parent, exp.Count):
            table = node.parent.table.lower() if isinstance(node.parent, exp.Column) else ""
            owner = node.find_ancestor(exp.Select)
            if owner is select and table in ("", reference.alias.lower()):
                return True
        if isinstance(node, exp.Columns):
            return True
    return False


def _named(tree: exp.Query, reference: Reference, aliases: set[str]) -> Iterator[str]:
    for node in tree.find_all(exp.Column, exp.Join):
        parts = node.parts if isinstance(node, exp.Column) else node.args.get("using") or []
        names = [part.name for part in parts]
        if names and names[0].lower() in aliases and isinstance(node, exp.Column):
            if names[0].lower() != reference.alias.lower():
                continue
            if len(names) == 1:  # the whole row as a struct
                yield from reference.relation.schema.names
            names = names[1:] or names
        for name in names:
            column = reference.relation.column(name)
            if column:
                yield column
