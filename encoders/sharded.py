"""Parameters spread over ranks (FSDP2): sharded for the step, whole on disk, so that a checkpoint fits any layout.

Assumes: gradients are sums over ranks, as encoders/objective.py wants them, not means. Every rank makes the same
forward and backward calls, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from conjoin.encoders import ranks


def shard(backbone: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Spread a backbone's parameters over all ranks: a block at a time is whole, the rest of it when it is called."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*blocks, backbone):
        sharded = fully_shard(module, mesh=mesh)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def sync(backbone: nn.Module, on: bool) -> None:
    """Whether the next backward pass sums its gradients over ranks, or only adds them up here (no_sync)."""
    if isinstance(backbone, FSDPModule):
        backbone.set_requires_gradient_sync(on)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread over ranks; every rank takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's share of a tensor, all of it where it is not spread; the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(full: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every rank, spread as `layout` is."""
    full = full.to(layout.device)
    if not isinstance(layout, DTensor):
        return full
    # no source rank: everybody has it all, and a broadcast would need the same order of calls on every rank
    return distribute_tensor(full, layout.device_mesh, layout.placements, src_data_rank=None)


def norms(gradients: Sequence[Sequence[torch.Tensor]]) -> list[float]:
    """The Euclidean norm of each group of gradients, which must be summed over ranks before."""
    device = gradients[0][0].device if gradients and gradients[0] else torch.device("cpu")
    squares = torch.zeros(2, len(gradients), dtype=torch.float64, device=device)
    for place, group in enumerate(gradients):
        for spread in (False, True):
            own = [gradient for gradient in group if is_spread(gradient) == spread]
            shares = [local(gradient) for gradient in own]
            if shares:
                found = torch._foreach_norm(shares)
                squares[int(spread), place] = torch.stack(found).double().square().sum()
    if any(is_spread(gradient) for group in gradients for gradient in group):
        ranks.sum_([squares[1]])
    return [float(value) for value in squares.sum(0).sqrt()]


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether a rank holds only its share of it."""
    return isinstance(tensor, DTensor)
