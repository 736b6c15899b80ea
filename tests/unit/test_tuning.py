"""Tuning on tiny models: what is how deep, what learns, adapters that leave no trace, memory against time."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as library
from torch import nn

from conjoin.encoders import backbones, checkpoint, tokenizer, tuning
from conjoin.encoders.efficientnet import EfficientNetLite0
from conjoin.encoders.joint import JointEncoder, build
from conjoin.encoders.options import TowerOptions, Tuning
from conjoin.encoders.spec import ImageTransform, TowerSpec
from conjoin.encoders.towers import Tower, build_tower, rebuild_tower

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **SMALL}
PIXELS = {"image_size": 32, "patch_size": 8, **SMALL}
IDS = torch.tensor([[1, 5, 9, 7, 2], [1, 4, 2, 0, 0]])
MASK = (IDS > 0).long()
TEXT = {"input_ids": IDS, "attention_mask": MASK}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)}
MEL = torch.linspace(0, 9, 2 * 8 * 40).sin().reshape(2, 8, 40)
LORA = Tuning("lora", lora_rank=4, lora_alpha=8, seed=5)


def whisper() -> nn.Module:
    layers = {"encoder_layers": 3, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 9}
    sizes = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_source_positions": 50}
    encoder: nn.Module = library.WhisperModel(library.WhisperConfig(**layers, **special, **sizes)).get_encoder()
    return encoder


def clap() -> nn.Module:
    sizes = {"patch_embeds_hidden_size": 8, "hidden_size": 16, "depths": [1, 2], "num_attention_heads": [1, 2]}
    config = library.ClapAudioConfig(window_size=8, projection_dim=12, **sizes)
    return library.ClapAudioModelWithProjection(config)


def wav2vec2() -> nn.Module:
    convolutions = {"conv_dim": [8] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return library.Wav2Vec2Model(library.Wav2Vec2Config(**convolutions, **SMALL))


# a model, its number of blocks, what it takes, and what of it comes after its blocks
ZOO: dict[str, tuple[Callable[[], Any], int, dict[str, torch.Tensor], tuple[str, ...]]] = {
    "built-in text": (lambda: backbones.TextTransformer(50, 8, 16, 3), 3, TEXT, ("norm",)),
    "built-in image": (lambda: backbones.ImageCnn(8), 4, IMAGE, ("norm",)),
    "built-in audio": (
        lambda: backbones.AudioCnn(8, 16, 3),
        3,
        {"mel_BMF": MEL, "num_frames_B": torch.tensor([40, 30])},
        ("norm",),
    ),
    "efficientnet": (EfficientNetLite0, 16, IMAGE, ("head",)),
    "bert": (lambda: library.BertModel(library.BertConfig(**WORDS)), 3, TEXT, ("pooler",)),
    "mpnet": (lambda: library.MPNetModel(library.MPNetConfig(**WORDS)), 3, TEXT, ("pooler",)),
    "qwen2": (
        lambda: library.Qwen2Model(library.Qwen2Config(num_key_value_heads=1, **WORDS)),
        3,
        TEXT,
        ("norm",),
    ),
    "t5": (
        lambda: library.T5EncoderModel(
            library.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2)
        ),
        3,
        TEXT,
        ("encoder.final_layer_norm",),
    ),
    "clip text": (
        lambda: library.CLIPTextModelWithProjection(library.CLIPTextConfig(projection_dim=12, **WORDS)),
        3,
        TEXT,
        ("text_model.final_layer_norm", "text_projection"),
    ),
    "clip image": (
        lambda: library.CLIPVisionModelWithProjection(library.CLIPVisionConfig(projection_dim=12, **PIXELS)),
        3,
        IMAGE,
        ("vision_model.post_layernorm", "visual_projection"),
    ),
    "siglip text": (
        lambda: library.SiglipTextModel(library.SiglipTextConfig(projection_size=16, **WORDS)),
        3,
        TEXT,
        ("final_layer_norm", "head"),
    ),
    "siglip image": (
        lambda: library.SiglipVisionModel(library.SiglipVisionConfig(**PIXELS)),
        3,
        IMAGE,
        ("post_layernorm", "head"),
    ),
    "vit": (lambda: library.ViTModel(library.ViTConfig(**PIXELS)), 3, IMAGE, ("layernorm", "pooler")),
    "dinov2": (lambda: library.Dinov2Model(library.Dinov2Config(**PIXELS)), 3, IMAGE, ("layernorm",)),
    "convnext, in stages": (
        lambda: library.ConvNextModel(library.ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 3, 1])),
        6,
        IMAGE,
        ("layernorm",),
    ),
    "resnet, in stages": (
        lambda: library.ResNetModel(library.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2])),
        3,
        IMAGE,
        (),
    ),
    "swin, in stages": (
        lambda: library.SwinModel(
            library.SwinConfig(
                image_size=32, patch_size=2, embed_dim=8, depths=[1, 2, 1], num_heads=[1, 2, 2], window_size=4
            )
        ),
        4,
        IMAGE,
        ("layernorm",),
    ),
    "whisper": (
        whisper,
        3,
        {"input_features": torch.linspace(-1, 1, 2 * 80 * 100).reshape(2, 80, 100)},
        ("layer_norm",),
    ),
    "clap audio, in stages": (
        clap,
        3,
        {"input_features": torch.linspace(-1, 1, 2 * 1001 * 64).reshape(2, 1, 1001, 64)},
        ("audio_model.audio_encoder.norm", "audio_projection"),
    ),
    "clap text": (
        lambda: library.ClapTextModelWithProjection(library.ClapTextConfig(projection_dim=12, **WORDS)),
        3,
        TEXT,
        ("text_model.pooler", "text_projection"),
    ),
    "wav2vec2": (wav2vec2, 3, {"input_values": torch.linspace(0, 99, 2 * 4000).sin().reshape(2, 4000)}, ()),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    return ZOO[name][0]().eval()


def called(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[str]:
    """`block N` for blocks and names of other modules with parameters of their own, in the order of first calls."""
    order: list[str] = []
    stack = {id(block): f"block {depth}" for depth, block in enumerate(tuning.blocks(model), 1)}
    for name, module in model.named_modules():
        if id(module) in stack or list(module.parameters(recurse=False)):
            label = stack.get(id(module), name)
            module.register_forward_pre_hook(lambda *_, label=label: order.append(label))
    with torch.inference_mode():
        model(**inputs)
    return list(dict.fromkeys(order))


@pytest.mark.parametrize("name", ZOO)
def test_depth_is_the_order_of_computation(name: str) -> None:
    _, num_blocks, inputs, after = ZOO[name]
    model = made(name)
    found = tuning.depths(model)
    assert list(found) == [parameter for parameter, _ in model.named_parameters()]
    assert len(tuning.blocks(model)) == num_blocks
    assert set(found.values()) - {0, num_blocks + 1} == set(range(1, num_blocks + 1))
    last = {parameter for parameter, depth in found.items() if depth > num_blocks}
    assert last == {parameter for parameter in found if parameter.startswith(tuple(f"{place}." for place in after))}
    order = called(model, inputs)
    assert [label for label in order if label.startswith("block ")] == [f"block {n}" for n in range(1, num_blocks + 1)]
    for place, label in enumerate(order):
        own = [depth for parameter, depth in found.items() if parameter.rpartition(".")[0] == label]
        begun = sum(earlier.startswith("block ") for earlier in order[:place])
        assert not own or max(own) >= begun, f"{label} runs after block {begun}"
        assert begun or set(own) <= {0}, f"{label} runs before the blocks"


def test_what_is_no_stack_is_one_block() -> None:
    assert set(tuning.depths(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).values()) == {1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny BERT checkpoint with its tokenizer."""
    library.utils.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("bert")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    trained = tokenizer.train(["red apple", "green pear", "a blue violin"])
    words = library.PreTrainedTokenizerFast(tokenizer_object=trained, model_max_length=32, **special)
    torch.manual_seed(0)
    config = library.BertConfig(**{**WORDS, "vocab_size": len(words)}, initializer_range=0.2)
    for item in (library.BertModel(config), words):
        item.save_pretrained(folder)
    return str(folder)


def joint(place: str) -> JointEncoder:
    return build({"text": TowerOptions(place), "image": TowerOptions(size_px=16, width=8)}, 8, loss="infonce")


def features(tower: Tower) -> torch.Tensor:
    return tower.project(tower.features(tower.collate(["red apple", "a green violin"])))


def learning(tower: nn.Module) -> set[str]:
    return {name for name, parameter in tower.named_parameters() if parameter.requires_grad}


def test_last_blocks_and_what_follows_learn(place: str) -> None:
    tower = build_tower("text", TowerOptions(place), 8)
    everything = learning(tower)
    tuning.freeze(tower, Tuning("last:2"))
    prefixes = ("backbone.model.encoder.layer.1.", "backbone.model.encoder.layer.2.", "backbone.model.pooler.", "head.")
    assert learning(tower) == {name for name in everything if name.startswith(prefixes)}
    tuning.freeze(tower, Tuning("head"))
    assert learning(tower) == {"head.weight", "head.bias"}


@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("tune", ["last:1", "last:3"])
def test_gradients_of_what_learns_are_those_of_the_whole(kind: str, tune: str, place: str) -> None:
    options = {"text": TowerOptions(place), "image": TowerOptions(size_px=16, width=8)}[kind]
    values = {"text": ["red apple", "a violin"], "image": [np.full((16, 16, 3), value, np.uint8) for value in (9, 80)]}
    whole, part = build_tower(kind, options, 8), build_tower(kind, options, 8)
    tuning.freeze(part, Tuning(tune))
    for tower in (whole, part):
        tower.project(tower.features(tower.collate(values[kind]))).sin().sum().backward()
    learned = learning(part)
    assert learned < learning(whole)
    for (name, own), other in zip(part.named_parameters(), whole.parameters(), strict=True):
        assert (own.grad is None) == (name not in learned), name
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_all_learns_everything() -> None:
    tower = build_tower("image", TowerOptions(size_px=16, width=8), 8)
    tuning.freeze(tower, Tuning("all"))
    assert len(learning(tower)) == len(list(tower.parameters()))


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ("last:5", "the backbone has 4 blocks; use last:4 or all"),
        ("last:0", "not 'last:0'"),
        ("heads", "tune is all, head, last:N or lora, not 'heads'"),
        ("lora", "builtin starts from random weights; use tune: all"),
    ],
)
def test_what_cannot_be_tuned_says_what_to_do(tune: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuning.freeze(build_tower("image", TowerOptions(size_px=16, width=8), 8), Tuning(tune))


def test_adapters_need_linear_layers() -> None:
    spec = TowerSpec("image", "efficientnet-lite0", {}, 1280, ImageTransform(size_px=32), "none")
    with pytest.raises(ValueError, match="blocks have none; use last:N"):
        tuning.freeze(rebuild_tower(spec, 8, None), LORA)


def test_lora_without_peft_says_how_to_get_it(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r'pip install "conjoin\[lora\]"'):
        tuning.freeze(build_tower("text", TowerOptions(place), 8), LORA)


def adapted(place: str) -> Tower:
    """A tower whose adapters have moved, as after some steps."""
    tower = build_tower("text", TowerOptions(place), 8)
    tuning.freeze(tower, LORA)
    stir(tower)
    return tower


def stir(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=generator)


def test_fresh_adapters_change_nothing(place: str) -> None:
    tower = build_tower("text", TowerOptions(place), 8)
    before = features(tower)
    tuning.freeze(tower, LORA)
    torch.testing.assert_close(features(tower), before, rtol=0, atol=0)


def test_only_adapters_and_the_head_get_gradients(place: str) -> None:
    tower = adapted(place).train()
    features(tower).sin().sum().backward()
    moved = {name for name, p in tower.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert moved == learning(tower)
    assert {name for name in moved if "lora_" not in name} == {"head.weight", "head.bias"}
    # six linear layers in each of three blocks, A and B
    assert len(moved) == 2 * 6 * 3 + 2
    assert {len(p) for name, p in tower.named_parameters() if "lora_A" in name} == {LORA.lora_rank}


def test_merged_adapters_leave_an_ordinary_tower(place: str) -> None:
    tower = adapted(place)
    before = features(tower)
    tuning.merge_(tower)
    plain = build_tower("text", TowerOptions(place), 8)
    assert (before - features(plain)).abs().max() > 1e-2
    torch.testing.assert_close(features(tower), before, rtol=0, atol=1e-5)
    assert list(tower.state_dict()) == list(plain.state_dict())
    assert {type(module) for module in tower.modules()} == {type(module) for module in plain.modules()}
    assert not hasattr(tower.backbone, "peft_config")


def test_an_encoder_saved_with_adapters_is_an_ordinary_one(place: str, tmp_path: Path) -> None:
    encoder = joint(place)
    names = set(encoder.state_dict())
    tuning.freeze(encoder.tower("text"), LORA)
    stir(encoder)
    before, fingerprint = features(encoder.tower("text")), checkpoint.save(encoder, tmp_path / "saved")
    assert learning(encoder.tower("text")) > {"head.weight"}, "saving leaves the adapters where they are"
    again = checkpoint.load(tmp_path / "saved")
    assert set(again.state_dict()) == names
    torch.testing.assert_close(features(again.tower("text")), before, rtol=0, atol=1e-5)
    key = checkpoint.backbone_fingerprint(encoder.tower("text"))
    tuning.merge_(encoder.tower("text"))
    assert checkpoint.fingerprint(encoder) == fingerprint == checkpoint.fingerprint(again)
    assert checkpoint.backbone_fingerprint(encoder.tower("text")) == key


def test_adapters_are_drawn_by_their_seed_alone(place: str) -> None:
    def drawn(seed: int, elsewhere: int) -> dict[str, torch.Tensor]:
        tower = build_tower("text", TowerOptions(place), 8)
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        tuning.freeze(tower, Tuning("lora", seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
        return {name: parameter for name, parameter in tower.named_parameters() if parameter.requires_grad}

    first, again, other = drawn(1, 1), drawn(1, 2), drawn(2, 1)
    assert list(first) == list(again)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.slow
def test_adapters_are_the_same_in_every_process(place: str) -> None:
    script = (
        "import hashlib; from conjoin.encoders.options import TowerOptions, Tuning\n"
        "from conjoin.encoders import towers, tuning\n"
        f"tower = towers.build_tower('text', TowerOptions({place!r}), 8); tuning.freeze(tower, Tuning('lora'))\n"
        "learn = [(n, p.detach().numpy().tobytes()) for n, p in tower.named_parameters() if p.requires_grad]\n"
        "print(hashlib.sha256(repr(learn).encode()).hexdigest())"
    )
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, check=True) for _ in range(2)]
    assert runs[0].stdout.strip()[-64:] == runs[1].stdout.strip()[-64:]


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients by name, and the bytes that the forward pass keeps: saved tensors and the inputs of blocks."""
    kept: dict[int, int] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, named: [keep(v) for v in (*args, *named.values()) if isinstance(v, torch.Tensor)] and None,
            with_kwargs=True,
        )
        for block in tuning.blocks(model)
    ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = model(**inputs)
        output = output if isinstance(output, torch.Tensor) else output[0]
        # read here: the backward pass runs blocks again, within their own hooks
        held = sum(kept.values())
    for hook in hooks:
        hook.remove()
    output.sin().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, held


class Standing(Tower):
    """A tower around any backbone: what checkpoint_activations needs of one."""

    def __init__(self, backbone: nn.Module) -> None:
        nn.Module.__init__(self)
        self.backbone = backbone


@pytest.mark.parametrize("name", ZOO)
def test_gradients_with_activations_computed_again_are_the_same(name: str) -> None:
    inputs = ZOO[name][2]
    plain = made(name)
    again = copy.deepcopy(plain)
    tuning.checkpoint_activations(Standing(again))
    expected, whole = gradients(plain, inputs)
    found, less = gradients(again, inputs)
    assert list(found) == list(expected)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=0, msg=parameter)
    assert less < 0.8 * whole, f"{less} bytes of {whole}"


def test_activations_of_adapted_blocks_can_be_computed_again(place: str) -> None:
    plain, again = adapted(place), adapted(place)
    tuning.checkpoint_activations(again)
    for tower in (plain, again):
        features(tower).sin().sum().backward()
    for (name, parameter), other in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=0, atol=0)
    tuning.merge_(again)
    with torch.inference_mode():
        torch.testing.assert_close(features(again), features(plain), rtol=0, atol=1e-5)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"needs g\+\+, which is not there: install it, or compile: false"):
        tuning.compile_(build_tower("image", TowerOptions(size_px=16, width=8), 8))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler on this machine")
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_a_compiled_tower_computes_and_is_named_the_same(again: bool, place: str) -> None:
    plain, compiled = adapted(place), adapted(place)
    if again:
        tuning.checkpoint_activations(compiled)
    tuning.compile_(compiled)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for values in (["red apple", "a green violin"], ["a", "blue", "pear"]):
        for tower in (plain, compiled):
            tower.zero_grad()
            tower.project(tower.features(tower.collate(values))).sin().sum().backward()
        for (name, parameter), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            if parameter.grad is not None:
                assert (other.grad - parameter.grad).norm() < 1e-4 * parameter.grad.norm(), name
    assert np.isfinite(features(compiled).detach().numpy()).all()
