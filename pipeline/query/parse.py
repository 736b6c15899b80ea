"""SQL text to one read-only query as a syntax tree; everything else is refused before anything is opened.

Assumes: this is the first of two walls; the second is DuckDB's own configuration (execute.py), which has no external
access whatever gets through here.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Literal

import sqlglot
from sqlglot import Token, TokenType, exp
from sqlglot.errors import ParseError, TokenError

from conjoin.pipeline.errors import QueryError
from conjoin.pipeline.query.operators import parse_tokens

DIALECT = "duckdb"
_STARTS = {"SELECT", "WITH", "FROM", "VALUES", "TABLE", "("}
_STATEMENT = re.compile(
    "ALTER|ANALYZE|ATTACH|BEGIN|CALL|CHECKPOINT|COMMENT|COMMIT|COPY|CREATE|DEALLOCATE|DELETE|DESCRIBE|DETACH|DROP|"
    "EXECUTE|EXPLAIN|EXPORT|FORCE|IMPORT|INSERT|INSTALL|LOAD|MERGE|PIVOT|PRAGMA|PREPARE|RESET|ROLLBACK|SET|SHOW|"
    "SUMMARIZE|TRUNCATE|UNPIVOT|UPDATE|USE|VACUUM"
)
# Nodes that change something or name something outside; a CTE can carry them below a SELECT.
_REFUSED = (
    exp.DML,
    exp.DDL,
    exp.Command,
    exp.Copy,
    exp.Attach,
    exp.Detach,
    exp.Pragma,
    exp.Set,
    exp.Use,
    exp.Into,
    exp.Lock,
    exp.Describe,
    exp.Summarize,
    exp.Show,
    exp.ReadCSV,
    exp.ReadParquet,
    exp.Drop,
    exp.Alter,
    exp.Kill,
    exp.Transaction,
    exp.Commit,
    exp.Rollback,
)
_TABLE_FUNCTIONS = {"range", "generate_series", "unnest", "json_each", "json_tree"}
_REFUSED_FUNCTION = re.compile(
    r"^(read_\w+|parquet_\w+|\w*_scan|scan_\w+|sniff_\w+|duckdb_\w+|pragma_\w+|pg_\w+|query|query_table|glob|getenv|"
    r"getvariable|current_setting|set_config|write_log|nextval|currval|setval|setseed|sleep_ms|which_secret|"
    r"json_execute_serialized_sql|from_substrait\w*|\w*_logging|\w*_profil\w+|\w*checkpoint|\w*external_resource\w*|"
    r"load_aws_credentials|httpfs\w*|iceberg_\w+|delta_\w+|sqlite_\w+|postgres_\w+|mysql_\w+|st_read\w*|python_\w+|"
    r"repeat_row|shell\w*|system)$",
    re.IGNORECASE,
)


def parse(sql: str) -> exp.Query:
    """One SELECT-like statement. Raises QueryError with the place of a syntax error, or with what is refused."""
    tokens = _tokens(sql)
    _check_start(sql, tokens)
    numbered = _numbered(sql, tokens)
    trees = _trees(sql, numbered, tokens if numbered == sql else _tokenized(numbered))
    tree = trees[0] if len(trees) == 1 else None
    if isinstance(tree, exp.Values):
        tree = exp.select("*").from_(tree)
    if not isinstance(tree, exp.Query):
        raise _refusal(type(tree).__name__)
    _guard(tree)
    return tree


def split_explain(sql: str) -> tuple[Literal["", "explain", "analyze"], str]:
    """EXPLAIN or EXPLAIN ANALYZE in front of a query, and the query, whose places stay the same.

    sqlglot makes EXPLAIN a Command with the rest as text.
    """
    found = _EXPLAIN.match(sql)
    if found is None:
        return "", sql
    blanked = re.sub(r"[^\n]", " ", found[0])
    return ("analyze" if found[1] else "explain"), blanked + sql[found.end() :]


_EXPLAIN = re.compile(r"(?:\s|--[^\n]*\n|/\*.*?\*/)*EXPLAIN\b(?:\s+(ANALYZE)\b)?", re.IGNORECASE | re.DOTALL)


def parse_condition(text: str) -> exp.Expr:
    """A WHERE condition alone. Raises QueryError like parse()."""
    try:
        query = parse(f"SELECT 1 WHERE ({text}\n)")
    except QueryError as error:  # its place counts from a SELECT that the user did not write
        raise QueryError(error.what, where=text, next=error.next) from None
    where = query.args.get("where")
    others = {key for key, value in query.args.items() if value} - {"where", "expressions"}
    if not isinstance(where, exp.Where) or not isinstance(where.this, exp.Paren) or others:
        raise QueryError("where is one condition", where=text)
    return where.this


def statements(text: str) -> tuple[list[str], str]:
    """Every statement that a `;` ends, without it, and the rest; a `;` in a string or comment ends nothing."""
    try:
        tokens = _tokenized(text)
    except TokenError:  # an open string or comment: more is to come
        return [], text
    found, start = [], 0
    for token in tokens:
        if token.token_type == TokenType.SEMICOLON:
            found.append(text[start : token.start].strip())
            start = token.end + 1
    return [statement for statement in found if statement], text[start:]


def is_allowed(name: str) -> bool:
    """Whether a query may call the function of this name."""
    return not _REFUSED_FUNCTION.match(name)


def _trees(sql: str, numbered: str, tokens: Sequence[Token]) -> list[exp.Expr]:
    try:
        return [tree for tree in parse_tokens(tokens, numbered) if tree is not None]
    except ParseError as error:
        if numbered != sql:
            _trees(sql, sql, _tokenized(sql))  # raises with the places of the text as written
        raise _syntax_error(sql, error) from None
    except RecursionError:
        raise QueryError("the query is nested too deeply") from None


def _numbered(sql: str, tokens: Sequence[Token]) -> str:
    """`?` written as $1, $2, ...: the tree does not keep their order (LIMIT ? comes before WHERE ? in it)."""
    parts, done = [], 0
    places = [token for token in tokens if token.token_type == TokenType.PLACEHOLDER and token.text == "?"]
    for position, token in enumerate(places, 1):
        parts += [sql[done : token.start], f"${position}"]
        done = token.end + 1
    return "".join([*parts, sql[done:]])


def _tokenized(sql: str) -> list[Token]:
    """sqlglot 30.30 finds no end of a string `''` that ends a text with a $name in it; a newline more, and it does."""
    return sqlglot.tokenize(f"{sql}\n", read=DIALECT)


def _tokens(sql: str) -> Sequence[Token]:
    try:
        tokens = _tokenized(sql)
    except TokenError as error:
        raise QueryError(f"syntax error: {str(error).splitlines()[0]}", where=_place(sql, len(sql) - 1)) from None
    for token in tokens:
        if any(comment.startswith("+") for comment in token.comments):
            raise QueryError("hint comments have no effect here, so they are refused", where=_place(sql, token.start))
    return tokens


def _check_start(sql: str, tokens: Sequence[Token]) -> None:
    if not tokens:
        raise QueryError("the query is empty")
    first = tokens[0].text.upper()
    if _STATEMENT.fullmatch(first):
        raise _refusal(first)
    if first not in _STARTS:
        what = f"syntax error at {tokens[0].text!r}: a query starts with SELECT, FROM or WITH"
        raise QueryError(what, where=_place(sql, tokens[0].start))
    for token, following in itertools.pairwise(tokens):
        if token.token_type == TokenType.SEMICOLON and following.token_type != TokenType.SEMICOLON:
            raise QueryError("one statement at a time", where=_place(sql, following.start))


def _refusal(kind: str) -> QueryError:
    hint = (
        "EXPLAIN stands first, once, before one SELECT"
        if kind == "EXPLAIN"
        else "Queries read and never write; use SELECT"
    )
    return QueryError(f"{kind.upper()} is not allowed: only one SELECT is", next=hint)


def _place(sql: str, offset: int) -> str:
    before = sql[: max(offset, 0)]
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def _syntax_error(sql: str, error: ParseError) -> QueryError:
    first = error.errors[0] if error.errors else {}
    line, end, word = first.get("line"), first.get("col"), str(first.get("highlight") or "")
    if line is None or end is None:
        return QueryError(f"syntax error: {str(error).splitlines()[0]}")
    column = max(int(end) - len(word) + 1, 1)
    text = str(first.get("description", ""))
    text = "something is missing here" if text.startswith("Required keyword") else text.rstrip(".")
    shown = sql.splitlines()[int(line) - 1][max(column - 40, 0) : column + 40].strip()
    return QueryError(f"syntax error at {word!r}: {text}", where=f"line {line}, column {column}: {shown}")


def _guard(tree: exp.Expr) -> None:
    for node in tree.walk():
        if isinstance(node, _REFUSED):
            raise _refusal(type(node).__name__)
        if isinstance(node, exp.Table):
            _guard_table(node)
        elif isinstance(node, exp.Lateral) and isinstance(node.this, exp.Func):
            _guard_table_function(node.this)
        elif isinstance(node, exp.Func) and _REFUSED_FUNCTION.match(function_name(node)):
            raise QueryError(f"the function {function_name(node)}() is not allowed in a query")


def _guard_table(node: exp.Table) -> None:
    if isinstance(node.this, exp.Func):
        _guard_table_function(node.this)
    elif not isinstance(node.this, exp.Identifier):
        raise QueryError(f"{node.sql(DIALECT)} is not a table")
    elif node.args.get("db") or node.args.get("catalog"):
        raise QueryError(f"the table {node.sql(DIALECT)} is not known: tables have plain names here")
    alias = node.args.get("alias")
    at_version = alias is not None and isinstance(alias.this, exp.Placeholder)  # emoji@v3
    if node.args.get("when") or at_version:
        raise QueryError(
            "versions cannot be named this way",
            where=node.name if at_version else node.sql(DIALECT),
            next=f"Write FROM {node.name} FOR VERSION AS OF 3, or 'previous', before the alias",
        )


def _guard_table_function(node: exp.Expr) -> None:
    name = function_name(node)
    if name not in _TABLE_FUNCTIONS:
        raise QueryError(
            f"the table function {name}() is not allowed", next="Queries reach the table and the frames given, no file"
        )


def shown(node: exp.Expr) -> str:
    """A piece of a query for a message, functions in lower case."""
    return node.sql(DIALECT, normalize_functions="lower")[:200]


def function_name(node: exp.Expr) -> str:
    """The name as DuckDB would know it, in lower case."""
    if isinstance(node, exp.Anonymous):
        return str(node.this).lower()
    if isinstance(node, exp.GenerateSeries):
        return "range"
    return node.sql_name().lower() if isinstance(node, exp.Func) else type(node).__name__.lower()
