"""The optimizer's groups against a table, schedules against closed forms, the moving average against a loop."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers as library
from safetensors.torch import load_file
from torch import nn

from conjoin.encoders import tokenizer, tuning
from conjoin.encoders.joint import JointEncoder, build
from conjoin.encoders.options import TowerOptions, Tuning
from conjoin.pipeline.optimizer import Ema, parameter_groups, rate, scores, should_stop
from conjoin.pipeline.recipe import TrainConfig


def small() -> JointEncoder:
    options = {"text": TowerOptions(max_tokens=8, width=16), "image": TowerOptions(size_px=16, width=8)}
    return build(options, 8, ["red apple", "green pear"])


def placed(encoder: JointEncoder, recipe: TrainConfig) -> dict[str, tuple[float, float]]:
    """Per parameter of the groups: lr_factor and weight_decay."""
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}
    groups = parameter_groups(encoder, recipe)
    pairs = [(names[id(p)], (group["lr_factor"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(pairs) == len(dict(pairs)), "a parameter is in two groups"
    return dict(pairs)


def test_factors_of_layer_wise_decay() -> None:
    encoder = small()
    recipe = TrainConfig.model_validate({"towers": {"text": {"layer_decay": 0.5}, "image": {}}})
    found = placed(encoder, recipe)
    table = {
        "towers.text.backbone.tokens.weight": 1 / 32,
        "towers.text.backbone.positions": 1 / 32,
        "towers.text.backbone.layers.0.qkv.weight": 1 / 16,
        "towers.text.backbone.layers.1.qkv.bias": 1 / 8,
        "towers.text.backbone.layers.2.up.weight": 1 / 4,
        "towers.text.backbone.layers.3.mlp_norm.weight": 1 / 2,
        "towers.text.backbone.norm.weight": 1,
        "towers.text.head.weight": 1,
        "towers.image.backbone.stem.weight": 1,
        "towers.image.head.bias": 1,
        "log_scales.image_text": 1,
    }
    assert {name: found[name][0] for name in table} == table
    assert set(found) == {name for name, _ in encoder.named_parameters()}


def test_weight_decay_is_for_matrices_that_are_no_positions() -> None:
    found = placed(small(), TrainConfig.model_validate({"weight_decay": 0.1}))
    assert {decay for _, decay in found.values()} == {0, 0.1}
    decayed = {name.rpartition("backbone.")[2] for name, (_, decay) in found.items() if decay}
    text = {"tokens.weight", *(f"layers.{n}.{part}.weight" for n in range(4) for part in ("qkv", "out", "up", "down"))}
    convolutions = {f"stages.{n}.conv{k}.weight" for n in range(4) for k in (1, 2)}
    skips = {f"stages.{n}.skip.weight" for n in range(1, 4)}
    heads = {"towers.text.head.weight", "towers.image.head.weight"}
    assert decayed == {*text, *convolutions, *skips, *heads, "stem.weight"}


@pytest.mark.parametrize(
    ("name", "decayed"),
    [
        ("embeddings.position_embeddings", False),
        ("class_embedding", False),
        ("cls_token", False),
        ("probe", False),
        ("relative_position_bias_table", False),
        ("embeddings.token_type_embeddings", True),
        ("token_embedding", True),
        ("projection", True),
    ],
)
def test_names_of_pretrained_models(name: str, decayed: bool) -> None:
    encoder = small()
    module: nn.Module = encoder.tower("image").backbone
    for part in name.split(".")[:-1]:
        module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(name.rpartition(".")[2], nn.Parameter(torch.zeros(1, 1, 4)))
    found = placed(encoder, TrainConfig())
    assert found[f"towers.image.backbone.{name}"][1] == (0.01 if decayed else 0)


def test_only_what_learns_is_in_a_group_and_the_order_stays() -> None:
    recipe = TrainConfig.model_validate({"towers": {"text": {"tune": "last:1", "layer_decay": 0.5}}})

    def groups() -> list[list[str]]:
        encoder = small()
        tuning.freeze(encoder.tower("image"), Tuning("head"))
        tuning.freeze(encoder.tower("text"), Tuning("last:1"))
        names = {id(parameter): name for name, parameter in encoder.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in parameter_groups(encoder, recipe)]

    flat = sorted(name for group in groups() for name in group)
    prefixes = ("log_scales.", "towers.image.head.", "towers.text.head.", "towers.text.backbone.norm.")
    assert flat == sorted(
        name for name, _ in small().named_parameters() if name.startswith((*prefixes, "towers.text.backbone.layers.3."))
    )
    assert groups() == groups()


def test_a_step_of_adamw_moves_a_block_by_its_factor() -> None:
    encoder = small()
    recipe = TrainConfig.model_validate({"lr": 1e-3, "weight_decay": 0, "towers": {"text": {"layer_decay": 0.5}}})
    optimizer = torch.optim.AdamW(parameter_groups(encoder, recipe), lr=recipe.lr)
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    for parameter in encoder.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # AdamW's first step is lr times the gradient's sign
    moved = {name: float((before[name] - p.detach()).abs().max()) for name, p in encoder.named_parameters()}
    assert moved["towers.text.backbone.layers.0.qkv.weight"] == pytest.approx(1e-3 / 16, rel=1e-3)
    assert moved["towers.text.head.weight"] == pytest.approx(1e-3, rel=1e-3)


def rates(total: int, **recipe: object) -> list[float]:
    return [rate(step, total, TrainConfig.model_validate(recipe)) for step in range(total)]


def test_cosine() -> None:
    expected = [0.25, 0.5, 0.75, 1, *(0.5 * (1 + math.cos(math.pi * n / 16)) for n in range(16))]
    assert rates(20, warmup=0.2) == pytest.approx(expected, abs=1e-12)


def test_wsd_is_stable_and_then_cools_down_by_the_root() -> None:
    expected = [0.5, 1, *[1] * 14, *(1 - math.sqrt(n / 4) for n in range(4))]
    assert rates(20, schedule="wsd", warmup=0.1, cooldown=0.2) == pytest.approx(expected, abs=1e-12)


def test_constant() -> None:
    assert rates(10, schedule="constant", warmup=0.2) == [0.5, *[1] * 9]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 1000])
def test_every_step_has_a_rate_and_the_peak_is_one(schedule: str, total: int) -> None:
    found = rates(total, schedule=schedule)
    assert all(0 < value <= 1 for value in found)
    assert max(found) == 1


def walk(parameters: Sequence[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def two() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.zeros(3)), "b": nn.Parameter(torch.ones(2, 2))}


def test_the_moving_average_is_the_loops() -> None:
    parameters = two()
    ema, expected = Ema(parameters, 0.8), parameters["a"].detach().clone()
    for step in range(1, 60):
        walk(list(parameters.values()), step)
        ema.update_(step)
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameters["a"].detach()
    torch.testing.assert_close(ema.state()["a"], expected, rtol=1e-5, atol=1e-6)
    assert not ema.state()["a"].requires_grad


def test_swapping_is_undone_exactly_and_after_an_error_too() -> None:
    parameters = two()
    ema = Ema(parameters, 0.9)
    walk(list(parameters.values()), 1)
    ema.update_(1)
    before, average = parameters["b"].detach().clone(), ema.state()["b"].clone()
    inside: list[torch.Tensor] = []

    def validate() -> None:
        with ema.swapped():
            inside.append(parameters["b"].detach().clone())
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        validate()
    assert torch.equal(inside[0], average)
    assert torch.equal(parameters["b"].detach(), before)
    assert torch.equal(ema.state()["b"], average)


def test_a_resumed_average_is_the_uninterrupted_one() -> None:
    def run(stop: int | None) -> dict[str, torch.Tensor]:
        parameters = two()
        ema = Ema(parameters, 0.95)
        for step in range(1, 21):
            walk(list(parameters.values()), step)
            ema.update_(step)
            if step == stop:
                kept = {name: tensor.clone() for name, tensor in ema.state().items()}
                parameters = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
                ema = Ema(parameters, 0.95)
                ema.load_state(kept)
        return ema.state()

    whole, resumed = run(None), run(7)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_average_that_a_checkpoint_lacks_is_named() -> None:
    with pytest.raises(KeyError, match="b"):
        Ema(two(), 0.9).load_state({"a": torch.zeros(3)})


def test_scores_are_the_mean_of_both_ways_where_there_was_a_validation() -> None:
    log = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "a_b_hit1": 0.0, "a_b_hit10": 0.5, "b_a_hit10": 0.7},
        {"step": 3, "loss": 1.0},
        {"step": 4, "a_b_hit10": 0.25},
    ]
    assert scores(log) == pytest.approx([0.6, 0.25])


@pytest.mark.parametrize(
    ("validations", "patience", "stop"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.6], 1, False),
        ([0.5, 0.5], 1, True),
        ([0.6, 0.5, 0.55], 2, True),
        ([0.6, 0.5, 0.7], 2, False),
        ([0.6, 0.5, 0.55], 3, False),
        ([0.6, 0.5, 0.4, 0.3], None, False),
    ],
)
def test_patience(validations: list[float], patience: int | None, stop: bool) -> None:
    assert should_stop(validations, patience) is stop


@pytest.mark.slow
def test_parameters_spread_over_ranks_come_to_the_same(tmp_path: Path) -> None:
    library.utils.logging.disable_progress_bar()
    trained = tokenizer.train(["red apple", "green pear", "a blue violin"])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = library.PreTrainedTokenizerFast(tokenizer_object=trained, model_max_length=32, **special)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    for item in (library.BertModel(library.BertConfig(vocab_size=len(words), **sizes)), words):
        item.save_pretrained(tmp_path / "bert")
    found = {}
    for world in (1, 2):
        out, store = tmp_path / f"{world}.safetensors", tmp_path / f"store{world}"
        start = [sys.executable, str(Path(__file__).with_name("tuned_ranks.py"))]
        rest = [str(world), str(store), str(out), str(tmp_path / "bert")]
        running = [subprocess.Popen([*start, str(rank), *rest]) for rank in range(world)]
        assert [process.wait(300) for process in running] == [0] * world
        found[world] = load_file(out)
    assert set(found[1]) == set(found[2])
    adapters = [name for name in found[1] if name.startswith("ema.") and "lora_B" in name]
    assert adapters
    assert all(found[1][name].abs().max() > 1e-4 for name in adapters)
    for name, value in found[1].items():
        torch.testing.assert_close(found[2][name], value, rtol=1e-4, atol=1e-5, msg=name)
