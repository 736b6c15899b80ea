"""CLIP models of open_clip, written out as the same model of transformers.

Assumes: open_clip's own names of parameters and fields; what a field could change and we do not know is refused by
name. Texts are read by CLIP's tokenizer as transformers has it, without open_clip's repair of broken HTML and Unicode;
a centre crop can lie one pixel beside torchvision's.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import CLIPConfig

CONFIG = "open_clip_config.json"
# tried in this order
WEIGHTS = (("open_clip_model.safetensors",), ("open_clip_pytorch_model.bin",), ("*.pt",))
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
_MEAN, _STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
_TOWER_FIELDS = {
    "vision_cfg": {"layers", "width", "patch_size", "image_size", "head_width", "mlp_ratio", "patch_dropout"},
    "text_cfg": {"layers", "width", "heads", "context_length", "vocab_size", "mlp_ratio", "hf_tokenizer_name"},
}
# values of other fields that change nothing
_USUAL = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",)}
_MODEL_FIELDS = {"embed_dim", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias", *_TOWER_FIELDS}
_PARTS = {"visual.": "vision_model.", "": "text_model."}
_NAMES = (
    (r"(.*)transformer\.resblocks\.(\d+)\.", r"\1encoder.layers.\2."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", r".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", r".mlp.fc1."),
    (r"\.mlp\.c_proj\.", r".mlp.fc2."),
    (r"^vision_model\.conv1\.weight", "vision_model.embeddings.patch_embedding.weight"),
    (r"^vision_model\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"_model\.positional_embedding", "_model.embeddings.position_embedding.weight"),
    (r"^vision_model\.ln_pre\.", "vision_model.pre_layrnorm."),  # sic, in transformers
    (r"^vision_model\.ln_post\.", "vision_model.post_layernorm."),
    (r"^text_model\.token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^text_model\.ln_final\.", "text_model.final_layer_norm."),
)
_WRAPPED = re.compile(r"^(?:module\.|_orig_mod\.)+")
_OUTSIDE = {"vision_model.proj": "visual_projection.weight", "text_model.text_projection": "text_projection.weight"}


def convert(place: Path, target: Path, source: str) -> None:
    """Write into `target` what transformers reads: config, weights, picture preparation and tokenizer.

    Raises ValueError naming what the folder lacks or what its model has that transformers' CLIP has not.
    """
    from safetensors.torch import save_file

    from conjoin.encoders import pretrained

    stored = _config(place, source)
    config = _clip_config(stored["model_cfg"], source)
    with pretrained.quiet():
        weights = _renamed(_weights(place, source))
        _check_names(weights, config, source)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, target / "model.safetensors", {"format": "pt"}
    )
    config.save_pretrained(target)
    preprocessor = _preprocessor(stored.get("preprocess_cfg") or {}, config.vision_config.image_size, source)
    (target / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    _copy_tokenizer(place, target, source)


def _config(place: Path, source: str) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        embed_dim = stored["model_cfg"]["embed_dim"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: {CONFIG} cannot be read, or has no model_cfg: {error}") from error
    assert embed_dim
    return stored


def _clip_config(model: Mapping[str, Any], source: str) -> CLIPConfig:
    from transformers import CLIPConfig

    _refuse_unknown(model, source)
    vision, text = model["vision_cfg"], model["text_cfg"]
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    shared = {"projection_dim": model["embed_dim"], "hidden_act": activation, "layer_norm_eps": 1e-5}
    width = int(vision.get("width", 768))
    vision_config = {
        **shared,
        **_shape(vision, width, width // int(vision.get("head_width", 64)), 12),
        "image_size": vision.get("image_size", 224),
        "patch_size": vision.get("patch_size", 16),
    }
    text_config = {
        **shared,
        **_shape(text, int(text.get("width", 512)), int(text.get("heads", 8)), 12),
        "max_position_embeddings": text.get("context_length", 77),
        "vocab_size": text.get("vocab_size", 49408),
        # with 2, transformers reads the position of the largest id, as open_clip does whatever the vocabulary
        "eos_token_id": 2,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    return CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=model["embed_dim"])


def _shape(tower: Mapping[str, Any], width: int, heads: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_hidden_layers": int(tower.get("layers", layers)),
        "intermediate_size": int(width * float(tower.get("mlp_ratio", 4.0))),
    }


def _refuse_unknown(model: Mapping[str, Any], source: str) -> None:
    odd = {name: model[name] for name in model.keys() - _MODEL_FIELDS if model[name]}
    for tower, fields in _TOWER_FIELDS.items():
        given: Mapping[str, Any] = model[tower]
        for name in given.keys() - fields:
            if given[name] and given[name] not in _USUAL.get(name, ()):
                odd[f"{tower}.{name}"] = given[name]
    if isinstance(model["vision_cfg"].get("layers"), list):
        odd["vision_cfg.layers"] = "a ResNet"
    for name in ("image_size", "patch_size"):
        if isinstance(model["vision_cfg"].get(name), list):
            odd[f"vision_cfg.{name}"] = "not a square"
    if odd:
        what = ", ".join(f"{name} = {value}" for name, value in sorted(odd.items()))
        raise ValueError(
            f"{source}: only open_clip's own ViT and text transformer can be imported, and this model has {what}; "
            "where its authors published it for transformers too, import that"
        )


def _weights(place: Path, source: str) -> dict[str, torch.Tensor]:
    """The state dict as float32, by open_clip's names, without the prefixes of wrappers."""
    files = [path for patterns in WEIGHTS for pattern in patterns for path in sorted(place.glob(pattern))]
    if not files:
        wanted = ", ".join(pattern for patterns in WEIGHTS for pattern in patterns)
        raise ValueError(f"{source}: no weights; put one of {wanted} beside {CONFIG}")
    if len(files) > 1 and files[0].suffix == ".pt":
        raise ValueError(f"{source}: which of {', '.join(path.name for path in files)}? Leave one beside {CONFIG}")
    try:
        raw = _read(files[0])
    except Exception as error:  # torch and safetensors raise many kinds for a file that is none
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{source}: {files[0].name} cannot be read without unpickling code: {first}") from error
    state: Mapping[str, Any] = raw.get("state_dict", raw)
    tensors = {_WRAPPED.sub("", name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name.removeprefix("text."): tensor.float() for name, tensor in tensors.items()}


def _read(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return load_file(path)
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def _renamed(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By transformers' names: fused attention in three, projections as the weights of linear layers."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if name in ("logit_scale", "logit_bias"):
            found[name] = tensor
            continue
        if name == "attn_mask":
            continue
        before = "visual." if name.startswith("visual.") else ""
        renamed = _PARTS[before] + name.removeprefix("visual.")
        for pattern, to in _NAMES:
            renamed = re.sub(pattern, to, renamed)
        if renamed in _OUTSIDE:
            found[_OUTSIDE[renamed]] = tensor.T
        elif ".attn.in_proj_" in renamed:
            for part, values in zip("qkv", tensor.chunk(3), strict=True):
                found[renamed.replace(".attn.in_proj_", f".self_attn.{part}_proj.")] = values
        else:
            found[renamed] = tensor
    return found


def _check_names(weights: Mapping[str, torch.Tensor], config: CLIPConfig, source: str) -> None:
    """Every parameter of transformers' CLIP, and none that it has not, in its shape."""
    from transformers import CLIPModel

    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in CLIPModel(config).state_dict().items()}
    found = {name: tensor.shape for name, tensor in weights.items() if name != "logit_bias"}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{source}: its weights are not those of the model that {CONFIG} describes: {wrong[0]} is "
            f"{_shape_text(found.get(wrong[0]))} and should be {_shape_text(expected.get(wrong[0]))}"
        )


def _shape_text(shape: torch.Size | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "one number"


def _preprocessor(stored: Mapping[str, Any], size_px: int, source: str) -> dict[str, Any]:
    mode, interpolation = stored.get("resize_mode", "shortest"), stored.get("interpolation", "bicubic")
    if mode not in ("shortest", "squash") or interpolation not in _RESAMPLE:
        raise ValueError(f"{source}: preprocess_cfg with {mode} and {interpolation}, which cannot be imported")
    crop = mode == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size_px} if crop else {"height": size_px, "width": size_px},
        "do_center_crop": crop,
        "crop_size": {"height": size_px, "width": size_px},
        "resample": _RESAMPLE[interpolation],
        "image_mean": stored.get("mean") or _MEAN,
        "image_std": stored.get("std") or _STD,
    }


def _copy_tokenizer(place: Path, target: Path, source: str) -> None:
    for name in _TOKENIZER:
        if (place / name).is_file():
            shutil.copyfile(place / name, target / name)
    if not (target / "tokenizer.json").is_file() and not (
        (target / "vocab.json").is_file() and (target / "merges.txt").is_file()
    ):
        raise ValueError(
            f"{source}: no tokenizer; put CLIP's tokenizer.json, or vocab.json and merges.txt, beside {CONFIG} "
            "(those of openai/clip-vit-base-patch32, unless the model was trained with another)"
        )
