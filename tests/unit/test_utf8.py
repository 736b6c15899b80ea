"""Strings that are not UTF-8 travel as bytes; the others are untouched."""

from __future__ import annotations

import pyarrow as pa

from conjoin.pipeline import utf8


def _strings(*values: bytes | None) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(values, pa.binary()).view(pa.string())])


def test_python_values_decode_all_they_can() -> None:
    assert utf8.python_values(_strings(b"a", None, b"\xff")) == ["a", None, b"\xff"]
    assert utf8.python_values(pa.array([1, None])) == [1, None]
    inner = _strings(b"a", b"\xff").combine_chunks()
    assert utf8.python_values(pa.ListArray.from_arrays([0, 2], inner)) == [["a", b"\xff"]]


def test_checked_gives_binary_only_if_something_is_wrong() -> None:
    assert utf8.checked(_strings(b"a")).type == pa.string()
    assert utf8.checked(_strings(b"\xff")).type == pa.binary()
    assert utf8.checked(pa.chunked_array([[b"\xff"]])).type == pa.binary()


def test_repaired_is_valid() -> None:
    fixed = utf8.repaired(utf8.checked(_strings(b"a\xffb", None)))
    fixed.validate(full=True)
    assert fixed.to_pylist() == ["a\ufffdb", None]
