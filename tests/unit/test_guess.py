"""Guesses of columns, each with its reason."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.guess import Guess, guess

PNG, JPEG, OGG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"OggS\x00"
WEBP, WAV = b"RIFF\x00\x00\x00\x00WEBPVP8 ", b"RIFF\x00\x00\x00\x00WAVEfmt "


def guessed(path: Path, **columns: object) -> Guess:
    pq.write_table(pa.table(columns), path / "rows.parquet")
    return guess(str(path / "rows.parquet"))


def test_a_catalog(tmp_path: Path) -> None:
    found = guessed(
        tmp_path,
        brand=["a", "a"],
        image_id=["x", "y"],
        sku=["s1", "s2"],
        picture=[None, JPEG],
        title=["one", "two"],
        price=[1.5, 2.0],
        seen=[dt.date(2024, 1, 1)] * 2,
        tags=[["a"], ["b"]],
    )
    assert found.columns == {
        "id": "sku",
        "image": "picture",
        "text": "title",
        "keep": ["title", "brand", "image_id", "price", "seen"],
    }
    assert found.reasons["id"] == "unique in the first 2 rows"
    assert found.reasons["image"] == "its bytes begin like one"


@pytest.mark.parametrize(
    ("values", "modality", "reason"),
    [
        ([PNG], "image", "bytes begin"),
        ([WEBP], "image", "bytes begin"),
        ([OGG], "audio", "bytes begin"),
        ([WAV], "audio", "bytes begin"),
        (["s3://b/x.JPG"], "image", "end in .JPG"),
        (["https://h/x.webp?w=3&h=4.png"], "image", "end in .webp"),
        (["clips/one.flac"], "audio", "end in .flac"),
    ],
)
def test_media_by_their_bytes_or_endings(tmp_path: Path, values: list[object], modality: str, reason: str) -> None:
    found = guessed(tmp_path, id=[1], thing=values)
    assert found.columns[modality] == "thing"
    assert reason in found.reasons[modality]


def test_addresses_without_an_ending_by_their_name(tmp_path: Path) -> None:
    found = guessed(tmp_path, id=[1], link=["https://h/about"], image_url=["https://h/123"])
    assert found.columns["image"] == "image_url"


def test_ids_that_look_like_files_are_ids_and_bytes_win(tmp_path: Path) -> None:
    found = guessed(tmp_path, id=["a.ogg", "b.ogg"], source=["x.wav", "y.wav"], audio=[OGG, OGG])
    assert (found.columns["id"], found.columns["audio"]) == ("id", "audio")


def test_caption_before_title_and_no_text_without_a_name(tmp_path: Path) -> None:
    assert guessed(tmp_path, id=[1], title=["a"], caption=["b"]).columns["text"] == "caption"
    assert "text" not in guessed(tmp_path, id=[1], colour=["red"]).columns


def test_no_unique_column_is_said(tmp_path: Path) -> None:
    found = guessed(tmp_path, caption=["a", "a"])
    assert found.columns["id"] == "id"
    assert "no column is unique" in found.reasons["id"]


def test_an_empty_file_and_no_file(tmp_path: Path) -> None:
    assert guessed(tmp_path, id=pa.array([], pa.string()), caption=pa.array([], pa.string())).columns["keep"] == []
    with pytest.raises(SourceError, match="no such file"):
        guess(str(tmp_path / "none.parquet"))
