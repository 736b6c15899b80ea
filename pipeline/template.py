"""The text template of the run file, "{title}. {brand}": columns in, one text per row out, tidy where fields are empty.

Assumes: a field that is null or blank takes its separator with it; all null gives null.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, cast

from conjoin.pipeline import utf8
from conjoin.pipeline.errors import ConfigError, SourceError

if TYPE_CHECKING:
    import pyarrow as pa

_BRACKETS = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'"}
_SEPARATORS = " \t\n.,;:|/-"


def parts(template: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Columns of "{title}. {brand}" and the literals around them (one more than columns).

    Raises ConfigError for anything but plain {column} fields; `{{` is a brace.
    """
    literals, columns = [""], []
    try:
        for literal, column, spec, conversion in string.Formatter().parse(template):
            literals[-1] += literal
            if column is None:
                continue
            if not column or spec or conversion:
                raise ValueError("only {column} is allowed, without a format")
            columns.append(column)
            literals.append("")
        if not columns:
            raise ValueError("it names no column")
    except ValueError as error:
        raise ConfigError(f"source.text: {template!r} is not a template: {error}") from error
    return tuple(columns), tuple(literals)


def checked(text: str) -> str:
    """A column or template of the run file as it is. Raises ValueError for what is no template."""
    if "{" in text:
        try:
            parts(text)
        except ConfigError as error:
            raise ValueError(error.what) from None
    return text


def render(template: str, table: pa.Table) -> pa.Array:
    """The template over a table's columns: an empty field takes its separator with it; all null gives null.

    A row with a field of invalid UTF-8 is invalid UTF-8 (see utf8.python_values).
    """
    import pyarrow as pa

    columns, literals = parts(template)
    fields = {name: _as_texts(table[name], name) for name in dict.fromkeys(columns)}
    rows = zip(*(fields[name] for name in columns), strict=True)
    texts = [_render_row(row, literals) for row in rows]
    if any(isinstance(text, bytes) for text in texts):
        raw = [text.encode() if isinstance(text, str) else text for text in texts]
        return pa.array(raw, pa.binary()).cast(pa.string(), safe=False)
    return pa.array(texts, pa.string())


def _render_row(row: Sequence[str | bytes | None], literals: tuple[str, ...]) -> str | bytes | None:
    if all(value is None for value in row):
        return None
    filled = tuple(bool(value) for value in row)
    if not any(filled):
        return ""
    between = _literals_around(filled, literals)
    values = [value for value in row if value]
    if any(isinstance(value, bytes) for value in values):
        raw = [value if isinstance(value, bytes) else value.encode() for value in values]
        return b" ".join(raw)
    pieces = [between[0]]
    for value, literal in zip(cast(list[str], values), between[1:], strict=True):
        pieces += (value, literal)
    return "".join(pieces).strip()


@lru_cache(maxsize=4096)
def _literals_around(filled: tuple[bool, ...], literals: tuple[str, ...]) -> tuple[str, ...]:
    """The literals around the filled fields only, those beside an empty field merged into one."""
    kept = [literals[0]]
    first = True
    for position, (is_filled, right) in enumerate(zip(filled, literals[1:], strict=True)):
        if is_filled:
            kept.append(right)
            first = False
        else:
            kept[-1] = _merged(kept[-1], right, first, last=position == len(filled) - 1)
    return tuple(kept)


def _merged(left: str, right: str, first: bool, last: bool) -> str:
    """What stands where a field was empty: "({color})" vanishes, ". " and ". " become one."""
    opening, closing = left.rstrip(), right.lstrip()
    if opening and closing and _BRACKETS.get(opening[-1]) == closing[0]:
        left, right = opening[:-1], closing[1:]
    if first:
        label = right.lstrip(_SEPARATORS)
        return label if any(mark.isalnum() for mark in label) and not last else left
    if last:
        return right
    return right if right.strip() else left


def _as_texts(column: pa.ChunkedArray, name: str) -> list[str | bytes | None]:
    """One stripped text per row; numbers, dates and booleans as Arrow writes them, lists joined by commas."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_list(kind):
        rows = (utf8.python_values(row.values) if row.is_valid else None for row in column)
        return [None if row is None else ", ".join(str(item).strip() for item in row if item) for row in rows]
    if pa.types.is_binary(kind):
        texts: list[object] = [utf8.text_or_bytes(value) for value in column.to_pylist()]
    elif pa.types.is_string(kind) or pa.types.is_null(kind):
        texts = utf8.python_values(column)
    else:
        try:
            texts = pc.cast(column, pa.string()).to_pylist()
        except pa.ArrowNotImplementedError as error:
            raise SourceError(f"source.text: column {name!r} of type {kind} cannot be written as text") from error
    return [value.strip() if isinstance(value, str | bytes) else None for value in texts]
