from __future__ import annotations

from conjoin.pipeline.report import Answer, Grid, Page, Picture, data_uri, render

WEBP = b"RIFF\x00\x00\x00\x00WEBPVP8 "


def page(caption: str) -> str:
    answers = [Answer("title", "SELECT 1 < 2", [Picture(caption, WEBP, "0.1"), Picture("none", None)], 0.012)]
    return render(Page("t", "lead", [("6,639", "rows")], answers, [Grid("g", ["a", "b"], [["x", "1"]], "why")]))


def test_everything_shown_is_escaped() -> None:
    text = page("<script>alert('x')</script>")
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "SELECT 1 &lt; 2" in text


def test_the_page_needs_no_network() -> None:
    text = page("apple")
    assert "http://" not in text
    assert "https://" not in text
    assert "data:image/webp;base64," in text


def test_the_type_of_a_picture_is_told_by_its_first_bytes() -> None:
    assert data_uri(b"\x89PNG....").startswith("data:image/png;")
    assert data_uri(b"\xff\xd8\xff").startswith("data:image/jpeg;")
