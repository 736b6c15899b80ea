"""One rank of test_losses.py: `python gloo_ranks.py RANK WORLD STORE OUT`, writes loss and gradients as float64.

Assumes: rows are given out unevenly, so that no rank's batch equals another's.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

from conjoin.encoders.losses import symmetric_infonce

ROWS = {1: [7], 2: [5, 2], 3: [3, 0, 4]}


class Toy(nn.Module):
    """Two linear encoders and a scale in float64: the smallest thing with every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(5, 4).double(), nn.Linear(6, 4).double()
        self.log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def loss(self, left: torch.Tensor, right: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        a = nn.functional.normalize(self.left(left), dim=1)
        b = nn.functional.normalize(self.right(right), dim=1)
        return symmetric_infonce(a, b, self.log_scale.exp(), group)


def gradients(rank: int, world: int) -> dict[str, torch.Tensor]:
    """This rank's share of the loss and of every gradient."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(7, width, generator=generator, dtype=torch.float64) for width in (5, 6))
    group = torch.tensor([0, 1, 0, 2, 3, 1, 4])
    start = sum(ROWS[world][:rank])
    mine = slice(start, start + ROWS[world][rank])
    toy = Toy()
    loss = toy.loss(left[mine], right[mine], group[mine])
    loss.backward()
    found = {name: parameter.grad for name, parameter in toy.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **found}


def main() -> None:
    rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    torch.save(gradients(rank, world), out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
