"""Pairs of towers as transformers' joint models: loaded by the library they give the encoder's vectors and logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers as library
from PIL import Image
from torch.nn.functional import normalize

from conjoin.encoders import checkpoint
from conjoin.encoders.exported import export_transformers
from conjoin.encoders.imported import import_encoder
from conjoin.encoders.joint import JointEncoder, build
from conjoin.encoders.options import TowerOptions
from conjoin.encoders.transforms import fit_image

TEXTS = ["red apple", "green pear, apple apple " * 9, "x"]
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40 + seed, 61, 3), dtype=np.uint8))
    for seed in range(3)
]
WAVE = np.random.default_rng(0).standard_normal(20_000).astype(np.float32) * 0.1
Head = Literal["linear", "mlp", "none"]


def trained(
    place: Path, heads: Sequence[Head], dim: int, loss: Literal["infonce", "sigmoid"] = "infonce"
) -> JointEncoder:
    """Both halves of a checkpoint under heads whose weights and biases are random."""
    names = ("text", "audio") if place.name == "clap" else ("text", "image")
    options = {name: TowerOptions(str(place), head=head, seed=3) for name, head in zip(names, heads, strict=True)}
    return build(options, dim, loss=loss)


@torch.inference_mode()
def vectors(encoder: JointEncoder, modality: str) -> torch.Tensor:
    transform: Any = encoder.spec.towers[modality].transform
    values: dict[str, list[Any]] = {"text": list(TEXTS), "audio": [WAVE], "image": []}
    if modality == "image":
        values["image"] = [fit_image(picture, transform) for picture in PICTURES]
    return encoder.encode(modality, encoder.collate(modality, values[modality]))


@torch.inference_mode()
def theirs(place: Path, modality: str) -> torch.Tensor:
    """The library's own way from the folder alone: its tokenizer, its picture or sound preparation, its model."""
    kind = json.loads((place / "config.json").read_text())["model_type"]
    model: Any = getattr(library, {"clip": "CLIPModel", "siglip": "SiglipModel", "clap": "ClapModel"}[kind])
    loaded = model.from_pretrained(place)
    if modality == "text":
        padding: Any = "max_length" if kind == "siglip" else True
        words = library.AutoTokenizer.from_pretrained(place)(
            TEXTS, padding=padding, truncation=True, return_tensors="pt"
        )
        found = loaded.get_text_features(**words)
    elif modality == "image":
        processor = json.loads((place / "preprocessor_config.json").read_text())["image_processor_type"]
        pixels = getattr(library, f"{processor}Pil").from_pretrained(place)(PICTURES, return_tensors="pt").pixel_values
        found = loaded.get_image_features(pixels)
    else:
        extractor = library.AutoFeatureExtractor.from_pretrained(place)
        found = loaded.get_audio_features(**extractor([WAVE], sampling_rate=48_000, return_tensors="pt"))
    return normalize(found.pooler_output, dim=-1)


def same(encoder: JointEncoder, place: Path) -> None:
    for modality in encoder.spec.towers:
        found = vectors(encoder, modality)
        assert found.std() > 1e-3
        torch.testing.assert_close(theirs(place, modality), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "heads", "dim"),
    [
        ("clip", ("none", "none"), 12),
        ("clip", ("linear", "linear"), 8),
        ("clip", ("none", "linear"), 12),
        ("siglip", ("none", "none"), 16),
        ("siglip", ("linear", "none"), 16),
        ("clap", ("none", "none"), 12),
        ("clap", ("linear", "linear"), 12),
    ],
)
def test_a_pair_is_written_exactly(
    checkpoints: Path, tmp_path: Path, name: str, heads: tuple[Head, Head], dim: int
) -> None:
    encoder = trained(checkpoints / name, heads, dim)
    for head in (encoder.tower(modality).head for modality in encoder.spec.towers):
        for parameter in head.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    whole = export_transformers(encoder, tmp_path / "out")
    assert whole == {"clip": "CLIPModel", "siglip": "SiglipModel", "clap": "ClapModel"}[name]
    same(encoder, tmp_path / "out")
    again = import_encoder(str(tmp_path / "out"))
    pair = next(iter(encoder.log_scales))
    torch.testing.assert_close(again.log_scales[pair], encoder.log_scales[pair])


def test_what_was_imported_saved_and_loaded_goes_out_as_it_came(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint.save(import_encoder(str(checkpoints / "siglip")), tmp_path / "encoder")
    encoder = checkpoint.load(tmp_path / "encoder")
    export_transformers(encoder, tmp_path / "out")
    same(encoder, tmp_path / "out")
    before, after = (library.SiglipModel.from_pretrained(place) for place in (checkpoints / "siglip", tmp_path / "out"))
    assert before.state_dict().keys() == after.state_dict().keys()
    assert all(torch.equal(value, after.state_dict()[key]) for key, value in before.state_dict().items())


def test_a_sigmoid_encoders_logits_are_siglips(checkpoints: Path, tmp_path: Path) -> None:
    encoder = trained(checkpoints / "siglip", ("none", "none"), 16, "sigmoid")
    export_transformers(encoder, tmp_path / "out")
    model = library.SiglipModel.from_pretrained(tmp_path / "out")
    assert (model.logit_scale.exp().item(), model.logit_bias.item()) == pytest.approx((10, -10))


def test_what_cannot_be_exact_is_refused_with_the_reason(
    checkpoints: Path, small_encoder: Path, tmp_path: Path
) -> None:
    cases = {
        "its mlp head has no place in it": trained(checkpoints / "clip", ("none", "mlp"), 12),
        "SigLIP's picture tower ends without a projection": trained(checkpoints / "siglip", ("none", "linear"), 16),
        "CLAP's projections are square": trained(checkpoints / "clap", ("linear", "linear"), 8),
        "is built in": checkpoint.load(small_encoder),
    }
    bert = {"text": TowerOptions(str(checkpoints / "bert")), "image": TowerOptions(str(checkpoints / "clip"))}
    cases["no model of these towers .*text is BertModel.*--as sentence-transformers"] = build(bert, 12)
    larger = {"text": TowerOptions(str(checkpoints / "clip"), head="none")}
    larger["image"] = TowerOptions(str(checkpoints / "clip"), head="none", size_px=48)
    cases["takes pictures of 48 px by crop, the model of 32 px"] = build(larger, 12)
    for message, encoder in cases.items():
        with pytest.raises(ValueError, match=message):
            export_transformers(encoder, tmp_path / "out")
        assert not (tmp_path / "out").exists(), message


def test_a_head_of_low_rank_whose_bias_lies_outside_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    encoder = trained(checkpoints / "clip", ("linear", "linear"), 8)
    head: Any = encoder.tower("image").head
    with torch.no_grad():
        head.weight[3] = 0
        head.bias[3] = 1
    with pytest.raises(ValueError, match=r"the image vectors .* differ by .*nearly singular"):
        export_transformers(encoder, tmp_path / "out")
