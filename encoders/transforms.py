"""Decoded values to tower inputs: pictures to pixels, waves to log-mel; the same for training and embedding.

What only training does (`augment_image`, `drop_features`) is drawn from numbers that the caller gives, never from a
process's own random state, so that it depends on the row and not on who computes it.

Assumes: the transform comes from the tower's spec and nothing else decides a number here; torch is imported only where
tensors are made, so that decoding workers stay small.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from conjoin.encoders.spec import AudioTransform, ImageTransform

if TYPE_CHECKING:
    import torch

_RESAMPLE = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MAX_ASPECT = 16
_MIN_CROP = 0.8
_JITTER = 0.2
_LEVELS = np.arange(256, dtype=np.float32)
_PASS_BAND = 0.95
_POWER_FLOOR = 1e-5
_GOLDEN = -0x61C8864680B583EB  # 2^64 / phi, as int64
_MASK_24 = (1 << 24) - 1


def fit_image(image: Image.Image, transform: ImageTransform) -> np.ndarray:
    """Any PIL picture to (size_px, size_px, 3) uint8; transparent parts show `background`."""
    size, resample = transform.size_px, _RESAMPLE[transform.resample]
    picture = opaque(image, transform.background)
    if transform.fit == "squash":
        return np.asarray(picture.resize((size, size), resample))
    if transform.fit == "pad":
        scale = size / max(picture.size)
        inner = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        canvas = Image.new("RGB", (size, size), transform.background)
        canvas.paste(picture.resize(inner, resample), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return np.asarray(canvas)
    picture = _without_long_ends(picture)
    width, height = picture.size
    short = max(transform.resize_px, size)
    # rounded down, as the libraries that trained these models do
    inner = (short, short * height // width) if width <= height else (short * width // height, short)
    left, top = (inner[0] - size) // 2, (inner[1] - size) // 2
    return np.asarray(picture.resize(inner, resample).crop((left, top, left + size, top + size)))


def augment_image(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Training variant of fitted pixels, same shape: a random crop, brightness and contrast; never mirrored.

    Mirroring would teach that a left arrow is a right arrow.
    """
    size = pixels.shape[0]
    side = size * rng.uniform(_MIN_CROP, 1.0)
    left, top = rng.uniform(0, size - side, 2)
    box = (float(left), float(top), float(left + side), float(top + side))
    cropped = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box=box).tobytes()
    contrast, brightness = rng.uniform(1 - _JITTER, 1 + _JITTER, 2)
    mean = np.frombuffer(cropped, np.uint8).mean(dtype=np.float32)
    # what becomes of each of 256 levels, instead of arithmetic on every pixel
    levels = np.clip((_LEVELS - mean) * contrast + mean * brightness, 0, 255).astype(np.uint8)
    return np.frombuffer(cropped.translate(levels.tobytes()), np.uint8).reshape(pixels.shape)


def drop_features(features_BW: torch.Tensor, keys_B: torch.Tensor, rate: float) -> torch.Tensor:
    """Dropout (Srivastava et al. 2014) of pooled features whose mask is a function of each row's key alone.

    keys: (B,) int64, one per row and epoch; rate: share of features set to zero, in [0, 1). The mean is kept.
    """
    import torch

    if rate == 0:
        return features_BW
    columns_W = torch.arange(1, features_BW.shape[1] + 1, device=features_BW.device)
    bits_BW = _mix(_mix(keys_B)[:, None] + columns_W * _GOLDEN)
    kept_BW = (bits_BW & _MASK_24).to(torch.float32) >= rate * (1 << 24)
    return features_BW * kept_BW.to(features_BW.dtype) / (1 - rate)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser (Steele et al. 2014) on wrapping int64."""
    x = (x ^ (x >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31 & (1 << 33) - 1)


def resample(wave: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Band-limited mono float32 wave at another rate: (S,) to (ceil(S * to_hz / from_hz),).

    Done on the spectrum, with a short taper below the lower Nyquist frequency so that clips do not ring.
    """
    wave = np.ascontiguousarray(wave, dtype=np.float32)
    if from_hz == to_hz or wave.size == 0:
        return wave
    divisor = gcd(from_hz, to_hz)
    up, down = to_hz // divisor, from_hz // divisor
    blocks = -(-wave.size // down)
    spectrum = np.fft.rfft(wave, n=blocks * down)
    num_bins = blocks * up // 2 + 1
    kept = np.zeros(num_bins, dtype=spectrum.dtype)
    num_kept = min(num_bins, spectrum.size)
    position = np.linspace(0.0, 1.0, num_kept)
    taper = np.cos(np.clip((position - _PASS_BAND) / (1 - _PASS_BAND), 0, 1) * np.pi / 2) ** 2
    kept[:num_kept] = spectrum[:num_kept] * taper
    resampled = np.fft.irfft(kept, n=blocks * up) * (up / down)
    return resampled[: -(-wave.size * up // down)].astype(np.float32)


def log_mel(wave_BS: torch.Tensor, transform: AudioTransform) -> torch.Tensor:
    """Zero-padded waves (B, S) to log-mel (B, M, F), F = 1 + S // hop; every frame depends on its own window only.

    What lies beyond a wave's end counts as silence, so that a clip's frames do not depend on the padding of its batch.
    """
    import torch

    window = torch.hann_window(transform.n_fft, device=wave_BS.device, dtype=wave_BS.dtype)
    spectrum = torch.stft(
        wave_BS, transform.n_fft, transform.hop, window=window, center=True, pad_mode="constant", return_complex=True
    )
    filters = torch.from_numpy(mel_filters(transform.sample_rate_hz, transform.n_fft, transform.num_mels))
    power = filters.to(wave_BS) @ spectrum.abs().square()
    return power.clamp_min(_POWER_FLOOR).log()


@cache
def mel_filters(sample_rate_hz: int, n_fft: int, num_mels: int) -> np.ndarray:
    """Triangles on the HTK mel scale, peak 1: (num_mels, n_fft // 2 + 1) float32."""
    bins_hz = np.linspace(0, sample_rate_hz / 2, n_fft // 2 + 1)
    top_mel = 2595 * np.log10(1 + sample_rate_hz / 2 / 700)
    edges_hz = 700 * (10 ** (np.linspace(0, top_mel, num_mels + 2) / 2595) - 1)
    rising = (bins_hz - edges_hz[:-2, None]) / np.diff(edges_hz)[:-1, None]
    falling = (edges_hz[2:, None] - bins_hz) / np.diff(edges_hz)[1:, None]
    filters = np.clip(np.minimum(rising, falling), 0, None).astype(np.float32)
    # a low filter narrower than a bin would be empty: give it the bin nearest to its peak
    empty = np.flatnonzero(filters.sum(1) == 0)
    filters[empty, np.abs(bins_hz - edges_hz[1:-1][empty, None]).argmin(1)] = 1.0
    return filters


def opaque(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB; 16-bit and float greys are scaled to 8 bits instead of clipped, transparency shows the background."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) // 256).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray((np.asarray(image) * 255).clip(0, 255).astype(np.uint8)).convert("RGB")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    canvas = Image.new("RGBA", layered.size, (*background, 255))
    return Image.alpha_composite(canvas, layered).convert("RGB")


def _without_long_ends(picture: Image.Image) -> Image.Image:
    """The middle of a strip: resizing its short side up would otherwise make an enormous picture."""
    width, height = picture.size
    if max(width, height) <= _MAX_ASPECT * min(width, height):
        return picture
    new_width, new_height = min(width, _MAX_ASPECT * height), min(height, _MAX_ASPECT * width)
    left, top = (width - new_width) // 2, (height - new_height) // 2
    return picture.crop((left, top, left + new_width, top + new_height))
