"""Values to what towers take: every way a picture, a sound or a text can be broken, and what comes of the good ones."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from conjoin.encoders.spec import AudioTransform, ImageTransform, TextTransform, TowerSpec
from conjoin.pipeline import decode as module
from conjoin.pipeline.decode import MAX_PIXELS, Decoded, decode

TEXT = TowerSpec("text", "transformer", {}, 8, TextTransform(16))
IMAGE = TowerSpec("image", "cnn", {}, 8, ImageTransform(size_px=16))
AUDIO = TowerSpec("audio", "audio-cnn", {}, 8, AudioTransform(sample_rate_hz=8_000, max_s=1.0))
RED, BLUE = (220, 20, 20), (20, 20, 220)


def halves(mode: str = "RGB", size: tuple[int, int] = (64, 32)) -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (size[0] // 2, 0, *size))
    return picture.convert(mode)


def encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


def one(tower: TowerSpec, value: object) -> np.ndarray:
    found = decode(tower, [value], threads=1)
    assert found.bad == ()
    assert isinstance(found.values[0], np.ndarray)
    return found.values[0]


def reason(tower: TowerSpec, value: object) -> str:
    found = decode(tower, [value], threads=1)
    assert found.values == []
    assert len(found.owners) == 0
    return f"{found.bad[0].stage}: {found.bad[0].reason}"


def near(pixel: np.ndarray, color: tuple[int, int, int], tolerance: int = 40) -> bool:
    return bool((np.abs(pixel.astype(int) - color) <= tolerance).all())


def wav(samples: np.ndarray, rate: int, kind: str = "WAV", **options: str) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind, **options)
    return out.getvalue()


def tone(rate: int, seconds: float = 0.5, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


@pytest.mark.parametrize(
    "data",
    [
        encoded(halves(), "PNG"),
        encoded(halves(), "JPEG", quality=95),
        encoded(halves(), "WEBP", lossless=True),
        encoded(halves(), "BMP"),
        encoded(halves("P"), "GIF"),
        encoded(halves("P"), "PNG"),
        encoded(halves("CMYK"), "JPEG", quality=95),
        encoded(halves("CMYK"), "TIFF"),
        encoded(halves("RGBA"), "PNG"),
        encoded(halves(), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 32), "green")]),
        encoded(halves(), "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 32), "green")], lossless=True),
    ],
    ids=[
        "png",
        "jpeg",
        "webp",
        "bmp",
        "gif",
        "palette-png",
        "cmyk-jpeg",
        "cmyk-tiff",
        "rgba",
        "animated-gif",
        "animated-webp",
    ],
)
def test_pictures_of_every_kind_show_their_first_frame(data: bytes) -> None:
    pixels = one(IMAGE, data)
    assert pixels.shape == (16, 16, 3)
    assert pixels.dtype == np.uint8
    assert near(pixels[8, 2], RED)
    assert near(pixels[8, 13], BLUE)
    assert near(pixels[0, 8], (255, 255, 255))  # fit: pad


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize(
    ("orientation", "left"), [(1, True), (2, False), (3, False), (6, True), (8, False)], ids=lambda value: str(value)
)
def test_exif_turns_the_picture(kind: str, orientation: int, left: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = one(IMAGE, encoded(halves(), kind, exif=exif))
    red, blue = (pixels[8, 2], pixels[8, 13]) if orientation < 5 else (pixels[2, 8], pixels[13, 8])
    assert near(red, RED if left else BLUE)
    assert near(blue, BLUE if left else RED)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = np.full((32, 32), 0x8000, np.uint16)
    assert near(one(IMAGE, encoded(Image.fromarray(grey), "PNG"))[8, 8], (128, 128, 128), 2)
    assert near(one(IMAGE, encoded(Image.fromarray(grey), "TIFF"))[8, 8], (128, 128, 128), 2)


def test_transparency_shows_the_background() -> None:
    clear = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    assert near(one(IMAGE, encoded(clear, "PNG"))[8, 8], (255, 255, 255), 0)
    palette = clear.convert("P")
    assert near(one(IMAGE, encoded(palette, "PNG", transparency=palette.getpixel((0, 0))))[8, 8], (255, 255, 255), 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 5_000), (5_000, 1)], ids=str)
@pytest.mark.parametrize("fit", ["pad", "crop", "squash"])
def test_a_single_pixel_and_a_line_are_pictures(size: tuple[int, int], fit: str) -> None:
    tower = TowerSpec("image", "cnn", {}, 8, ImageTransform(size_px=16, fit=fit))  # type: ignore[arg-type]
    pixels = one(tower, encoded(Image.new("RGB", size, RED), "PNG"))
    assert pixels.shape == (16, 16, 3)
    assert any(near(pixel, RED, 2) for pixel in pixels.reshape(-1, 3))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "decode: zero bytes"),
        (b"\0" * 100, "not a picture that can be read (100 bytes, begins with 0000000000000000)"),
        (b"<html>404</html>", "not a picture that can be read (16 bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture that can be read"),
        (encoded(halves(), "PNG")[:60], "decode: cannot decode: OSError"),
        (encoded(halves(size=(640, 320)), "JPEG")[:900], "truncated"),
        (encoded(halves(), "WEBP")[:40], "cannot decode: OSError"),
        (encoded(halves(), "PNG").replace(b"IDAT\x78\x9c", b"IDAT\x00\x00"), "cannot decode"),
        (png_header(8, 8), "cannot decode"),
        (png_header(30_000, 30_000), f"900,000,000 pixels, at most {MAX_PIXELS:,} are decoded"),
        (png_header(12_000, 9_000), f"108,000,000 pixels, at most {MAX_PIXELS:,} are decoded"),
        (7, "bytes or a URI are needed, not int"),
        ("", "empty address"),
        ("/nowhere/a.jpg", "fetch: no such file [/nowhere/a.jpg]"),
    ],
    ids=[
        "zero",
        "zeros",
        "html",
        "eps",
        "truncated-png",
        "truncated-jpeg",
        "truncated-webp",
        "corrupt",
        "no-pixels",
        "bomb",
        "small-bomb",
        "number",
        "empty-address",
        "missing-file",
    ],
)
def test_a_broken_picture_has_a_reason(data: object, words: str) -> None:
    assert words in reason(IMAGE, data)


@pytest.mark.parametrize("rate", [8_000, 44_100, 7_919, 11_025, 192_000])
def test_a_tone_keeps_its_pitch_and_length_at_any_rate(rate: int) -> None:
    wave = one(AUDIO, wav(np.stack([tone(rate), tone(rate)], 1), rate))
    assert wave.dtype == np.float32
    assert len(wave) == pytest.approx(4_000, abs=2)
    spectrum = np.abs(np.fft.rfft(wave))
    assert np.fft.rfftfreq(len(wave), 1 / 8_000)[spectrum.argmax()] == pytest.approx(440, abs=4)


def test_a_long_sound_is_cut() -> None:
    assert len(one(AUDIO, wav(tone(16_000, 3.0), 16_000))) == 8_000


@pytest.mark.parametrize("kind", ["FLAC", "OGG", "MP3"])
def test_compressed_sounds(kind: str) -> None:
    assert len(one(AUDIO, wav(tone(16_000), 16_000, kind))) >= 4_000


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "zero bytes"),
        (b"RIFF" + b"\0" * 60, "not a sound that can be read (64 bytes)"),
        (encoded(halves(), "PNG"), "not a sound that can be read"),
        (wav(np.zeros(0, np.float32), 8_000), "a sound without samples"),
        (wav(np.zeros(4_000, np.float32), 8_000), "silence: 4000 samples, none above 0.0001"),
        (wav(np.full(8, np.nan, np.float32), 8_000, subtype="FLOAT"), "samples that are not numbers"),
        (wav(tone(8_000), 8_000)[:8_000].replace(struct.pack("<I", 8_000), struct.pack("<I", 7), 1), "7 Hz"),
        ("/nowhere/a.wav", "fetch: no such file"),
    ],
    ids=["zero", "corrupt", "picture", "no-samples", "silent", "nan", "odd-rate", "missing-file"],
)
def test_a_broken_sound_has_a_reason(data: object, words: str) -> None:
    assert words in reason(AUDIO, data)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "empty text"),
        (" \n\t", "empty text"),
        (b"caf\xe9", "not UTF-8 at byte 3"),
        ("a\ud800", "not Unicode at character 1"),
        (3.5, "a text is needed, not float"),
    ],
    ids=["empty", "blank", "latin-1", "surrogate", "number"],
)
def test_a_broken_text_has_a_reason(value: object, words: str) -> None:
    assert reason(TEXT, value) == f"decode: {words}"


def test_a_megabyte_of_text_and_bytes_that_are_utf8_pass() -> None:
    long = "word " * 200_000
    assert decode(TEXT, [long, "caf\u00e9".encode()]).values == [long, "caf\u00e9"]


def test_nulls_are_not_bad_and_neighbours_of_bad_values_are_kept() -> None:
    good = encoded(halves(), "PNG")
    found = decode(IMAGE, [None, b"", good, [], good, b"x"])
    assert found.owners.tolist() == [2, 4]
    assert found.values[0] is found.values[1]
    assert [(bad.position, bad.modality) for bad in found.bad] == [(1, "image"), (5, "image")]


def test_of_a_list_the_first_value_or_all_of_them_count() -> None:
    mean = TowerSpec("text", "transformer", {}, 8, TextTransform(16), items="mean")
    values: list[object] = [["a", ""], [None, "b"], ["c", "d"]]
    first = decode(TEXT, values)
    assert (first.values, first.owners.tolist(), first.bad) == (["a", "b", "c"], [0, 1, 2], ())
    every = decode(mean, values)
    assert (every.values, every.owners.tolist()) == (["b", "c", "d"], [1, 2, 2])
    assert every.bad[0].reason == "item 1: empty text"


def test_thumbnails_keep_proportions_and_do_not_change_pixels() -> None:
    data = encoded(halves(size=(640, 320)), "JPEG")
    plain, found = decode(IMAGE, [data, b""]), decode(IMAGE, [data, b""], thumbnail_px=20)
    assert plain.thumbnails == [None, None]
    thumbnail, missing = found.thumbnails
    assert missing is None
    assert thumbnail is not None
    assert Image.open(io.BytesIO(thumbnail)).size == (20, 10)
    assert np.array_equal(plain.values[0], found.values[0])


def _same(one: Decoded, other: Decoded) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.values, other.values, strict=True)) and one.bad == other.bad


def test_large_pictures_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = module._Gate(2_000)
    monkeypatch.setattr(module, "_gate", gate)
    used: list[int] = []
    load = module._pixels

    def noting(*given: object) -> object:
        used.append(gate._used)
        return load(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_pixels", noting)
    sizes = [(20, 50), (10, 10), (90, 90), (20, 50), (40, 40), (1, 1)] * 4
    values = [encoded(Image.new("RGB", size, (n, 0, 0)), "PNG") for n, size in enumerate(sizes)]
    found = decode(IMAGE, values, threads=8)
    assert len(found.values) == len(sizes)
    assert max(used) <= 2_000
    assert gate._used == 0


def test_many_threads_fetch_but_few_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    decode_pixels = module._pixels

    def noting(*given: object) -> object:
        names.add(threading.current_thread().name)
        return decode_pixels(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_pixels", noting)
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(encoded(Image.new("RGB", (40, 40), (number, 0, 0)), "PNG"))
    found = decode(IMAGE, [str(tmp_path / f"{number}.png") for number in range(20)], threads=2)
    assert [int(value[8, 8, 0]) for value in found.values] == list(range(20))  # type: ignore[call-overload]
    assert len(names) <= 2


def test_threads_change_nothing() -> None:
    values = [encoded(Image.new("RGB", (40, 40), (n, 0, 0)), "PNG") if n % 3 else b"bad" for n in range(24)]
    assert _same(decode(IMAGE, values, threads=1), decode(IMAGE, values, threads=8))
