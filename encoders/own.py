"""Backbones that a user wrote: an importable nn.Module class, known by its name and the hash of its source.

Assumes: the class gets what the built-in backbone of its modality gets (encoders/backbones.py) and returns (B, W), or
(B, L, W) to be pooled. Its weights are saved like any others, its code is not: whoever loads the encoder must have the
same module installed, and a module that has changed since is refused.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Mapping

import torch
from torch import nn

from conjoin.encoders.spec import Json


def describe(backbone: nn.Module) -> dict[str, Json]:
    """What `rebuild` needs. An attribute `arguments` of the module is what its class is called with, default nothing.

    Raises ValueError for a class that cannot be imported again, or that makes another network when it is.
    """
    cls, arguments = type(backbone), dict(getattr(backbone, "arguments", {}))
    name = f"{cls.__module__}:{cls.__qualname__}"
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        raise ValueError(f"{cls.__qualname__}: workers cannot import it; define it at the top level of a module file")
    try:
        config: dict[str, Json] = {
            "class": name,
            "source": _source_hash(cls),
            "arguments": json.loads(json.dumps(arguments)),
        }
    except TypeError as error:
        raise ValueError(f"{name}: its `arguments` are not JSON: {error}") from error
    again = _shapes(rebuild(config))
    if again != _shapes(backbone):
        raise ValueError(f"{name}(**{arguments}) has other parameters than the given one; set its `arguments`")
    return config


def rebuild(config: Mapping[str, Json]) -> nn.Module:
    """The same class again, weights unset. Raises ValueError where it is missing, changed, or no nn.Module."""
    name = str(config["class"])
    module, _, qualname = name.partition(":")
    try:
        cls: object = importlib.import_module(module)
        for part in qualname.split("."):
            cls = getattr(cls, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the encoder has a backbone of its own, {name}, which cannot be imported: {error}") from error
    # before anything is called: a spec must not be a way to call whatever is installed
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"{name} is no torch.nn.Module")
    if _source_hash(cls) != config["source"]:
        raise ValueError(f"{name} has changed since the encoder was trained; train again, or install it as it was")
    arguments = config["arguments"]
    assert isinstance(arguments, dict)
    made: nn.Module = cls(**arguments)
    return made


def _source_hash(cls: type[nn.Module]) -> str:
    """Of the whole file: what a class calls is often beside it."""
    try:
        text = inspect.getsource(inspect.getmodule(cls) or cls)
    except (OSError, TypeError) as error:
        raise ValueError(f"{cls.__qualname__}: its source cannot be read; define it in a module file") from error
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}
