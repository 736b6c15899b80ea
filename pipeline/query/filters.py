"""SQL conditions as Lance filters, only where both engines agree on every row; the rest stays in DuckDB.

Assumes: a filter may be pushed below a top-k, so a translation that kept one row too few or too many would be wrong.
What is left out on purpose: ILIKE (case folding), LIKE with a backslash (escape), zero against floats (-0.0 sorts
apart in Lance), literals that a float32 column cannot hold, mixed types (casts differ), functions, vectors that are
NULL (behind such a filter pylance 14's search without an index takes wrong rows from the second 8,192 on).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.types as t
from sqlglot import exp

# What a column is called in the scan, and its type; None if it does not belong to the scanned table.
Resolve = Callable[[exp.Column], tuple[str, pa.DataType] | None]
_COMPARISONS: dict[type[exp.Expr], str] = {
    exp.EQ: "=",
    exp.NEQ: "!=",
    exp.GT: ">",
    exp.GTE: ">=",
    exp.LT: "<",
    exp.LTE: "<=",
}
_MIRRORED = {"=": "=", "!=": "!=", ">": "<", ">=": "<=", "<": ">", "<=": ">="}
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_TIMESTAMP = re.compile(r"\d{4}-\d{2}-\d{2}( \d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?)?")
_INT64 = 2**63
# What a leaf may hold; anything else (ESCAPE, SYMMETRIC, a flag of a later sqlglot) would change its meaning.
_UNDERSTOOD = {"this", "expression", "expressions", "low", "high", "negate"}


def translate(node: exp.Expr, resolve: Resolve) -> str | None:
    """A Lance filter that keeps exactly the rows that DuckDB would keep, or None."""
    node = node.unnest()
    if isinstance(node, exp.And | exp.Or):
        sides = [translate(side, resolve) for side in node.flatten()]
        word = " AND " if isinstance(node, exp.And) else " OR "
        return None if None in sides else "(" + word.join(side for side in sides if side) + ")"
    if isinstance(node, exp.Not):
        inner = translate(node.this, resolve)
        return None if inner is None else f"(NOT {inner})"
    if isinstance(node, exp.Column):
        found = resolve(node)
        return _quote(found[0]) if found and t.is_boolean(found[1]) else None
    return _leaf(node, resolve)


def conjuncts(node: exp.Expr | None) -> list[exp.Expr]:
    """The parts of a condition that must all hold; TRUE is none."""
    if node is None:
        return []
    node = node.unnest()
    if isinstance(node, exp.Boolean) and node.this:
        return []
    return [part for side in node.flatten() for part in conjuncts(side)] if isinstance(node, exp.And) else [node]


def equals(name: str, kind: pa.DataType, value: object) -> str | None:
    """`column = value`, None if the type does not fit."""
    literal = exp.Literal.string(value) if isinstance(value, str) else exp.convert(value)
    comparison = exp.EQ(this=exp.column(name), expression=literal)
    return translate(comparison, lambda _: (name, kind))


def _leaf(node: exp.Expr, resolve: Resolve) -> str | None:
    if {key for key, value in node.args.items() if value} - _UNDERSTOOD:
        return None
    text = _positive(node, resolve)
    negated = text is not None and node.args.get("negate")  # s NOT LIKE 'a' is one node, where NOT IN is two
    return f"(NOT {text})" if negated else text


def _positive(node: exp.Expr, resolve: Resolve) -> str | None:
    if type(node) in _COMPARISONS:
        return _comparison(node, resolve)
    column = resolve(node.this) if isinstance(node.this, exp.Column) else None
    if column is None:
        return None
    name, kind = column
    if isinstance(node, exp.Is) and isinstance(node.expression, exp.Null):
        return f"({_quote(name)} IS NULL)" if _quotable(name) and not t.is_nested(kind) else None
    if isinstance(node, exp.In):
        return _in(node, name, kind)
    if isinstance(node, exp.Between):
        low, high = (_compare(name, kind, op, node.args[side]) for op, side in ((">=", "low"), ("<=", "high")))
        return f"({low} AND {high})" if low and high else None
    if type(node) is exp.Like:
        return _like(node, name, kind)
    return None


def _comparison(node: exp.Expr, resolve: Resolve) -> str | None:
    operator, left, right = _COMPARISONS[type(node)], node.this.unnest(), node.expression.unnest()
    if isinstance(right, exp.Column):
        left, right, operator = right, left, _MIRRORED[operator]
    found = resolve(left) if isinstance(left, exp.Column) else None
    return _compare(*found, operator, right) if found else None


def _compare(name: str, kind: pa.DataType, operator: str, literal: exp.Expr) -> str | None:
    value = _literal(literal, kind, operator)
    return f"({_quote(name)} {operator} {value})" if value is not None and _quotable(name) else None


def _in(node: exp.In, name: str, kind: pa.DataType) -> str | None:
    values = [_literal(item, kind, "=") for item in node.expressions]
    if None in values or not values or not _quotable(name):
        return None
    return f"({_quote(name)} IN ({', '.join(value for value in values if value)}))"


def _like(node: exp.Like, name: str, kind: pa.DataType) -> str | None:
    pattern = node.expression
    if not t.is_string(kind) or not _quotable(name) or not isinstance(pattern, exp.Literal) or not pattern.is_string:
        return None
    return None if "\\" in pattern.this else f"({_quote(name)} LIKE {_string(pattern.this)})"


def _literal(node: exp.Expr, kind: pa.DataType, operator: str) -> str | None:
    """The literal in Lance's spelling if it is of the column's own type."""
    node = node.unnest()
    text = node.this if isinstance(node, exp.Literal | exp.RawString) else None
    is_string = isinstance(node, exp.RawString) or (isinstance(node, exp.Literal) and node.is_string)
    if t.is_string(kind):
        return _string(text) if is_string and text is not None and "\0" not in text else None
    if t.is_boolean(kind):
        return str(bool(node.this)).lower() if isinstance(node, exp.Boolean) else None
    if t.is_date32(kind) or (t.is_timestamp(kind) and kind.tz is None):
        return _moment(node, kind)
    if is_string:
        return None
    return _number(node, kind, operator)


def _number(node: exp.Expr, kind: pa.DataType, operator: str) -> str | None:
    sign, digits = ("-", node.this) if isinstance(node, exp.Neg) else ("", node)
    if not isinstance(digits, exp.Literal) or digits.is_string:
        return None
    text = f"{sign}{digits.this}"
    if t.is_integer(kind):
        return text if digits.this.isdigit() and -_INT64 < int(text) < _INT64 and _holds(kind, int(text)) else None
    if not t.is_float32(kind) and not t.is_float64(kind):
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    exact = float(np.float32(value)) == value if abs(value) < 3e38 else False
    if not math.isfinite(value) or (t.is_float32(kind) and not exact) or (value == 0 and operator not in (">", "<=")):
        return None
    return repr(value) if digits.this.isdigit() is False or abs(value) > 2**53 else f"{text}.0"


def _holds(kind: pa.DataType, value: int) -> bool:
    bits = kind.bit_width
    return 0 <= value < 2**bits if t.is_unsigned_integer(kind) else -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)


def _moment(node: exp.Expr, kind: pa.DataType) -> str | None:
    if isinstance(node, exp.Cast) and node.to.this in (exp.DType.DATE, exp.DType.TIMESTAMP):
        same = (node.to.this == exp.DType.DATE) == t.is_date32(kind)
        node = node.this if same else exp.null()
    if not isinstance(node, exp.Literal) or not node.is_string:
        return None
    if t.is_date32(kind):
        return f"date '{node.this}'" if _DATE.fullmatch(node.this) else None
    return f"timestamp '{node.this}'" if _TIMESTAMP.fullmatch(node.this) else None


def _string(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _quotable(name: str) -> bool:
    return "`" not in name


def _quote(name: str) -> str:
    return f"`{name}`"
