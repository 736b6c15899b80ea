"""Symmetric InfoNCE over the rows of every rank, with the exact gradient for every parameter.

Assumes: each rank calls with its own rows of both modalities, in the same order of pairs, and the caller sums losses
and gradients over ranks (a wrapper that averages them gives 1/W of both). Every rank takes part in every call, with
zero rows if it has none, and calls backward if any does. Features are unit vectors; everything is computed in float32
at least, whatever the autocast.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def infonce(
    a_BD: torch.Tensor,
    b_ND: torch.Tensor,
    scale: torch.Tensor | float,
    *,
    offset: int = 0,
    group_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """One-way InfoNCE (van den Oord et al. 2018, arXiv:1807.03748): row i of `a` should find row offset + i of `b`.

    The sum over the B rows divided by N, so that the shares of all ranks sum to the mean over all N rows; 0 if N is 0.
    group_N: int64; candidates of a row's own group are not its negatives.
    """
    with torch.autocast(a_BD.device.type, enabled=False):
        logits_BN = scale * (_exact(a_BD) @ _exact(b_ND).T)
        own_B = torch.arange(offset, offset + len(a_BD), device=a_BD.device)
        positive_B = logits_BN.gather(1, own_B[:, None])[:, 0]
        if group_N is not None:
            same_BN = group_N[own_B][:, None] == group_N[None, :]
            same_BN.scatter_(1, own_B[:, None], False)
            # after the scale: -inf times a parameter would make its gradient NaN
            logits_BN = logits_BN.masked_fill(same_BN, -torch.inf)
        return (logits_BN.logsumexp(1) - positive_B).sum() / max(len(b_ND), 1)


def symmetric_infonce(
    a_BD: torch.Tensor, b_BD: torch.Tensor, scale: torch.Tensor | float, group_B: torch.Tensor | None = None
) -> torch.Tensor:
    """CLIP's loss (Radford et al. 2021, arXiv:2103.00020) over the rows of all ranks: this rank's share of it.

    a, b: this rank's pairs; ranks may differ in B. group_B: int64, records that are not each other's negatives.
    The shares sum to the loss over all rows, and their gradients to its gradient, the scale's included.
    """
    counts = gather_counts(len(a_BD), a_BD.device)
    offset = sum(counts[: _rank()])
    # one collective each way for both modalities: two could run backward in another order on another rank
    both_N2D = gather_with_grad(torch.cat([_exact(a_BD), _exact(b_BD)], dim=1), counts)
    a_ND, b_ND = both_N2D[:, : a_BD.shape[1]], both_N2D[:, a_BD.shape[1] :]
    group_N = None if group_B is None else gather_with_grad(group_B[:, None], counts)[:, 0]
    forth = infonce(a_BD, b_ND, scale, offset=offset, group_N=group_N)
    back = infonce(b_BD, a_ND, scale, offset=offset, group_N=group_N)
    return (forth + back) / 2


def gather_counts(num_rows: int, device: torch.device) -> list[int]:
    """The number of rows of every rank; [num_rows] where there is only one."""
    if _world() == 1:
        return [num_rows]
    mine = torch.tensor([num_rows], device=device)
    counts = [torch.empty_like(mine) for _ in range(_world())]
    dist.all_gather(counts, mine)
    return [int(count) for count in counts]


def gather_with_grad(local_BD: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The rows of all ranks, by rank (N, D); a row's gradient is the sum of what all ranks' losses ask of it."""
    if _world() == 1:
        return local_BD
    gathered: torch.Tensor = _Gather.apply(local_BD, counts)  # type: ignore[no-untyped-call]  # torch's is untyped
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, local_BD: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.counts = counts  # type: ignore[attr-defined]  # autograd's way to remember
        padded = local_BD.new_zeros(max(counts), local_BD.shape[1])
        padded[: len(local_BD)] = local_BD
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_ND: torch.Tensor) -> tuple[torch.Tensor, None]:
        counts: list[int] = ctx.counts  # type: ignore[attr-defined]  # see forward
        total_ND = grad_ND.contiguous().clone()
        dist.all_reduce(total_ND)
        start = sum(counts[: _rank()])
        return total_ND[start : start + counts[_rank()]], None


def _exact(features: torch.Tensor) -> torch.Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if _world() > 1 else 0
