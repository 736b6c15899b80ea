"""The plainest search, `SELECT columns, distance(..) FROM t WHERE .. ORDER BY distance(..) LIMIT n`, put in order here.

DuckDB would need 3 ms more, most of them to be told what to do: as long as the search itself.
Assumes: every condition was pushed into Lance and the rows hold the nearest; what DuckDB has its own mind about (null
and NaN distances, types that it gives back as others, further sort keys) is left to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from sqlglot import exp

from conjoin.pipeline.query.functions import Measure, Rewritten
from conjoin.pipeline.query.planner import Read, count_of
from conjoin.pipeline.query.search import distances

# Types that DuckDB gives back as they are.
_SAME = (
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    *(pa.float32(), pa.float64(), pa.bool_(), pa.string(), pa.binary(), pa.date32()),
)


@dataclass(frozen=True, slots=True)
class Output:
    """One column of the answer: a copy of `column`, or the distance or similarity."""

    name: str
    column: str | None
    similarity: bool = False


@dataclass(frozen=True, slots=True)
class Ranked:
    """name: of the table that is read; offset, limit: of its rows by distance."""

    name: str
    measure: Measure
    outputs: tuple[Output, ...]
    offset: int
    limit: int


def ranked(tree: exp.Query, reads: Sequence[Read], rewritten: Rewritten) -> Ranked | None:
    """What the query asks for, None if it asks for anything that only DuckDB can do."""
    if len(reads) != 1 or not isinstance(tree, exp.Select) or tree.args.get("with_"):
        return None
    (read,) = reads
    if read.top is None or read.top.ties or read.reference.scope.expression is not tree:
        return None
    outputs = [_output(node, read, rewritten) for node in tree.expressions]
    limit, offset = count_of(tree.args.get("limit")), count_of(tree.args.get("offset"), missing=0)
    if limit is None or offset is None or None in outputs:
        return None
    return Ranked(read.reference.name, read.top.measure, tuple(o for o in outputs if o is not None), offset, limit)


def _output(node: exp.Expr, read: Read, rewritten: Rewritten) -> Output | None:
    inner, name = node.unalias().unnest(), node.alias_or_name
    if isinstance(inner, exp.Column) and len(inner.parts) <= 2:
        if inner.table and inner.table.lower() != read.reference.alias.lower():
            return None
        schema, column = read.reference.relation.schema, inner.name
        return Output(name, column) if column in schema.names and schema.field(column).type in _SAME else None
    measure, wanted = rewritten.measures.get(id(inner)), read.measure
    if measure is None or wanted is None or not isinstance(node, exp.Alias):
        return None
    same = measure.wanted is wanted.wanted and measure.column == wanted.column
    return Output(name, None, measure.similarity) if same else None


def answer(asked: Ranked, rows: pa.Table, vector: np.ndarray) -> pa.Table | None:
    """The rows in order, cut to the LIMIT; None where a distance is null or NaN.

    rows: (N) candidates with the vector column; vector: (D,) float32 of unit length.
    """
    column = rows.column(asked.measure.column.name)
    distance_N = distances(column, vector)
    if column.null_count or not np.isfinite(distance_N).all():
        return None
    distance_N = distance_N.clip(0, 2)  # rounding
    best = np.argsort(distance_N, kind="stable")[asked.offset : asked.offset + asked.limit]
    taken = pa.array(best)
    arrays = []
    for output in asked.outputs:
        if output.column is not None:
            arrays.append(rows.column(output.column).take(taken))
        else:
            arrays.append(pa.array(1 - distance_N[best] if output.similarity else distance_N[best]))
    return pa.Table.from_arrays(arrays, [output.name for output in asked.outputs])
