"""Transforms: pictures of every mode and shape, resampled waves, log-mel that does not see padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from conjoin.encoders.spec import AudioTransform, ImageTransform
from conjoin.encoders.transforms import augment_image, drop_features, fit_image, log_mel, mel_filters, resample

RED, WHITE = (255, 0, 0), (255, 255, 255)


def fit(image: Image.Image, **options: object) -> np.ndarray:
    return fit_image(image, ImageTransform(**{"size_px": 16, "resample": "bilinear", **options}))  # type: ignore[arg-type]  # options of each case


def test_pad_centres_the_whole_picture_on_the_background() -> None:
    pixels = fit(Image.new("RGB", (32, 16), RED), background=(1, 2, 3))
    assert (pixels[4:12] == RED).all()
    assert (pixels[:4] == (1, 2, 3)).all()
    assert (pixels[12:] == (1, 2, 3)).all()


def test_crop_shows_the_middle() -> None:
    picture = Image.new("RGB", (48, 16), WHITE)
    picture.paste(RED, (16, 0, 32, 16))
    assert (fit(picture, fit="crop") == RED).all()


def test_squash_shows_everything() -> None:
    picture = Image.new("RGB", (64, 16), WHITE)
    picture.paste(RED, (32, 0, 64, 16))
    pixels = fit(picture, fit="squash")
    assert (pixels[:, :6] == WHITE).all()
    assert (pixels[:, 10:] == RED).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (17, 16)])
@pytest.mark.parametrize("how", ["pad", "crop", "squash"])
def test_any_shape_fits(size: tuple[int, int], how: str) -> None:
    pixels = fit(Image.new("RGB", size, RED), fit=how)
    assert pixels.shape == (16, 16, 3)
    assert (pixels[7:9, 7:9] == RED).all(axis=2).any()


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]
)
def test_any_mode_becomes_rgb(mode: str) -> None:
    pixels = fit(Image.new(mode, (20, 20)))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (16, 16, 3)


def test_transparency_shows_the_background() -> None:
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert (fit(clear) == WHITE).all()
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.info["transparency"] = 0
    assert (fit(palette) == WHITE).all()


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((16, 16), 128 * 256, dtype=np.uint16))
    assert (fit(grey) == 128).all()


def test_augment_keeps_shape_and_follows_its_generator() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    first, again, other = (augment_image(pixels, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == pixels.shape
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_augment_never_mirrors() -> None:
    pixels = np.zeros((24, 24, 3), dtype=np.uint8)
    pixels[:, 16:] = 200
    for seed in range(20):
        found = augment_image(pixels, np.random.default_rng(seed))
        assert found[:, 20:].mean() > found[:, :4].mean() + 50


@pytest.mark.parametrize(("from_hz", "to_hz"), [(44_100, 16_000), (8_000, 16_000), (22_050, 16_000), (44_101, 16_000)])
def test_resampling_keeps_a_tone(from_hz: int, to_hz: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(from_hz) / from_hz).astype(np.float32)
    found = resample(tone, from_hz, to_hz)
    assert found.dtype == np.float32
    assert len(found) == to_hz
    expected = np.sin(2 * np.pi * 440 * np.arange(to_hz) / to_hz)
    assert np.abs(found - expected)[200:-200].max() < 2e-3


def test_resampling_removes_what_the_lower_rate_cannot_hold() -> None:
    tone = np.sin(2 * np.pi * 10_000 * np.arange(44_100) / 44_100).astype(np.float32)
    assert np.abs(resample(tone, 44_100, 16_000))[200:-200].max() < 1e-2


@pytest.mark.parametrize("size", [0, 1, 2])
def test_resampling_the_shortest_waves(size: int) -> None:
    assert len(resample(np.ones(size, dtype=np.float32), 44_100, 16_000)) == min(size, 1)


def test_mel_filters_cover_every_bin_band() -> None:
    filters = mel_filters(16_000, 400, 80)
    assert filters.shape == (80, 201)
    assert (filters.sum(1) > 0).all()
    peaks = filters.argmax(1)
    assert (np.diff(peaks) >= 0).all()


def test_log_mel_peaks_at_the_tone() -> None:
    transform = AudioTransform()
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000)[None]
    mel = log_mel(tone, transform)
    assert mel.shape == (1, 80, 101)
    centre_hz = 16_000 / 400 * mel_filters(16_000, 400, 80)[int(mel[0, :, 50].argmax())].argmax()
    assert abs(centre_hz - 1000) < 100


def test_log_mel_frames_do_not_depend_on_padding() -> None:
    wave = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3210)).astype(np.float32))
    alone = log_mel(wave, AudioTransform())
    padded = log_mel(torch.nn.functional.pad(wave, (0, 9999)), AudioTransform())
    torch.testing.assert_close(padded[:, :, : alone.shape[2]], alone)


def test_dropped_features_depend_on_the_row_key_and_not_on_the_batch() -> None:
    features = torch.ones(300, 64)
    keys = torch.randint(-(2**62), 2**62, (300,), generator=torch.Generator().manual_seed(0))
    whole = drop_features(features, keys, 0.6)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert drop_features(features[order], keys[order], 0.6).equal(whole[order])
    assert whole.unique().tolist() == pytest.approx([0.0, 2.5])
    assert (whole == 0).float().mean().item() == pytest.approx(0.6, abs=0.02)
    assert (whole == 0).float().mean(0).sub(0.6).abs().max() < 0.15
    assert not drop_features(features, keys + 1, 0.6).equal(whole)


def test_neighbouring_keys_drop_independently() -> None:
    hidden = drop_features(torch.ones(2000, 32), torch.arange(2000), 0.5) == 0
    agree = (hidden[1:] == hidden[:-1]).float().mean(1)
    assert agree.mean().item() == pytest.approx(0.5, abs=0.01)
    assert agree.std().item() == pytest.approx(0.5 / 32**0.5, rel=0.1)
