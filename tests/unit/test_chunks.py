"""Rows of a unit read and decoded: in order, in bounded tables, equal contents once, as planned or not at all."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conjoin.encoders.spec import AudioTransform, ImageTransform, TextTransform, TowerSpec
from conjoin.pipeline import chunks as module
from conjoin.pipeline import source
from conjoin.pipeline.chunks import Chunk, Piece, Recipe, chunks
from conjoin.pipeline.errors import SourceError
from conjoin.pipeline.source import SourceConfig, content_hash

TEXT = TowerSpec("text", "transformer", {}, 8, TextTransform(16))
IMAGE = TowerSpec("image", "cnn", {}, 8, ImageTransform(size_px=16))
AUDIO = TowerSpec("audio", "audio-cnn", {}, 8, AudioTransform(max_s=2.0))


def png(color: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (20, 20), color).save(out, "PNG")
    return out.getvalue()


def recipe_of(folder: Path, towers: Sequence[TowerSpec] = (TEXT,), thumbnail_px: int = 0, **fields: object) -> Recipe:
    config = SourceConfig.model_validate({"path": str(folder / "a.parquet"), "id": "id", **fields})
    names = [pa.field("id", pa.string())] + [pa.field(name, pa.float32()) for name in config.keep]
    uris = [pa.field("image_uri", pa.string())] if config.image == "url" else []
    return Recipe(config, {tower.kind: tower for tower in towers}, pa.schema(names + uris), thumbnail_px)


def piece_of(folder: Path, rows: Sequence[int], start: int = 0, row_group: int = 0) -> Piece:
    path = str(folder / "a.parquet")
    ids = pq.ParquetFile(path).read_row_group(row_group)["id"].combine_chunks().take(pa.array(rows, pa.int64()))
    return Piece(path, row_group, start, np.array(rows, np.int64), ids.cast(pa.string()))


def write(folder: Path, **columns: object) -> None:
    table = pa.table(columns)
    count = table.num_rows
    pq.write_table(
        table.append_column("id", pa.array([f"r{n}" for n in range(count)])), folder / "a.parquet", row_group_size=6
    )


def made(recipe: Recipe, *pieces: Piece) -> list[Chunk]:
    return list(chunks(recipe, pieces, 0))


def test_chunks_come_in_order_with_their_place_in_the_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 2)
    write(tmp_path, t=[f"text {n}" for n in range(9)], price=pa.array(range(9), pa.int16()))
    recipe = recipe_of(tmp_path, text="t", keep=["price"])
    found = made(recipe, piece_of(tmp_path, [0, 3, 4, 5]), piece_of(tmp_path, [1, 2], 4, row_group=1))
    assert [(chunk.start, chunk.columns["id"].to_pylist()) for chunk in found] == [
        (0, ["r0"]),
        (1, ["r3"]),
        (2, ["r4", "r5"]),
        (4, ["r7"]),
        (5, ["r8"]),
    ]
    last = found[2]
    assert last.columns["price"].to_pylist() == [4.0, 5.0]
    assert last.columns["text"].to_pylist() == last.decoded["text"].values == ["text 4", "text 5"]
    assert last.columns["text_hash"].to_pylist() == [content_hash("text 4"), content_hash("text 5")]
    assert last.columns["kept_hash"].to_pylist() == found[2].columns["kept_hash"].unique().to_pylist()
    assert last.columns["kept_hash"].null_count == 0
    assert last.columns["changed_by_hash"].null_count == 2


def test_equal_contents_are_decoded_once(tmp_path: Path) -> None:
    red, blue = png("red"), png("blue")
    write(tmp_path, i=[red, blue, red, None, b"", b""])
    (chunk,) = made(recipe_of(tmp_path, (IMAGE,), 8, image="i"), piece_of(tmp_path, range(6)))
    decoded = chunk.decoded["image"]
    assert decoded.owners.tolist() == [0, 1]
    assert [bad.position for bad in decoded.bad] == [4]
    assert [thumbnail is not None for thumbnail in decoded.thumbnails] == [True, True, False, False, False, False]
    hashes = chunk.columns["image_hash"].to_pylist()
    assert hashes[0] == hashes[2] != hashes[1]
    assert hashes[3] is None


def test_neighbours_of_a_text_that_is_not_utf8(tmp_path: Path) -> None:
    write(tmp_path, t=pa.array([b"one", b"\xff", b"two"], pa.binary()).view(pa.string()))
    (chunk,) = made(recipe_of(tmp_path, text="t"), piece_of(tmp_path, range(3)))
    assert chunk.columns["text"].to_pylist() == ["one", None, "two"]
    assert chunk.columns["text_hash"].to_pylist() == [content_hash(value) for value in ("one", b"\xff", "two")]
    assert chunk.decoded["text"].values == ["one", "two"]
    assert chunk.decoded["text"].bad[0].reason == "not UTF-8 at byte 0"


def test_addresses_stand_beside_their_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png("red"))
    write(tmp_path, url=["a.png", "b.png", None])
    (chunk,) = made(recipe_of(tmp_path, (IMAGE,), image="url"), piece_of(tmp_path, range(3)))
    assert chunk.columns["image_uri"].to_pylist() == [f"{tmp_path}/a.png", f"{tmp_path}/b.png", None]
    assert chunk.decoded["image"].owners.tolist() == [0]
    assert chunk.decoded["image"].bad[0].reason == f"no such file [{tmp_path}/b.png]"


def test_a_file_whose_addresses_are_all_missing(tmp_path: Path) -> None:
    write(tmp_path, url=pa.nulls(2), t=["a", "b"])
    (chunk,) = made(recipe_of(tmp_path, (TEXT, IMAGE), text="t", image="url"), piece_of(tmp_path, range(2)))
    assert chunk.columns["image_uri"].to_pylist() == [None, None]
    assert chunk.decoded["image"].bad == ()


@pytest.mark.parametrize(("items", "text"), [("first", "a"), ("mean", "a\nb")])
def test_the_text_column_of_lists(tmp_path: Path, items: str, text: str) -> None:
    tower = TowerSpec("text", "transformer", {}, 8, TextTransform(16), items=items)  # type: ignore[arg-type]
    write(tmp_path, t=pa.array([["a", "b"], [], None], pa.list_(pa.string())))
    (chunk,) = made(recipe_of(tmp_path, (tower,), text="t"), piece_of(tmp_path, range(3)))
    assert chunk.columns["text"].to_pylist() == [text, None, None]


def test_what_changed_by_says_is_hashed(tmp_path: Path) -> None:
    write(tmp_path, t=["a", "b"], when=["mon", None])
    (chunk,) = made(recipe_of(tmp_path, text="t", changed_by="when"), piece_of(tmp_path, range(2)))
    assert chunk.columns["changed_by_hash"].to_pylist() == [content_hash("mon"), None]


def test_other_ids_than_planned_are_refused(tmp_path: Path) -> None:
    write(tmp_path, t=["a", "b"])
    piece = piece_of(tmp_path, range(2))
    pq.write_table(pa.table({"id": ["r0", "other"], "t": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"ids differ from the plan.*a\.parquet row group 0.*next night"):
        made(recipe_of(tmp_path, text="t"), piece)


def test_fewer_rows_than_planned_are_refused(tmp_path: Path) -> None:
    write(tmp_path, t=["a", "b", "c"])
    piece = piece_of(tmp_path, range(3))
    write(tmp_path, t=["a"])
    with pytest.raises(SourceError, match=r"row group 0 has 1 rows, not 3.*Was the file replaced"):
        made(recipe_of(tmp_path, text="t"), piece)


@pytest.mark.parametrize(
    ("towers", "rows"), [((TEXT,), 2048), ((IMAGE,), 2048), ((AUDIO,), 262), ((TEXT, AUDIO, IMAGE), 262)], ids=str
)
def test_a_chunk_is_bounded_by_its_largest_modality(towers: tuple[TowerSpec, ...], rows: int) -> None:
    assert module._batch_rows({tower.kind: tower for tower in towers}) == rows


def test_large_values_come_in_small_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_BATCH_BYTES", 20_000)
    texts = [str(np.random.default_rng(n).bytes(5_000).hex()) for n in range(6)]
    write(tmp_path, t=texts)
    found = made(recipe_of(tmp_path, text="t"), piece_of(tmp_path, range(6)))
    assert max(chunk.columns.num_rows for chunk in found) <= 2
    assert [value for chunk in found for value in chunk.decoded["text"].values] == texts
