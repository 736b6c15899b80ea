"""What the columns of a Parquet file probably are, with the reason for each guess; `conjoin init` shows both.

Assumes: a look at the schema and the first rows of the first file is enough for a first draft.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass

_ROWS = 200
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM")
_SOUNDS = (b"OggS", b"fLaC", b"ID3")
_PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
_SOUND_SUFFIXES = (".wav", ".ogg", ".flac", ".mp3")
_URI = ("http://", "https://", "s3://", "file://")
_ID_NAMES = ("id", "key", "sku", "uid", "uuid")
_TEXT_NAMES = ("caption", "text", "title", "description", "name", "transcript")
_MOST_KEPT = 8


@dataclass(frozen=True, slots=True)
class Guess:
    """columns: fields of the run file's source section; reasons: why, by field."""

    columns: Mapping[str, object]
    reasons: Mapping[str, str]


def guess(path: str) -> Guess:
    """Raises SourceError if the data cannot be read."""
    from conjoin.pipeline import listing
    from conjoin.pipeline.source import first_rows, python_values

    table = first_rows(listing.parquet_files(path)[0].uri, _ROWS)
    values = {name: [v for v in python_values(table[name]) if v is not None] for name in table.column_names}
    columns: dict[str, object] = {}
    reasons: dict[str, str] = {}
    _add(columns, reasons, "id", _id(values) or ("id", "no column is unique: name the one that identifies a record"))
    media = {name: v for name, v in values.items() if name != columns["id"]}
    for modality, heads, suffixes in (("image", _PICTURES, _PICTURE_SUFFIXES), ("audio", _SOUNDS, _SOUND_SUFFIXES)):
        _add(columns, reasons, modality, _bytes(media, modality, heads) or _uris(media, modality, suffixes))
    taken = set(map(str, columns.values()))
    _add(columns, reasons, "text", _text({name: v for name, v in values.items() if name not in taken}))
    used, plain = set(map(str, columns.values())), (str, int, float, dt.date)
    kept = [name for name, found in values.items() if name not in used and found and isinstance(found[0], plain)]
    columns["keep"] = ([str(columns["text"])] if "text" in columns else []) + kept[:_MOST_KEPT]
    return Guess(columns, reasons)


def _add(columns: dict[str, object], reasons: dict[str, str], field: str, found: tuple[str, str] | None) -> None:
    if found:
        columns[field], reasons[field] = found


def _id(values: Mapping[str, list[object]]) -> tuple[str, str] | None:
    unique = [
        name
        for name, found in values.items()
        if found and isinstance(found[0], str | int) and len(set(found)) == len(found)
    ]
    named = [name for name in unique if name.lower() in _ID_NAMES]
    named += [name for name in unique if name.lower().endswith("_id")]
    for name in named or unique:
        return name, f"unique in the first {len(values[name])} rows"
    return None


def _bytes(values: Mapping[str, list[object]], modality: str, heads: tuple[bytes, ...]) -> tuple[str, str] | None:
    for name, found in values.items():
        first = found[0] if found else None
        if isinstance(first, bytes) and (first.startswith(heads) or _riff(first) == modality):
            return name, "its bytes begin like one"
    return None


def _uris(values: Mapping[str, list[object]], modality: str, suffixes: tuple[str, ...]) -> tuple[str, str] | None:
    for name, found in values.items():
        first = found[0] if found else None
        if not isinstance(first, str):
            continue
        if first.lower().split("?")[0].endswith(suffixes):
            return name, f"its values end in .{first.split('?')[0].rsplit('.', 1)[-1]}"
        if first.startswith(_URI) and modality in name.lower():
            return name, "its name says so and its values are addresses"
    return None


def _riff(value: bytes) -> str:
    if value[:4] != b"RIFF":
        return ""
    return "image" if value[8:12] == b"WEBP" else "audio"


def _text(values: Mapping[str, list[object]]) -> tuple[str, str] | None:
    texts = [name for name, found in values.items() if found and all(isinstance(value, str) for value in found)]
    for wanted in _TEXT_NAMES:
        for name in texts:
            if wanted in name.lower():
                return name, "its name says so"
    return None
