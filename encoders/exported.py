"""Encoders written as other libraries read them: a text tower for sentence-transformers, a pair for transformers.

Assumes: what is written gives the encoder's own vectors; it is loaded again and compared before it counts as written,
and what cannot be said in the other library's terms is refused with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from conjoin.encoders import pretrained, sentence_transformers
from conjoin.encoders.halves import PAIRS, Pair
from conjoin.encoders.joint import JointEncoder, pair_name
from conjoin.encoders.sentence_transformers import GELU, IDENTITY, MODULES
from conjoin.encoders.spec import AudioTransform, ImageTransform, Json, TextTransform
from conjoin.encoders.towers import TextTower, Tower

TOLERANCE = 1e-5
_TEXTS = ["a", "A red apple, on a table; EUR 12.50", "one two three " * 200]
_POOLING = {"mean": "mean", "cls": "cls", "last": "lasttoken"}
_RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}


def export_text_tower(encoder: JointEncoder, directory: Path, modality: str = "text") -> None:
    """The text tower as a sentence-transformers folder: `SentenceTransformer(directory)` gives the same vectors.

    Raises ValueError for a tower that the library cannot express: built in, or half of a joint checkpoint.
    """
    from safetensors.torch import save_file

    tower = encoder.tower(modality)
    model = _sentence_model(tower, modality)
    _write_text(cast(TextTower, tower), directory)
    with pretrained.quiet():
        model.save_pretrained(directory)
    spec = tower.spec
    limit = cast(TextTransform, spec.transform).max_tokens
    _json(directory / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
    prompt = str(spec.config.get("prompt", ""))
    prompts: dict[str, Json] = {"prompts": {"document": prompt}, "default_prompt_name": "document"} if prompt else {}
    _json(directory / "config_sentence_transformers.json", {**prompts, "similarity_fn_name": "cosine"})
    modules: list[Json] = [{"idx": 0, "name": "0", "path": "", "type": f"{MODULES}.Transformer"}]
    for name, config, weights in _sentence_modules(tower, encoder.spec.dim):
        folder = directory / f"{len(modules)}_{name}"
        folder.mkdir()
        _json(folder / "config.json", config)
        if weights:
            save_file(
                {key: value.detach().contiguous() for key, value in weights.items()}, folder / "model.safetensors"
            )
        entry: Json = {"idx": len(modules), "name": str(len(modules)), "path": folder.name, "type": f"{MODULES}.{name}"}
        modules.append(entry)
    _json(directory / "modules.json", modules)
    again = sentence_transformers.read(directory, str(directory))
    with torch.inference_mode():
        theirs = again.encode("text", again.collate("text", _TEXTS))
        _compare(theirs, encoder.encode(modality, encoder.collate(modality, _TEXTS)), modality)


def _sentence_model(tower: Tower, modality: str) -> Any:
    """The transformer inside, if AutoModel would load it and its pooling is one that the library has."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if tower.spec.kind != "text":
        raise ValueError(f"the {modality} tower takes no text; sentence-transformers gets the text tower only")
    model = _transformer(tower, modality)
    if tower.spec.pooling not in _POOLING:
        raise ValueError(
            f"the text tower is half of a {model.config.model_type} checkpoint; export it with its other half: "
            "--as transformers"
        )
    wanted = MODEL_MAPPING.get(type(model.config), None)
    if type(model) not in (wanted if isinstance(wanted, tuple) else (wanted,)):
        raise ValueError(f"the text tower is a {type(model).__name__}, which AutoModel does not load by its config")
    return model


def _transformer(tower: Tower, modality: str) -> Any:
    if tower.spec.backbone != "transformers":
        raise ValueError(
            f"the {modality} tower is built in ({tower.spec.backbone}) and no other library has it; train one with a "
            f"transformers model (`train.towers.{modality}.model`), or load the folder with conjoin"
        )
    return cast(pretrained.TransformersBackbone, tower.backbone).model


_Part = tuple[str, dict[str, Json], dict[str, torch.Tensor]]


def _sentence_modules(tower: Tower, dim: int) -> list[_Part]:
    """Class, config and weights of everything after the transformer."""
    width = tower.spec.width
    pooling: dict[str, Json] = {"word_embedding_dimension": width, "include_prompt": True}
    for name, ours in (("cls_token", "cls"), ("mean_tokens", "mean"), ("lasttoken", "last")):
        pooling[f"pooling_mode_{name}"] = tower.spec.pooling == ours
    parts: list[_Part] = [("Pooling", pooling, {})]
    if tower.spec.head == "linear":
        parts.append(_dense(cast(nn.Linear, tower.head), IDENTITY))
    elif tower.spec.head == "mlp":
        norm, up, _, down = cast(nn.Sequential, tower.head)
        weights = {f"norm.{name}": value for name, value in norm.state_dict().items()}
        parts += [("LayerNorm", {"dimension": width}, weights)]
        parts += [_dense(cast(nn.Linear, up), GELU), _dense(cast(nn.Linear, down), IDENTITY)]
    assert dim == width or tower.spec.head != "none"
    return [*parts, ("Normalize", {}, {})]


def _dense(linear: nn.Linear, activation: str) -> _Part:
    config: dict[str, Json] = {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "bias": True,
        "activation_function": activation,
    }
    return "Dense", config, {f"linear.{name}": value for name, value in linear.state_dict().items()}


def _write_text(tower: TextTower, directory: Path) -> None:
    """The tokenizer as AutoTokenizer reads it: the same JSON, padding and length."""
    from transformers import PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    assert tower.tokenizer is not None
    padding = tower.tokenizer.padding or {}
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tower.tokenizer,
        model_max_length=cast(TextTransform, tower.spec.transform).max_tokens,
        pad_token=padding.get("pad_token"),
        padding_side=padding.get("direction", "right"),
        model_input_names=["input_ids", "attention_mask"] if tower.spec.config.get("masked", True) else ["input_ids"],
    )
    theirs.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    # the name that both transformers 4 and 5 know
    _json(path, {**stored, "tokenizer_class": "PreTrainedTokenizerFast"})


def export_transformers(encoder: JointEncoder, directory: Path) -> str:
    """Two towers as the joint model of transformers that they are the halves of; returns the name of its class.

    Linear heads are folded into the halves' own projections. Raises ValueError where that cannot be exact, and for
    towers that are no such halves.
    """
    import transformers

    models = {name: _transformer(encoder.tower(name), name) for name in encoder.spec.towers}
    classes = {name: type(model).__name__ for name, model in models.items()}
    pair = next((pair for pair in PAIRS if dict(pair.halves) == classes), None)
    if pair is None:
        towers = ", ".join(f"{name} is {cls}" for name, cls in classes.items())
        raise ValueError(
            f"transformers has no model of these towers ({towers}): CLIP, SigLIP or CLAP pairs it has, and "
            "VisionTextDualEncoderModel projects each model's own pooled output without a bias, which these towers do "
            "not. The text tower alone can be exported: --as sentence-transformers"
        )
    weights = _halves(encoder, pair, models)
    for name in pair.halves:
        _check_native(encoder.tower(name), name, models[name].config)
    whole = _whole(encoder, pair, models, weights, getattr(transformers, pair.whole))
    with pretrained.quiet():
        whole.save_pretrained(directory)
    _write_text(cast(TextTower, encoder.tower("text")), directory)
    _write_preparation(encoder, pair, directory)
    _check_whole(encoder, pair, directory)
    return pair.whole


def _halves(encoder: JointEncoder, pair: Pair, models: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights of the whole, heads folded in."""
    found: dict[str, torch.Tensor] = {}
    for name, model in models.items():
        tower = encoder.tower(name)
        weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        reason = "its mlp head has no place in it" if tower.spec.head == "mlp" else ""
        if tower.spec.head == "linear":
            with torch.no_grad():
                reason = pair.fold(name, weights, cast(nn.Linear, tower.head))
        if reason:
            raise ValueError(f"the {name} tower cannot be half of a {pair.whole}: {reason}")
        found |= {pair.prefix[name] + key: value for key, value in weights.items()}
    return found


def _check_native(tower: Tower, modality: str, config: Any) -> None:
    """Whether the model takes what the tower was made to take."""
    transform = tower.spec.transform
    if isinstance(transform, ImageTransform) and (transform.fit == "pad" or config.image_size != transform.size_px):
        raise ValueError(
            f"the {modality} tower takes pictures of {transform.size_px} px by {transform.fit}, the model of "
            f"{config.image_size} px; transformers needs its own size"
        )
    extractor = cast(Mapping[str, Json], tower.spec.config.get("extractor") or {})
    if isinstance(transform, AudioTransform) and transform.max_s != extractor.get("max_length_s"):
        raise ValueError(
            f"the {modality} tower hears {transform.max_s} s, its extractor {extractor.get('max_length_s')}"
        )
    if tower.spec.config.get("prompt"):
        raise ValueError(f"the {modality} tower reads a prompt before every text, which transformers does not keep")


def _whole(
    encoder: JointEncoder, pair: Pair, models: Mapping[str, Any], weights: dict[str, torch.Tensor], cls: Any
) -> Any:
    from transformers.initialization import no_init_weights

    names = {"text": "text_config", "image": "vision_config", "audio": "audio_config"}
    configs = {
        names[name]: {**model.config.to_dict(), "projection_dim": encoder.spec.dim} for name, model in models.items()
    }
    if pair.whole == "SiglipModel":
        configs["text_config"]["projection_size"] = encoder.spec.dim
    config = cls.config_class(**configs, projection_dim=encoder.spec.dim)
    a, b = pair.halves
    log_scale = dict(encoder.log_scales.items()).get(pair_name(a, b), torch.zeros(()))
    for name in pair.scales:
        weights[name] = log_scale.detach().cpu().clone()
    with no_init_weights():
        whole = cls(config).eval()
    if "logit_bias" in whole.state_dict():
        weights["logit_bias"] = encoder.bias(a, b).detach().cpu().clone()
    shapes = {name: value.shape for name, value in whole.state_dict().items()}
    weights = {name: value.reshape(shapes[name]) if value.numel() == 1 else value for name, value in weights.items()}
    whole.load_state_dict(weights)
    return whole


def _write_preparation(encoder: JointEncoder, pair: Pair, directory: Path) -> None:
    """preprocessor_config.json: how pictures or sounds reach the model."""
    for name in pair.halves:
        spec = encoder.tower(name).spec
        if isinstance(spec.transform, ImageTransform):
            _json(directory / "preprocessor_config.json", _image_processor(spec.transform, pair.whole))
        elif isinstance(spec.transform, AudioTransform):
            _json(directory / "preprocessor_config.json", spec.config["extractor"])


def _image_processor(transform: ImageTransform, whole: str) -> dict[str, Json]:
    side: dict[str, Json] = {"height": transform.size_px, "width": transform.size_px}
    crop = transform.fit == "crop"
    shorter: dict[str, Json] = {"shortest_edge": transform.resize_px or transform.size_px}
    return {
        # SigLIP's own processor cannot crop
        "image_processor_type": "SiglipImageProcessor" if whole == "SiglipModel" and not crop else "CLIPImageProcessor",
        "do_resize": True,
        "size": shorter if crop else side,
        "do_center_crop": crop,
        **({"crop_size": side} if crop else {}),
        "resample": _RESAMPLE[transform.resample],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        "do_convert_rgb": True,
    }


def _check_whole(encoder: JointEncoder, pair: Pair, directory: Path) -> None:
    """Load what was written and compare every tower's vectors on inputs of its own."""
    import transformers

    with pretrained.quiet(), torch.inference_mode():
        whole = pretrained.from_place(getattr(transformers, pair.whole), str(directory), str(directory))
        for name in pair.halves:
            tower = encoder.tower(name)
            inputs = _sample(tower, directory)
            method = getattr(whole.eval(), f"get_{name}_features")
            ours = functional.normalize(tower.project(tower.features(inputs[0])), dim=-1)
            _compare(functional.normalize(method(**inputs[1]).pooler_output, dim=-1), ours, name)


def _sample(tower: Tower, directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A batch as the tower takes it, and the same as the library does."""
    from transformers import AutoTokenizer

    generator = torch.Generator().manual_seed(0)
    if isinstance(tower.spec.transform, TextTransform):
        theirs = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        padding = True if tower.spec.config.get("masked", True) else "max_length"
        return tower.collate(_TEXTS), dict(theirs(_TEXTS, padding=padding, truncation=True, return_tensors="pt"))
    if isinstance(tower.spec.transform, ImageTransform):
        side = tower.spec.transform.size_px
        pixels = torch.randint(0, 256, (2, side, side, 3), generator=generator, dtype=torch.uint8)
        mean, std = torch.tensor(tower.spec.transform.mean), torch.tensor(tower.spec.transform.std)
        return {"pixels": pixels}, {"pixel_values": ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)}
    rate = tower.spec.transform.sample_rate_hz
    batch = tower.collate([(torch.randn(rate, generator=generator) * 0.1).numpy()])
    return batch, {name: value for name, value in batch.items() if name != "num_samples"}


def _compare(theirs: torch.Tensor, ours: torch.Tensor, modality: str) -> None:
    apart = float((theirs - ours).abs().max())
    if not apart <= TOLERANCE:
        raise ValueError(
            f"the {modality} vectors of what was written differ by {apart:.1e} from the encoder's, more than "
            f"{TOLERANCE:.0e}: a head that is nearly singular cannot be written exactly"
        )


def _json(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")
