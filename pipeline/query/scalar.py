"""Scalar functions of ours that DuckDB calls with columns, each under a name that no other query uses.

Assumes: functions belong to the connection, which all queries share; whoever runs a query removes its own afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Function:
    """takes and result: DuckDB's names of types; body: of columns to one column, nulls included."""

    name: str
    takes: tuple[str, ...]
    result: str
    body: Callable[..., pa.Array]


def fresh_name(word: str) -> str:
    return f"__{word}{next(_numbers)}"


_numbers = itertools.count()
