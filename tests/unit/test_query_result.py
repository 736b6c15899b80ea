"""Results print, show pictures, and escape what they hold."""

from __future__ import annotations

import pyarrow as pa

from conjoin.pipeline.query import Result

PNG = b"\x89PNG\r\n\x1a\n0000"


def result(**columns: object) -> Result:
    return Result(pa.table(columns), {})


def test_text_is_aligned_and_short() -> None:
    shown = repr(result(id=["a", "bbb"], v=[[0.1] * 9, None], b=[b"xyz", None], t=["x" * 200, "two\nlines"]))
    lines = shown.splitlines()
    assert lines[0].split() == ["id", "v", "b", "t"]
    assert "[0.100, 0.100, 0.100, ... 9]" in shown
    assert "<3 bytes>" in shown
    assert "two lines" in shown
    assert max(map(len, lines)) < 160
    assert lines[-1] == "(2 rows)"


def test_many_rows_are_cut() -> None:
    shown = repr(result(i=list(range(60))))
    assert shown.splitlines()[-1] == "(60 rows, 50 shown)"


def test_html_escapes_values_and_names_and_shows_pictures() -> None:
    html = result(**{"<b>": ["<script>alert(1)</script>"], "image_thumb": [PNG]})._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "&lt;b&gt;" in html
    assert '<img src="data:image/png;base64,' in html


def test_bytes_that_are_no_picture_are_counted() -> None:
    assert "&lt;4 bytes&gt;" in result(a=[b"<svg"])._repr_html_()


def test_a_name_that_occurs_twice_is_numbered() -> None:
    table = pa.table([pa.array([1]), pa.array([2]), pa.array([3])], names=["id", "id", "id_1"])
    found = Result(table, {})
    assert found.columns == ["id", "id_1", "id_1_1"]
    assert list(found) == found.to_pylist() == [{"id": 1, "id_1": 2, "id_1_1": 3}]


def test_conversions_and_emptiness() -> None:
    found = result(a=[1, 2])
    assert (len(found), found.to_pandas()["a"].tolist(), found.to_arrow().num_rows) == (2, [1, 2], 2)
    assert "(0 rows)" in repr(Result(pa.table({"a": pa.array([], pa.int64())}), {}))
