"""Everything that changes an embedding, as frozen data with JSON both ways; imports no torch.

Assumes: a field that can change a vector belongs here (it enters the fingerprint); one that cannot does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

FORMAT = 1

Kind = Literal["text", "image", "audio"]
Loss = Literal["infonce", "sigmoid", "triplet"]
Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class TextTransform:
    """Text to tokens: truncation only; casing and normal forms are the tokenizer's, kept beside the weights."""

    max_tokens: int = 64


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """Decoded picture to (3, size_px, size_px) float32, (value / 255 - mean) / std.

    fit: `pad` keeps all of it on `background`, `crop` its centre, `squash` changes its proportions.
    resize_px: for `crop`, the shorter side before the centre of size_px is cut out; 0 means size_px.
    """

    size_px: int = 128
    fit: Literal["pad", "crop", "squash"] = "pad"
    resize_px: int = 0
    resample: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    background: tuple[int, int, int] = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class AudioTransform:
    """Mono waveform to what the tower takes; `log-mel` is ours, `transformers` is the backbone's own extractor."""

    sample_rate_hz: int = 16_000
    max_s: float = 10.0
    front_end: Literal["log-mel", "transformers"] = "log-mel"
    n_fft: int = 400
    hop: int = 160
    num_mels: int = 80


Transform = TextTransform | ImageTransform | AudioTransform
_TRANSFORMS: dict[str, type[TextTransform] | type[ImageTransform] | type[AudioTransform]] = {
    "text": TextTransform,
    "image": ImageTransform,
    "audio": AudioTransform,
}


@dataclass(frozen=True, slots=True)
class TowerSpec:
    """One modality's tower: transform, backbone, pooling and projection head.

    backbone: `transformer`, `cnn`, `audio-cnn` (built in), `efficientnet-lite0`, or `transformers`.
    config: the backbone's own configuration, enough to rebuild it without a hub; for `transformers` the class, its
        config.json and, for audio, the feature extractor's.
    width: W, the pooled backbone output; the head maps (B, W) to (B, dim).
    pooling: over positions; `none` takes the backbone's own pooled or projected output.
    head_width: hidden units of an `mlp` head (norm, two layers, GELU); 0 otherwise.
    items: what embedding does with a list of values: the first one, or the renormalised mean of their vectors.
    """

    kind: Kind
    backbone: str
    config: Mapping[str, Json]
    width: int
    transform: Transform
    pooling: Literal["mean", "cls", "last", "none"] = "mean"
    head: Literal["linear", "mlp", "none"] = "linear"
    head_width: int = 0
    items: Literal["first", "mean"] = "first"


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """A joint encoder: towers that share `dim`, by modality; `loss` names what its scale and bias mean."""

    dim: int
    towers: Mapping[str, TowerSpec]
    loss: Loss = "infonce"
    format: int = field(default=FORMAT)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces; equal specs give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> EncoderSpec:
        """Raises ValueError when the format is newer than this code or a field is unknown."""
        raw = json.loads(text)
        if raw.get("format", 0) > FORMAT:
            raise ValueError(f"encoder spec has format {raw['format']}; this conjoin reads up to {FORMAT}: upgrade it")
        towers = {name: _tower(tower) for name, tower in raw.pop("towers").items()}
        return cls(towers=towers, **raw)


def _tower(raw: dict[str, object]) -> TowerSpec:
    kind = str(raw["kind"])
    fields = dict(raw.pop("transform"))  # type: ignore[call-overload]
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return TowerSpec(transform=_TRANSFORMS[kind](**values), **raw)  # type: ignore[arg-type]
