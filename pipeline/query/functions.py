"""distance() and similarity(): what they compare, checked, and rewritten to what DuckDB computes exactly.

Assumes: stored vectors have unit length and one encoder per column; its fingerprint is in the column's metadata.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
from sqlglot import exp

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.analysis import Analysis, Reference
from conjoin.pipeline.query.expressions import EmbeddedColumn, Kind, is_arithmetic, terms_of
from conjoin.pipeline.query.parse import DIALECT, function_name, shown
from conjoin.pipeline.query.relations import Relation, nearest_name
from conjoin.pipeline.query.scalar import fresh_name
from conjoin.pipeline.store import VectorColumn

_KINDS: Mapping[str, Kind] = {"text": "text", "image": "image", "audio": "audio", "vector_of": "id"}
# What DuckDB computes; only the cosine distance is the metric of the indexes.
_MEASURES = {
    "distance": "array_cosine_distance",
    "similarity": "array_cosine_distance",
    "l2_distance": "array_distance",
    "negative_inner_product": "array_negative_inner_product",
}
FUNCTIONS = (*_MEASURES, *_KINDS, "relevance", "classify", "bm25", "hybrid")
# What DuckDB itself offers, under its own names and sqlglot's.
_RAW = re.compile(
    r"((array|list)_)?(cosine_distance|cosine_similarity|(negative_)?(inner|dot)_product|euclidean_distance)|"
    r"(array|list)_distance"
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A query vector still to be made, for one column. name: its parameter in DuckDB; parameter: the query's, that
    value came from; value of a `sum`: its terms.
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
class Pair:
    """distance(column, other) of vectors that differ from row to row: of another table's column, or embedded.

    other: its reference and column's name; embedded: text(x) instead, and x.
    """

    reference: Reference
    column: VectorColumn
    similarity: bool
    other: tuple[Reference, str] | None = None
    embedded: tuple[EmbeddedColumn, exp.Expr] | None = None


@dataclass(frozen=True, slots=True)
class Rewritten:
    """wanted: vectors to make; measures, pairs: by id of the node (without parentheses) that now stands in the tree;
    embedded: columns whose values are embedded while DuckDB works.
    """

    wanted: tuple[Wanted, ...]
    measures: Mapping[int, Measure]
    pairs: Mapping[int, tuple[Pair, ...]] = field(default_factory=dict)
    embedded: tuple[EmbeddedColumn, ...] = ()


@dataclass(frozen=True, slots=True)
class _Side:
    """One argument of a measure: a column and its name, a vector to make, or a column's values to embed."""

    node: exp.Expr
    reference: Reference | None = None
    column: VectorColumn | None = None
    kind: Kind | None = None
    value: object = None
    parameter: str | None = None
    embedded: exp.Expr | None = None
    name: str = ""


@dataclass(slots=True)
class _Made:
    """What the rewriting collects."""

    wanted: list[Wanted] = field(default_factory=list)
    measures: dict[int, Measure] = field(default_factory=dict)
    pairs: dict[int, tuple[Pair, ...]] = field(default_factory=dict)
    embedded: list[EmbeddedColumn] = field(default_factory=list)


def rewrite(analysis: Analysis, bound: dict[str, object]) -> Rewritten:
    """Replace the functions in the tree; takes from `bound` the parameters that are vectors or media.

    Raises QueryError for anything that cannot be compared.
    """
    for node in analysis.tree.find_all(exp.Func):
        if _RAW.fullmatch(function_name(node)):
            _check_raw(analysis, node)
    made, taken = _Made(), set[str]()
    nodes = [n for n in analysis.tree.find_all(exp.Anonymous) if function_name(n) in _MEASURES]
    name_outputs(nodes)
    for node in nodes:
        if len(node.expressions) != 2:
            raise QueryError(f"{function_name(node)}() takes a vector column and a vector", where=shown(node))
        left, right = (_side(analysis, bound, argument, taken) for argument in node.expressions)
        if left.column is None:
            left, right = right, left
        node.replace(_measured(node, left, right, made))
    for name in taken - {placeholder.name for placeholder in analysis.tree.find_all(exp.Placeholder)}:
        bound.pop(name, None)
    for node in analysis.tree.find_all(exp.Anonymous):
        if function_name(node) in _KINDS:
            raise QueryError(f"{shown(node)} stands alone", next="Use it inside distance(column, ...) or similarity()")
    return Rewritten(tuple(made.wanted), made.measures, made.pairs, tuple(made.embedded))


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


def _measured(node: exp.Anonymous, left: _Side, right: _Side, made: _Made) -> exp.Expr:
    name, where = function_name(node), shown(node)
    if left.column is None:
        raise QueryError(f"{name}() needs a vector column", where=where)
    array = exp.DataType.build(f"FLOAT[{left.column.dim}]", dialect=DIALECT)
    wanted, embedded = None, None
    if right.embedded is not None:
        embedded = _embedded(left.column, right, made)
        other: exp.Expr = exp.Anonymous(this=embedded.name, expressions=[right.embedded.copy()])
        other.meta["per_row"] = True
    elif right.kind is not None:
        wanted = _want(left, right, made.wanted)
        other = exp.cast(exp.Placeholder(this=wanted.name), array)
    else:
        _check_same_encoder(left.column, right.column, where)
        other = right.node.copy() if right.column else exp.cast(right.node.copy(), array)
    result: exp.Expr = exp.Anonymous(this=_MEASURES[name], expressions=[left.node.copy(), other])
    result.meta["per_row"] = True
    similarity = name == "similarity"
    if similarity:
        result = exp.Paren(this=exp.Sub(this=exp.Literal.number(1), expression=result))
    if left.reference and _MEASURES[name] == _MEASURES["distance"]:
        if wanted:
            made.measures[id(result.unnest())] = Measure(left.reference, left.column, wanted, similarity)
        else:
            pairs = tuple(_pairs(left, right, embedded, similarity))
            made.pairs |= {id(result.unnest()): pairs} if pairs else {}
    return result


def _pairs(left: _Side, right: _Side, embedded: EmbeddedColumn | None, similarity: bool) -> Iterator[Pair]:
    """Either side of two columns may be the one that is searched."""
    assert left.reference is not None
    assert left.column is not None
    if embedded is not None and right.embedded is not None:
        yield Pair(left.reference, left.column, similarity, embedded=(embedded, right.embedded))
    elif right.reference is not None:
        yield Pair(left.reference, left.column, similarity, (right.reference, right.name))
        if right.column is not None:
            yield Pair(right.reference, right.column, similarity, (left.reference, left.name))


def _embedded(column: VectorColumn, side: _Side, made: _Made) -> EmbeddedColumn:
    kind = _KINDS[function_name(side.node)]
    for known in made.embedded:
        if (known.kind, known.column) == (kind, column):
            return known
    made.embedded.append(EmbeddedColumn(fresh_name("embed"), kind, column))
    return made.embedded[-1]


def _want(left: _Side, right: _Side, wanted: list[Wanted]) -> Wanted:
    assert left.column is not None
    assert left.reference is not None
    assert right.kind is not None
    for known in wanted:
        same = known.relation is left.reference.relation and known.column == left.column
        # A plan may serve again with other values of its parameters, equal ones where these are: never one that is
        # equal by chance to what the query says itself.
        same = same and (known.parameter is None) == (right.parameter is None)
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
    if is_arithmetic(node):

        def leaf(part: exp.Expr) -> tuple[Kind, object]:
            if part.find(exp.Column):
                advice = (
                    "Add vectors that are the same for every row: text('...'), image('path'), vector_of(id), a list"
                )
                raise QueryError(f"{shown(part)} is not a vector that can be added", next=advice)
            return _single(bound, part, taken)[:2]

        return _Side(node, kind="sum", value=terms_of(node, leaf, bound, taken))
    argument = node.expressions[0] if isinstance(node, exp.Anonymous) and len(node.expressions) == 1 else None
    if argument is not None and function_name(node) in _EMBEDDED and argument.find(exp.Column):
        return _Side(node, embedded=argument)
    return _Side(node, None, None, *_single(bound, node, taken))


_EMBEDDED = ("text", "image", "audio")


def _single(bound: Mapping[str, object], node: exp.Expr, taken: set[str]) -> tuple[Kind, object, str | None]:
    """Kind and value of one vector, and the parameter that it came from."""
    if isinstance(node, exp.Anonymous) and function_name(node) in _KINDS:
        return (_KINDS[function_name(node)], *_argument(node, bound, taken))
    inner = node.this if isinstance(node, exp.Cast) else node
    if isinstance(inner, exp.Placeholder):
        taken.add(inner.name)
        return "values", bound[inner.name], inner.name
    if isinstance(inner, exp.Array):
        return "values", [_number(item) for item in inner.expressions], None
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
    return _Side(node, reference=reference, column=vector, name=name)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
