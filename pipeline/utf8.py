"""Arrow strings that may not be UTF-8: Parquet does not check, and one bad row must not stop the rest.

Assumes: what is not UTF-8 travels as binary until decoding names its row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import pyarrow as pa


def python_values(array: pa.Array | pa.ChunkedArray) -> list[object]:
    """`to_pylist`, except that a string of invalid UTF-8 comes as bytes instead of an error for all."""
    try:
        return cast(list[object], array.to_pylist())
    except UnicodeDecodeError:
        rows = checked(array).to_pylist()
        return [[text_or_bytes(item) for item in row] if isinstance(row, list) else text_or_bytes(row) for row in rows]


def text_or_bytes(value: bytes | None) -> str | bytes | None:
    """The text of UTF-8 bytes; other bytes as they are."""
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return value


def checked(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The column itself, or as binary (of lists: list of binary) if some string in it is not UTF-8."""
    import pyarrow as pa

    is_list = pa.types.is_list(column.type)
    if not pa.types.is_string(column.type.value_type if is_list else column.type):
        return column
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return column.cast(pa.list_(pa.binary()) if is_list else pa.binary())
    return column


def repaired(column: pa.ChunkedArray) -> pa.Array:
    """Strings of a binary column (or of lists of binary), invalid bytes as U+FFFD."""
    import pyarrow as pa

    def text(value: bytes | None) -> str | None:
        return None if value is None else value.decode(errors="replace")

    if pa.types.is_list(column.type):
        rows = [None if row is None else [text(item) for item in row] for row in column.to_pylist()]
        return pa.array(rows, pa.list_(pa.string()))
    return pa.array([text(value) for value in column.to_pylist()], pa.string())
