"""Bytes, texts and URIs to what a tower takes; the only place where an unusable value becomes a Bad with its reason.

Assumes: a null is not bad (the record lacks that modality); a URI is fetched here; Pillow and libsndfile release the
GIL, so threads decode in parallel; what is decoded depends on the value and the spec alone.
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
from PIL import Image, UnidentifiedImageError

from conjoin.encoders.spec import AudioTransform, ImageTransform, TowerSpec
from conjoin.encoders.transforms import fit_image, opaque, resample
from conjoin.pipeline.errors import BadRecord, StorageError
from conjoin.pipeline.fetch import CONCURRENCY, Fetcher

if TYPE_CHECKING:
    import soundfile

Stage = Literal["read", "fetch", "decode", "embed"]

MAX_PIXELS = 89_478_485
# Formats that are pictures and nothing else; Pillow would also run Ghostscript on an EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA")
_PIXELS_AT_ONCE = 24_000_000
_SHRINK_GAP = 2
_SILENCE = 1e-4
_RATES_HZ = (1_000, 768_000)
_REASON_CHARS = 300
_EXIF_ORIENTATION = 0x0112
_TURNS: Mapping[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class _Gate:
    """Pictures are decoded side by side while their pixels stay below a limit; a larger one waits to be alone.

    Otherwise memory would grow with the number of threads.
    """

    def __init__(self, most: int) -> None:
        self._most, self._used, self._changed = most, 0, threading.Condition()

    @contextmanager
    def passing(self, pixels: int) -> Iterator[None]:
        share = min(pixels, self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._used + share <= self._most)
            self._used += share
        try:
            yield
        finally:
            with self._changed:
                self._used -= share
                self._changed.notify_all()


_gate = _Gate(_PIXELS_AT_ONCE)


@dataclass(frozen=True, slots=True)
class Bad:
    """A value that cannot be embedded: its position in the input, and why."""

    position: int
    modality: str
    stage: Stage
    reason: str


@dataclass(frozen=True, slots=True)
class Decoded:
    """values: str, (size, size, 3) uint8 or (S,) float32; owners: the input each belongs to, ascending (V,) int64.

    An input has no value if it is null or bad, several only if the spec embeds lists by their mean. thumbnails: WebP
    per input, None where none was asked for or made. Equal inputs share one value object.
    """

    values: list[str | np.ndarray]
    owners: np.ndarray
    bad: tuple[Bad, ...]
    thumbnails: list[bytes | None]


@dataclass(frozen=True, slots=True)
class _Item:
    value: str | np.ndarray | None = None
    thumbnail: bytes | None = None
    stage: Stage = "decode"
    reason: str = ""


@dataclass(frozen=True, slots=True)
class _Unknown:
    kind: str


def decode(tower: TowerSpec, values: Sequence[object], *, thumbnail_px: int = 0, threads: int = 0) -> Decoded:
    """Decode one modality's values: None, bytes, str (a text, or a URI), or lists of these.

    thumbnail_px: long side of the WebP thumbnails of pictures, 0 for none; they are made of the decoded picture, which
    of a large JPEG is twice the tower's size, so they may be smaller. threads: that decode, 0 takes the CPUs of this
    process; addresses are fetched by more. Everything is kept in memory: give Embedder.chunk inputs at a time.
    """
    lists = [_items(tower, value) for value in values]
    unique = list({item: None for items in lists for item in items})
    done = dict(zip(unique, _decode_all(tower, unique, thumbnail_px, threads), strict=True))
    kept: list[str | np.ndarray] = []
    owners: list[int] = []
    bad: list[Bad] = []
    thumbnails: list[bytes | None] = [None] * len(values)
    for position, items in enumerate(lists):
        found = [done[item] for item in items]
        wrong = next((n for n, item in enumerate(found) if item.value is None), None)
        if wrong is not None:
            where = f"item {wrong}: " if len(found) > 1 else ""
            bad.append(Bad(position, tower.kind, found[wrong].stage, where + found[wrong].reason))
        elif found:
            kept += [cast("str | np.ndarray", item.value) for item in found]
            owners += [position] * len(found)
            thumbnails[position] = found[0].thumbnail
    return Decoded(kept, np.array(owners, dtype=np.int64), tuple(bad), thumbnails)


def _items(tower: TowerSpec, value: object) -> list[object]:
    """The values of one input that its vector is made of."""
    items = value if isinstance(value, list | tuple) else [value]
    present = [_hashable(item) for item in items if item is not None]
    return present if tower.items == "mean" else present[:1]


def _hashable(item: object) -> object:
    if isinstance(item, str | bytes):
        return item
    if isinstance(item, bytearray | memoryview):
        return bytes(item)
    return str(item) if isinstance(item, Path) else _Unknown(type(item).__name__)


def _decode_all(tower: TowerSpec, values: list[object], thumbnail_px: int, threads: int) -> list[_Item]:
    if tower.kind == "text":
        return [_guarded(lambda value=value: _Item(_text(value))) for value in values]  # type: ignore[misc]
    fetcher, make = Fetcher(), _MEDIA[tower.kind]
    workers = min(threads or len(os.sched_getaffinity(0)), len(values))

    def one(value: object) -> _Item:
        return _guarded(lambda: make(tower, _bytes(value, fetcher), thumbnail_px))

    if not any(isinstance(value, str) for value in values):
        if workers <= 1:
            return [one(value) for value in values]
        with ThreadPoolExecutor(workers, "decode") as pool:
            return list(pool.map(one, values))

    # Many threads fetch, few decode: every thread that decodes keeps memory of its own.
    def fetched(value: object) -> _Item:
        return _guarded(lambda: decoders.submit(make, tower, _bytes(value, fetcher), thumbnail_px).result())

    with ThreadPoolExecutor(workers, "decode") as decoders, ThreadPoolExecutor(CONCURRENCY, "fetch") as fetchers:
        return list(fetchers.map(fetched, values))


def _guarded(make: Callable[[], _Item]) -> _Item:
    """The libraries raise anything on broken input; all of it is the input's fault."""
    try:
        return make()
    except StorageError as error:
        return _Item(stage="fetch", reason=str(error)[:_REASON_CHARS])
    except BadRecord as error:
        return _Item(reason=error.what)
    except Exception as error:
        return _Item(reason=f"cannot decode: {type(error).__name__}: {error}"[:_REASON_CHARS])


def _text(value: object) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise BadRecord(f"not UTF-8 at byte {error.start}") from None
    if not isinstance(value, str):
        raise BadRecord(f"a text is needed, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"not Unicode at character {error.start}") from None
    if not value.strip():
        raise BadRecord("empty text")
    return value


def _bytes(value: object, fetcher: Fetcher) -> bytes:
    if isinstance(value, str):
        if not value:
            raise BadRecord("empty address")
        value = fetcher.fetch(value)
    if not isinstance(value, bytes):
        raise BadRecord(f"bytes or a URI are needed, not {_kind(value)}")
    if not value:
        raise BadRecord("zero bytes")
    return value


def _kind(value: object) -> str:
    return value.kind if isinstance(value, _Unknown) else type(value).__name__


def _image(tower: TowerSpec, data: bytes, thumbnail_px: int) -> _Item:
    transform = cast(ImageTransform, tower.transform)
    image = _opened(data)
    image.draft(None, _enough(image.size, transform))
    with _gate.passing(image.width * image.height):
        return _pixels(image, transform, thumbnail_px)


def _opened(data: bytes) -> Image.Image:
    """The header only; refuses what would not fit into memory before a pixel is decoded."""
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = re.search(r"\d{6,}", str(error))
        raise _too_large(int(found[0]) if found else None) from None
    except UnidentifiedImageError:
        raise BadRecord(f"not a picture that can be read ({len(data)} bytes, begins with {data[:8].hex()})") from None
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(image.width * image.height)
    return image


def _too_large(num_pixels: int | None) -> BadRecord:
    size = "too many" if num_pixels is None else f"{num_pixels:,}"
    return BadRecord(f"{size} pixels, at most {MAX_PIXELS:,} are decoded")


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.ID)


def _pixels(image: Image.Image, transform: ImageTransform, thumbnail_px: int) -> _Item:
    image.load()
    picture = opaque(_upright(image), transform.background)
    thumbnail = _thumbnail(picture, thumbnail_px) if thumbnail_px else None
    return _Item(fit_image(picture, transform), thumbnail)


def _enough(size: tuple[int, int], transform: ImageTransform) -> tuple[int, int]:
    """What a JPEG may be decoded at: twice the final size, so that the last halving is a proper filter.

    Thumbnails have no say: asking for them must not change a vector.
    """
    width, height = size
    if transform.fit == "squash":
        scale = transform.size_px / min(width, height)
    elif transform.fit == "pad":
        scale = transform.size_px / max(width, height)
    else:
        scale = max(transform.resize_px, transform.size_px) / min(width, height)
    return (ceil(_SHRINK_GAP * scale * width), ceil(_SHRINK_GAP * scale * height))


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says; a broken EXIF block says nothing."""
    try:
        turn = _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:
        turn = None
    return image if turn is None else image.transpose(turn)


def _thumbnail(picture: Image.Image, thumbnail_px: int) -> bytes:
    small = picture.copy()
    small.thumbnail((thumbnail_px, thumbnail_px), reducing_gap=float(_SHRINK_GAP))
    out = io.BytesIO()
    small.save(out, "WEBP", quality=80, method=2)
    return out.getvalue()


def _audio(tower: TowerSpec, data: bytes, thumbnail_px: int) -> _Item:  # noqa: ARG001
    import soundfile

    transform = cast(AudioTransform, tower.transform)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as sound:
            return _Item(_wave(sound, transform))
    except soundfile.LibsndfileError as error:
        raise BadRecord(f"not a sound that can be read ({len(data)} bytes): {error.error_string}") from None


def _wave(sound: soundfile.SoundFile, transform: AudioTransform) -> np.ndarray:
    """The first max_s seconds, mono, at the spec's rate."""
    rate = sound.samplerate
    if not _RATES_HZ[0] <= rate <= _RATES_HZ[1]:
        raise BadRecord(f"a sample rate of {rate} Hz")
    wave = sound.read(ceil(transform.max_s * rate), dtype="float32", always_2d=True).mean(axis=1, dtype=np.float32)
    if not len(wave):
        raise BadRecord("a sound without samples")
    if not np.isfinite(wave).all():
        raise BadRecord("a sound with samples that are not numbers")
    if np.abs(wave).max() < _SILENCE:
        raise BadRecord(f"silence: {len(wave)} samples, none above {_SILENCE:g}")
    return resample(wave, rate, transform.sample_rate_hz)


_MEDIA: Mapping[str, Callable[[TowerSpec, bytes, int], _Item]] = {"image": _image, "audio": _audio}
