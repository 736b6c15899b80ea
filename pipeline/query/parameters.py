"""Values bound into the syntax tree: `?`, `$1` and `$name` become literals; lists, bytes and words to look for stay
behind their names.

Assumes: text never becomes SQL: a bound string is a literal node, whatever it contains.
"""

from __future__ import annotations

import datetime as dt
import decimal
import math
from collections.abc import Mapping, Sequence

from sqlglot import exp

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.parse import function_name

# Which argument of a function is words, that decide nothing but the vector or the scores that are made of them.
_WORDS = {("text", 0), ("bm25", 1), ("hybrid", 2)}
Params = Mapping[str, object] | Sequence[object] | None


def bind(tree: exp.Query, params: Params) -> dict[str, object]:
    """Put scalars into the tree itself; returns {placeholder name: value} of what stays one: lists, bytes, words.

    Raises QueryError for a missing, unused or unsupported parameter.
    """
    given = by_name(params)
    kept = words_of(tree, given)
    rest: dict[str, object] = {}
    nodes = list(tree.find_all(exp.Placeholder))
    for node in nodes:
        if node.name not in given:
            raise QueryError(f"no value for the parameter ${node.name}", next=_known(given))
        value = given[node.name]
        literal = None if node.name in kept else _literal(value)
        if literal is not None:
            node.replace(literal)
        elif node.name in kept:
            rest[f"p{node.name}"] = value
            node.replace(exp.Placeholder(this=f"p{node.name}"))
        else:
            rest[f"p{node.name}"] = plain_value(value, node.name)
            node.replace(exp.Placeholder(this=f"p{node.name}"))
    if unused := sorted(set(given) - {node.name for node in nodes}):
        raise QueryError(f"the parameter {unused[0]!r} is not in the query")
    return rest


def words_of(tree: exp.Query, given: Mapping[str, object]) -> frozenset[str]:
    """Parameters that are texts and stand only where words to look for do."""
    words = {name for name, value in given.items() if isinstance(value, str)}
    for node in tree.find_all(exp.Placeholder):
        parent = node.parent
        function = function_name(parent) if isinstance(parent, exp.Anonymous) else ""
        if node.name in words and (function, node.index) not in _WORDS:
            words.remove(node.name)
    return frozenset(words)


def by_name(params: Params) -> dict[str, object]:
    """As in the query: `?` are numbered from 1. Raises QueryError for what is no parameters."""
    if params is None:
        return {}
    if isinstance(params, Mapping):
        return {str(name): value for name, value in params.items()}
    if isinstance(params, str | bytes):
        raise QueryError("params is a list of values or a mapping of names")
    return {str(position): value for position, value in enumerate(params, 1)}


def _known(given: Mapping[str, object]) -> str:
    return f"Given: {', '.join(given)}" if given else "Pass params=[...] or params={name: value}"


def _literal(value: object) -> exp.Expr | None:
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None:
        return exp.null()
    if isinstance(value, bool):
        return exp.Boolean(this=value)
    if isinstance(value, int):
        return _number(str(abs(value)), negative=value < 0)
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, str):
        return exp.Literal.string(value)
    if isinstance(value, decimal.Decimal):
        return _number(format(abs(value), "f"), negative=value < 0)
    if isinstance(value, dt.datetime):
        return exp.cast(exp.Literal.string(value.isoformat(" ")), "TIMESTAMPTZ" if value.tzinfo else "TIMESTAMP")
    if isinstance(value, dt.date):
        return exp.cast(exp.Literal.string(value.isoformat()), "DATE")
    return None


def _number(text: str, *, negative: bool) -> exp.Expr:
    literal = exp.Literal.number(text)
    return exp.Neg(this=literal) if negative else literal


def _float(value: float) -> exp.Expr:
    if not math.isfinite(value):
        return exp.cast(exp.Literal.string(str(value)), "DOUBLE")
    text = repr(abs(value))
    return _number(text if "e" in text else f"{text}e0", negative=math.copysign(1.0, value) < 0)


def is_scalar(value: object) -> bool:
    """Whether it becomes a literal of the query."""
    return _literal(value) is not None


def plain_value(value: object, name: str) -> object:
    """A list or bytes. Raises QueryError for anything else."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return list(value)
    kind = type(value).__name__
    raise QueryError(f"the parameter {name!r} is a {kind}; scalars, bytes, lists and arrays can be bound")
