"""Encoders on disk: safetensors, JSON and tokenizers in one folder, and the fingerprint that names what they compute.

Assumes: nothing is ever unpickled; a folder is complete or absent, because it is written beside and renamed; torch is
imported by save and load only, so that a spec can be read without it.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from conjoin.encoders.spec import FORMAT, EncoderSpec, Json

if TYPE_CHECKING:
    import torch

    from conjoin.encoders.joint import JointEncoder
    from conjoin.encoders.towers import Tower

_SPEC, _WEIGHTS, _TOKENIZER = "spec.json", "model.safetensors", ".tokenizer.json"


def save(encoder: JointEncoder, directory: Path, metadata: Mapping[str, Json] | None = None) -> str:
    """Write the encoder's folder, replacing an older one whole; returns the fingerprint. Adapters are folded in.

    metadata: anything about its making; not part of the fingerprint.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}")
    beside.mkdir()
    try:
        parts = _parts(encoder)
        weights = {name: tensor.contiguous() for name, tensor in _tensors(encoder)}
        save_file(weights, beside / _WEIGHTS)
        for name, text in _tokenizers(encoder).items():
            (beside / f"{name}{_TOKENIZER}").write_text(text, encoding="utf-8")
        spec = encoder.spec.to_json()
        found = _combine(spec, parts)
        stored = {"format": FORMAT, "spec": json.loads(spec), "fingerprint": found, "parts": parts}
        text = json.dumps({**stored, "metadata": dict(metadata or {})}, indent=1, sort_keys=True)
        (beside / _SPEC).write_text(text, encoding="utf-8")
        _swap(beside, directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return found


def load(directory: Path, device: str = "cpu") -> JointEncoder:
    """The encoder of a folder, in evaluation mode.

    Raises ValueError naming the file that is missing, torn or altered.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from conjoin.encoders.joint import JointEncoder
    from conjoin.encoders.towers import rebuild_tower

    directory = Path(directory)
    stored = _stored(directory)
    spec = _spec(stored, directory)
    texts = {}
    for name, tower in spec.towers.items():
        if tower.kind == "text":
            texts[name] = _read(directory / f"{name}{_TOKENIZER}")
    try:
        towers = {name: rebuild_tower(tower, spec.dim, texts.get(name)) for name, tower in spec.towers.items()}
    except ValueError as error:
        raise ValueError(f"{', '.join(f'{directory / name}{_TOKENIZER}' for name in texts)}: {error}") from error
    encoder = JointEncoder(spec, towers)
    try:
        weights = load_file(directory / _WEIGHTS)
        encoder.load_state_dict(weights)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{directory / _WEIGHTS}: missing, torn or not of this encoder: {error}") from error
    _verify(encoder, texts, stored, directory)
    return encoder.to(device).eval()


def read_spec(directory: Path) -> tuple[EncoderSpec, str]:
    """Spec and fingerprint of a folder, without torch and without looking at the weights.

    Raises ValueError naming the file when it is missing, torn or written by a newer conjoin.
    """
    directory = Path(directory)
    stored = _stored(directory)
    return _spec(stored, directory), str(stored["fingerprint"])


def fingerprint(encoder: JointEncoder) -> str:
    """32 hex digits over weights, spec and tokenizers; equal where the same inputs give the same vectors."""
    return _combine(encoder.spec.to_json(), _parts(encoder))


def backbone_fingerprint(tower: Tower) -> str:
    """32 hex digits over what decides a tower's features, so all but the head: the key of cached features."""
    from conjoin.encoders.tuning import plain_state

    headless = EncoderSpec(0, {tower.spec.kind: replace(tower.spec, head="none", head_width=0)})
    parts = {_WEIGHTS: _hash_tensors(plain_state(tower.backbone).items())}
    if tower.tokenizer is not None:
        parts[_TOKENIZER] = _hash_text(tower.tokenizer.to_str())
    return _combine(headless.to_json(), parts)


def _tensors(encoder: JointEncoder) -> list[tuple[str, torch.Tensor]]:
    from conjoin.encoders.tuning import plain_state

    return [(name, tensor.detach().cpu()) for name, tensor in plain_state(encoder).items()]


def _tokenizers(encoder: JointEncoder) -> dict[str, str]:
    towers = {name: encoder.tower(name) for name in encoder.spec.towers}
    return {name: tower.tokenizer.to_str() for name, tower in towers.items() if tower.tokenizer is not None}


def _parts(encoder: JointEncoder) -> dict[str, str]:
    parts = {f"{name}{_TOKENIZER}": _hash_text(text) for name, text in _tokenizers(encoder).items()}
    return {_WEIGHTS: _hash_tensors(_tensors(encoder)), **parts}


def _hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Over names, types, shapes and bytes, in the order of the names."""
    import torch

    digest = blake2b(digest_size=16)
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        # reshape before view: a scalar has no last dimension to view as bytes
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash_text(text: str) -> str:
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _combine(spec: str, parts: Mapping[str, str]) -> str:
    return _hash_text("\n".join([spec, *(f"{name} {parts[name]}" for name in sorted(parts))]))


def _swap(beside: Path, directory: Path) -> None:
    """Put a complete folder in place; an older one is moved away first, because a rename replaces no full folder."""
    old = directory.with_name(f".{directory.name}.old.{uuid.uuid4().hex[:8]}")
    if directory.exists():
        directory.rename(old)
    beside.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: missing or not readable: {error}") from error


def _stored(directory: Path) -> dict[str, Json]:
    path = directory / _SPEC
    try:
        stored = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: torn or not JSON: {error}") from error
    if not isinstance(stored, dict) or not {"format", "spec", "fingerprint", "parts"} <= set(stored):
        raise ValueError(f"{path}: not the spec of an encoder")
    if not isinstance(stored["format"], int) or stored["format"] > FORMAT:
        raise ValueError(f"{path}: format {stored['format']}, this conjoin reads up to {FORMAT}: upgrade it")
    return stored


def _spec(stored: Mapping[str, Json], directory: Path) -> EncoderSpec:
    try:
        return EncoderSpec.from_json(json.dumps(stored["spec"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{directory / _SPEC}: not a spec that this conjoin knows: {error}") from error


def _verify(encoder: JointEncoder, texts: Mapping[str, str], stored: Mapping[str, Json], directory: Path) -> None:
    """The file whose content is not what was saved."""
    found = {f"{name}{_TOKENIZER}": _hash_text(text) for name, text in texts.items()}
    found[_WEIGHTS] = _hash_tensors(_tensors(encoder))
    parts = stored["parts"]
    altered = [name for name in sorted(found) if not isinstance(parts, dict) or parts.get(name) != found[name]]
    if not altered and _combine(encoder.spec.to_json(), found) != stored["fingerprint"]:
        altered = [_SPEC]
    if altered:
        raise ValueError(f"{directory / altered[0]}: altered since it was saved; train or copy the encoder again")
