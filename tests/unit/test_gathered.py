"""A unit put together from chunks, with an embedder made of arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from conjoin.pipeline import gathered as module
from conjoin.pipeline.chunks import Chunk
from conjoin.pipeline.decode import Bad, Decoded
from conjoin.pipeline.gathered import Gathered, Trouble
from conjoin.pipeline.source import content_hashes

DIM = 2
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text_hash", pa.binary(16)),
        pa.field("image_hash", pa.binary(16)),
        pa.field("image_thumb", pa.binary()),
        pa.field("text_vec", pa.list_(pa.float32(), DIM)),
        pa.field("image_vec", pa.list_(pa.float32(), DIM), metadata={"conjoin:modality": "image"}),
    ]
)


@dataclass
class Embedded:
    vectors: np.ndarray
    present: np.ndarray
    bad: tuple[Bad, ...]


class LengthEmbedder:
    """The vector of a value is (its length, 1); length 13 gives NaN, as a broken encoder would."""

    class spec:
        dim = DIM

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def embed_decoded(self, modality: str, decoded: Decoded, num_inputs: int) -> Embedded:
        self.calls.append((modality, len(decoded.values)))
        vectors, present = np.zeros((num_inputs, DIM), np.float32), np.zeros(num_inputs, bool)
        bad = []
        for value, owner in zip(decoded.values, decoded.owners.tolist(), strict=True):
            if len(value) == 13:
                bad.append(Bad(owner, modality, "embed", "not a number"))
            else:
                vectors[owner], present[owner] = (len(value), 1), True
        return Embedded(vectors, present, tuple(bad))


def decoded(values: Sequence[str | None]) -> Decoded:
    """`!` is what decoding refuses."""
    good = [(n, value) for n, value in enumerate(values) if value and value != "!"]
    bad = tuple(Bad(n, "any", "decode", "refused") for n, value in enumerate(values) if value == "!")
    thumbnails = [value.encode() if value and value != "!" else None for value in values]
    return Decoded([value for _, value in good], np.array([n for n, _ in good], np.int64), bad, thumbnails)


def chunk(start: int, texts: Sequence[str | None], images: Sequence[str | None]) -> Chunk:
    columns = {
        "id": pa.array([f"r{start + n}" for n in range(len(texts))]),
        "text_hash": content_hashes(pa.array(texts, pa.string())),
        "image_hash": content_hashes(pa.array(images, pa.string())),
    }
    return Chunk(start, pa.table(columns), {"text": decoded(texts), "image": decoded(images)})


def gather(*chunks: Chunk, embedder: LengthEmbedder | None = None) -> tuple[pa.Table, list[Trouble]]:
    rows = sum(chunk.columns.num_rows for chunk in chunks)
    made = Gathered(embedder or LengthEmbedder(), SCHEMA, ("text", "image"), rows)  # type: ignore[arg-type]
    for one in chunks:
        made.add(one)
    table, usable, troubles = made.finish()
    return table.select(SCHEMA.names).filter(pa.array(usable)).cast(SCHEMA), troubles


def test_rows_keep_their_order_and_missing_values_are_null() -> None:
    table, troubles = gather(chunk(0, ["aa", None], ["b", "ccc"]), chunk(2, ["dddd"], [None]))
    assert table.schema.equals(SCHEMA, check_metadata=True)
    assert table["id"].to_pylist() == ["r0", "r1", "r2"]
    assert table["text_vec"].to_pylist() == [[2, 1], None, [4, 1]]
    assert table["image_vec"].to_pylist() == [[1, 1], [3, 1], None]
    assert table["image_thumb"].to_pylist() == [b"b", b"ccc", None]
    assert troubles == []


def test_equal_contents_are_embedded_once_and_share_vector_thumbnail_and_trouble() -> None:
    embedder = LengthEmbedder()
    table, troubles = gather(
        chunk(0, ["aa", "aa", "x"], ["bb", "!", "cc"]), chunk(3, ["aa", "x"], ["bb", "!"]), embedder=embedder
    )
    assert sorted(embedder.calls) == [("image", 2), ("text", 2)]
    assert table["text_vec"].to_pylist() == [[2, 1], [2, 1], [1, 1], [2, 1], [1, 1]]
    assert table["image_thumb"].to_pylist() == [b"bb", None, b"cc", b"bb", None]
    assert troubles == [Trouble(1, "image", "decode", "refused"), Trouble(4, "image", "decode", "refused")]


def test_a_row_without_any_vector_is_left_out_with_a_reason() -> None:
    table, troubles = gather(chunk(0, ["!", None, "x" * 13, "ok"], [None, None, None, "!"]))
    assert table["id"].to_pylist() == ["r3"]
    assert troubles == [
        Trouble(0, "text", "decode", "refused"),
        Trouble(1, "", "read", "no value in any modality"),
        Trouble(2, "text", "embed", "not a number"),
        Trouble(3, "image", "decode", "refused"),
    ]


def test_large_values_do_not_wait_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_BYTES", 4)
    embedder = LengthEmbedder()
    parts = [chunk(2 * n, ["x", "x"], [f"{n}aaaa", f"{n}bbbb"]) for n in range(3)]
    table, _ = gather(*parts, embedder=embedder)
    assert embedder.calls.count(("image", 2)) == 3
    assert embedder.calls.count(("text", 1)) == 1
    assert table["image_vec"].to_pylist() == [[5, 1]] * 6


def test_a_unit_that_is_not_covered_is_an_error() -> None:
    made = Gathered(LengthEmbedder(), SCHEMA, ("text", "image"), 3)  # type: ignore[arg-type]
    made.add(chunk(0, ["a"], ["b"]))
    with pytest.raises(AssertionError, match="1 rows gathered, 3 planned"):
        made.finish()
