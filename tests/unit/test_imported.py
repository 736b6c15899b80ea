"""Imported encoders give their own library's vectors, scale and bias, and say plainly what cannot be had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as library
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from conjoin.encoders import checkpoint
from conjoin.encoders.imported import import_encoder
from conjoin.encoders.joint import JointEncoder
from conjoin.encoders.transforms import fit_image

TEXTS = ["Red apple", "green pear, apple apple " * 9, "x"]
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40 + seed, 61, 3), dtype=np.uint8))
    for seed in range(3)
]
WAVES = [np.random.default_rng(n).standard_normal(n).astype(np.float32) * 0.1 for n in (48_000, 20_000)]


def ours(encoder: JointEncoder, modality: str, values: list[Any]) -> torch.Tensor:
    if modality == "image":
        values = [fit_image(value, encoder.spec.towers["image"].transform) for value in values]  # type: ignore[arg-type]
    with torch.inference_mode():
        return encoder.encode(modality, encoder.collate(modality, values))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.std() > 1e-3
    torch.testing.assert_close(found, normalize(expected, dim=-1), rtol=0, atol=1e-5)


def tokens(place: Path, **options: Any) -> dict[str, torch.Tensor]:
    """What the checkpoint's own tokenizer makes of the texts."""
    words = library.AutoTokenizer.from_pretrained(place)
    return dict(words(TEXTS, truncation=True, return_tensors="pt", **options))


@torch.inference_mode()
def test_clip(checkpoints: Path) -> None:
    place = checkpoints / "clip"
    encoder, model = import_encoder(str(place)), library.CLIPModel.from_pretrained(place)
    same(ours(encoder, "text", TEXTS), model.get_text_features(**tokens(place, padding=True)).pooler_output)
    pixels = library.CLIPImageProcessorPil.from_pretrained(place)(PICTURES, return_tensors="pt").pixel_values
    same(ours(encoder, "image", PICTURES), model.get_image_features(pixels).pooler_output)
    assert (encoder.spec.loss, encoder.spec.dim) == ("infonce", 12)
    assert encoder.log_scales["image_text"].item() == 3.5


@torch.inference_mode()
def test_siglip(checkpoints: Path) -> None:
    place = checkpoints / "siglip"
    encoder, model = import_encoder(str(place)), library.SiglipModel.from_pretrained(place)
    ids = tokens(place, padding="max_length", max_length=20)["input_ids"]
    same(ours(encoder, "text", TEXTS), model.get_text_features(ids).pooler_output)
    pixels = library.SiglipImageProcessorPil.from_pretrained(place)(PICTURES, return_tensors="pt").pixel_values
    same(ours(encoder, "image", PICTURES), model.get_image_features(pixels).pooler_output)
    assert encoder.spec.loss == "sigmoid"
    assert (encoder.log_scales["image_text"].item(), encoder.biases["image_text"].item()) == (3.5, -12.5)
    logits = model(input_ids=ids, pixel_values=pixels).logits_per_text
    text, image = ours(encoder, "text", TEXTS), ours(encoder, "image", PICTURES)
    own = encoder.scale("text", "image") * text @ image.T + encoder.bias("text", "image")
    torch.testing.assert_close(own, logits, rtol=0, atol=1e-4)


@torch.inference_mode()
def test_clap(checkpoints: Path) -> None:
    place = checkpoints / "clap"
    encoder, model = import_encoder(str(place)), library.ClapModel.from_pretrained(place)
    same(ours(encoder, "text", TEXTS), model.get_text_features(**tokens(place, padding=True)).pooler_output)
    extractor = library.ClapFeatureExtractor.from_pretrained(place)
    inputs = extractor(WAVES, sampling_rate=48_000, return_tensors="pt")
    same(ours(encoder, "audio", list(WAVES)), model.get_audio_features(**inputs).pooler_output)
    assert encoder.log_scales["audio_text"].item() == 3.25


def test_an_imported_encoder_is_saved_and_loaded_like_any_other(checkpoints: Path, tmp_path: Path) -> None:
    encoder = import_encoder(str(checkpoints / "siglip"))
    name = checkpoint.save(encoder, tmp_path / "encoder")
    again = checkpoint.load(tmp_path / "encoder")
    assert checkpoint.fingerprint(again) == name
    torch.testing.assert_close(ours(again, "text", TEXTS), ours(encoder, "text", TEXTS), rtol=0, atol=0)
    assert again.biases["image_text"].item() == -12.5


def test_what_is_no_encoder_is_refused_with_what_can_be_had(checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a bert checkpoint is a backbone.*train\.towers\.text\.model.*CLIP, SigLIP"):
        import_encoder(str(checkpoints / "bert"))
    with pytest.raises(ValueError, match=r"neither config\.json, modules\.json nor open_clip_config\.json"):
        import_encoder(str(tmp_path))
    with pytest.raises(ValueError, match="no such directory"):
        import_encoder(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(ValueError, match=r"NaFlex.*siglip2-base-patch16-224"):
        import_encoder(str(tmp_path))


def test_an_encoder_of_ours_is_not_imported(small_encoder: Path) -> None:
    with pytest.raises(ValueError, match="an encoder of conjoin already"):
        import_encoder(str(small_encoder))


def test_a_checkpoint_without_its_scale_is_refused(checkpoints: Path, tmp_path: Path) -> None:
    place = tmp_path / "clip"
    shutil.copytree(checkpoints / "clip", place)
    weights = load_file(place / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no logit_scale"):
        import_encoder(str(place))


def test_a_hub_name_is_read_from_the_hubs_own_cache(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--shop--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoints / "clip", repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found, expected = import_encoder("hf-hub:shop/clip"), import_encoder(str(checkpoints / "clip"))
    torch.testing.assert_close(ours(found, "text", TEXTS), ours(expected, "text", TEXTS), rtol=0, atol=0)
    with pytest.raises(ValueError, match="neither a directory nor a hub repository within reach"):
        import_encoder("shop/none")


def test_siglips_own_tokenizer_class_is_not_needed(checkpoints: Path, tmp_path: Path) -> None:
    place = tmp_path / "siglip"
    shutil.copytree(checkpoints / "siglip", place)
    stored = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**stored, "tokenizer_class": "SiglipTokenizer"}))
    found, expected = import_encoder(str(place)), import_encoder(str(checkpoints / "siglip"))
    torch.testing.assert_close(ours(found, "text", TEXTS), ours(expected, "text", TEXTS), rtol=0, atol=0)
    (place / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"SiglipTokenizer requires|no tokenizer"):
        import_encoder(str(place))
