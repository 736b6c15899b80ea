"""Rows of a unit as pieces that lie in one row group each."""

from __future__ import annotations

import pyarrow as pa
import pytest

from conjoin.pipeline.stager import pieces_of


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (9, [("f0", 0, 0, [0, 1, 2]), ("f0", 1, 3, [5]), ("f1", 1, 4, [0, 1])]),
        (2, [("f0", 0, 0, [0, 1]), ("f0", 0, 2, [2]), ("f0", 1, 3, [5]), ("f1", 1, 4, [0, 1])]),
    ],
    ids=["whole", "cut"],
)
def test_pieces(most: int, expected: list[tuple[str, int, int, list[int]]]) -> None:
    rows = pa.table(
        {
            "file": pa.array([0, 0, 0, 0, 1, 1], pa.int32()),
            "row_group": pa.array([0, 0, 0, 1, 1, 1], pa.int32()),
            "row": pa.array([0, 1, 2, 5, 0, 1]),
            "id": pa.chunked_array([["a", "b"], ["c", "d", "e", "f"]]),
        }
    )
    pieces = list(pieces_of(rows, ["f0", "f1"], most))
    assert [(p.path, p.row_group, p.start, p.rows.tolist()) for p in pieces] == expected
    assert [key for piece in pieces for key in piece.ids.to_pylist()] == list("abcdef")
