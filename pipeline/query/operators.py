"""pgvector's operators: `<=>` the cosine distance, `<->` the Euclidean one, `<#>` the negative inner product.

Assumes: they bind as in PostgreSQL, looser than + and - and tighter than a comparison, so that
`vec <=> text('a') - text('b') < 0.3` means distance(vec, text('a') - text('b')) < 0.3. sqlglot alone reads `<=>` as
IS NOT DISTINCT FROM, binds `<->` like a product and does not know `<#>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from sqlglot import Token, TokenType, exp
from sqlglot.dialects.duckdb import DuckDB
from sqlglot.parsers.duckdb import DuckDBParser

_INNER_PRODUCT = TokenType.PIPE_SLASH  # an operator of PostgreSQL that DuckDB's dialect never makes of a text


def _call(name: str, this: exp.Expr, expression: exp.Expr) -> exp.Expr:
    return exp.Anonymous(this=name, expressions=[this, expression])


class _Parser(DuckDBParser):
    FACTOR = {kind: made for kind, made in DuckDBParser.FACTOR.items() if kind != TokenType.LR_ARROW}
    EQUALITY = {kind: made for kind, made in DuckDBParser.EQUALITY.items() if kind != TokenType.NULLSAFE_EQ}
    BITWISE = {
        **DuckDBParser.BITWISE,
        TokenType.NULLSAFE_EQ: partial(_call, "distance"),  # type: ignore[dict-item]  # any callable does
        TokenType.LR_ARROW: partial(_call, "l2_distance"),  # type: ignore[dict-item]
        _INNER_PRODUCT: partial(_call, "negative_inner_product"),  # type: ignore[dict-item]
    }


def parse_tokens(tokens: Sequence[Token], sql: str) -> list[exp.Expr | None]:
    """Raises sqlglot's ParseError."""
    return list(_Parser(dialect=DuckDB()).parse(_joined(tokens), sql))


def _joined(tokens: Sequence[Token]) -> list[Token]:
    """`<` and `#>` next to each other are one operator."""
    found: list[Token] = []
    for token in tokens:
        before = found[-1] if found else None
        follows = before is not None and before.token_type == TokenType.LT and before.end + 1 == token.start
        if before is not None and follows and token.token_type == TokenType.HASH_ARROW:
            found[-1] = Token(_INNER_PRODUCT, "<#>", line=token.line, col=token.col, start=before.start, end=token.end)
        else:
            found.append(token)
    return found
