"""Folders of sentence-transformers, read and written: plain transformers, pooled and projected by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as library
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import normalize

from conjoin.encoders.exported import export_text_tower
from conjoin.encoders.imported import import_encoder
from conjoin.encoders.joint import JointEncoder, build
from conjoin.encoders.options import TowerOptions

TEXTS = ["Red apple", "green pear, apple apple " * 9, "x"]
LEGACY, NEW = "sentence_transformers.models", "sentence_transformers.base.modules.anything"
IDENTITY, GELU = "torch.nn.modules.linear.Identity", "torch.nn.modules.activation.GELU"
MEAN = {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
Module = tuple[str, dict[str, Any], dict[str, torch.Tensor]]


def folder(bert: Path, place: Path, modules: Sequence[Module], package: str = LEGACY) -> Path:
    """The transformer in the root and every further module in a folder of its own."""
    shutil.copytree(bert, place)
    listed = [{"idx": 0, "name": "0", "path": "", "type": f"{package}.Transformer"}]
    for name, config, weights in modules:
        path = f"{len(listed)}_{name}"
        (place / path).mkdir()
        (place / path / "config.json").write_text(json.dumps(config))
        if weights:
            save_file(weights, place / path / "model.safetensors")
        listed.append({"idx": len(listed), "name": str(len(listed)), "path": path, "type": f"{package}.{name}"})
    (place / "modules.json").write_text(json.dumps(listed))
    return place


def dense(inputs: int, outputs: int, activation: str = IDENTITY, *, bias: bool = True) -> tuple[Module, nn.Linear]:
    layer = nn.Linear(inputs, outputs, bias=bias)
    config = {"in_features": inputs, "out_features": outputs, "bias": bias, "activation_function": activation}
    return ("Dense", config, {f"linear.{name}": value for name, value in layer.state_dict().items()}), layer


def vectors(encoder: JointEncoder, texts: Sequence[str] = TEXTS) -> torch.Tensor:
    with torch.inference_mode():
        return encoder.encode("text", encoder.collate("text", texts))


@torch.no_grad()
def pooled(bert: Path, pooling: str = "mean", texts: Sequence[str] = TEXTS, max_length: int = 20) -> torch.Tensor:
    words, model = library.AutoTokenizer.from_pretrained(bert), library.BertModel.from_pretrained(bert)
    inputs = words(list(texts), padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"]
    return {
        "mean": (hidden * mask[:, :, None]).sum(1) / mask.sum(1)[:, None],
        "cls": hidden[:, 0],
        "lasttoken": hidden[torch.arange(len(mask)), mask.sum(1) - 1],
    }[pooling]


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.std() > 1e-3
    torch.testing.assert_close(found, normalize(expected.detach(), dim=-1), rtol=0, atol=1e-6)


@pytest.fixture
def bert(checkpoints: Path) -> Path:
    return checkpoints / "bert"


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_pooling_as_newer_versions_write_it(bert: Path, tmp_path: Path, pooling: str) -> None:
    modules: list[Module] = [
        ("Pooling", {"embedding_dimension": 16, "pooling_mode": pooling}, {}),
        ("Normalize", {}, {}),
    ]
    encoder = import_encoder(str(folder(bert, tmp_path / "m", modules, NEW)))
    assert (encoder.spec.dim, encoder.spec.towers["text"].head, len(encoder.log_scales)) == (16, "none", 0)
    same(vectors(encoder), pooled(bert, pooling))


def test_a_dense_layer_is_the_linear_head(bert: Path, tmp_path: Path) -> None:
    module, layer = dense(16, 8)
    encoder = import_encoder(str(folder(bert, tmp_path / "m", [("Pooling", MEAN, {}), module])))
    assert (encoder.spec.dim, encoder.spec.towers["text"].head) == (8, "linear")
    same(vectors(encoder), layer(pooled(bert)))


def test_dense_layers_in_a_row_are_one(bert: Path, tmp_path: Path) -> None:
    (up, first), (down, second) = dense(16, 24, bias=False), dense(24, 6)
    modules: list[Module] = [("Pooling", MEAN, {}), ("Dropout", {}, {}), up, down, ("Normalize", {}, {})]
    encoder = import_encoder(str(folder(bert, tmp_path / "m", modules)))
    same(vectors(encoder), second(first(pooled(bert))))


def test_a_norm_and_a_gelu_are_an_mlp(bert: Path, tmp_path: Path) -> None:
    norm = nn.LayerNorm(16)
    (up, first), (down, second) = dense(16, 24, GELU), dense(24, 6)
    weights = {f"norm.{name}": value + 0.1 for name, value in norm.state_dict().items()}
    norm.load_state_dict({name.removeprefix("norm."): value for name, value in weights.items()})
    modules: list[Module] = [("Pooling", MEAN, {}), ("LayerNorm", {"dimension": 16}, weights), up, down]
    encoder = import_encoder(str(folder(bert, tmp_path / "m", modules)))
    assert encoder.spec.towers["text"].head == "mlp"
    same(vectors(encoder), second(nn.functional.gelu(first(norm(pooled(bert))))))


def test_length_lower_case_and_default_prompt(bert: Path, tmp_path: Path) -> None:
    place = folder(bert, tmp_path / "m", [("Pooling", MEAN, {})])
    (place / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 7, "do_lower_case": True}))
    prompts = {"prompts": {"query": "A pear: ", "document": "x"}, "default_prompt_name": "query"}
    (place / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    encoder = import_encoder(str(place))
    same(vectors(encoder), pooled(bert, texts=[f"A pear: {text}" for text in TEXTS], max_length=7))
    assert encoder.tower("text").length(TEXTS[1]) == 7


def test_a_joint_checkpoint_in_a_folder_of_sentence_transformers(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "clip", tmp_path / "0_CLIPModel")
    listed = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": f"{LEGACY}.CLIPModel"}]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    encoder = import_encoder(str(tmp_path))
    torch.testing.assert_close(vectors(encoder), vectors(import_encoder(str(checkpoints / "clip"))), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([], "Pooling must follow the Transformer, not nothing"),
        ([("Pooling", {**MEAN, "pooling_mode_max_tokens": True}, {})], "its pooling is mean_tokens and max_tokens"),
        ([("Pooling", {"embedding_dimension": 16, "pooling_mode": "max"}, {})], "its pooling is max"),
        ([("Pooling", MEAN, {}), dense(16, 8, "torch.nn.modules.activation.Tanh")[0]], "a Dense module with Tanh"),
        ([("Pooling", MEAN, {}), dense(16, 8, GELU)[0]], "after the pooling come Dense"),
        ([("Pooling", MEAN, {}), ("Dense", dense(16, 8)[0][1], {})], "pickled weights are not read"),
        ([("Pooling", MEAN, {}), ("WeightedLayerPooling", {}, {})], "its module WeightedLayerPooling cannot"),
    ],
    ids=["nothing", "two-poolings", "max", "tanh", "gelu-alone", "pickle", "other"],
)
def test_what_cannot_be_had_is_named(bert: Path, tmp_path: Path, modules: list[Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_encoder(str(folder(bert, tmp_path / "m", modules)))


def trained(bert: Path, head: str, pooling: str = "mean") -> JointEncoder:
    """An encoder whose text tower has random weights everywhere."""
    towers = {"text": TowerOptions(str(bert), head=head, pooling=pooling), "image": TowerOptions(size_px=16, width=8)}  # type: ignore[arg-type]
    return build({**towers}, 16 if head == "none" else 8)


@pytest.mark.parametrize(("head", "pooling"), [("none", "cls"), ("linear", "last"), ("mlp", "mean")])
def test_a_text_tower_goes_and_comes_back(bert: Path, tmp_path: Path, head: str, pooling: str) -> None:
    encoder = trained(bert, head, pooling)
    export_text_tower(encoder, tmp_path / "out")
    names = [entry["type"].rpartition(".")[2] for entry in json.loads((tmp_path / "out" / "modules.json").read_text())]
    dense_layers = {"none": [], "linear": ["Dense"], "mlp": ["LayerNorm", "Dense", "Dense"]}[head]
    assert names == ["Transformer", "Pooling", *dense_layers, "Normalize"]
    torch.testing.assert_close(vectors(import_encoder(str(tmp_path / "out"))), vectors(encoder), rtol=0, atol=1e-6)


def test_an_exported_text_tower_by_hand(bert: Path, tmp_path: Path) -> None:
    encoder = trained(bert, "linear")
    export_text_tower(encoder, tmp_path / "out")
    weights = load_file(tmp_path / "out" / "2_Dense" / "model.safetensors")
    by_hand = pooled(tmp_path / "out") @ weights["linear.weight"].T + weights["linear.bias"]
    same(vectors(encoder), by_hand)


def test_a_prompt_is_kept(bert: Path, tmp_path: Path) -> None:
    place = folder(bert, tmp_path / "m", [("Pooling", MEAN, {})])
    prompts = {"prompts": {"query": "pear "}, "default_prompt_name": "query"}
    (place / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    encoder = import_encoder(str(place))
    export_text_tower(encoder, tmp_path / "out")
    torch.testing.assert_close(vectors(import_encoder(str(tmp_path / "out"))), vectors(encoder), rtol=0, atol=1e-6)


def test_towers_that_the_library_has_not_are_refused(checkpoints: Path, small_encoder: Path, tmp_path: Path) -> None:
    from conjoin.encoders import checkpoint

    with pytest.raises(ValueError, match=r"the text tower is built in \(transformer\) and no other library has it"):
        export_text_tower(checkpoint.load(small_encoder), tmp_path / "a")
    clip = import_encoder(str(checkpoints / "clip"))
    with pytest.raises(ValueError, match=r"half of a clip_text_model checkpoint.*--as transformers"):
        export_text_tower(clip, tmp_path / "b")
    with pytest.raises(ValueError, match="the image tower takes no text"):
        export_text_tower(clip, tmp_path / "c", "image")
