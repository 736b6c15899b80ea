"""Text models in the folder layout of sentence-transformers: a transformer, pooling, dense layers and a norm.

Assumes: our vectors are of unit length whether or not the folder ends with Normalize; a default prompt is put before
every text, named prompts are the caller's to write. The library itself is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Tokenizer, normalizers

from conjoin.encoders import preparation, tokenizer
from conjoin.encoders.joint import JointEncoder
from conjoin.encoders.options import TowerOptions
from conjoin.encoders.spec import EncoderSpec, Json, TextTransform
from conjoin.encoders.towers import TextTower, build_tower

IDENTITY, GELU = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.GELU"
# the only names that all versions of the library know
MODULES = "sentence_transformers.models"
_FIELD = "sentence_embedding"


@dataclass(frozen=True, slots=True)
class _Module:
    """One line of modules.json: its class without the package, its folder and that folder's config.json."""

    name: str
    folder: Path
    config: Mapping[str, Any]


def transformer_folder(place: Path, source: str) -> Path:
    """Where the transformer of the folder lies. Raises ValueError naming a first module that is none."""
    first = _modules(place, source)[0]
    if first.name not in ("Transformer", "CLIPModel"):
        raise ValueError(f"{source}: its first module is {first.name}; only models with a Transformer can be imported")
    return first.folder


def check_only_normalised(place: Path, source: str) -> None:
    """Raises ValueError where anything but Normalize follows the transformer."""
    for module in _modules(place, source)[1:]:
        if module.name not in ("Normalize", "Dropout"):
            raise ValueError(f"{source}: a {module.name} module after a joint model cannot be imported")


def read(place: Path, source: str) -> JointEncoder:
    """A one-tower encoder of text. Raises ValueError naming the module that cannot be had and why."""
    first, *rest = _modules(place, source)
    if not rest or rest[0].name != "Pooling":
        raise ValueError(f"{source}: Pooling must follow the Transformer, not {rest[0].name if rest else 'nothing'}")
    pooling = preparation.stored_pooling(rest[0].config)
    if pooling is None or pooling == "none":
        raise ValueError(
            f"{source}: its pooling is {_modes(rest[0].config)}; what can be had is mean, cls or lasttoken"
        )
    width = int(rest[0].config.get("embedding_dimension") or rest[0].config["word_embedding_dimension"])
    tower = build_tower("text", TowerOptions(str(first.folder), pooling, "none", max_tokens="own"), width)
    headed = _with_text(_with_head(cast(TextTower, tower), rest[1:], source), place, first.folder)
    if headed.spec.config.get("prompt") and not rest[0].config.get("include_prompt", True):
        raise ValueError(f"{source}: its pooling leaves out the tokens of its default prompt, which cannot be had")
    dim = headed.project(torch.zeros(1, width)).shape[1]
    return JointEncoder(EncoderSpec(dim, {"text": headed.spec}), {"text": headed}).eval()


def _modules(place: Path, source: str) -> list[_Module]:
    try:
        listed = json.loads((place / "modules.json").read_text(encoding="utf-8"))
        found = [(str(entry["type"]).rpartition(".")[2], place / str(entry["path"])) for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: modules.json cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{source}: modules.json lists no module")
    return [_Module(name, folder, _json(folder / "config.json")) for name, folder in found]


def _with_head(tower: TextTower, modules: Sequence[_Module], source: str) -> TextTower:
    """The modules after the pooling as our head: dense layers in a row are one, a norm and a GELU are an mlp."""
    layers = [module for module in modules if module.name != "Dropout"]
    if layers and layers[-1].name == "Normalize":
        layers = layers[:-1]
    if not layers:
        return tower
    kinds = [_kind(layer, source) for layer in layers]
    if set(kinds) == {"linear"}:
        weight, bias = _composed([_linear(layer, source) for layer in layers])
        headed = TextTower(
            replace(tower.spec, head="linear"), weight.shape[0], tower.backbone, cast(Tokenizer, tower.tokenizer)
        )
        headed.head.load_state_dict({"weight": weight, "bias": bias})
        return headed
    if kinds != ["norm", "gelu", "linear"]:
        raise ValueError(
            f"{source}: after the pooling come {', '.join(layer.name for layer in layers)}; what can be had is Dense "
            "layers without activation, or LayerNorm, Dense with GELU and Dense"
        )
    norm, (up, up_bias), (down, down_bias) = (
        _weights(layers[0], source),
        _linear(layers[1], source),
        _linear(layers[2], source),
    )
    spec = replace(tower.spec, head="mlp", head_width=up.shape[0])
    headed = TextTower(spec, down.shape[0], tower.backbone, cast(Tokenizer, tower.tokenizer))
    stored = {"0.weight": norm["norm.weight"], "0.bias": norm["norm.bias"]}
    headed.head.load_state_dict(stored | {"1.weight": up, "1.bias": up_bias, "3.weight": down, "3.bias": down_bias})
    return headed


def _kind(module: _Module, source: str) -> str:
    if module.name == "LayerNorm":
        return "norm"
    if module.name != "Dense":
        raise ValueError(f"{source}: its module {module.name} cannot be imported")
    fields = {str(module.config.get(name) or _FIELD) for name in ("module_input_name", "module_output_name")}
    if module.config.get("use_residual") or fields != {_FIELD}:
        raise ValueError(f"{source}: a Dense module with a residual, or of other fields, cannot be imported")
    activation = str(module.config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    if activation not in (IDENTITY, GELU):
        raise ValueError(
            f"{source}: a Dense module with {activation.rpartition('.')[2]} cannot be imported, only Identity"
        )
    return "linear" if activation == IDENTITY else "gelu"


def _linear(module: _Module, source: str) -> tuple[torch.Tensor, torch.Tensor]:
    found = _weights(module, source)
    weight = found["linear.weight"]
    return weight, found.get("linear.bias", torch.zeros(weight.shape[0]))


def _composed(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear maps in a row are one; multiplied in float64, so that nothing is lost."""
    weight, bias = (part.double() for part in layers[0])
    for next_weight, next_bias in layers[1:]:
        weight, bias = next_weight.double() @ weight, next_weight.double() @ bias + next_bias.double()
    return weight.float(), bias.float()


def _weights(module: _Module, source: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = module.folder / "model.safetensors"
    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        advice = "pickled weights are not read: save the model again with a newer sentence-transformers"
        raise ValueError(
            f"{source}: {module.folder.name}/model.safetensors cannot be read ({error}); {advice}"
        ) from error


def _with_text(tower: TextTower, place: Path, folder: Path) -> TextTower:
    """The same tower, with the folder's lower-casing, text length and default prompt."""
    assert tower.tokenizer is not None
    stored = _json(folder / "sentence_bert_config.json")
    transform = cast(TextTransform, tower.spec.transform)
    limit = min(int(stored.get("max_seq_length") or transform.max_tokens), transform.max_tokens)
    if stored.get("do_lower_case"):
        theirs = tower.tokenizer.normalizer
        tower.tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([theirs] if theirs else [])])
    tokenizer.limited(tower.tokenizer, limit)
    named = _json(place / "config_sentence_transformers.json")
    prompt = (named.get("prompts") or {}).get(named.get("default_prompt_name"))
    config: dict[str, Json] = {**tower.spec.config, **({"prompt": str(prompt)} if prompt else {})}
    tower.spec = replace(tower.spec, transform=TextTransform(limit), config=config)
    return tower


def _modes(config: Mapping[str, Any]) -> str:
    named = config.get("pooling_mode")
    on = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True and "pooling" in name]
    return " and ".join(([named] if isinstance(named, str) else list(named or [])) or on) or "unknown"


def _json(path: Path) -> dict[str, Any]:
    """Of a file that may be missing."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
