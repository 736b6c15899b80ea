"""One rank of test_optimizer.py: `python tuned_ranks.py RANK WORLD STORE OUT BERT` takes three steps, spread by FSDP2.

Assumes: gradients are sums over rows, so that any number of ranks must come to the same parameters and averages.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from conjoin.encoders import ranks, sharded, tuning
from conjoin.encoders.joint import JointEncoder, build
from conjoin.encoders.options import TowerOptions
from conjoin.pipeline.optimizer import Ema, parameter_groups, rate
from conjoin.pipeline.recipe import TrainConfig

STEPS = 3
WORDS = ["red apple", "green pear", "a blue violin", "apple apple"]


def recipe(model: str) -> TrainConfig:
    towers = {"text": {"model": model, "tune": "lora"}, "image": {"tune": "last:2", "layer_decay": 0.7, "size_px": 16}}
    return TrainConfig.model_validate({"towers": towers, "lr": 1e-2, "ema": 0.9, "schedule": "wsd"})


def prepared(said: TrainConfig, world: int) -> JointEncoder:
    options = {"text": said.tower("text").options(0), "image": TowerOptions(size_px=16, width=8)}
    encoder = build(options, 8)
    for name in encoder.spec.towers:
        tower = encoder.tower(name)
        tuning.freeze(tower, said.tower(name).tuning(0))
        tuning.checkpoint_activations(tower)
        if world > 1:
            sharded.shard(tower.backbone, tuning.blocks(tower.backbone), torch.device("cpu"))
    return encoder.train()


def share(encoder: JointEncoder, rank: int, world: int) -> torch.Tensor:
    rows = slice(rank, None, world)
    pixels = torch.arange(4 * 16 * 16 * 3).reshape(4, 16, 16, 3).mul(7).remainder(256).to(torch.uint8)[rows]
    vectors = encoder.encode("text", encoder.collate("text", WORDS[rows])), encoder.encode("image", {"pixels": pixels})
    return (vectors[0] * vectors[1]).sum()


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[3]}", rank=rank, world_size=world)
    said = recipe(sys.argv[5])
    encoder = prepared(said, world)
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad and "scale" not in name}
    optimizer = torch.optim.AdamW(parameter_groups(encoder, said), lr=said.lr)
    ema = Ema(trained, said.ema or 0)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.autograd.backward(share(encoder, rank, world))
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        ranks.sum_([gradient for gradient in gradients if not sharded.is_spread(gradient)])
        for group in optimizer.param_groups:
            group["lr"] = said.lr * rate(step, STEPS, said) * group["lr_factor"]
        optimizer.step()
        ema.update_(step + 1)
    ema.load_state({name: sharded.whole(average) for name, average in ema.state().items()})
    found = {f"last.{name}": sharded.whole(p.detach()).clone() for name, p in trained.items()}
    found |= {f"ema.{name}": sharded.whole(average).clone() for name, average in ema.state().items()}
    with ema.swapped(), torch.no_grad():
        averaged = share(encoder, rank, world)
    ranks.sum_([averaged])
    after = {f"last.{name}": sharded.whole(p.detach()) for name, p in trained.items()}
    assert all(torch.equal(value, found[name]) for name, value in after.items())
    if rank == 0:
        save_file({**found, "averaged": averaged.reshape(1)}, sys.argv[4])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
