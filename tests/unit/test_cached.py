"""Cached gradients: torch's random state is replayed, and memory holds one part's graph at a time."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import nn

from conjoin.encoders import cached

CPU = torch.device("cpu")


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4)).double()


def share_of(vectors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return (vectors["a"] @ vectors["b"].T).logsumexp(1).sum() - (vectors["a"] * vectors["b"]).sum()


def parts(network: nn.Module, micro: int) -> dict[str, list[cached.Part]]:
    inputs = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    some = [lambda rows=rows: network(rows) for rows in torch.split(inputs, micro)]  # type: ignore[misc]
    return {"a": list(some), "b": list(some)}


@pytest.mark.parametrize("micro", [1, 3, 5])
def test_dropout_of_torch_is_the_same_in_both_passes(micro: int) -> None:
    expected, found = model(), model()
    torch.manual_seed(5)
    vectors = {name: torch.cat([part() for part in some]) for name, some in parts(expected, micro).items()}
    share_of(vectors).backward()
    torch.manual_seed(5)
    share = cached.backward(parts(found, micro), share_of, CPU)
    after = torch.rand(1)
    assert share.item() == pytest.approx(share_of(vectors).item(), rel=1e-12)
    for left, right in zip(found.parameters(), expected.parameters(), strict=True):
        assert left.grad is not None
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-12)
    torch.manual_seed(5)
    for some in parts(expected, micro).values():
        for part in some:
            part()
    assert torch.rand(1) == after


def test_without_the_replay_the_gradient_would_be_another(monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    for replay in (True, False):
        if not replay:
            monkeypatch.setattr(cached.torch, "set_rng_state", lambda state: torch.manual_seed(1))
        network = model()
        torch.manual_seed(5)
        cached.backward(parts(network, 3), share_of, CPU)
        first = next(network.parameters()).grad
        assert first is not None
        grads.append(first)
    assert (grads[0] - grads[1]).norm() > 0.1 * grads[0].norm()


def test_a_part_without_trainable_parameters_is_passed_over() -> None:
    network = model().requires_grad_(False)
    share = cached.backward(
        {"a": [lambda: network(torch.zeros(2, 6).double())] * 2, "b": parts(model(), 4)["b"][:1]}, share_of, CPU
    )
    assert torch.isfinite(share)


def peak_saved(micro: int) -> int:
    """Elements that autograd keeps at their most, over 700 rows."""
    alive = peak = 0

    class Kept:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal alive, peak
            self.tensor, self.size = tensor, tensor.numel()
            alive += self.size
            peak = max(peak, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.size

    network = nn.Sequential(*[nn.Linear(8, 8) for _ in range(12)])
    forward = [lambda some=some: network(some) for some in torch.split(torch.randn(700, 8), micro)]  # type: ignore[misc]
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        cached.backward({"a": forward}, lambda vectors: (vectors["a"] * vectors["a"]).sum(), CPU)
    assert alive == 0
    return peak


def test_memory_grows_with_the_part_and_not_with_the_batch() -> None:
    assert peak_saved(50) < 0.3 * peak_saved(700)
