"""open_clip's folders: the same vectors as transformers' CLIP of the same weights; what is not that CLIP is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as library
from safetensors.torch import save_file

from conjoin.encoders.imported import import_encoder

TEXTS = ["red apple", "green pear, apple apple " * 9, "x"]
Weights = dict[str, torch.Tensor]


def transformer(encoder: Any, prefix: str) -> Weights:
    """The blocks of a transformers CLIP tower as open_clip's resblocks."""
    found: Weights = {}
    for index, layer in enumerate(encoder.layers):
        attention = layer.self_attn
        for kind in ("weight", "bias"):
            parts = [getattr(projection, kind) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]
            named = {
                "ln_1": layer.layer_norm1,
                "ln_2": layer.layer_norm2,
                "attn.out_proj": attention.out_proj,
                "mlp.c_fc": layer.mlp.fc1,
                "mlp.c_proj": layer.mlp.fc2,
            }
            block = f"{prefix}transformer.resblocks.{index}"
            found[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
            found |= {f"{block}.{name}.{kind}": getattr(module, kind) for name, module in named.items()}
    return found


def open_clip_weights(clip: Any, text: str = "") -> Weights:
    """A transformers CLIP by open_clip's names; text: `text.` for its CustomTextCLIP."""
    vision, words = clip.vision_model, clip.text_model
    found = {
        "logit_scale": clip.logit_scale,
        "visual.conv1.weight": vision.embeddings.patch_embedding.weight,
        "visual.class_embedding": vision.embeddings.class_embedding,
        "visual.positional_embedding": vision.embeddings.position_embedding.weight,
        "visual.proj": clip.visual_projection.weight.T,
        f"{text}token_embedding.weight": words.embeddings.token_embedding.weight,
        f"{text}positional_embedding": words.embeddings.position_embedding.weight,
        f"{text}text_projection": clip.text_projection.weight.T,
    }
    norms = {"visual.ln_pre": vision.pre_layrnorm, "visual.ln_post": vision.post_layernorm}
    norms[f"{text}ln_final"] = words.final_layer_norm
    for name, norm in norms.items():
        found |= {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
    found |= transformer(vision.encoder, "visual.") | transformer(words.encoder, text)
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


@pytest.fixture
def clip(checkpoints: Path) -> Any:
    return library.CLIPModel.from_pretrained(checkpoints / "clip")


@pytest.fixture
def place(checkpoints: Path, clip: Any, tmp_path: Path) -> Path:
    """A folder of open_clip without weights."""
    tower = {"layers": 2, "width": 16}
    model = {
        "embed_dim": 12,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "head_width": 8, **tower},
        "text_cfg": {"context_length": 20, "vocab_size": clip.config.text_config.vocab_size, "heads": 2, **tower},
    }
    prepared = {"mean": [0.48, 0.45, 0.4], "std": [0.26, 0.25, 0.27], "interpolation": "bicubic"}
    folder = tmp_path / "open_clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": prepared}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoints / "clip" / name, folder / name)
    return folder


def reconfigure(place: Path, part: str | None, **fields: Any) -> None:
    path = place / "open_clip_config.json"
    stored = json.loads(path.read_text())
    (
        stored["preprocess_cfg"]
        if part == "preprocess_cfg"
        else stored["model_cfg"][part]
        if part
        else stored["model_cfg"]
    ).update(fields)
    path.write_text(json.dumps(stored))


@torch.inference_mode()
def same_vectors(place: Path, checkpoints: Path) -> None:
    found, expected = import_encoder(str(place)), import_encoder(str(checkpoints / "clip"))
    batch = {"pixels": torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)}
    torch.testing.assert_close(found.encode("image", batch), expected.encode("image", batch), rtol=0, atol=1e-6)
    theirs = expected.encode("text", expected.collate("text", TEXTS))
    torch.testing.assert_close(found.encode("text", found.collate("text", TEXTS)), theirs, rtol=0, atol=1e-6)
    assert found.log_scales["image_text"].item() == 3.5


@pytest.mark.parametrize("text", ["", "text."], ids=["CLIP", "CustomTextCLIP"])
def test_safetensors(place: Path, clip: Any, checkpoints: Path, text: str) -> None:
    save_file(open_clip_weights(clip, text), place / "open_clip_model.safetensors")
    same_vectors(place, checkpoints)


def test_weights_of_a_hub_repository(place: Path, clip: Any, checkpoints: Path) -> None:
    torch.save(open_clip_weights(clip), place / "open_clip_pytorch_model.bin")
    same_vectors(place, checkpoints)


def test_checkpoint_of_a_training_run(place: Path, clip: Any, checkpoints: Path) -> None:
    weights = {f"module.{name}": value.half() for name, value in open_clip_weights(clip).items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": {**weights}}, place / "epoch_3.pt")
    found, expected = import_encoder(str(place)), import_encoder(str(checkpoints / "clip"))
    vectors = [one.encode("text", one.collate("text", TEXTS)) for one in (found, expected)]
    torch.testing.assert_close(*vectors, rtol=0, atol=3e-3)
    torch.save({}, place / "epoch_4.pt")
    with pytest.raises(ValueError, match=r"which of epoch_3\.pt, epoch_4\.pt"):
        import_encoder(str(place))


def test_a_bias_makes_it_a_sigmoid_encoder(place: Path, clip: Any) -> None:
    save_file({**open_clip_weights(clip), "logit_bias": torch.tensor(-9.5)}, place / "open_clip_model.safetensors")
    encoder = import_encoder(str(place))
    assert (encoder.spec.loss, encoder.biases["image_text"].item()) == ("sigmoid", -9.5)


def test_how_pictures_are_prepared(place: Path, clip: Any) -> None:
    save_file(open_clip_weights(clip), place / "open_clip_model.safetensors")
    crop: Any = import_encoder(str(place)).spec.towers["image"].transform
    assert (crop.fit, crop.size_px, crop.resize_px, crop.resample, crop.std) == (
        "crop",
        32,
        0,
        "bicubic",
        (0.26, 0.25, 0.27),
    )
    reconfigure(place, "preprocess_cfg", resize_mode="squash", interpolation="bilinear")
    squash: Any = import_encoder(str(place)).spec.towers["image"].transform
    assert (squash.fit, squash.resample) == ("squash", "bilinear")
    reconfigure(place, "preprocess_cfg", resize_mode="longest")
    with pytest.raises(ValueError, match="preprocess_cfg with longest"):
        import_encoder(str(place))


@pytest.mark.parametrize(
    ("part", "fields", "named"),
    [
        ("vision_cfg", {"timm_model_name": "vit_base_patch16_siglip_224"}, "timm_model_name = vit_base_patch16_siglip"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "vision_cfg.layers = a ResNet"),
        ("vision_cfg", {"attentional_pool": True}, "attentional_pool"),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name = roberta-base"),
        ("text_cfg", {"pool_type": "last"}, "text_cfg.pool_type = last"),
        (None, {"multimodal_cfg": {"width": 8}}, "multimodal_cfg"),
    ],
    ids=["timm", "resnet", "pooling", "hugging-face-text", "last-token", "coca"],
)
def test_other_architectures_are_refused_by_name(place: Path, part: str, fields: dict[str, Any], named: str) -> None:
    reconfigure(place, part, **fields)
    with pytest.raises(ValueError, match=f"this model has .*{named}"):
        import_encoder(str(place))


def test_what_is_missing_or_does_not_fit_is_named(place: Path, clip: Any) -> None:
    with pytest.raises(ValueError, match=r"no weights; put one of open_clip_model\.safetensors"):
        import_encoder(str(place))
    weights = open_clip_weights(clip)
    save_file(
        {name: value for name, value in weights.items() if "ln_post" not in name}, place / "open_clip_model.safetensors"
    )
    with pytest.raises(ValueError, match=r"vision_model\.post_layernorm\.bias is absent and should be 16"):
        import_encoder(str(place))
    save_file(weights, place / "open_clip_model.safetensors")
    (place / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer; put CLIP's tokenizer\.json, or vocab\.json and merges\.txt"):
        import_encoder(str(place))


def test_code_in_a_pickle_is_not_run(place: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Evil()}, place / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read without unpickling code"):
        import_encoder(str(place))
    assert not (tmp_path / "ran").exists()
