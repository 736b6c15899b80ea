"""Batches larger than memory: gradients by way of cached vectors (GradCache, Gao et al. 2021, arXiv:2101.06983).

The loss needs every vector of the batch, its graph needs only one part at a time: vectors are computed without a graph,
the loss gives each vector its gradient, and each part is computed again, with a graph, and that gradient sent through.
The result is the gradient of the whole batch, whatever the parts.

Assumes: a part gives the same vectors both times. What it draws from torch's own random state is replayed; anything
else that it draws at random must depend on the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

Part = Callable[[], torch.Tensor]
ShareOf = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
Sync = Callable[[str, bool], None]
_State = tuple[torch.Tensor, torch.Tensor | None]


def backward(
    parts: Mapping[str, Sequence[Part]], share_of: ShareOf, device: torch.device, sync: Sync | None = None
) -> torch.Tensor:
    """Add the gradient of share_of({modality: vectors (B, D)}) to every parameter; returns the share, detached.

    parts: per modality the forward passes of its micro-batches, in the order of the rows, at least one. sync: called
    before each backward pass with the modality and whether it is its last, when ranks may sum its gradients.
    """
    if all(len(some) == 1 for some in parts.values()):
        share = share_of({name: some[0]() for name, some in parts.items()})
        torch.autograd.backward(share)
        return share.detach()
    states: dict[str, list[_State]] = {name: [] for name in parts}
    sizes: dict[str, list[int]] = {name: [] for name in parts}
    with torch.no_grad():
        leaves = {name: _vectors(some, states[name], sizes[name], device) for name, some in parts.items()}
    share = share_of({name: leaf.requires_grad_() for name, leaf in leaves.items()})
    torch.autograd.backward(share)
    share = share.detach()  # its graph holds the leaves
    # in the vectors' place: what the second passes keep beside them should not lie in the way of their activations
    grads = {name: leaf.detach() for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        grads[name].copy_(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    del leaves, leaf
    for name, grad in grads.items():
        last = len(parts[name]) - 1
        some_grads = torch.split(grad, sizes[name])
        for number, (part, state, part_grad) in enumerate(zip(parts[name], states[name], some_grads, strict=True)):
            if sync is not None:
                sync(name, number == last)
            with _replayed(state, device):
                again = part()
            if again.requires_grad:
                torch.autograd.backward(again, part_grad)
    return share


def _vectors(parts: Sequence[Part], states: list[_State], sizes: list[int], device: torch.device) -> torch.Tensor:
    """What the parts give (B, D), without a graph; appends each one's random state before and its number of rows.

    Each is written to its place at once: kept one by one, they would pin the heap that every pass frees.
    """
    out, rows = torch.empty(0), 0
    for part in parts:
        states.append(_random_state(device))
        found = part()
        if not sizes:  # parts are cut to one size, all but the last
            out = found.new_empty(len(found) * len(parts), *found.shape[1:])
        if (missing := rows + len(found) - len(out)) > 0:
            out = torch.cat([out, found.new_empty(missing, *found.shape[1:])])
        out[rows : rows + len(found)] = found
        rows += len(found)
        sizes.append(len(found))
    return out[:rows]


def _random_state(device: torch.device) -> _State:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextmanager
def _replayed(state: _State, device: torch.device) -> Iterator[None]:
    """torch's random state as it was then; afterwards as it is now."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield
