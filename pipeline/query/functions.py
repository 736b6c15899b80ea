"""distance() and similarity(): what they compare, checked, and rewritten to what DuckDB computes exactly.

Assumes: stored vectors have unit length and one encoder per column; its fingerprint is in the column's metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
from sqlglot import exp

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.analysis import Analysis, Reference
from conjoin.pipeline.query.parse import DIALECT, function_name, shown
from conjoin.pipeline.query.relations import Relation, nearest_name
from conjoin.pipeline.store import VectorColumn

Kind = Literal["text", "image", "audio", "id", "values"]
_KINDS: Mapping[str, Kind] = {"text": "text", "image": "image", "audio": "audio", "vector_of": "id"}
_MEASURES = ("distance", "similarity")
FUNCTIONS = (*_MEASURES, *_KINDS, "relevance", "classify", "bm25", "hybrid")
# What DuckDB itself offers, under its own names and sqlglot's.
_RAW = re.compile(
    r"((array|list)_)?(cosine_distance|cosine_similarity|(negative_)?(inner|dot)_product|euclidean_distance)|"
    r"(array|list)_distance"
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A query vector still to be made, for one column. name: its parameter in DuckDB; parameter: the query's, that
    value came from.
    """

    name: str
    kind: Kind
    value: object
    column: VectorColumn
    relation: Relation
    parameter: str | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """distance(column, vector) after its rewriting; descending order of a similarity is ascending distance."""

    reference: Reference
    column: VectorColumn
    wanted: Wanted
    similarity: bool


@dataclass(frozen=True, slots=True)
class Rewritten:
    """wanted: vectors to make; measures: by id of the node (without parentheses) that now stands in the tree."""

    wanted: tuple[Wanted, ...]
    measures: Mapping[int, Measure]


@dataclass(frozen=True, slots=True)
class _Side:
    """One argument of a measure: a column, or a vector to make."""

    node: exp.Expr
    reference: Reference | None = None
    column: VectorColumn | None = None
    kind: Kind | None = None
    value: object = None
    parameter: str | None = None


def rewrite(analysis: Analysis, bound: dict[str, object]) -> Rewritten:
    """Replace the functions in the tree; takes from `bound` the parameters that are vectors or media.

    Raises QueryError for anything that cannot be compared.
    """
    for node in analysis.tree.find_all(exp.Func):
        if _RAW.fullmatch(function_name(node)):
            _check_raw(analysis, node)
    wanted: list[Wanted] = []
    measures: dict[int, Measure] = {}
    taken: set[str] = set()
    nodes = [n for n in analysis.tree.find_all(exp.Anonymous) if function_name(n) in _MEASURES]
    name_outputs(nodes)
    for node in nodes:
        if len(node.expressions) != 2:
            raise QueryError(f"{function_name(node)}() takes a vector column and a vector", where=shown(node))
        left, right = (_side(analysis, bound, argument, taken) for argument in node.expressions)
        if left.column is None:
            left, right = right, left
        replaced = _measured(node, left, right, wanted, measures)
        node.replace(replaced)
    for name in taken:
        bound.pop(name, None)
    for node in analysis.tree.find_all(exp.Anonymous):
        if function_name(node) in _KINDS:
            raise QueryError(f"{shown(node)} stands alone", next="Use it inside distance(column, ...) or similarity()")
    return Rewritten(tuple(wanted), measures)


def name_outputs(nodes: list[exp.Anonymous]) -> None:
    """An output without an alias keeps the name that the user can see, not that of its rewriting."""
    for node in nodes:
        output: exp.Expr = node
        while output.parent is not None and not isinstance(output.parent, exp.Select):
            output = output.parent
        if output.parent is not None and output.arg_key == "expressions" and not output.alias:
            name = function_name(node) if output is node else shown(output)
            alias = exp.Alias(alias=exp.to_identifier(name, quoted=True))
            output.replace(alias)
            alias.set("this", output)  # the node itself: others know it by its identity


def _measured(
    node: exp.Anonymous, left: _Side, right: _Side, wanted: list[Wanted], measures: dict[int, Measure]
) -> exp.Expr:
    where = shown(node)
    if left.column is None:
        raise QueryError(f"{function_name(node)}() needs a vector column", where=where)
    array = exp.DataType.build(f"FLOAT[{left.column.dim}]", dialect=DIALECT)
    made: Wanted | None = None
    if right.kind is not None:
        made = _want(left, right, wanted)
        other: exp.Expr = exp.cast(exp.Placeholder(this=made.name), array)
    else:
        _check_same_encoder(left.column, right.column, where)
        other = right.node.copy() if right.column else exp.cast(right.node.copy(), array)
    result: exp.Expr = exp.Anonymous(this="array_cosine_distance", expressions=[left.node.copy(), other])
    similarity = function_name(node) == "similarity"
    if similarity:
        result = exp.Paren(this=exp.Sub(this=exp.Literal.number(1), expression=result))
    if made and left.reference:
        measures[id(result.unnest())] = Measure(left.reference, left.column, made, similarity)
    return result


def _want(left: _Side, right: _Side, wanted: list[Wanted]) -> Wanted:
    assert left.column is not None
    assert left.reference is not None
    assert right.kind is not None
    for known in wanted:
        same = known.relation is left.reference.relation and known.column == left.column
        if same and (known.kind, known.value) == (right.kind, right.value):
            return known
    name, relation = f"__v{len(wanted)}", left.reference.relation
    made = Wanted(name, right.kind, right.value, left.column, relation, right.parameter)
    wanted.append(made)
    return made


def _check_same_encoder(left: VectorColumn, right: VectorColumn | None, where: str) -> None:
    if right is None or left.fingerprint == right.fingerprint:
        return
    made_by = f"{left.fingerprint[:12]}, {right.fingerprint[:12]}"
    what = f"{left.name} and {right.name} come from different encoders ({made_by}): their distance means nothing"
    raise QueryError(what, where=where)


def _check_raw(analysis: Analysis, node: exp.Func) -> None:
    """DuckDB's own measures compare whatever has the same length; not vectors of two encoders."""
    sides = [argument.unnest() for argument in node.iter_expressions()]
    origins = [analysis.origin(side) for side in sides if isinstance(side, exp.Column)]
    vectors = [vector for found in origins if found and (vector := found[0].relation.vectors.get(found[1]))]
    if len(vectors) == 2:
        _check_same_encoder(vectors[0], vectors[1], shown(node))


def _side(analysis: Analysis, bound: Mapping[str, object], node: exp.Expr, taken: set[str]) -> _Side:
    node = node.unnest()
    if isinstance(node, exp.Column):
        return _column_side(analysis, node)
    if isinstance(node, exp.Anonymous) and function_name(node) in _KINDS:
        value, parameter = _argument(node, bound, taken)
        return _Side(node, kind=_KINDS[function_name(node)], value=value, parameter=parameter)
    inner = node.this if isinstance(node, exp.Cast) else node
    if isinstance(inner, exp.Placeholder):
        taken.add(inner.name)
        return _Side(node, kind="values", value=bound[inner.name], parameter=inner.name)
    if isinstance(inner, exp.Array):
        return _Side(node, kind="values", value=[_number(item) for item in inner.expressions])
    what = "NULL" if isinstance(node, exp.Null) else shown(node)
    near = nearest_name(function_name(node), _KINDS) if isinstance(node, exp.Anonymous) else ""
    raise QueryError(
        f"{what} is not a vector{near}",
        next="Compare a vector column with text('...'), image('path'), vector_of(id) or a list",
    )


def _argument(node: exp.Anonymous, bound: Mapping[str, object], taken: set[str]) -> tuple[object, str | None]:
    """The value, and the parameter that it came from."""
    value = node.expressions[0] if len(node.expressions) == 1 else None
    if isinstance(value, exp.Placeholder):
        taken.add(value.name)
        return bound[value.name], value.name
    if isinstance(value, exp.Literal | exp.RawString):
        return (value.this if not isinstance(value, exp.Literal) or value.is_string else value.to_py()), None
    if isinstance(value, exp.Neg) and isinstance(value.this, exp.Literal):
        return value.to_py(), None
    raise QueryError(f"{shown(node)} takes one literal or parameter")


def _number(node: exp.Expr) -> float:
    try:
        return float(node.to_py())
    except (ValueError, TypeError):
        raise QueryError(f"{shown(node)} is not a number in a vector") from None


def _column_side(analysis: Analysis, node: exp.Column) -> _Side:
    origin = analysis.origin(node)
    known = sorted({name for ref in analysis.references.values() for name in ref.relation.vectors})
    if origin is None:
        raise QueryError(
            f"{shown(node)} is not a vector column that can be traced to a table{nearest_name(node.name, known)}"
        )
    reference, name = origin
    vector = reference.relation.vectors.get(name)
    if vector is None and not _is_list(reference.relation.schema.field(name).type):
        raise QueryError(f"{name} of {reference.relation.name} is not a vector column{nearest_name(name, known)}")
    if vector is None and reference.relation.dataset is not None:
        raise QueryError(f"{name} of {reference.relation.name} bears no encoder's fingerprint: it cannot be compared")
    return _Side(node, reference=reference, column=vector)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
