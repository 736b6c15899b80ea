"""Rows of every rank: gathered with exact gradients, counted, summed.

Assumes: every rank takes part in every call, in the same order, with zero rows if it has none. Nothing is divided by
the number of ranks: callers sum the ranks' shares.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

_BUCKET = 1 << 24  # elements of one collective: 64 MB of float32


def world() -> int:
    """How many ranks there are, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def gather_counts(num_rows: int, device: torch.device) -> list[int]:
    """The number of rows of every rank; [num_rows] where there is only one."""
    if world() == 1:
        return [num_rows]
    mine = torch.tensor([num_rows], device=device)
    counts = [torch.empty_like(mine) for _ in range(world())]
    dist.all_gather(counts, mine)
    return [int(count) for count in counts]


def gather(local_BD: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The rows of all ranks, by rank (N, D), without gradient."""
    if world() == 1:
        return local_BD
    padded = local_BD.new_zeros(max(counts), *local_BD.shape[1:])
    padded[: len(local_BD)] = local_BD
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_with_grad(local_BD: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """The rows of all ranks, by rank (N, D); a row's gradient is the sum of what all ranks' losses ask of it."""
    if world() == 1:
        return local_BD
    gathered: torch.Tensor = _Gather.apply(local_BD, counts)  # type: ignore[no-untyped-call]  # torch's is untyped
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, local_BD: torch.Tensor, counts: Sequence[int]
    ) -> torch.Tensor:
        ctx.counts = counts  # type: ignore[attr-defined]  # autograd's way to remember
        return gather(local_BD, counts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        counts: Sequence[int] = ctx.counts  # type: ignore[attr-defined]  # see forward
        total_ND = grad_ND.contiguous().clone()
        dist.all_reduce(total_ND)
        start = sum(counts[: rank()])
        return total_ND[start : start + counts[rank()]], None


def sum_(tensors: Sequence[torch.Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in buckets, so that no copy of all of them is made."""
    if world() == 1:
        return
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and sum(t.numel() for t in bucket) + tensor.numel() > _BUCKET:
            _sum_bucket(bucket)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: Sequence[torch.Tensor]) -> None:
    # summed in the widest type among them: a float64 model stays exact, bf16 gradients lose nothing more
    wide = bucket[0].dtype
    for tensor in bucket[1:]:
        wide = torch.promote_types(wide, tensor.dtype)
    flat = torch.cat([tensor.reshape(-1).to(torch.promote_types(wide, torch.float32)) for tensor in bucket])
    dist.all_reduce(flat)
    start = 0
    for tensor in bucket:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
