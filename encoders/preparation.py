"""How a pretrained checkpoint prepares its values, read from the files beside its weights.

Assumes: a field the files leave out has the value that the library's own classes would take.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from conjoin.encoders import pretrained, tokenizer
from conjoin.encoders.options import TowerOptions
from conjoin.encoders.pretrained import Pretrained
from conjoin.encoders.spec import AudioTransform, ImageTransform, Json, Kind, TextTransform, Transform

_FIXED_LENGTH = ("siglip_text_model", "siglip2_text_model")
_DEFAULT_PX = 224
_MOST_TOKENS = 8192
# field of a feature extractor, seconds per unit: Whisper, CLAP, AST (10 ms frames)
_LIMITS = (("chunk_length", 1.0), ("max_length_s", 1.0), ("max_length", 0.01))
_HALF = (0.5, 0.5, 0.5)
_RESAMPLE: Mapping[Any, Literal["bilinear", "bicubic", "lanczos"]] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
Pooling = Literal["mean", "cls", "last", "none"]
_POOLING: Mapping[str, Pooling] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "cls": "cls",
    "lasttoken": "last",
    "mean": "mean",
}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a tower needs besides weights: `config` joins the spec's, `sample` is a value to try the tower with."""

    transform: Transform
    config: dict[str, Json]
    sample: str | np.ndarray
    text: Tokenizer | None = None


def prepare(found: Pretrained, kind: Kind, options: TowerOptions) -> Prepared:
    """Raises ValueError naming the model where its files are missing or the options go beyond it."""
    return _PREPARE[kind](found, options)


def poolings(found: Pretrained, kind: Kind) -> tuple[Pooling, ...]:
    """Ways to pool, the best first; `none` is the model's own output, if it turns out to have one."""
    if kind == "text":
        return (_text_pooling(found),)
    names = [name for name, _ in found.model.named_parameters()]
    has_cls = kind == "image" and any("cls_token" in name or "class_embedding" in name for name in names)
    plain: Pooling = "cls" if has_cls else "mean"
    return ("none", plain) if found.own_output else (plain,)


def _text(found: Pretrained, options: TowerOptions) -> Prepared:
    theirs = _library_tokenizer(found)
    text = getattr(theirs, "backend_tokenizer", None)
    if not isinstance(text, Tokenizer):
        raise ValueError(f"{found.name}: no tokenizer.json; conjoin reads tokenizers of the tokenizers library")
    text = Tokenizer.from_str(text.to_str())
    limit = _text_limit(theirs.model_max_length, found)
    max_tokens = limit if options.max_tokens == "own" else options.max_tokens or min(TextTransform().max_tokens, limit)
    if max_tokens > limit:
        raise ValueError(f"{found.name}: max_tokens {max_tokens} is more than the {limit} that the model reads")
    pad = theirs.pad_token_id if theirs.pad_token_id is not None else theirs.eos_token_id or 0
    # SigLIP was trained on texts padded to one length and reads its last position, without a mask
    fixed = found.model.config.model_type in _FIXED_LENGTH
    side = theirs.padding_side if fixed else "right"
    text.enable_padding(
        direction=side, pad_id=pad, pad_token=text.id_to_token(pad), length=max_tokens if fixed else None
    )
    config: dict[str, Json] = {"options": {}, "masked": not fixed}
    return Prepared(TextTransform(max_tokens), config, "a", tokenizer.limited(text, max_tokens))


def _library_tokenizer(found: Pretrained) -> Any:
    """AutoTokenizer's; SigLIP's class needs another library, its tokenizer.json says the same without it."""
    try:
        theirs = pretrained.from_place("AutoTokenizer", found.place, found.name)
        if hasattr(theirs, "backend_tokenizer"):
            return theirs
    except ValueError as error:
        refused = error
    else:
        refused = ValueError(f"{found.name}: no tokenizer.json; conjoin reads tokenizers of the tokenizers library")
    try:
        return pretrained.from_place("PreTrainedTokenizerFast", found.place, found.name)
    except ValueError:
        raise refused from None


def _text_limit(tokenizer_limit: int, found: Pretrained) -> int:
    """Tokens that the model reads; models of relative positions that set no limit read _MOST_TOKENS."""
    positions = getattr(found.model.config, "max_position_embeddings", None) or _MOST_TOKENS
    for name, module in found.model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa and its kin count positions from there on
    return min(tokenizer_limit, positions)


def stored_pooling(modes: Mapping[str, Any]) -> Pooling | None:
    """What a pooling module's config.json of sentence-transformers, old or new, says; None for what we do not have."""
    named = modes.get("pooling_mode")
    chosen = [named] if isinstance(named, str) else list(named or [])
    chosen += [name for name, on in modes.items() if name.startswith("pooling_mode_") and on]
    return _POOLING.get(chosen[0]) if len(chosen) == 1 else None


def _text_pooling(found: Pretrained) -> Pooling:
    """A joint checkpoint's own output, what sentence-transformers wrote beside it, else last (decoders) or mean."""
    if found.is_part:
        return "none"
    beside = Path(found.place) / "1_Pooling" / "config.json"
    if beside.is_file():
        return stored_pooling(json.loads(beside.read_text(encoding="utf-8"))) or "mean"
    names = found.model.config.architectures or [""]
    return "last" if names[0].endswith("ForCausalLM") else "mean"


def _image(found: Pretrained, options: TowerOptions) -> Prepared:
    transform = _image_transform(found, options.size_px)
    resized = pretrained.accepts(found.model, "interpolate_pos_encoding")
    config: dict[str, Json] = {"options": {"interpolate_pos_encoding": True} if resized else {}}
    return Prepared(transform, config, np.zeros((transform.size_px, transform.size_px, 3), dtype=np.uint8))


def _image_transform(found: Pretrained, size_px: int | None) -> ImageTransform:
    """How the checkpoint's own image processor prepares pictures, at another size if `size_px` asks for it."""
    raw = _image_processor(found.place)
    native_px = getattr(found.model.config, "image_size", None)
    size, crop = raw.get("size") or native_px or _DEFAULT_PX, raw.get("crop_size")
    cropped = bool(raw.get("do_center_crop", crop is not None))
    if isinstance(size, int):
        size = {"shortest_edge": size} if cropped else {"height": size, "width": size}
    short = int(size.get("shortest_edge") or size.get("height") or _DEFAULT_PX)
    side = short
    if cropped and crop is not None:
        side = int(crop if isinstance(crop, int) else crop["height"])
    wanted = size_px or side
    normalised = raw.get("do_normalize", True)
    return ImageTransform(
        size_px=wanted,
        fit="crop" if "shortest_edge" in size else "squash",
        resize_px=round(short * wanted / side) if "shortest_edge" in size and short != side else 0,
        resample=_RESAMPLE.get(raw.get("resample"), "bicubic"),
        mean=_three(raw.get("image_mean", _HALF)) if normalised else (0.0, 0.0, 0.0),
        std=_three(raw.get("image_std", _HALF)) if normalised else (1.0, 1.0, 1.0),
    )


def _image_processor(place: str) -> dict[str, Any]:
    from transformers.image_processing_base import ImageProcessingMixin

    for local in (True, False):
        try:
            found: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(place, local_files_only=local)[0]
            return found
        except OSError:
            if Path(place).is_dir():
                break
    return {}


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return (red, green, blue)


def _audio(found: Pretrained, options: TowerOptions) -> Prepared:
    extractor = pretrained.from_place("AutoFeatureExtractor", found.place, found.name)
    stored: dict[str, Json] = json.loads(extractor.to_json_string())
    stored["feature_extractor_type"] = type(extractor).__name__
    limits = [(stored.get(field), unit_s) for field, unit_s in _LIMITS]
    limit = next((value * unit_s for value, unit_s in limits if isinstance(value, int | float)), None)
    if options.max_s is not None and limit is not None and options.max_s > limit:
        raise ValueError(f"{found.name}: max_s {options.max_s} is more than the {limit:g} s that the model hears")
    rate = extractor.sampling_rate
    transform = AudioTransform(rate, options.max_s or limit or AudioTransform().max_s, "transformers")
    padded = None if limit is None else round(limit * rate)
    config: dict[str, Json] = {"options": {}, "extractor": stored, "padded_samples": padded}
    return Prepared(transform, config, np.zeros(rate, dtype=np.float32))


_PREPARE: Mapping[Kind, Callable[[Pretrained, TowerOptions], Prepared]] = {
    "text": _text,
    "image": _image,
    "audio": _audio,
}
