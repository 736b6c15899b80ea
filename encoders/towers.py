"""Towers: a backbone, pooling and a projection head, one class per kind of value; (values) to (B, D).

Assumes: a tower is wholly described by its spec, its weights and its tokenizer; a backbone always runs in evaluation
mode (no dropout, frozen running statistics), trained or not, so that a row's embedding depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import nn

from conjoin.encoders import audio_input, backbones, efficientnet, own, preparation, pretrained, tokenizer
from conjoin.encoders.options import TowerOptions as TowerOptions
from conjoin.encoders.spec import AudioTransform, ImageTransform, Json, Kind, TextTransform, TowerSpec
from conjoin.encoders.transforms import log_mel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Inputs = dict[str, torch.Tensor]


class Tower(nn.Module):
    """What all towers share: the head, and the split into features (cacheable while frozen) and projection."""

    def __init__(self, spec: TowerSpec, dim: int, backbone: nn.Module, text: Tokenizer | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = backbone
        self.tokenizer = text
        self.head = _head(spec, dim)
        self.eval()

    def collate(self, values: Sequence[str | np.ndarray]) -> Inputs:
        """Decoded values to one batch of inputs on the CPU."""
        raise NotImplementedError

    def features(self, inputs: Inputs) -> torch.Tensor:
        """The pooled backbone output (B, W)."""
        raise NotImplementedError

    def length(self, value: str | np.ndarray) -> int:
        """What a value costs: tokens, pixels or samples; batches of equal lengths waste nothing."""
        raise NotImplementedError

    def sample(self, *, longest: bool) -> str | np.ndarray:
        """A value as long as the transform lets through, or one that costs little: to measure memory or shapes with."""
        raise NotImplementedError

    def project(self, features_BW: torch.Tensor) -> torch.Tensor:
        """Features to the shared space, (B, W) to (B, D), not normalised."""
        projected: torch.Tensor = self.head(features_BW)
        return projected

    def freeze_backbone(self) -> None:
        """Only the head learns from here on."""
        self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> Tower:
        """The head follows `mode`; the backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self


class TextTower(Tower):
    """str to (B, D)."""

    def collate(self, values: Sequence[str | np.ndarray]) -> Inputs:
        """Texts to ids and mask, both (B, L) int64."""
        assert self.tokenizer is not None
        ids, mask = tokenizer.encode(self.tokenizer, [f"{self._prompt}{value}" for value in values])
        return {"input_ids": ids, "attention_mask": mask if self.spec.config.get("masked", True) else mask.fill_(1)}

    def features(self, inputs: Inputs) -> torch.Tensor:
        mask_BL = inputs["attention_mask"]
        hidden = self.backbone(input_ids=inputs["input_ids"], attention_mask=mask_BL)
        return _pool(hidden, mask_BL, self.spec.pooling)

    def length(self, value: str | np.ndarray) -> int:
        assert self.tokenizer is not None
        return len(tokenizer.encode(self.tokenizer, [f"{self._prompt}{value}"])[0][0])

    @property
    def _prompt(self) -> str:
        """What an imported model was trained to read before every text; usually nothing."""
        return str(self.spec.config.get("prompt", ""))

    def sample(self, *, longest: bool) -> str:
        return "a " * cast(TextTransform, self.spec.transform).max_tokens if longest else "a"


class ImageTower(Tower):
    """Fitted pixels, (size, size, 3) uint8, to (B, D)."""

    def collate(self, values: Sequence[str | np.ndarray]) -> Inputs:
        """Pictures to (B, H, W, 3) uint8; they are normalised on the device, where they take a quarter to move."""
        return {"pixels": torch.from_numpy(np.stack(cast(Sequence[np.ndarray], values)))}

    def features(self, inputs: Inputs) -> torch.Tensor:
        transform = cast(ImageTransform, self.spec.transform)
        pixels = inputs["pixels"]
        dtype = next(self.backbone.parameters()).dtype
        mean = torch.tensor(transform.mean, dtype=dtype, device=pixels.device)
        std = torch.tensor(transform.std, dtype=dtype, device=pixels.device)
        normalised = ((pixels.to(dtype) / 255 - mean) / std).permute(0, 3, 1, 2)
        hidden = self.backbone(pixel_values=normalised)
        return _pool(hidden, None, self.spec.pooling)

    def length(self, value: str | np.ndarray) -> int:  # noqa: ARG002
        return cast(ImageTransform, self.spec.transform).size_px ** 2

    def sample(self, *, longest: bool) -> np.ndarray:  # noqa: ARG002  # pictures cost the same
        size = cast(ImageTransform, self.spec.transform).size_px
        return np.zeros((size, size, 3), np.uint8)


class AudioTower(Tower):
    """Mono float32 waves at the spec's rate to (B, D); only the first max_s seconds count."""

    def collate(self, values: Sequence[str | np.ndarray]) -> Inputs:
        """Waves to what the backbone takes, and `num_samples` (B,)."""
        transform = cast(AudioTransform, self.spec.transform)
        limit = round(transform.max_s * transform.sample_rate_hz)
        waves = [np.asarray(value, dtype=np.float32)[:limit] for value in values]
        if transform.front_end == "transformers":
            return audio_input.extract(self.spec.config, waves)
        return audio_input.padded(waves)

    def features(self, inputs: Inputs) -> torch.Tensor:
        transform = cast(AudioTransform, self.spec.transform)
        num_samples_B = inputs["num_samples"]
        if transform.front_end == "log-mel":
            mel = log_mel(inputs["waves"].to(next(self.backbone.parameters()).dtype), transform)
            pooled: torch.Tensor = self.backbone(mel, 1 + num_samples_B // transform.hop)
            return pooled
        if "waves" in inputs:
            return torch.cat(
                [self._alone(wave[:size]) for wave, size in zip(inputs["waves"], num_samples_B, strict=True)]
            )
        hidden = self.backbone(**{key: value for key, value in inputs.items() if key != "num_samples"})
        whole = self.spec.config["padded_samples"]
        if hidden.ndim == 2 or not isinstance(whole, int):
            return _pool(hidden, None, self.spec.pooling)
        return _pool(hidden, audio_input.heard(num_samples_B, whole, hidden.shape[1]), self.spec.pooling)

    def _alone(self, wave_S: torch.Tensor) -> torch.Tensor:
        return _pool(self.backbone(input_values=wave_S[None]), None, self.spec.pooling)

    def length(self, value: str | np.ndarray) -> int:
        return len(value)

    def sample(self, *, longest: bool) -> np.ndarray:
        transform = cast(AudioTransform, self.spec.transform)
        seconds = transform.max_s if longest else min(transform.max_s, 1.0)
        return np.zeros(round(seconds * transform.sample_rate_hz), np.float32)


_TOWERS: Mapping[str, type[Tower]] = {"text": TextTower, "image": ImageTower, "audio": AudioTower}


def build_tower(
    kind: Kind, options: TowerOptions, dim: int, captions: Sequence[str] = (), backbone: nn.Module | None = None
) -> Tower:
    """A new tower: pretrained, random or the caller's own backbone, random head; `captions` train a new tokenizer.

    The same options and captions give the same weights. Raises ValueError naming the model and what to do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        if backbone is not None:
            spec, text = _own(kind, options, captions, backbone)
        elif options.model == "builtin":
            spec, text = _BUILTIN[kind](options, captions)
            backbone = _backbone(spec)
        elif options.model == "efficientnet-lite0":
            spec, text = _efficientnet_spec(kind, options), None
            backbone = efficientnet.pretrained()
        else:
            spec, backbone, text = _from_library(kind, options)
        if options.head == "none" and spec.width != dim:
            raise ValueError(f"{options.model} gives vectors of {spec.width}; without a head dim must be {spec.width}")
        head_width = max(spec.width, dim) if options.head == "mlp" else 0
        spec = replace(spec, head=options.head, head_width=head_width, items=options.items)
        return _TOWERS[kind](spec, dim, backbone, text)


def rebuild_tower(spec: TowerSpec, dim: int, tokenizer_json: str | None) -> Tower:
    """The tower a spec describes, weights unset; nothing is looked up outside this machine's packages."""
    text = None
    if tokenizer_json is not None:
        text = tokenizer.from_json(tokenizer_json, cast(TextTransform, spec.transform).max_tokens)
    return _TOWERS[spec.kind](spec, dim, _backbone(spec), text)


def _backbone(spec: TowerSpec) -> nn.Module:
    if spec.backbone == "transformers":
        return _wrapped(pretrained.rebuild(spec.config), spec)
    if spec.backbone == "own":
        return own.rebuild(spec.config)
    if spec.backbone not in _BACKBONES:
        raise ValueError(f"unknown backbone {spec.backbone!r}; a newer conjoin made this encoder: upgrade")
    return _BACKBONES[spec.backbone](**spec.config)


_BACKBONES: Mapping[str, Callable[..., nn.Module]] = {
    "transformer": backbones.TextTransformer,
    "cnn": backbones.ImageCnn,
    "audio-cnn": backbones.AudioCnn,
    "efficientnet-lite0": efficientnet.EfficientNetLite0,
}
_Made = tuple[TowerSpec, "Tokenizer | None"]


def _builtin_text(options: TowerOptions, captions: Sequence[str]) -> _Made:
    if not captions:
        raise ValueError("the built-in text tower needs captions to train its tokenizer on")
    width = options.width or 256
    max_tokens = options.max_tokens if isinstance(options.max_tokens, int) else TextTransform().max_tokens
    text = tokenizer.limited(tokenizer.train(captions), max_tokens)
    config: dict[str, Json] = {
        "vocabulary": text.get_vocab_size(),
        "max_tokens": max_tokens,
        "width": width,
        "num_layers": 4,
    }
    pooling = "mean" if options.pooling == "auto" else options.pooling
    return TowerSpec("text", "transformer", config, width, TextTransform(max_tokens), pooling), text


def _builtin_image(options: TowerOptions, captions: Sequence[str]) -> _Made:  # noqa: ARG001
    width = options.width or 32
    transform = ImageTransform(size_px=options.size_px or 64)
    return TowerSpec("image", "cnn", {"width": width}, 8 * width, transform, "none"), None


def _builtin_audio(options: TowerOptions, captions: Sequence[str]) -> _Made:  # noqa: ARG001
    width = options.width or 192
    transform = AudioTransform(max_s=options.max_s or AudioTransform().max_s)
    config: dict[str, Json] = {"num_mels": transform.num_mels, "width": width, "num_layers": 4}
    return TowerSpec("audio", "audio-cnn", config, 2 * width, transform, "none"), None


_BUILTIN: Mapping[str, Callable[[TowerOptions, Sequence[str]], _Made]] = {
    "text": _builtin_text,
    "image": _builtin_image,
    "audio": _builtin_audio,
}


def _own(kind: Kind, options: TowerOptions, captions: Sequence[str], backbone: nn.Module) -> _Made:
    """Transform and tokenizer of the built-in tower; the width is seen in one forward pass."""
    if options.model != "builtin":
        raise ValueError(f"the {kind} tower is {type(backbone).__name__} and {options.model}; leave one of them out")
    like, text = _BUILTIN[kind](options, captions)
    pooling = like.pooling if like.pooling != "none" else "mean"
    spec = replace(like, backbone="own", config=own.describe(backbone), width=0, head="none", pooling=pooling)
    tower = _TOWERS[kind](spec, 0, backbone, text)
    with torch.inference_mode():
        pooled = tower.features(tower.collate([tower.sample(longest=False)]))
    if pooled.ndim != 2:
        raise ValueError(f"{spec.config['class']} returns {tuple(pooled.shape)}; (B, W) or (B, L, W) is wanted")
    return replace(spec, width=pooled.shape[1]), text


def _efficientnet_spec(kind: Kind, options: TowerOptions) -> TowerSpec:
    if kind != "image":
        raise ValueError(f"efficientnet-lite0 is an image model, not a model for {kind}")
    transform = ImageTransform(size_px=options.size_px or 128)
    if options.pooling != "auto":
        raise ValueError("efficientnet-lite0 averages over its positions; leave pooling at auto")
    return TowerSpec("image", "efficientnet-lite0", {}, efficientnet.WIDTH, transform, "none")


def _from_library(kind: Kind, options: TowerOptions) -> tuple[TowerSpec, nn.Module, Tokenizer | None]:
    """A transformers checkpoint; its width, and whether it pools by itself, are seen in one forward pass."""
    found = pretrained.load(options.model, kind)
    prepared = preparation.prepare(found, kind, options)
    config = {**pretrained.describe(found.model), **prepared.config}
    wanted = preparation.poolings(found, kind) if options.pooling == "auto" else (options.pooling,)
    for pooling in wanted:
        spec = TowerSpec(kind, "transformers", config, 0, prepared.transform, pooling, head="none")
        backbone = _wrapped(found.model, spec)
        tower = _TOWERS[kind](spec, 0, backbone, prepared.text)
        with torch.inference_mode(), suppress(pretrained.NoPooledOutput):
            width = tower.features(tower.collate([prepared.sample])).shape[1]
            return replace(spec, width=width), backbone, prepared.text
    raise ValueError(f"{options.model}: no output of it can be pooled; choose pooling mean, cls or last")


def _wrapped(model: nn.Module, spec: TowerSpec) -> nn.Module:
    options = cast(Mapping[str, bool], spec.config["options"])
    return pretrained.TransformersBackbone(model, own_output=spec.pooling == "none", options=options)


def _head(spec: TowerSpec, dim: int) -> nn.Module:
    if spec.head == "none":
        return nn.Identity()
    if spec.head == "linear":
        return nn.Linear(spec.width, dim)
    # the norm brings frozen backbones of any scale to one learning rate
    up, down = nn.Linear(spec.width, spec.head_width), nn.Linear(spec.head_width, dim)
    return nn.Sequential(nn.LayerNorm(spec.width), up, nn.GELU(), down)


def _pool(hidden: torch.Tensor, mask_BL: torch.Tensor | None, pooling: str) -> torch.Tensor:
    """Hidden states (B, L, W) to (B, W) over the positions of the mask; (B, W) stays as it is."""
    if hidden.ndim == 2:
        return hidden
    if pooling == "cls":
        return hidden[:, 0]
    if mask_BL is None:
        return hidden[:, -1] if pooling == "last" else hidden.mean(1)
    if pooling == "last":
        last_B = (mask_BL * torch.arange(mask_BL.shape[1], device=mask_BL.device)).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last_B]
    weights = mask_BL[:, :, None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)
