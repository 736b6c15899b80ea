"""Tuning: which parameters of a tower learn, how deep they lie, and what a training step may trade for memory or time.

Assumes: a backbone's blocks are registered in the order in which they run, and what runs before or after them is
registered there too (embeddings and norms of the input are known by name); a backbone runs in evaluation mode and
draws nothing at random, so a block gives the same output when it is run again.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from conjoin.encoders.options import Tuning

if TYPE_CHECKING:
    from conjoin.encoders.towers import Tower

_ADAPTER = "default"
# Registered after the blocks, used before or inside them: ClapAudioEncoder.batch_norm, MPNet's relative bias and so on.
_INPUT = re.compile(r"embed|batch_norm|relative_")
# Blocks of one kind differ less than this in parameters; stages, which widen, differ more and are made of blocks.
_WIDENING = 2
_RANDOM = ("transformer", "cnn", "audio-cnn")
_INSTALL = 'pip install "conjoin[lora]"'


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """The layers of a backbone in their order, those of its stages where it has stages; itself if it is no stack."""
    outer = _largest_list(backbone)
    if outer is None:
        return [backbone]
    sizes = [_size(block) for block in outer]
    if max(sizes) < _WIDENING * max(min(sizes), 1):
        return list(outer)
    inner = [_largest_list(stage) for stage in outer]
    return [block for stage, own in zip(outer, inner, strict=True) for block in (own or [stage])]


def depths(backbone: nn.Module) -> dict[str, int]:
    """Parameter names to 0 before the blocks, 1 for the first block, and one more than the last block's after them."""
    stack = blocks(backbone)
    within = {id(parameter): depth for depth, block in enumerate(stack, 1) for parameter in block.parameters()}
    found, above = {}, len(stack) + 1
    for name, parameter in reversed(list(backbone.named_parameters())):
        if id(parameter) in within:
            above = within[id(parameter)]
            found[name] = above
        elif above == 1 or (above > len(stack) and _INPUT.search(name)):
            found[name] = 0
        else:
            found[name] = above  # a stage's downsampling counts as part of the block after it
    return dict(reversed(found.items()))


def freeze(tower: Tower, tuning: Tuning) -> None:
    """Make what `tuning.tune` names learn and nothing else; the head always learns. Adds adapters for `lora`.

    The same tuning gives the same parameter names and the same adapters. Raises ValueError saying what to do.
    """
    kind, _, number = tuning.tune.partition(":")
    if kind == "last" and number.isdecimal() and int(number):
        _freeze_below(tower, int(number))
    elif tuning.tune == "lora":
        _adapt(tower, tuning)
    elif tuning.tune == "head":
        tower.freeze_backbone()
    elif tuning.tune != "all":
        raise ValueError(f"tune is all, head, last:N or lora, not {tuning.tune!r}")


def _freeze_below(tower: Tower, number: int) -> None:
    num_blocks = len(blocks(tower.backbone))
    if number > num_blocks:
        raise ValueError(f"last:{number}: the backbone has {num_blocks} blocks; use last:{num_blocks} or all")
    found = depths(tower.backbone)
    for name, parameter in tower.backbone.named_parameters():
        parameter.requires_grad_(found[name] > num_blocks - number)
    for module in tower.backbone.modules():
        if isinstance(module, nn.GroupNorm) and module.affine and module.weight.requires_grad:
            module.register_forward_pre_hook(_laid_out)


def _laid_out(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """torch 2.13 on a CPU: a norm that learns from channels-last input that needs no gradient writes to address 0."""
    if torch.is_grad_enabled() and not inputs[0].requires_grad:
        return (inputs[0].contiguous(), *inputs[1:])
    return inputs


def _adapt(tower: Tower, tuning: Tuning) -> None:
    """LoRA (Hu et al. 2021, arXiv:2106.09685) on every linear layer of the blocks."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(f"tune: lora needs peft; run `{_INSTALL}`") from error
    if tower.spec.backbone in _RANDOM:
        raise ValueError("tune: lora adapts a trained model, and builtin starts from random weights; use tune: all")
    names = _linear_layers(tower.backbone)
    if not names:
        raise ValueError("tune: lora adapts linear layers, and this backbone's blocks have none; use last:N")
    tower.freeze_backbone()
    config = LoraConfig(r=tuning.lora_rank, lora_alpha=tuning.lora_alpha, lora_dropout=0.0, target_modules=names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tuning.seed)
        inject_adapter_in_model(config, tower.backbone, _ADAPTER)
    tower.backbone.eval()


def _linear_layers(backbone: nn.Module) -> list[str]:
    # exactly nn.Linear: nn.MultiheadAttention reads its subclass's weight without calling it
    inside = {id(module) for block in blocks(backbone) for module in block.modules() if type(module) is nn.Linear}
    return [name for name, module in backbone.named_modules() if id(module) in inside]


@torch.no_grad()
def merge_(tower: Tower) -> None:
    """Fold the adapters into the weights, in place: afterwards the tower is as if it had never had any."""
    for name, layer in _adapted(tower):
        layer.base_layer.weight.copy_(_folded(layer))
        tower.set_submodule(name, layer.base_layer)
    if hasattr(tower.backbone, "peft_config"):
        del tower.backbone.peft_config


@torch.no_grad()
def plain_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """`module.state_dict()` as it would be after merge_, which it leaves to others."""
    state = dict(module.state_dict())
    for name, layer in _adapted(module):
        inner = {key: value for key, value in state.items() if key.startswith(f"{name}.")}
        state = {key: value for key, value in state.items() if key not in inner}
        own = layer.base_layer.state_dict(prefix=f"{name}.")
        state |= {**own, f"{name}.weight": _folded(layer)}
    return state


def _adapted(module: nn.Module) -> list[tuple[str, Any]]:
    """peft's layers by name; none where it was never imported."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, LoraLayer)]


def _folded(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.base_layer.weight + layer.get_delta_weight(_ADAPTER)
    return weight


def checkpoint_activations(tower: Tower) -> None:
    """Keep only each block's inputs for the backward pass, which runs the block once more: memory for time.

    Results and gradients stay the same. Not the library's own switch: that one is deaf in evaluation mode.
    """
    for block in blocks(tower.backbone):
        block.forward = partial(_again, block.forward)


def _again(forward: Callable[..., object], *inputs: object, **named: object) -> object:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    if named.get("past_key_values") is not None:
        named["past_key_values"] = None  # a decoder's cache would be written a second time
    run = partial(forward, **named)
    return cast(object, checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False))


def compile_(tower: Tower) -> None:
    """Compile the backbone at its first call, for any batch size and length; parameter names stay.

    Call it last, on the device that trains. Results change by rounding. Raises ValueError without a compiler.
    """
    kind = next(tower.backbone.parameters()).device.type
    variable, known = ("CC", ("gcc", "clang")) if kind == "cuda" else ("CXX", ("g++",))
    wanted = (os.environ[variable],) if variable in os.environ else known
    if not any(shutil.which(name.split()[0]) for name in wanted):
        names = " or ".join(wanted)
        raise ValueError(f"torch.compile on {kind} needs {names}, which is not there: install it, or compile: false")
    tower.backbone.compile(dynamic=True)


def _largest_list(module: nn.Module) -> nn.ModuleList | nn.Sequential | None:
    """The list of layers that holds the most parameters; lists within lists do not count."""
    found = [lst for lst in _outermost_lists(module) if _size(lst)]
    return max(found, key=_size) if found else None


def _outermost_lists(module: nn.Module) -> list[nn.ModuleList | nn.Sequential]:
    lists: list[nn.ModuleList | nn.Sequential] = []
    for child in module.children():
        alike = isinstance(child, nn.Sequential) and len({type(layer) for layer in child}) == 1
        if isinstance(child, nn.ModuleList) or alike:
            lists.append(cast("nn.ModuleList | nn.Sequential", child))
        else:
            lists += _outermost_lists(child)
    return lists


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
