"""Losses over pairs of unit vectors: InfoNCE, sigmoid and triplet, one way, and a Matryoshka wrapper; pure functions.

Assumes: row i of `a` belongs to row offset + i of `b`, the N candidates of all ranks. A loss is a sum over the B rows
given, divided by N, so that the shares of rows, tiles and ranks add up to the loss of the whole batch. Everything is
computed in float32 at least, whatever the autocast. Rows of one group are never negatives of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch.nn import functional

Same = Literal["mask", "positive"]
Negatives = Literal["hardest", "semi-hard"]


@dataclass(frozen=True, slots=True)
class Among:
    """Where the rows stand among the candidates: row i belongs to candidate offset + i.

    group_N: (N,) int64, or None; candidates of a row's group are left out (`mask`) or count as right (`positive`).
    """

    offset: int = 0
    group_N: torch.Tensor | None = None
    same: Same = "mask"

    def own(self, a_BD: torch.Tensor) -> torch.Tensor:
        """The candidate that belongs to each row (B,)."""
        return torch.arange(self.offset, self.offset + len(a_BD), device=a_BD.device)


ALONE = Among()


class OneWay(Protocol):
    """A loss of some rows of `a` against all candidates `b`, with everything else bound."""

    def __call__(self, a_BD: torch.Tensor, b_ND: torch.Tensor, /, *, among: Among) -> torch.Tensor: ...


def infonce(
    a_BD: torch.Tensor,
    b_ND: torch.Tensor,
    scale: torch.Tensor | float,
    *,
    among: Among = ALONE,
) -> torch.Tensor:
    """One-way InfoNCE (van den Oord et al. 2018, arXiv:1807.03748): row i of `a` should find row offset + i of `b`.

    `positive`: the mean over all rows of the group, all of them in the denominator (L_out of Khosla et al. 2020,
    arXiv:2004.11362).
    """
    with torch.autocast(a_BD.device.type, enabled=False):
        logits_BN = scale * (exact(a_BD) @ exact(b_ND).T)
        own_B = among.own(a_BD)
        positive_B = logits_BN.gather(1, own_B[:, None])[:, 0]
        if among.group_N is not None:
            same_BN = among.group_N[own_B][:, None] == among.group_N[None, :]
            if among.same == "positive":
                positive_B = (logits_BN * same_BN).sum(1) / same_BN.sum(1)
            else:
                same_BN = same_BN.scatter(1, own_B[:, None], False)
                # after the scale: -inf times a parameter would make its gradient NaN
                logits_BN = logits_BN.masked_fill(same_BN, -torch.inf)
        return (logits_BN.logsumexp(1) - positive_B).sum() / max(len(b_ND), 1)


def sigmoid(
    a_BD: torch.Tensor,
    b_ND: torch.Tensor,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float,
    *,
    among: Among = ALONE,
) -> torch.Tensor:
    """SigLIP's loss (Zhai et al. 2023, arXiv:2303.15343): every pair on its own is right or wrong; symmetric as it is.

    The sum over all pairs of a row, not their mean: the paper's normalisation by the batch size.
    """
    with torch.autocast(a_BD.device.type, enabled=False):
        logits_BN = scale * (exact(a_BD) @ exact(b_ND).T) + bias
        own_B = among.own(a_BD)
        right_BN = torch.zeros_like(logits_BN, dtype=torch.bool).scatter(1, own_B[:, None], True)
        same_BN = right_BN if among.group_N is None else among.group_N[own_B][:, None] == among.group_N[None, :]
        if among.same == "positive":
            right_BN = same_BN
        # not softplus: torch's is linear above 20, which a float64 check can see
        loss_BN = -functional.logsigmoid(torch.where(right_BN, logits_BN, -logits_BN))
        return loss_BN.masked_fill(same_BN & ~right_BN, 0).sum() / max(len(b_ND), 1)


def triplet(
    a_BD: torch.Tensor,
    b_ND: torch.Tensor,
    margin: float,
    *,
    negatives: Negatives = "hardest",
    among: Among = ALONE,
) -> torch.Tensor:
    """Hinge on cosine similarities against one negative of the whole batch per row; no scale.

    hardest: the most similar negative (VSE++, Faghri et al. 2018, arXiv:1707.05612). semi-hard: the most similar one
    that is less similar than the positive; where there is none, the least similar (FaceNet, Schroff et al. 2015,
    arXiv:1503.03832). `positive`: a row's positive is the least similar one of its group (Hermans et al. 2017,
    arXiv:1703.07737). A row without negatives costs nothing.
    """
    with torch.autocast(a_BD.device.type, enabled=False):
        similarity_BN = exact(a_BD) @ exact(b_ND).T
        own_B = among.own(a_BD)
        positive_B = similarity_BN.gather(1, own_B[:, None])[:, 0]
        not_negative_BN = torch.zeros_like(similarity_BN, dtype=torch.bool).scatter(1, own_B[:, None], True)
        if among.group_N is not None:
            not_negative_BN = among.group_N[own_B][:, None] == among.group_N[None, :]
            if among.same == "positive":
                positive_B = similarity_BN.masked_fill(~not_negative_BN, torch.inf).amin(1)
        negative_B = _negative(similarity_BN, not_negative_BN, positive_B, negatives)
        return functional.relu(margin - positive_B + negative_B).sum() / max(len(b_ND), 1)


def _negative(
    similarity_BN: torch.Tensor, not_negative_BN: torch.Tensor, positive_B: torch.Tensor, negatives: Negatives
) -> torch.Tensor:
    """The chosen negative's similarity (B,), -inf where there is none."""
    if not similarity_BN.shape[1]:
        return positive_B
    if negatives == "hardest":
        return similarity_BN.masked_fill(not_negative_BN, -torch.inf).amax(1)
    too_hard_BN = not_negative_BN | (similarity_BN >= positive_B[:, None])
    semi_B = similarity_BN.masked_fill(too_hard_BN, -torch.inf).amax(1)
    easiest_B = similarity_BN.masked_fill(not_negative_BN, torch.inf).amin(1)
    easiest_B = easiest_B.masked_fill(easiest_B.isposinf(), -torch.inf)
    return torch.where(semi_B.isneginf(), easiest_B, semi_B)


def matryoshka(loss: OneWay, dims: Sequence[int], weights: Sequence[float] | None = None) -> OneWay:
    """The sum over prefixes of the vectors, each of unit length again (Kusupati et al. 2022, arXiv:2205.13147).

    dims: lengths of the prefixes; weights: one each, 1 by default.
    """
    weighed = list(zip(dims, weights or [1.0] * len(dims), strict=True))

    def over_prefixes(a_BD: torch.Tensor, b_ND: torch.Tensor, /, *, among: Among) -> torch.Tensor:
        parts = [w * loss(prefix(a_BD, d), prefix(b_ND, d), among=among) for d, w in weighed]
        return torch.stack(parts).sum()

    return over_prefixes


def prefix(vectors_BD: torch.Tensor, dim: int) -> torch.Tensor:
    """The first `dim` dimensions, of unit length again."""
    if dim == vectors_BD.shape[1]:
        return vectors_BD
    return functional.normalize(exact(vectors_BD[:, :dim]), dim=-1)


def exact(features: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


Tile = Callable[[slice, Sequence[torch.Tensor]], Iterable[torch.Tensor]]


def tiled(loss: Tile, num_rows: int, tile: int, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of the parts that loss(rows, tensors) gives over tiles of rows, with its gradient, in one part's memory.

    Each part's gradient is taken at once and only its sum kept, so none outlives its turn (Inf-CL, Cheng et al.
    2024, arXiv:2410.17243, does the same inside a kernel). First derivatives only, and one backward.
    """
    if num_rows <= tile or not torch.is_grad_enabled():
        starts = range(0, max(num_rows, 1), tile)
        return torch.stack([part for i in starts for part in loss(slice(i, min(i + tile, num_rows)), tensors)]).sum()
    total: torch.Tensor = _Tiled.apply(loss, num_rows, tile, *tensors)  # type: ignore[no-untyped-call]  # torch's
    return total


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, loss: Tile, num_rows: int, tile: int, *tensors: torch.Tensor
    ) -> torch.Tensor:
        needed = ctx.needs_input_grad[3:]  # type: ignore[attr-defined]  # autograd's
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
        total = torch.zeros((), dtype=exact(tensors[0]).dtype, device=tensors[0].device)
        with torch.enable_grad():
            for start in range(0, num_rows, tile):
                for part in loss(slice(start, min(start + tile, num_rows)), leaves):
                    if part.requires_grad:
                        torch.autograd.backward(part)
                    total += part.detach()
        ctx.save_for_backward(*[leaf.grad for leaf in leaves])  # type: ignore[arg-type]  # None where none is needed
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # in place, since they are as large as the batch: a second backward is torch's error about a changed tensor
        grads = ctx.saved_tensors  # type: ignore[attr-defined]  # autograd's
        return (None, None, None, *(None if found is None else found.mul_(grad) for found in grads))
