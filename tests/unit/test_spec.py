"""Specs: JSON both ways, strict about what it does not know, and free of torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest

from conjoin.encoders.spec import (
    AudioTransform,
    EncoderSpec,
    ImageTransform,
    TextTransform,
    TowerSpec,
)

SPEC = EncoderSpec(
    8,
    {
        "text": TowerSpec("text", "transformer", {"width": 16}, 16, TextTransform(32)),
        "image": TowerSpec("image", "cnn", {"width": 4}, 32, ImageTransform(fit="crop", resize_px=72), "none"),
        "audio": TowerSpec("audio", "audio-cnn", {}, 8, AudioTransform(8_000, 2.5), "none", "mlp", 24),
    },
)


def test_json_round_trip() -> None:
    assert EncoderSpec.from_json(SPEC.to_json()) == SPEC


def test_json_is_canonical() -> None:
    turned = EncoderSpec(8, dict(reversed(list(SPEC.towers.items()))))
    assert turned.to_json() == SPEC.to_json()
    assert " " not in SPEC.to_json()


@pytest.mark.parametrize("kind", ["text", "image", "audio"])
def test_every_transform_field_is_in_the_json(kind: str) -> None:
    stored = json.loads(SPEC.to_json())["towers"][kind]["transform"]
    assert set(stored) == {field.name for field in fields(SPEC.towers[kind].transform)}


def test_a_newer_format_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="format 99"):
        EncoderSpec.from_json(replace(SPEC, format=99).to_json())


def test_an_unknown_field_is_refused() -> None:
    raw = json.loads(SPEC.to_json())
    raw["towers"]["text"]["surprise"] = 1
    with pytest.raises((TypeError, ValueError), match="surprise"):
        EncoderSpec.from_json(json.dumps(raw))


def test_reading_a_spec_imports_no_torch() -> None:
    code = (
        "import sys\n"
        "from conjoin.encoders.spec import EncoderSpec\n"
        "from conjoin.encoders import read_spec, TowerOptions, transforms\n"
        "sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
