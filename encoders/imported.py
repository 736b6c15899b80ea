"""Other libraries' checkpoints as encoders: CLIP, SigLIP and CLAP of transformers, and open_clip's CLIP.

Text models of sentence-transformers are read by encoders/sentence_transformers.py.

Assumes: an imported encoder gives the vectors of its own library, of unit length, from values that it prepares as that
library does; its scale and bias come along. Nothing is unpickled and no remote code is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from conjoin.encoders import open_clip, pretrained, sentence_transformers
from conjoin.encoders.joint import JointEncoder, build, pair_name
from conjoin.encoders.options import TowerOptions
from conjoin.encoders.spec import Loss

_SMALL = ("*.json", "*.txt", "*.model")
_WEIGHTS = ("model*.safetensors", "*/model*.safetensors")


@dataclass(frozen=True, slots=True)
class _Joint:
    """The modalities of a joint checkpoint and what it calls its scale's logarithm and its bias.

    CLAP learns a scale each way; with the loss that its authors trained, only the audio side's is used.
    """

    modalities: tuple[str, str]
    scale: str
    bias: str = "logit_bias"


_JOINT: Mapping[str, _Joint] = {
    "clip": _Joint(("image", "text"), "logit_scale"),
    "siglip": _Joint(("image", "text"), "logit_scale"),
    "clap": _Joint(("audio", "text"), "logit_scale_a"),
}
_REFUSED = {
    "siglip2": "a NaFlex checkpoint keeps the proportions of every picture, and conjoin's picture towers take squares: "
    "import a fixed-resolution one of the same family, such as google/siglip2-base-patch16-224",
}
_KINDS = (
    "CLIP, SigLIP, SigLIP2 and CLAP of transformers (config.json, model.safetensors), a text model of "
    "sentence-transformers (modules.json) and CLIP of open_clip (open_clip_config.json)"
)


def import_encoder(source: str) -> JointEncoder:
    """The encoder of a checkpoint: a local directory, `package:NAME` or a hub name.

    Raises ValueError saying what the source is, why it cannot be had, and what can.
    """
    source = source.removeprefix("hf-hub:")
    place = _place(source, _SMALL)
    if (place / "modules.json").is_file():
        return _sentence_transformer(_place(source, (*_SMALL, *_WEIGHTS)), source)
    model_type = _model_type(place, source)
    converted = (place / open_clip.CONFIG).is_file()
    if model_type in _JOINT and not (converted and not list(_place(source, _WEIGHTS).glob("model*.safetensors"))):
        return _joint(_place(source, (*_SMALL, *_WEIGHTS)), source)
    if converted:
        return _open_clip(source)
    if model_type in _REFUSED:
        raise ValueError(f"{source}: {_REFUSED[model_type]}")
    if (place / "spec.json").is_file():
        raise ValueError(f"{source}: it is an encoder of conjoin already; name it as it is")
    if model_type:
        raise ValueError(
            f"{source}: a {model_type} checkpoint is a backbone, not an encoder; name it as `train.towers.text.model` "
            f"(or image, audio) and train. What can be imported: {_KINDS}"
        )
    raise ValueError(
        f"{source}: neither config.json, modules.json nor {open_clip.CONFIG}; what can be imported: {_KINDS}"
    )


def _sentence_transformer(place: Path, source: str) -> JointEncoder:
    """A one-tower text encoder, or the joint checkpoint that sentence-transformers wraps."""
    inner = sentence_transformers.transformer_folder(place, source)
    if _model_type(inner, source) in _JOINT:
        sentence_transformers.check_only_normalised(place, source)
        return _joint(inner, source)
    return sentence_transformers.read(place, source)


def _joint(place: Path, source: str) -> JointEncoder:
    """Both towers with their own projections, and the checkpoint's scale and bias."""
    config = pretrained.from_place("AutoConfig", str(place), source)
    joint = _JOINT[config.model_type]
    found = _scalars(place, (joint.scale, joint.bias))
    if joint.scale not in found:
        raise ValueError(f"{source}: no {joint.scale} in {place}/model.safetensors; is it a {config.model_type} model?")
    # towers without a head of ours give what the checkpoint's projections give
    options = TowerOptions(str(place), head="none", max_tokens="own")
    dim = getattr(config, "projection_dim", None) or config.vision_config.hidden_size
    loss: Loss = "sigmoid" if joint.bias in found else "infonce"
    encoder = build(dict.fromkeys(joint.modalities, options), int(dim), loss=loss)
    pair = pair_name(*joint.modalities)
    with torch.no_grad():
        encoder.log_scales[pair].copy_(found[joint.scale].reshape(()))
        if joint.bias in found:
            encoder.biases[pair].copy_(found[joint.bias].reshape(()))
    return encoder.eval()


def _open_clip(source: str) -> JointEncoder:
    """By way of a transformers directory of the same weights."""
    place = _place(source, _SMALL)
    for patterns in open_clip.WEIGHTS:
        place = _place(source, (*_SMALL, *patterns))
        if any(found for pattern in patterns for found in place.glob(pattern)):
            break
    with TemporaryDirectory(prefix="conjoin-import-") as scratch:
        open_clip.convert(place, Path(scratch), source)
        return _joint(Path(scratch), source)


def _place(source: str, patterns: Sequence[str]) -> Path:
    """The directory itself, or the files of a hub repository that match, downloaded where they are not here yet."""
    place = Path(pretrained.locate(source))
    if place.is_dir():
        return place
    from huggingface_hub import snapshot_download

    with pretrained.quiet():
        try:
            return Path(snapshot_download(source, allow_patterns=list(patterns)))
        except (OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{source}: neither a directory nor a hub repository within reach: {first}") from error


def _model_type(place: Path, source: str) -> str:
    """As config.json has it; empty where there is none."""
    path = place / "config.json"
    if not path.is_file():
        return ""
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source}: config.json is not JSON: {error}") from error
    return str(raw.get("model_type", ""))


def _scalars(place: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Those of the named tensors that the safetensors files hold, as float32."""
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    for path in sorted(place.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            found |= {name: file.get_tensor(name).float() for name in names if name in there}
    return found
