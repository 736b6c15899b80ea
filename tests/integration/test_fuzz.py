"""Mutated records: every one is embedded or in quarantine with a reason; no crash, no vector that is not finite."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from shop import DATE

from conjoin.jobs.config import RunFile
from conjoin.jobs.nightly import run
from conjoin.pipeline import embed, quarantine, store
from conjoin.pipeline.errors import SourceError

KINDS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MODES = ("RGB", "L", "P", "RGBA", "CMYK", "I;16", "1", "LA", "F")
WORDS = (
    "red apple",
    "\0",
    "\u202e",
    "\U0001f34e" * 50,
    "\ufeff",
    "e\u0301" * 300,
    "\ud7ff",
    "{title}",
    "a\r\nb",
    "NaN",
)
PLACES = (
    "",
    " ",
    "file:///",
    "s3://",
    "http://127.0.0.1:1/a",
    "https://[::1",
    "ftp://a/b",
    "\0",
    "../" * 40,
    "%00",
    "a" * 5000,
)
Fuzz = Callable[[np.random.Generator], object]


def drawn(rng: np.random.Generator) -> bytes:
    """A picture of any format, mode and size that can be saved."""
    size = tuple(int(n) for n in rng.choice([1, 2, 3, 17, 64, 300], 2))
    pixels = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    try:
        mode = str(rng.choice(MODES))
        Image.fromarray(pixels).convert("L" if mode == "I;16" else "RGB").convert(mode).save(
            out, str(rng.choice(KINDS))
        )
    except (OSError, ValueError, KeyError):
        return pixels.tobytes()
    return out.getvalue()


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    """Bytes flipped, cut, repeated, inserted, or nothing at all."""
    found = bytearray(data)
    for _ in range(int(rng.integers(0, 4))):
        at = int(rng.integers(0, len(found) + 1))
        how = rng.integers(6)
        if how == 0 and found:
            for spot in rng.integers(0, len(found), int(rng.integers(1, 9))):
                found[spot] = int(rng.integers(256))
        elif how == 1:
            del found[at:]
        elif how == 2:
            found[at:at] = rng.bytes(int(rng.integers(1, 200)))
        elif how == 3:
            del found[at : at + int(rng.integers(1, 100))]
        elif how == 4:
            found += found[:at]
        elif at + 4 <= len(found):
            found[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"])
    return bytes(found) if rng.random() > 0.02 else b""


def picture(rng: np.random.Generator) -> bytes | None:
    return None if rng.random() < 0.03 else mutated(rng, drawn(rng))


def caption(rng: np.random.Generator) -> str | None:
    """Words, control characters, all planes of Unicode; sometimes very long, empty or null."""
    draw = rng.random()
    if draw < 0.05:
        return None
    if draw < 0.1:
        return " \t\n"[: int(rng.integers(4))]
    parts = [str(rng.choice(WORDS)) for _ in range(int(rng.integers(1, 4)))]
    codes = rng.integers(1, 0x10FFFF, int(rng.integers(0, 20)))
    parts.append("".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000))
    return " ".join(parts) * (2000 if draw > 0.995 else 1)


def place(folder: Path) -> Fuzz:
    """An address of a picture: good ones, mutated ones, of files that are no pictures, gone, or no files at all."""
    folder.mkdir()

    def made(rng: np.random.Generator) -> str | None:
        if rng.random() < 0.3:
            return f"{rng.choice(PLACES)}{rng.integers(9)}" if rng.random() < 0.9 else None
        path = folder / f"{rng.integers(1 << 40):x}.png"
        path.write_bytes(mutated(rng, drawn(rng)))
        named = str(path) if rng.random() < 0.5 else path.as_uri()
        if rng.random() < 0.2:
            at = int(rng.integers(len(named)))
            named = named[:at] + chr(int(rng.integers(1, 0x2FFF))) + named[at + 1 :]
        return named

    return made


def raw_strings(values: list[object], rng: np.random.Generator) -> pa.Array:
    """Captions as a column of strings, some of which are no UTF-8, as other writers leave them."""
    data = [None if value is None else str(value).encode() for value in values]
    return pa.array([mutated(rng, d) if d and rng.random() < 0.2 else d for d in data], pa.binary()).view(pa.string())


def config(folder: Path, encoder: Path, **source: str) -> RunFile:
    return RunFile.model_validate(
        {
            "name": "things",
            "source": {"path": str(folder / "source.parquet"), "id": "id", "text": "caption", **source},
            "encoder": str(encoder),
            "table": {"path": str(folder / "things.lance")},
            "embed": {"max_bad_fraction": 1.0, "unit_rows": 200},
            "gates": {"quarantine": 1, "hit_at_10_drop": 1, "row_change": 100},
        }
    )


def ids(count: int, rng: np.random.Generator) -> list[str]:
    """Different ids of any characters and length."""
    return [f"{n}{(caption(rng) or '')[: int(rng.integers(40))]}" for n in range(count)]


def check(made: RunFile, keys: list[str], values: dict[str, list[object]]) -> Counter[str]:
    """Each value that is not null has a finite unit vector or a reason; each id is in the table or in quarantine."""
    uri = made.table.path
    rows = {row["id"]: row for row in store.open_version(uri).to_table().to_pylist()}
    bad = quarantine.read_quarantine(uri, None)
    troubles = {(row["id"], row["modality"]): row for row in ([] if bad is None else bad.to_pylist())}
    assert set(rows) | {key for key, _ in troubles} == set(keys)
    met: Counter[str] = Counter()
    for number, key in enumerate(keys):
        for modality, column in values.items():
            vector = rows.get(key, {}).get(f"{modality}_vec")
            trouble = troubles.get((key, modality))
            if vector is not None:
                assert trouble is None
                assert np.linalg.norm(np.asarray(vector, np.float64)) == pytest.approx(1, abs=1e-4)  # NaN is not near
                met[f"{modality} embedded"] += 1
            elif column[number] is not None:
                assert trouble is not None, f"{modality} of {key!r} is nowhere"
                assert trouble["reason"]
                assert trouble["stage"] in ("read", "fetch", "decode", "embed")
                met[f"{modality} {trouble['stage']}"] += 1
            else:
                met[f"{modality} null"] += 1
    return met


def fuzz(folder: Path, encoder: Path, count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Nights over pictures in bytes and over addresses, half of the records each."""
    monkeypatch.setattr(embed, "_run_units", embed._run_here)  # a crash would be this process's
    monkeypatch.setattr("conjoin.pipeline.storage.FIRST_PAUSE_S", 0.0)
    met: Counter[str] = Counter()
    for name, image in (("bytes", picture), ("places", None)):
        rng, where = np.random.default_rng([seed, len(met)]), folder / name
        where.mkdir()
        draw: Fuzz = image or place(where / "files")
        keys = ids(count // 2, rng)
        values = {"image": [draw(rng) for _ in keys], "text": [caption(rng) for _ in keys]}
        columns = {"id": keys, "picture": values["image"], "caption": raw_strings(values["text"], rng)}
        pq.write_table(pa.table(columns), where / "source.parquet", row_group_size=150)
        made = config(where, encoder, image="picture")
        assert run(made, DATE).status == "published"
        met += Counter({f"{name}: {kind}": n for kind, n in check(made, keys, values).items()})
    return met


def odd_columns(rng: np.random.Generator) -> dict[str, pa.Array]:
    """A small source whose columns are of any type."""
    count = 6
    numbers = rng.integers(0, 99, count)
    kinds: list[pa.Array] = [
        pa.array(numbers),
        pa.array(numbers.astype(float)),
        pa.array(numbers.astype("datetime64[s]")),
        pa.array([bytes([n]) for n in numbers.tolist()]),
        pa.array([[str(n)] for n in numbers.tolist()]),
        pa.array([{"a": n} for n in numbers.tolist()]),
        pa.array([None] * count),
        pa.array([n % 2 == 0 for n in numbers.tolist()]),
        pa.array([f"w{n}" for n in numbers.tolist()]),
        pa.array([f"w{n}" for n in range(count)]).dictionary_encode(),
        pa.array([f"w{n}" for n in range(count)], pa.large_string()),
        pa.array([drawn(rng) for _ in range(count)], pa.large_binary()),
    ]
    chosen = rng.integers(0, len(kinds), 3)
    return {name: kinds[kind] for name, kind in zip(("id", "picture", "caption"), chosen, strict=True)}


def test_columns_of_any_type_are_embedded_or_refused_by_name(
    tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embed, "_run_units", embed._run_here)
    rng, refused, done = np.random.default_rng(3), 0, 0
    for number in range(25):
        where = tmp_path / str(number)
        where.mkdir()
        columns = odd_columns(rng)
        pq.write_table(pa.table(columns), where / "source.parquet")
        try:
            run(config(where, tiny_encoder, image="picture"), DATE)
        except SourceError:
            refused += 1
            continue
        keys = [str(key) for key in columns["id"].to_pylist()]
        found = store.open_version(f"{where}/things.lance").to_table()
        assert {str(key) for key in found["id"].to_pylist()} <= set(keys)
        done += 1
    assert refused
    assert done


def test_five_hundred_mutated_records(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met = fuzz(tmp_path, tiny_encoder, 500, 1, monkeypatch)
    assert {"bytes: image embedded", "bytes: image decode", "bytes: text embedded", "places: image fetch"} <= set(met)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_thousand_mutated_records(tmp_path: Path, tiny_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    print(sorted(fuzz(tmp_path, tiny_encoder, 10_000, 2, monkeypatch).items()))
